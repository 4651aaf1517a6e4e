"""Patch lengths of whole documents: the batch form of every scheme.

Each document is patched by itself, whatever its neighbours; the result equals what `IncrementalPatcher` decides byte
by byte. The inner loops are in `kernels`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError
from blt_patcher import kernels
from blt_patcher.arrays import ArrayLike, as_array
from blt_patcher.equal import patch_equally
from blt_patcher.rules import (
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    FlagScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
)
from blt_patcher.thresholds import comparison
from blt_patcher.windows import framed_offsets

#: Below this many tokens a second thread costs more than it saves.
TOKENS_PER_THREAD: Final = 1 << 21

#: Tokens that are patched to see how much room the lengths of many more will take.
PROBE_TOKENS: Final = 1 << 16

_INT64_MAX: Final = 2**63 - 1

_NO_BITS: Final = np.empty(0, dtype=np.uint16)
_NO_DATA: Final = np.empty(0, dtype=np.uint8)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sequences:
    """What the kernels read: D token sequences end to end, checked."""

    token_offsets: npt.NDArray[np.int64]
    """int64 [D + 1] where each sequence's tokens begin, from 0 to T."""

    bits: npt.NDArray[Any]
    """uint16 or uint32 [T] patterns of the entropies, where the scheme reads them itself."""

    data: npt.NDArray[np.uint8]
    """uint8: the bytes, or a flag for each token."""

    data_offsets: npt.NDArray[np.int64]
    """int64 [D + 1] where each sequence begins in `data`."""


def patch_documents(
    scheme: PatchScheme,
    content: ArrayLike,
    content_offsets: ArrayLike,
    entropies: ArrayLike | None = None,
    *,
    threads: int | None = None,
) -> PatchedDocuments:
    """Cut documents into patches.

    Args:
        scheme: the rule.
        content: uint8 [N] the documents' bytes, end to end. Like the other arrays a NumPy array or anything that
            lends its memory by DLPack, such as a torch tensor on the CPU; nothing is copied.
        content_offsets: int64 [D + 1] document d is content[content_offsets[d]:content_offsets[d + 1]].
        entropies: float16 or float32 [N + 2D] nats after each framed token, document by document, N counting the bytes
            between the first and last offset. Decisions are taken on the values rounded to float16. Needed by the
            entropy schemes, ignored by those that need none.
        threads: how many threads to use; None takes `default_threads()`, and fewer where there is little to do.

    Returns:
        The patch lengths.

    Raises:
        InputError: the arrays do not fit each other, the scheme needs entropies that are not given, an entropy is not
            finite as float16, or a user's scheme gives no boundaries.
    """
    return _patched(scheme, _documents(scheme, content, content_offsets, entropies), threads)


def patch_lengths(
    entropies: ArrayLike, offsets: ArrayLike, scheme: PatchScheme, *, threads: int | None = None
) -> PatchedDocuments:
    """Cut sequences of scored tokens into patches, by a scheme that reads no bytes.

    The tokens need no EOS, so that rows of `[BOS, bytes…]`, as models take them, can be patched as they are.

    Args:
        entropies: float16 or float32 [T] nats after each token, sequence by sequence.
        offsets: int64 [D + 1] sequence d is entropies[offsets[d]:offsets[d + 1]]; one of no tokens has no patches.
        scheme: an entropy scheme, `static` or `byte`.
        threads: how many threads to use; None takes `default_threads()`, and fewer where there is little to do.

    Returns:
        The patch lengths; those of a sequence sum to its number of tokens.

    Raises:
        InputError: the arrays do not fit each other, an entropy is not finite as float16, or the scheme reads bytes.
    """
    if isinstance(scheme, (SpaceScheme, FlagScheme)):
        raise InputError(f"scheme {scheme.name} reads bytes; patch with patch_documents")
    nats, bounds = as_array(entropies, "entropies"), as_array(offsets, "offsets")
    _check_offsets("offsets", bounds, nats.size)
    nats = nats[bounds[0] : bounds[-1]]
    token_offsets = bounds - bounds[0]
    return _patched(scheme, _scored(scheme, token_offsets, nats), threads)


def count_patches(
    scheme: PatchScheme,
    content: ArrayLike,
    content_offsets: ArrayLike,
    entropies: ArrayLike | None = None,
    *,
    threads: int | None = None,
) -> int:
    """Return how many patches `patch_documents` would make of all documents together; same arguments and errors."""
    _, counts = _run(scheme, _documents(scheme, content, content_offsets, entropies), threads, write=False)
    return int(counts.sum())


def patch_document(
    scheme: PatchScheme,
    content: bytes | ArrayLike,
    entropies: ArrayLike | None = None,
) -> npt.NDArray[np.uint16]:
    """Cut one document into patches.

    Args:
        scheme: the rule.
        content: the document's N bytes.
        entropies: float16 or float32 [N + 2] nats after each framed token, where the scheme needs them.

    Returns:
        uint16 [P] patch lengths, summing to N + 2.

    Raises:
        InputError: as `patch_documents`.
    """
    data = np.frombuffer(content, dtype=np.uint8) if isinstance(content, bytes) else as_array(content, "content")
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


def _patched(scheme: PatchScheme, sequences: _Sequences, threads: int | None) -> PatchedDocuments:
    """Patch sequences and lay the results end to end."""
    pieces, counts = _run(scheme, sequences, threads, write=True)
    offsets = np.zeros(counts.size + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return PatchedDocuments(lengths=_joined(pieces), offsets=offsets)


def _joined(pieces: Sequence[npt.NDArray[np.uint16]]) -> npt.NDArray[np.uint16]:
    """Return arrays end to end, without a copy where there is one."""
    return pieces[0] if len(pieces) == 1 else np.concatenate([_NO_BITS, *pieces])


def _run(
    scheme: PatchScheme, sequences: _Sequences, threads: int | None, *, write: bool
) -> tuple[Sequence[npt.NDArray[np.uint16]], npt.NDArray[np.int64]]:
    """Run the kernel, on a few threads where that pays; return the lengths piece by piece, and counts per document."""
    offsets = sequences.token_offsets
    counts = np.zeros(offsets.size - 1, dtype=np.int64)
    kernel, limit = _kernel(scheme, sequences), scheme.length_limit

    def run(bounds: tuple[int, int]) -> list[npt.NDArray[np.uint16]]:
        begin, end = bounds
        pieces = []
        while begin < end:
            room = np.empty(_room(kernel, offsets, begin, end, counts, limit) if write else 0, dtype=np.uint16)
            stopped = kernel(limit, begin, end, room, counts)
            if stopped < end and counts[stopped] < 0:
                raise InputError(
                    f"document {stopped} has an entropy that is not a finite number; score it again with a sound model"
                )
            pieces.append(room[: int(counts[begin:stopped].sum())] if write else room)
            begin = stopped
        return pieces

    ranges = _split_documents(offsets, threads)
    if len(ranges) == 1:
        return run(ranges[0]), counts
    with ThreadPoolExecutor(len(ranges), thread_name_prefix="blt-patch") as pool:
        return [piece for pieces in pool.map(run, ranges) for piece in pieces], counts


def _room(
    kernel: Callable[..., int],
    offsets: npt.NDArray[np.int64],
    begin: int,
    end: int,
    counts: npt.NDArray[np.int64],
    limit: int,
) -> int:
    """Return how many lengths to make room for.

    One per token is enough for any patching, but much memory that is new to the process takes time. So where there is
    much to do, the first documents tell how much to expect; the kernel stops where that is too little.
    """
    tokens = int(offsets[end] - offsets[begin])
    most = tokens + kernels.SLACK
    probe = int(np.searchsorted(offsets, offsets[begin] + PROBE_TOKENS))
    if tokens < 16 * PROBE_TOKENS or not begin < probe < end:
        return most
    if kernel(limit, begin, probe, np.empty(0, dtype=np.uint16), counts) < probe:
        return most
    found = int(counts[begin:probe].sum()) / int(offsets[probe] - offsets[begin])
    return min(most, int(1.05 * found * tokens) + int(np.diff(offsets[begin : end + 1]).max()) + kernels.SLACK)


def _documents(
    scheme: PatchScheme, content: ArrayLike, content_offsets: ArrayLike, entropies: ArrayLike | None
) -> _Sequences:
    """Check content, offsets and entropies against each other; return what the kernels read."""
    data, bounds = as_array(content, "content"), as_array(content_offsets, "content_offsets")
    if data.dtype != np.uint8 or data.ndim != 1:
        raise InputError(f"content must be a uint8 vector, not {data.dtype} of shape {data.shape}")
    _check_offsets("content_offsets", bounds, data.size)
    token_offsets = framed_offsets(bounds)
    nats = None
    if scheme.needs_entropies:
        if entropies is None:
            raise InputError(f"scheme {scheme.name} needs entropies; score the documents with an entropy model first")
        nats = as_array(entropies, "entropies")
    if isinstance(scheme, FlagScheme):
        if nats is not None:
            _check_entropies(nats, int(token_offsets[-1]))
            nats = nats.astype(np.float16, copy=False)
        flags = scheme.flags(data, bounds, nats)
        return _Sequences(
            token_offsets=token_offsets, bits=_NO_BITS, data=flags.view(np.uint8), data_offsets=token_offsets
        )
    if isinstance(scheme, SpaceScheme):
        return _Sequences(token_offsets=token_offsets, bits=_NO_BITS, data=data, data_offsets=bounds)
    return _scored(scheme, token_offsets, nats)


def _scored(
    scheme: PatchScheme, token_offsets: npt.NDArray[np.int64], entropies: npt.NDArray[Any] | None
) -> _Sequences:
    """Return what the kernels read of sequences whose bytes do not matter."""
    bits = _NO_BITS
    if scheme.needs_entropies and entropies is not None:
        _check_entropies(entropies, int(token_offsets[-1]))
        bits = np.ascontiguousarray(entropies).view(np.uint16 if entropies.dtype == np.float16 else np.uint32)
    return _Sequences(token_offsets=token_offsets, bits=bits, data=_NO_DATA, data_offsets=token_offsets)


def _check_offsets(name: str, offsets: npt.NDArray[Any], size: int) -> None:
    """Refuse offsets that are none, or that pass the end of what they point into."""
    if offsets.dtype != np.int64 or offsets.ndim != 1 or offsets.size == 0:
        raise InputError(
            f"{name} must be an int64 vector of documents + 1 values, not {offsets.dtype} of shape {offsets.shape}"
        )
    if int(offsets[0]) < 0 or int(offsets[-1]) > size or bool(np.any(offsets[1:] < offsets[:-1])):
        what = "bytes of content" if name == "content_offsets" else "entropies"
        raise InputError(f"{name} must rise from 0 or more to at most the {size} {what}")


def _check_entropies(entropies: npt.NDArray[Any], tokens: int) -> None:
    """Refuse entropies of another type or number."""
    if entropies.dtype not in (np.float16, np.float32) or entropies.shape != (tokens,):
        raise InputError(
            f"entropies must be a float16 or float32 vector of one value for each of the {tokens} framed tokens, not "
            f"{entropies.dtype} of shape {entropies.shape}"
        )


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a view that cannot be written to, contiguous."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _for_kernels(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array that whole words can be read from."""
    if array.size < kernels.SLACK:
        array = np.concatenate([array, np.zeros(kernels.SLACK - array.size, dtype=array.dtype)])
    return _read_only(array)


def _split_documents(token_offsets: npt.NDArray[np.int64], threads: int | None) -> list[tuple[int, int]]:
    """Cut the documents into runs of about equally many tokens, one for each thread worth starting."""
    documents, tokens = token_offsets.size - 1, int(token_offsets[-1])
    wanted = default_threads() if threads is None else threads
    if wanted < 1:
        raise InputError(f"threads is {wanted}; it must be at least 1")
    parts = max(1, min(wanted, tokens // TOKENS_PER_THREAD, documents))
    cuts = np.searchsorted(token_offsets, np.arange(1, parts) * (tokens / parts))
    edges = [0, *(int(cut) for cut in cuts), documents]
    return list(itertools.pairwise(edges))


def _kernel(scheme: PatchScheme, sequences: _Sequences) -> Callable[..., int]:
    """Return what patches some of the sequences.

    Returns:
        A function of the longest patch, the first and one past the last sequence, room for lengths, and int64 [D] for
        their numbers by sequence; it returns the first sequence not patched, see `kernels.patch_range`.
    """
    # All read-only, or each mixture of kinds would be compiled for itself.
    offsets = _read_only(sequences.token_offsets)
    if isinstance(scheme, (StaticScheme, ByteScheme)):
        length = min(scheme.patch_length, _INT64_MAX) if isinstance(scheme, StaticScheme) else 1
        return partial(patch_equally, offsets, length)
    data, bits = _for_kernels(sequences.data), _for_kernels(sequences.bits)
    arrays = (data, _read_only(sequences.data_offsets), bits, offsets)
    match scheme:
        case EntropyScheme(threshold=threshold):
            rule, constants = kernels.RULE_ENTROPY, (*comparison(threshold, 8 * bits.itemsize), 0.0)
        case EntropyMonotonicScheme(relative_threshold=relative):
            rule, constants = kernels.RULE_MONOTONIC, (0, 0, float(relative))
        case EntropyCombinedScheme(threshold=threshold, relative_threshold=relative):
            rule, constants = kernels.RULE_COMBINED, (*comparison(threshold, 8 * bits.itemsize), float(relative))
        case SpaceScheme():
            rule, constants = kernels.RULE_SPACE, (0, 0, 0.0)
        case FlagScheme():
            rule, constants = kernels.RULE_FLAGS, (0, 0, 0.0)
        case _:
            raise InputError(f"{type(scheme).__name__} is no scheme to patch by; derive it from FlagScheme")
    return partial(kernels.patch_range, rule, *arrays, *constants)
