"""Models from the hub through its own client, from a server on the loopback interface that speaks its API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tests.blt_data.hub_server import Fault, Hub, commit_of, serve
from tests.blt_model.generation_oracle import fresh_blt, fresh_byte_lm

from blt_model import BLT, ModelError, WeightFormat, load, model_fingerprint, save_model, save_transformers
from blt_patcher import EntropyScheme, scheme_to_json

NAME = "someone/blt-small"
SCHEME = scheme_to_json(EntropyScheme(threshold=1.5))


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Two revisions: transformers' format in several files with an index, and our own."""
    save_transformers(
        fresh_blt(1), tmp_path / "new", entropy_model=fresh_byte_lm(2), patching=SCHEME, max_shard_bytes=200_000
    )
    save_model(fresh_blt(3), tmp_path / "old")
    readme = {"README.md": b"# A model", "training.bin": bytes(1000)}
    hub = Hub(
        dataset=NAME,
        kind="models",
        revisions={
            commit_of("new"): files_of(tmp_path / "new") | readme,
            commit_of("old"): files_of(tmp_path / "old") | readme,
        },
        branches={"main": commit_of("new"), "v1.0": commit_of("old")},
    )
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with serve(hub):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def one_sentence(error: ModelError) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 400
    return text


def test_sharded_weights_with_index_entropy_model_and_scheme(hub: Hub) -> None:
    shards = [name for name in hub.revisions[commit_of("new")] if name.endswith(".safetensors")]
    assert len(shards) > 2
    loaded = load(NAME)
    assert loaded.format == WeightFormat.TRANSFORMERS
    assert isinstance(loaded.model, BLT)
    assert model_fingerprint(loaded.model) == model_fingerprint(fresh_blt(1))
    assert loaded.entropy_model is not None
    assert model_fingerprint(loaded.entropy_model) == model_fingerprint(fresh_byte_lm(2))
    assert loaded.patching is not None
    assert loaded.patching["threshold"] == 1.5
    fetched = {Path(request.path).name for request in hub.asked("resolve")}
    assert fetched == {*shards, "config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("revision", ["v1.0", commit_of("old")])
def test_a_revision_is_what_was_asked_for(hub: Hub, revision: str) -> None:
    loaded = load(NAME, revision=revision, dtype=torch.float64)
    assert loaded.format == WeightFormat.NATIVE
    assert model_fingerprint(loaded.model) == model_fingerprint(fresh_blt(3).double())
    assert all(commit_of("old") in request.path for request in hub.asked("cdn"))


def test_what_was_fetched_serves_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    load(NAME, revision="v1.0")
    asked = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert model_fingerprint(load(NAME, revision="v1.0").model) == model_fingerprint(fresh_blt(3))
    assert len(hub.requests) == asked
    with pytest.raises(ModelError, match=f"revision v2.0 of {NAME} is not in the local cache") as caught:
        load(NAME, revision="v2.0")
    one_sentence(caught.value)


def test_unknown_names_and_revisions_are_told(hub: Hub) -> None:
    with pytest.raises(ModelError, match="someone/else is not on the hub, or private") as caught:
        load("someone/else")
    one_sentence(caught.value)
    with pytest.raises(ModelError, match=f"{NAME} has no revision 'v9' on the hub") as caught:
        load(NAME, revision="v9")
    one_sentence(caught.value)


def test_a_gated_model_is_told_and_a_token_opens_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"
    with pytest.raises(ModelError, match=f"{NAME} is gated on the hub; ask for access") as caught:
        load(NAME)
    one_sentence(caught.value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert isinstance(load(NAME).model, BLT)


def test_a_hub_that_fails_is_told(hub: Hub) -> None:
    hub.faults.append(Fault(place="info", times=1000, status=500))
    with pytest.raises(ModelError, match=f"{NAME} could not be fetched") as caught:
        load(NAME)
    one_sentence(caught.value)


def test_a_repository_without_its_weights_is_told(hub: Hub) -> None:
    files = dict(hub.revisions[commit_of("new")])
    missing = next(name for name in sorted(files) if name.endswith("-00002-of-00003.safetensors") or "-00002-" in name)
    del files[missing]
    hub.revisions = {**hub.revisions, commit_of("new"): files}
    with pytest.raises(ModelError, match=f"{missing} is missing") as caught:
        load(NAME)
    one_sentence(caught.value)
