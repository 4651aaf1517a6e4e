"""Checkpoints: every row once, read on any mesh, complete or absent, and one sentence otherwise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.blt_train.samples import assert_same_tensors, blt_config, section_tensors
from torch import nn

from blt_model import load
from blt_train.checkpoint import (
    RunDirectory,
    Saver,
    Section,
    TrainerState,
    load_optimizer,
    load_section,
    optimizer_tensors,
    package_versions,
    read_trainer_state,
)
from blt_train.config import CheckpointConfig
from blt_train.config_parsing import config_to_mapping
from blt_train.errors import CheckpointError
from blt_train.inputs import architecture_of_config
from blt_train.optim import make_optimizer
from blt_train.parallel.building import new_model
from blt_train.runtime import Runtime

HELPER = "tests.blt_train.checkpoint_ranks"
RUNTIME = Runtime(device=torch.device("cpu"))


class OneProcess:
    """A run whose model one process holds, as `checkpoint_ranks` continues it with several."""

    def __init__(self, root: Path) -> None:
        self.config = blt_config(root, "run")
        self.architecture = architecture_of_config(self.config)
        self.run = RunDirectory(self.config.run)
        self.model = new_model(self.architecture, self.config, torch.device("cpu"), None)
        self.optimizer = make_optimizer(self.model, self.config.optimizer)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def state(self, step: int) -> TrainerState:
        source = {"fingerprint": "f" * 64, "provenance": {"scheme": {"scheme": "space"}}, "weight": 1.0}
        return TrainerState(
            step=step,
            config=config_to_mapping(self.config),
            data={"kind": "patched", "sources": {"train": source}},
            entropy_model=None,
            packages=package_versions(),
        )

    def sections(self) -> dict[Section, dict[str, torch.Tensor]]:
        return {
            Section.MODEL: dict(self.model.state_dict()),
            Section.OPTIMIZER: optimizer_tensors(self.model, self.optimizer),
        }

    def save(self, step: int, checkpoint: CheckpointConfig | None = None) -> Path:
        with self.run.lock(), Saver(self.run, RUNTIME, checkpoint or CheckpointConfig()) as saver:
            saver.save(self.sections(), self.state(step), self.architecture)
        latest = self.run.latest()
        assert latest is not None
        return latest


@pytest.fixture
def one(tmp_path: Path) -> OneProcess:
    """A run with a checkpoint of step 1."""
    run = OneProcess(tmp_path)
    run.save(1)
    return run


#: Fully sharded; two copies of two shards; an odd number; one copy on each; one that may not write what it must.
LAYOUTS = ("4/4", "4/2", "3/3", "2/1", "3/3/20000")


@dataclass(frozen=True, slots=True)
class Copies:
    """A run whose checkpoints processes in various numbers wrote, each from the one before."""

    one: OneProcess
    told: str
    failed: str

    def of_step(self, step: int) -> Path:
        return self.one.run.folder / f"step-{step:08d}"


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Copies:
    """Checkpoint 1 of one process, and one more for each layout; nobody writes to it."""
    root = tmp_path_factory.mktemp("copies")
    one = OneProcess(root)
    one.save(1)
    done = subprocess.run(
        [sys.executable, "-m", HELPER, str(root), "1", *LAYOUTS],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Copies(one, done.stdout, done.stderr)


def test_any_mesh_reads_what_any_other_wrote(copies: Copies, tmp_path: Path) -> None:
    assert copies.told.splitlines()[:4] == ["4/4 [0, 0, 0, 0]", "4/2 [0, 0, 0, 0]", "3/3 [0, 0, 0]", "2/1 [0, 0]"]
    one = copies.one
    for step, processes in ((1, 1), (2, 4), (3, 4), (4, 3), (5, 2)):
        checkpoint = copies.of_step(step)
        assert read_trainer_state(checkpoint).processes == processes
        assert len(list(checkpoint.iterdir())) == 2 + 2 * processes
        for section, tensors in one.sections().items():
            assert_same_tensors(section_tensors(checkpoint, section), tensors)
    # One process reads them too, into a model and an optimizer of its own, and other packages see a model directory.
    other = OneProcess(tmp_path)
    for parameter in other.model.parameters():
        nn.init.zeros_(parameter)
    checkpoint = copies.of_step(3)
    load_section(checkpoint, Section.MODEL, other.model.state_dict())
    fresh = make_optimizer(other.model, other.config.optimizer)
    load_optimizer(checkpoint, other.model, fresh)
    assert_same_tensors(other.model.state_dict(), one.model.state_dict())
    assert_same_tensors(optimizer_tensors(other.model, fresh), optimizer_tensors(one.model, one.optimizer))
    assert_same_tensors(load(checkpoint).model.state_dict(), one.model.state_dict())


def test_every_process_writes_its_share_and_no_row_twice(copies: Copies) -> None:
    for section, tensors in copies.one.sections().items():
        sizes = []
        for index in range(4):
            path = copies.of_step(3) / f"{section}-{index + 1:05d}-of-00004.safetensors"
            sizes.append(sum(tensor.numel() for tensor in load_file(path).values()))
            with safe_open(path, "pt") as file:
                assert file.metadata()["blt_model.save"] == "step-00000003"
        assert sum(sizes) == sum(tensor.numel() for tensor in tensors.values())
        # Copies of a shard share the work.
        assert max(sizes) < 1.1 * min(sizes)


def test_a_process_that_cannot_write_stops_all(copies: Copies) -> None:
    assert copies.told.splitlines()[4] == "3/3/20000 [3, 3, 3]", copies.failed
    told = re.compile(
        r".*run: the checkpoint of step 6 could not be written by process 3 of 3 \(\[Errno 27\] File too large: "
        r"'.*model-00003-of-00003\.safetensors'\); mend that and run the same command again to go on from step-00000005"
    )
    lines = copies.failed.splitlines()
    assert len(lines) == 3
    assert all(told.fullmatch(line) for line in lines), copies.failed
    assert sorted(os.listdir(copies.one.run.folder)) == [f"step-{step:08d}" for step in range(1, 6)]
    assert copies.one.run.latest() == copies.of_step(5)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_tensors_may_change_when_saving_returns(tmp_path: Path, asynchronous: bool) -> None:
    one = OneProcess(tmp_path)
    expected = {
        section: {name: item.clone() for name, item in part.items()} for section, part in one.sections().items()
    }
    config = CheckpointConfig(asynchronous=asynchronous)
    with one.run.lock(), Saver(one.run, RUNTIME, config) as saver:
        for step in (1, 2):
            saver.save(one.sections(), one.state(step), one.architecture)
            with torch.no_grad():
                for tensors in one.sections().values():
                    for tensor in tensors.values():
                        tensor.add_(1)
        saver.wait()
        figures = saver.take_figures()
        assert saver.take_figures().bytes == 0
    files = [path for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()]
    assert figures.bytes == sum(path.stat().st_size for path in files)
    assert figures.seconds > 0
    for step in (1, 2):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        for section, tensors in expected.items():
            found = section_tensors(checkpoint, section)
            assert all(torch.equal(found[name], tensors[name] + (step - 1)) for name in tensors)


def test_what_stays(tmp_path: Path) -> None:
    one = OneProcess(tmp_path)
    config = CheckpointConfig(every=2, keep_last=2, keep_every=6)
    for step in (2, 4, 6, 8, 10, 12, 13):
        one.save(step, config)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [
        "step-00000006",
        "step-00000012",
        "step-00000013",
    ]


def test_broken_weights_are_never_saved(tmp_path: Path, one: OneProcess) -> None:
    parameter = next(iter(one.model.parameters()))
    with torch.no_grad():
        parameter.view(-1)[-1] = float("inf")
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 could not be written \(.* is no longer finite"):
        one.save(2)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000001"]


def test_an_error_in_the_background_is_told_at_the_next_chance(tmp_path: Path, one: OneProcess) -> None:
    # A file where the checkpoints' directory was: no directory can be made in it.
    folder = tmp_path / "run" / "checkpoints"
    folder.rename(tmp_path / "away")
    folder.write_text("")
    saver = Saver(one.run, RUNTIME, CheckpointConfig())
    saver.save(one.sections(), one.state(2), one.architecture)
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 could not be written"):
        saver.save(one.sections(), one.state(3), one.architecture)
    assert saver.has_failed


def test_damage_is_named(copies: Copies, one: OneProcess, tmp_path: Path) -> None:
    split = tmp_path / "split"
    shutil.copytree(copies.of_step(4), split)

    def read() -> None:
        load_section(split, Section.MODEL, one.model.state_dict())
        load_optimizer(split, one.model, make_optimizer(one.model, one.config.optimizer))

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            read()

    path = split / "optimizer-00002-of-00003.safetensors"
    content = path.read_bytes()
    path.unlink()
    refused(r"optimizer-00002-of-00003\.safetensors is missing")
    path.write_bytes(content[:-8])
    refused(r"optimizer-00002-of-00003\.safetensors is damaged")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(r"optimizer-00002-of-00003\.safetensors is damaged: what it holds of .* checksum")
    path.write_bytes(content)
    (split / "model-00001-of-00003.safetensors").rename(split / "model-00004-of-00005.safetensors")
    refused(r"holds model files of 3 and of 5")


def test_another_models_state_is_refused(tmp_path: Path, one: OneProcess) -> None:
    checkpoint = tmp_path / "run" / "latest"
    other = nn.Linear(3, 4)
    with pytest.raises(CheckpointError, match=r"its section model lacks bias, so it is of another model"):
        load_section(checkpoint, Section.MODEL, other.state_dict())
    with pytest.raises(CheckpointError, match=r"section optimizer is of other parameters than the model's"):
        load_optimizer(checkpoint, other, torch.optim.AdamW(other.parameters()))
    tensors = dict(one.model.state_dict())
    name = next(iter(tensors))
    tensors[name] = torch.empty(2, 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: holds .* where \[2, 2\] is needed"):
        load_section(checkpoint, Section.MODEL, tensors)
