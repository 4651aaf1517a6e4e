"""Compiling where there is no compiler."""

import os
import subprocess
import sys

# In a process of its own: torch remembers the compiler that it found.
SCRIPT = """
from blt_train.errors import ConfigError
from blt_train.parallel.compilation import check_cpp_compiler

try:
    check_cpp_compiler()
except ConfigError as error:
    print(error)
"""


def test_without_a_compiler_one_sentence_says_so() -> None:
    kept = {key: value for key, value in os.environ.items() if key.startswith("PYTHON")}
    environment = kept | {"PATH": "/nowhere", "CXX": "/nowhere/g++", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert "needs a C++ compiler, and none was found" in result.stdout
    assert len(result.stdout.splitlines()) == 1
