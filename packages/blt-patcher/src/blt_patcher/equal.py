"""The compiled loop of patches that are all equally long, which read neither bytes nor entropies."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blt_patcher.compiling import compiled


@compiled
def _fill_equal(out: npt.NDArray[np.uint16], filled: int, length: int, count: int) -> int:
    """Append one length several times, if there is anything to append to; return how many lengths there are now."""
    if out.size:
        out[filled : filled + count] = np.uint16(length)
    return filled + count


@compiled
def patch_equally(
    token_offsets: npt.NDArray[np.int64],
    length: int,
    limit: int,
    begin: int,
    end: int,
    out: npt.NDArray[np.uint16],
    counts: npt.NDArray[np.int64],
) -> int:
    """Cut the documents begin to end, each by itself, into BOS alone and patches of a fixed length.

    Args:
        token_offsets: int64 [D + 1] where each document's tokens begin.
        length: tokens of a patch, at least 1; the last one may have fewer.
        limit: the longest patch, in tokens, up to 65,535; a longer one is split into as long ones as may be.
        begin: first document.
        end: one past the last document.
        out: uint16, their lengths are written end to end; empty to count alone.
        counts: int64 [D] the number of patches of each document, written.

    Returns:
        The first document not patched: `end`, or one that might pass the end of `out`, which takes a place per token.
    """
    filled = 0
    for d in range(begin, end):
        tokens = token_offsets[d + 1] - token_offsets[d]
        before = filled
        if out.size and filled + tokens > out.size:
            return d
        if tokens:
            filled = _fill_equal(out, filled, 1, 1)
            tokens -= 1
        if length <= limit:
            filled = _fill_equal(out, filled, length, tokens // length)
            tokens %= length
        while tokens:
            patch = min(length, tokens)
            tokens -= patch
            filled = _fill_equal(out, filled, limit, patch // limit)
            if patch % limit:
                filled = _fill_equal(out, filled, patch % limit, 1)
        counts[d] = filled - before
    return end
