"""Tokens per second of every patch scheme, against the same rules in plain vectorised torch.

    uv run python tools/bench/boundaries.py [--megatokens 32] [--repeats 7]

Both sides get the same documents and entropies, work on one thread, take turns within one run, and must give the same
lengths. The torch side is written straightforwardly: all tokens at once, comparisons, `nonzero`, `diff`. Beside them
stands the speed of copying the kernels' input in memory, the bound of anything that reads it. The last line is JSON.
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
    describe_scheme,
    patch_documents,
)

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
        fires = torch.zeros(self.tokens, dtype=torch.bool)
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


def bench(corpus: Corpus, repeats: int) -> dict[str, dict[str, float]]:
    """Return the median tokens per second of both sides for every scheme, and of a copy of the entropies."""
    reference = TorchPatcher(corpus)
    source, target = corpus.entropies.view(np.uint16), np.empty_like(corpus.entropies.view(np.uint16))
    figures = {}
    for scheme in SCHEMES:

        def ours(scheme: PatchScheme = scheme) -> npt.NDArray[np.uint16]:
            return patch_documents(scheme, corpus.content, corpus.offsets, corpus.entropies, threads=1).lengths

        def theirs(scheme: PatchScheme = scheme) -> Tensor:
            return reference.patch(scheme)

        if not np.array_equal(ours(), theirs().numpy()):
            raise AssertionError(f"the two sides differ for {describe_scheme(scheme)}")
        times = [(seconds(ours), seconds(theirs), seconds(lambda: np.copyto(target, source))) for _ in range(repeats)]
        speeds = [corpus.tokens / statistics.median(column) for column in zip(*times, strict=True)]
        figures[describe_scheme(scheme)] = {"ours": speeds[0], "reference": speeds[1], "copy": speeds[2]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatokens", type=int, default=32, help="framed tokens, in millions of 2^20")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side; the median counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = make_corpus(arguments.megatokens << 20)
    figures = bench(corpus, arguments.repeats)
    print(f"{'scheme':<60}{'ours':>12}{'torch':>12}{'ratio':>8}{'of copy':>9}   (million tokens/s, one thread)")
    for name, speed in figures.items():
        ratio, share = speed["ours"] / speed["reference"], speed["ours"] / speed["copy"]
        print(f"{name:<60}{speed['ours'] / 1e6:>12.0f}{speed['reference'] / 1e6:>12.1f}{ratio:>8.1f}{share:>9.2f}")
    main_scheme = next(iter(figures.values()))
    line = {
        "bench": "boundaries",
        "ours": round(main_scheme["ours"]),
        "reference": round(main_scheme["reference"]),
        "ratio": round(main_scheme["ours"] / main_scheme["reference"], 2),
        "unit": "tokens/s",
        "tokens": corpus.tokens,
        "schemes": {
            name: {key: round(value) for key, value in speed.items()}
            | {"ratio": round(speed["ours"] / speed["reference"], 2)}
            for name, speed in figures.items()
        },
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
