"""`blt-data prepare`: documents of one or several sources to byte shards."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blt_data.console import (
    EXIT_BAD_INPUT,
    ByteSize,
    JobProgress,
    format_bytes,
    friendly_errors,
)
from blt_data.executors.options import LOCAL, RAY, SLURM, ExecutorChoice, executor_options
from blt_data.ingest import (
    DEFAULT_SHARD_BYTES,
    Listener,
    PrepareConfig,
    PrepareStart,
    StageStart,
    TasksFailedError,
    prepare,
)
from blt_data.results import print_result
from blt_data.skips import OnError
from blt_data.units import NewDirectory

if TYPE_CHECKING:
    from blt_data.executors import Executor
    from blt_data.executors.slurm_options import SlurmOptions


def _only_source(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> str | None:
    """Return the one source: of an option given twice, click would drop the first without a word."""
    if len(values) > 1:
        raise click.UsageError(f"--source is given {len(values)} times; name several sources in a file for --recipe")
    return values[0] if values else None


@click.command(
    "prepare",
    epilog="Example: blt-data prepare --source fineweb-edu/sample-10BT --output data/bytes --holdout-fraction 0.01",
)
@click.option(
    "--source",
    multiple=True,
    callback=_only_source,
    help="A Parquet, JSON lines, Arrow or text file, a directory of such files (searched recursively), a quoted glob, "
    "fineweb-edu, fineweb or dclm-baseline-1.0 (also /CONFIG), a URL such as hf://datasets/OWNER/NAME or s3://…, or "
    "python-stdlib: this Python's own standard library.",
)
@click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Instead of --source: a YAML file of several sources, with weights or limits.",
)
@click.option("--revision", help="Branch, tag or commit of a source on the hub; the commit goes into the provenance.")
@click.option("--output", required=True, type=NewDirectory(), help="Directory to make.")
@click.option(
    "--holdout-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Hold out this share of the documents, by a hash of their id: writes OUTPUT/train and OUTPUT/holdout.",
)
@click.option(
    "--limit-bytes",
    type=ByteSize(),
    help="Take only the first documents of the source, whole ones, up to this size (20MB, 1GiB).",
)
@click.option(
    "--shuffle-seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Seed of the order of the documents.",
)
@click.option("--no-shuffle", is_flag=True, help="Keep the order of the source.")
@click.option("--deduplicate", is_flag=True, help="Of documents of equal content keep only the first.")
@click.option(
    "--shard-size",
    "shard_bytes",
    type=ByteSize(),
    default=DEFAULT_SHARD_BYTES,
    help="Content per shard; a larger document has a shard of its own.  [default: 64MiB]",
)
@click.option(
    "--compression",
    type=click.Choice(["none", "zstd"]),
    default="none",
    show_default=True,
    help="Of the shards; zstd ones are decompressed into memory when they are opened.",
)
@click.option("--text-column", default="text", show_default=True, help="Column or key that holds the text.")
@click.option(
    "--id-column",
    help="Column or key that holds the document's id; without one its id is path#row.  [default: id]",
)
@click.option("--source-name", help="What the shards call the source.  [default: the file's or directory's name]")
@click.option(
    "--on-error",
    type=click.Choice([str(choice) for choice in OnError]),
    default=str(OnError.FAIL),
    show_default=True,
    help="What becomes of a bad row or a damaged file: the run ends, or it is left out and counted.",
)
@click.option(
    "--memory-limit",
    type=ByteSize(),
    help="Memory of all local processes together, or of each worker elsewhere; it changes nothing but the time.  "
    "[default: half the machine's, 2GiB elsewhere]",
)
@executor_options(LOCAL, RAY, SLURM)
@friendly_errors
def prepare_command(
    executor: ExecutorChoice, shuffle_seed: int, no_shuffle: bool, on_error: str, **options: Any
) -> None:
    """Write the documents of a source to a directory of byte shards, shuffled.

    Every byte of every document is kept as it is in UTF-8. A run that was killed goes on where it was when the same
    command is given again, and its files are the same, byte for byte, as those of a run that was not.
    """
    config = PrepareConfig(
        shuffle_seed=None if no_shuffle else shuffle_seed,
        on_error=OnError(on_error),
        workers=executor.workers if executor.kind == LOCAL else None,
        **options,
    )
    if executor.slurm is not None:
        _submit(config, executor.slurm)
        return
    try:
        with _View() as view, ExitStack() as stack:
            running = stack.enter_context(_elsewhere(executor)) if executor.kind == RAY else None
            result = prepare(config, executor=running, listener=view.listener)
    except TasksFailedError as failed:
        for failure in failed.failures:
            click.echo(f"error: {failure.message if failure.attempts == 1 else failure}", err=True)
        if len(failed.failures) < failed.tasks:
            click.echo("all else is done; mend this and run the same command again", err=True)
        raise SystemExit(EXIT_BAD_INPUT) from None
    print_result(result)


def _elsewhere(choice: ExecutorChoice) -> Executor:
    return choice.executor(name="blt-data prepare", packages=("blt-data",), local_workers=1)


def _submit(config: PrepareConfig, options: SlurmOptions) -> None:
    from blt_data.building import Pipeline
    from blt_data.executors.slurm import show, submit

    if config.memory_limit is None:
        # A part is left to what is not ours: the interpreter's own growth, shared libraries.
        limit = options.cpus_per_task * options.mem_per_cpu_gb * 800_000_000
        config = replace(config, memory_limit=limit)
    pipeline = Pipeline(config, (), None, None)
    output = Path(config.output)
    stages = pipeline.slurm_stages()
    submitted = submit(stages, options, name="blt-data", logs=output.with_name(f"{output.name}.slurm"))
    show(submitted, options, result=f"{output}/**/manifest.json appears when all is done")


class _View:
    """Shows how far a run is, stage by stage."""

    def __init__(self) -> None:
        self.listener = Listener(
            on_start=self._start, on_stage=self._stage, on_progress=self._advance, on_task=self._task
        )
        self._stack = ExitStack()
        self._progress: JobProgress | None = None

    def __enter__(self) -> _View:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _start(self, start: PrepareStart) -> None:
        files = f"{start.files:,} {'file' if start.files == 1 else 'files'}, " if start.files else ""
        workers = f", {start.workers} workers" if start.workers > 1 else ""
        click.echo(f"reading {files}{format_bytes(start.source_bytes)}{workers}", err=True)
        if start.tasks_discarded:
            click.echo(
                "an unfinished run with other parameters, files or package versions was there; "
                f"{start.tasks_discarded} of its tasks are done anew",
                err=True,
            )
        if start.tasks_resumed:
            click.echo(f"an earlier run finished {start.tasks_resumed} of {start.tasks} tasks; going on", err=True)

    def _stage(self, stage: StageStart) -> None:
        self._stack.close()
        self._progress = self._stack.enter_context(
            JobProgress(
                stage.description,
                total_bytes=stage.bytes or None,
                total_files=stage.tasks,
                noun=stage.noun,
                done_bytes=stage.bytes_done,
                done_files=stage.tasks_done,
            )
        )

    def _advance(self, source_bytes: int, documents: int, content_bytes: int) -> None:
        if self._progress is not None:
            self._progress.advance(source_bytes, documents, content_bytes)

    def _task(self) -> None:
        if self._progress is not None:
            self._progress.advance(files=1)
