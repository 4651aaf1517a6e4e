"""Export and import: models leave and enter training with their patch scheme and entropy model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import BltForCausalLM

from blt_model import BLT, BLTConfig, ByteLM, ByteLMConfig, load, model_fingerprint, preset, save_model
from blt_patcher import EntropyScheme, SpaceScheme, scheme_to_json
from blt_train.cli import main
from blt_train.models import open_model


def write_model(directory: Path, scheme: Any, *, entropy: bool) -> BLT:
    config, lm = preset("blt-debug"), preset("entropy-debug")
    assert isinstance(config, BLTConfig)
    assert isinstance(lm, ByteLMConfig)
    model = BLT(config)
    save_model(model, directory)
    if entropy:
        save_model(ByteLM(lm), directory / "entropy_model")
    (directory / "patching.json").write_text(json.dumps(scheme_to_json(scheme)))
    return model


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_export_to_transformers_and_import_again(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", EntropyScheme(threshold=2.5), entropy=True)
    result = run("export", tmp_path / "model", "--output", tmp_path / "theirs", "--format", "transformers")
    assert result.exit_code == 0, result.output
    assert "parameters" in result.output
    theirs: Any = BltForCausalLM.from_pretrained(tmp_path / "theirs")
    tokens = torch.from_numpy(np.random.default_rng().integers(4, 260, (1, 40)))
    assert torch.isfinite(theirs(tokens, use_cache=False).logits).all()  # it patches by its own patcher
    result = run("import", tmp_path / "theirs", "--output", tmp_path / "again")
    assert result.exit_code == 0, result.output
    opened, before = open_model(tmp_path / "again", device="cpu"), open_model(tmp_path / "model", device="cpu")
    assert model_fingerprint(opened.model) == model_fingerprint(model)
    assert opened.scheme == before.scheme
    assert opened.entropy_model is not None
    assert before.entropy_model is not None
    assert model_fingerprint(opened.entropy_model) == model_fingerprint(before.entropy_model)


def test_an_imported_model_generates(tmp_path: Path) -> None:
    write_model(tmp_path / "model", EntropyScheme(threshold=2.5), entropy=True)
    result = run(
        "generate", "--checkpoint", tmp_path / "model", "--prompt", "a", "--max-new-bytes", 5, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output


def test_a_model_patched_at_spaces_is_exported_alone(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SpaceScheme(), entropy=False)
    result = run("export", tmp_path / "model", "--output", tmp_path / "theirs", "--format", "transformers")
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "theirs").entropy_model is None
    assert not json.loads((tmp_path / "theirs" / "config.json").read_text())["patch_in_forward"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "nowhere", "--output", "out"], "no such checkpoint or run directory"),
        (["export", "full", "--output", "out"], "holds no checkpoint"),
        (["export", "bare", "--output", "out"], "has no trainer.json and no patching.json"),
        (["export", "lacking", "--output", "out"], "holds no entropy_model"),
        (["export", "model", "--output", "full"], "is not empty"),
        (["export", "model", "--output", ""], "is an empty text"),
        (["import", "broken", "--output", "out"], "is no JSON"),
    ],
)
def test_what_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", EntropyScheme(threshold=2.5), entropy=True)
    write_model(tmp_path / "lacking", EntropyScheme(threshold=2.5), entropy=False)
    write_model(tmp_path / "bare", SpaceScheme(), entropy=False)
    (tmp_path / "bare" / "patching.json").unlink()
    for name in ("full", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "broken" / "config.json").write_text("{")
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
