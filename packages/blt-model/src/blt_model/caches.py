"""What attention keeps of a text that grows: rotated keys and values of every layer, row by row.

A stack with a window keeps a ring of W places: the token at position p lies at place p modulo W, where it replaces the
token that has just left the window. Softmax attention does not depend on the order of its keys, so a ring is read as it
lies. A stack without window keeps everything, in buffers that double.

Legend: L layers, B rows, n rows in use, G key and value heads, R query heads of each, C places, E head width, W window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.config import TransformerConfig
from blt_model.layers import rotary_tables

Ints = npt.NDArray[np.int64]


class RotaryPhases:
    """Rotary angles as unit complex numbers, kept for all positions up to a capacity that doubles."""

    def __init__(self, config: TransformerConfig, device: torch.device, capacity: int = 1024) -> None:
        self._config, self._device = config, device
        self.table = torch.empty(0)
        """complex64 [capacity, 1, E / 2]."""
        self._fill(capacity)

    def _fill(self, capacity: int) -> None:
        positions = torch.arange(capacity, device=self._device)
        self.table = torch.complex(*rotary_tables(positions, self._config.head_dim, self._config.rope_theta))

    def reserve(self, positions: int) -> bool:
        """Make room for so many positions; returns whether the table was replaced."""
        capacity = len(self.table)
        if positions <= capacity:
            return False
        self._fill(max(2 * capacity, positions))
        return True


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Where one new token of each of n rows goes and what it reads; shared by all layers of a stack."""

    slots: Tensor
    """int64 [n * G] the places of the new keys, in the cache of one layer seen as [B * G * C, E]."""
    length: int
    """Places that are read, the first of every row."""
    mask: Tensor | None
    """bool [n, 1, 1, length] which of them hold a token; None where all do."""
    phases: Tensor
    """complex64 [n, 1, E / 2] of the tokens' positions."""
    rows: Tensor | int | None
    """int64 [n] the rows; a single row as a number; None for the first n."""
    each: tuple[tuple[int, int], ...] = ()
    """Row and places of every token, where the rows are read one by one, as they lie: no copy and no mask."""


class AttentionCache:
    """Keys and values of one stack."""

    def __init__(
        self, config: TransformerConfig, rows: int, *, dtype: torch.dtype, device: torch.device, capacity: int = 256
    ) -> None:
        """Make empty buffers.

        Args:
            config: of the stack.
            rows: B.
            dtype: of keys and values.
            device: where they lie.
            capacity: places at first, where the stack has no window.
        """
        self.config = config
        self.rows = rows
        self.capacity = capacity if config.window is None else config.window
        self.rotary = RotaryPhases(config, device)
        shape = (config.num_layers, rows, config.kv_heads, self.capacity, config.head_dim)
        # Zeros, not whatever memory held: a masked place must not be nan.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        """[L, B, G, C, E] both."""

    @property
    def room(self) -> int:
        """Positions that a row may have before a buffer must grow."""
        angles = len(self.rotary.table)
        return angles if self.config.window is not None else min(angles, self.capacity)

    def reserve(self, positions: int) -> bool:
        """Make room for positions 0 to positions - 1 in every row.

        Returns:
            Whether a buffer was replaced by a larger one.
        """
        replaced = self.rotary.reserve(positions)
        if self.config.window is not None or positions <= self.capacity:
            return replaced
        capacity = max(2 * self.capacity, positions)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros((*old.shape[:3], capacity, old.shape[4]))
            new[:, :, :, : self.capacity] = old
            setattr(self, name, new)
        self.capacity = capacity
        return True

    def plan(self, positions: Ints, rows: Ints | None = None) -> AttentionStep:
        """Plan a step from positions that the host knows; reads as few places as possible.

        Args:
            positions: int64 [n] of the new tokens.
            rows: int64 [n] their rows; None for the first n.

        Returns:
            The plan; its lengths and whether it has a mask depend on the positions.
        """
        count, device = len(positions), self.keys.device
        held = np.minimum(positions + 1, self.capacity)
        length = int(held.max())
        each = () if rows is None or count == 1 else tuple(zip(rows.tolist(), held.tolist(), strict=True))
        mask = None
        if int(held.min()) < length and not each:
            mask = torch.from_numpy(np.arange(length) < held[:, None]).to(device).view(count, 1, 1, length)
        heads = self.config.kv_heads
        base = (np.arange(count) if rows is None else rows) * heads
        places = (base[:, None] + np.arange(heads)) * self.capacity + (positions % self.capacity)[:, None]
        at = torch.from_numpy(positions).to(device)
        chosen: Tensor | int | None = None
        if rows is not None:
            chosen = int(rows[0]) if count == 1 else torch.from_numpy(rows).to(device)
        slots = torch.from_numpy(places.reshape(-1)).to(device)
        return AttentionStep(slots, length, mask, self.rotary.table[at], chosen, each)

    def plan_static(self, positions: Tensor, rows: Tensor | None, length: int) -> AttentionStep:
        """Plan a step from positions on the device: fixed shapes and no wait, as a CUDA graph needs.

        Args:
            positions: int64 [n] of the new tokens.
            rows: int64 [n] their rows; None for the first n.
            length: places to read; at least the largest position + 1, or the window.

        Returns:
            The plan, always with a mask.
        """
        count, device, heads = len(positions), positions.device, self.config.kv_heads
        base = torch.arange(count, device=device) if rows is None else rows
        groups = base[:, None] * heads + torch.arange(heads, device=device)
        slots = groups * self.capacity + (positions % self.capacity)[:, None]
        mask = torch.arange(length, device=device) <= positions[:, None]
        return AttentionStep(
            slots.flatten(), length, mask.view(count, 1, 1, length), self.rotary.table[positions], rows
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: AttentionStep) -> Tensor:
        """Store one token of each row and let it attend to itself and what the row holds.

        Args:
            layer: of the stack.
            query: [n, G, R, E] rotated; the R heads of a group share a key.
            key: [n, G, E] rotated.
            value: [n, G, E].
            step: the plan of this step.

        Returns:
            [n, G, R, E].
        """
        width, length, rows = self.config.head_dim, step.length, step.rows
        keys, values = self.keys[layer], self.values[layer]
        keys.view(-1, width).index_copy_(0, step.slots, key.reshape(-1, width))
        values.view(-1, width).index_copy_(0, step.slots, value.reshape(-1, width))
        if step.each:
            parts = [
                F.scaled_dot_product_attention(one, keys[row : row + 1, :, :held], values[row : row + 1, :, :held])
                for one, (row, held) in zip(torch.split(query, 1), step.each, strict=True)
            ]
            return torch.cat(parts)
        if rows is None:
            keys, values = keys[: len(key), :, :length], values[: len(key), :, :length]
        elif isinstance(rows, int):
            keys, values = keys[rows : rows + 1, :, :length], values[rows : rows + 1, :, :length]
        else:
            keys, values = keys[:, :, :length].index_select(0, rows), values[:, :, :length].index_select(0, rows)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=step.mask)

    def copy_row(self, source: int, target: int, positions: int) -> None:
        """Copy a row of so many positions over another."""
        held = min(positions, self.capacity)
        for buffer in (self.keys, self.values):
            buffer[:, target, :, :held] = buffer[:, source, :, :held]


class CacheFiller:
    """Takes the keys and values of texts that a packed forward has run, the last of a window where there is one."""

    def __init__(self, cache: AttentionCache, first_row: int, starts: Ints, lengths: Ints) -> None:
        """Plan the copies.

        Args:
            cache: to fill.
            first_row: the row of the first text; the others follow it.
            starts: int64 [texts] where each begins among the packed positions.
            lengths: int64 [texts] positions of each, at least 1.
        """
        self._cache, self._rows = cache, slice(first_row, first_row + len(lengths))
        cache.reserve(int(lengths.max()))
        self._held = held = int(min(lengths.max(), cache.capacity))
        places = np.arange(held)
        # The newest position that lies at each place; a place that holds none takes any, since nobody reads it.
        newest = lengths[:, None] - 1 - (lengths[:, None] - 1 - places) % cache.capacity
        index = starts[:, None] + np.maximum(newest, 0)
        self._index = torch.from_numpy(index).to(cache.keys.device)

    def take(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store a layer's keys (rotated) and values, [T, G, E] both."""
        for buffer, new in ((self._cache.keys, key), (self._cache.values, value)):
            buffer[layer, self._rows, :, : self._held] = new[self._index].transpose(1, 2)
