"""The options by which executors are chosen: what they make, and which ones do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from blt_data import InputError
from blt_data.executors import LocalExecutor
from blt_data.executors.options import LOCAL, RAY, SLURM, ExecutorChoice, executor_options
from blt_data.executors.ray import RayExecutor
from blt_data.executors.slurm_options import SlurmOptions


def invoke(*arguments: str, kinds: tuple[str, ...] = (LOCAL, RAY, SLURM), gpus: bool = False) -> tuple[Result, Any]:
    """Run a command that offers the options; return click's result and what the command was given."""
    given: list[dict[str, Any]] = []

    @click.command()
    @click.option("--other", default=3)
    @executor_options(*kinds, gpus=gpus)
    def command(**values: Any) -> None:
        given.append(values)

    result = CliRunner().invoke(command, list(arguments))
    return result, given[0] if given else None


def choice(*arguments: str, **what: Any) -> ExecutorChoice:
    result, given = invoke(*arguments, **what)
    assert result.exit_code == 0, result.output
    # Nothing of them is left for the command itself.
    assert given.keys() == {"other", "executor"}
    chosen = given["executor"]
    assert isinstance(chosen, ExecutorChoice)
    return chosen


def test_without_options_tasks_run_here() -> None:
    chosen = choice()
    assert chosen == ExecutorChoice()
    executor = chosen.executor(name="test", packages=(), local_workers=5)
    assert isinstance(executor, LocalExecutor)
    assert executor.workers == 5
    assert executor.on_one_machine
    assert choice("--workers", "2").executor(name="test", packages=(), local_workers=5).workers == 2


def test_ray(tmp_path: Path) -> None:
    options = ["--executor", "ray", "--ray-address", "head:6379", "--workers", "7", "--num-cpus", "0.5"]
    options += ["--num-gpus", "1", "--ray-timeout", "9", "--ray-hang-timeout", "8", "--ray-memory", "2GB"]
    chosen = choice(*options, "--ray-runtime-env", '{"pip": ["a"]}', gpus=True)
    assert (chosen.kind, chosen.workers, chosen.num_cpus, chosen.num_gpus) == ("ray", 7, 0.5, 1)
    assert (chosen.ray.address, chosen.ray.timeout, chosen.ray.hang_timeout) == ("head:6379", 9, 8)
    assert (chosen.ray.memory, chosen.ray.runtime_env) == (2_000_000_000, {"pip": ["a"]})
    executor = chosen.executor(name="test", packages=("blt-data",), local_workers=1)
    assert isinstance(executor, RayExecutor)
    assert executor.workers == 7
    (tmp_path / "env.json").write_text('{"env_vars": {}}')
    assert choice("--executor", "ray", "--ray-runtime-env", str(tmp_path / "env.json")).ray.runtime_env == {
        "env_vars": {}
    }


def test_slurm() -> None:
    options = ["--executor", "slurm", "--slurm-partition", "cpu", "--slurm-time", "1:00", "--slurm-account", "physics"]
    options += ["--slurm-sbatch", "constraint=rome", "--slurm-sbatch", "exclusive", "--slurm-no-requeue"]
    chosen = choice(*options, "--workers", "4", "--slurm-venv", "/venv", "--slurm-dry-run")
    assert chosen.slurm == SlurmOptions(
        partition="cpu",
        time="1:00",
        account="physics",
        workers=4,
        venv=Path("/venv"),
        requeue=False,
        sbatch={"constraint": "rome", "exclusive": ""},
        dry_run=True,
    )
    with pytest.raises(InputError, match="SLURM runs stages of its own"):
        chosen.executor(name="test", packages=(), local_workers=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray-address", "auto"], "--ray-address needs --executor ray"),
        (["--num-cpus", "2"], "--num-cpus needs --executor ray"),
        (["--executor", "ray", "--slurm-dry-run"], "--slurm-dry-run needs --executor slurm"),
        (["--executor", "slurm"], "--executor slurm needs --slurm-partition"),
        (["--executor", "slurm", "--slurm-partition", "a", "--num-cpus", "2"], "--num-cpus needs --executor ray"),
        (["--executor", "ray", "--ray-runtime-env", "[1]"], "neither a JSON object nor a file that holds one"),
        (["--executor", "ray", "--ray-runtime-env", "{"], "neither a JSON object nor a file that holds one"),
        (["--executor", "slurm", "--slurm-sbatch", "--x=1"], "is no NAME=VALUE without dashes"),
        (["--workers", "0"], "0 is not in the range x>=1"),
    ],
)
def test_options_that_do_nothing_or_make_no_sense_are_refused(arguments: list[str], message: str) -> None:
    result, given = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert given is None


def test_a_command_offers_what_it_can_do() -> None:
    assert "--slurm" not in invoke("--help", kinds=(LOCAL, RAY))[0].output
    assert "--num-gpus" not in invoke("--help", kinds=(LOCAL, RAY))[0].output
    assert "--num-gpus" in invoke("--help", kinds=(LOCAL, RAY), gpus=True)[0].output
    result, _ = invoke("--executor", "slurm", kinds=(LOCAL, RAY))
    assert "'slurm' is not one of 'local', 'ray'" in result.output
    assert choice("--workers", "3", kinds=(LOCAL,)).workers == 3
