"""Memory of a training step at its highest, in a process of its own: it must grow as the tokens do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Prints by how many kilobytes the resident size grows, at its highest, during forward and backward over one document.
SCRIPT = """
import sys
import numpy as np, torch
from blt_model import BLT, pack_documents, preset

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

def step(length):
    tokens = np.random.default_rng(length).integers(4, 260, length + 1)
    lengths = np.full(length // 4 + 1, 4)
    lengths[[0, -1]] = 1, 4
    batch, _ = pack_documents([tokens], [lengths])
    torch.autograd.backward(model(batch).square().mean())

torch.set_num_threads(1)
wide = {"window": 64}
model = BLT(preset("blt-debug", encoder=wide, decoder=wide))
step(64)
for length in (8192, 32768):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    step(length)
    print(status("VmHWM") - before)
sys.exit("torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the sizes that Linux tells")
def test_grows_no_faster_than_the_tokens() -> None:
    """Four times the tokens take four times the memory (a mask of all pairs would take sixteen times).

    What the first step's memory manager keeps is used again by the second, so less is right too. Nor does the step
    load torch's compiler, which takes seconds.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    small, large = map(int, result.stdout.split())
    # 8,192 tokens of this model take some 16 KB each; one float for every pair of them would be 268 MB.
    assert small < 180_000
    assert 2.5 * small < large < 4.6 * small
