"""Training as a SLURM job: stopped before its time limit, pre-empted, resumed; on a cluster of one node."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.blt_train.jobs import PATIENCE
from tests.blt_train.samples import assert_same_run, run_command

from blt_train import read_metrics
from blt_train.errors import ConfigError, TrainingError
from blt_train.launch.slurm import SlurmOptions, seconds_of, submit
from blt_train.launch.slurm_script import batch_script


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def wait_for_step(run: Path, count: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)[0]) < count:
        assert time.monotonic() < deadline, log.read_text()
        assert ask("squeue", "--noheader"), log.read_text()
        time.sleep(0.05)


def wait_for_end(log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while ask("squeue", "--noheader"):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


def launch(workplace: Path, run: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    data = f"data.train={workplace / 'patched'}"
    return run_command(command, "debug-blt", f"run={run}", data, "schedule.total_steps=90", *options)


def test_a_job_is_stopped_and_preempted_and_ends_as_an_undisturbed_run(slurm: None, workplace: Path) -> None:
    run = workplace / "a run"
    options = ("--nproc-per-node", "2", "--partition", "loopback", "--time", "10", "--signal-seconds", "60")
    submitted = launch(workplace, run, "slurm", *options)
    assert submitted.returncode == 0, submitted.stderr
    scripts = list((run / "slurm").glob("*.sbatch"))
    job = submitted.stderr.split("squeue -j ")[1].split()[0]
    log = run / "slurm" / f"{job}.out"
    assert [path.name for path in scripts] == ["launch.sbatch"]
    assert str(log) in submitted.stdout
    # What SLURM does before a time limit.
    wait_for_step(run, 2, log)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    deadline = time.monotonic() + PATIENCE
    while "Restarts=1 " not in ask("scontrol", "show", "job", job):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    stopped = len(read_metrics(run)[0])
    assert f"stopped by SIGUSR1 after step {stopped}" in log.read_text()
    assert stopped < 90
    # And what a pre-emption is.
    wait_for_step(run, stopped + 2, log)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for_end(log)
    told = log.read_text()
    assert "stopped by SIGTERM after step" in told
    assert "JobState=COMPLETED" in ask("scontrol", "show", "job", job), told
    assert "Restarts=2 " in ask("scontrol", "show", "job", job)
    assert launch(workplace, workplace / "undisturbed", "launch", "--nproc-per-node", "2").returncode == 0
    assert_same_run(run, workplace / "undisturbed")

    # A job that cannot go on: it fails with the sentence in its log, and once.
    failing = launch(workplace, run, "slurm", *options[:4], "seed=5")
    job = failing.stderr.split("squeue -j ")[1].split()[0]
    wait_for_end(run / "slurm" / f"{job}.out")
    told = (run / "slurm" / f"{job}.out").read_text()
    assert told.count("was trained with seed = 0, the config says 5") == 1
    assert "Traceback" not in told
    shown = ask("scontrol", "show", "job", job)
    assert "JobState=FAILED" in shown
    assert "ExitCode=1:0" in shown


def script_of(options: SlurmOptions) -> str:
    return batch_script(
        options,
        config="my config.yaml",
        overrides=["seed=3", "model.preset=blt debug"],
        run=Path("/runs/50% more"),
        directory=Path("/home/me"),
        script=Path("/runs/50% more/slurm/launch.sbatch"),
    )


def requests_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_the_script_says_what_was_asked() -> None:
    options = SlurmOptions(
        partition="h100",
        nodes=4,
        gpus_per_node=8,
        cpus_per_task=96,
        mem_per_cpu_gb=8,
        time="1-12",
        account="physics",
        qos="high",
        job_name="big",
        signal_seconds=300,
        max_restarts=2,
        env_command="module load python",
        sbatch={"exclusive": "", "constraint": "ib"},
    )
    script = script_of(options)
    assert requests_of(script) == [
        "job-name=big",
        "partition=h100",
        "account=physics",
        "qos=high",
        "time=1-12",
        "nodes=4",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "cpus-per-task=96",
        "mem-per-cpu=8G",
        "chdir=/home/me",
        "output='/runs/50%% more/slurm/%j.out'",
        "exclusive",
        "constraint=ib",
        "open-mode=append",
        "requeue",
        "signal=B:USR1@300",
    ]
    assert "\nmodule load python\n" in script
    assert "\n  'my config.yaml' seed=3 'model.preset=blt debug' \\\n" in script
    assert "--cpus-per-task=96 --kill-on-bad-exit=0" in script
    assert '--nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 2' in script
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_job_without_requeue_says_how_to_go_on() -> None:
    options = SlurmOptions(requeue=False, output_dir=Path("/logs"), venv=Path("/envs/my env"))
    script = script_of(options)
    requests = requests_of(script)
    assert "no-requeue" in requests
    assert [line for line in requests if line.startswith("output=")] == ["output=/logs/%j.out"]
    assert "scontrol requeue" not in script
    assert "to go on from it: sbatch '/runs/50% more/slurm/launch.sbatch'" in script
    assert "\nsource '/envs/my env/bin/activate'\n" in script
    assert "--nproc-per-node 1 " in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_dry_run_prints_the_script_and_writes_nothing(workplace: Path) -> None:
    done = launch(workplace, workplace / "run", "slurm", "--partition", "gpu", "--nodes", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert requests_of(done.stdout)[1] == "partition=gpu"
    assert not (workplace / "run").exists()


def test_times_as_slurm_takes_them() -> None:
    times = {"30": 1800, "1:30": 90, "2:00:00": 7200, "1-12": 129600, "1-0:30": 88200, "1-0:0:5": 86405}
    assert {text: seconds_of(text) for text in times} == times
    assert seconds_of("UNLIMITED") is None
    for text in ("", "soon", "1:2:3:4", "-5", "1d"):
        with pytest.raises(ConfigError, match="is no time for SLURM"):
            seconds_of(text)


def test_options_that_make_no_job_are_refused() -> None:
    with pytest.raises(ConfigError, match="--time 3 leaves no time to train"):
        SlurmOptions(time="3", signal_seconds=120)
    with pytest.raises(ConfigError, match="--nodes must be at least 1, not 0"):
        SlurmOptions(nodes=0)
    assert SlurmOptions(nodes=3, gpus_per_node=4).world_size == 12
    assert SlurmOptions(nodes=3, gpus_per_node=4, processes=2).world_size == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sbatch": {"signal": "B:USR1@9"}}, "--sbatch signal is refused: use --signal-seconds"),
        ({"sbatch": {"nodes": "2"}}, "use --nodes"),
        ({"sbatch": {"ntasks-per-node": "2"}}, "use --nproc-per-node"),
        ({"sbatch": {"requeue": ""}}, "use --requeue"),
        ({"sbatch": {"output": "x"}}, "use --output-dir"),
        ({"sbatch": {"open-mode": "truncate"}}, "goes on in the same log"),
        ({"sbatch": {"gres": "gpu:8"}}, "use --gpus-per-node"),
        ({"sbatch": {"Constraint": "x"}}, "--sbatch 'Constraint' is no option of sbatch"),
        ({"sbatch": {"comment": "a\nb"}}, "--sbatch comment must be one line"),
        ({"job_name": "a\nrm"}, "--job-name must be one line"),
    ],
)
def test_what_the_script_sets_is_no_further_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SlurmOptions(**options)
    assert message in str(caught.value)
    assert "gres=nvme:1" in requests_of(script_of(SlurmOptions(sbatch={"gres": "nvme:1"})))


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TrainingError, match="there is no sbatch here"):
        submit("#!/bin/bash\n", tmp_path / "slurm")
    # A SLURM that refuses.
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(TrainingError, match=r"sbatch refused the job \(invalid partition specified: gpu\)"):
        submit("#!/bin/bash\n", tmp_path / "slurm")
    assert (tmp_path / "slurm" / "launch.sbatch").read_text() == "#!/bin/bash\n"
