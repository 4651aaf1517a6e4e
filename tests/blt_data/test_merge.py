"""`blt-data merge`: no document lost, none twice, and inputs that do not belong together are refused."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_data import InputError, ShardDirectory, ShardKind, read_manifest, verify_directory
from blt_data.commands.merge import merge_command
from blt_data.merging import MergeConfig, plan_merge, run_merge
from blt_data.merging.plan import Compression
from blt_data.skips import SkipCount, Skips

from .corpora import files_of
from .shard_samples import Document, make_directory, some_documents

KILLING = Path(__file__).with_name("merge_killing.py")


def merge(*inputs: Path, output: Path, **options: Any) -> None:
    run_merge(plan_merge(MergeConfig(inputs=inputs, output=output, **options)))


def documents_of(path: Path) -> list[Document]:
    """Return every document of a directory, after checking every checksum."""
    directory = ShardDirectory.open(path, verify=True)
    return [
        (
            directory.shard(shard).document_id(row),
            directory.shard(shard).content(row).tobytes(),
            directory.shard(shard).source(row),
        )
        for shard, row in directory.documents()
    ]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=1, max_size=3),
    kind=st.sampled_from([(ShardKind.BYTES, False), (ShardKind.PATCHED, False), (ShardKind.PATCHED, True)]),
    compression=st.sampled_from([None, "none", "zstd"]),
    given_compression=st.sampled_from(["none", "zstd"]),
    shard_bytes=st.sampled_from([None, 1, 50, 200, 10**9]),
)
def test_documents_and_their_columns_stay(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    counts: list[list[int]],
    kind: tuple[ShardKind, bool],
    compression: Compression | None,
    given_compression: Compression,
    shard_bytes: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    inputs, expected = [], []
    for number, shards in enumerate(counts):
        parts = [some_documents(seed + 10 * number + index, count) for index, count in enumerate(shards)]
        inputs.append(folder / str(number))
        make_directory(inputs[-1], parts, kind=kind[0], entropies=kind[1], compression=given_compression)
        expected += [document for part in parts for document in part]
    output = folder / "out"
    options = {"compression": compression, "shard_bytes": shard_bytes, "allow_duplicates": True}
    merge(*inputs, output=output, **options)
    assert documents_of(output) == expected
    merged = ShardDirectory.open(output)
    assert all(merged.shard(index).has_entropies == kind[1] for index in range(len(merged)))
    if kind[0] is ShardKind.PATCHED:
        shards_in = [
            ShardDirectory.open(path).shard(index)
            for path in inputs
            for index in range(len(read_manifest(path).shards))
        ]
        lengths = [list(shard.patch_lengths(row)) for shard in shards_in for row in range(len(shard))]
        assert [list(merged.shard(shard).patch_lengths(row)) for shard, row in merged.documents()] == lengths
        if kind[1]:
            scores = [list(shard.entropies(row)) for shard in shards_in for row in range(len(shard))]
            assert [list(merged.shard(shard).entropies(row)) for shard, row in merged.documents()] == scores
    if shard_bytes is not None:
        check_packed(list(merged.manifest.shards), expected, shard_bytes)
    if compression is not None:
        assert [is_compressed(output / entry.name) for entry in merged.manifest.shards if entry.bytes > 200] == [
            compression == "zstd" for entry in merged.manifest.shards if entry.bytes > 200
        ]
    before = files_of(output)
    merge(*inputs, output=folder / "again", workers=1, **options)
    assert files_of(folder / "again") == before


def check_packed(entries: list[Any], documents: list[Document], shard_bytes: int) -> None:
    """Shards are filled one after another: none could have taken the next document as well."""
    sizes = [len(content) for _, content, _ in documents]
    start = 0
    for entry in entries:
        assert entry.documents >= 1
        assert entry.bytes == sum(sizes[start : start + entry.documents])
        assert (
            entry.bytes <= shard_bytes or entry.documents == 1 or sum(sizes[start : start + entry.documents - 1]) == 0
        )
        start += entry.documents
        assert start == len(sizes) or entry.bytes + sizes[start] > shard_bytes
    assert start == len(sizes)


def is_compressed(path: Path) -> bool:
    return bytes.fromhex("28b52ffd") in path.read_bytes()  # The magic number of zstd frames (RFC 8878).


def two_directories(folder: Path, **options: Any) -> tuple[Path, Path]:
    make_directory(folder / "a", [some_documents(1, 5), some_documents(2, 3)], **options)
    make_directory(folder / "b", [some_documents(3, 4)], **options)
    return folder / "a", folder / "b"


def test_shards_that_need_no_change_are_linked_and_skips_are_summed(tmp_path: Path) -> None:
    one = Skips({"no JSON": SkipCount(count=1, bytes=10), "null": SkipCount(count=2, bytes=0)})
    two = Skips({"no JSON": SkipCount(count=5, bytes=7)})
    first = make_directory(tmp_path / "a", [some_documents(1, 5)], skipped=one, provenance={"command": "x", "n": 1})
    make_directory(tmp_path / "b", [some_documents(2, 5)], skipped=two)
    merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "out")
    assert (tmp_path / "out" / "shard-00001.arrow").samefile(tmp_path / "b" / "shard-00000.arrow")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.skipped.to_json() == {"no JSON": {"count": 6, "bytes": 17}, "null": {"count": 2, "bytes": 0}}
    assert manifest.provenance["command"] == "blt-data merge"
    inputs = manifest.provenance["inputs"]
    assert isinstance(inputs, list)
    assert inputs[0] == {"fingerprint": first.fingerprint(), "provenance": {"command": "x", "n": 1}}
    assert not (tmp_path / "out" / ".work").exists()


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    a, b = two_directories(tmp_path)
    file = a / "shard-00001.arrow"
    file.rename(tmp_path / "elsewhere.arrow")
    file.symlink_to("../elsewhere.arrow")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    merge(a, b, output=tmp_path / "deep" / "er" / "out")
    shutil.rmtree(a)
    assert len(documents_of(tmp_path / "deep" / "er" / "out")) == 12
    (tmp_path / "loop").symlink_to("loop")
    result = CliRunner().invoke(merge_command, [str(b), "--output", str(tmp_path / "loop")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_another_file_system_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = two_directories(tmp_path)
    merge(a, b, output=tmp_path / "linked")

    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merge(a, b, output=tmp_path / "copied")
    assert files_of(tmp_path / "copied") == files_of(tmp_path / "linked")
    assert not (tmp_path / "copied" / "shard-00000.arrow").samefile(a / "shard-00000.arrow")
    file = b / "shard-00000.arrow"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"b/shard-00000\.arrow: does not have the checksum"):
        merge(a, b, output=tmp_path / "damaged")
    assert not (tmp_path / "damaged" / "manifest.json").exists()


def test_train_and_holdout_are_merged_each_with_its_like(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for index, split in enumerate(("train", "holdout")):
            make_directory(
                tmp_path / name / split, [some_documents(index, 3, source=name)], provenance={"split": split}
            )
    merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "out")
    for split in ("train", "holdout"):
        assert documents_of(tmp_path / "out" / split) == [
            document for name in ("a", "b") for document in documents_of(tmp_path / name / split)
        ]
        assert read_manifest(tmp_path / "out" / split).provenance["split"] == split
    with pytest.raises(InputError, match=r"a: holds train and holdout, and .*b/train: is itself a shard directory"):
        merge(tmp_path / "a", tmp_path / "b" / "train", output=tmp_path / "new")
    with pytest.raises(InputError, match=r"holdout: is held out and .*train is not.*--allow-mixed-splits"):
        merge(tmp_path / "a" / "train", tmp_path / "b" / "holdout", output=tmp_path / "new")
    merge(tmp_path / "a" / "train", tmp_path / "b" / "holdout", output=tmp_path / "new", allow_mixed_splits=True)
    assert "split" not in read_manifest(tmp_path / "new").provenance
    # A merge of merges still knows what is held out.
    with pytest.raises(InputError, match="is held out"):
        merge(tmp_path / "out" / "train", tmp_path / "out" / "holdout", output=tmp_path / "newer")


def scheme(threshold: float, fingerprint: str = "f") -> dict[str, Any]:
    model = {"fingerprint": fingerprint, "config": {}}
    return {
        "scheme": {"name": "entropy", "threshold": threshold},
        "entropy_model": model,
        "calibration": {"n": threshold},
    }


def test_patches_must_be_by_one_scheme_and_model(tmp_path: Path) -> None:
    for name, provenance, entropies in (
        ("a", scheme(1.0), True),
        ("same", scheme(1.0) | {"calibration": None}, True),
        ("threshold", scheme(2.0), True),
        ("model", scheme(1.0, "g"), True),
        ("resets", scheme(1.0) | {"entropy_model": {"fingerprint": "f", "config": {}, "reset": True}}, True),
        ("none", scheme(1.0), False),
    ):
        documents = some_documents(len(name), 3, source=name)
        make_directory(tmp_path / name, [documents], kind=ShardKind.PATCHED, entropies=entropies, provenance=provenance)
    make_directory(tmp_path / "bytes", [some_documents(1, 3)])
    a, new = tmp_path / "a", tmp_path / "new"
    for name, message in (
        ("threshold", 'holds patches of the scheme {"name":"entropy","threshold":1.0}, and .*threshold: patches'),
        ("model", 'holds patches by the entropy model "f", and .*model: patches by the entropy model "g"'),
        ("resets", 'by an entropy model with {}, and .*resets: patches by an entropy model with {"reset":true}'),
        ("none", "holds shards with entropies, and .*none: shards without entropies"),
        ("bytes", "holds shards of kind patched, and .*bytes: shards of kind bytes; merge each kind by itself"),
    ):
        with pytest.raises(InputError, match=message):
            merge(a, tmp_path / name, output=new)
        assert not new.exists()
    merge(a, tmp_path / "same", output=new)
    stated = read_manifest(new).provenance
    assert {key: stated.get(key) for key in ("scheme", "entropy_model", "calibration")} == scheme(1.0) | {
        "calibration": None
    }


def test_the_same_twice_is_refused_unless_asked_for(tmp_path: Path) -> None:
    a, b = two_directories(tmp_path)
    with pytest.raises(InputError, match="a: is given twice; give --allow-duplicates"):
        merge(a, b, tmp_path / "." / "a", output=tmp_path / "out")
    merge(a, output=tmp_path / "copy")
    with pytest.raises(InputError, match=r"copy: holds the same as .*/a; give --allow-duplicates"):
        merge(a, tmp_path / "copy", output=tmp_path / "out")
    merge(a, a, output=tmp_path / "out", allow_duplicates=True)
    assert documents_of(tmp_path / "out") == 2 * documents_of(a)


def test_output_in_the_way(tmp_path: Path) -> None:
    a, b = two_directories(tmp_path)
    for output, message in (
        (a, "is the input .* or lies in it"),
        (b / "sub", "is the input .* or lies in it"),
        (tmp_path, "is not empty and holds no unfinished run of blt-data merge"),
    ):
        with pytest.raises(InputError, match=message):
            merge(a, b, output=output)
    merge(a, b, output=tmp_path / "out")
    before = files_of(tmp_path / "out")
    merge(a, b, output=tmp_path / "out")
    with pytest.raises(InputError, match=r"out: is already complete with other content \(its inputs differ\)"):
        merge(b, a, output=tmp_path / "out")
    with pytest.raises(InputError, match=r"out: is already complete with other content \(its options differ\)"):
        merge(a, b, output=tmp_path / "out", compression="zstd")
    assert files_of(tmp_path / "out") == before
    (tmp_path / "file").write_text("mine")
    result = CliRunner().invoke(merge_command, [str(a), str(b), "--output", str(tmp_path / "file")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unfinished_run_of_other_options_is_done_anew(tmp_path: Path) -> None:
    a, b = two_directories(tmp_path)
    output = tmp_path / "out"

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_merge(plan_merge(MergeConfig(inputs=(b, a, a), output=output, allow_duplicates=True)), on_shard=stop)
    assert (output / "shard-00000.arrow").exists()
    with pytest.raises(InputError, match=r"out: has no manifest\.json"):
        ShardDirectory.open(output)
    merge(a, output=output)
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "shard-00000.arrow", "shard-00001.arrow"]
    assert documents_of(output) == documents_of(a)
    assert documents_of(b)


def test_damage_is_found_before_it_is_written_anew(tmp_path: Path) -> None:
    a, b = two_directories(tmp_path)
    file = b / "shard-00000.arrow"
    data = file.read_bytes()
    content = some_documents(3, 4)[0][1]
    place = data.index(content)
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    for options in ({"compression": "zstd"}, {"shard_bytes": 50}):
        with pytest.raises(InputError, match=r"b/shard-00000\.arrow: does not have the checksum"):
            merge(a, b, output=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    # Linked shards are not read, but they keep their checksum, so that the damage is still found.
    merge(a, b, output=tmp_path / "out")
    assert "shard-00002.arrow: does not have the checksum" in verify_directory(tmp_path / "out")[0]


def test_killed_at_any_step_and_resumed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for index, split in enumerate(("train", "holdout")):
            parts = [some_documents(10 * index + part, 20, source=name, longest=80) for part in range(2)]
            parts.append([(f"{name} large", bytes(1400), "s")])
            make_directory(tmp_path / name / split, parts, provenance={"split": split})
    (tmp_path / "k").mkdir()
    command = [sys.executable, str(KILLING), str(tmp_path / "k"), "4", str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40
    names = {path.name for path in (tmp_path / "k" / "whole" / "train").iterdir()}
    assert len(names) > 3
    [linked] = [path for path in (tmp_path / "k" / "whole" / "holdout").iterdir() if path.stat().st_nlink > 2][:1]
    assert linked.suffix == ".arrow"


def test_two_merges_into_one_output(tmp_path: Path) -> None:
    a, b = two_directories(tmp_path)
    plan = plan_merge(MergeConfig(inputs=(a, b), output=tmp_path / "out", workers=1))
    refused = []

    def meanwhile(_: object) -> None:
        with pytest.raises(InputError, match="out: another process is writing to it; wait for its end"):
            run_merge(plan)
        refused.append(True)

    run_merge(plan, on_shard=meanwhile)
    assert len(refused) == 3
    assert verify_directory(tmp_path / "out") == []


def command(*arguments: object, preexec_fn: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    program = "from blt_data.commands.merge import merge_command; merge_command()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=preexec_fn,
    )


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files fails writing half-way, as a full disk does; then the merge goes on."""
    make_directory(tmp_path / "a", [[("large", os.urandom(50_000), "s")]] * 2)
    arguments = (tmp_path / "a", "--output", tmp_path / "out", "--shard-size", "1MB")

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))

    result = command(*arguments, preexec_fn=limit_file_size)
    assert result.returncode == 1
    assert re.fullmatch(
        r"error: .*\.arrow: File too large; free some space and run the same command again\n", result.stderr
    )
    assert not (tmp_path / "out").exists()
    result = command(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"out +│ bytes │ +1 │ +2 │ 100,000 │", result.stdout)
    again = command(*arguments)
    assert (again.returncode, again.stderr) == (0, "already complete, nothing to do\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument"),
        (["absent", "--output", "out"], 1, "absent: no such directory"),
        (["a"], 2, "--output"),
        (["a", "--output", "out", "--compression", "gzip"], 2, "gzip"),
        (["a", "--output", "out", "--shard-size", "0"], 2, "at least one byte"),
        (["a", "--output", "out", "--workers", "0"], 2, "--workers"),
        (["a", "--output", "absent/" + "x" * 300], 1, "File name too long"),
        (["empty", "--output", "out"], 1, r"empty: has no manifest\.json"),
        (["a/shard-00000.arrow", "--output", "out"], 1, "is a file, not a shard directory"),
        (["a", "--output", "a/sub"], 1, "is the input"),
        (["a", "a", "--output", "out"], 1, "is given twice"),
    ],
)
def test_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    two_directories(tmp_path)
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(merge_command, arguments)
    assert result.exit_code == code
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_patched_shards_have_a_largest_size(tmp_path: Path) -> None:
    make_directory(tmp_path / "a", [some_documents(1, 3)], kind=ShardKind.PATCHED)
    with pytest.raises(InputError, match=r"a shard of patches holds at most .* bytes; give a smaller --shard-size"):
        merge(tmp_path / "a", output=tmp_path / "out", shard_bytes=2**40)
    merge(tmp_path / "a", output=tmp_path / "out", shard_bytes=2**30)


def test_operations_need_the_light_core_only() -> None:
    program = (
        "import sys; from blt_data.commands import inspect, merge, verify\n"
        "print({'datatrove', 'fsspec', 'huggingface_hub', 'ray', 'torch', 'yaml', 'zstandard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
