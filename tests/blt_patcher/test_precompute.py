"""Byte shards to patched shards: what is written, and that a killed run loses and mixes nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.blt_patcher.shards import EXECUTABLE, make_bytes, make_model, tree

from blt_data import ShardDirectory, ShardKind, verify_directory
from blt_data.errors import InputError
from blt_data.executors.local import LocalExecutor
from blt_patcher import EntropyScheme, SpaceScheme, StaticScheme, patch_document, scheme_from_json
from blt_patcher.entropies import EntropyScorer, load_entropy_model
from blt_patcher.precompute import PrecomputeResult, Workers, precompute
from blt_patcher.windows import framed_offsets


class CountingScorer:
    """A model that is unsure of a byte in proportion to its value: cheap, and the entropies are known."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.stop_after = stop_after
        self.calls = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"fingerprint": "counting", "config": {}}

    @property
    def settings(self) -> dict[str, Any]:
        return {"window_tokens": 1}

    def score(
        self,
        content: npt.NDArray[np.uint8],
        content_offsets: npt.NDArray[np.int64],
        *,
        name: str = "the documents",
        advance: Callable[[int], None] | None = None,
    ) -> npt.NDArray[np.float16]:
        self.calls += 1
        if self.calls > self.stop_after:
            raise KeyboardInterrupt
        tokens = framed_offsets(content_offsets)
        nats = np.zeros(int(tokens[-1]), np.float16)
        for low, start, size in zip(content_offsets, tokens, np.diff(content_offsets), strict=False):
            nats[start + 1 : start + 1 + size] = content[low : low + size] / np.float16(64)
        if advance is not None:
            advance(nats.size)
        return nats


@pytest.fixture
def source(tmp_path: Path) -> ShardDirectory:
    return make_bytes(tmp_path / "bytes")


def run(source: ShardDirectory, output: Path, **options: Any) -> PrecomputeResult:
    arguments: dict[str, Any] = {"scheme": EntropyScheme(threshold=1.5), "scorer": CountingScorer(), **options}
    return precompute(source, output, **arguments)


@pytest.mark.parametrize("keep", [False, True])
def test_patched_shards_hold_the_documents_and_their_patches(
    source: ShardDirectory, tmp_path: Path, keep: bool
) -> None:
    told: list[tuple[int, ...]] = []
    shards: list[bool] = []
    result = run(
        source,
        tmp_path / "out",
        keep_entropies=keep,
        report=lambda *amounts: told.append(amounts),
        on_shard=lambda entry, early: shards.append(early),
    )
    assert (result.resumed_shards, result.missing_shards) == (0, 0)
    total = source.manifest.bytes + 2 * source.manifest.documents
    assert [sum(column) for column in zip(*told, strict=True)] == [total, source.manifest.documents, total]
    assert shards == [False] * len(source)
    assert verify_directory(tmp_path / "out") == []
    patched = ShardDirectory.open(tmp_path / "out", kind=ShardKind.PATCHED, verify=True)
    assert patched.manifest.documents == source.manifest.documents
    for index in range(len(source)):
        before, after = source.shard(index), patched.shard(index)
        nats = CountingScorer().score(before.content_column()[1], before.content_column()[0])
        tokens = framed_offsets(before.content_column()[0])
        assert after.has_entropies is keep
        for row in range(before.num_documents):
            content = before.content(row).tobytes()
            assert after.content(row).tobytes() == content
            assert (after.document_id(row), after.source(row)) == (before.document_id(row), before.source(row))
            own = nats[tokens[row] : tokens[row + 1]]
            expected = patch_document(EntropyScheme(threshold=1.5), content, own)
            np.testing.assert_array_equal(after.patch_lengths(row), expected)
            if keep:
                np.testing.assert_array_equal(after.entropies(row), own)


def test_provenance_tells_how_it_was_made(source: ShardDirectory, tmp_path: Path) -> None:
    record = {"target_patch_length": 4.5}
    run(source, tmp_path / "out", calibration=record)
    patched = ShardDirectory.open(tmp_path / "out")
    told = patched.manifest.provenance
    assert told["byte_shards"] == {
        "fingerprint": source.manifest.fingerprint(),
        "provenance": dict(source.manifest.provenance),
    }
    assert isinstance(told["scheme"], dict)
    assert scheme_from_json(told["scheme"]) == EntropyScheme(threshold=1.5)
    assert told["entropy_model"] == {"fingerprint": "counting", "config": {}}
    assert told["calibration"] == record
    assert isinstance(told["packages"], dict)
    assert set(told["packages"]) == {"blt-data", "blt-patcher", "blt-model"}
    assert patched.shard(0).provenance == told


def test_an_interrupted_run_goes_on_and_ends_the_same(source: ShardDirectory, tmp_path: Path) -> None:
    run(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "parts", scorer=CountingScorer(stop_after=2))
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == ["shard-00000.arrow", "shard-00001.arrow"]
    # A shard that was damaged in the meantime is written again, and what a killed writer left is removed.
    damaged = tmp_path / "parts" / "shard-00001.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (tmp_path / "parts" / ".shard-00002.arrow.tmp-1-abc").write_bytes(b"half")
    scorer = CountingScorer()
    result = run(source, tmp_path / "parts", scorer=scorer)
    assert (result.resumed_shards, scorer.calls) == (1, len(source) - 1)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    again = CountingScorer()
    assert run(source, tmp_path / "parts", scorer=again).resumed_shards == len(source)
    assert again.calls == 0
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


@pytest.mark.parametrize("manifest", [True, False])
def test_other_parameters_are_refused_and_named(source: ShardDirectory, tmp_path: Path, manifest: bool) -> None:
    out = tmp_path / "out"
    run(source, out)
    if not manifest:
        (out / "manifest.json").unlink()
    before = tree(out)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"scheme": EntropyScheme(threshold=2.5)}, r"scheme.threshold is 1.5 there and 2.5 here"),
        ({"scheme": SpaceScheme(), "scorer": None}, r"scheme.scheme is entropy there and space here"),
        (
            {"scheme": EntropyScheme(threshold=1.5, max_patch_length=4)},
            r"scheme.max_patch_length is none there and 4 here",
        ),
        ({"keep_entropies": True}, r"entropies_kept is False there and True here"),
    ]
    for options, difference in cases:
        with pytest.raises(InputError, match=rf"made with other parameters \({difference}\); delete that directory"):
            run(source, out, **options)
    other = make_bytes(tmp_path / "other", seed=9)
    with pytest.raises(InputError, match=r"byte_shards.fingerprint is .* there and"):
        run(other, out)
    assert tree(out) == before


def test_outputs_that_are_something_else_are_refused(source: ShardDirectory, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds the byte shards themselves"):
        run(source, source.path)
    with pytest.raises(InputError, match="is of kind bytes, not patched"):
        run(source, make_bytes(tmp_path / "bytes-too").path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="is a file"):
        run(source, file)


def test_a_damaged_manifest_says_how_to_keep_the_shards(source: ShardDirectory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = tree(out)
    manifest = out / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    with pytest.raises(InputError, match="delete that file and run the same command again"):
        run(source, out)
    manifest.unlink()
    assert run(source, out).resumed_shards == len(source)
    assert tree(out) == before
    # Of a directory that holds no shard of this making nothing is to be deleted.
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="is damaged") as caught:
        run(source, stranger)
    assert "delete" not in str(caught.value)


def test_models_where_none_is_needed_and_none_where_one_is(source: ShardDirectory, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"scorer": None}, "scheme entropy needs entropies"),
        ({"scheme": SpaceScheme()}, "scheme space reads no entropies"),
        ({"scheme": SpaceScheme(), "scorer": None, "keep_entropies": True}, "no entropies to keep"),
    ]
    for options, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            run(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", scheme=SpaceScheme(), keep_entropies=True)
    assert ShardDirectory.open(tmp_path / "out").shard(0).has_entropies


def test_a_flipped_byte_in_the_input_is_found(source: ShardDirectory, tmp_path: Path) -> None:
    file = source.path / "shard-00001.arrow"
    data = bytearray(file.read_bytes())
    place = data.index(source.shard(1).content(0).tobytes()[:20])
    data[place + 3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"shard-00001.arrow: does not have the checksum"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_workers_finish_the_other_shards_and_tell_of_the_bad_ones(source: ShardDirectory, tmp_path: Path) -> None:
    for name in ("shard-00001.arrow", "shard-00002.arrow"):
        file = source.path / name
        data = bytearray(file.read_bytes())
        data[data.index(b"patch ") + 2] ^= 1
        file.write_bytes(bytes(data))
    workers = Workers(executor=LocalExecutor(1), load_scorer=CountingScorer)
    with pytest.raises(InputError) as caught:
        run(source, tmp_path / "out", workers=workers)
    sentence = str(caught.value)
    assert sentence.count("shard-00001.arrow") == 1
    assert "does not have the checksum" in sentence
    assert sentence.endswith("; 1 more could not be patched; the other shards are finished and kept")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.arrow")) == [
        "shard-00000.arrow",
        "shard-00003.arrow",
    ]


def test_two_processes_do_not_write_to_one_output(source: ShardDirectory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    # A lock belongs to the open file, so another descriptor of this process stands for another process.
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="out: another process is writing to it; wait for its end"):
        run(source, out)
    assert not list(out.iterdir())
    os.close(descriptor)
    run(source, out)
    assert (out / "manifest.json").exists()


def test_a_directory_without_documents(tmp_path: Path) -> None:
    source = make_bytes(tmp_path / "bytes", shards=[[], [b""]])
    result = run(source, tmp_path / "out", scheme=StaticScheme(patch_length=4), scorer=None)
    assert (result.manifest.documents, result.manifest.patches) == (1, 2)


def test_killed_without_warning_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shards = [[rng.integers(32, 127, 3000, dtype=np.uint8).tobytes() for _ in range(2)] for _ in range(6)]
    source = make_bytes(tmp_path / "bytes", shards=shards)
    make_model(tmp_path / "model")
    # Small windows make every shard take a while.
    options = ["--threshold", "5.2", "--entropies", "float16", "--window-tokens", "256", "--device", "cpu"]
    command = [*EXECUTABLE, "precompute", "bytes", "--output", "killed", "--entropy-model", "model", *options]
    killed = tmp_path / "killed"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while job.poll() is None and not (killed / "shard-00002.arrow").exists():
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)
    assert job.returncode == -signal.SIGKILL
    finished = {file.name: file.stat().st_mtime_ns for file in killed.glob("*.arrow")}
    assert not (killed / "manifest.json").exists()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    # The uninterrupted run, in this process: the command and the functions give the same files.
    scorer = EntropyScorer(load_entropy_model(tmp_path / "model"), window_tokens=256)
    precompute(source, tmp_path / "whole", scheme=EntropyScheme(threshold=5.2), scorer=scorer, keep_entropies=True)
    assert tree(killed) == tree(tmp_path / "whole")
    assert {name: (killed / name).stat().st_mtime_ns for name in finished} == finished
