"""Weights of 8 bits: rounding, products against float64, and generation against the same model over whole documents."""

import numpy as np
import pytest
import torch
from tests.blt_model.generation_oracle import fresh_blt, fresh_byte_lm

from blt_data import frame
from blt_model import BLT, Generator, ModelError, Request, model_fingerprint, pack_documents, quantize_int8
from blt_model.quantization import FEW_ROWS, Int8Linear, Int8Weight, linear_bytes, quantize_rows
from blt_patcher import IncrementalPatcher, SpaceScheme, patch_document

TEXT = "Straßen, 道路, дороги, and roads of every kind.".encode()


def logits_of(model: BLT, content: bytes) -> torch.Tensor:
    batch, _ = pack_documents([frame(content)], [patch_document(SpaceScheme(), content)])
    with torch.no_grad():
        logits: torch.Tensor = model(batch)
    return logits


def test_rows_are_rounded_to_half_a_step() -> None:
    weight = torch.randn(40, 30) * torch.logspace(-6, 6, 40)[:, None]
    weight[7] = 0
    values, scales = quantize_rows(weight)
    assert values.dtype == torch.int8
    assert int(values.abs().max()) == 127
    assert torch.all((values * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None])
    assert torch.equal(values[7], torch.zeros(30, dtype=torch.int8))


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_weight(rows: int, dtype: torch.dtype) -> None:
    """Within what bfloat16 inputs and results lose; both ways, by module and by weight."""
    linear = Int8Linear(torch.randn(64, 96))
    x = torch.randn(2, rows, 96).to(dtype)[:1]
    expected = x.double() @ (linear.integers.double() * linear.scales.double()[:, None]).T
    for actual in (linear(x), torch.nn.functional.linear(x, linear.weight)):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        assert float((actual.double() - expected).norm() / expected.norm()) < 6e-3


def test_a_weight_serves_linear_maps_only() -> None:
    weight = Int8Linear(torch.randn(4, 6)).weight
    assert isinstance(weight, Int8Weight)
    assert (weight.shape, weight.dtype, weight.device.type) == ((4, 6), torch.float32, "cpu")
    with pytest.raises(ModelError, match="for linear maps only"):
        weight + 1


def test_a_quantized_model_is_a_quarter_and_says_nearly_the_same() -> None:
    model = fresh_blt(3)
    size, fingerprint, expected = linear_bytes(model), model_fingerprint(model), logits_of(model, TEXT)
    quantize_int8(model)
    assert linear_bytes(model) < 0.3 * size
    assert model_fingerprint(model) != fingerprint
    actual = logits_of(model, TEXT)
    assert not torch.equal(actual, expected)
    assert float((actual - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("rows", [1, 3])
def test_generation_is_that_of_the_quantized_model(rows: int) -> None:
    """Log-probabilities equal those over whole documents up to bfloat16's rounding."""
    model = fresh_blt(5)
    with torch.no_grad():
        model.decoder.head.weight[2] = 0
    quantize_int8(model)
    generator = Generator(model, new_patcher=lambda: IncrementalPatcher(SpaceScheme()), rows=rows)
    for completion in generator.generate([Request(prompt=TEXT[:n], max_new_bytes=20) for n in (0, 9, 30)]):
        assert len(completion.content) == len(completion.log_probabilities)
    (completion,) = generator.generate([Request(prompt=TEXT, max_new_bytes=30)])
    logits = logits_of(model, TEXT + completion.content)
    logits[:, [0, 1, 3]] = -torch.inf
    log_probabilities = torch.log_softmax(logits, -1)
    given = [float(log_probabilities[len(TEXT) + place, byte + 4]) for place, byte in enumerate(completion.content)]
    assert np.allclose(given, completion.log_probabilities, atol=0.2)


def test_a_byte_lm_generates_too() -> None:
    model = fresh_byte_lm(1)
    quantize_int8(model)
    (completion,) = Generator(model).generate([Request(prompt=b"abc", max_new_bytes=5)])
    assert completion.log_probabilities


def test_other_devices_are_refused() -> None:
    with pytest.raises(ModelError, match="8-bit weights are for the CPU"):
        quantize_int8(fresh_blt(0).to("meta"))
