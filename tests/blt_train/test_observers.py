"""TensorBoard and Weights & Biases told for real, read back, resumed, and failing without harm."""

from __future__ import annotations

import importlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.blt_train.records import evaluation_of, step_of

from blt_train import ConfigError
from blt_train.config import LoggingConfig, WandbMode
from blt_train.metrics import Metrics
from blt_train.observers import BackgroundObserver, Record, check_observers, choice, open_observers
from blt_train.observers.protocol import scalars_of
from blt_train.observers.weights_and_biases import STATE_NAME
from blt_train.samples import sample_of

CONFIG = {"run": "r", "optimizer": {"learning_rate": 0.1}}
SAMPLE = sample_of(2, 0, "The ", b"moon <b>", "length")


def tell(logging_config: LoggingConfig, run: Path, records: list[Record], *, first_step: int = 1) -> None:
    """What one launch tells."""
    observers = open_observers(logging_config, run, CONFIG, first_step=first_step)
    assert observers
    for record in records:
        for observer in observers:
            observer.observe(record)
    for observer in observers:
        observer.close()


def test_scalars_have_dashboard_names() -> None:
    step = scalars_of(step_of(2, sources={"web": 0.25}, loss=float("nan")))
    assert step["train/bpb"] == 3.6
    assert step["speed/seconds"] == 0.5
    assert step["data/sources/web"] == 0.25
    # Neither the step, nor what is null or not finite.
    assert not {"train/step", "speed/mfu", "train/loss"} & step.keys()
    assert scalars_of(evaluation_of(2, 7.0, {"wiki": 8.0}))["holdout/bpb_by_source/wiki"] == 8.0


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LoggingConfig(tensorboard=True)
    first: list[Record] = [evaluation_of(0, 8.0), step_of(1), step_of(2), evaluation_of(2, 7.0), SAMPLE, step_of(3)]
    tell(config, tmp_path, [*first, step_of(4)])
    # The checkpoint was of step 2: what was told of 3 and 4 is void.
    tell(config, tmp_path, [step_of(3, bpb=0.5), step_of(4), step_of(5)], first_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/bpb")] == [1, 2, 3, 4, 5]
    assert events.Scalars("train/bpb")[2].value == pytest.approx(0.5)
    assert [(event.step, event.value) for event in events.Scalars("holdout/bpb")] == [(0, 8.0), (2, 7.0)]
    (text,) = events.Tensors("sample/0/text_summary")
    assert text.tensor_proto.string_val == [b"    The moon <b>\n"]
    assert b"learning_rate: 0.1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert not [record for record in caplog.records if record.name.startswith("blt_train")]


def test_tensorboard_after_a_crash_before_any_checkpoint(tmp_path: Path) -> None:
    config = LoggingConfig(tensorboard=True)
    (observer,) = open_observers(config, tmp_path, CONFIG, first_step=1)
    for record in (evaluation_of(0, 8.0), step_of(1), step_of(2)):
        observer.observe(record)
    observer.flush()
    deadline = time.monotonic() + 60
    while not any(b"train/bpb" in path.read_bytes() for path in tmp_path.glob("tensorboard/events*")):
        assert time.monotonic() < deadline  # flushed, though nobody has closed it
        time.sleep(0.02)
    tell(config, tmp_path, [evaluation_of(0, 8.0), step_of(1)])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/bpb")] == [1]
    assert [event.step for event in events.Scalars("holdout/bpb")] == [0]
    observer.close()


def wandb_messages(file: Path) -> Iterator[bytes]:
    """Messages of an offline run's file: a header of 7 bytes, then a LevelDB log of blocks of 32 KiB."""
    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # too little is left of the block for another header
            continue
        size, part = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # a whole message, or the last part of one
            yield message
            message = b""


def wandb_records(file: Path) -> list[Any]:
    """Records of an offline run, which wandb's own process may still be writing when the run has finished."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    deadline = time.monotonic() + 60
    while True:
        records = [messages.Record.FromString(message) for message in wandb_messages(file)]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wandb_history(run: Path) -> Iterator[dict[str, Any]]:
    """Rows of the history in all offline files of a run."""
    for file in run.glob("wandb/offline-run-*/run-*.wandb"):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_offline_is_told_each_step_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LoggingConfig(wandb=WandbMode.OFFLINE, wandb_project="tests")
    told: list[Record] = [evaluation_of(0, 8.0), step_of(1), step_of(2), evaluation_of(2, 7.0), SAMPLE, step_of(3)]
    tell(config, tmp_path, told)
    identifier = json.loads((tmp_path / STATE_NAME).read_text(encoding="utf-8"))["id"]
    tell(config, tmp_path, [step_of(3), evaluation_of(3, 6.0), step_of(4)], first_step=3)
    rows = list(wandb_history(tmp_path))
    steps = [row["_step"] for row in rows if "train/bpb" in row]
    assert sorted(steps) == [1, 2, 3, 4]
    assert {row["_step"]: row["holdout/bpb"] for row in rows if "holdout/bpb" in row} == {0: 8.0, 2: 7.0, 3: 6.0}
    assert [row["_step"] for row in rows if any(key.startswith("sample/0") for key in row)] == [2]
    # Both launches belong to one run; one that begins anew does not.
    names = [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert names == [f"run-{identifier}.wandb"] * 2
    tell(config, tmp_path, [step_of(1)])
    assert json.loads((tmp_path / STATE_NAME).read_text(encoding="utf-8"))["id"] != identifier
    assert not caplog.records


class Failing:
    """An observer whose second record is one too many."""

    def __init__(self) -> None:
        self.seen: list[Record] = []

    def observe(self, record: Record) -> None:
        if self.seen:
            raise OSError("no space left")
        self.seen.append(record)

    def flush(self) -> None:
        raise AssertionError("a failed observer is left alone")

    def close(self) -> None:
        raise AssertionError("a failed observer is left alone")


def test_a_failing_observer_warns_once_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing()
    observer = BackgroundObserver("Dashboard", lambda: failing)
    records: list[Metrics] = [step_of(number) for number in range(1, 50)]
    for record in records:
        observer.observe(record)
    observer.flush()
    observer.close()
    assert failing.seen == records[:1]
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "Dashboard failed (OSError: no space left): it is told no more of this run" in warning.getMessage()


def test_an_observer_that_cannot_be_made_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Failing:
        raise RuntimeError("no login")

    observer = BackgroundObserver("Dashboard", make, queue_length=3)
    for number in range(1, 20):
        observer.observe(step_of(number))
    observer.close()
    assert len(caplog.records) == 1


def test_a_hanging_observer_does_not_hold_the_run_up(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    class Hanging:
        def observe(self, record: Record) -> None:
            released.wait()

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    observer = BackgroundObserver("Dashboard", Hanging, queue_length=5, close_seconds=0.05)
    for number in range(1, 20):
        observer.observe(step_of(number))
    observer.close()
    released.set()
    (warning,) = caplog.records
    assert "Dashboard is 5 records behind" in warning.getMessage()


def test_a_missing_package_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_observers(LoggingConfig(tensorboard=True, wandb=WandbMode.ONLINE))
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    check_observers(LoggingConfig())
    with pytest.raises(
        ConfigError, match=r"run pip install 'blt-train\[tensorboard\]', or set logging.tensorboard=false"
    ):
        check_observers(LoggingConfig(tensorboard=True))
    # A folder of that name, such as Weights & Biases leaves in the working directory, is no package.
    monkeypatch.setattr(choice, "find_spec", lambda name: ModuleSpec(name, None, is_package=True))
    with pytest.raises(ConfigError, match=r"logging.wandb is offline, but the package wandb is not installed"):
        check_observers(LoggingConfig(wandb=WandbMode.OFFLINE))
