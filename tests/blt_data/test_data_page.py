"""docs/data.md is right: its readers read our shards without our packages, and its commands and keys exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pyarrow as pa
import pytest
from click.testing import CliRunner

from blt_data import ShardEntry, ShardKind, read_manifest
from blt_data.cli import main
from blt_data.readers import reasons
from blt_data.recipe import Recipe, SourceSpec, read_recipe
from blt_data.shards.schema import shard_schema
from blt_data.sources.names import COLLECTIONS

from .corpora import write_parquet
from .shard_samples import Document, make_directory

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")

DOCUMENTS: list[Document] = [("ä", "naïve\0".encode(), "one"), ("b", b"", "two"), ("c", b"\xff\xfe", "one")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def block(word: str) -> str:
    [found] = [text for text in blocks("python") if word in text]
    return str(found)


def run_alone(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run in a Python that cannot see our packages: -I, and an import hook that refuses them."""
    hidden = "import sys; sys.modules['blt_data'] = None\n"
    command = [sys.executable, "-I", "-c", hidden + program]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("kind", ShardKind)
def test_readers_in_the_page(tmp_path: Path, kind: ShardKind, compression: str) -> None:
    patched = kind is ShardKind.PATCHED
    folder = tmp_path / "d"
    make_directory(
        folder,
        [DOCUMENTS, DOCUMENTS[:1]],
        kind=kind,
        entropies=patched,
        provenance={"from": "here"},
        compression=compression,  # type: ignore[arg-type]
    )
    reader = block("def documents")
    assert len([line for line in reader.splitlines() if line.strip()]) <= 10
    done = run_alone(f"{reader}\nfor document in documents('.'): print(document)", folder)
    assert (done.returncode, done.stderr) == (0, "")
    read = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert [(row["document_id"], row["content"], row["source"]) for row in read] == [*DOCUMENTS, DOCUMENTS[0]]
    for row in read if patched else ():
        assert sum(row["patch_lengths"]) == len(row["content"]) + 2
        assert row["entropies"] == list(range(len(row["content"]) + 2))
    checker = block("hashlib")
    done = run_alone(checker, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{kind} {{'from': 'here'}} ä {DOCUMENTS[0][1]!r}\n"
    if compression == "none":
        path = folder / "shard-00000.arrow"
        path.write_bytes(path.read_bytes().replace(b"na\xc3", b"no\xc3"))
        assert "AssertionError" in run_alone(checker, folder).stderr


def test_page_names_every_key_of_the_format(tmp_path: Path) -> None:
    make_directory(tmp_path / "d", [DOCUMENTS], kind=ShardKind.PATCHED)
    with pa.ipc.open_file(str(tmp_path / "d" / "shard-00000.arrow")) as reader:
        keys = {key.decode() for key in reader.schema.metadata}
    keys |= set(json.loads((tmp_path / "d" / "manifest.json").read_text()))
    keys |= {field.name for field in fields(ShardEntry)}
    keys |= set(shard_schema(ShardKind.PATCHED, entropies=True).names)
    assert {key for key in keys if f"`{key}`" not in PAGE} == set()


def test_page_names_every_source_reason_and_recipe_key() -> None:
    names = set(COLLECTIONS) | {value for name, value in vars(reasons).items() if name.isupper()}
    names |= {field.name for kind in (Recipe, SourceSpec) for field in fields(kind)} - {"sources", "seed"}
    assert {name for name in names if f"`{name}`" not in PAGE} == set()
    assert "`unrecognised file`" in PAGE
    assert "`duplicate`" in PAGE


def test_recipe_in_the_page_is_one(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    (tmp_path / "mix.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "mix.yaml")
    assert recipe.shares() == (7_500_000_000, 2_500_000_000)
    assert [spec.name for spec in recipe.sources] == [None, "books"]


def shown_commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("blt-data ")]


def test_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that need neither a network nor a cluster, in the page's order and in one directory."""
    monkeypatch.chdir(tmp_path)
    done = 0
    for words in shown_commands():
        if any(word.startswith(("--executor", "--slurm", "hf:", "s3:", "fineweb", "dclm")) for word in words):
            continue
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, (words, result.stderr)
        done += 1
    assert done >= 6
    shutil.rmtree(tmp_path / "data")


def test_options_of_the_page_exist() -> None:
    commands = {name: command for name, command in main.commands.items() if isinstance(command, click.Command)}
    known = {option for command in commands.values() for parameter in command.params for option in parameter.opts}
    # Of commands of the other packages.
    known |= {"--entropies"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) - known == set()
    for words in shown_commands():
        own = {option for parameter in commands[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= own


@pytest.mark.parametrize("package", ["spacy", None])
def test_example_with_a_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str | None) -> None:
    """As it is where spaCy is installed; and with a filter that needs no other package."""
    monkeypatch.chdir(tmp_path)
    texts = ["the and of to have with that be " * 20] * 7 + ["too short"] * 3
    write_parquet(tmp_path / "a.parquet", texts, ids=[f"doc-{index}" for index in range(10)])
    program = block("GopherQualityFilter").replace("fineweb-edu/sample-10BT", "a.parquet").replace("0.01", "0.5")
    if package is None:
        program = program.replace("GopherQualityFilter()", "LambdaFilter(lambda document: len(document.text) > 20)")
        program = program.replace("GopherQualityFilter", "LambdaFilter")
    else:
        pytest.importorskip(package)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r" 10 7 4480$", done.stdout.strip())
    splits = [read_manifest(tmp_path / "data" / "filtered" / split) for split in ("train", "holdout")]
    assert sum(manifest.documents for manifest in splits) == 7
    [(reason, skipped)] = splits[0].skipped.items()
    assert reason.startswith("dropped by ")
    assert (skipped.count, skipped.bytes) == (3, 27)
    assert splits[0].provenance["steps"]


def test_links_of_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in PAGE.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\((#?[^)]+)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / "docs" / target.split("#")[0]).exists(), target
