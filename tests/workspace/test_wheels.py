"""Each package builds a wheel that installs and works alone, with nothing but its own dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# What each package is for, in a line or two, run where nothing else is installed.
EXAMPLES = {
    "blt-data": "import blt_data; assert blt_data.frame(b'hi').tolist() == [1, 108, 109, 2]",
    "blt-patcher": (
        "import sys, blt_patcher; from blt_patcher import StaticScheme, patch_document;"
        "assert patch_document(StaticScheme(patch_length=4), b'ten bytes!').tolist() == [1, 4, 4, 3];"
        "assert 'torch' not in sys.modules"
    ),
    "blt-model": (
        "import blt_model, torch; from blt_model import BLT, ByteLM, preset;"
        "model = ByteLM(preset('entropy-debug')); assert sum(p.numel() for p in model.parameters()) > 0"
    ),
    "blt-train": (
        "import blt_train, blt_data, blt_patcher, blt_model;"
        "from importlib.resources import files; assert any(files('blt_train').joinpath('configs').iterdir())"
    ),
}
COMMANDS = {"blt-data": "blt-data", "blt-patcher": "blt-patch", "blt-train": "blt-train"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    outcome = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        # Environments of one use: their bytecode would only fill the folder that it is kept in.
        env={key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
        | {"PYTHONDONTWRITEBYTECODE": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert outcome.returncode == 0, f"{command}: {outcome.stdout}\n{outcome.stderr}"
    return outcome.stdout


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv")
    if found is None:
        pytest.skip("uv is not on the path")
    return found


@pytest.fixture(scope="module")
def wheels(uv: str, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheels")
    for package in EXAMPLES:
        run(uv, "build", "--wheel", "--package", package, "--out-dir", directory, cwd=repository)
    # The lock's versions: what is tested here is what the lock promises, and what lies in uv's cache already.
    run(
        uv, "export", "--locked", "--all-packages", "--all-extras", "--no-dev", "--no-hashes", "--no-emit-workspace",
        "--output-file", directory / "constraints.txt", cwd=repository,
    )  # fmt: skip
    return directory


@pytest.mark.parametrize("package", EXAMPLES)
def test_wheel_works_alone(package: str, uv: str, wheels: Path, tmp_path: Path) -> None:
    run(uv, "venv", "--no-project", tmp_path / "venv", cwd=tmp_path)
    environment = {"VIRTUAL_ENV": str(tmp_path / "venv")}
    run(
        uv, "pip", "install", "--no-sources", "--find-links", wheels, "--constraint", wheels / "constraints.txt",
        package, cwd=tmp_path, **environment,
    )  # fmt: skip
    bin_directory = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(bin_directory / "python", "-c", EXAMPLES[package], cwd=tmp_path)
    if package in COMMANDS:
        assert "Usage" in run(bin_directory / COMMANDS[package], "--help", cwd=tmp_path)
    shutil.rmtree(tmp_path / "venv")
