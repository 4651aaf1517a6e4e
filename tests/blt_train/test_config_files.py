"""Configs that are put together from parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from blt_train import ConfigError, load_config, packaged_configs
from blt_train.cli import main
from blt_train.config_files import describe_packaged_configs, merge, packaged_parts, read_parts
from blt_train.config_parsing import config_to_yaml


def write(folder: Path, **files: str) -> Path:
    """YAML files; returns the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


def test_later_wins_and_sections_are_merged(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        top="extends: [one.yaml, two.yaml]\nrun: top\noptimizer: {beta1: 0.8}\n",
        one="extends: debug-blt\nrun: one\nseed: 1\noptimizer: {beta1: 0.5, beta2: 0.6}\n",
        two="seed: 2\noptimizer: {beta2: 0.7}\nmodel: {overrides: {latent: {num_layers: 3}}}\n",
    )
    config, base = load_config(path), load_config("debug-blt")
    assert (config.run, config.seed, config.optimizer.beta1, config.optimizer.beta2) == ("top", 2, 0.8, 0.7)
    assert config.model.preset == base.model.preset
    assert config.model.overrides == {"latent": {"num_layers": 3}}
    assert config.optimizer.learning_rate == base.optimizer.learning_rate
    # Overrides of the command line come last, and what is written down stands by itself.
    assert load_config(path, ["seed=3"]).seed == 3
    whole = write(tmp_path, whole=config_to_yaml(config))
    assert "extends" not in whole.read_text(encoding="utf-8")
    assert load_config(whole) == config


def test_paths_are_seen_from_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", inner="extends: ../base.yaml\nseed: 5\n")
    write(tmp_path, base="extends: debug-entropy\nrun: base\n")
    path = write(tmp_path, outer="extends: deep/inner.yaml\n")
    monkeypatch.chdir("/")
    assert (load_config(path).run, load_config(path).seed) == ("base", 5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: b.yaml\n", "b": "extends: c.yaml\n", "c": "extends: a.yaml\n"}, "a.yaml: extends itself"),
        ({"a": "extends: a.yaml\n"}, "a.yaml: extends itself"),
        (
            {"a": "extends: models/blt-1c\n"},
            "a.yaml: extends names models/blt-1c, which is no packaged config; did you",
        ),
        ({"a": "extends: debug-btl\n"}, "did you mean debug-blt"),
        ({"a": "extends: zzz/qqq\n"}, "which is no packaged config; a path must end in .yaml"),
        ({"a": "extends: gone.yaml\n"}, "a.yaml: extends names gone.yaml, but there is no file"),
        ({"a": "extends: 3\n"}, "a.yaml: extends must be a config's name or a list of names, not 3"),
        ({"a": "extends: [debug-blt, null]\n"}, "extends must be a config's name or a list of names"),
        ({"a": "extends: {debug-blt: 1}\n"}, "extends must be a config's name or a list of names"),
        (
            {"a": "extends: b.yaml\n", "b": "optimizer: {learning_rat: 1}\n"},
            "b.yaml: unknown key optimizer.learning_rat",
        ),
        ({"a": "extends: b.yaml\n", "b": "- 1\n"}, "b.yaml must be a mapping of config keys, not list"),
        ({"a": "extends: b.yaml\n", "b": "run: [\n"}, "b.yaml is not valid YAML"),
        ({"a": "extends: debug-blt\nextend: x\n"}, "a.yaml: unknown key extend"),
        (
            {"a": "extends: b.yaml\n", "b": "schedule:\n  total_steps: 3\n  total_steps: 30\n"},
            "b.yaml gives the key total_steps twice, on line 2 and on line 3: remove one of them",
        ),
    ],
)
def test_wrong_files(files: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, **files)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_ways_to_one_file_are_no_cycle(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        top="extends: [left.yaml, right.yaml]\n",
        left="extends: base.yaml\nseed: 1\n",
        right="extends: base.yaml\n",
        base="extends: debug-blt\nseed: 7\n",
    )
    assert load_config(path).seed == 7


def test_merge_replaces_what_is_no_mapping() -> None:
    below = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2], "f": {"g": 1}}
    assert merge(below, {"a": {"c": {"d": 3}}, "e": [3], "f": None}) == {
        "a": {"b": 1, "c": {"d": 3}},
        "e": [3],
        "f": None,
    }
    assert below["a"] == {"b": 1, "c": {"d": 2}}


def test_every_part_is_used_by_some_config() -> None:
    used = "\n".join(packaged_configs().values())
    assert not [name for name in packaged_parts() if f"- {name}\n" not in used and f"extends: {name}\n" not in used]
    assert read_parts(["hardware/h100x8", "hardware/h100x64"])["plan"] == {"gpu": "h100", "gpus": 64}
    with pytest.raises(ConfigError, match="no packaged config"):
        read_parts(["hardware/h100x9"])


def test_every_packaged_config_says_what_it_is() -> None:
    described = describe_packaged_configs()
    assert set(described) == set(packaged_configs())
    assert all(len(text) > 20 and text.endswith((".", "entropy.")) for text in described.values()), described
    done = CliRunner().invoke(main, ["configs", "1b", "x64"])
    assert done.exit_code == 0
    assert "blt-1b-dclm-h100x64" in done.stdout
    assert "blt-1b-dclm-h100x8 " not in done.stdout
    assert CliRunner().invoke(main, ["configs", "1B", "X64"]).stdout == done.stdout
    done = CliRunner().invoke(main, ["configs", "zzz"])
    assert done.exit_code != 0
    assert "packaged configs has zzz in its name; `blt-train configs` alone lists them all" in done.output


def test_merge_keys_are_no_repeated_ones(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "extends: debug-blt\noptimizer: {<<: {beta1: 0.4, beta2: 0.6}, beta1: 0.5}\n", encoding="utf-8"
    )
    optimizer = load_config(tmp_path / "a.yaml", ["run=x", "data.train=t"]).optimizer
    assert (optimizer.beta1, optimizer.beta2) == (0.5, 0.6)
    with pytest.raises(ConfigError, match=r"gives the key seed twice, on line 1 and on line 1"):
        load_config("debug-blt", ["model.overrides={seed: 1, seed: 2}"])
