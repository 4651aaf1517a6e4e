"""Scoring: every document as if whole and alone, whatever the windows and the neighbours."""

from __future__ import annotations

import copy
from pathlib import Path

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
from blt_patcher.entropies import EntropyScorer, choose_device, load_entropy_model, score_documents

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile_model", [False, True])
def test_gpu_agrees_with_cpu_to_bfloat16(model: ByteLM, compile_model: bool) -> None:
    content, offsets = join(DOCUMENTS * 5)
    cpu = score_documents(copy.deepcopy(model), content, offsets).astype(np.float64)
    gpu = score_documents(
        copy.deepcopy(model), content, offsets, device="cuda", window_tokens=256, compile=compile_model
    ).astype(np.float64)
    # The output weights above are twenty-fold, and with them the rounding of bfloat16 logits.
    assert float(np.abs(gpu - cpu).mean()) < 0.06
    assert float(np.abs(gpu - cpu).max()) < 0.6
