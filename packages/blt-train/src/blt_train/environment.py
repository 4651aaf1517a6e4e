"""Settings of the process that must stand before torch is loaded; `blt_train` imports this module first.

GNU OpenMP's threads, which torch uses on CPU, wait for each other by spinning, some 300,000 times. Where another
program wants a core, a thread that waits then holds the core that the one it waits for needs: training on two busy
cores was measured at 2 kB/s instead of 17. Waiting 10,000 spins costs 3% on an idle machine and avoids that. What the
user has set stays.
"""

from __future__ import annotations

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
