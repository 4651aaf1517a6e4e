"""Framed documents: the token ids that every package shares.

A document of N bytes becomes N + 2 token ids: BOS, the bytes, EOS. The ids are those of the released Byte Latent
Transformer checkpoints: 0 BOE (also padding), 1 BOS, 2 EOS, 3 reserved, and byte b is b + 4.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError

BOE_ID: Final = 0
BOS_ID: Final = 1
EOS_ID: Final = 2
RESERVED_ID: Final = 3
BYTE_OFFSET: Final = 4
VOCABULARY_SIZE: Final = 260

#: Tokens that framing adds to a document: BOS and EOS.
FRAME_TOKENS: Final = 2


def frame(content: bytes | bytearray | memoryview | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Return the token ids of a document.

    Args:
        content: the document's N raw bytes.

    Returns:
        uint16 [N + 2]: BOS, byte + 4 for each byte, EOS.
    """
    data = content if isinstance(content, np.ndarray) else np.frombuffer(content, dtype=np.uint8)
    tokens = np.empty(data.size + FRAME_TOKENS, dtype=np.uint16)
    tokens[0] = BOS_ID
    np.add(data, BYTE_OFFSET, out=tokens[1:-1], dtype=np.uint16, casting="unsafe")
    tokens[-1] = EOS_ID
    return tokens


def unframe(tokens: npt.NDArray[np.integer]) -> bytes:
    """Return the bytes among token ids; the special tokens (ids below 4) are left out.

    Args:
        tokens: integer [T] token ids.

    Returns:
        The bytes in order.

    Raises:
        InputError: an id is outside the vocabulary of 260.
    """
    ids = np.asarray(tokens)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= VOCABULARY_SIZE):
        raise InputError(f"token ids must be 0 to {VOCABULARY_SIZE - 1}, found {int(ids.min())} to {int(ids.max())}")
    return (ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()
