"""Writes the packaged recipes: models x data x GPUs, each with the micro batch and recomputation that fit its memory.

    uv run python -m tools.recipes          writes configs and the table in docs/recipes.md
    uv run python -m tools.recipes --check  says what is not as it would be written, and exits with status 1

A recipe extends three parts (`configs/models`, `configs/data`, `configs/hardware`) and sets what depends on them
together. Its head tells memory and time as `blt-train plan` reckons them; a test keeps all of it current. A
combination that does not fit the GPUs' memory has no file; the table says what it would need.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from blt_train.config import TrainConfig
from blt_train.config_files import merge, read_parts
from blt_train.config_parsing import config_from_mapping
from blt_train.planning.planner import GPU_MEMORY, RunPlan, make_plan, memory_bytes
from blt_train.planning.tables import time_text

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "packages" / "blt-train" / "src" / "blt_train" / "configs"
GUIDE = REPOSITORY / "docs" / "recipes.md"
BEGIN, END = "<!-- recipes, by tools/recipes.py -->", "<!-- end of recipes -->"

BLTS = {"blt-400m": "400M BLT", "blt-1b": "1B BLT", "blt-2b": "2B BLT", "blt-4b": "4B BLT", "blt-8b": "8B BLT"}
ENTROPY = {"entropy-100m": "Entropy LM"}
DATA = {"fineweb-edu": "FineWeb-Edu", "dclm": "DCLM"}
#: Part of the hardware, number of GPUs, and the command that starts the run.
HARDWARE = {"h100x1": 1, "h100x8": 8, "h100x64": 64, "h100x256": 256}
ENTROPY_HARDWARE = ("h100x1", "h100x8")
#: Share of the memory that a recipe may take, so that what the model of memory leaves out has room.
ROOM = 0.95
#: Micro batches smaller than this leave a GPU waiting for its next kernel.
FEWEST_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Recipe:
    """A packaged config."""

    name: str
    what: str
    parts: tuple[str, ...]
    own: dict[str, Any]
    """What depends on the parts together."""
    config: TrainConfig
    plan: RunPlan

    def text(self) -> str:
        """The file."""
        plan = self.plan
        gpus = "one H100" if plan.gpus == 1 else f"{plan.gpus} H100s"
        lines = [
            f"# {self.what}, {gpus}: {_gigabytes(plan.memory_bytes)} of 80 GB on each, {time_text(plan.days)} at "
            f"{100 * plan.assumptions.mfu:g}% MFU.",
            f"# By `blt-train plan {self.name}`: {_speed(plan)} of text, {_text_size(plan.bytes)} in all, "
            f"{plan.micro_batches} micro batches a step.",
            f"#   {start_command(self.name, plan.gpus)}",
        ]
        content = {"extends": list(self.parts), **self.own}
        return "\n".join(lines) + "\n" + yaml.safe_dump(content, sort_keys=False)


def start_command(name: str, gpus: int) -> str:
    """The command that starts a recipe."""
    if gpus > 8:
        return f"blt-train slurm {name} --nodes {gpus // 8} --gpus-per-node 8"
    return f"blt-train launch {name}" + ("" if gpus == 1 else f" --nproc-per-node {gpus}")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}"


def _speed(plan: RunPlan) -> str:
    megabytes = plan.bytes_per_second / 1e6
    return f"{megabytes:.2f} MB/s" if megabytes < 10 else f"{megabytes:.1f} MB/s"


def _text_size(count: float) -> str:
    return f"{count / 1e9:.0f} GB" if count < 1e12 else f"{count / 1e12:.1f} TB"


def recipes() -> Iterator[Recipe | tuple[str, str]]:
    """All combinations: a recipe, or the name and the reason of what there is none of."""
    for model, what in {**ENTROPY, **BLTS}.items():
        is_entropy = model in ENTROPY
        for data, title in DATA.items():
            for hardware in ENTROPY_HARDWARE if is_entropy else HARDWARE:
                parts = (f"models/{model}", f"data/{data}{'-bytes' if is_entropy else ''}", f"hardware/{hardware}")
                yield _recipe(f"{model}-{data}", f"{what} on {title}", parts, hardware)


def _recipe(run: str, what: str, parts: tuple[str, ...], hardware: str) -> Recipe | tuple[str, str]:
    name = f"{run}-{hardware}"
    base = read_parts(parts)
    least: int | None = None
    for changes in _choices(base, HARDWARE[hardware]):
        own = merge({"run": f"runs/{run}"}, changes)
        config = config_from_mapping(merge(base, own), where=name)
        needed = memory_bytes(config)
        least = needed if least is None else min(least, needed)
        if needed <= ROOM * GPU_MEMORY[config.plan.gpu]:
            return Recipe(name, what, parts, own, config, make_plan(config))
    return name, f"{what}: at least {_gigabytes(least or 0)} GB on each of {HARDWARE[hardware]} H100(s)"


def _choices(base: dict[str, Any], gpus: int) -> Iterator[dict[str, Any]]:
    """What fits the model to the GPUs, from what is fastest on: large micro batches, little recomputation."""
    per_rank, tokens = base["batch"]["sequences_per_step"] // gpus, base["data"]["sequence_tokens"]
    sizes = [size for size in (32, 16, 8, 4, 2, 1) if size <= per_rank]
    large = [size for size in sizes if size * tokens >= FEWEST_TOKENS]
    attempts: list[tuple[str, list[int], dict[str, Any]]] = [
        ("none", large, {}),
        ("selective", large, {}),
        ("full", large, {}),
        ("selective", sizes, {"logging": {"update_norm": False}}),
        ("full", sizes, {"logging": {"update_norm": False}}),
        ("full", sizes, {"parallel": {"reduce_each_micro_batch": True}, "logging": {"update_norm": False}}),
    ]
    for mode, allowed, more in attempts:
        for size in allowed:
            own = {"batch": {"sequences_per_micro_batch": size}, "parallel": {"activation_checkpointing": mode}}
            yield merge(own, more)


def table(found: list[Recipe], missing: list[tuple[str, str]]) -> str:
    """What docs/recipes.md says of all recipes."""
    head = "| recipe | GPUs | micro batch | recomputed | memory | speed | text | time | GPU hours |"
    rows = [head, "|---|---|---|---|---|---|---|---|---|"]
    for recipe in found:
        plan, config = recipe.plan, recipe.config
        size = f"{config.batch.sequences_per_micro_batch} x {config.data.sequence_tokens:,}"
        rows.append(
            f"| `{recipe.name}` | {plan.gpus} | {size}, {plan.micro_batches} a step | "
            f"{config.parallel.activation_checkpointing} | {_gigabytes(plan.memory_bytes)} GB | {_speed(plan)} | "
            f"{_text_size(plan.bytes)} | {time_text(plan.days)} | {plan.gpu_hours:,.0f} |"
        )
    rows += ["", "There is no recipe where the memory of the GPUs does not suffice, whatever is recomputed:", ""]
    rows += [f"- `{name}`: {reason}." for name, reason in missing]
    return "\n".join(rows)


def rendered() -> dict[Path, str]:
    """Every file that this script writes, with its text."""
    found: list[Recipe] = []
    missing: list[tuple[str, str]] = []
    for item in recipes():
        if isinstance(item, Recipe):
            found.append(item)
        else:
            missing.append(item)
    files = {CONFIGS / f"{recipe.name}.yaml": recipe.text() for recipe in found}
    guide = GUIDE.read_text(encoding="utf-8")
    before, _, rest = guide.partition(BEGIN)
    _, _, after = rest.partition(END)
    files[GUIDE] = f"{before}{BEGIN}\n{table(found, missing)}\n{END}{after}"
    return files


def stale() -> list[Path]:
    """Files that are not as they would be written, and recipes that would not be written."""
    files = rendered()
    wrong = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    present = {path for hardware in HARDWARE for path in CONFIGS.glob(f"*-{hardware}.yaml")}
    return sorted([*wrong, *(present - set(files))])


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with status 1 if anything is stale.")
    if parser.parse_args().check:
        wrong = stale()
        for path in wrong:
            print(f"stale: {path.relative_to(REPOSITORY)}")
        sys.exit(1 if wrong else 0)
    files = rendered()
    for path in stale():
        if path in files:
            path.write_text(files[path], encoding="utf-8")
        else:
            path.unlink()
        print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
