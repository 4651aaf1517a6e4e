"""What a user's datatrove step is, in JSON: its class and its parameters, so that a job with other steps is another."""

from __future__ import annotations

import hashlib
import inspect
from types import CodeType, FunctionType, MethodType
from typing import Final

from blt_data.shards.schema import JSON, canonical_json

#: Attributes of every datatrove block that are no parameters.
_STATE: Final = frozenset({"stats"})

#: Longer values are replaced by their checksum: a list of a million bad words is no provenance.
_MOST_CHARACTERS: Final = 2000


def step_identity(step: object) -> JSON:
    """Return what decides what a step does, as far as can be told from outside.

    Args:
        step: a datatrove block, or a function as datatrove takes them.
    """
    if isinstance(step, FunctionType | MethodType):
        return _function(step)
    parameters = {
        name: _value(value)
        for name, value in sorted(getattr(step, "__dict__", {}).items())
        if name not in _STATE and _is_parameter(value)
    }
    kind = type(step)
    return {"step": f"{kind.__module__}.{kind.__qualname__}", "parameters": parameters}


def _is_parameter(value: object) -> bool:
    """Return whether a value says what the step does: loggers, handles and caches do not."""
    plain = isinstance(value, bool | int | float | str | bytes | None | list | tuple | set | frozenset | dict)
    return plain or isinstance(value, FunctionType | MethodType)


def _value(value: object) -> JSON:
    plain = _plain(value)
    text = canonical_json({"value": plain})
    if len(text) <= _MOST_CHARACTERS:
        return plain
    return {"sha256": hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()}


def _plain(value: object) -> JSON:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        # JSON knows neither infinity nor NaN.
        return value if value - value == 0 else repr(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return [_plain(item) for item in sorted(value, key=repr)]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, FunctionType | MethodType):
        return _function(value)
    # Its repr may hold an address, which says nothing.
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _function(function: FunctionType | MethodType) -> JSON:
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    name = f"{function.__module__}.{function.__qualname__}"
    closure = [_plain(cell.cell_contents) for cell in getattr(inner, "__closure__", None) or ()]
    return {"function": name, "code_sha256": _code(code) if isinstance(code, CodeType) else None, "closure": closure}


def _code(code: CodeType) -> str:
    """Return a checksum of what a function does: its instructions, constants and names; not where it stands."""
    digest = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        digest.update((_code(constant) if isinstance(constant, CodeType) else repr(constant)).encode(errors="replace"))
    digest.update(repr((code.co_names, code.co_varnames)).encode())
    return digest.hexdigest()
