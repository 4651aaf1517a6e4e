"""The whole road, from files of text to a trained model and a report, through the programs that users call."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blt_data import Shard, ShardDirectory
from blt_train import read_metrics

STEPS = 4
WORDS = ["the patch", "of bytes that", "a model reads", "is long where", "text is easy", "and é", "or 日本", "come by"]


def write_texts(directory: Path) -> Path:
    """Forty text files of about 1 kB."""
    directory.mkdir()
    generator = random.Random(0)
    for number in range(40):
        text = " ".join(generator.choices(WORDS, k=90)) + "\n"
        (directory / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return directory


def quickstart(source: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "blt_train", "quickstart", "--source", str(source), "--output", str(output),
        "--limit-bytes", "40kB", "--entropy-steps", str(STEPS), "--blt-steps", str(STEPS), "--prompt", "the é",
    ]  # fmt: skip


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def contents(output: Path) -> dict[str, str]:
    """Checksums of what must not depend on how often a run was killed."""
    files = [*output.rglob("*.arrow"), *output.rglob("manifest.json"), *output.rglob("*.safetensors")]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("source") / "texts")


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run, and what it printed."""
    output = tmp_path_factory.mktemp("quickstart") / "run"
    outcome = run(quickstart(source, output))
    assert outcome.returncode == 0, outcome.stderr
    return output, outcome.stdout


def test_it_ends_with_figures_a_report_and_text(finished: tuple[Path, str]) -> None:
    output, printed = finished
    for figure in ("entropy LM, held-out BPB", "threshold", "mean patch length", "BLT, held-out BPB after training"):
        assert figure in printed
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert "blt-patch precompute" in page
    assert (output / "sample.txt").read_bytes().startswith("the é".encode())
    steps, evaluations = read_metrics(output / "blt")
    assert len(steps) == STEPS
    assert evaluations[-1].holdout_bpb < evaluations[0].holdout_bpb


def test_the_shards_hold_the_files(finished: tuple[Path, str], source: Path) -> None:
    shards = ShardDirectory.open(finished[0] / "patches" / "train", verify=True)
    opened: list[Shard] = [shards.shard(index) for index in range(len(shards))]
    documents = {shard.document_id(row): shard.content(row).tobytes() for shard in opened for row in range(len(shard))}
    texts = {path.name: path.read_bytes() for path in source.iterdir()}
    assert len(documents) > 20
    for name, content in documents.items():
        assert content == texts[Path(name.split("#")[0]).name]


def test_a_second_run_keeps_what_is_there(finished: tuple[Path, str], source: Path) -> None:
    output, printed = finished
    before = contents(output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    outcome = run(quickstart(source, output))
    assert outcome.returncode == 0, outcome.stderr
    assert "already complete" in outcome.stderr
    assert contents(output) == before
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == times
    figures = printed.split("Report:")[0].splitlines()[-12:]
    assert figures[-5:] == outcome.stdout.split("Report:")[0].splitlines()[-12:][-5:]


def test_killed_again_and_again_it_ends_the_same(finished: tuple[Path, str], source: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    marks = ["bytes/train/manifest.json", "entropy/metrics.jsonl", "patches/train", "blt/metrics.jsonl"]
    log = tmp_path / "log"
    for mark in marks:
        with log.open("w") as file:
            process = subprocess.Popen(
                quickstart(source, output), stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not (output / mark).exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        time.sleep(random.Random(mark).random())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    outcome = run(quickstart(source, output))
    assert outcome.returncode == 0, outcome.stderr
    assert contents(output) == contents(finished[0])


def test_baselines_are_added_to_a_finished_run(finished: tuple[Path, str], source: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output, symlinks=True)
    outcome = run([*quickstart(source, output), "--baselines"])
    assert outcome.returncode == 0, outcome.stderr
    assert "static-patch baseline, held-out BPB" in outcome.stdout
    assert "equal training operations" in outcome.stdout
    kept = contents(finished[0])
    assert {name: digest for name, digest in contents(output).items() if name in kept} == kept
    # A byte-level step costs less than a BLT step, so equal operations pay for more of them.
    assert len(read_metrics(output / "byte")[0]) > len(read_metrics(output / "static")[0]) >= STEPS - 1
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Byte-level baseline" in page
    assert "BLT, static patches" in page


def test_bad_options_get_one_sentence(tmp_path: Path) -> None:
    outcome = run(quickstart(tmp_path / "nowhere", tmp_path / "run"))
    assert outcome.returncode == 1
    assert "nowhere" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "run" / "report.html").exists()
