"""What was left out, and why: counts of documents or files and of their bytes, by reason."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Self

from blt_data.errors import InputError


class OnError(StrEnum):
    """What becomes of a bad row or a damaged file."""

    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipCount:
    """How much was left out for one reason."""

    count: int
    """Documents, rows or files, as the reason says."""
    bytes: int
    """Their size as it was in the source, as far as it is known."""


class Skips(Mapping[str, SkipCount]):
    """Reason to how much was left out for it, in the order of the reasons."""

    def __init__(self, counts: Mapping[str, SkipCount] | None = None) -> None:
        self._counts = dict(counts or {})
        self._lock = threading.Lock()

    def __getitem__(self, reason: str) -> SkipCount:
        return self._counts[reason]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._counts))

    def __len__(self) -> int:
        return len(self._counts)

    def __repr__(self) -> str:
        return f"Skips({self.to_json()})"

    def __reduce__(self) -> tuple[object, ...]:
        # A lock is not pickled.
        return type(self), (self._counts,)

    def add(self, reason: str, *, count: int = 1, bytes: int) -> None:
        """Count what was left out.

        Args:
            reason: why, in a few words that do not name the file or the row.
            count: documents, rows or files.
            bytes: their size in the source.
        """
        with self._lock:
            before = self._counts.get(reason, SkipCount(count=0, bytes=0))
            self._counts[reason] = SkipCount(count=before.count + count, bytes=before.bytes + bytes)

    def merge(self, other: Mapping[str, SkipCount]) -> None:
        """Add all counts of another."""
        for reason, skipped in other.items():
            self.add(reason, count=skipped.count, bytes=skipped.bytes)

    def clear(self) -> None:
        """Forget all counts."""
        with self._lock:
            self._counts.clear()

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return {reason: {"count": n, "bytes": m}}, reasons in order."""
        return {reason: asdict(skipped) for reason, skipped in self.items()}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the counts that `to_json` gave.

        Raises:
            ValueError: the object has another shape, or a number is negative or beyond 63 bits.
        """
        if not isinstance(data, dict):
            raise ValueError("its skipped must be an object")
        counts = {}
        for reason, item in data.items():
            if not isinstance(item, dict) or set(item) != {"count", "bytes"} or not all(map(_is_count, item.values())):
                raise ValueError("its skipped must be counts")
            counts[reason] = SkipCount(count=item["count"], bytes=item["bytes"])
        return cls(counts)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


class ErrorPolicy:
    """Decides what becomes of bad input: the run ends, or the input is left out and counted.

    Args:
        on_error: which of the two.
        skips: where what is left out is counted.
    """

    def __init__(self, on_error: OnError = OnError.FAIL, skips: Skips | None = None) -> None:
        self.on_error = on_error
        self.skips = Skips() if skips is None else skips

    def bad(self, error: InputError, reason: str, bytes: int) -> None:
        """Take note of bad input.

        Args:
            error: the sentence that names file, row and mend.
            reason: what is counted, without file and row.
            bytes: the size of what is left out.

        Raises:
            InputError: the given one, if errors end the run.
        """
        if self.on_error is OnError.FAIL:
            raise error
        self.skips.add(reason, bytes=bytes)
