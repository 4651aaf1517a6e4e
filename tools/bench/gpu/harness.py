"""What the GPU scripts share: options, a time budget, timing, the machine's two ceilings, and the report."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from blt_train.hardware import peak_flops_of

Row: TypeAlias = dict[str, Any]
REPLAYS = 10
"""Of a graph between two waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a script runs."""

    tiny: bool
    """Smallest sizes, to see on a CPU that the script works; the figures mean nothing."""
    device: torch.device
    budget: float
    """Seconds; a script begins nothing new after them."""
    cases: tuple[str, ...]
    """Only cases whose name contains one of these; empty for all."""
    switches: frozenset[str] = frozenset()
    """Options of the script's own that were given."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.perf_counter() - self.started)

    def wants(self, case: str) -> bool:
        """Whether a case was asked for and there is time to begin it."""
        return self.left > 0 and (not self.cases or any(part in case for part in self.cases))


def settings(
    description: str | None,
    arguments: Sequence[str] | None,
    *,
    budget: float,
    switches: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """Read the command line.

    Args:
        description: the script's docstring.
        arguments: None for the process's own.
        budget: default of --budget.
        switches: options of the script's own without a value, and what they do.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="Smallest sizes, on the CPU.")
    parser.add_argument("--device", help="[cuda; with --tiny cpu]")
    parser.add_argument("--budget", type=float, default=budget, help="Seconds; nothing begins after. [%(default)s]")
    parser.add_argument("--cases", default="", help="Only cases whose name contains one of these, comma-separated.")
    for name, help_ in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=help_)
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cpu" if options.tiny else "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; give --tiny to try the script on the CPU")
    cases = tuple(part for part in options.cases.split(",") if part)
    given = frozenset(name for name in switches if getattr(options, name))
    return Settings(tiny=options.tiny, device=device, budget=options.budget, cases=cases, switches=given)


def wait(device: torch.device) -> None:
    """Wait for all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 1) -> float:
    """Median seconds of a call, the device waited for before and after each."""
    times = []
    for repeat in range(warmup + repeats):
        wait(device)
        started = time.perf_counter()
        function()
        wait(device)
        if repeat >= warmup:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def replayed_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, from a replayed graph on CUDA."""
    if device.type != "cuda":
        return median_seconds(function, device, repeats=1, warmup=0)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    return median_seconds(replay, device, repeats=7) / REPLAYS


def copy_bandwidth(device: torch.device, size: int = 1 << 31) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    size = size if device.type == "cuda" else 1 << 24
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, repeats=7, warmup=2)


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Operations a second of a large bfloat16 matrix product of random numbers."""
    size = size if device.type == "cuda" else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device, repeats=9, warmup=3)


def peak_rate(device: torch.device) -> float | None:
    """Dense bfloat16 operations a second by the datasheet; None for a device that is not listed."""
    if device.type != "cuda":
        return None
    figures = peak_flops_of(torch.cuda.get_device_name(device))
    return None if figures is None else figures.bfloat16


def machine(device: torch.device) -> Row:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "commit": _commit(), "date": time.strftime("%Y-%m-%d")}


def _commit() -> str | None:
    """The commit of the checkout, or what the environment says it is."""
    if known := os.environ.get("BLT_COMMIT"):
        return known
    root = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root, check=False
    )
    return found.stdout.strip() or None


def report(name: str, run: Settings, rows: Sequence[Mapping[str, Any]], **facts: Any) -> Row:
    """Print the rows as a table and all as one line of JSON; write the JSON to $OUT where that is set.

    Args:
        name: of the script.
        run: its settings.
        rows: its figures.
        facts: what else to record.

    Returns:
        What was recorded.
    """
    result = {"bench": f"gpu/{name}", **machine(run.device), "tiny": run.tiny, **facts, "rows": [dict(r) for r in rows]}
    result["seconds"] = round(time.perf_counter() - run.started, 1)
    print(table(rows))
    line = json.dumps(result)
    if out := os.environ.get("OUT"):
        Path(out, f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(line, flush=True)
    return result


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal meaning as aligned text; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], dict | list)))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
