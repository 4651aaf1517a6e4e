"""Kill training with SIGKILL at random instants, start it again, and compare it with an undisturbed run, bit for bit.

    uv run python -m tools.kill_train [--kills 20] [--seed N] [--processes 1 2]

Runs of one and of two processes are hit in turn: one rank alone (the launcher must end the others), the launcher alone
(its ranks must end with it), all processes at once, or any of these in the middle of a checkpoint that is being written
in the background. That moment is found by watching the run directory for the checkpoint's temporary name, and counts
only if it is there when the kill comes, and still there when all processes have been killed. After each kill the same
command is started again; after some kills a run is left to its end. The tool ends with status 1 and the seed if
`latest` is ever damaged, if processes are left over, if a run hangs, or if weights, optimizer or metrics differ from
those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from blt_data.ingest import PrepareConfig, prepare
from blt_model import ModelError
from blt_model.weights.section_reading import SectionReader
from blt_train.checkpoint import TRAINER_NAME, Section, checkpoint_directory, read_trainer_state
from blt_train.errors import CheckpointError
from blt_train.metrics import METRICS_NAME

#: Seconds after which a run counts as hanging.
PATIENCE = 300.0
#: Seconds in which the other processes of a job must have ended.
LEFT_OVER_SECONDS = 60.0
#: Kills that one run suffers at most before it is left to its end.
KILLS_PER_RUN = 5
TARGETS = ("one rank", "the launcher", "all processes")
#: The run was over before it was hit; it is not counted.
NOTHING = "nothing"
#: Metrics that are measured and differ from launch to launch.
MEASURED = ("second", "data_wait", "mfu", "memory", "checkpoint_bytes")

STEPS = 60
OVERRIDES = (
    "threads=1",
    "data.sequence_tokens=512",
    "batch.sequences_per_micro_batch=1",
    f"schedule.total_steps={STEPS}",
    "optimizer.ema_decay=0.99",
    "checkpoint.every=2",
    "evaluation.every=7",
)


def write_data(folder: Path, rng: random.Random) -> list[str]:
    """Prepare byte shards of random words; return the overrides that name them."""
    words = ["the", "cat", "sat", "on", "a", "mat", "été", "東京", "\\n", "rain", "while", "it", "looked"]
    lines = [
        json.dumps({"text": " ".join(rng.choices(words, k=rng.randrange(1, 200))), "id": str(i)}) for i in range(400)
    ]
    (folder / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(PrepareConfig(source=str(folder / "in.jsonl"), output=folder / "data", holdout_fraction=0.05, workers=1))
    return [f"data.train={folder / 'data' / 'train'}", f"data.holdout={folder / 'data' / 'holdout'}"]


class Job:
    """One launch of training in a run directory."""

    def __init__(self, run: Path, data: list[str], processes: int) -> None:
        """Start it."""
        self.run, self._known = run, set[psutil.Process]()
        self._told = run.with_name(f"{run.name}.log").open("a", encoding="utf-8")
        command = [sys.executable, "-m", "blt_train", "launch", "debug-entropy", f"run={run}", *data, *OVERRIDES]
        self.launcher = psutil.Popen(
            [*command, "--nproc-per-node", str(processes)],
            stdout=self._told,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that train, apart from the launcher."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in self.launcher.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "blt_train" in child.cmdline():
                        found.append(child)
        self._known.update(found)
        return found

    def wait(self, seconds: float) -> int | None:
        """Return the exit code of the launcher, negative for a signal, or None if it still runs after that time."""
        try:
            return int(self.launcher.wait(seconds))
        except psutil.TimeoutExpired:
            return None

    def kill_all(self) -> None:
        """Kill whatever is left."""
        for process in (*self.ranks(), *self._known, self.launcher):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def hit(self, target: str, rng: random.Random) -> None:
        """Kill what is to be killed."""
        ranks = self.ranks()
        with suppress(psutil.NoSuchProcess):
            if target == "one rank" and ranks:
                rng.choice(ranks).kill()
            elif target == "the launcher":
                self.launcher.kill()
            else:
                # All of them stop at one instant, so that none sees another die.
                processes = [self.launcher, *ranks]
                for process in processes:
                    process.send_signal(signal.SIGSTOP)
                for process in processes:
                    process.kill()

    def check_ended(self) -> None:
        """Raise SystemExit if a process of the job outlives it."""
        _, alive = psutil.wait_procs(self._known, timeout=LEFT_OVER_SECONDS)
        if alive:
            self.kill_all()
            raise SystemExit(f"{self.run}: processes are left over: {alive}")
        self._told.close()


def steps_done(run: Path) -> int:
    """Return how many lines of metrics there are."""
    path = run / METRICS_NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


def temporaries(run: Path) -> set[str]:
    """Return the checkpoints that are being written."""
    with suppress(FileNotFoundError):
        return {name for name in os.listdir(run / "checkpoints") if name.startswith(".tmp-step-")}
    return set()


def run_to_end(run: Path, data: list[str], processes: int) -> float:
    """Run undisturbed; return the seconds."""
    started = time.monotonic()
    job = Job(run, data, processes)
    code = job.wait(PATIENCE)
    if code != 0:
        job.kill_all()
        raise SystemExit(f"{run}: a run of {processes} process(es) {'hangs' if code is None else f'ended with {code}'}")
    job.check_ended()
    return time.monotonic() - started


def disturb(run: Path, data: list[str], processes: int, rng: random.Random) -> str:
    """Start training and kill it somewhere; return what was hit."""
    target = rng.choice(TARGETS if processes > 1 else TARGETS[-1:])
    in_a_save = rng.random() < 0.5
    before = steps_done(run)
    job = Job(run, data, processes)
    deadline = time.monotonic() + PATIENCE
    # Sometimes before the first step of this launch, else after some of them.
    wanted = before + 1 + rng.randrange(8) if in_a_save or rng.random() < 0.9 else 0
    pause = rng.random() * (0.02 if in_a_save else 0.5)
    while job.wait(0) is None and steps_done(run) < wanted:
        job.ranks()
        if time.monotonic() > deadline:
            job.kill_all()
            raise SystemExit(f"{run}: takes no steps")
        time.sleep(0.005)
    there = temporaries(run)
    while in_a_save and job.wait(0) is None and not temporaries(run) - there:
        pass
    time.sleep(pause)
    if job.wait(0) is not None:
        return finish_early(job)
    is_saving = bool(temporaries(run) - there)
    job.hit(target, rng)
    if job.wait(PATIENCE) is None:
        job.kill_all()
        raise SystemExit(f"{run}: hangs after the kill of {target}")
    job.check_ended()
    check_latest(run)
    # After the end of one rank the first may have lived long enough to tidy up.
    was_saving = is_saving and (target == TARGETS[0] or bool(temporaries(run)))
    return f"{target}, while saving" if was_saving else target


def finish_early(job: Job) -> str:
    """Return that a run was over before it was hit."""
    if job.wait(0) != 0:
        raise SystemExit(f"{job.run}: ended with {job.wait(0)} by itself")
    job.check_ended()
    return NOTHING


def sections(run: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the latest checkpoint, which checks its checksums."""
    checkpoint = checkpoint_directory(run)
    for section in Section:
        reader = SectionReader(checkpoint, section)
        for name, info in sorted(reader.tensors.items()):
            tensor = torch.empty(info.shape, dtype=info.dtype)
            reader.read(name, tensor)
            yield f"{section}: {name}", tensor


def check_latest(run: Path) -> None:
    """Raise SystemExit if the latest checkpoint is not whole; there may be none yet."""
    if not (run / "latest").is_symlink():
        return
    try:
        state = read_trainer_state(checkpoint_directory(run))
        for _ in sections(run):
            pass
    except (CheckpointError, ModelError) as error:
        raise SystemExit(f"{run}: the latest checkpoint is damaged: {error}") from None
    if not checkpoint_directory(run).name.endswith(str(state.step)):
        raise SystemExit(f"{run}: the latest checkpoint says in {TRAINER_NAME} that it is of step {state.step}")


def metrics(run: Path) -> list[dict[str, object]]:
    """Return the metrics without what is measured."""
    rows = [json.loads(line) for line in (run / METRICS_NAME).read_text(encoding="utf-8").splitlines()]
    return [{key: row[key] for key in row if not any(word in key for word in MEASURED)} for row in rows]


def check_same(run: Path, other: Path) -> None:
    """Raise SystemExit if two runs ended differently."""
    mine, theirs = dict(sections(run)), dict(sections(other))
    if mine.keys() != theirs.keys():
        raise SystemExit(f"{run}: holds other tensors than the undisturbed run")
    for name, tensor in mine.items():
        if not torch.equal(tensor, theirs[name]):
            raise SystemExit(f"{run}: {name} differs from the undisturbed run")
    if metrics(run) != metrics(other):
        raise SystemExit(f"{run}: the metrics differ from those of the undisturbed run")
    left = temporaries(run)
    if left:
        raise SystemExit(f"{run}: {left} are left over")


def kill_runs(folder: Path, kills: int, processes: list[int], rng: random.Random) -> Counter[str]:
    """Kill and resume so often; return what was hit how often."""
    data = write_data(folder, rng)
    whole = {count: folder / f"whole-{count}" for count in processes}
    for count, run in whole.items():
        run_to_end(run, data, count)
    hits = Counter[str]()
    number = 0
    while hits.total() - hits[NOTHING] < kills:
        count = processes[number % len(processes)]
        run, number = folder / f"killed-{number}", number + 1
        for _ in range(min(KILLS_PER_RUN, kills - hits.total() + hits[NOTHING])):
            what = disturb(run, data, count, rng)
            hits[what if what == NOTHING else f"{what} of {count}"] += 1
            sys.stderr.write(f"{run.name}: {what} after {steps_done(run)} lines of metrics\n")
            if what == NOTHING:
                break
        run_to_end(run, data, count)
        check_same(run, whole[count])
        shutil.rmtree(run)
    return hits


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="in turn, a run each")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        hits = kill_runs(folder, options.kills, options.processes, random.Random(options.seed))
    except SystemExit as error:
        sys.stderr.write(f"{error} (seed {options.seed}; files in {folder})\n")
        raise SystemExit(1) from None
    shutil.rmtree(folder)
    print(
        f"{options.kills} kills, all resumed to the weights of the undisturbed run, bit for bit (seed {options.seed})"
    )
    print("; ".join(f"{what}: {count}" for what, count in sorted(hits.items()) if what != NOTHING))


if __name__ == "__main__":
    main()
