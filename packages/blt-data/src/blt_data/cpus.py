"""How many CPUs this process may use."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, at least 1."""
    # Only Linux tells which CPUs a container or a batch job leaves to this process.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
