"""Hash n-gram embeddings: every byte also gets the sum of embeddings of the n-grams that end at it.

All n-gram sizes and hash functions share one parameter, read by one fused gather and sum. The hash of the tokens
t_0 (oldest) to t_{n-1} (newest) is sum of t_j * prime ** j in wrapping int64, modulo the table size. N-grams that
begin before their document are filled with id 0.

Legend: T tokens, M tables.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn

from blt_model.config import HashEmbeddingConfig
from blt_model.row_gradients import sum_rows
from blt_model.triton_support import has_triton
from blt_model.vocabulary import BYTE_OFFSET

# Arithmetic constants of the released models: hash function f uses prime f.
PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)
LONGEST_UNROLLED = 32
"""N-grams up to which a kernel, whose loops are unrolled, makes the rows."""


def hash_rows(tokens: Tensor, positions: Tensor, config: HashEmbeddingConfig) -> Tensor:
    """Rows of the shared table for every token.

    Args:
        tokens: int64 [T] ids.
        positions: int64 [T], the place of each token in its document.
        config: sizes and conventions.

    Returns:
        int64 [T, M], tables in the order function by function, within it as in ngram_sizes.
    """
    longest = max(config.ngram_sizes)
    # Compiled code is one pass anyway.
    if has_triton(tokens) and longest <= LONGEST_UNROLLED and not torch.compiler.is_compiling():
        from blt_model import step_kernels

        made: Tensor = step_kernels.hash_rows(
            tokens,
            positions,
            sizes=config.ngram_sizes,
            primes=PRIMES[: config.num_functions],
            table_size=config.table_size,
            offset=BYTE_OFFSET if config.raw_bytes else 0,
            newest_first=config.newest_first,
        )
        return made
    symbols = tokens - BYTE_OFFSET if config.raw_bytes else tokens
    # before[d] is the token d places earlier, 0 before the document's start.
    padded = F.pad(symbols, (longest - 1, 0))
    before = [
        torch.where(positions >= d, padded[longest - 1 - d : longest - 1 - d + len(tokens)], 0) for d in range(longest)
    ]
    columns: list[Tensor] = []
    for prime in PRIMES[: config.num_functions]:
        hashes: dict[int, Tensor] = {}
        running = torch.zeros_like(symbols)
        power = torch.ones_like(symbols[:1])
        for n in range(1, longest + 1):
            if config.newest_first:
                running = running + before[n - 1] * power
                power = power * prime
            else:
                running = running * prime + before[n - 1]
            hashes[n] = running
        columns.extend(hashes[n] for n in config.ngram_sizes)
    rows = torch.stack(columns, dim=1) % config.table_size
    return rows + torch.arange(config.num_tables, device=tokens.device) * config.table_size


class HashEmbedding(nn.Module):
    """The tables of all n-gram sizes and hash functions, end to end in one parameter."""

    #: Whether backward passes add the table's gradient straight into its `.grad`, see `row_gradients`. The weights and
    #: sums are the same, but autograd sees no gradient: `torch.autograd.grad` cannot give it, hooks do not get it.
    accumulates_in_place = False

    def __init__(self, config: HashEmbeddingConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_tables * config.table_size, dim))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Sum of the n-gram embeddings of every token.

        Args:
            tokens: int64 [T] ids.
            positions: int64 [T], the place of each token in its document.

        Returns:
            [T, dim] of the table's dtype.
        """
        rows, weights = hash_rows(tokens, positions, self.config), self.sample_weights(positions)
        if not self.accumulates_in_place:
            return F.embedding_bag(rows, self.weight, mode="sum", per_sample_weights=weights)
        if torch.compiler.is_compiling():
            from blt_model.untraced import sum_rows_untraced

            untraced: Tensor = sum_rows_untraced(self.weight, rows, weights)
            return untraced
        return sum_rows(self.weight, rows, weights)

    def sample_weights(self, positions: Tensor) -> Tensor | None:
        """What each n-gram's embedding counts.

        Args:
            positions: int64 [T], the place of each token in its document.

        Returns:
            [T, M] of the table's dtype, 0 for n-grams that are left out; None where all count 1.
        """
        if not self.config.omit_partial:
            return None
        sizes = torch.tensor(self.config.ngram_sizes, device=positions.device).repeat(self.config.num_functions)
        return (positions[:, None] + 1 >= sizes).to(self.weight.dtype)
