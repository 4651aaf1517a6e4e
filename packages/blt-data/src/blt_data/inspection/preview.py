"""Bytes as text that can be shown: the beginning of a document, and what is no text escaped."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def beginning(content: npt.NDArray[np.uint8], size: int) -> bytes:
    """Return at most `size` bytes without cutting a UTF-8 character, which has at most three continuation bytes.

    Args:
        content: uint8 [N].
        size: at least 1.
    """
    for end in range(size, max(0, size - 4), -1):
        if len(content) <= end or content[end] & 0xC0 != 0x80:
            return content[:end].tobytes()
    return content[:size].tobytes()


def escape_bytes(data: bytes) -> str:
    r"""Return bytes as one line of printable text: the rest becomes \n, \x00 and the like.

    A character cut off at either end counts as bytes that are no text.

    Args:
        data: any bytes.
    """
    pieces = []
    for character in data.decode("utf-8", errors="surrogateescape"):
        if character.isprintable():
            pieces.append(character)
        elif 0xDC80 <= ord(character) <= 0xDCFF:
            pieces.append(f"\\x{ord(character) - 0xDC00:02x}")
        else:
            pieces.append(character.encode("unicode_escape").decode())
    return "".join(pieces)
