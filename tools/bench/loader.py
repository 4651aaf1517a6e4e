"""Bytes per second of one loader worker, from patched shards to packed tensors, against JSON lines and Python lists.

    uv run python -m tools.bench.loader [--megabytes 32] [--tokens 8192] [--sequences 16] [--repeats 3]

The text is the running Python's standard library, cut into documents as long as those of FineWeb-Edu (log-normal, 5 kB
on average, half of them below 3 kB), patched where random entropies are high, 4.5 bytes on average. Both sides read the
same documents with the same patches from files in the page cache, pack them into sequences of the same tokens, cut at
patch boundaries, and make batches of the same number of sequences; by turns, on one core:

- lists: the way of most data loaders. A line of JSON is parsed; its text becomes a list of token ids, patch by patch
  these go into a list that is the sequence, full sequences are padded and become tensors of ids and targets, and of
  patch lengths. There is no shuffle.
- ours: shards opened, indexed, shuffled and packed by a plan, and batches built by one thread of the loader, which
  also hold the offsets of documents and patches and what each position's decoder reads.

An epoch is then read with every target counted and summed by document and position, and compared with the shards: zero
bytes lost means that each byte and each EOS was predicted exactly once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from blt_data import frame
from blt_data.framing import BOE_ID, BOS_ID, BYTE_OFFSET, EOS_ID
from blt_data.shards import Manifest, ShardDirectory, ShardKind, write_manifest, write_shard
from blt_model.packed import IGNORED_TARGET
from blt_patcher import EntropyScheme, patch_document, scheme_to_json
from blt_train.groups import ShardGroups
from blt_train.loader import Loader, Slice
from blt_train.plan import Capacity, Plan, derive_capacity
from blt_train.sequences import SequenceStream
from blt_train.source_stream import SourceStream

#: Bytes of a document: the median, and the standard deviation of the logarithm.
MEDIAN, SPREAD = 3000, 1.0
#: Of entropies that are exponential with mean 1: one in 4.5 is above it.
THRESHOLD = math.log(4.5)
#: Bytes of content in a shard.
SHARD_BYTES = 16 << 20


@dataclass(frozen=True)
class Corpus:
    """The same documents in the files of both sides."""

    shards: Path
    lines: Path
    bytes: int
    documents: int


def library_text() -> bytes:
    """Return the sources of the standard library, one after the other."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths).encode()


def document_texts(num_bytes: int, generator: np.random.Generator) -> Iterator[bytes]:
    """Yield documents that are pieces of the library, of lengths like FineWeb-Edu's, until there are enough bytes."""
    text = library_text()
    while num_bytes > 0:
        length = min(int(generator.lognormal(np.log(MEDIAN), SPREAD)) + 1, len(text))
        start = int(generator.integers(0, len(text) - length + 1))
        # What the cuts leave of a character at either end is dropped.
        content = text[start : start + length].decode("utf-8", "ignore").encode()
        num_bytes -= len(content)
        yield content


def write_corpus(folder: Path, num_bytes: int) -> Corpus:
    """Write the documents as patched shards and as JSON lines."""
    scheme = EntropyScheme(threshold=THRESHOLD)
    generator = np.random.default_rng(0)
    shards, lines = folder / "shards", folder / "documents.jsonl"
    shards.mkdir()
    documents = list(document_texts(num_bytes, generator))
    entropies = [generator.exponential(size=len(content) + 2).astype(np.float16) for content in documents]
    lengths = [patch_document(scheme, *item) for item in zip(documents, entropies, strict=True)]
    with lines.open("w", encoding="utf-8") as file:
        for content, row in zip(documents, lengths, strict=True):
            file.write(json.dumps({"text": content.decode(), "patch_lengths": row.tolist()}, ensure_ascii=False) + "\n")
    ends = np.cumsum([len(content) for content in documents])
    cuts = [0, *np.searchsorted(ends, np.arange(SHARD_BYTES, ends[-1], SHARD_BYTES)).tolist(), len(documents)]
    provenance: dict[str, Any] = {"scheme": scheme_to_json(scheme)}
    entries = [
        write_shard(
            shards / f"shard-{index:05d}.arrow",
            kind=ShardKind.PATCHED,
            document_ids=[str(row) for row in range(first, last)],
            contents=documents[first:last],
            sources=["stdlib"] * (last - first),
            patch_lengths=pa.array(lengths[first:last], type=pa.list_(pa.uint16())),
            provenance=provenance,
        )
        for index, (first, last) in enumerate(itertools.pairwise(cuts))
        if first < last
    ]
    write_manifest(shards, Manifest(kind=ShardKind.PATCHED, shards=tuple(entries), provenance=provenance))
    return Corpus(shards, lines, int(ends[-1]), len(documents))


class ListLoader:
    """The reference: documents to lists, lists to padded tensors."""

    def __init__(self, path: Path, tokens: int, sequences: int) -> None:
        self.path, self.tokens, self.sequences = path, tokens, sequences
        self.targets = 0

    def documents(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield token ids and patch lengths of each document."""
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                ids = [BOS_ID, *[byte + BYTE_OFFSET for byte in record["text"].encode()], EOS_ID]
                yield ids, record["patch_lengths"]

    def packed(self) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Yield inputs, targets and patch lengths of each sequence, cut at patch boundaries."""
        inputs: list[int] = []
        targets: list[int] = []
        patches: list[int] = []
        for ids, lengths in self.documents():
            start, last = 0, len(ids) - 1
            for length in lengths:
                end = min(start + length, last)
                if len(inputs) + end - start > self.tokens:
                    yield inputs, targets, patches
                    inputs, targets, patches = [], [], []
                if end > start:
                    inputs.extend(ids[start:end])
                    targets.extend(ids[start + 1 : end + 1])
                    patches.append(end - start)
                start = end
        yield inputs, targets, patches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        batch: list[tuple[list[int], list[int], list[int]]] = []
        for sequence in self.packed():
            batch.append(sequence)
            if len(batch) == self.sequences:
                yield self.tensors(batch)
                batch = []
        if batch:
            yield self.tensors(batch)

    def tensors(
        self, batch: list[tuple[list[int], list[int], list[int]]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pad the sequences and make tensors."""
        most_patches = max(len(patches) for _, _, patches in batch)
        inputs, targets, lengths = [], [], []
        for row, row_targets, patches in batch:
            padding = self.tokens - len(row)
            inputs.append(row + [BOE_ID] * padding)
            targets.append(row_targets + [IGNORED_TARGET] * padding)
            lengths.append(patches + [0] * (most_patches - len(patches)))
            self.targets += len(row_targets)
        return torch.tensor(inputs), torch.tensor(targets), torch.tensor(lengths)


def stream_of(corpus: Corpus, capacity: Capacity, seed: int) -> SequenceStream:
    """Return the training sequences of the shards."""
    groups = ShardGroups(ShardDirectory.open(corpus.shards), seed=seed, group_documents=10**9)
    return SequenceStream({"train": SourceStream(groups, capacity, seed=seed)}, seed=seed)


def epoch_sequences(stream: SequenceStream) -> int:
    """Return the sequences of the first epoch."""
    return stream.sequences(0, 1)[0][0].num_sequences


def ours_seconds(corpus: Corpus, capacity: Capacity, sequences: int, seed: int) -> float:
    """Return how long an epoch takes, from opening the shards to the last tensor."""
    started = time.perf_counter()
    stream = stream_of(corpus, capacity, seed)
    steps = -(-epoch_sequences(stream) // sequences)
    part = Slice(sequences_per_step=sequences, sequences_per_micro_batch=sequences)
    with Loader(stream, part, first_step=0, end_step=steps, workers=1, prefetch=2) as loader:
        for _ in loader:
            pass
    # The last batch reaches into the next epoch.
    seconds = time.perf_counter() - started
    return seconds * epoch_sequences(stream) / (steps * sequences)


def reference_seconds(corpus: Corpus, capacity: Capacity, sequences: int) -> float:
    """Return how long the same documents take through lists."""
    started = time.perf_counter()
    loader = ListLoader(corpus.lines, capacity.tokens, sequences)
    for _ in loader:
        pass
    if loader.targets != corpus.bytes + corpus.documents:
        raise AssertionError("the reference lost targets")
    return time.perf_counter() - started


def expected_sums(directory: ShardDirectory) -> npt.NDArray[np.int64]:
    """Return int64 [D, 3] of each document's targets: number, sum of values, sum of values times positions."""
    rows = []
    for shard, row in directory.documents():
        targets = frame(directory.shard(shard).content(row))[1:].astype(np.int64)
        rows.append((targets.size, targets.sum(), (targets * np.arange(1, targets.size + 1)).sum()))
    return np.array(rows, dtype=np.int64)


def lost_bytes(corpus: Corpus, capacity: Capacity, sequences: int, seed: int) -> tuple[int, float]:
    """Return how many targets of an epoch are not as the shards say, and the utilisation.

    Counted are documents' targets missing or too many; where the numbers are right but values or places are not, all
    of the document's.
    """
    stream = stream_of(corpus, capacity, seed)
    count = epoch_sequences(stream)
    expected = expected_sums(ShardDirectory.open(corpus.shards))
    found = np.zeros_like(expected)
    part = Slice(sequences_per_step=sequences, sequences_per_micro_batch=sequences)
    with Loader(stream, part, first_step=0, end_step=-(-count // sequences), workers=1) as loader:
        for step, batch in enumerate(loader):
            chosen = stream.sequences(step * sequences, min(sequences, count - step * sequences))
            for slot, (plan, index) in enumerate(chosen):
                add_sums(found, plan, index, batch.targets[slot * capacity.tokens :].numpy())
    wrong = np.abs(found[:, 0] - expected[:, 0])
    wrong[(wrong == 0) & (found != expected).any(axis=1)] = expected[(wrong == 0) & (found != expected).any(axis=1), 0]
    return int(wrong.sum()), stream.figures(0, count).utilisation


def add_sums(found: npt.NDArray[np.int64], plan: Plan, index: int, targets: npt.NDArray[np.int64]) -> None:
    """Add one sequence's targets to the sums of their documents."""
    first, at = int(plan.first_piece[index]), 0
    for piece in range(first, first + int(plan.num_pieces[index])):
        start, end = int(plan.piece_start[piece]), int(plan.piece_end[piece])
        own = targets[at : at + end - start]
        if (own == IGNORED_TARGET).any():
            raise AssertionError("a real position has no target")
        found[plan.piece_document[piece]] += (own.size, own.sum(), (own * np.arange(start + 1, end + 1)).sum())
        at += end - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=32, help="bytes of text, in units of 2^20")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per sequence")
    parser.add_argument("--sequences", type=int, default=16, help="sequences per batch")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side; the median counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder), arguments.megabytes << 20)
        table = ShardGroups(ShardDirectory.open(corpus.shards), seed=0, group_documents=10**9).documents(0, 0)
        capacity = derive_capacity(table, tokens=arguments.tokens)
        print(
            f"{corpus.bytes:,} bytes in {corpus.documents:,} documents, {table.mean_patch_length:.2f} bytes per patch; "
            f"{capacity.tokens} tokens and {capacity.patches} patches per sequence"
        )
        # The first epoch compiles the kernels and is the one whose targets are counted.
        lost, utilisation = lost_bytes(corpus, capacity, arguments.sequences, seed=0)
        print(f"targets lost or wrong in an epoch: {lost} of {corpus.bytes + corpus.documents:,}", flush=True)
        times = [
            (
                ours_seconds(corpus, capacity, arguments.sequences, seed),
                reference_seconds(corpus, capacity, arguments.sequences),
            )
            for seed in range(1, arguments.repeats + 1)
        ]
    ours, reference = (corpus.bytes / statistics.median(column) for column in zip(*times, strict=True))
    print(f"ours {ours / 1e6:.0f} MB/s, lists {reference / 1e6:.2f} MB/s, ratio {ours / reference:.0f}")
    print(f"utilisation {utilisation:.4f}; load {os.getloadavg()[0]:.1f}")
    line = {
        "bench": "loader",
        "ours": round(ours),
        "reference": round(reference),
        "ratio": round(ours / reference, 1),
        "unit": "bytes/s",
        "bytes": corpus.bytes,
        "documents": corpus.documents,
        "mean_patch_length": round(table.mean_patch_length, 3),
        "utilisation": round(utilisation, 4),
        "lost": lost,
        "tokens": capacity.tokens,
        "sequences": arguments.sequences,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
