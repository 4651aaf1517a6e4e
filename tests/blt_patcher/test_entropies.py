"""Scoring: every document as if whole and alone, whatever the windows and the neighbours."""

from __future__ import annotations

import copy
import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.blt_patcher.shards import make_model

from blt_data.errors import InputError
from blt_data.framing import frame
from blt_model import ByteLM, ByteLMConfig, ModelError, PackedBatch, preset
from blt_model.weights import model_fingerprint, save_model
from blt_model.weights.streaming import build_model
from blt_patcher import EntropyScheme
from blt_patcher.batching import compare_batchings
from blt_patcher.entropies import (
    EntropyScorer,
    choose_device,
    load_entropy_model,
    score_documents,
    scoring_settings,
)

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

#: Empty, one byte, shorter and longer than the model's window of 8, several windows long.
DOCUMENTS = [b"", b"a", b"shorter", "größer als das Fenster 日本語".encode(), b"", bytes(range(256)) * 2, b"\x00\r\n"]


@pytest.fixture(scope="module")
def model() -> ByteLM:
    config = preset("entropy-debug")
    assert isinstance(config, ByteLMConfig)
    torch.manual_seed(5)
    made = ByteLM(config)
    with torch.no_grad():
        # Fresh weights are almost equally unsure everywhere; this makes the entropies vary.
        made.head.weight.mul_(20)
    return made


def join(documents: list[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    content = np.frombuffer(b"".join(documents), np.uint8)
    return content, np.cumsum([0, *map(len, documents)], dtype=np.int64)


def exact_entropies(model: ByteLM, document: bytes) -> npt.NDArray[np.float64]:
    """One document whole, in one forward pass, in float64."""
    tokens = torch.from_numpy(frame(document).astype(np.int64))
    batch = PackedBatch(tokens=tokens, document_offsets=torch.tensor([0, len(tokens)], dtype=torch.int32))
    with torch.inference_mode():
        log_probabilities = copy.deepcopy(model).double()(batch).log_softmax(-1)
    nats: npt.NDArray[np.float64] = -(log_probabilities.exp() * log_probabilities).sum(-1).numpy()
    return nats


@pytest.mark.parametrize("window_tokens", [1, 3, 8, 50, 10_000])
def test_entropies_are_those_of_whole_documents(model: ByteLM, window_tokens: int) -> None:
    content, offsets = join(DOCUMENTS)
    nats = score_documents(model, content, offsets, window_tokens=window_tokens)
    exact = np.concatenate([exact_entropies(model, document) for document in DOCUMENTS])
    assert nats.dtype == np.float16
    assert nats.shape == exact.shape == (content.size + 2 * len(DOCUMENTS),)
    assert exact.std() > 0.3
    # Half a unit in the last place is float16's own rounding; the rest is that of float32 arithmetic.
    excess = np.abs(nats.astype(np.float64) - exact) - 0.5 * np.spacing(nats).astype(np.float64)
    assert excess.max() < 1e-5


def test_neighbours_and_order_change_nothing(model: ByteLM) -> None:
    alone = [score_documents(model, *join([document]), window_tokens=20) for document in DOCUMENTS]
    for order in ([3, 1, 5, 0, 2, 4, 6], [6, 5, 4, 3, 2, 1, 0]):
        packed = score_documents(model, *join([DOCUMENTS[index] for index in order]), window_tokens=33)
        expected = np.concatenate([alone[index] for index in order]).astype(np.float64)
        np.testing.assert_allclose(packed.astype(np.float64), expected, rtol=2**-10, atol=1e-6)


def restarted_entropies(model: ByteLM, document: bytes, dtype: torch.dtype = torch.float64) -> npt.NDArray[np.float64]:
    """The naive form of the reset at new lines: cut before every newline token, score each piece alone."""
    wide = copy.deepcopy(model).to(dtype)
    pieces: list[list[int]] = [[]]
    for token in frame(document).tolist():
        if token == ord("\n") + 4:
            pieces.append([])
        pieces[-1].append(token)
    nats = []
    for piece in pieces:
        tokens = torch.tensor(piece)
        batch = PackedBatch(tokens=tokens, document_offsets=torch.tensor([0, len(tokens)], dtype=torch.int32))
        with torch.inference_mode():
            logarithms = wide(batch).log_softmax(-1)
        nats.append(-(logarithms.exp() * logarithms).sum(-1).numpy())
    return np.concatenate(nats).astype(np.float64)


@pytest.mark.parametrize("window_tokens", [3, 50, 1024, 10_000])
def test_contexts_start_afresh_at_new_lines(model: ByteLM, window_tokens: int) -> None:
    rng = np.random.default_rng()
    lines = [rng.integers(0, 256, size, dtype=np.uint8).tobytes() for size in (0, 1, 30, 700, 0, 5, 2000)]
    documents = [b"\n".join(lines), b"no line", b"\n", b"\n\n\r\nx\n", *DOCUMENTS]
    content, offsets = join(documents)
    nats = score_documents(model, content, offsets, window_tokens=window_tokens, reset_at_newlines=True)
    exact, single = (
        np.concatenate([restarted_entropies(model, document, dtype) for document in documents])
        for dtype in (torch.float64, torch.float32)
    )
    excess = np.abs(nats.astype(np.float64) - exact) - 0.5 * np.spacing(nats).astype(np.float64)
    # No further off than float32 is by itself, which for fresh random lines differs from run to run.
    assert np.abs(single - exact).max() < 1e-4
    assert excess.max() < np.abs(single - exact).max()
    # What follows a newline token is what follows any: nothing before it counts.
    after = [float(value) for value, token in zip(nats, framed(documents), strict=True) if token == ord("\n") + 4]
    assert len(set(after)) == 1
    without = score_documents(model, content, offsets, window_tokens=window_tokens)
    assert (without != nats).any()
    assert EntropyScorer(model, reset_at_newlines=True).identity != EntropyScorer(model).identity


def framed(documents: list[bytes]) -> list[int]:
    return [int(token) for document in documents for token in frame(document)]


def test_padding_and_bfloat16_change_nothing_but_rounding(model: ByteLM) -> None:
    content, offsets = join([*DOCUMENTS, bytes(range(32, 127)) * 40])
    exact = score_documents(model, content, offsets).astype(np.float64)
    # On a CPU nothing but half precision pads its windows.
    for window_tokens in (64, 1100):
        half = score_documents(model, content, offsets, window_tokens=window_tokens, precision="bfloat16")
        assert 1e-4 < float(np.abs(half - exact).mean()) < 0.02
    assert EntropyScorer(model, precision="bfloat16").settings["precision"] == "bfloat16"
    assert next(model.parameters()).dtype == torch.float32
    with pytest.raises(InputError, match="precision 'int4' is not known; choose float32, bfloat16 or float16"):
        EntropyScorer(model, precision="int4")


@pytest.mark.parametrize("lines", [False, True])
def test_float16_is_closer_than_bfloat16(model: ByteLM, lines: bool) -> None:
    content, offsets = join([*DOCUMENTS, bytes(range(32, 127)) * 40])
    exact = score_documents(model, content, offsets, reset_at_newlines=lines).astype(np.float64)
    for window_tokens in (64, 1100):
        scorer = EntropyScorer(model, window_tokens=window_tokens, precision="float16", reset_at_newlines=lines)
        assert scorer.settings["precision"] == "float16"
        found = scorer.score(content, offsets)
        assert 1e-5 < float(np.abs(found - exact).mean()) < 0.004
    assert next(model.parameters()).dtype == torch.float32
    with pytest.raises(InputError, match="in float16 nothing is left to compile; leave --compile out"):
        EntropyScorer(model, precision="float16", compile=True)


def test_a_gpu_scores_in_float16_where_it_can(model: ByteLM) -> None:
    def chosen(of: ByteLM, device: str = "cuda", **options: Any) -> tuple[str, bool]:
        asked: dict[str, Any] = {"window_tokens": None, "precision": None, "compile": None, **options}
        settings = scoring_settings(of, device, **asked)
        return settings["precision"], settings["compiled"]

    assert chosen(model) == chosen(model, precision="float16") == chosen(model, compile=False) == ("float16", False)
    assert chosen(model, compile=True) == chosen(model, precision="bfloat16") == ("bfloat16", True)
    assert chosen(model, precision="float32") == ("float32", True)
    assert chosen(model, "cpu") == ("float32", False)
    large = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in large.named_parameters():
            if name.endswith("attention_norm.weight"):
                weight.mul_(1e6)
    assert chosen(large) == ("bfloat16", True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_what_float16_does_not_hold_is_scored_in_bfloat16(
    model: ByteLM, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.embedding.weight[ord("x") + 4] *= 1e7
    documents = [b"before", b"a document with an x in it", b"after", b"x", b"at the end" * 30]
    options: dict[str, Any] = {"device": device, "window_tokens": 64}
    half, wider = (EntropyScorer(large, precision=precision, **options) for precision in ("float16", "bfloat16"))
    found = half.score(*join(documents), name="shard")
    places = np.cumsum([0, *(len(document) + 2 for document in documents)])
    for index, document in enumerate(documents):
        alone = (wider if b"x" in document else half).score(*join([document]))
        assert np.isfinite(alone).all()
        # Windows as small as these cut a document anywhere, and a GPU's tiles with it, which costs some last bits.
        excess = 0.05 if device == "cuda" else 0
        np.testing.assert_allclose(found[places[index] : places[index + 1]], alone, rtol=0, atol=excess)
    assert caplog.messages == ["shard: 2 of 5 documents are beyond float16; scored in bfloat16"]
    with torch.no_grad():
        large.embedding.weight[ord("x") + 4] = float("nan")
    with pytest.raises(InputError, match=r"shard: the entropy model gives nan for document 1 .* after its token \d+"):
        EntropyScorer(large, precision="float16", **options).score(*join(documents), name="shard")


def test_batchings_are_compared_token_by_token(model: ByteLM) -> None:
    content, offsets = join(DOCUMENTS)
    scheme = EntropyScheme(threshold=3.0)

    def ignore(*amounts: int) -> None: ...

    report = compare_batchings(EntropyScorer(model, window_tokens=100), ignore, scheme, content, offsets)
    assert (report.documents, report.tokens) == (len(DOCUMENTS), content.size + 2 * len(DOCUMENTS))
    # Nothing differs but the last bit of some float16, where float32's rounding tips it.
    assert report.largest < 0.005
    assert report.boundaries <= report.entropies < report.tokens / 50
    assert report.patches > len(DOCUMENTS)

    class Forgetful(EntropyScorer):
        """A scorer whose first byte is felt by all that comes after: 97 in one order, 0 in the other."""

        def score(self, content: npt.NDArray[np.uint8], *args: Any, **options: Any) -> npt.NDArray[np.float16]:
            nats = super().score(content, *args, **options)
            nats[2:] += np.float16(content[0])
            return nats

    report = compare_batchings(Forgetful(model), ignore, scheme, content, offsets)
    assert report.entropies == report.tokens - 2
    assert report.largest > 1


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc's memory manager")
def test_a_long_document_takes_memory_for_its_entropies_alone() -> None:
    # What is allocated, and not the resident size, which keeps for a while what was given back. It is looked at before
    # and after every call that Python makes, in a process of its own, whose memory manager is quick to ask.
    code = """
import ctypes, sys
import numpy as np
from blt_model import ByteLM, preset
from blt_patcher.entropies import EntropyScorer

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

ask = ctypes.CDLL(None).mallinfo2
ask.restype = Info
highest, peaks = 0, []

def look(*event):
    global highest
    info = ask()
    highest = max(highest, info.uordblks + info.hblkhd)

def advance(tokens):
    global highest
    peaks.append((tokens, highest))
    highest = 0

config = preset("entropy-debug", transformer={"dim": 8, "num_layers": 1, "num_heads": 1, "ffn_dim": 8})
scorer = EntropyScorer(ByteLM(config), window_tokens=1024)
text = np.resize(np.arange(256, dtype=np.uint8), int(sys.argv[1]))
scorer.score(text[:9], np.array([0, 9]))  # loads what is loaded once
sys.setprofile(look)
nats = scorer.score(text, np.array([0, text.size]), advance=advance)
sys.setprofile(None)
assert nats.size == text.size + 2
early, late = peaks[: len(peaks) // 6], peaks[len(peaks) // 6 :]
print(sum(tokens for tokens, _ in late), max(peak for _, peak in late) - max(peak for _, peak in early))
"""
    done = subprocess.run([sys.executable, "-c", code, "60000"], capture_output=True, text=True, check=True)
    tokens, grown = map(int, done.stdout.split())
    assert tokens > 48_000
    # Two bytes for every entropy; the document in one window would take 40 bytes a token and more.
    assert grown < 2 * tokens


def test_no_documents(model: ByteLM) -> None:
    assert score_documents(model, np.empty(0, np.uint8), np.zeros(1, np.int64)).size == 0


def test_progress_counts_every_token(model: ByteLM) -> None:
    content, offsets = join(DOCUMENTS)
    counted: list[int] = []
    EntropyScorer(model, window_tokens=100).score(content, offsets, advance=counted.append)
    assert sum(counted) == content.size + 2 * len(DOCUMENTS)
    assert counted[:-1] == [100] * (len(counted) - 1)


def test_settings_say_what_the_bits_depend_on(model: ByteLM) -> None:
    scorer = EntropyScorer(model, window_tokens=64)
    assert scorer.settings == {
        "window_tokens": 64,
        "precision": "float32",
        "compiled": False,
        "device": "cpu",
        "torch": torch.__version__.split("+")[0],
    }
    assert set(scorer.identity) == {"fingerprint", "config", "reset_at_newlines"}
    with pytest.raises(InputError, match="window_tokens is 0"):
        EntropyScorer(model, window_tokens=0)


def test_a_broken_model_is_named_with_the_document(model: ByteLM) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embedding.weight[ord("x") + 4] = float("nan")
    content, offsets = join([b"fine", b"exact"])
    with pytest.raises(InputError, match=r"shard: the entropy model gives nan for document 1 .* after its token 2"):
        EntropyScorer(broken, window_tokens=4).score(content, offsets, name="shard")


def test_models_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_model(build_model(preset("blt-debug")), tmp_path)
    with pytest.raises(InputError, match="is a blt model, and entropies need a byte-lm"):
        load_entropy_model(tmp_path)
    with pytest.raises(ModelError, match="missing"):
        load_entropy_model(tmp_path / "nothing")


def test_a_training_run_stands_for_its_latest_checkpoint(tmp_path: Path) -> None:
    make_model(tmp_path / "checkpoints" / "step-00000001")
    (tmp_path / "latest").symlink_to(Path("checkpoints") / "step-00000001")
    fingerprints = {model_fingerprint(load_entropy_model(path)) for path in (tmp_path, tmp_path / "latest")}
    assert len(fingerprints) == 1


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("abacus", "cuda:99", "meta", "cpu:7"):
        with pytest.raises(InputError, match=f"device '{name}' cannot be used here"):
            choose_device(name)


@NEEDS_GPU
@pytest.mark.parametrize(("precision", "compile_model"), [("float16", False), ("bfloat16", False), ("bfloat16", True)])
def test_gpu_agrees_with_cpu_to_half_precision(model: ByteLM, precision: str, compile_model: bool) -> None:
    content, offsets = join(DOCUMENTS * 5)
    cpu = score_documents(copy.deepcopy(model), content, offsets).astype(np.float64)
    options: dict[str, Any] = {"device": "cuda", "window_tokens": 256, "precision": precision, "compile": compile_model}
    gpu = score_documents(copy.deepcopy(model), content, offsets, **options).astype(np.float64)
    # The output weights above are twenty-fold, and with them the rounding of bfloat16 logits.
    assert float(np.abs(gpu - cpu).mean()) < 0.06
    assert float(np.abs(gpu - cpu).max()) < 0.6


@NEEDS_GPU
@pytest.mark.parametrize(("precision", "compile_model"), [("float16", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("lines", [False, True])
def test_on_a_gpu_neighbours_change_almost_nothing(precision: str, compile_model: bool, lines: bool) -> None:
    config = preset("entropy-debug", transformer={"window": 128, "dim": 64})
    assert isinstance(config, ByteLMConfig)
    torch.manual_seed(1)
    model = ByteLM(config)
    rng = np.random.default_rng(0)
    documents = [rng.integers(9, 90, size, dtype=np.uint8).tobytes() for size in rng.integers(0, 5000, 40)]
    options: dict[str, Any] = {"precision": precision, "compile": compile_model, "reset_at_newlines": lines}
    scorer = EntropyScorer(model, device="cuda", window_tokens=4096, **options)
    report = compare_batchings(scorer, lambda *_: None, EntropyScheme(threshold=5.3), *join(documents))
    # Windows of one shape, cut where tiles end: what remains is at most what bfloat16 would make of any change.
    assert report.largest < 0.02
    exact = score_documents(copy.deepcopy(model), *join(documents), reset_at_newlines=lines).astype(np.float64)
    half = scorer.score(*join(documents)).astype(np.float64)
    assert float(np.abs(half - exact).mean()) < 0.02
