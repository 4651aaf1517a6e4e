"""One document and its patches, the part of it that is shown, and what decided on each boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError
from blt_data.framing import FRAME_TOKENS
from blt_patcher.schemes import (
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    describe_scheme,
)

#: Bytes shown unless told.
DEFAULT_SHOWN_BYTES: Final = 2000

#: Bytes that a figure shows at most: a page of some 30 MB.
MAX_FIGURE_BYTES: Final = 100_000

#: A window may begin up to so many bytes earlier, so that it does not begin inside a character.
_LONGEST_TAIL: Final = 3


@dataclass(frozen=True, slots=True)
class ShownPatch:
    """One patch, or the part of it that is shown."""

    index: int
    """Its number in the document, BOS being patch 0."""
    start: int
    """Its first shown token."""
    end: int
    """The token after its last shown one."""
    length: int
    """All its tokens, shown or not."""


@dataclass(frozen=True, slots=True)
class ShownToken:
    """What is known of one token."""

    token: int
    """Its place in the framed document: 0 is BOS, byte i is token i + 1."""
    starts: bool
    """Whether it starts a patch."""
    patch: int
    """The patch that it is in."""
    entropy: float | None
    """Nats of the prediction of this token, H[token - 1]; None for BOS, and where no entropies are known."""
    bar: float | None
    """The entropy that this token must exceed to start a patch; None where no threshold decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchView:
    """A document, its patches, and which of its bytes are shown."""

    title: str
    """What the document is called."""
    content: npt.NDArray[np.uint8]
    """uint8 [N] the whole document."""
    patch_lengths: npt.NDArray[np.uint16]
    """uint16 [P] in framed tokens, summing to N + 2."""
    entropies: npt.NDArray[np.float16] | None = None
    """float16 [N + 2] nats after each framed token, if known."""
    scheme: PatchScheme | None = None
    """What made the patches, if known; its thresholds are drawn."""
    first_byte: int = 0
    """The first byte shown."""
    shown_bytes: int = DEFAULT_SHOWN_BYTES
    """At most so many bytes are shown."""

    def __post_init__(self) -> None:
        tokens = self.content.size + FRAME_TOKENS
        if int(self.patch_lengths.sum(dtype=np.int64)) != tokens:
            raise InputError(f"{self.title}: its patches do not cover its {self.content.size} bytes; patch it again")
        if self.entropies is not None and self.entropies.shape != (tokens,):
            raise InputError(f"{self.title}: has {self.entropies.size} entropies for {tokens} tokens; score it again")
        if self.entropies is not None and not bool(np.isfinite(self.entropies).all()):
            raise InputError(f"{self.title}: has an entropy that is not a finite number; score it again")
        if not 0 <= self.first_byte <= self.content.size:
            raise InputError(f"{self.title}: has no byte {self.first_byte}; it has {self.content.size:,} bytes")
        if self.shown_bytes < 1:
            raise InputError(f"{self.shown_bytes} bytes are to be shown; show at least 1")

    @property
    def window(self) -> tuple[int, int]:
        """The first byte shown and the byte after the last one, moved so that neither cuts a character."""
        first, last = self.first_byte, min(self.first_byte + self.shown_bytes, self.content.size)
        begin = self._character_start(first)
        end = self._character_start(last)
        return begin, end if end > begin else last

    def _character_start(self, byte: int) -> int:
        """Return the first byte of the character that a byte is within, or the byte itself."""
        if byte == self.content.size:
            return byte
        for place in range(byte, max(byte - _LONGEST_TAIL, 0) - 1, -1):
            value = int(self.content[place])
            if not 0x80 <= value < 0xC0:
                width = 1 if value < 0xC0 else 2 if value < 0xE0 else 3 if value < 0xF0 else 4
                return place if place + width > byte else byte
        return byte

    @property
    def token_window(self) -> tuple[int, int]:
        """The first token shown and the token after the last one: BOS and EOS are shown at the document's ends."""
        first, last = self.window
        whole = last == self.content.size
        return first + 1 if first else 0, last + 1 + whole

    @property
    def shown_content(self) -> bytes:
        """The bytes shown."""
        first, last = self.window
        return self.content[first:last].tobytes()

    @property
    def is_partial(self) -> bool:
        """Whether some of the document is not shown."""
        return self.window != (0, self.content.size)

    def patches(self) -> list[ShownPatch]:
        """Return the patches that hold a shown token, in order."""
        ends = np.cumsum(self.patch_lengths, dtype=np.int64)
        low, high = self.token_window
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(ends, high, side="left"))
        shown = []
        for index in range(first, min(last, ends.size - 1) + 1):
            length, end = int(self.patch_lengths[index]), int(ends[index])
            shown.append(ShownPatch(index, max(end - length, low), min(end, high), length))
        return shown

    def tokens(self) -> list[ShownToken]:
        """Return what is known of every shown token, in order."""
        ends = np.cumsum(self.patch_lengths, dtype=np.int64)
        return [
            ShownToken(
                token,
                token == int(ends[patch.index]) - patch.length,
                patch.index,
                self._entropy_before(token),
                self._bar(token),
            )
            for patch in self.patches()
            for token in range(patch.start, patch.end)
        ]

    def figures(self) -> dict[str, object]:
        """Return the document's figures for a table: bytes, patches, mean patch length, scheme."""
        first, last = self.window
        tokens, patches = self.content.size + FRAME_TOKENS, self.patch_lengths.size
        rows: dict[str, object] = {"document": self.title, "bytes": self.content.size}
        if self.is_partial:
            rows["shown"] = f"bytes {first:,} to {last:,}"
        rows |= {
            "patches": patches,
            "mean patch length": f"{tokens / patches:.4f}",
            "longest": int(self.patch_lengths.max()),
        }
        if self.scheme is not None:
            rows["scheme"] = describe_scheme(self.scheme)
        return rows

    def _entropy_before(self, token: int) -> float | None:
        return float(self.entropies[token - 1]) if self.entropies is not None and token else None

    def _bar(self, token: int) -> float | None:
        """Return what H[token - 1] must exceed for the token to start a patch; tokens 0 and 1 always do."""
        if self.entropies is None or token < 2:
            return None
        match self.scheme:
            case EntropyScheme(threshold=threshold):
                return float(threshold)
            case EntropyMonotonicScheme(relative_threshold=rise) if token > 2:
                return float(self.entropies[token - 2]) + rise
            case EntropyCombinedScheme(threshold=threshold, relative_threshold=rise) if token > 2:
                return max(float(threshold), float(self.entropies[token - 2]) + rise)
        return None
