"""The trunk of a byte model for scoring: forward only, in float16, with little between its products.

It computes what `ByteLM.stream_trunk` does. What it does otherwise matters on a GPU, where all but products and
attention is bound by memory:

- A norm's learned scale is multiplied into the matrix that follows it. What is left of the norm is one factor a row:
  gates and values are multiplied by it where SwiGLU reads them anyway, so that no normalised row is written there.
- The residual stream is kept in half precision, and products add to it in place: a sum is rounded once.
- Queries and keys are turned where they lie, after the carried ones, and attention reads them and the values there.

float16 rounds eight times as finely as bfloat16 at the same speed, but ends at 65,504. A model that goes beyond gives
nan, never a number that is wrong: infinities of gates, values and the stream become nan in the next norm, and queries,
keys and values, which softmax might hide, cannot become infinite, which is seen from the weights.

Nothing is compiled beforehand. On CUDA the kernels are those of `pointwise_kernels`, elsewhere plain operations.

Legend: T tokens, D documents, L layers, C carried keys, H query heads, G key and value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn

from blt_model.attention import attend
from blt_model.byte_lm import ByteLM
from blt_model.errors import ModelError
from blt_model.layers import Block, SequenceLayout, rotate
from blt_model.triton_support import takes_kernels
from blt_model.window_stream import StreamState, carried_keys, first_state, next_state, stream_layout


@dataclass(frozen=True, slots=True)
class _Layer:
    """The matrices of one block, each [outputs, inputs]; those after a norm with its scale multiplied in."""

    query_key_value: Tensor
    attention_output: Tensor
    gate_value: Tensor
    feed_forward_output: Tensor
    eps: float
    """Of both norms."""

    @classmethod
    def of(cls, block: nn.Module, device: torch.device, dtype: torch.dtype) -> _Layer:
        if not isinstance(block, Block):
            raise TypeError("blocks hold Block modules")
        attention, feed_forward = block.attention, block.feed_forward

        def half(matrix: Tensor) -> Tensor:
            return matrix.detach().to(device, dtype)

        return cls(
            query_key_value=half(attention.query_key_value.weight * block.attention_norm.weight),
            attention_output=half(attention.output.weight),
            gate_value=half(feed_forward.gate_value.weight * block.feed_forward_norm.weight),
            feed_forward_output=half(feed_forward.output.weight),
            eps=block.attention_norm.eps,
        )


class ScoringTrunk:
    """A byte model on a device, ready to score windows of documents."""

    def __init__(self, model: ByteLM, device: str | torch.device, *, dtype: torch.dtype = torch.float16) -> None:
        """Copy a model's weights.

        Args:
            model: on any device; it is left as it is.
            device: where to compute.
            dtype: of matrices, residual stream, keys and values.

        Raises:
            ModelError: a query, key or value may be larger than the dtype's numbers.
        """
        device = torch.device(device)
        self._trunk = model.config.transformer
        self._backend = model.attention_backend
        self._dtype = dtype
        self._embedding = model.embedding.weight.detach().to(device, dtype)
        self._layers = [_Layer.of(block, device, dtype) for block in model.blocks]
        for index, layer in enumerate(self._layers):
            _check_reach(layer.query_key_value, index)
        wide = torch.promote_types(model.head.weight.dtype, torch.float32)
        # In float32, as in `ByteLM.wide_logits`: rounding there would go straight into the entropies.
        self._head = (model.head.weight.detach().to(wide) * model.norm.weight.detach()).to(device)
        self._eps = model.norm.eps

    def initial_state(self) -> StreamState:
        """The state before a document's first token."""
        return first_state(self._trunk, dtype=self._dtype, device=self._embedding.device)

    @torch.inference_mode()
    def stream_trunk(
        self, tokens: Tensor, document_offsets: Tensor, state: StreamState, *, max_length: int | None = None
    ) -> tuple[Tensor, StreamState]:
        """As `ByteLM.stream_trunk`, with its arguments and errors.

        Args:
            tokens: int64 [T] on the device, T at least 1.
            document_offsets: int32 [D + 1]; the first document is the continued one.
            state: what the window before returned, or `initial_state()`.
            max_length: upper bound of a document's tokens in the window; None means T. Only speed depends on it.

        Returns:
            [T, dim], and the state of the last document that has a token in the window.
        """
        trunk, length = self._trunk, len(tokens)
        x = F.embedding(tokens, self._embedding)
        layout = stream_layout(trunk, document_offsets, x, state, backend=self._backend, max_length=max_length)
        carried = carried_keys(trunk)
        keys, values = torch.empty_like(state.keys), torch.empty_like(state.values)
        flat = x.new_empty(carried + length, (trunk.num_heads + 2 * trunk.kv_heads) * trunk.head_dim)
        heads = flat.view(carried + length, -1, trunk.head_dim)
        query, key, value = torch.split(heads, [trunk.num_heads, trunk.kv_heads, trunk.kv_heads], dim=1)
        for index, layer in enumerate(self._layers):
            key[:carried], value[:carried] = state.keys[index], state.values[index]
            torch.mm(_normalized(x, layer.eps), layer.query_key_value.t(), out=flat[carried:])
            _turn(flat[carried:], layout, trunk.num_heads + trunk.kv_heads, trunk.head_dim)
            mixed = attend(query[carried:], key, value, layout.plan)
            x.addmm_(mixed.flatten(1), layer.attention_output.t())
            keys[index], values[index] = key[length:], value[length:]
            gated = _gated(torch.mm(x, layer.gate_value.t()), x, layer.eps)
            x.addmm_(gated, layer.feed_forward_output.t())
        return x, next_state(document_offsets, length, state, keys, values)

    @torch.inference_mode()
    def wide_logits(self, x: Tensor) -> Tensor:
        """Logits of what `stream_trunk` gave, with the last norm and the head in float32: [T, V]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(_normalized(x.to(self._head.dtype), self._eps), self._head)


def _check_reach(matrix: Tensor, index: int) -> None:
    """Refuse a matrix [outputs, inputs] that may map a row of root mean square 1 beyond what its dtype holds."""
    # A row's norm is the square root of its inputs. Turning mixes two outputs, hence twice that.
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    largest = 2 * matrix.shape[1] ** 0.5 * float(torch.linalg.vector_norm(wide, dim=1).max())
    if not largest < torch.finfo(matrix.dtype).max:
        raise ModelError(
            f"queries, keys or values of block {index} may reach {largest:.3g}, which {matrix.dtype} does not hold; "
            "score in bfloat16."
        )


def _kernels() -> ModuleType:
    """The kernels; loading them loads triton."""
    from blt_model import pointwise_kernels

    return pointwise_kernels


def _normalized(x: Tensor, eps: float) -> Tensor:
    """Rows [T, dim] divided by their root mean square."""
    if takes_kernels(x):
        result: Tensor = _kernels().normalize(x, eps)
        return result
    return F.rms_norm(x, x.shape[-1:], None, eps)


def _turn(flat: Tensor, layout: SequenceLayout, heads: int, width: int) -> None:
    """Turn the first heads of [T, any] in place."""
    if takes_kernels(flat) and width & (width - 1) == 0:
        _kernels().turn_in_place(flat, (layout.cosine, layout.sine), heads, width)
        return
    turning = flat[:, : heads * width].view(len(flat), heads, width)
    turning.copy_(rotate(turning, layout.cosine, layout.sine))


def _gated(gate_value: Tensor, x: Tensor, eps: float) -> Tensor:
    """SwiGLU of gates and values [T, 2 * hidden] that were made of [T, dim] without its norm."""
    if takes_kernels(x):
        kernels = _kernels()
        result: Tensor = kernels.swiglu(gate_value, scales=kernels.row_scales(x, eps))
        return result
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    gate, value = (gate_value * scales).chunk(2, dim=-1)
    return (F.silu(gate) * value).to(x.dtype)
