"""The entropy language model: a causal byte transformer with sliding-window attention.

Documents of any length run either whole (`forward`) or in windows of fixed size with the last keys and values carried
from one to the next (`stream`); both give the same logits.

Legend: T tokens, D documents, V vocabulary, L layers, W window, C carried keys, G key and value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn

from blt_model.attention import AttentionBackend, plan_attention, resolve_backend
from blt_model.config import ByteLMConfig
from blt_model.errors import ModelError
from blt_model.initialization import initialize_blocks, initialize_linear, truncated_normal
from blt_model.layers import (
    Block,
    RMSNorm,
    SequenceLayout,
    compute_dtype,
    document_positions,
    make_layout,
)
from blt_model.packed import PackedBatch, segment_of
from blt_model.vocabulary import VOCABULARY_SIZE
from blt_model.weightless import Embedding, Linear


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a document that is not complete yet leaves for the next window. All shapes are fixed."""

    keys: Tensor
    """[L, C, G, E] rotated keys of the last C tokens; see `ByteLM.carried`."""
    values: Tensor
    """[L, C, G, E]."""
    valid: Tensor
    """int64 scalar: how many of them, the last ones, belong to the document."""
    position: Tensor
    """int64 scalar: tokens of the document so far."""


class ByteLM(nn.Module):
    """Next-byte model over packed documents."""

    def __init__(
        self, config: ByteLMConfig, *, attention_backend: AttentionBackend | str = AttentionBackend.AUTO
    ) -> None:
        """Build the model with fresh weights.

        Args:
            config: its architecture.
            attention_backend: "auto", "varlen", "triton", "flex" or "sdpa"; a plain attribute, free to change later.
        """
        super().__init__()
        trunk = config.transformer
        self.config = config
        self.attention_backend = attention_backend
        self.embedding = Embedding(VOCABULARY_SIZE, trunk.dim)
        self.blocks = nn.ModuleList(Block(trunk) for _ in range(trunk.num_layers))
        self.norm = RMSNorm(trunk.dim, trunk.norm_eps)
        self.head = Linear(trunk.dim, VOCABULARY_SIZE)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill all weights afresh from torch's random generator."""
        truncated_normal(self.embedding, self.config.transformer.dim**-0.5)
        initialize_blocks(block for block in self.blocks if isinstance(block, Block))
        nn.init.ones_(self.norm.weight)
        initialize_linear(self.head)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits of the token after each position.

        Args:
            batch: tokens and document offsets; patches are not read.

        Returns:
            [T, V] in the dtype that the last layer computes in.
        """
        x: Tensor = self.embedding(batch.tokens)
        if x.is_cuda:
            x = x.to(compute_dtype(x))  # as in BLT.forward
        layout = make_layout(
            self.config.transformer,
            batch.document_offsets,
            x,
            backend=self.attention_backend,
            max_length=batch.max_document_tokens,
        )
        for block in self.blocks:
            x = block(x, layout)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits

    def wide_logits(self, x: Tensor) -> Tensor:
        """Logits of the trunk's output with the last norm and the head in float32, whatever autocast says.

        A head in bfloat16 alone puts some 0.02 nats of noise on an entropy.

        Args:
            x: [T, dim] what `stream_trunk` gave.

        Returns:
            float32 [T, V] (float64 where the weights are).
        """
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
            return F.linear(self.norm(x.to(dtype)), self.head.weight.to(dtype))

    @property
    def carried(self) -> int:
        """C, the keys and values that a window hands to the next: W - 1, all that attention can reach.

        Where W is a multiple of 128 it is W: then keys carried over a cut at a multiple of 128 tokens fall into the
        same tiles of a GPU's kernel as they would without the cut, and its sums come out the same to the bit.
        """
        window = self.config.window
        return window if window % 128 == 0 else window - 1

    def initial_state(self) -> StreamState:
        """The state before a document's first token."""
        trunk = self.config.transformer
        weight = self.embedding.weight
        shape = (trunk.num_layers, self.carried, trunk.kv_heads, trunk.head_dim)
        # No tensor stands for two: compiled code would be made once more for the first window.
        keys, values = (torch.zeros(shape, dtype=compute_dtype(weight), device=weight.device) for _ in range(2))
        valid, position = (torch.zeros((), dtype=torch.int64, device=weight.device) for _ in range(2))
        return StreamState(keys, values, valid, position)

    def stream(
        self, tokens: Tensor, document_offsets: Tensor, state: StreamState | None = None
    ) -> tuple[Tensor, StreamState]:
        """Logits of one window of documents laid end to end, the first of which continues from the last window.

        The state has no gradient history: the window's own computation is differentiable, the carried part is not.

        Args:
            tokens: int64 [T], T at least 1.
            document_offsets: int32 [D + 1]; the first document is the continued one.
            state: what the window before returned, or None when the first document begins here.

        Returns:
            The logits [T, V], and the state of the last document that has a token in the window. A caller whose last
            document is complete drops it.

        Raises:
            ModelError: the window holds no token.
        """
        x, next_state = self.stream_trunk(tokens, document_offsets, state)
        return self._logits(x), next_state

    def stream_trunk(
        self,
        tokens: Tensor,
        document_offsets: Tensor,
        state: StreamState | None = None,
        *,
        max_length: int | None = None,
    ) -> tuple[Tensor, StreamState]:
        """All of `stream` but the last norm and the head; same arguments and errors.

        Args:
            tokens: int64 [T], T at least 1.
            document_offsets: int32 [D + 1].
            state: what the window before returned.
            max_length: upper bound of a document's tokens in the window; None means T. Only speed depends on it.

        Returns:
            The trunk's output [T, dim], and the state as `stream` gives it.
        """
        length = tokens.shape[0]
        if length == 0:
            raise ModelError("the window holds no token; give at least one.")
        state = self.initial_state() if state is None else state
        x: Tensor = self.embedding(tokens)
        layout = self._stream_layout(document_offsets, x, state, max_length)
        keys, values = [], []
        for index, block in enumerate(self.blocks):
            if not isinstance(block, Block):
                raise TypeError("blocks hold Block modules")
            x, key, value = block.stream(x, layout, (state.keys[index], state.values[index]))
            keys.append(key[length:].detach())
            values.append(value[length:].detach())
        # Kept one-dimensional: indexing by a scalar tensor would make the host wait for the GPU.
        last = segment_of(document_offsets, length)[-1:]
        continued = torch.where(last == 0, state.position, 0)
        position = (length - document_offsets.long().gather(0, last) + continued).squeeze(0)
        next_state = StreamState(torch.stack(keys), torch.stack(values), position.clamp(max=self.carried), position)
        return x, next_state

    def _stream_layout(self, offsets: Tensor, x: Tensor, state: StreamState, max_length: int | None) -> SequenceLayout:
        trunk = self.config.transformer
        length = x.shape[0]
        plan = plan_attention(
            offsets,
            length,
            window=trunk.window,
            backend=resolve_backend(self.attention_backend, x.device, compute_dtype(x), width=trunk.head_dim),
            max_length=max_length,
            carried=self.carried,
            carried_valid=state.valid,
        )
        continued = torch.where(segment_of(offsets, length) == 0, state.position, 0)
        positions = document_positions(offsets, length) + continued
        return SequenceLayout.make(plan, positions, trunk)


def next_byte_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution.

    Args:
        logits: [T, V] of any floating dtype.

    Returns:
        float32 [T], in nats.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
