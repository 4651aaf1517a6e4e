"""Run `prepare` again and again, each time killed (SIGKILL) at another step, and resume it. Run by test_resume.py.

Usage: killing.py SOURCE FOLDER STRIDE. Prints the number of steps, after checking for each STRIDE-th that the killed
and resumed run leaves the very files of an undisturbed one, and that the killed one did not look complete unless it
was.

A step is an audit event of Python itself about the output: a file opened, renamed, linked, removed, a directory made.
Each run is a process of its own, forked so that the imports are paid for once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import blt_data.stages  # noqa: F401  # imported here, before forking, to be quick
from blt_data.ingest import PrepareConfig, prepare

EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}


def run(source: str, output: Path, kill_at: int | None) -> int:
    """Run prepare in a child; return the steps it took, or -1 if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal steps
            if event in EVENTS and str(output) in str(arguments[0]):
                steps += 1
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        prepare(
            PrepareConfig(
                source=source, output=output, holdout_fraction=0.4, shard_bytes=400, deduplicate=True, workers=1
            )
        )
        os.write(writer, str(steps).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    told = os.read(reader, 100)
    os.close(reader)
    if os.WIFSIGNALED(status):
        return -1
    if not told:
        raise SystemExit("prepare failed")
    return int(told)


def files(output: Path) -> dict[str, bytes]:
    """Return every file by its path."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def main() -> None:
    """See the module."""
    source, folder = sys.argv[1], Path(sys.argv[2])
    steps = run(source, folder / "whole", None)
    expected = files(folder / "whole")
    for step in range(1, steps + 1, int(sys.argv[3])):
        output = folder / f"killed-{step:05d}"
        if run(source, output, step) != -1:
            raise SystemExit(f"step {step}: was not killed")
        if all((output / split / "manifest.json").exists() for split in ("train", "holdout")):
            left = {name: data for name, data in files(output).items() if not name.startswith(".work")}
            if left != expected:
                raise SystemExit(f"step {step}: looks complete and is not")
        if run(source, output, None) == -1 or files(output) != expected:
            raise SystemExit(f"step {step}: the resumed run left other files")
    sys.stdout.write(f"{steps}\n")


if __name__ == "__main__":
    main()
