"""Scheme files: how a patch scheme travels from `blt-patch calibrate` to the commands that patch by it.

`blt-patch calibrate --output threshold.json` writes one; `precompute`, `repatch` and `show` take it with
`--scheme-file`, so that training and held-out data are cut by the same rule without a number copied by hand:

    {"format": "blt-patch-scheme", "version": 1, "scheme": {…}, "calibration": {…},
     "entropy_model": {"fingerprint": …}, "entropy_settings": {…}, "curve": […]}

`scheme` alone is needed. `calibration` goes into the provenance of what is patched, which is how a directory knows the
mean patch length it was meant to have (`drift`). `entropy_model` says which model scored the sample: a threshold means
nothing with another one, so `SchemeFile.check_model` refuses that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blt_data.errors import InputError
from blt_patcher.outputs import write_file
from blt_patcher.schemes import PatchScheme, scheme_from_json, scheme_to_json

SCHEME_FILE_FORMAT: Final = "blt-patch-scheme"
SCHEME_FILE_VERSION: Final = 1

_KEYS: Final = ("format", "version", "scheme", "calibration", "entropy_model", "entropy_settings", "curve")
_MEND: Final = "write one with blt-patch calibrate --output"

#: No scheme file comes near this; a larger file is something else.
_LARGEST_FILE: Final = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeFile:
    """A scheme and how it was found, as read from a file."""

    path: Path
    """The file it was read from."""

    scheme: PatchScheme
    """How to patch."""

    calibration: Mapping[str, Any] | None
    """How its threshold was found, for provenance: `precompute(…, calibration=…)` takes it as it is."""

    entropy_model: Mapping[str, Any] | None
    """The entropy model that the threshold was found with, if known: its identity without its configuration."""

    def check_model(self, identity: Mapping[str, Any] | None) -> None:
        """Refuse entropies of another model than the threshold was found with.

        Args:
            identity: the model that scored or will score the documents, as provenance has it: an object with a
                `fingerprint`. None passes, for schemes that read no entropies.

        Raises:
            InputError: its fingerprint is another, or its contexts begin elsewhere.
        """
        if self.entropy_model is None or identity is None:
            return
        for key, value in self.entropy_model.items():
            if key in identity and identity[key] != value:
                raise InputError(
                    f"{self.path}: holds a threshold for an entropy model with {key} {_brief(value)}, but the one used "
                    f"has {_brief(identity[key])}; run blt-patch calibrate with that one"
                )


def scheme_file_to_json(
    scheme: PatchScheme,
    *,
    calibration: Mapping[str, Any] | None = None,
    entropy_model: Mapping[str, Any] | None = None,
    entropy_settings: Mapping[str, Any] | None = None,
    curve: Sequence[Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Return the object that a scheme file holds.

    Args:
        scheme: how to patch.
        calibration: how the threshold was found.
        entropy_model: the model's identity, of which the file keeps all but the configuration.
        entropy_settings: how the model was run.
        curve: thresholds and the mean patch lengths they give, for readers.
    """
    model = {key: value for key, value in (entropy_model or {}).items() if key != "config"}
    return {
        "format": SCHEME_FILE_FORMAT,
        "version": SCHEME_FILE_VERSION,
        "scheme": scheme_to_json(scheme),
        "calibration": dict(calibration) if calibration is not None else None,
        "entropy_model": model or None,
        "entropy_settings": dict(entropy_settings) if entropy_settings is not None else None,
        "curve": [dict(point) for point in curve] if curve is not None else None,
    }


def write_scheme_file(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a scheme file, atomically; an existing one is replaced.

    Args:
        path: the file; its directory must exist.
        content: what `scheme_file_to_json` returned.

    Raises:
        InputError: the path is a directory, or its directory is missing.
        OSError: the file cannot be written.
    """
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_scheme_file(path: str | os.PathLike[str]) -> SchemeFile:
    """Read a scheme file.

    Args:
        path: a file that `blt-patch calibrate` wrote (`--output`, or `--json` and a redirection), or one that holds a
            scheme's JSON form alone.

    Raises:
        InputError: the file is missing, is no scheme file, or holds a scheme that this program does not know.
    """
    file = Path(path)
    values = _read_object(file)
    if isinstance(values.get("scheme"), str):
        # A scheme by itself: `{"scheme": "entropy", "version": 1, …}`.
        values = {"format": SCHEME_FILE_FORMAT, "version": SCHEME_FILE_VERSION, "scheme": values}
    if values.get("format") != SCHEME_FILE_FORMAT:
        raise InputError(f"{file}: is no scheme file; {_MEND}")
    if values.get("version") != SCHEME_FILE_VERSION or isinstance(values.get("version"), bool):
        raise InputError(
            f"{file}: is a scheme file of version {values.get('version')!r}, this program reads version "
            f"{SCHEME_FILE_VERSION}; update blt-patcher or calibrate again"
        )
    unknown = [key for key in values if key not in _KEYS]
    if unknown:
        raise InputError(f"{file}: has an unknown key {unknown[0]!r}; a scheme file has {', '.join(_KEYS)}")
    calibration, model = values.get("calibration"), values.get("entropy_model")
    for name, value in (("calibration", calibration), ("entropy_model", model)):
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{file}: {name} is {type(value).__name__}, not an object; {_MEND}")
    if not isinstance(values.get("scheme"), dict):
        raise InputError(f"{file}: names no scheme; {_MEND}")
    try:
        scheme = scheme_from_json(values["scheme"])
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return SchemeFile(path=file, scheme=scheme, calibration=calibration, entropy_model=model)


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    if file.is_dir():
        raise InputError(f"{file}: is a directory, not a scheme file; {_MEND}")
    try:
        with file.open("rb") as opened:
            data = opened.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise InputError(f"{file}: no such scheme file; {_MEND}") from None
    if len(data) > _LARGEST_FILE:
        raise InputError(f"{file}: is too large to be a scheme file; {_MEND}")
    try:
        values = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise InputError(f"{file}: is no JSON, so no scheme file; {_MEND}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: is no scheme file; {_MEND}")
    return values


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:16]}…"
