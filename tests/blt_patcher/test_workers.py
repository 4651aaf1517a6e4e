"""Shards patched by several workers, by array jobs and on a Ray cluster: always the files of one process."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from tests.blt_data.ray_cluster import TwoNodes
from tests.blt_patcher.shards import EXECUTABLE, make_bytes, make_model, tree

from blt_data import ShardDirectory, ShardKind
from blt_data.errors import InputError
from blt_data.executors.local import LocalExecutor
from blt_patcher import EntropyScheme
from blt_patcher.calibrate import take_sample
from blt_patcher.cli import main
from blt_patcher.commands.entropy_source import EntropySource, entropy_source
from blt_patcher.commands.precompute import score_sample, sizes_of_choices
from blt_patcher.commands.worker_options import WorkerOptions, parse_shards, visible_gpus
from blt_patcher.precompute import Workers, held, precompute
from blt_patcher.scorers import ScorerSpec

#: Small windows make every shard take a second or so.
OPTIONS = ["--threshold", "5.2", "--entropies", "float16", "--window-tokens", "128", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with eight byte shards, a model, and in `whole` what one process makes of them."""
    return make_place(tmp_path_factory.mktemp("workers"), 8)


def make_place(path: Path, count: int) -> Path:
    rng = np.random.default_rng()
    shards = [[rng.integers(32, 127, size, dtype=np.uint8).tobytes() for size in (9000, 0, 500)] for _ in range(count)]
    source = make_bytes(path / "bytes", shards=shards)
    make_model(path / "model")
    spec = ScorerSpec(model=path / "model", device="cpu", window_tokens=128)
    precompute(source, path / "whole", scheme=EntropyScheme(threshold=5.2), scorer=spec.load(), keep_entropies=True)
    return path


def command(output: str, *more: str) -> list[str]:
    return [*EXECUTABLE, "precompute", "bytes", "--output", output, "--entropy-model", "model", *OPTIONS, *more]


def wait_for(condition: Callable[[], Any], job: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, (job.communicate(), "the job ended before it could be disturbed")
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def finished(directory: Path) -> int:
    return len(list(directory.glob("*.arrow")))


def test_two_processes_make_the_files_of_one_though_one_is_killed(place: Path) -> None:
    output = place / "two"
    with subprocess.Popen(
        command("two", "--workers", "2"), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        wait_for(lambda: finished(output) >= 2, job)
        victim = psutil.Process(job.pid).children()[0]
        victim.kill()
        told, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert "entropies float16" in told
    assert tree(output) == tree(place / "whole")


def test_array_jobs_share_a_directory_and_the_last_one_writes_the_manifest(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = place / "array"
    monkeypatch.chdir(place)
    first = CliRunner().invoke(main, command("array", "--only-shards", "0,6-7")[len(EXECUTABLE) :])
    assert first.exit_code == 0, first.output
    assert "shards still missing" in first.output
    assert finished(output) == 3
    with pytest.raises(InputError, match="run the command that writes it to its end"):
        ShardDirectory.open(output)
    # Two at once: neither is refused, and one of them finds all shards finished. Shard 6 is there already.
    jobs = [
        subprocess.Popen(command("array", "--only-shards", shards), cwd=place, stdout=subprocess.DEVNULL)
        for shards in ("1-3,6", "4-5")
    ]
    assert [job.wait(300) for job in jobs] == [0, 0]
    assert tree(output) == tree(place / "whole")


def test_a_whole_run_finishes_what_array_jobs_left(place: Path) -> None:
    source = ShardDirectory.open(place / "bytes", kind=ShardKind.BYTES)
    scorer = ScorerSpec(model=place / "model", device="cpu", window_tokens=128).load()
    options: dict[str, Any] = {"scheme": EntropyScheme(threshold=5.2), "scorer": scorer, "keep_entropies": True}
    output = place / "assembled"
    part = precompute(source, output, only=[2, 5], **options)
    assert (part.missing_shards, len(part.manifest.shards), finished(output)) == (6, 2, 2)
    with held(output, shared=True):
        # Other array jobs may come; a run of the whole may not.
        precompute(source, output, only=[2, 3], **options)
        with pytest.raises(InputError, match="another process is writing to it"):
            precompute(source, output, **options)
        rest = precompute(source, output, only=[0, 1, 4, 6, 7], **options)
        assert (rest.missing_shards, (output / "manifest.json").exists()) == (0, False)
    assert precompute(source, output, **options).resumed_shards == 8
    assert tree(output) == tree(place / "whole")


def test_lists_of_shards() -> None:
    assert parse_shards("3-5,0, 4 ,7-7", 8) == [0, 3, 4, 5, 7]
    for text in ("", "a", "3-", "5-3", "1,,2", "-1", "1.5"):
        with pytest.raises(InputError, match="is no list of shards"):
            parse_shards(text, 8)
    with pytest.raises(InputError, match="names shard 8, and the last of 8 shards is 7"):
        parse_shards("2-8", 8)


def test_every_worker_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert visible_gpus() == ["4", "GPU-abc"]
    executor: Any = WorkerOptions(workers=3).start("cuda")
    seen = [executor._worker_environment(number)["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert seen == ["4", "GPU-abc", "4"]
    assert WorkerOptions().start("cuda") is None
    assert WorkerOptions(executor="ray", num_gpus=1).device(None) == "cuda"
    assert WorkerOptions(executor="ray").device(None) == "cpu"
    with pytest.raises(InputError, match="give --num-gpus 1"):
        WorkerOptions(executor="ray").device("cuda")
    with pytest.raises(InputError, match="--num-gpus is for --executor ray"):
        WorkerOptions(num_gpus=1).device(None)
    with pytest.raises(InputError, match="--ray-address is for --executor ray"):
        WorkerOptions(ray_address="head:6379").device(None)


def test_workers_that_would_score_otherwise_are_refused(place: Path) -> None:
    # What the job says of the model is another's, as if the model had been replaced under the running job.
    make_model(place / "other", preset_name="entropy-tiny")
    source = ShardDirectory.open(place / "bytes", kind=ShardKind.BYTES)
    spec = ScorerSpec(model=place / "other", device="cpu", window_tokens=128)
    stated = ScorerSpec(model=place / "model", device="cpu", window_tokens=128).describe("cpu")
    with pytest.raises(InputError, match="a worker: entropy model has another fingerprint"):
        precompute(
            source,
            place / "refused",
            scheme=EntropyScheme(threshold=5.2),
            scorer=stated,
            workers=Workers(executor=LocalExecutor(1), load_scorer=spec.load),
        )


def test_samples_are_scored_where_the_scorers_are(place: Path) -> None:
    source = ShardDirectory.open(place / "bytes", kind=ShardKind.BYTES)
    sample = take_sample(source, 5000)
    spec = ScorerSpec(model=place / "model", device="cpu", window_tokens=128)
    told: list[tuple[int, ...]] = []

    def scored(where: EntropySource) -> bytes:
        arguments = (score_sample, sample.content, sample.content_offsets)
        return where.call(*arguments, on_progress=lambda *amounts: told.append(amounts)).tobytes()

    with entropy_source(spec, WorkerOptions()) as here, entropy_source(spec, WorkerOptions(workers=2)) as near:
        far = dataclasses.replace(
            near, workers=Workers(executor=LocalExecutor(1), load_scorer=spec.load), load_here=None
        )
        assert scored(here) == scored(near) == scored(far)
    tokens = sample.content.size + 2 * (sample.content_offsets.size - 1)
    assert sum(amounts[0] for amounts in told) == 3 * tokens


def test_sizes_of_both_choices_are_told(place: Path) -> None:
    source = ShardDirectory.open(place / "bytes", kind=ShardKind.BYTES)
    scorer = ScorerSpec(model=place / "model", device="cpu", window_tokens=128).load()
    options: dict[str, Any] = {"scheme": EntropyScheme(threshold=5.2), "scorer": scorer}
    dropped = precompute(source, place / "dropped", keep_entropies=False, **options)
    kept = precompute(source, place / "whole", keep_entropies=True, **options)
    told = [sizes_of_choices(result.manifest) for result in (dropped, kept)]
    actual = [sum(entry.file_bytes for entry in result.manifest.shards) for result in (kept, dropped)]
    for guess in told:
        np.testing.assert_allclose(guess, actual, rtol=0.05)


def actors(nodes: TwoNodes) -> list[psutil.Process]:
    """The processes of this cluster's actors."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in nodes.cluster.list_all_nodes()}  # type: ignore[no-untyped-call]
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.ppid() in raylets and "RayWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_ray_cluster_makes_the_same_files_whatever_is_killed(tmp_path: Path) -> None:
    # Enough shards that the job does not end before it has been disturbed three times, on a fast machine either.
    place = make_place(tmp_path, 24)
    output = place / "ray"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with TwoNodes() as nodes:
        # Each actor takes all of a node.
        options = ["--executor", "ray", "--ray-address", nodes.address, "--workers", "2", "--num-cpus", "2"]
        words = command("ray", *options)
        with subprocess.Popen(words, cwd=place, **pipes) as driver:
            wait_for(lambda: finished(output) >= 1, driver)
            driver.send_signal(signal.SIGKILL)
            driver.communicate()
        assert not (output / "manifest.json").exists()
        with subprocess.Popen(words, cwd=place, **pipes) as driver:
            before = finished(output)
            wait_for(lambda: finished(output) > before and actors(nodes), driver)
            actors(nodes)[0].kill()
            before = finished(output)
            wait_for(lambda: finished(output) > before, driver)
            nodes.kill_second()
            _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert tree(output) == tree(place / "whole")
