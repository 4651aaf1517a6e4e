"""Calibrate from stored entropies, repatch, show, compare, stats: what the commands print and write, and refuse."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.blt_patcher.patched import HashScorer, make_patched
from tests.blt_patcher.running import blt_patch_here
from tests.blt_patcher.shards import EXECUTABLE, make_bytes, make_model, tree
from tests.blt_patcher.test_figures import Columns

from blt_data import ShardDirectory
from blt_patcher import EntropyScheme, SpaceScheme, patch_document, scheme_from_json
from blt_patcher.repatch import repatch
from blt_patcher.scheme_file import read_scheme_file, scheme_file_to_json, write_scheme_file

TEXT = "Größe 中文 हिन्दी 👩🏽‍🚀 العربية\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patched directories with entropies (`stored`) and without (`space`), a model, and files that are neither."""
    path = tmp_path_factory.mktemp("commands")
    stored = make_patched(path / "stored", EntropyScheme(threshold=1.5), seed=4)
    repatch(stored, path / "space", scheme=SpaceScheme(), keep_entropies=False)
    make_bytes(path / "bytes", shards=[[TEXT.encode(), b"\xff\x00 other"]])
    make_bytes(path / "empty", shards=[[]])
    make_model(path / "model")
    (path / "file").write_text("no directory")
    (path / "text").write_bytes(TEXT.encode() + b"\xff")
    (path / "huge").touch()
    os.truncate(path / "huge", (64 << 20) + 1)
    write_scheme_file(
        path / "other.json",
        scheme_file_to_json(EntropyScheme(threshold=1.0), entropy_model={"fingerprint": "other"}),
    )
    damaged = make_patched(path / "damaged", SpaceScheme(), seed=6).path / "shard-00000.arrow"
    data = bytearray(damaged.read_bytes())
    data[data.index(b"patch ") + 2] ^= 1
    damaged.write_bytes(bytes(data))
    return path


def run(place: Path, *arguments: str, data: bytes = b"") -> str:
    done = blt_patch_here(place, *arguments, data=data)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_threshold_travels_from_calibrate_to_repatch_and_stats(place: Path, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("curve.html", "curve.png")]
    told = run(
        place, "calibrate", "stored", "--target-patch-length", "3.3", "--max-patch-length", "20", "--output",
        str(tmp_path / "t.json"), "--html", files[0], "--png", files[1],
    )  # fmt: skip
    found = read_scheme_file(tmp_path / "t.json")
    assert isinstance(found.scheme, EntropyScheme)
    assert repr(found.scheme.threshold) in told
    assert found.entropy_model == {"fingerprint": "hash-4", "reset_at_newlines": False}
    assert "Mean patch length by threshold" in Path(files[0]).read_text()
    assert Path(files[1]).read_bytes().startswith(b"\x89PNG")
    as_json = run(place, "calibrate", "stored", "--target-patch-length", "3.3", "--max-patch-length", "20", "--json")
    assert json.loads(as_json) == json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "redirected.json").write_text(as_json)
    told = run(place, "repatch", "stored", "--output", str(tmp_path / "a"), "--scheme-file", str(tmp_path / "t.json"))
    assert re.search(r"scheme +│ +entropy", told)
    run(place, "repatch", "stored", "--output", str(tmp_path / "b"), "--scheme-file", str(tmp_path / "redirected.json"))
    direct = ["--target-patch-length", "3.3", "--max-patch-length", "20", "--workers", "2"]
    run(place, "repatch", "stored", "--output", str(tmp_path / "c"), *direct)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")
    assert ShardDirectory.open(tmp_path / "a").manifest.provenance["calibration"] == found.calibration
    stats = json.loads(run(place, "stats", str(tmp_path / "a"), "--json"))
    assert stats["target"] == 3.3
    assert abs(stats["mean_patch_length"] - 3.3) < 0.2
    assert re.search(r"target patch length +│ +3\.3", run(place, "stats", str(tmp_path / "a")))


def test_the_model_of_a_scheme_file_is_held_to(place: Path, tmp_path: Path) -> None:
    model = ["--entropy-model", "model", "--device", "cpu"]
    out = str(tmp_path / "t.json")
    run(place, "calibrate", "bytes", *model, "--target-patch-length", "2.5", "--output", out)
    run(place, "precompute", "bytes", "--output", str(tmp_path / "a"), *model, "--scheme-file", out)
    told = ShardDirectory.open(tmp_path / "a").manifest.provenance
    found = read_scheme_file(out)
    assert told["calibration"] == found.calibration
    assert isinstance(told["scheme"], dict)
    assert scheme_from_json(told["scheme"]) == found.scheme
    # Entropies of the stored directory come from something else.
    done = blt_patch_here(place, "repatch", "stored", "--output", str(tmp_path / "b"), "--scheme-file", out)
    assert done.returncode == 1
    assert "t.json: holds a threshold for an entropy model with fingerprint" in done.stderr
    run(place, "show", "--text", TEXT, *model, "--scheme-file", out)


def test_drift_is_told_when_patching_and_when_counting(place: Path, tmp_path: Path) -> None:
    record = {"target_patch_length": 40.0}
    content = scheme_file_to_json(EntropyScheme(threshold=1.5), calibration=record)
    write_scheme_file(tmp_path / "t.json", content)
    arguments = ["--output", str(tmp_path / "out"), "--scheme-file", str(tmp_path / "t.json")]
    for words in (["repatch", "stored", *arguments], ["stats", str(tmp_path / "out")]):
        done = blt_patch_here(place, *words)
        assert done.returncode == 0
        assert re.fullmatch(
            r"warning: the mean patch length is [\d.]+, -\d+% from the target of 40 that .*\n", done.stderr
        )
        assert "warning" not in done.stdout


def test_show_prints_patches_and_their_figures(place: Path) -> None:
    out = run(place, "show", "--text", "a b\nc\xff", "--scheme", "static", "--patch-length", "2")
    assert out.startswith("⟨BOS⟩│a │b↵\n│cÿ┊⟨EOS⟩\n")
    assert re.search(r"mean patch length │ +1\.8", out)
    out = run(place, "show", "--file", "-", "--scheme", "byte", data=b"\xff\x00z")
    assert out.startswith("⟨BOS⟩│\\xff│\\x00│z│⟨EOS⟩\n")
    assert "standard input" in out
    # A document as it is stored, and as another threshold would have it.
    shard = ShardDirectory.open(place / "stored").shard(1)
    out = run(place, "show", "--directory", "stored", "--document", "1-2")
    assert out.partition("\n\n")[0].count("│") + out.partition("\n\n")[0].count("┊") == shard.patch_lengths(2).size - 1
    assert "entropy, threshold 1.5" in out
    out = run(place, "show", "--directory", "stored", "--document", "1-2", "--threshold", "0.4")
    nats = HashScorer(4).score_bytes(shard.content(2).tobytes())
    expected = patch_document(EntropyScheme(threshold=0.4), shard.content(2), nats)
    assert f"{expected.size}" in re.findall(r"patches +│ +(\d+)", out)
    out = run(place, "show", "--directory", "stored", "--target-patch-length", "2.6")
    assert float(re.findall(r"mean patch length │ +([\d.]+)", out)[0]) == pytest.approx(2.6, abs=0.3)
    out = run(place, "show", "--directory", "bytes", "--document", "0-1", "--scheme", "space", "--from-byte", "3")
    assert "bytes 3 to 8" in out


def test_show_scores_with_a_model(place: Path) -> None:
    words = ["--entropy-model", "model", "--device", "cpu", "--target-patch-length", "3"]
    assert "mean patch length" in run(place, "show", "--file", "text", *words)
    # With a model and no scheme, the stored scheme is applied to that model's entropies.
    assert "entropy, threshold 1.5" in run(place, "show", "--directory", "stored", "--entropy-model", "model")


def test_a_figure_too_large_to_look_at_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"a" * 100_001)
    page = tmp_path / "page.html"
    words = ["show", "--file", str(tmp_path / "large"), "--scheme", "byte", "--limit", "1MB", "--html", str(page)]
    done = blt_patch_here(tmp_path, *words)
    assert done.returncode == 1
    assert "give --limit 100kB or less" in done.stderr
    assert not page.exists()


def test_figures_of_show_hold_the_bytes_shown(place: Path, tmp_path: Path) -> None:
    names = {kind: tmp_path / f"out.{kind}" for kind in ("html", "svg", "png")}
    words = [word for kind, path in names.items() for word in (f"--{kind}", str(path))]
    run(place, "show", "--file", "text", "--scheme", "space", *words)
    columns = Columns(names["html"].read_text()).columns
    assert bytes(int(column["byte"], 16) for column in columns if "byte" in column) == TEXT.encode() + b"\xff"
    assert names["svg"].read_text().startswith("<svg")
    assert names["png"].read_bytes().startswith(b"\x89PNG")
    run(place, "show", "--directory", "stored", "--document", "2-1", "--html", str(names["html"]))
    columns = Columns(names["html"].read_text()).columns
    nats = [float(column["entropy"]) for column in columns[1:]]
    stored = ShardDirectory.open(place / "stored").shard(2).entropies(1)[:-1]
    np.testing.assert_allclose(nats, stored.astype(np.float64), rtol=1e-5)


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_gets_colours_unless_it_asks_for_none(
    place: Path, environment: dict[str, str], coloured: bool
) -> None:
    master, slave = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    command = [*EXECUTABLE, "show", "--text", "ab cd \x1b[31m", "--scheme", "space"]
    with subprocess.Popen(
        command, cwd=place, stdout=slave, env={**clean, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    ) as job:
        os.close(slave)
        shown = b""
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
    os.close(master)
    assert job.returncode == 0
    text = shown.decode().partition("\r\n\r\n")[0]
    assert ("\x1b[" in text) == coloured
    assert ("│" in text) != coloured
    # The text's own escape sequence never reaches the terminal.
    assert "\x1b[31m" not in text
    assert "\\x1b" in text


def test_colour_can_be_asked_for_and_ruled_out(place: Path) -> None:
    words = ["show", "--text", "ab cd", "--scheme", "space"]
    assert "\x1b[" in run(place, *words, "--color", "always")
    assert "\x1b[" not in run(place, *words, "--color", "never")
    assert "\x1b[" not in run(place, *words)


def test_compare_tells_what_two_patchings_share(place: Path, tmp_path: Path) -> None:
    out = run(place, "compare", "stored", "space", "--html", str(tmp_path / "c.html"), "--examples", "2")
    figures = json.loads(run(place, "compare", "stored", "space", "--json", "--examples", "2"))
    assert f"{100 * figures['jaccard']:.2f}%" in out
    assert f"{figures['a']['mean_patch_length']:.4f}" in out
    assert len(figures["examples"]) == 2
    for example in figures["examples"]:
        assert f"{example['document_id']}: {example['common']:,} boundaries in common" in out
    assert re.search(r"^A  .*│", out, re.MULTILINE)
    assert re.search(r"^B  .*│", out, re.MULTILINE)
    page = Columns((tmp_path / "c.html").read_text())
    assert figures["examples"][0]["document_id"] in page.text
    assert len(page.columns) > 10
    assert "100.00%" in run(place, "compare", "space", "space")


def test_stats_by_group(place: Path) -> None:
    groups = json.loads(run(place, "stats", "stored", "--by-id", "^([0-9])-", "--json"))["groups"]
    assert sorted(groups) == ["0", "1", "2", "3"]
    out = run(place, "stats", "stored", "--by-source")
    assert re.search(r"source-1 +│ +\d+ │", out)
    assert "characters/patch" in out


BAD = {
    "calibrate: no model": (["calibrate", "bytes", "--target-patch-length", "4"], "bytes: holds byte shards, which"),
    "calibrate: none stored": (
        ["calibrate", "space", "--target-patch-length", "4"],
        "space: its shards keep no entrop",
    ),
    "calibrate: nothing there": (["calibrate", "nowhere", "--target-patch-length", "4"], "nowhere: no such directory"),
    "calibrate: unreachable": (["calibrate", "stored", "--target-patch-length", "5000"], "choose a target between"),
    "calibrate: output in a file": (
        ["calibrate", "stored", "--target-patch-length", "4", "--output", "file/t.json"],
        "file/t.json: cannot be written, file is no directory; make it first",
    ),
    "calibrate: output a directory": (
        ["calibrate", "stored", "--target-patch-length", "4", "--output", "bytes"],
        "bytes: is a directory; name a file to write",
    ),
    "repatch: none stored": (["repatch", "space", "--output", "out", "--threshold", "1"], "keeps no entropies, which"),
    "repatch: byte shards": (["repatch", "bytes", "--output", "out", "--scheme", "byte"], "holds shards of kind bytes"),
    "repatch: no scheme": (["repatch", "stored", "--output", "out"], "no patch scheme is chosen"),
    "repatch: scheme twice": (
        ["repatch", "stored", "--output", "out", "--scheme-file", "other.json", "--threshold", "1"],
        "leave --threshold out, or the file",
    ),
    "repatch: another model": (
        ["repatch", "stored", "--output", "out", "--scheme-file", "other.json"],
        "other.json: holds a threshold for an entropy model with fingerprint other, but the one used has hash-4",
    ),
    "repatch: no scheme file": (["repatch", "stored", "--output", "out", "--scheme-file", "text"], "text: is no JSON"),
    "repatch: in place": (
        ["repatch", "stored", "--output", "stored", "--scheme", "byte"],
        "holds the shards to be cut",
    ),
    "repatch: damage": (["repatch", "damaged", "--output", "out", "--scheme", "byte"], "does not have the checksum"),
    "repatch: keep what is not": (
        ["repatch", "space", "--output", "out", "--scheme", "byte", "--entropies", "float16"],
        "has no entropies to keep",
    ),
    "show: nothing": (["show"], "give one of --text, --file and --directory"),
    "show: two": (["show", "--text", "a", "--file", "text"], "give one of --text, --file and --directory"),
    "show: no scheme": (["show", "--text", "a"], "no patch scheme is chosen; give --scheme space"),
    "show: no entropies": (["show", "--text", "a", "--threshold", "1"], "scheme entropy needs entropies; name an"),
    "show: none stored": (["show", "--directory", "space", "--threshold", "1"], "scheme entropy needs entropies"),
    "show: no such file": (["show", "--file", "nowhere", "--scheme", "byte"], "nowhere: No such file"),
    "show: a directory": (["show", "--file", "bytes", "--scheme", "byte"], "bytes: is a directory"),
    "show: a huge file": (["show", "--file", "huge", "--scheme", "byte"], "huge: has more than 64 MiB"),
    "show: no such document": (
        ["show", "--directory", "stored", "--document", "x"],
        "stored: has no document 'x'; its ids are like '0-0' and '3-",
    ),
    "show: document of nothing": (["show", "--text", "a", "--document", "x"], "give that too, or leave it out"),
    "show: no document": (["show", "--directory", "empty", "--scheme", "byte"], "empty: holds no document to show"),
    "show: damage": (["show", "--directory", "damaged"], "does not have the checksum"),
    "show: beyond the end": (["show", "--text", "abc", "--scheme", "byte", "--from-byte", "4"], "text: has no byte 4"),
    "show: device without model": (
        ["show", "--text", "a", "--scheme", "byte", "--device", "cpu"],
        "are for an entropy",
    ),
    "show: figure in a file": (["show", "--text", "a", "--scheme", "byte", "--png", "no/a.png"], "no is no directory"),
    "show: too tall": (
        ["show", "--file", "model/model.safetensors", "--scheme", "byte", "--limit", "45kB", "--png", "a.png"],
        "too tall for a PNG; show fewer bytes, or write HTML or SVG",
    ),
    "show: another model": (
        ["show", "--directory", "stored", "--scheme-file", "other.json"],
        "holds a threshold for an entropy model",
    ),
    "compare: byte shards": (["compare", "stored", "bytes"], "bytes: holds shards of kind bytes"),
    "compare: others": (["compare", "stored", "damaged"], "compare two patchings of the same byte shards"),
    "compare: nothing there": (["compare", "stored", "nowhere"], "nowhere: no such directory"),
    "compare: a file": (["compare", "file", "stored"], "file: is a file"),
    "stats: no expression": (["stats", "stored", "--by-id", "("], "--by-id '(' is no regular expression: missing )"),
    "stats: two groupings": (["stats", "stored", "--by-id", "a", "--by-source"], "ask for one at a time"),
    "stats: damage": (["stats", "damaged"], "does not have the checksum"),
}


@pytest.mark.parametrize(("arguments", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_sentence(place: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    before = tree(place / "stored")
    done = blt_patch_here(place, *(str(tmp_path / "out") if word == "out" else word for word in arguments))
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert tree(place / "stored") == before
    assert not (place / "a.png").exists()
