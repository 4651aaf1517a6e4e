"""Patch lengths of whole documents: the batch form of every scheme.

Each document is patched by itself, whatever its neighbours; the result equals what `IncrementalPatcher` decides byte
by byte. The inner loops are in `kernels`.
"""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError
from blt_patcher import kernels
from blt_patcher.schemes import (
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
)

#: Below this many tokens a second thread costs more than it saves.
TOKENS_PER_THREAD: Final = 1 << 21

_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchedDocuments:
    """The patch lengths of D documents, end to end."""

    lengths: npt.NDArray[np.uint16]
    """uint16 [P] in framed tokens, each at least 1; the first patch of a document is BOS alone."""

    offsets: npt.NDArray[np.int64]
    """int64 [D + 1] document d's lengths are lengths[offsets[d]:offsets[d + 1]]; they sum to its bytes + 2."""

    def document(self, index: int) -> npt.NDArray[np.uint16]:
        """Return one document's patch lengths, a view."""
        return self.lengths[self.offsets[index] : self.offsets[index + 1]]


def patch_documents(
    scheme: PatchScheme,
    content: npt.NDArray[np.uint8],
    content_offsets: npt.NDArray[np.int64],
    entropies: npt.NDArray[np.float16] | None = None,
    *,
    threads: int | None = None,
) -> PatchedDocuments:
    """Cut documents into patches.

    Args:
        scheme: the rule.
        content: uint8 [N] the documents' bytes, end to end.
        content_offsets: int64 [D + 1] document d is content[content_offsets[d]:content_offsets[d + 1]].
        entropies: float16 [N + 2D] nats after each framed token, document by document, N counting the bytes between
            the first and last offset. Needed by the entropy schemes, ignored by the others.
        threads: how many threads to use; None takes `default_threads()`, and fewer where there is little to do.

    Returns:
        The patch lengths.

    Raises:
        InputError: the arrays do not fit each other, the scheme needs entropies that are not given, or an entropy is
            not finite.
    """
    pieces, counts = _patch_ranges(scheme, content, content_offsets, entropies, threads)
    offsets = np.zeros(counts.size + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return PatchedDocuments(lengths=pieces[0] if len(pieces) == 1 else np.concatenate(pieces), offsets=offsets)


def count_patches(
    scheme: PatchScheme,
    content: npt.NDArray[np.uint8],
    content_offsets: npt.NDArray[np.int64],
    entropies: npt.NDArray[np.float16] | None = None,
    *,
    threads: int | None = None,
) -> int:
    """Return how many patches `patch_documents` would make of all documents together; same arguments and errors."""
    _, counts = _patch_ranges(scheme, content, content_offsets, entropies, threads)
    return int(counts.sum())


def patch_document(
    scheme: PatchScheme,
    content: bytes | npt.NDArray[np.uint8],
    entropies: npt.NDArray[np.float16] | None = None,
) -> npt.NDArray[np.uint16]:
    """Cut one document into patches.

    Args:
        scheme: the rule.
        content: the document's N bytes.
        entropies: float16 [N + 2] nats after each framed token, where the scheme needs them.

    Returns:
        uint16 [P] patch lengths, summing to N + 2.

    Raises:
        InputError: as `patch_documents`.
    """
    data = content if isinstance(content, np.ndarray) else np.frombuffer(content, dtype=np.uint8)
    offsets = np.array([0, data.size], dtype=np.int64)
    return patch_documents(scheme, data, offsets, entropies, threads=1).lengths


def default_threads() -> int:
    """Return the threads to use unless told: OMP_NUM_THREADS if set, else the processors this process may use.

    Data-loader workers and torchrun set OMP_NUM_THREADS to 1, so they do not fight over processors.
    """
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0:
        return int(named)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _patch_ranges(
    scheme: PatchScheme,
    content: npt.NDArray[np.uint8],
    content_offsets: npt.NDArray[np.int64],
    entropies: npt.NDArray[np.float16] | None,
    threads: int | None,
) -> tuple[list[npt.NDArray[np.uint16]], npt.NDArray[np.int64]]:
    """Run the kernel, on a few threads where that pays; return the lengths piece by piece, and counts per document."""
    tokens = _check_layout(content, content_offsets)
    bits = np.empty(0, dtype=np.uint16)
    if scheme.needs_entropies:
        bits = _entropy_bits(scheme, tokens, entropies)
    rule, p, q = _kernel_arguments(scheme)
    counts = np.empty(content_offsets.size - 1, dtype=np.int64)

    def run(bounds: tuple[int, int]) -> npt.NDArray[np.uint16]:
        begin, end = bounds
        # One place per token is room for any patching; memory that no length reaches is never touched.
        room = np.empty(int(content_offsets[end] - content_offsets[begin]) + 2 * (end - begin), dtype=np.uint16)
        broken = kernels.patch_range(
            rule, content, content_offsets, bits, p, q, scheme.length_limit, begin, end, room, counts
        )
        if broken >= 0:
            raise InputError(
                f"document {broken} has an entropy that is not a finite number; score it again with a sound model"
            )
        return room[: int(counts[begin:end].sum())]

    ranges = _split_documents(content_offsets, tokens, threads)
    if len(ranges) == 1:
        return [run(ranges[0])], counts
    with ThreadPoolExecutor(len(ranges), thread_name_prefix="blt-patch") as pool:
        return list(pool.map(run, ranges)), counts


def _check_layout(content: npt.NDArray[np.uint8], content_offsets: npt.NDArray[np.int64]) -> int:
    """Check content and offsets against each other; return the number of framed tokens."""
    if content.dtype != np.uint8 or content.ndim != 1:
        raise InputError(f"content must be a uint8 vector, not {content.dtype} of shape {content.shape}")
    if content_offsets.dtype != np.int64 or content_offsets.ndim != 1 or content_offsets.size == 0:
        raise InputError(
            f"content_offsets must be an int64 vector of documents + 1 values, not {content_offsets.dtype} of shape "
            f"{content_offsets.shape}"
        )
    first, last = int(content_offsets[0]), int(content_offsets[-1])
    if first < 0 or last > content.size or bool(np.any(content_offsets[1:] < content_offsets[:-1])):
        raise InputError(f"content_offsets must rise from 0 or more to at most the {content.size} bytes of content")
    return last - first + 2 * (content_offsets.size - 1)


def _entropy_bits(
    scheme: PatchScheme, tokens: int, entropies: npt.NDArray[np.float16] | None
) -> npt.NDArray[np.uint16]:
    """Check the entropies; return their bit patterns."""
    if entropies is None:
        raise InputError(f"scheme {scheme.name} needs entropies; score the documents with an entropy model first")
    if entropies.dtype != np.float16 or entropies.shape != (tokens,):
        raise InputError(
            f"entropies must be a float16 vector of one value for each of the {tokens} framed tokens, not "
            f"{entropies.dtype} of shape {entropies.shape}"
        )
    return entropies.view(np.uint16)


def _split_documents(content_offsets: npt.NDArray[np.int64], tokens: int, threads: int | None) -> list[tuple[int, int]]:
    """Cut the documents into runs of about equally many tokens, one for each thread worth starting."""
    documents = content_offsets.size - 1
    wanted = default_threads() if threads is None else threads
    if wanted < 1:
        raise InputError(f"threads is {wanted}; it must be at least 1")
    parts = max(1, min(wanted, tokens // TOKENS_PER_THREAD, documents))
    token_offsets = content_offsets - content_offsets[0] + 2 * np.arange(documents + 1, dtype=np.int64)
    cuts = np.searchsorted(token_offsets, np.arange(1, parts) * (tokens / parts))
    edges = [0, *(int(cut) for cut in cuts), documents]
    return list(itertools.pairwise(edges))


def _kernel_arguments(scheme: PatchScheme) -> tuple[int, int, int]:
    """Return the rule's number and its two parameters, as `kernels.patch_range` takes them."""
    match scheme:
        case EntropyScheme():
            return kernels.RULE_ENTROPY, order_key_at_most(scheme.threshold), 0
        case EntropyMonotonicScheme():
            return kernels.RULE_MONOTONIC, _INT64_MIN, _fixed_point_at_most(scheme.relative_threshold)
        case EntropyCombinedScheme():
            threshold = _fixed_point_at_most(scheme.threshold)
            return kernels.RULE_COMBINED, threshold, _fixed_point_at_most(scheme.relative_threshold)
        case SpaceScheme():
            return kernels.RULE_SPACE, 0, 0
        case StaticScheme():
            return kernels.RULE_STATIC, min(scheme.patch_length, _INT64_MAX), 0
        case ByteScheme():
            return kernels.RULE_BYTE, 0, 0


def order_key(values: npt.NDArray[np.float16]) -> npt.NDArray[np.int16]:
    """Return integers that sort like float16 numbers, with -0 just below +0.

    Args:
        values: float16 of any shape, no NaN.

    Returns:
        int16 of the same shape.
    """
    signed = values.view(np.int16)
    return signed ^ ((signed >> 15) & np.int16(0x7FFF))


@lru_cache(maxsize=1)
def finite_float16() -> npt.NDArray[np.float16]:
    """Return every finite float16 in rising order, zero once: float16 [63487], read-only."""
    magnitudes = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    values = np.concatenate([-magnitudes[:0:-1], magnitudes])
    values.flags.writeable = False
    return values


@lru_cache(maxsize=256)
def order_key_at_most(threshold: float) -> int:
    """Return the key of the largest float16 not above a threshold, so that key(H) > it exactly if H > threshold.

    A threshold below every finite float16 gives the least int16, which no finite number's key reaches.
    """
    values = finite_float16()
    index = int(np.searchsorted(values.astype(np.float64), threshold, side="right")) - 1
    return -(2**15) if index < 0 else int(order_key(values[index : index + 1])[0])


def _fixed_point_at_most(threshold: float) -> int:
    """Return floor(threshold · 2²⁴) as an int64: scaling by a power of two is exact, and the clamp is out of reach."""
    scaled = threshold * 2.0**kernels.FIXED_POINT_BITS
    if scaled >= _INT64_MAX:
        return _INT64_MAX
    return _INT64_MIN if scaled <= _INT64_MIN else math.floor(scaled)
