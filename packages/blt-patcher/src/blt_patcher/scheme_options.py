"""From command-line options to a patch scheme, refusing options that contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blt_data.errors import InputError
from blt_patcher.calibrate import check_target
from blt_patcher.schemes import (
    SCHEMES,
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
)

#: Which of the value options each scheme reads.
_READS: Final[dict[str, tuple[str, ...]]] = {
    "entropy": ("threshold",),
    "entropy-monotonic": ("relative_threshold",),
    "entropy-combined": ("threshold", "relative_threshold"),
    "space": (),
    "static": ("patch_length",),
    "byte": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeOptions:
    """What the command line says of the scheme; None where an option is not given."""

    scheme: str | None = None
    threshold: float | None = None
    relative_threshold: float | None = None
    patch_length: int | None = None
    max_patch_length: int | None = None
    target_patch_length: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeRequest:
    """The scheme asked for."""

    scheme: PatchScheme
    """Complete but for the free threshold, which stands at 0."""

    free: str | None
    """The threshold that calibration is to find, or None."""


def resolve_scheme(options: SchemeOptions) -> SchemeRequest:
    """Return the scheme that the options ask for.

    Raises:
        InputError: options are missing, contradict each other or are out of range; the message names the mend.
    """
    name = options.scheme
    if name is None:
        if options.threshold is None and options.target_patch_length is None:
            raise InputError("no patch scheme is chosen; give --threshold, --target-patch-length or --scheme")
        name = EntropyScheme.name
    reads = _READS[name]
    values: dict[str, float | int | None] = {
        key: getattr(options, key) for key in ("threshold", "relative_threshold", "patch_length")
    }
    for key, value in values.items():
        if value is not None and key not in reads:
            raise InputError(f"scheme {name} has no {_flag(key)}; leave it out or choose another --scheme")
    missing = [key for key in reads if values[key] is None]
    if options.target_patch_length is None:
        if missing:
            target = " or --target-patch-length" if SCHEMES[name].needs_entropies else ""
            raise InputError(f"scheme {name} needs {' and '.join(_flag(key) for key in missing)}{target}")
        return SchemeRequest(scheme=_build(name, values, options.max_patch_length), free=None)
    check_target(options.target_patch_length)
    if not SCHEMES[name].needs_entropies:
        raise InputError(f"scheme {name} has no threshold to find; leave --target-patch-length out")
    if not missing:
        flags = " and ".join(_flag(key) for key in reads)
        verb = "leave" if len(reads) > 1 else "leaves"
        raise InputError(f"--target-patch-length finds a threshold, but {flags} {verb} none to find; leave one out")
    if len(missing) > 1:
        flags = " or ".join(_flag(key) for key in missing)
        raise InputError(f"--target-patch-length finds one threshold of scheme {name}; fix the other one with {flags}")
    return SchemeRequest(scheme=_build(name, {**values, missing[0]: 0.0}, options.max_patch_length), free=missing[0])


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _build(name: str, values: dict[str, float | int | None], limit: int | None) -> PatchScheme:
    threshold, relative = values["threshold"] or 0.0, values["relative_threshold"] or 0.0
    match name:
        case EntropyScheme.name:
            return EntropyScheme(threshold=threshold, max_patch_length=limit)
        case EntropyMonotonicScheme.name:
            return EntropyMonotonicScheme(relative_threshold=relative, max_patch_length=limit)
        case EntropyCombinedScheme.name:
            return EntropyCombinedScheme(threshold=threshold, relative_threshold=relative, max_patch_length=limit)
        case SpaceScheme.name:
            return SpaceScheme(max_patch_length=limit)
        case StaticScheme.name:
            return StaticScheme(patch_length=int(values["patch_length"] or 0), max_patch_length=limit)
        case _:
            return ByteScheme(max_patch_length=limit)
