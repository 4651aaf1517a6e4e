"""Real text, where there is some beside the checkout: every byte arrives, and is patched the same way twice."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard

from blt_data import ShardDirectory
from blt_patcher import IncrementalPatcher, SpaceScheme, patch_document

Texts = Callable[[Path], Iterator[str]]


def parquet_texts(directory: Path) -> Iterator[str]:
    """Texts in the order of the files and rows, read by pyarrow alone."""
    for path in sorted(directory.rglob("*.parquet")):
        yield from pq.read_table(path, columns=["text"])["text"].to_pylist()


def json_texts(directory: Path) -> Iterator[str]:
    """Texts in the order of the files and lines, read by zstandard and json alone."""
    for path in sorted(directory.rglob("*.jsonl.zst")):
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
                yield json.loads(line)["text"]


@pytest.mark.parametrize(("folder", "texts"), [("fineweb-edu-sample", parquet_texts), ("multilingual", json_texts)])
def test_every_byte_of_every_document_arrives(folder: str, texts: Texts, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / folder
    command = [
        sys.executable,
        "-m",
        "blt_data.cli",
        "prepare",
        "--source",
        str(source),
        "--output",
        str(tmp_path / "b"),
        "--no-shuffle",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    directory = ShardDirectory.open(tmp_path / "b", verify=True)
    contents = (directory.shard(shard).content(row).tobytes() for shard, row in directory.documents())
    count = 0
    for content, text in zip(contents, texts(source), strict=True):
        assert content == text.encode("utf-8")
        count += 1
    assert count == directory.manifest.documents > 1000


def test_batch_and_incremental_patches_agree_on_many_scripts(shared_data: Path) -> None:
    scheme = SpaceScheme(max_patch_length=6)
    for index, text in enumerate(json_texts(shared_data / "multilingual")):
        if index % 40:
            continue
        content = text.encode()[:2000]
        lengths = patch_document(scheme, content)
        patcher = IncrementalPatcher(scheme)
        framed = [1, *(byte + 4 for byte in content), 2]
        starts = [0] + [place + 1 for place, token in enumerate(framed[:-1]) if patcher.push(token)]
        assert np.diff([*starts, len(framed)]).tolist() == lengths.tolist()
