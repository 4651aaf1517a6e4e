"""Tokens per second of every patch scheme, against the same rules in plain vectorised torch.

    uv run python tools/bench/boundaries.py [--megatokens 32] [--repeats 7]

Both sides get the same documents and entropies, work on one thread, take turns within one run, and must give the same
lengths. The torch side is written straightforwardly: all tokens at once, comparisons, `nonzero`, `diff`. Beside them
stands a copy of the entropies in memory, as NumPy makes it. "Of copy" is the share of that copy's bytes per second,
read and written together, at which our side reads its input and writes its lengths. Our times include the memory for
the result, as those of torch do; "warm" is the kernel alone, into memory that is there. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt_patcher import (
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
    boundaries,
    describe_scheme,
    patch_documents,
)
from blt_patcher.kernels import SLACK

SCHEMES: tuple[PatchScheme, ...] = (
    EntropyScheme(threshold=2.0),
    EntropyScheme(threshold=2.0, max_patch_length=16),
    EntropyMonotonicScheme(relative_threshold=0.9),
    EntropyCombinedScheme(threshold=1.3, relative_threshold=0.5),
    SpaceScheme(),
    StaticScheme(patch_length=4),
    ByteScheme(),
)


@dataclass(frozen=True)
class Corpus:
    """Documents end to end, as both sides take them."""

    content: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    entropies: npt.NDArray[np.float16]

    @property
    def tokens(self) -> int:
        return int(self.entropies.size)


def make_corpus(tokens: int) -> Corpus:
    """English-like words in documents of 4 kB on average, with entropies spread like those of text."""
    rng = np.random.default_rng(0)
    documents = max(1, tokens // 4096)
    words = [b"the ", b"entropy ", b"of a ", b"patch, ", b"12 ", b"bytes. ", "größer ".encode()]
    text = b"".join(words[index] for index in rng.integers(0, len(words), 1 << 17))
    size = tokens - 2 * documents
    content = np.resize(np.frombuffer(text, np.uint8), size)
    cuts = np.sort(rng.integers(0, size + 1, documents - 1))
    offsets = np.concatenate([[0], cuts, [size]]).astype(np.int64)
    return Corpus(content, offsets, rng.exponential(1.4, tokens).astype(np.float16))


class TorchPatcher:
    """The schemes in plain torch over documents laid end to end."""

    def __init__(self, corpus: Corpus) -> None:
        self.content = torch.from_numpy(corpus.content)
        # float32 is the precision a model's entropies come in and the fastest to compare; not timed.
        self.entropies = torch.from_numpy(corpus.entropies).float()
        offsets = torch.from_numpy(corpus.offsets)
        self.starts = offsets[:-1] + 2 * torch.arange(len(offsets) - 1)
        self.tokens = corpus.tokens
        self.sizes = torch.diff(offsets) + 2
        framed = torch.full((self.tokens,), 32, dtype=torch.uint8)  # BOS and EOS are space-like, as a space is
        inside = torch.ones(self.tokens, dtype=torch.bool)
        inside[self.starts] = False
        inside[self.starts + self.sizes - 1] = False
        framed[inside] = self.content
        self.framed = framed

    def patch(self, scheme: PatchScheme) -> Tensor:
        """Return the patch lengths of all documents, int64 [P]."""
        fires = torch.empty(self.tokens, dtype=torch.bool)
        fires[2:] = self.fires(scheme)
        fires[self.starts] = True
        fires[self.starts + 1] = True
        if isinstance(scheme, (EntropyMonotonicScheme, EntropyCombinedScheme)):
            fires[(self.starts + 2)[self.sizes > 2]] = True
        lengths = torch.diff(fires.nonzero().flatten(), append=torch.tensor([self.tokens]))
        limit = scheme.length_limit
        if int(lengths.max()) <= limit:
            return lengths
        pieces = (lengths + limit - 1) // limit
        split = torch.repeat_interleave(lengths, pieces)
        last = pieces.cumsum(0) - 1
        out = torch.full_like(split, limit)
        out[last] = lengths - (pieces - 1) * limit
        return out

    def fires(self, scheme: PatchScheme) -> Tensor:
        """Return whether tokens 2 and on start a patch, whatever document they are in: bool [T - 2]."""
        if isinstance(scheme, EntropyScheme):
            return self.entropies[1:-1] > scheme.threshold
        if isinstance(scheme, EntropyMonotonicScheme):
            return torch.diff(self.entropies)[:-1] > scheme.relative_threshold
        if isinstance(scheme, EntropyCombinedScheme):
            rises = torch.diff(self.entropies)[:-1]
            return (self.entropies[1:-1] > scheme.threshold) & (rises > scheme.relative_threshold)
        if isinstance(scheme, SpaceScheme):
            b = self.framed
            lower = b | 0x20
            text = ((lower >= 97) & (lower <= 122)) | ((b >= 48) & (b <= 57)) | ((b & 0xC0) == 0x80)
            return ~text[1:-1] & text[:-2]
        if isinstance(scheme, StaticScheme):
            place = torch.arange(self.tokens) - torch.repeat_interleave(self.starts, self.sizes)
            return (place[2:] - 1) % scheme.patch_length == 0
        return torch.ones(self.tokens - 2, dtype=torch.bool)


def seconds(function: Callable[[], object]) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Speed:
    """Median tokens per second of both sides, and what a copy of two bytes a token makes of its own."""

    ours: float
    reference: float
    copy: float
    kernel: float
    bytes_per_token: float

    @property
    def ratio(self) -> float:
        return self.ours / self.reference

    @property
    def of_copy(self) -> float:
        """Share of the copy's bytes per second, read and written."""
        return self.ours * self.bytes_per_token / (self.copy * 4)


def bench(corpus: Corpus, scheme: PatchScheme, repeats: int) -> Speed:
    """Time both sides and a copy of the entropies by turns, after one call of each that is not counted."""
    source, target = corpus.entropies.view(np.uint16), np.zeros_like(corpus.entropies.view(np.uint16))
    reference = TorchPatcher(corpus)

    def ours() -> npt.NDArray[np.uint16]:
        return patch_documents(scheme, corpus.content, corpus.offsets, corpus.entropies, threads=1).lengths

    lengths = ours()
    if not np.array_equal(lengths, reference.patch(scheme).numpy()):
        raise AssertionError(f"the two sides differ for {describe_scheme(scheme)}")
    kernel = warm_kernel(corpus, scheme)
    sides: tuple[Callable[[], object], ...] = (
        ours,
        lambda: reference.patch(scheme),
        lambda: np.copyto(target, source),
        kernel,
    )
    times = [[seconds(side) for side in sides] for _ in range(repeats + 1)][1:]
    mine, theirs, copy, alone = (corpus.tokens / statistics.median(column) for column in zip(*times, strict=True))
    read = 2 if scheme.needs_entropies else int(isinstance(scheme, SpaceScheme))
    return Speed(mine, theirs, copy, alone, read + 2 * lengths.size / corpus.tokens)


def warm_kernel(corpus: Corpus, scheme: PatchScheme) -> Callable[[], object]:
    """Return a call of the kernel alone, into memory that has been written to."""
    sequences = boundaries._documents(scheme, corpus.content, corpus.offsets, corpus.entropies)
    kernel = boundaries._kernel(scheme, sequences)
    documents = corpus.offsets.size - 1
    room = np.ones(corpus.tokens + SLACK, dtype=np.uint16)
    counts = np.zeros(documents, dtype=np.int64)
    return lambda: kernel(scheme.length_limit, 0, documents, room, counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatokens", type=int, default=32, help="framed tokens, in millions of 2^20")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side; the median counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = make_corpus(arguments.megatokens << 20)
    print(
        f"{'scheme':<58}{'ours':>8}{'torch':>8}{'ratio':>8}{'of copy':>9}{'warm':>8}   (million tokens/s, one thread)"
    )
    figures = {}
    for scheme in SCHEMES:
        speed = figures[describe_scheme(scheme)] = bench(corpus, scheme, arguments.repeats)
        print(
            f"{describe_scheme(scheme):<58}{speed.ours / 1e6:>8.0f}{speed.reference / 1e6:>8.1f}{speed.ratio:>8.1f}"
            f"{speed.of_copy:>9.2f}{speed.kernel / 1e6:>8.0f}",
            flush=True,
        )
    main_scheme = next(iter(figures.values()))
    print(f"copy of the entropies: {main_scheme.copy / 1e6:.0f} million tokens/s; load {os.getloadavg()[0]:.1f}")
    line = {
        "bench": "boundaries",
        "ours": round(main_scheme.ours),
        "reference": round(main_scheme.reference),
        "ratio": round(main_scheme.ratio, 2),
        "unit": "tokens/s",
        "tokens": corpus.tokens,
        "of_copy": round(main_scheme.of_copy, 2),
        "schemes": {
            name: {
                "ours": round(speed.ours),
                "reference": round(speed.reference),
                "ratio": round(speed.ratio, 2),
                "copy": round(speed.copy),
                "of_copy": round(speed.of_copy, 2),
                "warm_kernel": round(speed.kernel),
            }
            for name, speed in figures.items()
        },
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
