"""Scheme files: what was written is read back, anything else is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from tests.blt_patcher import plain

from blt_data.errors import InputError
from blt_patcher import EntropyScheme, PatchScheme, scheme_to_json
from blt_patcher.scheme_file import read_scheme_file, scheme_file_to_json, write_scheme_file

MODEL = {"fingerprint": "a" * 64, "config": {"layers": 2}, "reset_at_newlines": True}


@given(scheme=plain.schemes)
def test_a_scheme_comes_back(tmp_path_factory: pytest.TempPathFactory, scheme: PatchScheme) -> None:
    file = tmp_path_factory.mktemp("scheme") / "scheme.json"
    record = {"target_patch_length": 4.5, "sample": {"rule": "größer"}}
    write_scheme_file(file, scheme_file_to_json(scheme, calibration=record, entropy_model=MODEL))
    read = read_scheme_file(file)
    assert (read.scheme, read.calibration, read.path) == (scheme, record, file)
    assert read.entropy_model == {"fingerprint": "a" * 64, "reset_at_newlines": True}
    file.write_text(json.dumps(scheme_to_json(scheme)))
    alone = read_scheme_file(file)
    assert (alone.scheme, alone.calibration, alone.entropy_model) == (scheme, None, None)


def test_entropies_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "scheme.json"
    write_scheme_file(file, scheme_file_to_json(EntropyScheme(threshold=1.0), entropy_model=MODEL))
    read = read_scheme_file(file)
    read.check_model(MODEL)
    read.check_model({**MODEL, "config": {}})
    read.check_model(None)
    with pytest.raises(InputError, match=r"scheme.json: holds a threshold for an entropy model with fingerprint aaaa"):
        read.check_model({**MODEL, "fingerprint": "b" * 64})
    with pytest.raises(InputError, match=r"with reset_at_newlines True, but the one used has False; run blt-patch cal"):
        read.check_model({**MODEL, "reset_at_newlines": False})


GOOD: dict[str, Any] = scheme_file_to_json(EntropyScheme(threshold=1.0))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("\udcff", "is no JSON"),
        ("[1]", "is no scheme file"),
        ("{}", "is no scheme file"),
        (json.dumps({**GOOD, "version": 2}), "of version 2, this program reads version 1"),
        (json.dumps({**GOOD, "version": True}), "of version True"),
        (json.dumps({**GOOD, "threshold": 1}), "has an unknown key 'threshold'"),
        (json.dumps({**GOOD, "scheme": None}), "names no scheme"),
        (json.dumps({**GOOD, "scheme": {"scheme": "spaces", "version": 1}}), "patch scheme 'spaces' is unknown"),
        (json.dumps({**GOOD, "scheme": {"scheme": "entropy", "version": 1}}), "lacks its field 'threshold'"),
        (json.dumps({**GOOD, "calibration": 3}), "calibration is int, not an object"),
        (json.dumps({**GOOD, "entropy_model": "x"}), "entropy_model is str, not an object"),
        (json.dumps({"scheme": "entropy", "version": 9, "threshold": 1}), "version 9"),
        (" " * (1 << 20) + "{}", "too large to be a scheme file"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "scheme.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as error:
        read_scheme_file(file)
    assert str(error.value).startswith(f"{file}: ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such scheme file; write one with blt-patch calibrate --output"):
        read_scheme_file(tmp_path / "none.json")
    with pytest.raises(InputError, match="is a directory"):
        read_scheme_file(tmp_path)
