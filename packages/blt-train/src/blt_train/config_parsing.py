"""Nested mappings and `key=value` overrides to a strict `TrainConfig`, and back to YAML.

Unknown keys and wrong types are errors that name the file, the key and the nearest known key. An override's value is
read as YAML, so `seed=3`, `data.holdout=null` and `model.overrides.layers=2` have the types one expects.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import yaml

from blt_train.config import TrainConfig
from blt_train.config_files import RepeatedKeyError, load_yaml, read_config_mapping, unknown_key
from blt_train.errors import ConfigError

_ORIGIN_OVERRIDES = "the overrides"


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a config file and apply overrides.

    Args:
        path: a YAML file, or the name of a config that comes with the package, such as `debug-blt`.
        overrides: `key=value` with dotted keys, applied in order.

    Returns:
        The checked config.

    Raises:
        ConfigError: the file is missing or no mapping, or a key or value is wrong; the message names file and key.
    """
    content, name = read_config_mapping(path)
    for override in overrides:
        _apply_override(content, override)
    return config_from_mapping(content, where=name if not overrides else f"{name} with {_ORIGIN_OVERRIDES}")


def config_from_mapping(content: Mapping[str, Any], *, where: str = "config") -> TrainConfig:
    """Build a config from nested mappings.

    Args:
        content: one key per field of `TrainConfig`.
        where: what the errors call the source, such as the file's name.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of the wrong type or out of range.
    """
    try:
        config = _build(TrainConfig, content, prefix="")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise TypeError("config classes build themselves")
    return config


def config_to_mapping(config: TrainConfig) -> dict[str, Any]:
    """Return the config as nested plain dicts, ready for YAML or JSON."""
    mapping = _plain(dataclasses.asdict(config))
    return dict(mapping)


def config_to_yaml(config: TrainConfig) -> str:
    """Return the config as a YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config_to_mapping(config), sort_keys=False, allow_unicode=True)


def _apply_override(content: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in nested dicts."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must have the form key=value, such as schedule.total_steps=100")
    try:
        value = load_yaml(text)
    except RepeatedKeyError as error:
        raise ConfigError(f"override {override!r} {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    *sections, last = key.split(".")
    target = content
    for section in sections:
        inner = target.setdefault(section, {})
        if inner is None:
            inner = target[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
        target = inner
    target[last] = value


def _build(cls: type, content: Any, *, prefix: str) -> Any:
    """Build one config dataclass from a mapping."""
    section = prefix.rstrip(".")
    if not isinstance(content, Mapping):
        raise ConfigError(f"{section} must be a mapping of keys, not {content!r}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            raise ConfigError(unknown_key(str(key), prefix, cls))
    missing = [
        name
        for name, item in fields.items()
        if name not in content and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing; give it in the file or as {prefix}{missing[0]}=VALUE")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in content.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Check a YAML value against a field's type."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value if value is not None else {}, prefix=name + ".")
    if typing.get_origin(hint) is tuple:
        return _convert_list(typing.get_args(hint)[0], value, name)
    if typing.get_origin(hint) is not None:
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a mapping of keys, not {value!r}")
        inner = typing.get_args(hint)[1]
        if dataclasses.is_dataclass(inner):
            return {str(key): _convert(inner, item, f"{name}.{key}") for key, item in (value or {}).items()}
        return dict(value or {})
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _convert_choice(hint, value, name)
    return _convert_scalar(hint, value, name)


def _convert_list(hint: type, value: Any, name: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list such as [a, b], not {value!r}")
    return tuple(_convert_scalar(hint, item, f"{name}[{index}]") for index, item in enumerate(value))


def _convert_choice(hint: type[StrEnum], value: Any, name: str) -> StrEnum:
    if value is False and "off" in list(hint):
        value = "off"  # YAML 1.1 reads a bare `off` as false
    try:
        return hint(value)
    except ValueError as error:
        raise ConfigError(f"{name} must be one of {', '.join(hint)}, not {value!r}") from error


def _convert_scalar(hint: type, value: Any, name: str) -> Any:
    if hint is float:
        # YAML 1.1 reads 1e-3, for want of a dot, as a string.
        try:
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError):
            pass
        raise ConfigError(f"{name} must be a number, not {value!r}")
    if type(value) is not hint:
        kind = {int: "a whole number", bool: "true or false", str: "a text"}[hint]
        raise ConfigError(f"{name} must be {kind}, not {value!r}")
    return value


def _plain(value: Any) -> Any:
    """Return nested values with enums as plain strings and tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value
