"""How torch's CPU threads wait for each other; to be said before torch is loaded.

GNU OpenMP's threads, which torch uses on CPU, wait by spinning, some 300,000 times. Where another program wants a core,
a thread that waits then holds the core that the one it waits for needs: on two busy cores, training was measured at
2 kB/s instead of 17. Waiting 10,000 spins costs 3% on an idle machine and avoids that.
"""

from __future__ import annotations

import os


def spin_less() -> None:
    """Make OpenMP's threads give up spinning early; what the user has set in the environment stays.

    It has no effect where torch is loaded already.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
