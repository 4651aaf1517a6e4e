"""Weights in and out: transformers' Blt format, the released layout, and what is no model at all."""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.blt_model.samples import framed_document, random_patches
from tests.blt_model.transformers_map import their_blt, their_patcher
from torch import Tensor
from transformers import BltForCausalLM

from blt_model import (
    BLT,
    BLTConfig,
    ByteLM,
    ByteLMConfig,
    ModelError,
    WeightFormat,
    load,
    model_fingerprint,
    pack_documents,
    parameter_counts,
    preset,
    save_model,
    save_transformers,
)
from blt_model.weights import meta_format
from blt_model.weights.naming import Names, blt_pieces, byte_lm_pieces
from blt_model.weights.tensor_files import SafetensorsFiles

SCHEME = {"scheme": "entropy", "version": 1, "max_patch_length": None, "threshold": 2.5}


def blt(**overrides: Any) -> BLT:
    config = preset("blt-debug", **overrides)
    assert isinstance(config, BLTConfig)
    return BLT(config)


def byte_lm() -> ByteLM:
    config = preset("entropy-debug")
    assert isinstance(config, ByteLMConfig)
    return ByteLM(config)


def their_logits(theirs: Any, row: Any, patches: Any) -> Tensor:
    with torch.no_grad():
        out = theirs(torch.from_numpy(row[None, :-1]), patch_lengths=torch.from_numpy(patches[None]), use_cache=False)
    logits: Tensor = out.logits[0]
    return logits


def our_logits(model: BLT, row: Any, patches: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(pack_documents([row], [patches])[0])
    return logits


def assert_equal_to_rounding(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


EXPORTED: dict[str, dict[str, Any]] = {
    "released shape": {},
    "k 3, projected": {"cross_attention": {"k": 3}},
    "decoder first": {"cross_attention": {"decoder_placement": "first"}},
    "deep encoder": {"encoder": {"num_layers": 2}},
    "two hash functions": {"hash_embedding": {"num_functions": 2, "ngram_sizes": [2, 5], "table_size": 97}},
    "other bases": {
        "encoder": {"rope_theta": 10_000.0, "norm_eps": 1e-3},
        "latent": {"rope_theta": 777.0, "num_kv_heads": 1},
        "decoder": {"ffn_dim": 48},
    },
}


@pytest.mark.parametrize("overrides", EXPORTED.values(), ids=EXPORTED.keys())
def test_exported_model_loads_in_transformers(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model, patcher = blt(**overrides), byte_lm()
    save_transformers(model, tmp_path / "out", entropy_model=patcher, patching=SCHEME, max_shard_bytes=400_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    read: Any = BltForCausalLM.from_pretrained
    theirs, report = read(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    rng = np.random.default_rng()
    for length in (0, 1, 90):
        row = framed_document(rng, length)
        patches = random_patches(rng, len(row))
        assert_equal_to_rounding(our_logits(model, row, patches), their_logits(theirs.eval(), row, patches))
    # And back again, bit for bit.
    loaded = load(tmp_path / "out")
    assert loaded.format is WeightFormat.TRANSFORMERS
    assert loaded.patching == SCHEME
    assert loaded.entropy_model is not None
    assert model_fingerprint(loaded.entropy_model) == model_fingerprint(patcher)
    assert {n: t.tolist() for n, t in loaded.model.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }


@pytest.mark.parametrize("encoder_all", [False, True])
def test_directory_written_by_transformers_loads(tmp_path: Path, encoder_all: bool) -> None:
    config = preset("blt-debug", encoder={"num_layers": 2})
    assert isinstance(config, BLTConfig)
    theirs: Any = their_blt(config, encoder_all=encoder_all)
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    loaded = load(tmp_path)
    assert isinstance(loaded.model, BLT)
    assert loaded.entropy_model is None
    rng = np.random.default_rng()
    row = framed_document(rng, 70)
    patches = random_patches(rng, len(row))
    assert_equal_to_rounding(our_logits(loaded.model, row, patches), their_logits(theirs, row, patches))


def test_entropy_model_alone(tmp_path: Path) -> None:
    model = byte_lm()
    theirs: Any = their_patcher(model.config)
    theirs.save_pretrained(tmp_path / "theirs")
    row = torch.from_numpy(framed_document(np.random.default_rng(), 60))
    loaded = load(tmp_path / "theirs").model
    assert isinstance(loaded, ByteLM)
    batch = pack_documents([row.numpy()])[0]
    with torch.no_grad():
        assert_equal_to_rounding(loaded(batch), theirs(row[None, :-1])[2][0])
    save_transformers(model, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert_equal_to_rounding(model(batch), again(row[None, :-1])[2][0])


def released(model: BLT | ByteLM, names: Names) -> dict[str, Tensor]:
    """A model's weights under the names of the released layout."""
    pieces = byte_lm_pieces(names, model.config) if isinstance(model, ByteLM) else blt_pieces(names, model.config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        rows = [len(tensor) if piece.rows is None else piece.rows for piece in pieces[name]]
        parts = zip(pieces[name], tensor.split(rows), strict=True)
        tensors |= {piece.name: part.clone() for piece, part in parts}
    return tensors


def write_released(directory: Path, model: BLT, patcher: ByteLM) -> None:
    config, lm = model.config, patcher.config.transformer
    directory.mkdir(exist_ok=True)
    args: dict[str, Any] = {
        "vocab_size": 260,
        "norm_eps": config.encoder.norm_eps,
        "rope_theta": config.encoder.rope_theta,
        "cross_attn_k": config.cross_attention.k,
        "cross_attn_nheads": config.cross_attention.num_heads,
        "cross_attn_all_layers_encoder": False,
        "cross_attn_all_layers_decoder": True,
        "encoder_hash_byte_group_size": list(config.hash_embedding.ngram_sizes),
        "encoder_hash_byte_group_vocab": config.hash_embedding.table_size,
        "encoder_hash_byte_group_nb_functions": config.hash_embedding.num_functions,
        "local_attention_window_len": config.encoder.window,
    }
    for suffix, part in (
        ("local_encoder", config.encoder),
        ("global", config.latent),
        ("local_decoder", config.decoder),
    ):
        args |= {f"dim_{suffix}": part.dim, f"n_layers_{suffix}": part.num_layers, f"n_heads_{suffix}": part.num_heads}
    (directory / "config.json").write_text(json.dumps({"args": args}))
    save_file(released(model, meta_format.NAMES), directory / "model.safetensors")
    beside = directory / "entropy_model"
    beside.mkdir()
    entropy: dict[str, Any] = {
        "dim": lm.dim,
        "n_layers": lm.num_layers,
        "n_heads": lm.num_heads,
        "sliding_window": lm.window,
    }
    entropy |= {"rope_theta": lm.rope_theta, "norm_eps": lm.norm_eps}
    patcher_args = {"threshold": 1.335442066192627, "patching_mode": "entropy", "max_patch_length": None}
    (beside / "params.json").write_text(json.dumps({"entropy_model": entropy, "data": {"patcher_args": patcher_args}}))
    tensors = {**released(patcher, meta_format.NAMES), "rope.freqs_cis": torch.zeros(3)}
    torch.save({"model": tensors}, beside / "consolidated.pth")


def test_released_layout(tmp_path: Path) -> None:
    model, patcher = blt(), byte_lm()
    write_released(tmp_path, model, patcher)
    loaded = load(tmp_path)
    assert loaded.format is WeightFormat.META
    assert loaded.entropy_model is not None
    assert model_fingerprint(loaded.entropy_model) == model_fingerprint(patcher)
    assert loaded.patching == {**SCHEME, "threshold": 1.335442066192627}
    assert {n: t.tolist() for n, t in loaded.model.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }
    alone = load(tmp_path / "entropy_model").model
    assert isinstance(alone, ByteLM)
    assert model_fingerprint(alone) == model_fingerprint(patcher)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    write_released(tmp_path, blt(), byte_lm())
    marker = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save({"model": {"tok_embeddings.weight": Code()}}, tmp_path / "entropy_model" / "consolidated.pth")
    with pytest.raises(ModelError, match="holds more than weights"):
        load(tmp_path)
    assert not marker.exists()


def test_parameter_counts_are_those_of_the_released_models() -> None:
    """4.534 billion in blt-1b, 3.072 of them hash tables; 99.5 million in the entropy model (fact sheet, §2)."""
    config = preset("blt-1b")
    counts = parameter_counts(config)
    assert round(counts["total"] / 1e6) == 4534
    assert counts["hash_embedding"] == 6 * 500_002 * 1024
    assert round(parameter_counts(preset("entropy-100m"))["total"] / 1e5) == 995


def test_names_missing_extra_and_mis_shaped_tensors(tmp_path: Path) -> None:
    save_transformers(blt(), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    tensors["surplus"] = torch.zeros(1)
    tensors["model.local_encoder.embed_tokens.weight"] = torch.zeros(3, 4)
    save_file(tensors, path)
    with pytest.raises(ModelError) as error:
        load(tmp_path / "out")
    for words in ("lacks lm_head.weight", r"embed_tokens.weight ([3, 4] where [260,", "also holds surplus"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"cross_attention": {"double_residual": False}},
        {"cross_attention": {"pooling": "mean"}},
        {"hash_embedding": {"average": True}},
        {"hash_embedding": {"ngram_sizes": []}},
        {"decoder": {"window": 5}},
    ],
)
def test_models_that_transformers_cannot_compute_are_refused(tmp_path: Path, overrides: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="export it as native"):
        save_transformers(blt(**overrides), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_scheme_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="patches by the scheme 'entropy' alone, not 'space'"):
        save_transformers(blt(), tmp_path / "out", entropy_model=byte_lm(), patching={"scheme": "space"})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "holds no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "is no JSON"),
        (lambda path: (path / "config.json").write_text('{"model_type": "llama"}'), "no known format"),
        (lambda path: (path / "config.json").write_text('{"model_type": "blt"}'), "is missing"),
        (lambda path: (path / "config.json").write_text('{"args": {}}'), "is missing"),
        (lambda path: (path / "config.json").write_text('{"model_type": "blt_patcher", "hidden_size": "x"}'), "."),
    ],
)
def test_what_is_no_model(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path)
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


def test_neither_directory_nor_repository() -> None:
    with pytest.raises(ModelError, match="neither a directory nor a hub repository"):
        load("no/such/directory")


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    save_transformers(blt(), tmp_path / "out", max_shard_bytes=100_000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="which is no file beside it"):
        load(tmp_path / "out")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_with_a_sentence(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.zeros(0), "c": torch.ones(4).half()}
    save_file(tensors, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    # Anything but a ModelError fails the test.
    with suppress(ModelError):
        files = SafetensorsFiles([path])
        for name, info in files.tensors.items():
            files.read(name, torch.empty(info.shape, dtype=info.dtype))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the sizes that Linux tells")
def test_peak_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    """Measured in a process of its own, whose memory before loading is subtracted.

    Its peak is set back before: a process begins with the peak of the one that started it (in `ru_maxrss` for good).
    """
    model = blt(hash_embedding={"table_size": 300_000})
    save_model(model, tmp_path / "native")
    save_transformers(model, tmp_path / "theirs")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert size > 200_000_000
    script = """
import sys, torch, blt_model
import blt_model.weights.loading

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

blt_model.load(sys.argv[1])
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
kept = blt_model.load(sys.argv[2])
print(status("VmHWM") - before)
"""
    save_model(blt(), tmp_path / "small")
    for name in ("native", "theirs"):
        command = [sys.executable, "-c", script, str(tmp_path / "small"), str(tmp_path / name)]
        grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024
        assert grown <= 1.15 * size + (8 << 20), f"{name}: {grown / size:.2f} times the weights"


def test_native_directory_with_entropy_model_and_scheme(tmp_path: Path) -> None:
    model, patcher = blt(), byte_lm()
    save_model(model, tmp_path)
    save_model(patcher, tmp_path / "entropy_model")
    (tmp_path / "patching.json").write_text(json.dumps(SCHEME))
    loaded = load(tmp_path)
    assert loaded.format is WeightFormat.NATIVE
    assert loaded.patching == SCHEME
    assert loaded.entropy_model is not None
    assert model_fingerprint(loaded.entropy_model) == model_fingerprint(patcher)
    shutil.rmtree(tmp_path / "entropy_model")
    assert load(tmp_path).entropy_model is None
