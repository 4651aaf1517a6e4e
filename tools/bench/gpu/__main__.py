"""All GPU scripts in one call of at most ten minutes, and their tables.

    python -m tools.bench.gpu
    python -m tools.bench.gpu --parts numerics,generation --tiny

Every script runs in a process of its own, so that neither memory nor a failure of one reaches the next. Each has a
share of the time; what is over goes to the next. The last line is JSON: the scripts' own lines by name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence

SHARES = {
    "numerics": 100.0,
    "attention": 25.0,
    "cross_attention": 20.0,
    "training_step": 170.0,
    "entropy_job": 80.0,
    "resident": 25.0,
    "generation": 80.0,
    "real_run": 150.0,
}
"""Seconds of each script when all run within TOTAL."""
TOTAL = 520.0
GRACE = 60.0
"""Seconds after its share in which a script may still finish what it has begun."""


def run_part(name: str, seconds: float, extra: Sequence[str]) -> dict[str, object]:
    """Run a script for so many seconds; what it recorded, or what became of it."""
    command = [sys.executable, "-m", f"tools.bench.gpu.{name}", "--budget", str(round(seconds, 1)), *extra]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("the script has no output")
        try:
            output, _ = process.communicate(timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        lines = output.splitlines()
    print("\n".join(lines[:-1]), flush=True)
    last = lines[-1] if lines else ""
    if last.startswith("{"):
        found: dict[str, object] = json.loads(last)
        return {**found, "exit": process.returncode}
    print(last)
    return {"exit": process.returncode, "error": "no figures: stopped at its time limit, or failed"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(SHARES), help="Which, comma-separated. [all]")
    parser.add_argument("--tiny", action="store_true", help="Smallest sizes, on the CPU.")
    parser.add_argument("--budget", type=float, default=TOTAL, help="Seconds for all parts. [%(default)s]")
    options = parser.parse_args(arguments)
    names = [name for name in options.parts.split(",") if name]
    unknown = [name for name in names if name not in SHARES]
    if unknown:
        parser.error(f"{unknown[0]} is no part; choose from {', '.join(SHARES)}")
    started, results = time.perf_counter(), {}
    for place, name in enumerate(names):
        left = options.budget - (time.perf_counter() - started)
        share = left * SHARES[name] / sum(SHARES[other] for other in names[place:])
        print(f"== {name}, {share:.0f} s", flush=True)
        results[name] = run_part(name, share, ["--tiny"] if options.tiny else [])
    print(json.dumps(results))
    if any(result["exit"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
