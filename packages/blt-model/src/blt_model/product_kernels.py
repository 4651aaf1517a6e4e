"""Triton kernels that finish matrix products before they are written, for forward passes in half precision.

The rows that go into a product are not normalised: the product is multiplied by each row's factor instead. Then heads
are turned by their positions, or gates and values become SwiGLU's output, all in the registers that hold the sums. So
what a product would write for a kernel after it to read stays on the chip. Entropies go over all of a row's logits, so
that these are written.

The tiles are tuned for Hopper, whose copy engine fetches and writes them; so rows begin at multiples of sixteen bytes.
This module needs triton; import it only where `triton_support` says so.

Legend: T tokens, K inputs, N outputs of the product, E head width, V symbols.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How a product is cut."""

    rows: int = 128
    columns: int = 256
    inputs: int = 64
    warps: int = 8
    stages: int
    """Tiles of the loop over inputs that are under way at once; as many as shared memory has room for."""
    group: int = 8
    """Tiles down, all across which are made before the ones below, so that both factors stay in the level 2 cache."""


TURNING = Tiles(stages=3)
"""Of products whose heads are turned."""
GATING = Tiles(stages=4)
"""Of products that are gated."""
_ROWS = 4
"""Rows of which a program makes entropies."""


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def _turn(
    total, cosine, sine, out, at_row, at_column, count,
    TURNED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turn those heads of a tile that lie before column TURNED, and write it."""
    if at_column < TURNED:
        half: tl.constexpr = WIDTH // 2
        heads: tl.constexpr = COLUMNS // WIDTH
        even, odd = tl.split(tl.reshape(total, [ROWS, heads, half, 2]))
        row = at_row + tl.arange(0, ROWS)
        at = row[:, None] * half + tl.arange(0, half)[None, :]
        # All heads of a row are turned by the same angles.
        c = tl.load(cosine + at, mask=(row < count)[:, None], other=0.0)[:, None, :]
        s = tl.load(sine + at, mask=(row < count)[:, None], other=0.0)[:, None, :]
        turns = (at_column + tl.arange(0, heads) * WIDTH < TURNED)[None, :, None]
        c = tl.where(turns, c, 1.0)
        s = tl.where(turns, s, 0.0)
        total = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [ROWS, COLUMNS])
    # In four parts, which leaves shared memory to the next tile's inputs.
    part: tl.constexpr = COLUMNS // 4
    left, right = _halves(total.to(out.dtype), ROWS, COLUMNS)
    first, second = _halves(left, ROWS, COLUMNS // 2)
    out.store([at_row, at_column], first)
    out.store([at_row, at_column + part], second)
    first, second = _halves(right, ROWS, COLUMNS // 2)
    out.store([at_row, at_column + 2 * part], first)
    out.store([at_row, at_column + 3 * part], second)


@triton.jit(do_not_specialize=["count"])
def _product(
    x, matrix, scales, cosine, sine, out, count, N: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr,
    WIDTH: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A program's own tiles; while it finishes one, the first inputs of the next are fetched."""
    down = tl.cdiv(count, ROWS)
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        above = tile // (GROUP * across) * GROUP
        height = tl.minimum(down - above, GROUP)
        at_row = (above + tile % (GROUP * across) % height) * ROWS
        at_column = tile % (GROUP * across) // height * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, K, INPUTS):
            total = tl.dot(x.load([at_row, start]), tl.trans(matrix.load([at_column, start])), total)
        row = at_row + tl.arange(0, ROWS)
        total *= tl.load(scales + row, mask=row < count, other=0.0)[:, None]
        if GATED:
            gate, value = tl.split(tl.reshape(total, [ROWS, COLUMNS // 2, 2]))
            result = gate / (1.0 + tl.exp(-gate)) * value
            out.store([at_row, at_column // 2], result.to(out.dtype))
        else:
            _turn(total, cosine, sine, out, at_row, at_column, count, TURNED, WIDTH, ROWS, COLUMNS)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Programs that run at once; any number will do for Triton's interpreter, on the CPU."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    x: Tensor,
    matrix: Tensor,
    scales: Tensor,
    out: Tensor,
    tiles: Tiles,
    *,
    angles: tuple[Tensor, Tensor] | None = None,
    turned: int = 0,
    width: int = 0,
) -> None:
    """Turn heads where there are angles, gate where there are none."""
    if not len(x):
        return
    gated = angles is None
    cosine, sine = (scales, scales) if angles is None else angles

    def described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], [rows, columns])

    factors = described(x, tiles.rows, tiles.inputs), described(matrix, tiles.columns, tiles.inputs)
    written = described(out, tiles.rows, tiles.columns // (2 if gated else 4))
    count = triton.cdiv(len(x), tiles.rows) * triton.cdiv(len(matrix), tiles.columns)
    _product[(min(count, _multiprocessors(x.device)),)](
        *factors, scales, cosine, sine, written, len(x), N=len(matrix), K=x.shape[1], TURNED=turned, WIDTH=width,
        GATED=gated, ROWS=tiles.rows, COLUMNS=tiles.columns, INPUTS=tiles.inputs, GROUP=tiles.group,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def turned_product(
    x: Tensor,
    matrix: Tensor,
    scales: Tensor,
    angles: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    heads: int,
    width: int,
    tiles: Tiles = TURNING,
) -> None:
    """Each row's factor times its product, the first heads turned by the row's angles as `layers.rotate` does.

    Args:
        x: [T, K], rows contiguous; this, the matrix and the result in half precision and aligned to sixteen bytes.
        matrix: [N, K], likewise.
        scales: float32 [T], a factor for each row.
        angles: cosines and sines, contiguous float32 [T, 1, E / 2].
        out: [T, N], rows contiguous, written.
        heads: how many are turned.
        width: E, a power of two from 16 to 256.
        tiles: how to cut.
    """
    _launch(x, matrix, scales, out, tiles, angles=angles, turned=heads * width, width=width)


def gated_product(x: Tensor, matrix: Tensor, scales: Tensor, *, tiles: Tiles = GATING) -> Tensor:
    """silu(gate) * value of each row's factor times its product.

    Args:
        x: [T, K], rows contiguous; this and the matrix in half precision and aligned to sixteen bytes.
        matrix: [N, K], likewise; gates and values take turns.
        scales: float32 [T], a factor for each row.
        tiles: how to cut.

    Returns:
        [T, N / 2].
    """
    out = x.new_empty(len(x), len(matrix) // 2)
    _launch(x, matrix, scales, out, tiles)
    return out


@triton.jit(do_not_specialize=["count"])
def _entropies(
    products, scales, out, count, step, factor, fine, SYMBOLS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Entropies of some rows of logits, each the sum of a coarse and a fine product."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    real = (row < count)[:, None] & (column < SYMBOLS)
    at = products + row[:, None] * step + column
    logits = tl.load(at, mask=real, other=0.0) + fine * tl.load(at + SYMBOLS, mask=real, other=0.0)
    logits *= (tl.load(scales + row, mask=row < count, other=0.0) * factor)[:, None]
    highest = tl.max(tl.where(column < SYMBOLS, logits, -float("inf")), 1)
    logits -= highest[:, None]
    weights = tl.where(column < SYMBOLS, tl.exp(logits), 0.0)
    total = tl.sum(weights, 1)
    tl.store(out + row, tl.log(total) - tl.sum(weights * logits, 1) / total, mask=row < count)


def entropies(products: Tensor, scales: Tensor, factor: float, fine: float) -> Tensor:
    """Entropies in nats of rows of logits that are `scale * factor * (coarse + fine * small)`: float32 [T].

    Args:
        products: float32 [T, 2 * V], rows contiguous: V coarse ones, then V small ones.
        scales: float32 [T].
        factor: of all.
        fine: of the small ones.
    """
    out = products.new_empty(len(products))
    symbols = products.shape[1] // 2
    if len(out):
        _entropies[(triton.cdiv(len(out), _ROWS),)](
            products, scales, out, len(out), products.stride(0), factor, fine, SYMBOLS=symbols,
            BLOCK=triton.next_power_of_2(symbols), ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return out
