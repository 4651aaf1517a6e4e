"""The steps of `steps` by few, fused kernels, for graphs on CUDA where a step's weights are in half precision.

What is fused, and why it pays, is in `kernels`, `linear_kernels` and `few_kernels`. The arithmetic differs from torch's
by rounding only: it keeps float32 between the fused operations where torch rounds.

Legend: n rows, K vectors of a patch, L decoder layers with cross-attention.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.caches import AttentionCache
from blt_model.config import Pooling, TransformerConfig
from blt_model.generation import resident
from blt_model.generation.absorbed import AbsorbedPatch, absorbed_weights
from blt_model.generation.go_ahead import GoAhead
from blt_model.generation.graphs import Fork
from blt_model.generation.resident import Parts, ResidentStack
from blt_model.generation.steps import BlockStep, CrossStep, HashHistory, Norm
from blt_model.triton_support import HAS_TRITON
from blt_model.vocabulary import BYTE_OFFSET, EOS_ID

_LEAST_BLOCK = 16
"""The inputs of a map must have this power of two as a factor, as the matrix units take so many at once."""


@functools.cache
def _kernels() -> ModuleType:
    """The kernels; loading them loads triton."""
    from blt_model.generation import kernels

    return kernels


@functools.cache
def _linear_kernels() -> ModuleType:
    """The kernels of linear maps; loading them loads triton."""
    from blt_model.generation import linear_kernels

    return linear_kernels


@functools.cache
def _few_kernels() -> ModuleType:
    """The kernels of linear maps of a few rows; loading them loads triton."""
    from blt_model.generation import few_kernels

    return few_kernels


@functools.cache
def _head_kernels() -> ModuleType:
    """The kernels of heads; loading them loads triton."""
    from blt_model.generation import head_kernels

    return head_kernels


@functools.cache
def _token_kernels() -> ModuleType:
    """The kernels for embeddings, entropies and choices; loading them loads triton."""
    from blt_model.generation import token_kernels

    return token_kernels


@functools.cache
def _patch_kernels() -> ModuleType:
    """The kernels of complete patches; loading them loads triton."""
    from blt_model.generation import patch_kernels

    return patch_kernels


def available(model: BLT | ByteLM) -> bool:
    """Whether the kernels can run the steps of a model on its device, in its dtype."""
    weights = list(model.parameters())
    if not (HAS_TRITON and all(weight.device.type == "cuda" for weight in weights)):
        return False
    if any(type(weight) is not torch.nn.Parameter for weight in weights):
        return False
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float16}:
        return False
    if isinstance(model, ByteLM):
        return _fits(model.config.transformer)
    config = model.config
    width = config.encoder.dim // config.cross_attention.num_heads
    return width & (width - 1) == 0 and all(map(_fits, (config.encoder, config.latent, config.decoder)))


def _fits(config: TransformerConfig) -> bool:
    block, width = _kernels().inner_block, config.head_dim
    maps_fit = min(block(config.dim), block(config.feed_forward_dim)) >= _LEAST_BLOCK
    return maps_fit and config.kv_heads == config.num_heads and width >= _LEAST_BLOCK and width & (width - 1) == 0


@dataclass(frozen=True, slots=True)
class FusedStep:
    """Where one new token of each of n rows goes; everything else the kernels work out themselves."""

    positions: Tensor
    """int64 [n] of the new tokens."""
    rows: Tensor | None
    """int64 [n] their rows; None for the first n."""
    programs: int = 0
    """Multiprocessors that a resident stack takes; 0 for all."""
    skipped: Tensor | None = None
    """int64 [1], not nought where a resident stack is to do nothing; None for a step that is wanted."""


@dataclass(frozen=True, slots=True)
class FusedBlock:
    """A transformer block over a cache, in five kernels."""

    block: BlockStep

    def __call__(self, x: Tensor, cache: AttentionCache, layer: int, step: FusedStep) -> Tensor:
        """Run one token of each row; see `BlockStep`."""
        block = self.block
        heads = normed_linear(x, block.attention_norm, block.query_key_value)
        parts, stats = _kernels().attend(
            heads, cache.keys[layer], cache.values[layer], cache.rotary.table, step.positions, step.rows
        )
        x = _linear_kernels().linear(parts, block.output, stats=stats, residual=x)
        norm = block.feed_forward_norm
        hidden = _linear_kernels().linear(x, block.gate_value, norm=norm.weight, eps=norm.eps, gated=True)
        result: Tensor = _linear_kernels().linear(hidden, block.feed_forward_output, residual=x)
        return result


def normed_linear(x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A linear map [n, N] of normalised rows [n, K], in a dtype of its own if one is given."""
    result: Tensor = _linear_kernels().linear(x, weight, norm=norm.weight, eps=norm.eps, dtype=dtype)
    return result


class Head:
    """A model's last normalisation and map for one row, with what is made of the logits in the same kernel."""

    def __init__(self, norm: Norm, weight: Tensor) -> None:
        """Read weights as they lie, [V, dim]."""
        self._kernels = _head_kernels().Head(norm.weight, weight, norm.eps)

    @classmethod
    def of(cls, model: ByteLM) -> Head:
        """That of a model."""
        return cls(Norm.of(model.norm), model.head.weight)

    def entropy(self, x: Tensor, out: Tensor, skipped: Tensor | None = None) -> None:
        """Write the entropy after trunk outputs [1, dim] to float32 [at least 1], in nats, unless it is skipped."""
        self._kernels.entropy(x, out, skipped)

    def likeliest(
        self, x: Tensor, tokens: Tensor, counters: Tensor, place: Tensor, result: Tensor, **options: Any
    ) -> None:
        """Choose the likeliest byte or EOS after states [1, dim], and hand it over as `hand_over` does."""
        self._kernels.likeliest(x, tokens, counters, place, result, first=BYTE_OFFSET, end=EOS_ID, **options)


def mapped(x: Tensor, weight: Tensor) -> Tensor:
    """A linear map [n, N] of rows [n, K]."""
    result: Tensor = _linear_kernels().linear(x, weight)
    return result


def put_entropies(x: Tensor, model: ByteLM, out: Tensor) -> None:
    """Write the entropies of an entropy model's trunk outputs [n, dim] to float32 [at least n], in nats."""
    logits = normed_linear(x, Norm.of(model.norm), model.head.weight, torch.float32)
    _token_kernels().entropy(logits, out)


def read_patches(cross: CrossStep, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Let the bytes [n, dim] of the first n rows read keys and values [B, H, K, E]; see `CrossStep`."""
    query = normed_linear(x, cross.query_norm, cross.query)
    mixed = _kernels().read_patches(query, keys, values)
    result: Tensor = _linear_kernels().linear(mixed, cross.output, residual=x, residual_scale=float(cross.residual))
    return result


def embed(
    tokens: Tensor, positions: Tensor, hashes: HashHistory, byte_table: Tensor, *, average: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Embed a new token of each row, int64 [n], which the history takes; for options and result see `token_kernels`."""
    result: tuple[Tensor, Tensor | None] = _token_kernels().embed(
        tokens, positions, hashes, byte_table, average=average, **options
    )
    return result


def await_word(go_ahead: GoAhead, places: Tensor, tokens: Tensor, hashes: HashHistory, *, draws: bool) -> None:
    """Wait for the word for a launch of one row, and where it goes on, move its history on; see `token_kernels`."""
    _token_kernels().await_word(go_ahead, places, tokens, hashes, draws=draws)


def block_steps(blocks: Iterable[BlockStep]) -> list[FusedBlock]:
    """The fused form of a stack's blocks."""
    return [FusedBlock(block) for block in blocks]


def can_be_resident(parts: Parts) -> bool:
    """Whether a stack can run in one launch: one row, on a device that can."""
    first = parts.caches[0]
    return first.rows == 1 and resident.available(first.keys.device) and parts.fit()


def resident_stack(parts: Parts) -> ResidentStack | None:
    """The form of a stack in one launch; None where that cannot be."""
    return ResidentStack(parts) if can_be_resident(parts) else None


class PatchKeys:
    """Keys and values that all decoder layers' cross-attentions make of a patch, in one product."""

    def __init__(self, layers: list[CrossStep]) -> None:
        """Lay the layers' weights side by side, each with the scales of the normalisation before it."""
        scaled = [layer.key_value.detach().float() * layer.key_norm.weight.detach().float() for layer in layers]
        self._weight = torch.stack(scaled).to(layers[0].key_value.dtype)
        self._eps = layers[0].key_norm.eps
        self._width = layers[0].head_dim

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [L, m, H, K, E] of vectors [m, K, dim]."""
        count, each, dim = vectors.shape
        flat = F.rms_norm(vectors, (dim,), None, self._eps).view(1, -1, dim)
        heads = torch.matmul(flat, self._weight.transpose(1, 2))
        key, value = heads.view(len(heads), count, each, 2, -1, self._width).permute(3, 0, 1, 4, 2, 5).unbind(0)
        return key, value

    def of_one(self, vectors: Tensor) -> Tensor:
        """Keys, and after them values, [K, L, 2, H, E], contiguous, of the vectors [K, dim] of one patch."""
        heads: Tensor = _few_kernels().few_rows(vectors, self._weight.flatten(0, 1), eps=self._eps)
        return heads.view(len(vectors), len(self._weight), 2, -1, self._width)


class Absorption:
    """The newest patch of the one text as a resident stack's bytes read it, in one kernel; see `absorbed`."""

    def __init__(self, layers: list[CrossStep], vectors: int) -> None:
        """Make room for patches of so many vectors, which layers read."""
        self._weights = absorbed_weights(layers)
        self.patch = AbsorbedPatch.empty(self._weights, vectors)

    def __call__(self, heads: Tensor) -> None:
        """Take a patch's keys and values [K, L, 2, H, E], contiguous."""
        _patch_kernels().absorb(heads, self._weights, self.patch)


def likeliest(logits: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row and its log-probability; see `token_kernels.likeliest`."""
    result: tuple[Tensor, Tensor] = _token_kernels().likeliest(logits, first, end)
    return result


def hand_over(
    token: Tensor,
    log_probability: Tensor,
    tokens: Tensor,
    counters: Tensor,
    place: Tensor,
    result: Tensor,
    **options: Any,
) -> None:
    """Leave what a step has found for the next one and the host; see `token_kernels.hand_over`."""
    _token_kernels().hand_over(token, log_probability, tokens, counters, place, result, **options)


class PatchReader:
    """A patch's vectors as readers of its bytes, with one layer's cross-attention; see `CrossStep`.

    What the bytes give is made beside all that is started before the vectors read.
    """

    def __init__(self, cross: CrossStep, states: Tensor) -> None:
        """Begin with the keys and values of the bytes.

        Args:
            cross: the layer's parameters.
            states: [S, dim] the bytes, and what lies after them.
        """
        self._cross = cross
        # What is used after the lines have joined is allocated on the first of them.
        self._heads = states.new_empty((len(states), len(cross.key_value)))
        self._fork = Fork(states.device)
        with self._fork.branch():
            torch.mm(cross.key_norm(states), cross.key_value.T, out=self._heads)

    def __call__(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Let vectors [K, dim] read as many of the bytes as int64 [1] says; gives [K, dim]. Once only."""
        cross, linear = self._cross, _few_kernels().few_rows
        query = linear(vectors, cross.query, norm=cross.query_norm.weight, eps=cross.query_norm.eps)
        self._fork.join()
        mixed = _patch_kernels().read_bytes(query, self._heads, lengths, cross.head_dim)
        result: Tensor = linear(mixed, cross.output, residual=vectors, residual_scale=float(cross.residual))
        return result


def pooled(states: Tensor, lengths: Tensor, projection: Tensor, pooling: Pooling) -> Tensor:
    """Pool the first int64 [1] bytes of [S, dim] and map them to [1, K * dim]."""
    result: Tensor = _patch_kernels().map_pooled(states, lengths, projection, mean=pooling == Pooling.MEAN)
    return result


def can_choose(logits: Tensor) -> bool:
    """Whether `likeliest` takes these logits."""
    return HAS_TRITON and logits.device.type == "cuda" and logits.dtype in (torch.bfloat16, torch.float16)
