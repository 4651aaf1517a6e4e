"""Patching one token at a time, as generation needs it: the same boundaries as `boundaries`, in constant memory."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from blt_data.errors import InputError
from blt_data.framing import BYTE_OFFSET, VOCABULARY_SIZE
from blt_patcher.rules import (
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    FlagScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
)
from blt_patcher.schemes import scheme_from_json, scheme_to_json

#: Version of the JSON form of a patcher's state.
STATE_VERSION: Final = 1

#: Token ids that are not space-like: ASCII letters and digits and UTF-8 continuation bytes.
_SPACE_LIKE = tuple(
    token < BYTE_OFFSET or not (bytes([token - BYTE_OFFSET]).isalnum() or 0x80 <= token - BYTE_OFFSET <= 0xBF)
    for token in range(VOCABULARY_SIZE)
)


_FLOAT16 = struct.Struct("e")


@dataclass(slots=True)
class _State:
    """What the decision on the next token rests on."""

    tokens: int = 0
    """Tokens pushed since the document began."""

    length: int = 0
    """Tokens in the open patch."""

    entropy: float = 0.0
    """Nats after the newest token, rounded to float16."""

    space_like: bool = True
    """Whether the newest token is space-like."""


class IncrementalPatcher:
    """Decides after each token of a framed document whether the next one starts a patch.

    Push the tokens in order, BOS first. The answers equal the boundaries of `patch_document` on the same entropies,
    and what has been answered never changes when more tokens come. One object patches one document at a time.
    """

    def __init__(self, scheme: PatchScheme) -> None:
        """Begin a document under a scheme.

        Raises:
            InputError: under this scheme, what comes later may change the patches of what came before.
        """
        if not scheme.incremental or isinstance(scheme, FlagScheme):
            raise InputError(
                f"scheme {scheme.name} is not incremental: bytes to come may change the patches of those before, so it "
                "patches whole documents only; generate with a model trained on another scheme"
            )
        self.scheme = scheme
        self._limit = scheme.length_limit
        self._state = _State()

    def reset(self) -> None:
        """Begin a new document."""
        self._state = _State()

    def push(self, token_id: int, entropy: float = math.nan) -> bool:
        """Take the next token of the document.

        Args:
            token_id: 0 to 259; the first is BOS.
            entropy: nats of the next-token distribution after this token, rounded here to float16. Entropy schemes
                need it at every token; others ignore it.

        Returns:
            Whether the token after this one starts a patch. After EOS the answer has no meaning.

        Raises:
            InputError: the token is outside the vocabulary, or an entropy is needed and is not finite as a float16.
        """
        if not 0 <= token_id < VOCABULARY_SIZE:
            raise InputError(f"token id {token_id} is outside the vocabulary; it must be 0 to {VOCABULARY_SIZE - 1}")
        state = self._state
        before = state.entropy
        if self.scheme.needs_entropies:
            state.entropy = _round_to_float16(entropy, self.scheme.name)
        after_text = not state.space_like
        state.space_like = _SPACE_LIKE[token_id]
        # `next_token` is the index of the token that is being decided on.
        next_token = state.tokens = state.tokens + 1
        state.length += 1
        starts = next_token == 1 or self._fires(next_token, before, after_text) or state.length >= self._limit
        if starts:
            state.length = 0
        return starts

    def _fires(self, next_token: int, before: float, after_text: bool) -> bool:
        """Apply the scheme to token `next_token` ≥ 2.

        Args:
            next_token: the index of the token being decided on.
            before: the entropy before the newest one.
            after_text: whether the token before the newest is not space-like.
        """
        state = self._state
        match self.scheme:
            case EntropyScheme(threshold=threshold):
                return state.entropy > threshold
            case EntropyMonotonicScheme(relative_threshold=relative):
                return next_token == 2 or state.entropy - before > relative
            case EntropyCombinedScheme(threshold=threshold, relative_threshold=relative):
                return next_token == 2 or (state.entropy > threshold and state.entropy - before > relative)
            case SpaceScheme():
                return state.space_like and after_text
            case StaticScheme(patch_length=length):
                return (next_token - 1) % length == 0
            case _:
                return True

    def state(self) -> dict[str, Any]:
        """Return the state, the scheme in it, as a small JSON object; `restore` continues from it, in any process."""
        return {"version": STATE_VERSION, "scheme": scheme_to_json(self.scheme), **asdict(self._state)}

    def restore(self, state: Mapping[str, object]) -> None:
        """Continue from a state that a patcher of the same scheme returned.

        Args:
            state: what `state()` gave.

        Raises:
            InputError: it is of another scheme or version, keys are missing or unknown, or a value is impossible.
        """
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise InputError(
                f"patcher state has version {found!r}, but this blt-patcher reads version {STATE_VERSION}; install the "
                "release that wrote it"
            )
        if state.get("scheme") != scheme_to_json(self.scheme):
            raise InputError(
                f"patcher state is of scheme {state.get('scheme')!r}, not of {scheme_to_json(self.scheme)!r}; restore "
                "it in a patcher of its own scheme"
            )
        values = {key: value for key, value in state.items() if key not in ("version", "scheme")}
        kinds = {field.name: type(getattr(_State(), field.name)) for field in fields(_State)}
        if set(values) != set(kinds) or any(type(values[key]) is not kind for key, kind in kinds.items()):
            raise InputError(f"patcher state {values!r} is not one; it must have exactly {', '.join(kinds)}")
        restored = _State(**values)  # type: ignore[arg-type]  # types checked just above
        if not (0 <= restored.length <= min(self._limit, restored.tokens) and math.isfinite(restored.entropy)):
            raise InputError(f"patcher state {values!r} is not one; no patcher gets into it")
        self._state = restored

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> IncrementalPatcher:
        """Return a patcher that continues from a state, under the scheme that the state names.

        Raises:
            InputError: as `restore` and `schemes.scheme_from_json`.
        """
        scheme = state.get("scheme") if isinstance(state, Mapping) else None
        if not isinstance(scheme, Mapping):
            raise InputError("patcher state names no scheme; it must be what IncrementalPatcher.state() gave")
        patcher = cls(scheme_from_json(scheme))
        patcher.restore(state)
        return patcher


def _round_to_float16(entropy: float, scheme: str) -> float:
    """Return an entropy as stored shards would hold it."""
    try:
        # Rounds as NumPy does, in a fraction of the time.
        (rounded,) = _FLOAT16.unpack(_FLOAT16.pack(entropy))
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded):
        raise InputError(f"scheme {scheme} needs a finite entropy with every token, not {entropy!r}")
    return float(rounded)
