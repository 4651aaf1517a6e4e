"""Kill a merge (SIGKILL) at every step that it takes in its output, and resume it. Run by test_merge.py.

Usage: merge_killing.py FOLDER STRIDE INPUT... Prints the number of steps, after checking for each STRIDE-th that the
killed merge does not look complete unless it is, and that the resumed one leaves the very files of an undisturbed one.

A step is an audit event of Python itself about the output: a file opened, renamed, linked, removed, a directory made.
Each run is a process of its own, forked so that the imports are paid for once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from blt_data.merging import MergeConfig, plan_merge, run_merge

EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}

#: Small enough to cut and join shards; shards that stay whole are linked.
SHARD_BYTES = 1500


def run(inputs: tuple[Path, ...], output: Path, kill_at: int | None) -> int:
    """Merge in a child; return the steps it took, or -1 if it was killed."""
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
        run_merge(plan_merge(MergeConfig(inputs=inputs, output=output, shard_bytes=SHARD_BYTES, workers=1)))
        os.write(writer, str(steps).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    told = os.read(reader, 100)
    os.close(reader)
    if os.WIFSIGNALED(status):
        return -1
    if not told:
        raise SystemExit("merge failed")
    return int(told)


def files(output: Path) -> dict[str, bytes]:
    """Return every file by its path."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def main() -> None:
    """See the module."""
    folder, stride, inputs = Path(sys.argv[1]), int(sys.argv[2]), tuple(map(Path, sys.argv[3:]))
    steps = run(inputs, folder / "whole", None)
    expected = files(folder / "whole")
    for step in range(1, steps + 1, stride):
        output = folder / f"killed-{step:05d}"
        if run(inputs, output, step) != -1:
            raise SystemExit(f"step {step}: was not killed")
        left = {name: data for name, data in files(output).items() if not name.startswith(".work")}
        if all((output / split / "manifest.json").exists() for split in ("train", "holdout")) and left != expected:
            raise SystemExit(f"step {step}: looks complete and is not")
        if run(inputs, output, None) == -1 or files(output) != expected:
            raise SystemExit(f"step {step}: the resumed merge left other files")
    sys.stdout.write(f"{steps}\n")


if __name__ == "__main__":
    main()
