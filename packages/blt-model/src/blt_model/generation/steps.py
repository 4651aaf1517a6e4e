"""The models one token at a time: what a forward computes for one new position of each row, over caches.

Weights are read straight from the modules' parameters; at one token a row, calling modules costs as much time as the
smaller of the operations themselves.

Legend: n rows, H query heads, G key and value heads, E head width, K vectors of a patch, M tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.caches import AttentionCache, AttentionStep
from blt_model.config import HashEmbeddingConfig, Pooling
from blt_model.cross_attention import CrossAttention
from blt_model.hash_embedding import PRIMES, HashEmbedding
from blt_model.layers import Block, RMSNorm
from blt_model.vocabulary import BYTE_OFFSET


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square normalisation."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: RMSNorm) -> Norm:
        """The module's parameters."""
        return cls(module.weight, module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise [..., dim]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class BlockStep:
    """A transformer block over a cache."""

    attention_norm: Norm
    query_key_value: Tensor
    output: Tensor
    feed_forward_norm: Norm
    gate_value: Tensor
    feed_forward_output: Tensor
    num_heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, block: Block) -> BlockStep:
        """The block's parameters."""
        attention, feed_forward = block.attention, block.feed_forward
        return cls(
            Norm.of(block.attention_norm),
            attention.query_key_value.weight,
            attention.output.weight,
            Norm.of(block.feed_forward_norm),
            feed_forward.gate_value.weight,
            feed_forward.output.weight,
            attention.num_heads,
            attention.kv_heads,
            attention.head_dim,
        )

    def __call__(self, x: Tensor, cache: AttentionCache, layer: int, step: AttentionStep) -> Tensor:
        """Run one token of each row.

        Args:
            x: [n, dim].
            cache: of the stack.
            layer: the block's place in the stack.
            step: the plan of this step.

        Returns:
            [n, dim].
        """
        count, turning = len(x), self.num_heads + self.kv_heads
        heads = F.linear(self.attention_norm(x), self.query_key_value).view(count, -1, self.head_dim)
        rotated = rotate_pairs(heads[:, :turning], step.phases)
        # The query heads that share a key head stand where attention has its queries: no key is repeated.
        query = rotated[:, : self.num_heads].view(count, self.kv_heads, -1, self.head_dim)
        mixed = cache.attend(layer, query, rotated[:, self.num_heads :], heads[:, turning:], step)
        x = x + F.linear(mixed.reshape(count, -1), self.output)
        gate, value = F.linear(self.feed_forward_norm(x), self.gate_value).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * value, self.feed_forward_output)


def rotate_pairs(heads: Tensor, phases: Tensor) -> Tensor:
    """Rotate neighbouring pairs of every head, as `blt_model.layers.rotate` does.

    Args:
        heads: [n, heads, E].
        phases: complex64 [n, 1, E / 2].

    Returns:
        [n, heads, E], contiguous, of the heads' dtype.
    """
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * phases).flatten(-2).to(heads.dtype)


@dataclass(frozen=True, slots=True)
class CrossStep:
    """The parameters of a cross-attention."""

    query_norm: Norm
    key_norm: Norm
    query: Tensor
    key_value: Tensor
    output: Tensor
    head_dim: int
    residual: int

    @classmethod
    def of(cls, module: CrossAttention) -> CrossStep:
        """The module's parameters."""
        return cls(
            Norm.of(module.query_norm),
            Norm.of(module.key_norm),
            module.query.weight,
            module.key_value.weight,
            module.output.weight,
            module.head_dim,
            module.residual,
        )

    def keys_values(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [n, H, S, E] of what is read, [n, S, dim]."""
        heads = F.linear(self.key_norm(read), self.key_value).view(*read.shape[:2], 2, -1, self.head_dim)
        key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def __call__(self, readers: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let readers read.

        Args:
            readers: [n, Q, dim].
            keys: [n, H, S, E].
            values: [n, H, S, E].
            mask: bool [n, 1, 1, S] of what may be read; None for all.

        Returns:
            [n, Q, dim].
        """
        query = F.linear(self.query_norm(readers), self.query)
        query = query.view(*readers.shape[:2], -1, self.head_dim).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self.residual * readers + F.linear(mixed.transpose(1, 2).flatten(2), self.output)


class HashHistory:
    """The last symbols of every row, and the n-gram embeddings of the newest."""

    def __init__(self, module: HashEmbedding, rows: int) -> None:
        """Begin with empty rows.

        Args:
            module: the hash embedding.
            rows: how many.
        """
        config, device = module.config, module.weight.device
        self.config, self.weight = config, module.weight
        self.offset = BYTE_OFFSET if config.raw_bytes else 0
        """What is taken from a token to give its symbol."""
        longest = max(config.ngram_sizes)
        self.symbols = torch.zeros(rows, longest, dtype=torch.int64, device=device)
        """int64 [rows, longest], newest first, 0 before the document."""
        self.powers = _hash_powers(config, longest).to(device)
        self._bases = torch.arange(config.num_tables, device=device) * config.table_size
        self.sizes = torch.tensor(config.ngram_sizes, device=device).repeat(config.num_functions)

    def fill(self, row: int, tokens: Tensor) -> None:
        """Begin a row with tokens, int64 [T]."""
        longest = self.symbols.shape[1]
        newest = self._symbols(tokens[-longest:]).flip(0)
        self.symbols[row] = F.pad(newest, (0, longest - len(newest)))

    def _symbols(self, tokens: Tensor) -> Tensor:
        return tokens - self.offset if self.offset else tokens

    def push(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Take a token of each of the first n rows.

        Args:
            tokens: int64 [n].
            positions: int64 [n] their places in their documents.

        Returns:
            [n, dim] the sums of the n-gram embeddings.
        """
        symbols = self.symbols[: len(tokens)]
        newer = torch.cat([self._symbols(tokens)[:, None], symbols[:, :-1]], dim=1)
        symbols.copy_(newer)
        rows = (newer[:, :, None] * self.powers).sum(1) % self.config.table_size + self._bases
        weights = None
        if self.config.omit_partial:
            weights = (positions[:, None] + 1 >= self.sizes).to(self.weight.dtype)
        return F.embedding_bag(rows, self.weight, mode="sum", per_sample_weights=weights)


def _hash_powers(config: HashEmbeddingConfig, longest: int) -> Tensor:
    """int64 [longest, M]: what the symbol d places back counts in the hash of every table, wrapping."""
    wrap = 1 << 64
    columns = []
    for prime in PRIMES[: config.num_functions]:
        for n in config.ngram_sizes:
            exponents = [d if config.newest_first else n - 1 - d for d in range(n)]
            values = [pow(prime, exponent, wrap) for exponent in exponents] + [0] * (longest - n)
            columns.append([value - wrap if value >= wrap // 2 else value for value in values])
    return torch.tensor(columns, dtype=torch.int64).T.contiguous()


def pool_patches(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool the bytes of each patch.

    Args:
        states: [m, S, dim].
        mask: bool [m, S] of the bytes that there are; None for all.
        pooling: maximum or mean.

    Returns:
        [m, dim].
    """
    if pooling == Pooling.MAX:
        kept = states if mask is None else states.masked_fill(~mask[..., None], -torch.inf)
        return kept.amax(1)
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    if mask is None:
        return wide.mean(1).to(states.dtype)
    total = wide.masked_fill(~mask[..., None], 0).sum(1)
    return (total / mask.sum(1, keepdim=True)).to(states.dtype)


def block_steps(blocks: Iterable[object]) -> list[BlockStep]:
    """The parameters of a stack's blocks."""
    return [BlockStep.of(block) for block in blocks if isinstance(block, Block)]
