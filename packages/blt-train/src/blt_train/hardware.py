"""Peak arithmetic of GPUs, from the makers' data sheets, for model FLOP utilisation.

Figures are of dense matrix products (without structured sparsity), per GPU and second.
"""

from __future__ import annotations

from dataclasses import dataclass

from blt_train.config import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakFlops:
    """Floating-point operations per second of one GPU, by the arithmetic of its matrix products."""

    float32: float
    """Without TF32, which a float32 run does not use."""

    bfloat16: float
    """bfloat16 inputs, float32 sums."""

    float8: float | None
    """Either 8-bit format; None where the GPU has none."""


_H100_SXM = PeakFlops(float32=66.9e12, bfloat16=989.4e12, float8=1978.9e12)
_H100_NVL = PeakFlops(float32=60e12, bfloat16=835.5e12, float8=1671e12)

#: Words of a device's name, all of which it must hold, and its figures; the first that fits is taken.
PEAKS: tuple[tuple[tuple[str, ...], PeakFlops], ...] = (
    (("GB200",), PeakFlops(float32=80e12, bfloat16=2500e12, float8=5000e12)),
    (("B200",), PeakFlops(float32=75e12, bfloat16=2250e12, float8=4500e12)),
    (("GH200",), _H100_SXM),
    (("H200", "NVL"), _H100_NVL),
    (("H200",), _H100_SXM),
    (("H100", "NVL"), _H100_NVL),
    (("H100", "PCIe"), PeakFlops(float32=51.2e12, bfloat16=756.5e12, float8=1513e12)),
    (("H100",), _H100_SXM),
    (("A100",), PeakFlops(float32=19.5e12, bfloat16=312e12, float8=None)),
)


def peak_flops_of(device_name: str) -> PeakFlops | None:
    """Return the figures of a GPU; None for one that is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, such as `NVIDIA H100 80GB HBM3`.
    """
    for words, peak in PEAKS:
        if all(word in device_name for word in words):
            return peak
    return None


def peak_flops_per_second(device_name: str, precision: Precision, *, float8: bool = False) -> float | None:
    """Return the operations per second that utilisation is measured against.

    Args:
        device_name: of the GPU.
        precision: of the forward and backward pass.
        float8: linear layers run in 8 bits: then that is the peak, though attention stays in bfloat16.

    Returns:
        The peak, or None where the table has none.
    """
    peak = peak_flops_of(device_name)
    if peak is None:
        return None
    if float8:
        return peak.float8
    return peak.bfloat16 if precision is Precision.BFLOAT16 else peak.float32
