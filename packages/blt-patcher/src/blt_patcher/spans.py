"""Framed tokens of a span of documents laid end to end, as entropy models read them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blt_patcher.compiling import compiled

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


@compiled
def frame_span(
    content: U8,
    content_offsets: I64,
    token_offsets: I64,
    document: int,
    low: int,
    tokens: I64,
    bos: int,
    eos: int,
    byte_offset: int,
) -> None:
    """Write the framed tokens low to low + T of documents laid end to end.

    Args:
        content: uint8 [N] all documents' bytes.
        content_offsets: int64 [D + 1] where each document's bytes begin in `content`.
        token_offsets: int64 [D + 1] where each document's framed tokens begin, from 0.
        document: the document that holds token `low`.
        low: first token to write.
        tokens: int64 [T] token ids, written.
        bos: id of BOS.
        eos: id of EOS.
        byte_offset: what is added to a byte.
    """
    done = 0
    while done < tokens.size:
        start, end = token_offsets[document], token_offsets[document + 1]
        here = low + done
        if here == start:
            tokens[done] = bos
            done += 1
            here += 1
        count = min(tokens.size - done, end - 1 - here)
        if count > 0:
            source = content_offsets[document] + here - start - 1
            piece = content[source : source + count]
            target = tokens[done : done + count]
            for i in range(piece.size):
                target[i] = piece[i] + byte_offset
            done += count
        if done < tokens.size:
            tokens[done] = eos
            done += 1
        document += 1
