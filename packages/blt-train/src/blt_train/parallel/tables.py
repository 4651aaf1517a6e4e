"""Hash n-gram tables whose rows are spread over all ranks.

The tables are most of a BLT's parameters (3 of 4.5 billion of the 1B model), and a batch reads few of their rows. To
gather them like other weights would move 12 GB per micro batch and need room for the whole and for its gradient. Here
the rows stay where they are: every rank asks their owners for the distinct rows that its tokens need, sums them itself,
and in the backward pass sends each row's gradient back to its owner. What moves is proportional to tokens, not to the
tables or the number of ranks; gradients, optimizer state and updates are local.

The rows are spread over all ranks, also where other weights have several copies: copies of the tables would have to be
kept equal by an all-reduce of their gradients, which costs more than asking ranks further away.

The host waits for the device once per forward pass, to learn how many rows go where.

Legend: T tokens, M tables, U distinct rows that this rank's tokens need, A rows that others ask of this rank, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from blt_model.hash_embedding import HashEmbedding, hash_rows
from blt_model.row_gradients import add_rows, dense_gradient
from blt_train.parallel.rows import local_rows, row_offsets


@dataclass(frozen=True, slots=True)
class Exchange:
    """Who sends whom how many rows in one forward pass, and back in its backward pass."""

    asked: Tensor
    """int64 [A]: the rows that others, one after the other, ask of this rank, counted from its first."""
    needed: list[int]
    """[W]: rows that each rank sends to this one; their sum is U."""
    given: list[int]
    """[W]: rows that this rank sends to each; their sum is A."""
    dtype: torch.dtype
    """In which rows travel; gradients travel in that of the table."""


class _Fetch(torch.autograd.Function):
    """The rows that this rank needs, from all ranks."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, exchange: Exchange, accumulates_in_place: bool) -> Tensor:
        ctx.table, ctx.exchange, ctx.accumulates_in_place = table, exchange, accumulates_in_place
        given = local_rows(table).index_select(0, exchange.asked).to(exchange.dtype)
        fetched = given.new_empty(sum(exchange.needed), table.shape[1])
        dist.all_to_all_single(fetched, given, exchange.needed, exchange.given)
        return fetched.to(table.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        exchange: Exchange = ctx.exchange
        (gradient,) = gradients
        returned = gradient.new_empty(len(exchange.asked), gradient.shape[1])
        dist.all_to_all_single(returned, gradient.contiguous(), exchange.given, exchange.needed)
        total = dense_gradient(ctx.table) if ctx.accumulates_in_place else torch.zeros_like(ctx.table)
        add_rows(local_rows(total), exchange.asked[:, None], returned)
        return None if ctx.accumulates_in_place else total, None, None


class ShardedHashEmbedding(HashEmbedding):
    """The tables of `HashEmbedding`, their rows spread over all ranks; forward and gradient are the same."""

    def __init__(self, whole: HashEmbedding, mesh: DeviceMesh, *, travel_dtype: torch.dtype | None = None) -> None:
        """Take the place of a module; the weight is without content on the device of the original.

        Args:
            whole: the original, such as on the meta device.
            mesh: of all ranks of the job, in order.
            travel_dtype: in which rows are sent; None for that of the table.
        """
        nn.Module.__init__(self)
        rows, dim = whole.weight.shape
        self.config = whole.config
        self._travel_dtype = travel_dtype or whole.weight.dtype
        offsets = row_offsets(rows, tuple(mesh.shape))
        rank = dist.get_rank()
        self._first = offsets[rank]
        self._offsets = torch.tensor(offsets)
        local = torch.empty(
            offsets[rank + 1] - offsets[rank], dim, dtype=whole.weight.dtype, device=whole.weight.device
        )
        placements = [Shard(0)] * mesh.ndim
        self.weight = nn.Parameter(
            DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.weight.shape, stride=(dim, 1))
        )

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Sum of the n-gram embeddings of every token; all ranks must call this equally often.

        Args:
            tokens: int64 [T] ids.
            positions: int64 [T], the place of each token in its document.

        Returns:
            [T, dim] of the table's dtype.
        """
        rows, places = torch.unique(hash_rows(tokens, positions, self.config), return_inverse=True)
        fetched = _Fetch.apply(self.weight, self._exchange(rows), self.accumulates_in_place)
        return F.embedding_bag(places, fetched, mode="sum", per_sample_weights=self.sample_weights(positions))

    def _exchange(self, rows: Tensor) -> Exchange:
        """Tell the owners of rows (int64 [U], rising) which of them this rank needs, and learn what others need."""
        if self._offsets.device != rows.device:
            self._offsets = self._offsets.to(rows.device)
        # Rising rows lie in the order of their owners.
        needed = torch.searchsorted(rows, self._offsets).diff()
        given = torch.empty_like(needed)
        dist.all_to_all_single(given, needed)
        needed_counts, given_counts = torch.stack([needed, given]).tolist()
        asked = rows.new_empty(sum(given_counts))
        dist.all_to_all_single(asked, rows, given_counts, needed_counts)
        return Exchange(asked - self._first, needed_counts, given_counts, self._travel_dtype)
