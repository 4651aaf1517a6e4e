"""From command-line options to a patch scheme, refusing options that contradict each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blt_data.errors import InputError
from blt_patcher.calibrate import check_target
from blt_patcher.schemes import (
    BpeScheme,
    EntropyScheme,
    PatchScheme,
    make_scheme,
    public_fields,
    scheme_class,
)

#: Which of the value options each of our schemes reads; those of users read `--scheme-option`.
_READS: Final[dict[str, tuple[str, ...]]] = {
    "entropy": ("threshold",),
    "entropy-monotonic": ("relative_threshold",),
    "entropy-combined": ("threshold", "relative_threshold"),
    "space": (),
    "static": ("patch_length",),
    "byte": (),
    "bpe": ("tokenizer",),
}
_VALUES: Final = ("threshold", "relative_threshold", "patch_length", "tokenizer")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeOptions:
    """What the command line says of the scheme; None where an option is not given."""

    scheme: str | None = None
    threshold: float | None = None
    relative_threshold: float | None = None
    patch_length: int | None = None
    max_patch_length: int | None = None
    target_patch_length: float | None = None
    tokenizer: Path | None = None
    scheme_option: tuple[str, ...] | None = None
    """KEY=VALUE each: the fields of a user's scheme."""


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
    cls = scheme_class(name)
    reads = _READS.get(name, ())
    values: dict[str, float | int | Path | None] = {key: getattr(options, key) for key in _VALUES}
    for key, value in values.items():
        if value is not None and key not in reads:
            mend = "choose another --scheme" if name in _READS else "give its fields with --scheme-option"
            raise InputError(f"scheme {name} has no {_flag(key)}; leave it out, or {mend}")
    if name in _READS and options.scheme_option:
        raise InputError(f"scheme {name} has options of its own; --scheme-option is for schemes of other packages")
    missing = [key for key in reads if values[key] is None]
    if options.target_patch_length is None:
        if missing:
            target = " or --target-patch-length" if cls.needs_entropies and reads else ""
            raise InputError(f"scheme {name} needs {' and '.join(_flag(key) for key in missing)}{target}")
        if name not in _READS:
            return SchemeRequest(
                scheme=_build_users(cls, options.scheme_option or (), options.max_patch_length), free=None
            )
        return SchemeRequest(scheme=_build(name, values, options.max_patch_length), free=None)
    check_target(options.target_patch_length)
    if not (cls.needs_entropies and reads):
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


def _build(name: str, values: dict[str, float | int | Path | None], limit: int | None) -> PatchScheme:
    """Return one of our own schemes; the values that it reads are there."""
    given = {key: value for key, value in values.items() if key in _READS[name]}
    if name == BpeScheme.name:
        return BpeScheme.from_file(str(given["tokenizer"]), max_patch_length=limit)
    return make_scheme(scheme_class(name), {**given, "max_patch_length": limit})


def _build_users(cls: type[PatchScheme], given: Sequence[str], limit: int | None) -> PatchScheme:
    """Return a user's scheme from KEY=VALUE options: a string as it is where the field is one, else as JSON."""
    kinds = {field.name: str(getattr(field.type, "__name__", field.type)) for field in public_fields(cls)}
    values: dict[str, object] = {}
    for option in given:
        key, equals, text = option.partition("=")
        if not equals:
            raise InputError(f"--scheme-option {option!r} has no value; write KEY=VALUE")
        if key in values:
            raise InputError(f"--scheme-option {key} is given twice; leave one out")
        try:
            values[key] = text if kinds.get(key, "str").split(" ")[0] == "str" else json.loads(text)
        except ValueError as error:
            raise InputError(
                f"--scheme-option {option!r} is no {kinds[key]}; write a number, true, false or null"
            ) from error
    if "max_patch_length" in values:
        raise InputError("--scheme-option max_patch_length is an option of its own; write --max-patch-length")
    return make_scheme(cls, {**values, "max_patch_length": limit})
