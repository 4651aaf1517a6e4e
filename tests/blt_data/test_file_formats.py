"""docs/file-formats.md is right: its reader reads our shards, and it names what the files hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pytest

from blt_data import Manifest, ShardEntry, ShardKind, write_manifest, write_shard
from blt_data.shards.schema import shard_schema

PAGE = (Path(__file__).parents[2] / "docs" / "file-formats.md").read_text(encoding="utf-8")


def example() -> str:
    found = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("kind", ShardKind)
def test_reader_in_the_page(tmp_path: Path, kind: ShardKind) -> None:
    """Run in a Python that cannot see our packages: -I, and an import hook that refuses them."""
    contents = ["naïve\0".encode(), b"", b"\xff\xfe"]
    patched = kind is ShardKind.PATCHED
    lengths = pa.array([[1, len(content) + 1] for content in contents], pa.list_(pa.uint16()))
    entropies = pa.array([[0.5] * (len(content) + 2) for content in contents], pa.list_(pa.float16()))
    write_shard(
        tmp_path / "shard-00000.arrow",
        kind=kind,
        document_ids=["ä", "b", "c"],
        contents=contents,
        sources=["one", "two", "one"],
        patch_lengths=lengths if patched else None,
        entropies=entropies if patched else None,
        provenance={"from": "here"},
        compression="zstd" if patched else "none",
    )
    program = "import sys; sys.modules['blt_data'] = None\n" + example()
    run = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"{kind} {{'from': 'here'}} ä {contents[0]!r}\n"
    if not patched:
        path = tmp_path / "shard-00000.arrow"
        path.write_bytes(path.read_bytes().replace(b"na\xc3", b"no\xc3"))
        run = subprocess.run(
            [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert "AssertionError" in run.stderr


def test_page_names_every_key(tmp_path: Path) -> None:
    entry = write_shard(
        tmp_path / "s.arrow",
        kind=ShardKind.PATCHED,
        document_ids=["a"],
        contents=[b"a"],
        sources=["s"],
        patch_lengths=pa.array([[1, 2]], pa.list_(pa.uint16())),
        provenance={},
    )
    write_manifest(tmp_path, Manifest(kind=ShardKind.PATCHED, shards=(entry,)))
    with pa.ipc.open_file(str(tmp_path / "s.arrow")) as reader:
        keys = {key.decode() for key in reader.schema.metadata}
    keys |= set(json.loads((tmp_path / "manifest.json").read_text()))
    keys |= {field.name for field in fields(ShardEntry)}
    keys |= set(shard_schema(ShardKind.PATCHED, entropies=True).names)
    assert {key for key in keys if f"`{key}`" not in PAGE} == set()
