"""Spreading a model's weights over the ranks of a mesh with FSDP2, a block at a time.

A unit is gathered before its forward pass and again before its backward pass: each transformer block, together with the
cross-attention of its layer; the byte embedding; and what is left (patch projections, last norm, head) with the model
as a whole. Hash tables are not gathered at all, see `tables`.

Gradients are summed, not averaged, over ranks: the loss is divided by the number of targets of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from blt_model import BLT, ByteLM
from blt_train.config import ParallelConfig
from blt_train.parallel.tables import ShardedHashEmbedding


def shard_model(
    model: BLT | ByteLM, mesh: DeviceMesh, config: ParallelConfig, *, compute_dtype: torch.dtype | None = None
) -> None:
    """Spread a model over a mesh; its parameters become DTensors, sharded along dimension 0.

    Args:
        model: on any device, such as meta; its blocks compiled and set to recompute already where they are to be.
        mesh: from `make_mesh`, of all ranks.
        config: what to free after the forward pass.
        compute_dtype: to which the weights of linear maps and norms are cast where they are gathered; None for their
            own. Gradients are summed in float32 in any case.
    """
    own = MixedPrecisionPolicy()
    cast = own
    if compute_dtype is not None:
        # Inputs keep their dtype: autocast, as on one GPU, says what is computed in which.
        cast = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ignored: set[nn.Parameter] = set()
    if isinstance(model, BLT) and model.encoder.hash_embedding is not None:
        table = ShardedHashEmbedding(model.encoder.hash_embedding, mesh, travel_dtype=compute_dtype)
        model.encoder.hash_embedding = table
        ignored.add(table.weight)
    free = config.reshard_after_forward
    for unit in units(model):
        # The residual stream begins as the embedding's rows: in float32, as on one GPU.
        is_table = isinstance(unit[0], nn.Embedding)
        fully_shard(unit, mesh=mesh, reshard_after_forward=free, mp_policy=own if is_table else cast)
    # What is left is needed last in the forward pass and first in the backward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=cast, ignored_params=ignored)
    for module in sharded_modules(model):
        # gloo knows no averages, and NCCL's would have to be undone: sums alone are exact and everywhere.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def units(model: BLT | ByteLM) -> Iterator[list[nn.Module]]:
    """Yield the modules that are gathered together, whole model and hash tables left out.

    Args:
        model: of either kind.
    """
    if isinstance(model, ByteLM):
        yield [model.embedding]
        yield from ([block] for block in model.blocks)
        return
    yield [model.encoder.embedding]
    yield from ([block] for block in model.latent.blocks)
    for local in (model.encoder, model.decoder):
        for layer, block in enumerate(local.blocks):
            name = str(layer)
            yield [block, local.cross_attention[name]] if name in local.cross_attention else [block]


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """Yield the modules whose weights are spread; none for a plain model.

    Args:
        model: any.
    """
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def begin_micro_batch(model: nn.Module, config: ParallelConfig, *, is_last: bool) -> None:
    """Say how the next backward pass ends: with gradients kept on each rank, or summed over all.

    Kept gradients have float32 and the size of the whole weights without hash tables; that is the price of summing once
    a step. With `reshard_after_forward` false the gathered weights too stay for the next micro batch.

    Args:
        model: spread over ranks or not; a plain one needs no telling.
        config: whether to reduce after every micro batch.
        is_last: whether it is the step's last micro batch.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(is_last or config.reduce_each_micro_batch)
    # Between copies of the weights once a step will do in any case: what waits for it is sharded already.
    model.set_requires_all_reduce(is_last)
    model.set_is_last_backward(is_last)
    if not config.reshard_after_forward:
        model.set_reshard_after_backward(is_last)


def free_gathered(model: nn.Module) -> None:
    """Free what forward passes without a backward pass left gathered, so that parameters are shards again.

    Args:
        model: spread over ranks or not.
    """
    for module in sharded_modules(model):
        module.reshard()
