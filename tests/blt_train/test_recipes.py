"""The packaged recipes: current, whole, and within the memory of the GPUs that they name."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from blt_model import BLTConfig
from blt_train import load_config, packaged_configs
from blt_train.inputs import architecture_of_config
from blt_train.planning.planner import make_plan

NAMES = [name for name in packaged_configs() if re.search(r"-[a-z]100x\d+$", name)]


def load_tool() -> ModuleType:
    """The script that writes the recipes; `tools` is no package that pytest's way of importing finds."""
    path = Path(__file__).parents[2] / "tools" / "recipes.py"
    spec = importlib.util.spec_from_file_location("recipes_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


recipes = load_tool()


def test_files_and_table_are_what_the_plan_says() -> None:
    """Memory, time and speed in the heads and in docs/recipes.md; `python -m tools.recipes` mends it."""
    assert recipes.stale() == []


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name: str) -> None:
    config = load_config(name)
    plan = make_plan(config)
    assert plan.fits
    assert name.endswith(f"-{config.plan.gpu}x{config.plan.gpus}")
    assert config.run == f"runs/{name.rpartition('-')[0]}"
    assert (config.precision, config.compile, config.device) == ("bfloat16", True, "cuda")
    is_blt = isinstance(architecture_of_config(config), BLTConfig)
    assert str(config.data.train).endswith("patches/train" if is_blt else "bytes/train")
    assert (config.entropy_model is not None) == is_blt


def test_the_same_run_on_any_hardware() -> None:
    """What decides the numbers does not depend on the GPUs, so that a run can move."""
    for run in {name.rpartition("-")[0] for name in NAMES}:
        configs = [load_config(name) for name in NAMES if name.rpartition("-")[0] == run]
        assert len(configs) > 1
        first = configs[0]
        for other in configs[1:]:
            assert (other.model, other.data, other.optimizer, other.schedule, other.seed, other.run) == (
                first.model,
                first.data,
                first.optimizer,
                first.schedule,
                first.seed,
                first.run,
            )
            assert other.batch.sequences_per_step == first.batch.sequences_per_step


def test_every_size_and_corpus_is_there() -> None:
    runs = {name.rpartition("-")[0] for name in NAMES}
    assert runs == {f"{model}-{data}" for model in (*recipes.ENTROPY, *recipes.BLTS) for data in recipes.DATA}
    for run in runs:
        assert f"{run}-h100x8" in NAMES


def test_guide_shows_every_recipe(repository: Path) -> None:
    guide = (repository / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert not [name for name in NAMES if f"| `{name}` |" not in guide]
