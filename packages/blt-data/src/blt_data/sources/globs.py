"""Globs over the paths of a listing, where there is no file system to ask."""

from __future__ import annotations

import re

_MAGIC = re.compile(r"[*?\[]")


def has_magic(pattern: str) -> bool:
    """Return whether a path is a glob."""
    return _MAGIC.search(pattern) is not None


def fixed_prefix(pattern: str) -> str:
    """Return the directories of a path before the first that is a glob, without a / at the end.

    Args:
        pattern: a path or a glob, its parts separated by /.
    """
    parts = pattern.split("/")
    first = next((index for index, part in enumerate(parts) if has_magic(part)), len(parts) - 1)
    return "/".join(parts[:first])


def compile_glob(pattern: str) -> re.Pattern[str]:
    """Return a regular expression that fully matches the paths a glob means.

    `*` and `?` match within one part of a path, `[…]` one character (`[!…]` any other), `**` any number of whole parts.

    Args:
        pattern: the glob, its parts separated by /.
    """
    pieces = []
    parts = pattern.split("/")
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part == "**":
            pieces.append(".*" if last else "(?:[^/]+/)*")
        else:
            pieces.append(_part(part) + ("" if last else "/"))
    return re.compile("".join(pieces), re.DOTALL)


def _part(part: str) -> str:
    pieces, index = [], 0
    while index < len(part):
        letter = part[index]
        end = part.find("]", index + 2) if letter == "[" else -1
        if letter == "*":
            pieces.append("[^/]*")
        elif letter == "?":
            pieces.append("[^/]")
        elif end > 0:
            inside = re.sub(r"([\\^\[&~|])", r"\\\1", part[index + 1 : end])
            pieces.append("(?!/)[" + ("^" + inside[1:] if inside.startswith("!") else inside) + "]")
            index = end
        else:
            pieces.append(re.escape(letter))
        index += 1
    return "".join(pieces)
