"""The native model directory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blt_model import (
    BLT,
    PRESETS,
    BLTConfig,
    ByteLM,
    ByteLMConfig,
    ModelError,
    load_model,
    model_fingerprint,
    preset,
    save_model,
    to_json,
)
from blt_model.weights.streaming import build_model


def blt(seed: int = 0) -> BLT:
    torch.manual_seed(seed)
    config = PRESETS["blt-debug"]
    assert isinstance(config, BLTConfig)
    return BLT(config)


def byte_lm() -> ByteLM:
    config = PRESETS["entropy-debug"]
    assert isinstance(config, ByteLMConfig)
    return ByteLM(config)


@pytest.mark.parametrize("make", [blt, byte_lm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(tmp_path: Path, make: type, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert model_fingerprint(loaded) == model_fingerprint(model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_loads_into_another_dtype(tmp_path: Path) -> None:
    save_model(blt(), tmp_path)
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_fingerprint_tells_weights_and_configurations_apart() -> None:
    first, second = blt(0), blt(1)
    assert model_fingerprint(first) == model_fingerprint(blt(0)) != model_fingerprint(second)
    other = preset("blt-debug", cross_attention={"double_residual": False})
    assert isinstance(other, BLTConfig)
    changed = BLT(other)
    changed.load_state_dict(first.state_dict())
    assert model_fingerprint(changed) != model_fingerprint(first)


def test_saving_twice_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(blt(), tmp_path / name)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failed_save_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(blt(0), tmp_path)
    before = model_fingerprint(blt(0))

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(blt(1), tmp_path)
    monkeypatch.undo()
    assert model_fingerprint(load_model(tmp_path)) == before
    assert len(list(tmp_path.iterdir())) == 2


def _rewrite(path: Path, change: str) -> None:
    tensors = load_file(path)
    if change == "lacks decoder.head.weight":
        del tensors["decoder.head.weight"]
    elif change == "also holds more":
        tensors["more"] = torch.zeros(1)
    else:
        tensors["decoder.head.weight"] = torch.zeros(3, 4)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "words",
    [
        "lacks decoder.head.weight",
        "also holds more",
        r"\[3, 4\] where \[260, 32\]",
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, words: str) -> None:
    save_model(blt(), tmp_path)
    _rewrite(tmp_path / "model.safetensors", words)
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path)


def test_configuration_of_another_model_is_recognised(tmp_path: Path) -> None:
    save_model(blt(), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(to_json(preset("blt-debug", cross_attention={"pooling": "mean"}))))
    with pytest.raises(ModelError, match="another configuration"):
        load_model(tmp_path)
    config.write_text(json.dumps(to_json(PRESETS["entropy-debug"])))
    with pytest.raises(ModelError, match="another configuration"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is missing; name the directory"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "no JSON object"),
        ('{"architecture": "mamba"}', "config.json: architecture is 'mamba'"),
    ],
)
def test_bad_configuration_files_are_named(tmp_path: Path, text: str | None, words: str) -> None:
    save_model(blt(), tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path)


@pytest.mark.parametrize("cut", [None, 0, 7, 5000])
def test_bad_weight_files_are_named(tmp_path: Path, cut: int | None) -> None:
    save_model(blt(), tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if cut is not None:
        path.write_bytes(data[:cut])
    with pytest.raises(ModelError, match=r"model\.safetensors is (missing|damaged)"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["entropy-debug", "blt-debug"])
def test_every_weight_is_filled(name: str) -> None:
    # In this mode torch fills fresh memory with NaN, so a weight that nobody fills shows.
    torch.use_deterministic_algorithms(True)
    try:
        built = build_model(preset(name))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(parameter.isfinite().all()) for parameter in built.parameters())


def test_loading_leaves_the_compiler_alone(tmp_path: Path) -> None:
    save_model(build_model(preset("blt-debug")), tmp_path)
    script = (
        "import sys; from blt_model import load_model;"
        f"load_model({str(tmp_path)!r}); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
