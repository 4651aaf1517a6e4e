"""Killed anywhere and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.blt_train.samples import assert_same_run, blt_config, byte_config, command

from blt_train import evaluation, generate, load_config, read_metrics, train
from blt_train.checkpoint import read_trainer_state
from blt_train.errors import CheckpointError, ConfigError
from blt_train.metrics import EvaluationMetrics, MetricsWriter, to_line
from blt_train.stopping import stop_on_signals

HELPER = Path(__file__).with_name("killed.py")


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a running training has written so many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"training ended early: {process.communicate()}")
        if (run / "metrics.jsonl").exists() and len(read_metrics(run)[0]) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("training took no steps")


def start(config: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("launch", config, *overrides), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("kind", ["bytes", "patched"])
def test_killed_at_file_operations(kind: str, workplace: Path) -> None:
    points = range(1, 50, 6) if kind == "bytes" else (20, 33, 47)
    arguments = [
        "launch",
        "debug-entropy" if kind == "bytes" else "debug-blt",
        f"data.train={workplace / kind}",
        f"data.holdout={workplace / kind}-holdout",
        "schedule.total_steps=6",
        "checkpoint.every=2",
        "checkpoint.keep_last=1",
        "evaluation.every=3",
    ]
    done = subprocess.run(
        [sys.executable, str(HELPER), ",".join(map(str, points)), str(workplace / "run"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    operations = int(done.stdout.split()[-1])
    # The points lie among those of the run: checkpoints, their clean-up and the metrics in between.
    assert points[len(points) // 2] < operations
    assert len(read_metrics(workplace / "run-whole")[0]) == 6
    for point in points:
        assert_same_run(workplace / f"run-{point}", workplace / "run-whole")
        names = {path.name for path in (workplace / f"run-{point}" / "checkpoints").iterdir()}
        assert names == {"step-00000006"}


def test_killed_from_outside(workplace: Path) -> None:
    overrides = ["schedule.total_steps=150", "checkpoint.every=7", f"data.holdout={workplace / 'bytes-holdout'}"]
    process = start("debug-entropy", f"run={workplace / 'killed'}", f"data.train={workplace / 'bytes'}", *overrides)
    wait_for_steps(workplace / "killed", 10, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    result = train(byte_config(workplace, "killed", *overrides))
    assert result.is_finished
    train(byte_config(workplace, "whole", *overrides))
    assert_same_run(workplace / "killed", workplace / "whole")


def test_sigterm_saves_then_stops(workplace: Path) -> None:
    overrides = ["schedule.total_steps=70", "checkpoint.every=1000"]
    process = start("debug-blt", f"run={workplace / 'stopped'}", f"data.train={workplace / 'patched'}", *overrides)
    wait_for_steps(workplace / "stopped", 3, process)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM after step" in told
    step = len(read_metrics(workplace / "stopped")[0])
    assert (workplace / "stopped" / "latest").resolve().name == f"step-{step:08d}"
    assert step < 70
    train(blt_config(workplace, "stopped", *overrides))
    train(blt_config(workplace, "whole", *overrides))
    assert_same_run(workplace / "stopped", workplace / "whole")


def test_a_signal_before_the_first_step_ends_at_once(workplace: Path) -> None:
    """On a resumed run too: nothing was done since the checkpoint."""
    arguments = ["debug-entropy", f"run={workplace / 'run'}", f"data.train={workplace / 'bytes'}"]
    train(byte_config(workplace, "run", "schedule.total_steps=4", "checkpoint.every=2"))
    latest = workplace / "run" / "latest"
    latest.unlink()
    latest.symlink_to("checkpoints/step-00000002")
    script = (
        "import os, signal, sys; from blt_train import trainer; from blt_train.cli import main;"
        "original = trainer.load_for_resume;"
        "trainer.load_for_resume = lambda *given: (os.kill(os.getpid(), signal.SIGUSR1), original(*given))[1];"
        "main(sys.argv[1:])"
    )
    command_line = [sys.executable, "-c", script, "launch", *arguments, "schedule.total_steps=4", "checkpoint.every=2"]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGUSR1 before its first step; run the same command again" in done.stderr
    assert latest.readlink() == Path("checkpoints/step-00000002")
    assert train(byte_config(workplace, "run", "schedule.total_steps=4", "checkpoint.every=2")).is_finished


def test_a_signal_interrupts_an_evaluation_which_is_done_anew(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["schedule.total_steps=6", "evaluation.every=3", "checkpoint.every=100", "data.sequence_tokens=32"]
    overrides += ["batch.sequences_per_micro_batch=1", f"data.holdout={workplace / 'bytes-holdout'}"]
    whole = train(byte_config(workplace, "whole", *overrides))
    original = evaluation._token_nll

    def interrupted(*arguments: Any) -> torch.Tensor:
        if len(read_metrics(workplace / "run")[0]) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_token_nll", interrupted)
        stopped = train(byte_config(workplace, "run", *overrides))
    assert (stopped.step, stopped.exit_status) == (3, 143)
    assert [item.step for item in stopped.evaluations] == [0]
    assert train(byte_config(workplace, "run", *overrides)).steps[-1].loss == whole.steps[-1].loss
    assert_same_run(workplace / "run", workplace / "whole")


def test_checkpoints_of_the_first_format_are_read_but_not_resumed(workplace: Path) -> None:
    result = train(blt_config(workplace, "run", "schedule.total_steps=2"))
    path = result.checkpoint / "trainer.json"
    state = json.loads(path.read_text())
    (source,) = state["data"]["sources"].values()
    new = ("processes", "nonfinite_steps", "nonfinite_in_row")
    old = {key: value for key, value in state.items() if key not in new}
    old["data"] = {"kind": "patched", "fingerprint": source["fingerprint"], "provenance": source["provenance"]}
    path.write_text(json.dumps(old | {"format_version": 1}))
    assert len(bytes(generate(workplace / "run", b"a", max_new_bytes=3))) <= 3
    with pytest.raises(CheckpointError, match=r"was written by an earlier version of blt-train.*choose another run="):
        train(blt_config(workplace, "run", "schedule.total_steps=2"))
    path.write_text(json.dumps(state | {"format_version": 3}))
    with pytest.raises(CheckpointError, match="has format version 3, this blt-train reads 1 and 2"):
        train(blt_config(workplace, "run", "schedule.total_steps=2"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fingerprint", "0" * 64, "was trained on other data than .*fingerprint 000000000000, here "),
        ("weight", 0.5, r"was trained with the weight 0\.5 of the source .*, here it is 1"),
        (
            "provenance",
            {"scheme": {"scheme": "byte"}},
            "was trained on other data than .* of scheme .*byte.* where here",
        ),
    ],
)
def test_other_data_is_refused_with_what_differs(workplace: Path, key: str, value: object, words: str) -> None:
    result = train(blt_config(workplace, "run", "schedule.total_steps=2"))
    path = result.checkpoint / "trainer.json"
    state = json.loads(path.read_text())
    (source,) = state["data"]["sources"].values()
    source[key] = value
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=words):
        train(blt_config(workplace, "run", "schedule.total_steps=2"))


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ("model", r"model\.safetensors: is of the save step-00000004, but trainer\.json of step-00000002, so the dir"),
        ("optimizer", r"optimizer\.safetensors: is of the save step-00000004, but trainer\.json of step-00000002"),
        ("ema", r"ema\.safetensors: is of the save step-00000004, but trainer\.json of step-00000002"),
        ("trainer", r"model\.safetensors: is of the save step-00000002, but trainer\.json of step-00000004"),
        ("step", r"trainer\.json: is of the save step-00000002, but says step 4, so it was changed"),
        ("step, unnamed", r"model\.safetensors: is of the save step-00000002, but trainer\.json of step-00000004"),
    ],
)
def test_files_of_two_checkpoints_are_refused(workplace: Path, mix: str, words: str) -> None:
    overrides = ["schedule.total_steps=4", "checkpoint.every=2", "optimizer.ema_decay=0.9"]
    newest = train(byte_config(workplace, "run", *overrides)).checkpoint
    early = newest.with_name("step-00000002")
    path = early / "trainer.json"
    if mix.startswith("step"):
        state = json.loads(path.read_text()) | {"step": 4}
        path.write_text(json.dumps(state if mix == "step" else state | {"save": None}))
    else:
        name = "trainer.json" if mix == "trainer" else f"{mix}.safetensors"
        shutil.copy(newest / name, early / name)
    latest = workplace / "run" / "latest"
    latest.unlink()
    latest.symlink_to("checkpoints/step-00000002")
    mend = r".*point latest to one in checkpoints/ \(ln -sfn checkpoints/step-00000004 .*/latest\)"
    with pytest.raises(CheckpointError, match=words + mend):
        train(byte_config(workplace, "run", *overrides))
    with pytest.raises(CheckpointError, match=words):
        evaluation.evaluate(early, workplace / "bytes", device="cpu")
    latest.unlink()
    latest.symlink_to("checkpoints/step-00000004")
    assert train(byte_config(workplace, "run", *overrides)).is_finished


def test_checkpoints_of_a_version_that_named_no_save_are_resumed(workplace: Path) -> None:
    checkpoint = train(byte_config(workplace, "run", "schedule.total_steps=2")).checkpoint
    for path in checkpoint.glob("*.safetensors"):
        # Of the same length, so that the rest of the file stays where it is.
        path.write_bytes(path.read_bytes().replace(b"blt_model.save", b"something.else"))
    state = json.loads((checkpoint / "trainer.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is of an unnamed save, but .* no other checkpoint"):
        read_trainer_state(checkpoint)
    (checkpoint / "trainer.json").write_text(json.dumps({key: state[key] for key in state if key != "save"}))
    assert train(byte_config(workplace, "run", "schedule.total_steps=2")).is_finished


def test_a_run_that_is_a_file_and_a_warm_up_beyond_the_end(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    (workplace / "afile").touch()
    with pytest.raises(ConfigError, match=r"run: .*afile is a file, not a directory"):
        train(byte_config(workplace, "afile"))
    train(byte_config(workplace, "run", "schedule.total_steps=1", "schedule.warmup_steps=2"))
    assert "schedule.warmup_steps (2) is more than schedule.total_steps (1)" in caplog.text


@pytest.mark.parametrize("lost", ["missing", "directory", "file"])
def test_checkpoints_survive_the_loss_of_latest(workplace: Path, lost: str) -> None:
    """Copying a run may drop its link, or put a copy in its place: the checkpoints themselves must stay."""
    overrides = ["schedule.total_steps=4", "checkpoint.every=2"]
    before = train(byte_config(workplace, "run", *overrides))
    latest = workplace / "run" / "latest"
    kept = {path: path.stat().st_mtime_ns for path in (workplace / "run" / "checkpoints").rglob("*")}
    latest.unlink()
    if lost == "directory":
        shutil.copytree(workplace / "run" / "checkpoints" / "step-00000004", latest)
    elif lost == "file":
        latest.touch()
    if lost != "missing":
        with pytest.raises(CheckpointError, match=r"latest: is no symbolic link.*delete it to go on"):
            train(byte_config(workplace, "run", *overrides))
    else:
        assert train(byte_config(workplace, "run", *overrides)) == before
    assert {path: path.stat().st_mtime_ns for path in (workplace / "run" / "checkpoints").rglob("*")} == kept


def test_other_files_among_the_checkpoints_stay(workplace: Path) -> None:
    train(byte_config(workplace, "run", "schedule.total_steps=4", "checkpoint.every=2"))
    folder = workplace / "run" / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / "step-best")
    (folder / "step-notes.txt").write_text("my notes")
    train(byte_config(workplace, "run", "schedule.total_steps=4", "checkpoint.every=1", "checkpoint.keep_last=1"))
    (folder / "step-00000005").mkdir()
    train(byte_config(workplace, "run", "schedule.total_steps=4"))
    assert {path.name for path in folder.iterdir()} == {
        "step-00000004",
        "step-best",
        "step-notes.txt",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"processes": None},
        {"nonfinite_steps": 1.5},
        {"data": {"kind": "bytes", "sources": {}}},
        {"step": "x"},
        {"step": -1},
        {"step": True},
        {"config": None},
        {"config": {}},
        {"data": []},
        {"data": {}},
        {"data": {"kind": "bytes", "sources": {"a": {"fingerprint": 3, "provenance": {}, "weight": 1.0}}}},
        {"data": {"kind": "bytes", "sources": {"a": {"fingerprint": "f", "provenance": [], "weight": 1.0}}}},
        {"entropy_model": 5},
        {"packages": "x"},
    ],
)
def test_trainer_state_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    state: dict[str, object] = {
        "format_version": 2,
        "step": 3,
        "processes": 4,
        "nonfinite_steps": 1,
        "nonfinite_in_row": 0,
        "config": {"data": {"sequence_tokens": 16}},
        "data": {"kind": "bytes", "sources": {"a": {"fingerprint": "f", "provenance": {}, "weight": 1.0}}},
        "entropy_model": None,
        "packages": {},
    }
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps(state))
    assert read_trainer_state(tmp_path).step == 3
    path.write_text(json.dumps(state | changes))
    with pytest.raises(CheckpointError, match=r"trainer\.json: is damaged"):
        read_trainer_state(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"trainer\.json: is damaged"):
        read_trainer_state(tmp_path)


def evaluation_metrics() -> EvaluationMetrics:
    return EvaluationMetrics(
        step=0,
        holdout_bpb=1.0,
        holdout_loss=1.0,
        holdout_bytes=1,
        holdout_documents=1,
        holdout_bpb_by_source=None,
        holdout_seconds=1.0,
    )


@pytest.mark.parametrize("line", ["x", "[]", "3", "{}", "[" * 100_000, '{"step": "x"}', '{"holdout_bpb": true}'])
def test_line_that_is_no_metrics_is_named(tmp_path: Path, line: str) -> None:
    good = evaluation_metrics()
    names = [field.name for field in dataclasses.fields(EvaluationMetrics)]
    if line.startswith("{") and line != "{}":
        line = json.dumps({name: getattr(good, name) for name in names} | json.loads(line))
    (tmp_path / "metrics.jsonl").write_text(to_line(good) + line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is no metrics line"):
        read_metrics(tmp_path)


def test_training_draws_no_random_numbers(workplace: Path) -> None:
    """So a checkpoint needs no generator's state."""
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state(legacy=False))
    first = train(blt_config(workplace, "run", "schedule.total_steps=3"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state(legacy=False))) == before[1:]
    torch.manual_seed(6)
    second = train(blt_config(workplace, "other", "schedule.total_steps=3"))
    assert [item.loss for item in first.steps] == [item.loss for item in second.steps]


def test_config_of_the_run_resumes_it(workplace: Path) -> None:
    result = train(byte_config(workplace, "run", "schedule.total_steps=4"))
    assert train(load_config(workplace / "run" / "config.yaml")) == result


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk for tests")
def test_full_disk_names_the_metrics_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = evaluation_metrics()
    with pytest.raises(OSError, match="No space left on device") as caught, MetricsWriter(tmp_path) as writer:
        writer.write(metrics)
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("scheme", [None, [], {"scheme": "nope"}])
def test_checkpoint_without_a_patch_scheme_generates_nothing(workplace: Path, scheme: object) -> None:
    checkpoint = train(blt_config(workplace, "run", "schedule.total_steps=1")).checkpoint
    state = json.loads((checkpoint / "trainer.json").read_text())
    (source,) = state["data"]["sources"].values()
    source["provenance"]["scheme"] = scheme
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"trainer\.json: names no patch scheme"):
        generate(workplace / "run", b"a")


@pytest.mark.parametrize("is_dead", [False, True])
def test_a_hangup_saves_then_stops(is_dead: bool, workplace: Path) -> None:
    """Also where the terminal is gone, so that nothing can be told any more."""
    arguments = ["debug-entropy", f"run={workplace / 'run'}", f"data.train={workplace / 'bytes'}"]
    outside, inside = pty.openpty()
    # The tests themselves may run under nohup, which a child would inherit.
    lead = (
        "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "fcntl.ioctl(2, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", lead, *command("launch", *arguments, "schedule.total_steps=5000")],
        stdin=subprocess.DEVNULL,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    reader = threading.Thread(target=_drain, args=(outside,), daemon=True)
    if not is_dead:
        reader.start()
    deadline = time.monotonic() + 120
    while not (workplace / "run" / "metrics.jsonl").exists() or len(read_metrics(workplace / "run")[0]) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if is_dead:
        os.close(outside)  # which hangs up
    else:
        process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 143
    step = len(read_metrics(workplace / "run")[0])
    assert (workplace / "run" / "latest").resolve().name == f"step-{step:08d}"


def _drain(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 65536):
            pass


@pytest.mark.parametrize(("number", "status"), [("SIGUSR1", 75), ("SIGTERM", 143), ("SIGHUP", 143)])
def test_a_signal_while_torch_is_loaded_ends_at_once(number: str, status: int) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'torch': os.kill(os.getpid(), signal.{number})\n"
        "from blt_train.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "sys.meta_path.insert(0, Finder())\n"
        "main(['launch', 'debug-entropy'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (status, f"stopped by {number}; run the same command again to go on\n")


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.is_asked
    finally:
        signal.signal(signal.SIGHUP, before)
