"""The command: what it prints, and one sentence for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.blt_patcher.running import blt_patch, blt_patch_here
from tests.blt_patcher.shards import make_bytes, make_model, tree

from blt_data import ShardDirectory, ShardKind
from blt_patcher import EntropyCombinedScheme, scheme_from_json

#: Makes the directory `patched`.
PATCH = ["precompute", "bytes", "--output", "patched", "--scheme", "space", "--max-patch-length", "6"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with byte shards, a patched directory, and models sound and otherwise."""
    path = tmp_path_factory.mktemp("cli")
    make_bytes(path / "bytes")
    damaged = make_bytes(path / "damaged")
    file = damaged.path / "shard-00002.arrow"
    data = bytearray(file.read_bytes())
    data[data.index(b"patch ") + 2] ^= 1
    file.write_bytes(bytes(data))
    truncated = make_bytes(path / "truncated").path / "shard-00001.arrow"
    truncated.write_bytes(truncated.read_bytes()[:-50])
    make_model(path / "model")
    make_model(path / "broken", broken=True)
    make_model(path / "blt", preset_name="blt-debug")
    (path / "file").write_text("no directory")
    done = blt_patch_here(path, *PATCH)
    assert done.returncode == 0, done.stderr
    return path


def test_precompute_without_a_model_tells_what_it_did(place: Path) -> None:
    done = blt_patch(place, *PATCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert "space, max_patch_length 6" in done.stdout
    assert "of these already there" in done.stdout
    assert ShardDirectory.open(place / "patched", kind=ShardKind.PATCHED, verify=True).manifest.documents > 0


def test_stats_shows_a_table_and_a_histogram(place: Path) -> None:
    done = blt_patch_here(place, "stats", "patched")
    assert (done.returncode, done.stderr) == (0, "")
    assert "mean patch length" in done.stdout
    assert "█" in done.stdout
    figures = json.loads(blt_patch_here(place, "stats", "patched", "--json").stdout)
    manifest = ShardDirectory.open(place / "patched").manifest
    assert figures["patches"] == manifest.patches
    assert figures["tokens"] == manifest.bytes + 2 * manifest.documents
    assert figures["longest"] == 6


def test_calibrate_and_precompute_find_the_same_threshold(place: Path) -> None:
    options = ["--entropy-model", "model", "--target-patch-length", "2.5", "--scheme", "entropy-combined"]
    options += ["--relative-threshold", "-0.01", "--device", "cpu", "--sample-bytes", "3000"]
    told = blt_patch_here(place, "calibrate", "bytes", *options, "--json")
    assert (told.returncode, told.stderr) == (0, "")
    found = json.loads(told.stdout)
    assert abs(found["calibration"]["mean_patch_length"] - 2.5) < 0.1
    assert found["calibration"]["sample"]["bytes"] <= 3000
    assert found["scheme"]["threshold"] in [point["threshold"] for point in found["curve"]]
    done = blt_patch_here(place, "precompute", "bytes", "--output", "calibrated", *options)
    assert (done.returncode, done.stderr) == (0, "")
    provenance = ShardDirectory.open(place / "calibrated").manifest.provenance
    assert provenance["scheme"] == found["scheme"]
    assert isinstance(scheme_from_json(found["scheme"]), EntropyCombinedScheme)
    assert provenance["calibration"] == found["calibration"]


E = ["--entropy-model", "model"]
BAD_INPUT = {
    "missing directory": (["stats", "nowhere"], "nowhere: no such directory"),
    "byte shards where patched ones are meant": (["stats", "bytes"], "bytes: holds shards of kind bytes"),
    "patched shards where byte ones are meant": (
        ["precompute", "patched", "--output", "out", "--scheme", "byte"],
        "patched: holds shards of kind patched",
    ),
    "a file": (["calibrate", "file", *E, "--target-patch-length", "4"], "file: is a file"),
    "flipped byte": (["precompute", "damaged", "--output", "out", "--scheme", "byte"], "does not have the checksum"),
    "truncated shard": (["precompute", "truncated", "--output", "out", "--scheme", "byte"], "shard-00001.arrow: has"),
    "unwritable output": (["precompute", "bytes", "--output", "file/out", "--scheme", "byte"], "Not a directory"),
    "output is a file": (["precompute", "bytes", "--output", "file", "--scheme", "byte"], "file: is a file"),
    "output is the input": (["precompute", "bytes", "--output", "bytes", "--scheme", "byte"], "byte shards themselves"),
    "other parameters": (
        ["precompute", "bytes", "--output", "patched", "--scheme", "space"],
        "made with other parameters (scheme.max_patch_length is 6 there and none here)",
    ),
    "no scheme": (["precompute", "bytes", "--output", "out"], "no patch scheme is chosen"),
    "no model": (["precompute", "bytes", "--output", "out", "--threshold", "1"], "name an entropy model"),
    "needless model": (
        ["precompute", "bytes", "--output", "out", "--scheme", "space", *E],
        "scheme space reads no entropies",
    ),
    "needless device": (
        ["precompute", "bytes", "--output", "out", "--scheme", "space", "--device", "cpu"],
        "are for an entropy model",
    ),
    "needless check of batchings": (
        ["precompute", "bytes", "--output", "out", "--scheme", "byte", "--check-batching", "1MB"],
        "--check-batching scores documents, so it needs --entropy-model",
    ),
    **{
        f"{flag} that is no number": (
            ["precompute", "bytes", "--output", "out", "--scheme", "byte", "--executor", "ray", flag, "nan"],
            f"{flag} is nan; it must be a finite number",
        )
        for flag in ("--num-gpus", "--num-cpus", "--ray-timeout")
    },
    "threshold and target": (
        ["precompute", "bytes", "--output", "out", *E, "--threshold", "1", "--target-patch-length", "4"],
        "leaves none to find",
    ),
    "impossible limit": (
        ["precompute", "bytes", "--output", "out", "--scheme", "byte", "--max-patch-length", "0"],
        "max_patch_length of scheme byte is 0",
    ),
    "broken model": (
        ["precompute", "bytes", "--output", "out", "--entropy-model", "broken", "--threshold", "1"],
        "the entropy model gives nan",
    ),
    "model of another architecture": (
        ["calibrate", "bytes", "--entropy-model", "blt", "--target-patch-length", "4"],
        "blt: is a blt model",
    ),
    "missing model": (
        ["calibrate", "bytes", "--entropy-model", "no", "--target-patch-length", "4"],
        "no: no such model directory",
    ),
    "impossible target": (["calibrate", "bytes", *E, "--target-patch-length", "0.5"], "0.5 is impossible"),
}


@pytest.mark.parametrize(("arguments", "sentence"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_gets_one_sentence(place: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    before = tree(place / "patched")
    done = blt_patch_here(place, *(str(tmp_path / "out") if word == "out" else word for word in arguments))
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert tree(place / "patched") == before


def test_help_has_examples_and_needs_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from blt_patcher.cli import main\n"
        "for words in ([], *([name] for name in main.commands)):\n"
        "    result = CliRunner().invoke(main, [*words, '--help']); print(result.output)\n"
        "    assert result.exit_code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    for command in ("calibrate", "precompute", "repatch", "stats", "compare"):
        assert f"blt-patch {command} data/" in told
    assert 'blt-patch show --text "' in told
