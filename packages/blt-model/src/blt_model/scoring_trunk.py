"""The trunk of a byte model for scoring: forward only, in float16, with little between its products.

It computes what `ByteLM.stream_trunk` does. What it does otherwise matters on a GPU, where all but products and
attention is bound by memory:

- A norm's learned scale is multiplied into the matrix that follows it. What is left of the norm is one factor a row, by
  which the product is multiplied.
- The residual stream is kept in half precision, and products add to it in place: a sum is rounded once.
- Queries, keys and values are written after the carried ones, and attention reads them there.
- On Hopper, products end in kernels of our own (`product_kernels`), which turn queries and keys, and make SwiGLU's
  output of gates and values, before anything is written.
- In float16 the head's weights are the sum of two float16 numbers, which holds 22 bits of each. A product of these,
  summed in float32, gives logits as exact as one in float32, at several times the speed.

float16 rounds eight times as finely as bfloat16 at the same speed, but ends at 65,504. A model that goes beyond gives
nan, never a number that is wrong: infinities of gates, values and the stream become nan in the next norm, and queries,
keys and values, which softmax might hide, cannot become infinite, which is seen from the weights.

Nothing is compiled beforehand. On other CUDA devices the kernels are those of `pointwise_kernels`, elsewhere plain
operations.

Legend: T tokens, D documents, L layers, C carried keys, H query heads, G key and value heads, E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn

from blt_model.attention import attend
from blt_model.byte_lm import ByteLM, next_byte_entropy
from blt_model.config import TransformerConfig
from blt_model.errors import ModelError
from blt_model.layers import Block, SequenceLayout, rotate
from blt_model.tile_attention import WIDTHS
from blt_model.triton_support import HAS_TRITON, takes_kernels
from blt_model.window_stream import StreamState, carried_keys, first_state, next_state, stream_layout


@dataclass(frozen=True, slots=True)
class _Layer:
    """The matrices of one block, each [outputs, inputs]; those after a norm with its scale multiplied in."""

    query_key_value: Tensor
    attention_output: Tensor
    gate_value: Tensor
    """Gates first; where products are finished, gates and values take turns."""
    feed_forward_output: Tensor
    eps: float
    """Of both norms."""

    @classmethod
    def of(cls, block: nn.Module, device: torch.device, dtype: torch.dtype, finishes: bool) -> _Layer:
        if not isinstance(block, Block):
            raise TypeError("blocks hold Block modules")
        feed_forward = block.feed_forward

        def half(matrix: Tensor) -> Tensor:
            return matrix.detach().to(device, dtype)

        gate_value = feed_forward.gate_value.weight * block.feed_forward_norm.weight
        if finishes:
            gate_value = torch.stack(gate_value.chunk(2), dim=1).flatten(0, 1)
        return cls(
            query_key_value=half(_query_key_value(block)),
            attention_output=half(block.attention.output.weight),
            gate_value=half(gate_value),
            feed_forward_output=half(feed_forward.output.weight),
            eps=block.attention_norm.eps,
        )


@dataclass(frozen=True, slots=True)
class _SplitHead:
    """The head [V, dim] as `factor * (coarse + fine * small)`, the last norm's scale multiplied in."""

    parts: Tensor
    """float16 [2 * V, dim]: coarse, then small."""
    factor: float
    """A power of two that brings the largest weight to 1 and above, below 2."""

    fine = 2.0**-11
    """What one float16 leaves of a number is below this."""

    @classmethod
    def of(cls, head: Tensor) -> _SplitHead:
        largest = float(head.abs().max())
        factor = 2.0 ** math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0
        scaled = head / factor
        coarse = scaled.half()
        return cls(torch.cat([coarse, ((scaled - coarse) / cls.fine).half()]), factor)


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
        self._finishes = _finishes_products(self._trunk, device, dtype)
        self._layers = [_Layer.of(block, device, dtype, self._finishes) for block in model.blocks]
        for index, layer in enumerate(self._layers):
            _check_reach(layer.query_key_value, index)
        wide = torch.promote_types(model.head.weight.dtype, torch.float32)
        # In float32, as in `ByteLM.wide_logits`: rounding there would go straight into the entropies.
        self._head = (model.head.weight.detach().to(wide) * model.norm.weight.detach()).to(device)
        self._split_head = _SplitHead.of(self._head) if dtype == torch.float16 else None
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
        own, heads = flat[carried:], flat.view(carried + length, -1, trunk.head_dim)
        query, key, value = torch.split(heads, [trunk.num_heads, trunk.kv_heads, trunk.kv_heads], dim=1)
        for index, layer in enumerate(self._layers):
            key[:carried], value[:carried] = state.keys[index], state.values[index]
            self._make_heads(x, layer, layout, own)
            mixed = attend(query[carried:], key, value, layout.plan)
            x.addmm_(mixed.flatten(1), layer.attention_output.t())
            keys[index], values[index] = key[length:], value[length:]
            x.addmm_(self._gated(x, layer), layer.feed_forward_output.t())
        return x, next_state(document_offsets, length, state, keys, values)

    def _make_heads(self, x: Tensor, layer: _Layer, layout: SequenceLayout, out: Tensor) -> None:
        """Write the queries, keys (both turned) and values of [T, dim]."""
        heads, width = self._trunk.num_heads + self._trunk.kv_heads, self._trunk.head_dim
        if self._finishes:
            scales, angles = _kernels().row_scales(x, layer.eps), (layout.cosine, layout.sine)
            _finishing().turned_product(x, layer.query_key_value, scales, angles, out, heads=heads, width=width)
            return
        torch.mm(_normalized(x, layer.eps), layer.query_key_value.t(), out=out)
        _turn(out, layout, heads, width)

    def _gated(self, x: Tensor, layer: _Layer) -> Tensor:
        """SwiGLU of [T, dim], with the norm before it: [T, hidden]."""
        if self._finishes:
            result: Tensor = _finishing().gated_product(x, layer.gate_value, _kernels().row_scales(x, layer.eps))
            return result
        return _gated(torch.mm(x, layer.gate_value.t()), x, layer.eps)

    @torch.inference_mode()
    def wide_logits(self, x: Tensor) -> Tensor:
        """Logits of what `stream_trunk` gave, with the last norm and the head in float32: [T, V]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(_normalized(x.to(self._head.dtype), self._eps), self._head)

    @torch.inference_mode()
    def entropies(self, x: Tensor) -> Tensor:
        """Nats of the next-byte distributions of what `stream_trunk` gave, as exact as float32: float32 [T]."""
        head = self._split_head
        if head is None or not takes_kernels(x):
            return next_byte_entropy(self.wide_logits(x))
        scales = _kernels().row_scales(x, self._eps)
        result: Tensor = _finishing().entropies(_wide_product(x, head.parts), scales, head.factor, head.fine)
        return result


def fits_float16(model: ByteLM) -> bool:
    """Whether queries, keys and values of every block are within float16's numbers, whatever the text."""
    return all(
        _reach(_query_key_value(block).to(torch.float16)) < torch.finfo(torch.float16).max for block in model.blocks
    )


def _query_key_value(block: nn.Module) -> Tensor:
    """A block's matrix with the scale of the norm before it multiplied in."""
    if not isinstance(block, Block):
        raise TypeError("blocks hold Block modules")
    return block.attention.query_key_value.weight.detach() * block.attention_norm.weight.detach()


def _reach(matrix: Tensor) -> float:
    """Up to what a matrix [outputs, inputs] may map a row of root mean square 1."""
    # A row's norm is the square root of its inputs. Turning mixes two outputs, hence twice that.
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return 2 * math.sqrt(matrix.shape[1]) * float(torch.linalg.vector_norm(wide, dim=1).max())


def _check_reach(matrix: Tensor, index: int) -> None:
    """Refuse a matrix that may map such a row beyond what its dtype holds."""
    largest = _reach(matrix)
    if not largest < torch.finfo(matrix.dtype).max:
        raise ModelError(
            f"queries, keys or values of block {index} may reach {largest:.3g}, which {matrix.dtype} does not hold; "
            "score in bfloat16."
        )


def _finishes_products(trunk: TransformerConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `product_kernels` takes a stack's products."""
    if device.type != "cuda" or not HAS_TRITON or dtype not in (torch.float16, torch.bfloat16):
        return False
    # Tiles fill the shared memory of Hopper; others were not tried. The copy engine wants rows of whole sixteen bytes.
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and trunk.head_dim in WIDTHS and trunk.dim % 8 == 0 and trunk.feed_forward_dim % 8 == 0


def _wide_product(x: Tensor, matrix: Tensor) -> Tensor:
    """Rows [T, dim] times a matrix [N, dim], both float16, summed and kept in float32."""
    if x.is_cuda:
        return torch.mm(x, matrix.t(), out_dtype=torch.float32)
    return F.linear(x.float(), matrix.float())


def _finishing() -> ModuleType:
    """Kernels of products; loading them loads triton."""
    from blt_model import product_kernels

    return product_kernels


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
