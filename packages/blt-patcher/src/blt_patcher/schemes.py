"""Patch schemes: the rules that make boundaries, as small frozen values with a JSON form.

A scheme says what the rule is, never how it is computed: `boundaries` applies it to whole shards and `incremental`
one byte at a time, with the same results. Its JSON form is what shards, manifests and checkpoints carry, so it has a
version, and a reader refuses what it does not know rather than patch by a rule that is not the one meant.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Final, TypeAlias

from blt_data.errors import InputError

#: Version of the JSON form and of the rules' meaning.
SCHEME_VERSION: Final = 1

#: The longest patch that a uint16 can hold, in tokens. It is also what `max_patch_length=None` means.
LONGEST_PATCH: Final = 65_535

JSONScalar: TypeAlias = str | int | float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scheme:
    """What all schemes share."""

    #: The scheme's name on command lines and in JSON.
    name: ClassVar[str]
    #: Whether the rule reads entropies; one that does not needs no model.
    needs_entropies: ClassVar[bool]

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
class EntropyScheme(_Scheme):
    """A patch starts after every token whose next-token entropy exceeds a threshold."""

    name: ClassVar[str] = "entropy"
    needs_entropies: ClassVar[bool] = True

    threshold: float
    """θ in nats: token j ≥ 2 starts a patch where H[j-1] > θ."""

    def __post_init__(self) -> None:
        super(EntropyScheme, self).__post_init__()
        _check_finite(self.name, "threshold", self.threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyMonotonicScheme(_Scheme):
    """A patch starts where the entropy rises by more than a relative threshold (approximate monotonicity)."""

    name: ClassVar[str] = "entropy-monotonic"
    needs_entropies: ClassVar[bool] = True

    relative_threshold: float
    """θ_r in nats: token j ≥ 3 starts a patch where H[j-1] − H[j-2] > θ_r; token 2 always does."""

    def __post_init__(self) -> None:
        super(EntropyMonotonicScheme, self).__post_init__()
        _check_finite(self.name, "relative_threshold", self.relative_threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyCombinedScheme(_Scheme):
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
class SpaceScheme(_Scheme):
    """A patch starts after the first space-like byte of a run (SpaceByte's rule, arXiv 2404.14408).

    A token is space-like unless it is an ASCII letter, an ASCII digit or a UTF-8 continuation byte (0x80 to 0xBF);
    BOS and EOS are space-like. Token j ≥ 2 starts a patch where token j-1 is space-like and token j-2 is not.
    """

    name: ClassVar[str] = "space"
    needs_entropies: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticScheme(_Scheme):
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
class ByteScheme(_Scheme):
    """Every token is a patch: a plain byte-level model."""

    name: ClassVar[str] = "byte"
    needs_entropies: ClassVar[bool] = False


PatchScheme: TypeAlias = (
    EntropyScheme | EntropyMonotonicScheme | EntropyCombinedScheme | SpaceScheme | StaticScheme | ByteScheme
)

#: Every scheme by its name.
SCHEMES: Final[dict[str, type[PatchScheme]]] = {
    cls.name: cls
    for cls in (EntropyScheme, EntropyMonotonicScheme, EntropyCombinedScheme, SpaceScheme, StaticScheme, ByteScheme)
}


def scheme_to_json(scheme: PatchScheme) -> dict[str, JSONScalar]:
    """Return a scheme's JSON form: its name, the version and every field, in a fixed order."""
    values: dict[str, JSONScalar] = {"scheme": scheme.name, "version": SCHEME_VERSION}
    for field in fields(scheme):
        values[field.name] = getattr(scheme, field.name)
    return values


def scheme_from_json(values: Mapping[str, object]) -> PatchScheme:
    """Return the scheme that `scheme_to_json` described.

    Args:
        values: the JSON object.

    Raises:
        InputError: the object has no known scheme or version, a key is unknown or missing, or a value is out of range.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"a patch scheme must be a JSON object, not {type(values).__name__}")
    name = values.get("scheme")
    if not isinstance(name, str) or name not in SCHEMES:
        raise InputError(f"patch scheme {name!r} is unknown; the schemes are {', '.join(SCHEMES)}")
    version = values.get("version")
    if version != SCHEME_VERSION or isinstance(version, bool):
        raise InputError(
            f"patch scheme {name} has version {version!r}, but this blt-patcher reads version {SCHEME_VERSION}; "
            "install the release that wrote it"
        )
    cls = SCHEMES[name]
    known = [field.name for field in fields(cls)]
    given = {key: value for key, value in values.items() if key not in ("scheme", "version")}
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise InputError(f"patch scheme {name} has no field {key!r}; the nearest is {nearest!r}")
    for key in known:
        if key not in given and key != "max_patch_length":
            raise InputError(f"patch scheme {name} lacks its field {key!r}")
    scheme: PatchScheme = cls(**given)  # type: ignore[arg-type]  # __post_init__ checks each value
    return scheme


def describe_scheme(scheme: PatchScheme) -> str:
    """Return a scheme in a few words, such as `entropy, threshold 1.335, max_patch_length 16`."""
    parts = [scheme.name]
    for field in fields(scheme):
        value = getattr(scheme, field.name)
        if value is not None:
            parts.append(f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}")
    return ", ".join(parts)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_finite(scheme: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{name} of scheme {scheme} is {value!r}; it must be a finite number, in nats")
