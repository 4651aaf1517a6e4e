"""The operators and kernels of a Chrome trace that took the most time, as a table in plain text.

Worked out from the trace itself: torch's own table takes minutes for traces of some hundred thousand events.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: Rows of each part of the table, and columns of a name in it.
_ROWS = 25
_NAME_WIDTH = 72

#: Categories of events: what runs on the GPU, and what calls it.
_ON_GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_ON_CPU = frozenset({"cpu_op", "user_annotation"})


@dataclass(slots=True)
class Cost:
    """Calls of one name and the time spent in itself, calls to others left out."""

    calls: int = 0
    microseconds: float = 0.0


def costs_on_gpu(events: Iterable[Mapping[str, Any]]) -> dict[str, Cost]:
    """Return the cost of each kernel and copy.

    Args:
        events: `traceEvents` of a trace.
    """
    costs: dict[str, Cost] = defaultdict(Cost)
    for event in events:
        if event.get("cat") in _ON_GPU and event.get("ph") == "X":
            cost = costs[str(event["name"])]
            cost.calls += 1
            cost.microseconds += float(event["dur"])
    return dict(costs)


def costs_on_cpu(events: Iterable[Mapping[str, Any]]) -> dict[str, Cost]:
    """Return the cost of each operator, the operators that it calls not included.

    Args:
        events: `traceEvents` of a trace.
    """
    by_thread: dict[tuple[Any, Any], list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _ON_CPU and event.get("ph") == "X":
            start, duration = float(event["ts"]), float(event["dur"])
            by_thread[event.get("pid"), event.get("tid")].append((start, -duration, str(event["name"])))
    costs: dict[str, Cost] = defaultdict(Cost)
    for calls in by_thread.values():
        # Outer calls begin before inner ones, or at the same time and last longer.
        open_calls: list[tuple[float, str]] = []
        for start, negative, name in sorted(calls):
            while open_calls and open_calls[-1][0] <= start:
                open_calls.pop()
            if open_calls:
                costs[open_calls[-1][1]].microseconds += negative
            costs[name].calls += 1
            costs[name].microseconds -= negative
            open_calls.append((start - negative, name))
    return dict(costs)


def trace_table(events: Iterable[Mapping[str, Any]]) -> str:
    """Return the table: kernels where there are any, and operators, each by the time spent in itself.

    Args:
        events: `traceEvents` of a trace.
    """
    events = list(events)
    parts = [("GPU kernels and copies", costs_on_gpu(events)), ("operators on the CPU", costs_on_cpu(events))]
    return "\n".join(_part(title, costs) for title, costs in parts if costs)


def _part(title: str, costs: Mapping[str, Cost]) -> str:
    total = sum(cost.microseconds for cost in costs.values())
    lines = [f"{title}: {total / 1000:,.1f} ms", f"{'share':>6} {'self ms':>10} {'calls':>8} {'mean us':>9}  name"]
    ordered = sorted(costs.items(), key=lambda item: -item[1].microseconds)
    for name, cost in ordered[:_ROWS]:
        share = 100 * cost.microseconds / max(total, 1e-9)
        mean = cost.microseconds / cost.calls
        lines.append(
            f"{share:5.1f}% {cost.microseconds / 1000:10,.2f} {cost.calls:8,} {mean:9,.1f}  {name[:_NAME_WIDTH]}"
        )
    return "\n".join(lines) + "\n"
