"""The GPU scripts at their smallest size on the CPU: each runs through and records what it says it does."""

import importlib
import json
import math
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def in_checkout(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts are run from the repository's root."""
    monkeypatch.chdir(repository)
    monkeypatch.syspath_prepend(str(repository))


def recorded(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, object]]:
    monkeypatch.setenv("OUT", str(tmp_path))
    importlib.import_module(f"tools.bench.gpu.{name}").main(["--tiny", *arguments])
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["device"] == "cpu"
    assert document["torch"]
    assert document["rows"]
    rows: list[dict[str, object]] = document["rows"]
    return rows


@pytest.mark.parametrize("name", ["training_step", "entropy_job", "generation"])
def test_speeds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = recorded(name, [], tmp_path, monkeypatch)
    assert all(float(str(row["bytes/s"])) > 0 for row in rows)
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["rows"] == rows


def test_profile_of_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are kernels on a GPU only; the texts are generated all the same."""
    monkeypatch.setenv("OUT", str(tmp_path))
    importlib.import_module("tools.bench.gpu.generation").main(["--tiny", "--profile", "--cases", "rows1/"])
    assert json.loads((tmp_path / "generation_profile.json").read_text())["rows"] == []


def test_peak_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = recorded("peak_memory", [], tmp_path, monkeypatch)
    assert [row["case"] for row in rows] == ["debug-entropy/64x2/none", "debug-blt/64x2/selective"]
    assert all(float(str(row["reckoned GB"])) > 0 and math.isfinite(float(str(row["loss"]))) for row in rows)


def test_numerics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = recorded("numerics", [], tmp_path, monkeypatch)
    assert {"loss of a BLT", "hash embeddings", "entropies"} <= {str(row["what"]) for row in rows}
    assert all(row["ok"] for row in rows)


def test_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = recorded("attention", [], tmp_path, monkeypatch)
    assert [row["shape"] for row in rows] == ["local", "latent", "entropy"]
    assert all(row["ok"] for row in rows)
    with pytest.raises(SystemExit):
        recorded("attention", ["--tune"], tmp_path, monkeypatch)


def test_cross_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = recorded("cross_attention", [], tmp_path, monkeypatch)
    assert {"bytes read patches", "patches read bytes, padded", "maximum"} <= {str(row["what"]) for row in rows}
    assert all(row["ok"] for row in rows)
    with pytest.raises(SystemExit):
        recorded("cross_attention", ["--tune"], tmp_path, monkeypatch)


def test_matvec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU torch's own products only."""
    rows = recorded("matvec", [], tmp_path, monkeypatch)
    assert [row["case"] for row in rows] == ["latent/qkv", "latent/output", "latent/gate", "latent/down"]
    assert all(float(str(row["us"])) > 0 for row in rows)


def test_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs a GPU of compute capability 9; elsewhere it says so by having no rows."""
    monkeypatch.setenv("OUT", str(tmp_path))
    importlib.import_module("tools.bench.gpu.resident").main(["--tiny"])
    assert json.loads((tmp_path / "resident.json").read_text())["rows"] == []


def test_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLT_SAMPLE", str(tmp_path))  # holds no Parquet file: made up text
    rows = {str(row["stage"]): row for row in recorded("real_run", [], tmp_path, monkeypatch)}
    assert set(rows) == {"entropy LM", "score and patch", "BLT", "generate"}
    assert all(math.isfinite(float(str(rows[stage]["holdout_bpb"]))) for stage in ("entropy LM", "BLT"))


def test_driver(capfd: pytest.CaptureFixture[str]) -> None:
    from tools.bench.gpu.__main__ import main

    main(["--tiny", "--parts", "generation", "--budget", "60"])
    last = capfd.readouterr().out.splitlines()[-1]
    results = json.loads(last)
    assert results["generation"]["exit"] == 0
    assert results["generation"]["rows"]
    with pytest.raises(SystemExit):
        main(["--parts", "generatoin"])
