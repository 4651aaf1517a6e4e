"""Stages under SLURM: the same shards, and failures that stop what depends on them; on a cluster of one node."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from datatrove.pipeline.filters import LambdaFilter

from blt_data import InputError
from blt_data.building import build_pipeline
from blt_data.executors.slurm import Stage, show, submit
from blt_data.executors.slurm_options import SlurmOptions

from .corpora import files_of, json_lines, write_parquet

PARTITION = SlurmOptions(partition="loopback", time="10", mem_per_cpu_gb=1)


def keep_most(document: object) -> bool:
    return len(document.text) % 3 != 0  # type: ignore[attr-defined]


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    generator = random.Random(random.randrange(2**32))
    for number in range(2):
        texts = ["".join(generator.choices("abc é\n日", k=generator.randint(0, 4000))) for _ in range(30)]
        write_parquet(folder / f"{number}.parquet", texts)
        (folder / f"{number}.jsonl").write_bytes(json_lines(texts[::-1]))


def wait_for_jobs() -> None:
    deadline = time.monotonic() + 240
    while subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout.strip():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def outputs(logs: Path) -> str:
    """Return what the tasks printed, for messages of failed tests."""
    return "\n".join(path.read_text() for path in sorted(logs.glob("*/output/*.out")))


def command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "blt_data.cli", "prepare", *options], capture_output=True, text=True, check=False
    )


def test_the_same_shards_as_in_this_process(slurm: None, tmp_path: Path) -> None:
    write_corpus(tmp_path / "in")
    output, logs = tmp_path / "out", tmp_path / "out.slurm"
    same = ("--source", str(tmp_path / "in"), "--shard-size", "40kB", "--holdout-fraction", "0.3")
    assert command(*same, "--output", str(tmp_path / "expected"), "--workers", "1").returncode == 0
    there = [*same, "--output", str(output), "--executor", "slurm", "--slurm-partition", "loopback"]
    there += ["--slurm-mem-per-cpu-gb", "1", "--slurm-time", "10", "--slurm-tasks-per-job", "3"]
    # A first run, with a file that is broken.
    whole = (tmp_path / "in" / "1.jsonl").read_bytes()
    (tmp_path / "in" / "1.jsonl").write_bytes(b"[" + whole[1:])
    submitted = command(*there)
    assert submitted.returncode == 0, submitted.stderr
    assert all(stage in submitted.stdout for stage in ("scatter", "gather", "finish"))
    wait_for_jobs()
    # What depends on the failed task was cancelled and did nothing.
    assert not list(output.glob("*/manifest.json"))
    assert not list((logs / "gather" / "output").iterdir())
    assert "line 1 is no JSON" in outputs(logs)
    # The same again, with the file mended, on the same output.
    (tmp_path / "in" / "1.jsonl").write_bytes(whole)
    assert command(*there).returncode == 0
    wait_for_jobs()
    assert (output / "train" / "manifest.json").exists(), outputs(logs)
    assert files_of(output) == files_of(tmp_path / "expected")
    # And again, when all is there.
    assert "done already" in command(*there).stdout
    assert subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout == ""


def test_steps_of_the_users_own(slurm: None, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The jobs import this module, for its filter.
    monkeypatch.setenv("PYTHONPATH", str(repository))
    write_parquet(tmp_path / "in.parquet", ["x" * length for length in range(1, 100)])
    pipelines = [
        build_pipeline(tmp_path / "in.parquet", tmp_path / name, steps=[LambdaFilter(keep_most)], gather_tasks=1)
        for name in ("expected", "out")
    ]
    pipelines[0].run()
    submit(pipelines[1].slurm_stages(), PARTITION, name="prepare", logs=tmp_path / "logs")
    wait_for_jobs()
    assert (tmp_path / "out" / "manifest.json").exists(), outputs(tmp_path / "logs")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_the_scripts_say_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = replace(
        PARTITION,
        time="3:00:00",
        cpus_per_task=2,
        account="physics",
        qos="high",
        workers=7,
        max_array_size=5,
        tasks_per_job=2,
        requeue=False,
        env_command="module load python",
        sbatch={"constraint": "rome"},
        dry_run=True,
    )
    stages = [
        Stage(name="first", blocks=[], ranks=9, done=lambda rank: rank == 4),
        Stage(name="second", blocks=[], ranks=1),
    ]
    submitted = submit(stages, options, name="job", logs=tmp_path / "logs")
    show(submitted, options, result="")
    printed = capsys.readouterr().out
    lines = submitted[0].script.splitlines()
    assert lines[0] == "#!/bin/bash"
    folder = tmp_path / "logs" / "first"
    expected = {
        "partition": "loopback",
        "time": "3:00:00",
        "cpus-per-task": "2",
        "mem-per-cpu": "1G",
        "nodes": "1",
        "account": "physics",
        "qos": "high",
        "array": "0-3%7",
        "constraint": "rome",
        "job-name": "job-first",
        "kill-on-invalid-dep": "yes",
        "output": f"{folder}/output/%A_%a.out",
        "error": f"{folder}/output/%A_%a.out",
    }
    assert dict(line.removeprefix("#SBATCH --").split("=") for line in lines if line.startswith("#SBATCH")) == expected
    commands = [line for line in lines[1:] if not line.startswith("#")]
    assert commands == [
        'echo "Starting data processing job job-first"',
        "module load python",
        "set -xe",
        "export PYTHONUNBUFFERED=TRUE",
        f"srun --cpus-per-task=2 -l -n 1 launch_pickled_pipeline {folder}/executor.pik",
    ]
    assert "# first: 8 tasks, sbatch\n#!/bin/bash\n" in printed
    assert "# second: 1 tasks, sbatch --dependency=afterok:<job of first>\n#!/bin/bash\n" in printed
    assert not (tmp_path / "logs").exists()


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no sbatch here; run this on a machine of the SLURM cluster"):
        submit([Stage(name="only", blocks=[], ranks=1)], PARTITION, name="job", logs=tmp_path / "logs")
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(InputError, match=r"sbatch refused the job \(status 3, see its message above\)"):
        submit([Stage(name="only", blocks=[], ranks=1)], PARTITION, name="job", logs=tmp_path / "logs")


def test_what_has_been_submitted_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\necho "$@" >> $SBATCH_CALLS\necho Submitted batch job 41\n')
        (tmp_path / "bin" / "sbatch").chmod(0o755)
        patch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        patch.setenv("SBATCH_CALLS", str(tmp_path / "calls"))
        stages = [
            Stage(name="first", blocks=[], ranks=2, done=lambda rank: True),
            Stage(name="second", blocks=[], ranks=3),
            Stage(name="third", blocks=[], ranks=1),
        ]
        submitted = submit(stages, PARTITION, name="job", logs=tmp_path / "logs")
    assert [(stage.tasks, stage.job_id) for stage in submitted] == [(0, None), (3, "41"), (1, "41")]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["--dependency=afterok:41" in call for call in calls] == [False, True]
    # What is shown in a dry run is what is submitted.
    for stage in submitted[1:]:
        assert (tmp_path / "logs" / stage.name / "launch_script.slurm").read_text() == stage.script
    show(submitted, PARTITION, result="out/manifest.json appears when all is done")
    shown = capsys.readouterr()
    assert "done already" in shown.out
    assert str(tmp_path / "logs" / "second" / "output") in shown.out.replace("\n", "")
    assert "sacct -j 41,41 what became of it; out/manifest.json appears when all is done." in shown.err
