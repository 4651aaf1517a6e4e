"""The config: strict, typed, documented field by field, and every field read."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blt_train import ConfigError, TrainConfig, config, load_config, packaged_configs
from blt_train.config_files import known_keys
from blt_train.config_parsing import config_from_mapping, config_to_yaml
from blt_train.inputs import architecture_of_config

SMALL: dict[str, Any] = {"run": "r", "model": {"preset": "entropy-debug"}, "data": {"train": "d"}}


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configs_are_read_back_as_written(name: str, tmp_path: Path) -> None:
    loaded = load_config(name)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(loaded), encoding="utf-8")
    assert load_config(path) == loaded
    architecture_of_config(loaded)
    loaded.batch.micro_batches(1)


def test_overrides_have_yaml_types() -> None:
    loaded = load_config(
        "debug-blt",
        [
            "seed=7",
            "optimizer.learning_rate=1e-3",
            "evaluation.every=null",
            "precision=bfloat16",
            "model.overrides.latent.num_layers=1",
            "data.verify=false",
        ],
    )
    assert (loaded.seed, loaded.optimizer.learning_rate, loaded.evaluation.every) == (7, 1e-3, None)
    assert loaded.precision is config.Precision.BFLOAT16
    assert loaded.model.overrides == {"latent": {"num_layers": 1}}
    assert loaded.data.verify is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "unknown key optimizer.learning_rat; did you mean optimizer.learning_rate?"),
        ("learning_rate=1", "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        ("sed=1", "unknown key sed; did you mean seed?"),
        ("optimiser.beta1=0.5", "unknown key optimiser; did you mean optimizer?"),
        ("seed=1.5", "seed must be a whole number, not 1.5"),
        ("seed=true", "seed must be a whole number, not True"),
        ("compile=1", "compile must be true or false, not 1"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a number, not 'fast'"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be a finite number above 0, not -1.0"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate must be a finite number above 0, not nan"),
        ("precision=float8", "precision must be one of float32, bfloat16, not 'float8'"),
        ("device=tpu", "device must be auto, cpu or cuda, not 'tpu'"),
        ("schedule=5", "schedule must be a mapping of keys, not 5"),
        ("schedule.total_steps=0", "schedule.total_steps must be at least 1, not 0"),
        ("data.sequence_patches=3", "data.sequence_patches must be at least 4, not 3"),
        ("seed", "override 'seed' must have the form key=value, such as schedule.total_steps=100"),
        ("seed.x=1", "override 'seed.x=1': seed is a value, not a section"),
        ("model.overrides=3", "model.overrides must be a mapping of keys, not 3"),
        ("threads=100000", "threads must be at least 1 and at most 1024, or null, not 100000"),
        (f"model={'[' * 20_000}", "the value is not valid YAML"),
        (f"model={'9' * 5000}", "the value is not valid YAML"),
    ],
)
def test_wrong_overrides(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("run: r\nseed: 0\nmodel: {preset: entropy-debug}\ndata: {train: d}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if override.count("=") and not message.startswith(("override ", "the value")):
        assert str(path) in str(caught.value)


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.train is missing"):
        config_from_mapping({"run": "r", "model": {"preset": "entropy-debug"}, "data": {}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1, 2]", "must be a mapping"),
        (b"a: [", "is not valid YAML"),
        (b"a: " + b"[" * 20_000, "is not valid YAML"),
        (b"a: " + b"9" * 5000, "is not valid YAML"),
        (b"a: 2020-13-45", "is not valid YAML"),
        (b"\xff\xfe", r"is no text in UTF-8 \(byte 1\)"),
    ],
    ids=["list", "unclosed", "deep", "long number", "no date", "binary"],
)
def test_files_that_are_no_config(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "broken.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nowhere.yaml", "no such config file, nor one of the package's configs (blt-train configs lists them)"),
        ("debug-bltt", "did you mean debug-blt"),
        ("blt-1b", "did you mean blt-1b-dclm-h100x"),
        ("debug blt", "did you mean debug-blt"),
    ],
)
def test_missing_file_names_the_packaged_configs(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert str(caught.value).startswith(f"{name}: no such config file")
    assert hint in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_divide_among_processes(world_size: int) -> None:
    batch = config.BatchConfig(sequences_per_step=24, sequences_per_micro_batch=3)
    assert batch.micro_batches(world_size) * world_size * 3 == 24


def test_batches_that_do_not_divide() -> None:
    batch = config.BatchConfig(sequences_per_step=24, sequences_per_micro_batch=3)
    with pytest.raises(ConfigError, match=r"24, which is no multiple of 3 process.* 3 .*= 9"):
        batch.micro_batches(3)


def config_classes() -> Iterator[type]:
    for _, cls in inspect.getmembers(config, dataclasses.is_dataclass):
        if isinstance(cls, type):
            yield cls


def test_every_field_is_documented() -> None:
    tree = ast.parse(inspect.getsource(config))
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.name}: line {field.lineno} has no text below it"


def test_every_field_is_read(repository: Path) -> None:
    source = repository / "packages" / "blt-train" / "src" / "blt_train"
    read: set[str] = set()
    for path in source.rglob("*.py"):
        if path.name != "config.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for cls in config_classes():
        # The batch's fields are read by its own method too, which works out the micro batches.
        unread = {item.name for item in dataclasses.fields(cls)} - read
        assert not unread, f"{cls.__name__}: nobody reads {unread}"


def test_every_key_is_in_the_guide(repository: Path) -> None:
    guide = (repository / "docs" / "training.md").read_text(encoding="utf-8")
    missing = [key for key in known_keys(TrainConfig) if f"`{key}`" not in guide]
    assert not missing
