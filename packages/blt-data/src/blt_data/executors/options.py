"""The command-line options by which executors are chosen, for every command that runs tasks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from blt_data.console import ByteSize
from blt_data.errors import InputError
from blt_data.executors.local import LocalExecutor, WorkerEnvironment
from blt_data.executors.slurm_options import SlurmOptions

if TYPE_CHECKING:
    from blt_data.executors.ray import RayExecutor

LOCAL: Final = "local"
RAY: Final = "ray"
SLURM: Final = "slurm"

_C = TypeVar("_C", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class RayOptions:
    """Options of `RayExecutor`; see there."""

    address: str = "auto"
    timeout: float = 600.0
    hang_timeout: float = 1800.0
    memory: int | None = None
    runtime_env: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorChoice:
    """What the user chose."""

    kind: str = LOCAL
    """`local`, `ray` or `slurm`."""
    workers: int | None = None
    """Tasks at once; None leaves it to the command, or to the cluster."""
    num_cpus: float = 1
    """CPUs per Ray worker."""
    num_gpus: float = 0
    """GPUs per Ray worker."""
    ray: RayOptions = RayOptions()
    slurm: SlurmOptions | None = None
    """Set if and only if `kind` is `slurm`."""

    def executor(
        self,
        *,
        name: str,
        packages: Sequence[str],
        local_workers: int,
        worker_environment: WorkerEnvironment | None = None,
    ) -> LocalExecutor | RayExecutor:
        """Return the executor.

        Args:
            name: of the job, for Ray's dashboard, such as `blt-data prepare`.
            packages: distributions that Ray's workers must have in the version that they have here.
            local_workers: processes on this machine, where the user did not say how many.
            worker_environment: see `LocalExecutor`; Ray gives its workers their GPUs by itself.

        Raises:
            InputError: Ray is not installed, or tasks run under SLURM, which is no executor of this kind.
        """
        if self.kind == LOCAL:
            return LocalExecutor(self.workers or local_workers, worker_environment=worker_environment)
        if self.kind == SLURM:
            raise InputError("SLURM runs stages of its own, see blt_data.executors.slurm")
        from blt_data.executors.ray import RayExecutor

        return RayExecutor(
            self.ray.address,
            self.workers,
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            memory=self.ray.memory,
            name=name,
            packages=packages,
            runtime_env=self.ray.runtime_env,
            place_timeout=self.ray.timeout,
            hang_timeout=self.ray.hang_timeout,
        )


class _JsonObject(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click alone
    """A JSON object, or the path of a file that holds one."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mapping[str, Any]:
        """Return the object."""
        if isinstance(value, Mapping):
            return value
        try:
            text = str(value) if str(value).lstrip().startswith("{") else Path(str(value)).read_text()
            parsed = json.loads(text)
        except (OSError, ValueError) as error:
            self.fail(f"is neither a JSON object nor a file that holds one ({error})", param, ctx)
        if not isinstance(parsed, dict):
            self.fail('must be a JSON object, such as \'{"pip": ["blt-data"]}\'', param, ctx)
        return parsed


class _Setting(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click alone
    """NAME=VALUE, or NAME alone."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return name and value."""
        if isinstance(value, tuple):
            return value
        name, _, setting = str(value).partition("=")
        if not name or name.startswith("-"):
            self.fail(f"{value!r} is no NAME=VALUE without dashes, such as constraint=rome", param, ctx)
        return name, setting


def _common(kinds: Sequence[str], gpus: bool) -> list[Callable[[_C], _C]]:
    options = [
        click.option(
            "--executor",
            "executor_kind",
            type=click.Choice(list(kinds)),
            default=LOCAL,
            show_default=True,
            help="Where tasks run: processes of this machine"
            + (", actors of a Ray cluster" if RAY in kinds else "")
            + (", jobs of SLURM" if SLURM in kinds else "")
            + ". The output is the same.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            help="Tasks at once; they change nothing but the time.  [default: as many as CPUs, fewer for little data; "
            "as many as the cluster has room for]",
        ),
    ]
    if RAY in kinds:
        options.append(
            click.option(
                "--num-cpus",
                type=click.FloatRange(min=0),
                default=1.0,
                help="CPUs that each Ray worker reserves.  [default: 1]",
            )
        )
        if gpus:
            options.append(
                click.option(
                    "--num-gpus",
                    type=click.FloatRange(min=0),
                    default=0.0,
                    help="GPUs that each Ray worker reserves.  [default: 0]",
                )
            )
    return options


_RAY_OPTIONS: Final = (
    click.option(
        "--ray-address",
        default="auto",
        help="host:port or ray://host:port of a cluster, auto for this machine's (or RAY_ADDRESS), "
        "local for a new one.  [default: auto]",
    ),
    click.option(
        "--ray-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=600.0,
        help="Seconds after which the run fails if the cluster has no place for any worker.  [default: 600]",
    ),
    click.option(
        "--ray-hang-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=1800.0,
        help="Seconds after which a task that gives no sign of life is tried elsewhere.  [default: 1800]",
    ),
    click.option("--ray-memory", type=ByteSize(), help="Memory that each Ray worker reserves (8GB)."),
    click.option(
        "--ray-runtime-env",
        type=_JsonObject(),
        help="Ray's runtime environment of the job: a JSON object or a file that holds one.",
    ),
)

_SLURM_OPTIONS: Final = (
    click.option("--slurm-partition", help="Partition of the jobs; --executor slurm needs it."),
    click.option("--slurm-time", default="24:00:00", help="Time limit of each task.  [default: 24:00:00]"),
    click.option(
        "--slurm-cpus-per-task", type=click.IntRange(min=1), default=1, help="CPUs of each task.  [default: 1]"
    ),
    click.option(
        "--slurm-mem-per-cpu-gb", type=click.IntRange(min=1), default=4, help="Gigabytes per CPU.  [default: 4]"
    ),
    click.option("--slurm-account", help="Account to charge."),
    click.option("--slurm-qos", help="Quality of service."),
    click.option(
        "--slurm-venv",
        type=click.Path(path_type=Path),
        help="Virtual environment of the jobs.  [default: this command's Python]",
    ),
    click.option("--slurm-env-command", help="Shell command that makes the jobs' environment, instead."),
    click.option(
        "--slurm-max-array-size",
        type=click.IntRange(min=1),
        default=1001,
        help="The cluster's MaxArraySize.  [default: 1001]",
    ),
    click.option(
        "--slurm-tasks-per-job",
        type=click.IntRange(min=1),
        default=1,
        help="Tasks that each job of an array does, one after another.  [default: 1]",
    ),
    click.option(
        "--slurm-requeue/--slurm-no-requeue",
        default=True,
        help="Whether tasks run again whose node failed or that were preempted.  [default: they do]",
    ),
    click.option(
        "--slurm-sbatch",
        type=_Setting(),
        multiple=True,
        help="A further option of sbatch, as NAME=VALUE; may be repeated.",
    ),
    click.option("--slurm-dry-run", is_flag=True, help="Print the batch scripts and submit nothing."),
)


def executor_options(*kinds: str, gpus: bool = False) -> Callable[[_C], _C]:
    """Return a decorator that adds the options to a click command.

    The command is called with one more argument, `executor`, an `ExecutorChoice`. The decorator stands below
    `@click.command` and above `@friendly_errors`.

    Args:
        kinds: which executors the command offers, of `local`, `ray` and `slurm`.
        gpus: whether tasks may use GPUs.
    """
    options = _common(kinds, gpus)
    if RAY in kinds:
        options += _RAY_OPTIONS
    if SLURM in kinds:
        options += _SLURM_OPTIONS

    def decorate(command: _C) -> _C:
        @functools.wraps(command)
        def wrapped(*args: Any, **values: Any) -> Any:
            _refuse_others(str(values["executor_kind"]))
            return command(*args, executor=_choice(values), **values)

        decorated: Any = wrapped
        for option in reversed(options):
            decorated = option(decorated)
        return decorated  # type: ignore[no-any-return]  # click keeps the command's type

    return decorate


def _refuse_others(kind: str) -> None:
    """Refuse an option of another executor, which would otherwise do nothing without a word.

    Raises:
        click.UsageError: there is one.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = str(parameter.name)
        of_kind = next((other for other in (RAY, SLURM) if name.startswith(f"{other}_")), None)
        if name in ("num_cpus", "num_gpus"):
            of_kind = RAY
        given = context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        if of_kind not in (None, kind) and given:
            raise click.UsageError(f"{parameter.opts[0]} needs --executor {of_kind}", context)


def _choice(values: dict[str, Any]) -> ExecutorChoice:
    """Take the options of executors out of a command's arguments."""
    kind, workers = values.pop("executor_kind"), values.pop("workers")
    cpus, gpus = values.pop("num_cpus", 1.0), values.pop("num_gpus", 0.0)
    ray = {field.name: values.pop(f"ray_{field.name}", field.default) for field in fields(RayOptions)}
    slurm = {name.removeprefix("slurm_"): values.pop(name) for name in list(values) if name.startswith("slurm_")}
    return ExecutorChoice(
        kind=kind,
        workers=workers,
        num_cpus=cpus,
        num_gpus=gpus,
        ray=RayOptions(**ray),
        slurm=_slurm_options(slurm, workers) if kind == SLURM else None,
    )


def _slurm_options(values: dict[str, Any], workers: int | None) -> SlurmOptions:
    if values["partition"] is None:
        raise click.UsageError("--executor slurm needs --slurm-partition")
    values["sbatch"] = dict(values["sbatch"])
    return SlurmOptions(workers=workers, **values)
