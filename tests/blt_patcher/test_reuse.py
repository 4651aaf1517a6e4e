"""blt-patcher in other people's projects: the guide's examples, and schemes that other packages bring."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from tests.blt_patcher.shards import EXECUTABLE, make_bytes, tree

from blt_data import ShardDirectory
from blt_data.errors import InputError
from blt_patcher import (
    FlagScheme,
    IncrementalPatcher,
    patch_document,
    patch_documents,
    scheme_from_json,
    scheme_names,
    scheme_to_json,
)
from blt_patcher.schemes import scheme_packages

Flags = npt.NDArray[np.bool_]


def examples(repository: Path, language: str) -> list[str]:
    """The code of the guide's sections on reuse."""
    guide = (repository / "docs" / "patching.md").read_text(encoding="utf-8")
    part = guide[guide.index("## In your own program") : guide.index("## Scoring")]
    return re.findall(rf"```{language}\n(.*?)```", part, flags=re.DOTALL)


@pytest.fixture
def installed(repository: Path, tmp_path: Path) -> Path:
    """A directory with the guide's scheme installed in it, as pip would leave it."""
    code = next(code for code in examples(repository, "python") if "SentenceScheme" in code)
    entry = re.sub(r"\[project\.entry-points\.\"(.*)\"\]", r"[\1]", examples(repository, "toml")[0]).replace('"', "")
    return install(tmp_path / "site", "sentence_patches", code, entry)


def install(site: Path, module: str, code: str, entry_points: str) -> Path:
    """Write a distribution of one module, as an installer does."""
    info = site / f"{module}-1.5.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(code, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(entry_points)
    (info / "RECORD").write_text(f"{module}.py,,\n{info.name}/METADATA,,\n{info.name}/entry_points.txt,,\n")
    return site


def test_the_examples_of_the_guide(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = [code for code in examples(repository, "python") if "print(" in code]
    assert len(codes) == 3
    for code in codes:
        promised = re.findall(r"print\(.*\)  # (.*)", code)
        exec(compile(code, "guide", "exec"), {})
        printed = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert len(promised) == 1
        assert promised[0].split(", for ")[0] == printed.strip()


def test_the_scheme_of_the_guide_is_short(repository: Path) -> None:
    code = next(code for code in examples(repository, "python") if "SentenceScheme" in code)
    assert len([line for line in code.splitlines() if line.strip()]) < 20


def sentences(content: bytes, mark: bytes, limit: int) -> list[int]:
    """Patch lengths after each mark, pieces of at most `limit` tokens."""
    parts = [part for part in re.split(rb"(?<=" + re.escape(mark) + rb")", content) if part]
    lengths = [len(part) for part in parts]
    # EOS belongs to the last sentence, or is alone if that has ended.
    if not lengths or parts[-1].endswith(mark):
        lengths.append(1)
    else:
        lengths[-1] += 1
    return [1, *(piece for length in lengths for piece in [limit] * (length // limit) + [length % limit] if piece)]


def test_an_installed_scheme_patches_on_the_command_line(installed: Path, tmp_path: Path) -> None:
    documents = [b"One. Two! Three.", b"", b"!", b"no mark at all " * 20, b"a!!b!"]
    make_bytes(tmp_path / "bytes", [documents, documents[:2]])

    def blt_patch(*arguments: str, path: str = str(installed)) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": path}
        command = [*EXECUTABLE, "precompute", str(tmp_path / "bytes"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    options = ["--scheme", "sentence", "--scheme-option", "mark=!", "--max-patch-length", "64"]
    done = blt_patch("--output", str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr
    assert "sentence, max_patch_length 64, mark !" in done.stdout
    directory = ShardDirectory.open(tmp_path / "out", verify=True)
    for row, document in enumerate(documents):
        assert directory.shard(0).patch_lengths(row).tolist() == sentences(document, b"!", 64)
    provenance: dict[str, Any] = dict(directory.manifest.provenance)
    assert provenance["scheme"] == {"scheme": "sentence", "version": 1, "max_patch_length": 64, "mark": "!"}
    assert provenance["packages"]["sentence-patches"] == "1.5"
    before = tree(tmp_path / "out")
    again = blt_patch("--output", str(tmp_path / "out"), *options)
    assert (again.returncode, tree(tmp_path / "out")) == (0, before)
    missing = blt_patch("--output", str(tmp_path / "other"), *options, path="")
    assert missing.returncode != 0
    assert "'sentence' is not one of" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_installed_schemes_by_name(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))
    assert scheme_names()[-1] == "sentence"
    scheme = scheme_from_json({"scheme": "sentence", "version": 1, "mark": "?"})
    assert scheme_from_json(scheme_to_json(scheme)) == scheme
    assert scheme_packages(scheme) == {"sentence-patches": "1.5"}
    assert patch_document(scheme, b"Who? Me.").tolist() == [1, 4, 5]
    with pytest.raises(InputError, match="scheme sentence is not incremental"):
        IncrementalPatcher(scheme)
    cases: list[tuple[dict[str, object], str]] = [
        ({"version": 2}, "sentence has version 2, but what is installed reads version 1"),
        ({"marks": "?"}, "no field 'marks'; the nearest is 'mark'"),
        ({"max_patch_length": 0}, "max_patch_length of scheme sentence is 0"),
    ]
    for values, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            scheme_from_json({"scheme": "sentence", "version": 1, **values})


CLASS = "from blt_patcher import FlagScheme\nclass Scheme(FlagScheme):\n    name = {!r}\n"


@pytest.mark.parametrize(
    ("code", "entries", "sentence"),
    [
        ("import nothing_of_this_name", "word = {}:Scheme", "word cannot be loaded from .*ModuleNotFoundError"),
        ("Scheme = 3", "word = {}:Scheme", "which is no class derived from FlagScheme"),
        (CLASS.format("other"), "word = {}:Scheme", "which calls itself 'other'"),
        (CLASS.format("word"), "word = {}:Scheme", "word is offered by .* and by .*; uninstall"),
    ],
)
def test_installed_schemes_that_are_none(
    code: str, entries: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module imported once is not read again, so each case has one of its own.
    module = "scheme_" + re.sub(r"\W", "", str(tmp_path))[-30:]
    if "offered" in sentence:
        install(tmp_path / "more", f"{module}_more", code, f"[blt_patcher.schemes]\nword = {module}_more:Scheme\n")
        monkeypatch.syspath_prepend(str(tmp_path / "more"))
    site = install(tmp_path / "site", module, code, f"[blt_patcher.schemes]\n{entries.format(module)}\n")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(InputError, match=sentence):
        scheme_from_json({"scheme": "word", "version": 1})


def test_our_own_names_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = CLASS.format("space")
    monkeypatch.syspath_prepend(str(install(tmp_path, "thief", code, "[blt_patcher.schemes]\nspace = thief:Scheme\n")))
    assert scheme_names().count("space") == 1
    assert type(scheme_from_json({"scheme": "space", "version": 1})).__module__ == "blt_patcher.rules"


@dataclass(frozen=True, kw_only=True)
class Given(FlagScheme):
    """Whatever a function says."""

    name: ClassVar[str] = "given"
    needs_entropies: ClassVar[bool] = True

    rule: Callable[[npt.NDArray[np.uint8], npt.NDArray[np.float16] | None], Any]

    def starts(self, content: npt.NDArray[np.uint8], entropies: npt.NDArray[np.float16] | None) -> Flags:
        return self.rule(content, entropies)  # type: ignore[no-any-return]


def test_schemes_get_bytes_and_rounded_entropies() -> None:
    seen = []

    def rule(content: npt.NDArray[np.uint8], entropies: npt.NDArray[np.float16] | None) -> Flags:
        assert entropies is not None
        assert not content.flags.writeable
        seen.append((content.tobytes(), entropies.tolist()))
        return np.concatenate([[True, True], entropies[1:-1] > 1])

    nats = np.array([5, 0.1, 1.0001, 2, 5, 3, 3], np.float32)
    patched = patch_documents(Given(rule=rule), np.frombuffer(b"?abc", np.uint8), np.array([1, 4, 4]), nats)
    assert seen == [(b"abc", [5, float(np.float16(0.1)), 1, 2, 5]), (b"", [3, 3])]
    assert [patched.document(0).tolist(), patched.document(1).tolist()] == [[1, 3, 1], [1, 1]]
    with pytest.raises(InputError, match="scheme given needs entropies"):
        patch_document(Given(rule=rule), b"abc")


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (lambda c, e: [True] * (c.size + 2), r"gives list for document 0; it must give bool \[5\]"),
        (lambda c, e: np.ones(c.size + 2), r"gives float64 \[5\] for document 0"),
        (lambda c, e: np.ones(c.size, bool), r"gives bool \[3\] for document 0"),
        (lambda c, e: np.arange(c.size + 2) == 0, "starts no patch at BOS or after it in document 0"),
        (lambda c, e: 1 // 0, r"scheme given failed on document 0: ZeroDivisionError"),
        (lambda c, e: c.fill(0), r"failed on document 0: ValueError.*read-only"),
    ],
)
def test_boundaries_that_are_none_are_refused(rule: Callable[..., Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        patch_document(Given(rule=rule), b"abc", np.ones(5, np.float16))


def test_fields_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(InputError, match=r"rule of scheme given is .*; it must be a string, a number"):
        scheme_to_json(Given(rule=len))  # type: ignore[arg-type]


def test_the_command_line_needs_no_torch(tmp_path: Path) -> None:
    make_bytes(tmp_path / "bytes")
    code = (
        "import sys\n"
        "for name in ('torch', 'blt_model', 'tokenizers', 'ray', 'matplotlib'): sys.modules[name] = None\n"
        "from blt_patcher.cli import main\n"
        f"main(['precompute', {str(tmp_path / 'bytes')!r}, '--output', {str(tmp_path / 'out')!r}, *sys.argv[1:]])\n"
    )
    run = [sys.executable, "-c", code, "--scheme"]
    done = subprocess.run([*run, "space"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ShardDirectory.open(tmp_path / "out").manifest.patches
    (tmp_path / "tokenizer.json").write_text("{}")
    refused = subprocess.run(
        [*run, "bpe", "--tokenizer", str(tmp_path / "tokenizer.json")], capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "scheme bpe needs tokenizers; pip install 'blt-patcher[bpe]'" in refused.stderr
    assert "Traceback" not in refused.stderr
