"""Patch schemes: the rules that make boundaries, as small frozen values.

A scheme says what the rule is, never how it is computed: `boundaries` applies it to whole shards and `incremental`
one byte at a time, with the same results. The exceptions are schemes derived from `FlagScheme`, which bring their own
boundaries: `bpe`, and those of users. Names and JSON forms are in `schemes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError
from blt_data.framing import FRAME_TOKENS

#: The longest patch that a uint16 can hold, in tokens. It is also what `max_patch_length=None` means.
LONGEST_PATCH: Final = 65_535


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchScheme:
    """What all schemes share."""

    #: The scheme's name on command lines and in JSON.
    name: ClassVar[str]
    #: Version of the scheme's fields and of their meaning, kept in the JSON form.
    version: ClassVar[int] = 1
    #: Whether the rule reads entropies; one that does not needs no model.
    needs_entropies: ClassVar[bool]
    #: Whether more bytes never change the patches of those before, so that text can be patched as it is generated.
    incremental: ClassVar[bool] = True

    max_patch_length: int | None = None
    """Longest patch in tokens, 1 to 65,535; a longer one is split m, m, …, rest. None means 65,535."""

    def __post_init__(self) -> None:
        limit = self.max_patch_length
        if limit is not None and not (_is_int(limit) and 1 <= limit <= LONGEST_PATCH):
            raise InputError(
                f"max_patch_length of scheme {self.name} is {limit!r}; it must be a whole number from 1 to "
                f"{LONGEST_PATCH:,}, or be left out"
            )

    @property
    def length_limit(self) -> int:
        """The longest patch this scheme makes, in tokens."""
        return LONGEST_PATCH if self.max_patch_length is None else self.max_patch_length


@dataclass(frozen=True, kw_only=True, slots=True)
class FlagScheme(PatchScheme):
    """A scheme that brings its own boundaries: derive from it, give it a `name`, fields if need be, and `starts`.

    A field must be a string, a number, a truth value or None, so that shards can say how they were made. The class is
    a dataclass like this one (`frozen=True, kw_only=True`). An entry point of group `blt_patcher.schemes` makes it
    known to `blt-patch --scheme NAME`; see `schemes`.
    """

    needs_entropies: ClassVar[bool] = False
    incremental: ClassVar[bool] = False

    def starts(
        self, content: npt.NDArray[np.uint8], entropies: npt.NDArray[np.float16] | None
    ) -> npt.NDArray[np.bool_]:
        """Return which framed tokens of a document start a patch; the same for the same arguments.

        Args:
            content: uint8 [N] the document's bytes, not to be written to.
            entropies: float16 [N + 2] nats after BOS, each byte and EOS, if `needs_entropies`; else None.

        Returns:
            bool [N + 2]: BOS, each byte, EOS. The first two must be true, as BOS is a patch of its own. Patches longer
            than `max_patch_length` are split afterwards.
        """
        raise NotImplementedError

    def flags(
        self,
        content: npt.NDArray[np.uint8],
        content_offsets: npt.NDArray[np.int64],
        entropies: npt.NDArray[np.float16] | None,
    ) -> npt.NDArray[np.bool_]:
        """Return `starts` of many documents end to end, checked; a scheme that works in batches overrides this.

        Args:
            content: uint8 [N] the documents' bytes.
            content_offsets: int64 [D + 1] where each document's bytes begin.
            entropies: float16 [N + 2D], N counting the bytes between the first and last offset, or None.

        Returns:
            bool [N + 2D].

        Raises:
            InputError: `starts` fails, or what it returns are no boundaries.
        """
        content = content.view()
        content.flags.writeable = False
        documents = content_offsets.size - 1
        flags = np.empty(int(content_offsets[-1] - content_offsets[0]) + FRAME_TOKENS * documents, dtype=np.bool_)
        low = 0
        for document in range(documents):
            data = content[content_offsets[document] : content_offsets[document + 1]]
            high = low + data.size + FRAME_TOKENS
            try:
                starts = self.starts(data, None if entropies is None else entropies[low:high])
            except Exception as error:
                raise InputError(f"scheme {self.name} failed on document {document}: {error!r}") from error
            _check_starts(self.name, document, starts, high - low)
            flags[low:high] = starts
            low = high
        return flags


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyScheme(PatchScheme):
    """A patch starts after every token whose next-token entropy exceeds a threshold."""

    name: ClassVar[str] = "entropy"
    needs_entropies: ClassVar[bool] = True

    threshold: float
    """θ in nats: token j ≥ 2 starts a patch where H[j-1] > θ."""

    def __post_init__(self) -> None:
        super(EntropyScheme, self).__post_init__()
        _check_finite(self.name, "threshold", self.threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyMonotonicScheme(PatchScheme):
    """A patch starts where the entropy rises by more than a relative threshold (approximate monotonicity)."""

    name: ClassVar[str] = "entropy-monotonic"
    needs_entropies: ClassVar[bool] = True

    relative_threshold: float
    """θ_r in nats: token j ≥ 3 starts a patch where H[j-1] − H[j-2] > θ_r; token 2 always does."""

    def __post_init__(self) -> None:
        super(EntropyMonotonicScheme, self).__post_init__()
        _check_finite(self.name, "relative_threshold", self.relative_threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyCombinedScheme(PatchScheme):
    """A patch starts where the entropy exceeds θ and has risen by more than θ_r."""

    name: ClassVar[str] = "entropy-combined"
    needs_entropies: ClassVar[bool] = True

    threshold: float
    """θ in nats: token j ≥ 3 starts a patch only where H[j-1] > θ."""

    relative_threshold: float
    """θ_r in nats: and where H[j-1] − H[j-2] > θ_r; token 2 always starts a patch."""

    def __post_init__(self) -> None:
        super(EntropyCombinedScheme, self).__post_init__()
        _check_finite(self.name, "threshold", self.threshold)
        _check_finite(self.name, "relative_threshold", self.relative_threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceScheme(PatchScheme):
    """A patch starts after the first space-like byte of a run (SpaceByte's rule, arXiv 2404.14408).

    A token is space-like unless it is an ASCII letter, an ASCII digit or a UTF-8 continuation byte (0x80 to 0xBF);
    BOS and EOS are space-like. Token j ≥ 2 starts a patch where token j-1 is space-like and token j-2 is not.
    """

    name: ClassVar[str] = "space"
    needs_entropies: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticScheme(PatchScheme):
    """After BOS, a patch every k tokens, whatever they are."""

    name: ClassVar[str] = "static"
    needs_entropies: ClassVar[bool] = False

    patch_length: int
    """k in tokens, at least 1: patches start at tokens 0, 1, 1 + k, 1 + 2k, …"""

    def __post_init__(self) -> None:
        super(StaticScheme, self).__post_init__()
        if not (_is_int(self.patch_length) and self.patch_length >= 1):
            raise InputError(
                f"patch_length of scheme {self.name} is {self.patch_length!r}; it must be a whole number from 1 up"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteScheme(PatchScheme):
    """Every token is a patch: a plain byte-level model."""

    name: ClassVar[str] = "byte"
    needs_entropies: ClassVar[bool] = False


def _check_starts(scheme: str, document: int, starts: object, tokens: int) -> None:
    """Refuse what is no set of boundaries."""
    if not isinstance(starts, np.ndarray) or starts.dtype != np.bool_ or starts.shape != (tokens,):
        what = f"{starts.dtype} {list(starts.shape)}" if isinstance(starts, np.ndarray) else type(starts).__name__
        raise InputError(
            f"scheme {scheme} gives {what} for document {document}; it must give bool [{tokens}], a value for each "
            "framed token"
        )
    if not starts[:2].all():
        raise InputError(
            f"scheme {scheme} starts no patch at BOS or after it in document {document}; the first two values must be "
            "true, as BOS is a patch of its own"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_finite(scheme: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{name} of scheme {scheme} is {value!r}; it must be a finite number, in nats")
