"""The entropy language model: a causal byte transformer with sliding-window attention.

Documents of any length run either whole (`forward`) or in windows of fixed size with the last keys and values carried
from one to the next (`stream`); both give the same logits.

Legend: T tokens, D documents, V vocabulary, C carried keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn

from blt_model.attention import AttentionBackend
from blt_model.config import ByteLMConfig
from blt_model.initialization import initialize_blocks, initialize_linear, truncated_normal
from blt_model.layers import Block, RMSNorm, compute_dtype, make_layout
from blt_model.packed import PackedBatch
from blt_model.vocabulary import VOCABULARY_SIZE
from blt_model.weightless import Embedding, Linear
from blt_model.window_stream import StreamState, carried_keys, first_state, next_state, stream_layout


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
        """C, the keys and values that a window hands to the next."""
        return carried_keys(self.config.transformer)

    def initial_state(self) -> StreamState:
        """The state before a document's first token."""
        weight = self.embedding.weight
        return first_state(self.config.transformer, dtype=compute_dtype(weight), device=weight.device)

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
        state = self.initial_state() if state is None else state
        x: Tensor = self.embedding(tokens)
        layout = stream_layout(
            self.config.transformer, document_offsets, x, state, backend=self.attention_backend, max_length=max_length
        )
        keys, values = [], []
        for index, block in enumerate(self.blocks):
            if not isinstance(block, Block):
                raise TypeError("blocks hold Block modules")
            x, key, value = block.stream(x, layout, (state.keys[index], state.values[index]))
            keys.append(key[length:].detach())
            values.append(value[length:].detach())
        return x, next_state(document_offsets, length, state, torch.stack(keys), torch.stack(values))


def next_byte_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution.

    Args:
        logits: [T, V] of any floating dtype.

    Returns:
        float32 [T], in nats.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
