"""New boundaries from stored entropies: the same to the byte as patching from scratch, killed or not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tests.blt_patcher import plain
from tests.blt_patcher.patched import HashScorer, make_patched
from tests.blt_patcher.shards import EXECUTABLE, tree

from blt_data import Manifest, ShardDirectory, ShardKind, verify_directory, write_manifest, write_shard
from blt_data.errors import InputError
from blt_data.shards import JSON
from blt_patcher import ByteScheme, EntropyMonotonicScheme, EntropyScheme, PatchScheme, SpaceScheme, StaticScheme
from blt_patcher.precompute import precompute
from blt_patcher.repatch import repatch


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    """A patched directory with entropies; its byte shards are in `stored-bytes` beside it."""
    return make_patched(tmp_path_factory.mktemp("repatch") / "stored", EntropyScheme(threshold=1.5), seed=3)


def from_scratch(stored: ShardDirectory, output: Path, scheme: PatchScheme, **options: Any) -> dict[str, str]:
    source = ShardDirectory.open(stored.path.with_name("stored-bytes"))
    precompute(source, output, scheme=scheme, **options)
    return tree(output)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scheme=plain.schemes)
def test_it_equals_patching_from_scratch_to_the_byte(
    stored: ShardDirectory, tmp_path_factory: pytest.TempPathFactory, scheme: PatchScheme
) -> None:
    path = tmp_path_factory.mktemp("scratch")
    repatch(stored, path / "again", scheme=scheme, workers=3)
    assert tree(path / "again") == from_scratch(
        stored, path / "scratch", scheme, scorer=HashScorer(3), keep_entropies=True
    )


@pytest.mark.parametrize("scheme", [EntropyScheme(threshold=0.7), SpaceScheme(max_patch_length=5)])
def test_dropping_entropies_equals_never_storing_them(
    stored: ShardDirectory, tmp_path: Path, scheme: PatchScheme
) -> None:
    repatch(stored, tmp_path / "again", scheme=scheme, keep_entropies=False)
    scorer = HashScorer(3) if scheme.needs_entropies else None
    assert tree(tmp_path / "again") == from_scratch(stored, tmp_path / "scratch", scheme, scorer=scorer)


def test_schemes_without_entropies_need_none_stored(stored: ShardDirectory, tmp_path: Path) -> None:
    repatch(stored, tmp_path / "bare", scheme=ByteScheme(), keep_entropies=False)
    bare = ShardDirectory.open(tmp_path / "bare")
    repatch(bare, tmp_path / "again", scheme=StaticScheme(patch_length=4))
    assert tree(tmp_path / "again") == from_scratch(stored, tmp_path / "scratch", StaticScheme(patch_length=4))
    with pytest.raises(InputError, match=r"shard-00000.arrow: keeps no entropies, which scheme entropy needs; run"):
        repatch(bare, tmp_path / "no", scheme=EntropyScheme(threshold=1.0))
    with pytest.raises(InputError, match=r"shard-00000.arrow: has no entropies to keep"):
        repatch(bare, tmp_path / "no", scheme=SpaceScheme(), keep_entropies=True)
    assert not (tmp_path / "no").exists()


def test_provenance_keeps_the_model_and_names_older_releases(stored: ShardDirectory, tmp_path: Path) -> None:
    old: dict[str, JSON] = {"blt-data": "0.0.1", "blt-patcher": "0.0.1", "blt-model": "0.0.1"}
    provenance: dict[str, JSON] = {**stored.manifest.provenance, "packages": old}
    entries = []
    (tmp_path / "old").mkdir()
    for index, entry in enumerate(stored.manifest.shards):
        columns = stored.shard(index).batch
        entries.append(
            write_shard(
                tmp_path / "old" / entry.name,
                kind=ShardKind.PATCHED,
                document_ids=columns.column("document_id"),
                contents=columns.column("content"),
                sources=columns.column("source"),
                patch_lengths=columns.column("patch_lengths"),
                entropies=columns.column("entropies"),
                provenance=provenance,
            )
        )
    write_manifest(tmp_path / "old", Manifest(kind=ShardKind.PATCHED, shards=tuple(entries), provenance=provenance))
    record = {"target_patch_length": 4.5}
    repatch(ShardDirectory.open(tmp_path / "old"), tmp_path / "new", scheme=SpaceScheme(), calibration=record)
    told = ShardDirectory.open(tmp_path / "new").manifest.provenance
    assert told["entropy_model"] == HashScorer(3).identity
    assert told["calibration"] == record
    assert told["scored_by"] == old
    assert isinstance(told["packages"], dict)
    assert told["packages"]["blt-model"] == "0.0.1"
    assert told["packages"]["blt-patcher"] != "0.0.1"
    repatch(ShardDirectory.open(tmp_path / "new"), tmp_path / "newer", scheme=ByteScheme())
    assert ShardDirectory.open(tmp_path / "newer").manifest.provenance["scored_by"] == old
    repatch(ShardDirectory.open(tmp_path / "new"), tmp_path / "none", scheme=ByteScheme(), keep_entropies=False)
    assert "scored_by" not in ShardDirectory.open(tmp_path / "none").manifest.provenance


def test_finished_shards_are_kept_and_others_written_again(stored: ShardDirectory, tmp_path: Path) -> None:
    scheme = EntropyMonotonicScheme(relative_threshold=0.2)
    done: list[int] = []
    result = repatch(stored, tmp_path / "out", scheme=scheme, advance=done.append)
    assert (result.resumed_shards, sum(done)) == (0, stored.manifest.bytes + 2 * stored.manifest.documents)
    whole = tree(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "shard-00001.arrow").unlink()
    damaged = tmp_path / "out" / "shard-00002.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-64])
    (tmp_path / "out" / ".shard-00003.arrow.tmp-1-abc").write_bytes(b"half")
    assert repatch(stored, tmp_path / "out", scheme=scheme).resumed_shards == 2
    assert tree(tmp_path / "out") == whole
    with pytest.raises(InputError, match=r"made with other parameters \(scheme.scheme is entropy-monotonic there"):
        repatch(stored, tmp_path / "out", scheme=SpaceScheme())
    with pytest.raises(InputError, match="stored: holds the shards to be cut anew"):
        repatch(stored, stored.path, scheme=SpaceScheme())
    assert verify_directory(stored.path) == []


def test_damage_in_the_source_is_found(stored: ShardDirectory, tmp_path: Path) -> None:
    made = make_patched(tmp_path / "damaged", EntropyScheme(threshold=1.5), seed=5)
    file = made.path / "shard-00001.arrow"
    data = bytearray(file.read_bytes())
    nats = made.shard(1).entropies(0).tobytes()
    data[data.index(nats) + 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"shard-00001.arrow: does not have the checksum"):
        repatch(made, tmp_path / "out", scheme=EntropyScheme(threshold=2.0))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_killed_half_way_it_ends_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    shards = [[rng.integers(0, 256, 40_000, dtype=np.uint8).tobytes() for _ in range(2)] for _ in range(24)]
    made = make_patched(tmp_path / "stored", EntropyScheme(threshold=1.5), shards=shards)
    command = [*EXECUTABLE, "repatch", "stored", "--output", "killed", "--threshold", "2", "--workers", "1"]
    killed = tmp_path / "killed"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, env=dict(os.environ)) as job:
        while job.poll() is None and not (killed / "shard-00002.arrow").exists():
            time.sleep(0.001)
        job.send_signal(signal.SIGKILL)
    assert not (killed / "manifest.json").exists(), "it ended before it could be killed"
    kept = {file.name: file.stat().st_mtime_ns for file in killed.glob("*.arrow")}
    result = repatch(made, killed, scheme=EntropyScheme(threshold=2.0))
    assert result.resumed_shards == len(kept) > 0
    assert {name: (killed / name).stat().st_mtime_ns for name in kept} == kept
    repatch(made, tmp_path / "whole", scheme=EntropyScheme(threshold=2.0))
    assert tree(killed) == tree(tmp_path / "whole")
