"""Kill `prepare` with SIGKILL at random instants, run it again, and compare every byte with an undisturbed run.

    uv run python -m tools.kill_prepare [--kills 200] [--seed N] [--in-process]

The job shuffles, drops duplicates, holds documents out and has a byte limit. Each time it runs with one to three
workers and is hit after a random part of the time that it takes: sometimes the whole process group, sometimes the
process that was started alone (its workers must end with it), sometimes one worker alone (the run must go on without
it, and end well). Then it is run again, with another number of workers. It ends with status 1 and the seed if an output
differs, if something looks complete that is not, if a run hangs, or if a process is left over.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import blt_data.stages  # noqa: F401  # imported here, before forking, to be quick
from blt_data.ingest import PrepareConfig, prepare

#: Seconds after which a run counts as hanging.
PATIENCE = 300.0

#: The run was over before it was hit; it is not counted.
NOTHING = "nothing"


def write_corpus(folder: Path, rng: random.Random) -> None:
    """Write Parquet and JSON lines, a tenth of whose documents are copies."""
    folder.mkdir()
    texts = [f"{number} {'lorem ipsum ' * rng.randrange(60)}" for number in range(1800)]
    for index in range(9):
        chosen = [rng.choice(texts) if rng.random() < 0.1 else text for text in texts[index::9]]
        if index % 3 == 2:
            lines = "".join(f'{{"text": "{text}", "id": "{index}-{row}"}}\n' for row, text in enumerate(chosen))
            (folder / f"{index}.jsonl").write_text(lines)
        else:
            table = pa.table({"text": chosen, "id": [f"{index}-{row}" for row in range(len(chosen))]})
            pq.write_table(table, folder / f"{index}.parquet", row_group_size=40)


def start(source: Path, output: Path, workers: int) -> int:
    """Start a run in a process group of its own; return its process id."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        status = 1
        # A run that is killed on purpose has nothing to say; one that fails is run again in the open.
        with suppress(BaseException):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            config = PrepareConfig(
                source=str(source),
                output=output,
                holdout_fraction=0.2,
                deduplicate=True,
                limit_bytes=600_000,
                shard_bytes=30_000,
                workers=workers,
            )
            prepare(config)
            status = 0
        os._exit(status)
    with suppress(OSError):
        os.setpgid(child, child)
    return child


def wait(child: int, seconds: float) -> int | None:
    """Return the exit code of a child, negative for a signal, or None if it still runs after that time."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def run_to_end(source: Path, output: Path, workers: int) -> float:
    """Run undisturbed; return the seconds."""
    started = time.monotonic()
    child = start(source, output, workers)
    code = wait(child, PATIENCE)
    if code != 0:
        os.killpg(child, signal.SIGKILL)
        raise SystemExit(f"{output}: a run with {workers} workers {'hangs' if code is None else f'ended with {code}'}")
    return time.monotonic() - started


def hit(child: int, target: str) -> str:
    """Kill what is to be killed; return what it was."""
    workers = psutil.Process(child).children(recursive=True)
    with suppress(OSError):
        if target == "worker" and workers:
            os.kill(random.choice(workers).pid, signal.SIGKILL)
            return "one worker"
        if target == "starter":
            os.kill(child, signal.SIGKILL)
            return "the starter alone"
        os.killpg(child, signal.SIGKILL)
    return "the whole group"


def files(output: Path) -> dict[str, bytes]:
    """Return every file by its path."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def check_what_is_left(output: Path, expected: dict[str, bytes]) -> None:
    """Raise SystemExit if something looks complete and is not."""
    if all((output / split / "manifest.json").exists() for split in ("train", "holdout")):
        left = {name: data for name, data in files(output).items() if not name.startswith(".work")}
        if left != expected:
            raise SystemExit(f"{output}: looks complete and is not")


def check_nobody_is_left(group: int) -> None:
    """Raise SystemExit if a process of a group outlives the one that started it."""
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"processes of group {group} are left over")
        time.sleep(0.01)


def disturb(source: Path, output: Path, expected: dict[str, bytes], seconds: dict[int, float]) -> str:
    """Do one kill and one resumption; return what was hit."""
    workers = random.choice(list(seconds))
    child, started = start(source, output, workers), time.monotonic()
    code = wait(child, random.random() * seconds[workers])
    what = NOTHING
    if code is not None:
        # The machine was busier when the time was taken.
        seconds[workers] = time.monotonic() - started
    else:
        what = hit(child, random.choice(["group", "starter", "worker"]))
        code = wait(child, PATIENCE)
        if code is None:
            os.killpg(child, signal.SIGKILL)
            raise SystemExit(f"{output}: hangs after the kill of {what}")
    if what == "one worker" and code != 0:
        raise SystemExit(f"{output}: ended with {code} after the kill of one worker")
    check_nobody_is_left(child)
    if output.exists():
        check_what_is_left(output, expected)
    run_to_end(source, output, random.choice(list(seconds)))
    if files(output) != expected:
        raise SystemExit(f"{output}: another output after the kill of {what}")
    return what


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--in-process", action="store_true", help="one worker always, which is much faster")
    options = parser.parse_args()
    random.seed(options.seed)
    folder = Path(tempfile.mkdtemp())
    try:
        source = folder / "in"
        write_corpus(source, random.Random(options.seed))
        run_to_end(source, folder / "clean", 1)
        expected = files(folder / "clean")
        seconds = {}
        for workers in (1,) if options.in_process else (1, 2, 3):
            seconds[workers] = run_to_end(source, folder / f"clean-{workers}", workers)
            if files(folder / f"clean-{workers}") != expected:
                raise SystemExit(f"{workers} workers make another output")
        hits = Counter[str]()
        while hits.total() - hits[NOTHING] < options.kills:
            output = folder / f"killed-{hits.total()}"
            hits[disturb(source, output, expected, seconds)] += 1
            shutil.rmtree(output)
    except SystemExit as error:
        sys.stderr.write(f"{error} (seed {options.seed}; files in {folder})\n")
        raise SystemExit(1) from None
    shutil.rmtree(folder)
    print(f"{options.kills} kills, all resumed to {len(expected)} identical files (seed {options.seed})")
    print(", ".join(f"{what}: {count}" for what, count in sorted(hits.items()) if what != NOTHING))


if __name__ == "__main__":
    main()
