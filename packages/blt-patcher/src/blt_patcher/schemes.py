"""Schemes by name, those of users among them, and their JSON form; the rules themselves are in `rules` and `bpe`.

The JSON form is what shards, manifests and checkpoints carry, so it has a version, and a reader refuses what it does
not know rather than patch by a rule that is not the one meant.

A user's scheme is a class derived from `FlagScheme` that an installed distribution names in an entry point:

    [project.entry-points."blt_patcher.schemes"]
    sentence = "my_package:SentenceScheme"
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, Final, TypeAlias

from blt_data.errors import InputError
from blt_patcher.bpe import BpeScheme
from blt_patcher.rules import (
    LONGEST_PATCH,
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    FlagScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "LONGEST_PATCH",
    "SCHEMES",
    "BpeScheme",
    "ByteScheme",
    "EntropyCombinedScheme",
    "EntropyMonotonicScheme",
    "EntropyScheme",
    "FlagScheme",
    "JSONScalar",
    "PatchScheme",
    "SpaceScheme",
    "StaticScheme",
    "describe_scheme",
    "make_scheme",
    "public_fields",
    "scheme_class",
    "scheme_from_json",
    "scheme_names",
    "scheme_packages",
    "scheme_to_json",
]

JSONScalar: TypeAlias = str | int | float | bool | None

#: The group of entry points that name users' schemes.
ENTRY_POINT_GROUP: Final = "blt_patcher.schemes"

#: The schemes that come with this package, by name.
SCHEMES: Final[dict[str, type[PatchScheme]]] = {
    cls.name: cls
    for cls in (
        EntropyScheme,
        EntropyMonotonicScheme,
        EntropyCombinedScheme,
        SpaceScheme,
        StaticScheme,
        ByteScheme,
        BpeScheme,
    )
}


def scheme_names() -> list[str]:
    """Return the names of all schemes that can be used here: our own, then those of installed distributions."""
    return [*SCHEMES, *sorted({entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)} - set(SCHEMES))]


def scheme_class(name: object) -> type[PatchScheme]:
    """Return the class of a scheme.

    Args:
        name: as on the command line and in JSON. Our own schemes cannot be replaced by those of others.

    Raises:
        InputError: no scheme has that name, several distributions have one, or theirs cannot be loaded or is none.
    """
    if isinstance(name, str) and name in SCHEMES:
        return SCHEMES[name]
    entry = _entry_point(name)
    try:
        cls = entry.load()
    except Exception as error:
        raise InputError(f"patch scheme {name} cannot be loaded from {entry.value}: {error!r}") from error
    if not (isinstance(cls, type) and issubclass(cls, FlagScheme)):
        raise InputError(f"patch scheme {name} is {entry.value}, which is no class derived from FlagScheme")
    if getattr(cls, "name", None) != name:
        raise InputError(f"patch scheme {name} is {entry.value}, which calls itself {getattr(cls, 'name', None)!r}")
    return cls


def _entry_point(name: object) -> EntryPoint:
    """Return the one entry point of a name."""
    found = {entry.value: entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name == name}
    if not found:
        raise InputError(f"patch scheme {name!r} is unknown; the schemes are {', '.join(scheme_names())}")
    if len(found) > 1:
        raise InputError(f"patch scheme {name} is offered by {' and by '.join(sorted(found))}; uninstall all but one")
    return next(iter(found.values()))


def scheme_packages(scheme: PatchScheme) -> dict[str, str]:
    """Return the distributions besides blt-patcher that decide on a scheme's boundaries, and their versions."""
    if isinstance(scheme, BpeScheme):
        return {"tokenizers": version("tokenizers")}
    if scheme.name in SCHEMES or not isinstance(scheme, FlagScheme):
        return {}
    distribution = _entry_point(scheme.name).dist
    return {} if distribution is None else {distribution.name: distribution.version}


def public_fields(scheme: PatchScheme | type[PatchScheme]) -> list[Field[Any]]:
    """Return the fields that the JSON form has: those that say what the rule is, not what it works with."""
    return [field for field in fields(scheme) if field.metadata.get("json", True)]


def scheme_to_json(scheme: PatchScheme) -> dict[str, JSONScalar]:
    """Return a scheme's JSON form: its name, the version and every field, in a fixed order.

    Raises:
        InputError: a field of a user's scheme holds something that JSON has no scalar for.
    """
    values: dict[str, JSONScalar] = {"scheme": scheme.name, "version": scheme.version}
    for field in public_fields(scheme):
        value = getattr(scheme, field.name)
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise InputError(
                f"{field.name} of scheme {scheme.name} is {value!r}; it must be a string, a number, a truth value or "
                "None"
            )
        values[field.name] = value
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
    cls = scheme_class(name)
    found = values.get("version")
    if found != cls.version or isinstance(found, bool):
        raise InputError(
            f"patch scheme {name} has version {found!r}, but what is installed reads version {cls.version}; "
            "install the release that wrote it"
        )
    return make_scheme(cls, {key: value for key, value in values.items() if key not in ("scheme", "version")})


def make_scheme(cls: type[PatchScheme], values: Mapping[str, object]) -> PatchScheme:
    """Return a scheme of a class from its fields.

    Args:
        cls: the class.
        values: its fields by name; `max_patch_length` and those with a default may be missing.

    Raises:
        InputError: a field is unknown or missing, or a value is out of range.
    """
    known = {field.name: field for field in public_fields(cls)}
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise InputError(f"patch scheme {cls.name} has no field {key!r}; the nearest is {nearest!r}")
    try:
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks each value
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        lacking = [key for key, field in known.items() if key not in values and _is_required(field)]
        if lacking:
            raise InputError(f"patch scheme {cls.name} lacks its field {lacking[0]!r}") from error
        raise InputError(f"patch scheme {cls.name} refuses {dict(values)!r}: {error}") from error


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def describe_scheme(scheme: PatchScheme) -> str:
    """Return a scheme in a few words, such as `entropy, threshold 1.335, max_patch_length 16`."""
    parts = [scheme.name]
    for field in public_fields(scheme):
        value = getattr(scheme, field.name)
        if value is not None:
            parts.append(f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}")
    return ", ".join(parts)
