"""The tables of docs/patching.md, from directories whose figures are known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from blt_data import Manifest, ShardDirectory, ShardKind, write_manifest, write_shard
from blt_patcher import ByteScheme, SpaceScheme, patch_document
from blt_patcher.precompute import precompute


def load_tool() -> ModuleType:
    """The tool is a script beside the packages, not part of one."""
    file = Path(__file__).parents[2] / "tools" / "patches_by_language.py"
    spec = importlib.util.spec_from_file_location("patches_by_language", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()

TEXTS = {
    "eng": "All human beings are born free. " * 90,
    "nld": "Alle mensen worden vrij geboren. " * 90,
    "rus": "Все люди рождаются свободными. " * 60,
    "jpn": "すべての人間は、生れながらにして自由であり、" * 60,
    "xxx": "too short",
}


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("abc где", "Latin"),
        ("где abcd", "Latin"),
        ("где ab", "Cyrillic"),
        ("漢字", "Han"),
        ("123 !", "none"),
        ("", "none"),
    ],
)
def test_the_script_of_most_letters_is_taken(text: str, script: str) -> None:
    assert TOOL.script_of(text) == script


def test_rows_hold_the_medians_of_each_script(tmp_path: Path) -> None:
    entry = write_shard(
        tmp_path / "shard-00000.arrow",
        kind=ShardKind.BYTES,
        document_ids=[f"{language}/text" for language in TEXTS],
        contents=[text.encode() for text in TEXTS.values()],
        sources=["x"] * len(TEXTS),
        provenance={},
    )
    write_manifest(tmp_path, Manifest(kind=ShardKind.BYTES, shards=(entry,)))
    for scheme in (SpaceScheme(), ByteScheme()):
        precompute(ShardDirectory.open(tmp_path), tmp_path / scheme.name, scheme=scheme)
    arguments = [str(tmp_path / "space"), str(tmp_path / "byte"), "--by-id", "^([a-z]+)/"]
    result = CliRunner().invoke(TOOL.main, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines[2:5]}
    assert list(cells) == ["Latin", "Cyrillic", "Japanese"]
    counts = {name: patch_document(SpaceScheme(), text.encode()).size for name, text in TEXTS.items()}
    sizes = {name: len(text.encode()) for name, text in TEXTS.items()}
    means = [(sizes[name] + 2) / counts[name] for name in ("eng", "nld")]
    assert cells["Latin"][0] == "2"
    assert cells["Latin"][2] == f"{np.median(means):.2f}"
    own = [len(TEXTS["rus"]) / (counts["rus"] - 1), counts["rus"] / counts["eng"]]
    assert cells["Cyrillic"][1] == f"{sizes['rus'] / len(TEXTS['rus']):.2f}"
    assert cells["Cyrillic"][3:5] == [f"{value:.2f}" for value in own]
    assert cells["Japanese"][5:] == ["1.00", "0.33", f"{(sizes['jpn'] + 2) / (sizes['eng'] + 2):.2f}"]
    assert f"- **Cyrillic**: rus {(sizes['rus'] + 2) / counts['rus']:.2f}" in lines
    assert "xxx" not in result.output
    result = CliRunner().invoke(TOOL.main, [*arguments, "--reference", "fra"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has no language 'fra'; name one with --reference" in result.stderr
