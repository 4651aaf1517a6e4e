"""Model FLOPs of batches, and what utilisation is measured against."""

from __future__ import annotations

import numpy as np
import pytest

from blt_model import ByteLMConfig, preset
from blt_model.config import BLTConfig
from blt_model.flops import blt_flops, byte_lm_flops
from blt_train.config import Precision
from blt_train.hardware import PEAKS, peak_flops_of, peak_flops_per_second
from blt_train.model_flops import TRAINING_FACTOR, training_flops

LENGTHS = np.array([1, 7, 300, 4096, 20_000, 900])
PATCHES = np.array([1, 2, 70, 900, 5000, 250])


@pytest.mark.parametrize("name", ["blt-debug", "blt-1b"])
def test_blt_flops_are_the_sum_over_documents(name: str) -> None:
    config = preset(name)
    assert isinstance(config, BLTConfig)
    one_by_one = sum(
        length * blt_flops(config, patch_length=length / patches, document_bytes=length)["total"]
        for length, patches in zip(LENGTHS.tolist(), PATCHES.tolist(), strict=True)
    )
    assert training_flops(config, LENGTHS, PATCHES) == pytest.approx(TRAINING_FACTOR * one_by_one, rel=1e-12)
    # The mean alone would not do: attention of a long document costs more than it saves in short ones.
    mean = LENGTHS.sum() / LENGTHS.size
    by_means = (
        LENGTHS.sum() * blt_flops(config, patch_length=LENGTHS.sum() / PATCHES.sum(), document_bytes=mean)["total"]
    )
    assert training_flops(config, LENGTHS, PATCHES) != pytest.approx(TRAINING_FACTOR * by_means, rel=1e-3)


@pytest.mark.parametrize("name", ["entropy-debug", "entropy-100m"])
def test_byte_lm_flops_are_the_sum_over_documents(name: str) -> None:
    config = preset(name)
    assert isinstance(config, ByteLMConfig)
    one_by_one = sum(length * byte_lm_flops(config, document_bytes=length)["total"] for length in LENGTHS.tolist())
    assert training_flops(config, LENGTHS, PATCHES) == pytest.approx(TRAINING_FACTOR * one_by_one, rel=1e-12)


def test_no_documents_take_no_flops() -> None:
    empty = np.zeros(0, dtype=np.int64)
    assert training_flops(preset("blt-debug"), empty, empty) == 0


@pytest.mark.parametrize(
    ("name", "bfloat16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
    ],
)
def test_peaks_by_name(name: str, bfloat16: float) -> None:
    assert peak_flops_per_second(name, Precision.BFLOAT16) == bfloat16


def test_peaks_by_arithmetic() -> None:
    for _, peak in PEAKS:
        assert peak.float32 < peak.bfloat16
        assert peak.float8 is None or peak.float8 == pytest.approx(2 * peak.bfloat16, rel=1e-3)
    assert peak_flops_per_second("NVIDIA H100 80GB HBM3", Precision.FLOAT32) == 66.9e12
    assert peak_flops_per_second("NVIDIA H100 80GB HBM3", Precision.BFLOAT16, float8=True) == 1978.9e12
    assert peak_flops_per_second("NVIDIA A100-SXM4-80GB", Precision.BFLOAT16, float8=True) is None
    assert peak_flops_of("Some Other Device") is None
