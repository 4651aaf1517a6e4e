"""The patch rules once more, in plain Python, written from the description alone: slow and obvious."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from blt_data.framing import frame
from blt_patcher import (
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
)


def space_like(token: int) -> bool:
    """No ASCII letter or digit, no UTF-8 continuation byte."""
    if token < 4:
        return True
    byte = token - 4
    return not (chr(byte) in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789" or 0x80 <= byte < 0xC0)


def fires(scheme: PatchScheme, tokens: Sequence[int], entropies: Sequence[float], j: int) -> bool:
    """Whether token j ≥ 2 starts a patch, before any splitting."""
    if isinstance(scheme, EntropyScheme):
        return entropies[j - 1] > scheme.threshold
    if isinstance(scheme, EntropyMonotonicScheme):
        return j == 2 or entropies[j - 1] - entropies[j - 2] > scheme.relative_threshold
    if isinstance(scheme, EntropyCombinedScheme):
        if j == 2:
            return True
        rise = entropies[j - 1] - entropies[j - 2]
        return entropies[j - 1] > scheme.threshold and rise > scheme.relative_threshold
    if isinstance(scheme, SpaceScheme):
        return space_like(tokens[j - 1]) and not space_like(tokens[j - 2])
    if isinstance(scheme, StaticScheme):
        return (j - 1) % scheme.patch_length == 0
    assert isinstance(scheme, ByteScheme)
    return True


def patch_plainly(scheme: PatchScheme, content: bytes, entropies: npt.NDArray[np.float16] | None = None) -> list[int]:
    """Patch lengths of one framed document."""
    tokens = [int(token) for token in frame(content)]
    nats = [0.0] * len(tokens) if entropies is None else [float(value) for value in entropies]
    starts = [0, 1] + [j for j in range(2, len(tokens)) if fires(scheme, tokens, nats, j)]
    ends = [*starts[1:], len(tokens)]
    limit = 65_535 if scheme.max_patch_length is None else scheme.max_patch_length
    lengths = []
    for start, end in zip(starts, ends, strict=True):
        rest = end - start
        while rest > limit:
            lengths.append(limit)
            rest -= limit
        lengths.append(rest)
    return lengths


# Thresholds that are float16 values, that lie between them, and that lie outside all of them.
nats = st.one_of(
    st.floats(-2.0, 6.0, width=16), st.floats(-2.0, 6.0), st.sampled_from([0.0, -0.0, 1e-9, -1e-9, 1e300, -1e300])
)
limits = st.one_of(st.none(), st.integers(1, 12))
schemes: st.SearchStrategy[PatchScheme] = st.one_of(
    st.builds(EntropyScheme, threshold=nats, max_patch_length=limits),
    st.builds(EntropyMonotonicScheme, relative_threshold=nats, max_patch_length=limits),
    st.builds(EntropyCombinedScheme, threshold=nats, relative_threshold=nats, max_patch_length=limits),
    st.builds(SpaceScheme, max_patch_length=limits),
    st.builds(StaticScheme, patch_length=st.integers(1, 9), max_patch_length=limits),
    st.builds(ByteScheme, max_patch_length=limits),
)
# Bytes at random, and bytes that look like text (spaces, digits, two-byte letters).
contents = st.one_of(st.binary(max_size=60), st.text("ab1 .\né", max_size=40).map(str.encode))
# Every finite float16: negative ones and subnormal ones are no entropies of a sound model, but the kernels are total.
finite_float16 = st.one_of(
    st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7C00 != 0x7C00),
    st.floats(0.0, 6.0, width=16).map(lambda value: int(np.float16(value).view(np.uint16))),
    st.sampled_from([0x0000, 0x8000, 0x0001, 0x8001, 0x3C00, 0x3C01]),
)


@st.composite
def scored_documents(draw: st.DrawFn) -> tuple[bytes, npt.NDArray[np.float16]]:
    """A document's bytes and an entropy after each framed token."""
    content = draw(contents)
    bits = draw(st.lists(finite_float16, min_size=len(content) + 2, max_size=len(content) + 2))
    return content, np.array(bits, dtype=np.uint16).view(np.float16)
