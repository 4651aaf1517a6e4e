"""Config files and what they are put together from.

A file may begin with `extends`, the name of another file or a list of names: those are read first, in order, nested
mappings are merged key by key, and what comes later wins; the file's own keys come last. A name is that of a file that
comes with the package (`models/blt-1b`, `debug-blt`), or, where it ends in `.yaml` or `.yml`, a path from the file that
names it. Every file is checked by itself for unknown keys, so that an error names the file to mend.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from blt_train.config import TrainConfig
from blt_train.errors import ConfigError

EXTENDS = "extends"
_SUFFIXES = (".yaml", ".yml")
#: Folders of the package's configs whose files are parts of configs, not whole ones.
PART_FOLDERS = ("models", "data", "hardware")


def packaged_configs() -> dict[str, str]:
    """Return the whole configs that come with the package: name to YAML text."""
    return _texts(_folder(), "")


def packaged_parts() -> dict[str, str]:
    """Return the parts of configs that come with the package, such as `models/blt-1b`: name to YAML text."""
    return {name: text for part in PART_FOLDERS for name, text in _texts(_folder() / part, f"{part}/").items()}


def describe_packaged_configs() -> dict[str, str]:
    """Return the first comment line of every packaged config by its name."""
    return {name: text.split("\n", 1)[0].lstrip("# ") for name, text in packaged_configs().items()}


def read_config_mapping(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """Read a config file with all that it extends.

    Args:
        path: a YAML file, or the name of a config that comes with the package.

    Returns:
        The merged mapping, and the name that errors use for the file.

    Raises:
        ConfigError: a file is missing, is no mapping, has an unknown key, or extends itself.
    """
    name = os.fspath(path)
    if Path(path).is_file():
        source = _Source(name, Path(path), None)
    elif name in (packaged := packaged_configs()):
        source = _Source(name, None, packaged[name])
    else:
        raise ConfigError(f"{name}: {_missing(name)}")
    return _merged(source, ()), name


def read_parts(names: Sequence[str]) -> dict[str, Any]:
    """Return what a file that extends these packaged names would begin with.

    Args:
        names: such as `models/blt-1b`; later ones win.

    Raises:
        ConfigError: there is no such part, or it is wrong.
    """
    merged: dict[str, Any] = {}
    nowhere = _Source("the parts", None, "")
    for name in names:
        merged = merge(merged, _merged(nowhere.other(name), ()))
    return merged


def load_yaml(text: str) -> Any:
    """Return what a YAML text says, as `yaml.safe_load` does, but for a key that is given twice.

    Args:
        text: of a file or of an override's value.

    Raises:
        RepeatedKeyError: a mapping gives a key twice, of which the last would win silently.
        YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=_StrictLoader)


class RepeatedKeyError(yaml.YAMLError):
    """A mapping gives a key twice; the message is the end of a sentence about the text."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that a mapping gives twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping's node, with all its keys once."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if (first := lines.get((key.tag, key.value))) is not None:
                    raise RepeatedKeyError(
                        f"gives the key {key.value} twice, on line {first} and on line {line}: remove one of them"
                    )
                lines[key.tag, key.value] = line
        return node


def _folder() -> Traversable:
    return resources.files("blt_train") / "configs"


def _texts(folder: Traversable, prefix: str) -> dict[str, str]:
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".yaml")), key=lambda item: item.name)
    return {prefix + item.name.removesuffix(".yaml"): item.read_text(encoding="utf-8") for item in files}


def _missing(name: str) -> str:
    """Return what is told of a config that is not there, with the names that are near."""
    known = list(packaged_configs())
    near = [item for item in known if item.startswith(name)] or difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    if not near:
        near = [item for item in known if all(word in item.split("-") for word in name.split("-"))]
    hint = f"; did you mean {', '.join(near[:6])}?" if near else ""
    return f"no such config file, nor one of the package's configs{hint} (blt-train configs lists them)"


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a config's text comes from."""

    name: str
    """For errors."""
    path: Path | None
    """Of a file; None for what comes with the package."""
    text: str | None
    """Of what comes with the package."""

    def read(self) -> str:
        """Return the text."""
        if self.path is None:
            return self.text or ""
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.name} is no text in UTF-8 (byte {error.start + 1}); name a YAML file") from error

    def other(self, name: str) -> _Source:
        """Return the source that this one means by a name."""
        if name.endswith(_SUFFIXES):
            if self.path is None:
                raise ConfigError(f"{self.name}: {EXTENDS} names {name}, but packaged configs extend packaged ones")
            path = self.path.parent / name
            if not path.is_file():
                raise ConfigError(f"{self.name}: {EXTENDS} names {name}, but there is no file {path}")
            return _Source(str(path), path, None)
        packaged = {**packaged_parts(), **packaged_configs()}
        if name not in packaged:
            nearest = difflib.get_close_matches(name, packaged, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "; a path must end in .yaml"
            raise ConfigError(f"{self.name}: {EXTENDS} names {name}, which is no packaged config{hint}")
        return _Source(name, None, packaged[name])

    @property
    def identity(self) -> str:
        """Return what tells it from other sources."""
        return self.name if self.path is None else str(self.path.resolve())


def _merged(source: _Source, above: tuple[str, ...]) -> dict[str, Any]:
    """Return a source's mapping on top of those that it extends."""
    if source.identity in above:
        raise ConfigError(f"{source.name}: {EXTENDS} itself, by way of {' -> '.join([*above, source.identity])}")
    content = _parse(source)
    names = _extended(source, content.pop(EXTENDS, []))
    try:
        check_keys(content)
    except ConfigError as error:
        raise ConfigError(f"{source.name}: {error}") from error
    merged: dict[str, Any] = {}
    for name in names:
        merged = merge(merged, _merged(source.other(name), (*above, source.identity)))
    return merge(merged, content)


def _parse(source: _Source) -> dict[str, Any]:
    text = source.read()
    try:
        content = load_yaml(text)
    except RepeatedKeyError as error:
        raise ConfigError(f"{source.name} {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Besides what the parser refuses: whole numbers of thousands of digits, dates that are none, endless nesting.
        raise ConfigError(f"{source.name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{source.name} must be a mapping of config keys, not {type(content).__name__}")
    return content


def _extended(source: _Source, value: object) -> list[str]:
    """Return the names that a file extends."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{source.name}: {EXTENDS} must be a config's name or a list of names, not {value!r}")
    return names


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nested mappings as one.

    Args:
        below: its values stay where the other has none.
        above: its values win; where both have mappings, these are merged.
    """
    merged = dict(below)
    for key, value in above.items():
        present = merged.get(key)
        both = isinstance(present, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(present, value) if both else value  # type: ignore[arg-type]  # both are mappings
    return merged


def check_keys(content: Mapping[Any, Any], cls: type = TrainConfig, prefix: str = "") -> None:
    """Refuse keys that no config class has, as far as values are the mappings that they should be.

    Args:
        content: of a file, perhaps a part of a config.
        cls: config class of these keys.
        prefix: dotted name of the section, with its dot.

    Raises:
        ConfigError: naming the key and the nearest known one.
    """
    hints = typing.get_type_hints(cls)
    for key, value in content.items():
        if key not in hints:
            raise ConfigError(unknown_key(str(key), prefix, cls))
        inner = hints[key]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            check_keys(value, inner, f"{prefix}{key}.")


def unknown_key(key: str, prefix: str, cls: type) -> str:
    """Return the error text for an unknown key, with the nearest known one, wherever in the config it is.

    Args:
        key: the last part of its name.
        prefix: the section's dotted name, with its dot.
        cls: the section's class.
    """
    here = [item.name for item in dataclasses.fields(cls)]
    nearest = difflib.get_close_matches(key, here, n=1, cutoff=0.6)
    if nearest:
        return f"unknown key {prefix}{key}; did you mean {prefix}{nearest[0]}?"
    paths = known_keys()
    elsewhere: Sequence[str] = [path for path in paths if path.rsplit(".", 1)[-1] == key]
    elsewhere = elsewhere or difflib.get_close_matches(prefix + key, paths, n=1, cutoff=0)
    return f"unknown key {prefix}{key}; did you mean {elsewhere[0]}?"


def known_keys(cls: type = TrainConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all fields of a config class, sections left out.

    Args:
        cls: config class.
        prefix: dotted name of the section, with its dot.
    """
    hints = typing.get_type_hints(cls)
    keys: list[str] = []
    for item in dataclasses.fields(cls):
        inner = hints[item.name]
        name = prefix + item.name
        is_section = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        keys += known_keys(inner, name + ".") if is_section else [name]
    return keys
