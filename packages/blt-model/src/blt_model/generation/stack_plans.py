"""How `stack_kernels` shares the work of a stack out among its programs: numbers that shape its code.

Legend: D width of the stack, F inner width of its SwiGLU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from blt_model.config import TransformerConfig

MOST_CHUNK = 128
"""Words of 32 bits that lie side by side in a warp: 16 bytes a thread."""
SCORES, QUERY_KEY_VALUE, OUTPUT, GATE_VALUE, FEED_FORWARD_OUTPUT = range(5)
"""The maps of a block, as units name them; the first is of a folded cross-attention."""
Parts = tuple[tuple[int, int], ...]
"""Of a vector: first chunk and number of chunks, a power of two, of each."""


class Unit(NamedTuple):
    """Some rows of a map by some of its inputs: what a program loads at once."""

    matrix: int
    """One of the constants above."""
    shift: int
    """Rows of the map before its first that counts."""
    outputs: int
    """Rows that count."""
    each: int
    """Rows of a program."""
    step: int
    """Rows from one program's first to the next one's."""
    group: int
    """Which of a program's groups of rows this is."""
    words: int
    """Of a row."""
    chunk: int
    """The first of its chunks."""
    chunks: int
    """A power of two."""
    exact: bool
    """Whether every program has all of its rows and inputs."""


class StackPlan(NamedTuple):
    """What shapes the kernel's code; a constant to it."""

    kind: Any
    """Triton's name of the weights' dtype."""
    native: bool
    """Whether the kernel is compiled, and not interpreted."""
    dim: int
    hidden: int
    heads: int
    room: int
    """Power of two, at least the heads."""
    width: int
    splits: int
    block: int
    """Places of the cache that are read at once."""
    pairs: int
    """Scores of a folded cross-attention before each block; 0 for none."""
    vectors: int
    words: int
    """Of D inputs."""
    chunk: int
    """Words that lie side by side."""
    span: int
    """Numbers in them."""
    group: int
    window: int
    ahead: int
    """Units beyond the window whose rows are brought to the level 2 cache; 0 for none."""
    units: tuple[Unit, ...]
    starts: tuple[int, ...]
    """Where the units of each matrix begin."""
    parts: tuple[Parts, Parts, Parts]
    """Of a vector [D], of a vector [F], and of attention's output, which is in one part."""
    own_rows: int
    """Rows of the state that a program has."""
    own_groups: int
    head_rows: int
    head_groups: int
    wide_rows: int
    wide_groups: int
    state_at: int
    mixed_at: int
    heads_at: int
    parts_at: int
    masses_at: int
    middle_at: int
    hidden_at: int
    """Where in the buffer of words results begin."""
    size: int
    """Words of the buffer."""
    programs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What may be chosen freely."""

    programs: int = 128
    """At most; all must be resident at once."""
    warps: int = 4
    splits: int = 4
    """Parts of a head's attention, a power of two."""
    block: int = 64
    window: int = 5
    ahead: int = 6
    most_chunks: int = 4
    """Chunks of a unit, a power of two."""
    registers: int | None = None
    """Of a thread, at most; None for as many as there are."""
    cooperative: bool = True
    """Launch so that the GPU sees to it that all programs are resident."""


def usual_tuning(config: TransformerConfig) -> Tuning:
    """What suits a stack: where the rows are long, more threads are needed to have as much under way."""
    return Tuning(warps=8, window=4, ahead=4) if config.dim > 1024 else Tuning()


def parts_of(chunks: int, most: int) -> Parts:
    """Chunks in as few parts of powers of two as there can be, none above `most`."""
    parts, first = [], 0
    while first < chunks:
        count = min(most, 1 << ((chunks - first).bit_length() - 1))
        parts.append((first, count))
        first += count
    return tuple(parts)


def _units(
    matrix: int, parts: Parts, words: int, chunk: int, outputs: int, each: int, programs: int, group: int
) -> list[Unit]:
    """The units of a map whose rows are shared out, and of gates and values side by side."""
    shifts = (0, outputs) if matrix == GATE_VALUE else (0,)
    step = 0 if matrix == SCORES else each
    units = []
    for first, count in parts:
        for index in range(-(-each // group)):
            rows = (index + 1) * group <= each and (not step or step * programs == outputs)
            exact = rows and (first + count) * chunk <= words
            units += [Unit(matrix, shift, outputs, each, step, index, words, first, count, exact) for shift in shifts]
    return units


def plan_stack(
    config: TransformerConfig,
    dtype: torch.dtype,
    kind: Any,
    tuning: Tuning,
    *,
    pairs: int = 0,
    vectors: int = 1,
    native: bool = True,
) -> StackPlan:
    """Share out a stack.

    Args:
        config: the stack's.
        dtype: of its weights.
        kind: Triton's name of it.
        tuning: what may be chosen.
        pairs: scores of a folded cross-attention before every block; 0 for none.
        vectors: of a patch.
        native: whether the kernel is compiled, and not interpreted.
    """
    dim, hidden, heads, width, group = (
        config.dim,
        config.feed_forward_dim,
        config.num_heads,
        config.head_dim,
        tuning.warps,
    )
    per_word = 4 // dtype.itemsize
    words, wide_words = dim // per_word, hidden // per_word
    chunk = math.gcd(MOST_CHUNK, words, wide_words)
    span = chunk * per_word
    room = 1 << (heads - 1).bit_length()
    inner, wide = parts_of(words // chunk, tuning.most_chunks), parts_of(wide_words // chunk, tuning.most_chunks)
    joined = ((0, room * width // span),)
    own, projected, widened = (-(-rows // tuning.programs) for rows in (dim, 3 * dim, hidden))
    programs = max(-(-dim // own), -(-3 * dim // projected), -(-hidden // widened))
    maps = (
        (SCORES, inner, words, pairs, pairs),
        (QUERY_KEY_VALUE, inner, words, 3 * dim, projected),
        (OUTPUT, joined, words, dim, own),
        (GATE_VALUE, inner, words, hidden, widened),
        (FEED_FORWARD_OUTPUT, wide, wide_words, dim, own),
    )
    phases = [
        _units(matrix, parts, width_in, chunk, outputs, each, programs, group)
        for matrix, parts, width_in, outputs, each in maps
    ]
    starts = [0]
    for phase in phases:
        starts.append(starts[-1] + len(phase))
    sizes = (dim, dim, 3 * dim, tuning.splits * dim, 2 * tuning.splits * heads, dim, hidden)
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // 32) * 32)
    return StackPlan(
        kind=kind,
        native=native,
        dim=dim,
        hidden=hidden,
        heads=heads,
        room=room,
        width=width,
        splits=tuning.splits,
        block=tuning.block,
        pairs=pairs,
        vectors=vectors,
        words=words,
        chunk=chunk,
        span=span,
        group=group,
        window=tuning.window,
        ahead=tuning.ahead if native else 0,
        units=tuple(unit for phase in phases for unit in phase),
        starts=tuple(starts[:-1]),
        parts=(inner, wide, joined),
        own_rows=own,
        own_groups=-(-own // group),
        head_rows=projected,
        head_groups=-(-projected // group),
        wide_rows=widened,
        wide_groups=-(-widened // group),
        state_at=places[0],
        mixed_at=places[1],
        heads_at=places[2],
        parts_at=places[3],
        masses_at=places[4],
        middle_at=places[5],
        hidden_at=places[6],
        size=places[7],
        programs=programs,
    )
