"""Bytes to text as they come: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator


class CharacterStream:
    """Decodes UTF-8 bytes as they come; a character appears when its last byte is there.

    What can be no UTF-8 becomes the replacement character. A character that is cut off at the end of the text is not
    shown: the model did not get to finish it.
    """

    def __init__(self) -> None:
        """Begin a text."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """The characters that these bytes complete."""
        return self._decoder.decode(data)


def decode_stream(pieces: Iterable[bytes]) -> Iterator[str]:
    """Decode pieces of bytes to text.

    Args:
        pieces: bytes as they come.

    Yields:
        Non-empty pieces of whole characters.
    """
    stream = CharacterStream()
    for piece in pieces:
        if text := stream.push(piece):
            yield text


class StopStrings:
    """Watches one growing text for stop strings.

    Bytes that may be the beginning of a stop string are held back until it is clear that they are not.
    """

    def __init__(self, stops: tuple[bytes, ...]) -> None:
        """Begin a text.

        Args:
            stops: non-empty; may be none at all.
        """
        self._stops = stops
        self._longest = max(map(len, stops), default=0)

    def match(self, content: bytes | bytearray) -> bytes | None:
        """The stop string with which the text now ends, the longest of them, or None; ask after every byte."""
        found = [stop for stop in self._stops if content.endswith(stop)]
        return max(found, key=len) if found else None

    def released(self, content: bytes | bytearray) -> int:
        """How many bytes of the text, from its beginning, no stop string can take back any more."""
        tail = bytes(content[-self._longest + 1 :]) if self._longest > 1 else b""
        for begin in range(len(tail)):
            if any(stop.startswith(tail[begin:]) for stop in self._stops):
                return len(content) - len(tail) + begin
        return len(content)
