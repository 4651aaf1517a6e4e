"""The command line: what it prints, and one clear sentence for each kind of bad input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tests.blt_train.samples import byte_config, text_documents, write_patched

import blt_train
from blt_data import frame
from blt_model import SamplingOptions, next_byte_entropy, pack_documents
from blt_model.generation import decode_stream
from blt_model.weights.native import model_fingerprint, save_model
from blt_patcher import EntropyScheme
from blt_train import generate
from blt_train.cli import main
from blt_train.inputs import architecture_of_config
from blt_train.parallel.seeding import fresh_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def launch(workplace: Path, config: str, kind: str, *overrides: str) -> Result:
    return run("launch", config, f"run={workplace / 'run'}", f"data.train={workplace / kind}", *overrides)


def assert_refused(result: Result, *words: str) -> None:
    """Status 1 and one sentence with these words."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


@pytest.fixture
def trained(workplace: Path) -> Path:
    result = launch(workplace, "debug-entropy", "bytes", "schedule.total_steps=2")
    assert result.exit_code == 0, result.output
    return workplace / "run"


def test_launch_evaluate_generate(workplace: Path, trained: Path) -> None:
    again = launch(workplace, "debug-entropy", "bytes", "schedule.total_steps=2")
    assert again.exit_code == 0
    assert "step-00000002" in again.stdout
    for checkpoint in (trained, trained / "latest", trained / "checkpoints" / "step-00000002"):
        evaluated = run(
            "evaluate", "--checkpoint", checkpoint, "--data", workplace / "bytes-holdout", "--device", "cpu"
        )
        assert evaluated.exit_code == 0, evaluated.output
        assert "bits per byte" in evaluated.stdout
    output = workplace / "sample.txt"
    options = ["--max-new-bytes", 20, "--temperature", 1, "--seed", 3, "--device", "cpu"]
    written = run("generate", "--checkpoint", trained, "--prompt", "été ", *options, "--output", output)
    assert written.exit_code == 0, written.output
    assert written.stdout.startswith("été ")
    sampling = SamplingOptions(temperature=1.0, seed=3)
    values = bytes(generate(trained, "été ".encode(), max_new_bytes=20, sampling=sampling, device="cpu"))
    assert output.read_bytes() == "été ".encode() + values
    assert written.stdout == "été " + "".join(decode_stream([values])) + "\n"


def test_blt_generates_from_its_run_alone(workplace: Path) -> None:
    scorer = fresh_model(architecture_of_config(byte_config(workplace, "any")), 0).eval()
    save_model(scorer, workplace / "scorer")
    documents = text_documents(30)
    entropies = [
        next_byte_entropy(scorer(pack_documents([np.append(frame(content), 0)])[0])).detach().numpy().astype("float16")
        for content in documents
    ]
    scheme = EntropyScheme(threshold=float(entropies[0].mean()))
    fingerprint = model_fingerprint(scorer)
    write_patched(workplace / "scored", documents, scheme, entropies=entropies, entropy_fingerprint=fingerprint)
    done = launch(workplace, "debug-blt", "scored", "schedule.total_steps=2", f"entropy_model={workplace / 'scorer'}")
    assert done.exit_code == 0, done.output
    shutil.rmtree(workplace / "scorer")
    written = run("generate", "--checkpoint", workplace / "run", "--prompt", "the ", "--max-new-bytes", 5)
    assert written.exit_code == 0, written.output

    stranger = fresh_model(architecture_of_config(byte_config(workplace, "any")), 1)
    save_model(stranger, workplace / "stranger")
    arguments = ["generate", "--checkpoint", workplace / "run", "--prompt", "the ", "--max-new-bytes", 5]
    assert_refused(run(*arguments, "--entropy-model", workplace / "stranger"), "is not the entropy model that scored")
    shutil.rmtree(workplace / "run" / "entropy-model")
    assert_refused(run(*arguments), "entropy-model: is missing")


def test_unknown_key(workplace: Path) -> None:
    result = launch(workplace, "debug-entropy", "bytes", "optimizer.lr=1")
    assert_refused(result, "debug-entropy", "unknown key optimizer.lr", "did you mean optimizer.")


def test_unknown_preset_and_model_key(workplace: Path) -> None:
    assert_refused(launch(workplace, "debug-entropy", "bytes", "model.preset=blt-2tb"), "did you mean 'blt-2b'?")
    result = launch(workplace, "debug-entropy", "bytes", "model.overrides.transformer.layers=2")
    assert_refused(result, "did you mean transformer.num_layers?")


def test_missing_and_unfinished_data(workplace: Path) -> None:
    assert_refused(launch(workplace, "debug-entropy", "nowhere"), "nowhere")
    (workplace / "half").mkdir()
    shutil.copy(workplace / "bytes" / "shard-00000.arrow", workplace / "half")
    assert_refused(launch(workplace, "debug-entropy", "half"), "half", "manifest.json")
    assert_refused(launch(workplace, "debug-entropy", "bytes", "data.holdout=nowhere"), "nowhere")


def test_bytes_where_patches_are_needed(workplace: Path) -> None:
    assert_refused(launch(workplace, "debug-blt", "bytes"), "blt-patch precompute")
    assert_refused(launch(workplace, "debug-entropy", "patched"), "blt-data prepare")
    assert_refused(launch(workplace, "debug-entropy", "bytes", "entropy_model=x"), "byte LM without patches")


def test_checkpoint_of_another_architecture(workplace: Path, trained: Path) -> None:
    assert_refused(launch(workplace, "debug-blt", "patched"), "architecture byte-lm, the config says blt")
    result = run("evaluate", "--checkpoint", trained, "--data", workplace / "patched-holdout", "--device", "cpu")
    assert_refused(result, "needed is kind bytes")


def test_missing_and_damaged_checkpoints(workplace: Path, trained: Path) -> None:
    arguments = ["--data", workplace / "bytes-holdout", "--device", "cpu"]
    assert_refused(run("evaluate", "--checkpoint", workplace / "nowhere", *arguments), "no such checkpoint")
    assert_refused(run("evaluate", "--checkpoint", workplace, *arguments), "holds no checkpoint")
    weights = trained / "latest" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert_refused(run("evaluate", "--checkpoint", trained, *arguments), "model.safetensors")
    assert_refused(launch(workplace, "debug-entropy", "bytes", "schedule.total_steps=2"), "model.safetensors")
    weights.write_bytes(whole)
    (trained / "latest" / "optimizer.safetensors").unlink()
    assert_refused(launch(workplace, "debug-entropy", "bytes", "schedule.total_steps=2"), "optimizer.safetensors")
    (trained / "latest" / "trainer.json").write_text("{", encoding="utf-8")
    assert_refused(launch(workplace, "debug-entropy", "bytes", "schedule.total_steps=2"), "trainer.json: is damaged")


def test_unwritable_run(workplace: Path) -> None:
    (workplace / "file").write_text("", encoding="utf-8")
    result = launch(workplace, "debug-entropy", "bytes", f"run={workplace / 'file' / 'run'}")
    assert_refused(result, "file")


def test_openmp_is_set_and_help_answers_before_torch_is_loaded() -> None:
    code = "import os, sys, blt_train.cli; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["10000", "False"]


def test_public_names() -> None:
    assert all(hasattr(blt_train, name) for name in blt_train.__all__)
    assert not hasattr(blt_train, "nothing")
