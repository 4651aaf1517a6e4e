"""Arrays of others as NumPy arrays, without a copy."""

from __future__ import annotations

from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError

#: `DLDeviceType` of memory that the processor reads, in the DLPack protocol: the CPU's own, and pinned for a GPU.
_HOST_DEVICES: Final = (1, 3)


class SupportsDLPack(Protocol):
    """Memory lent by the DLPack protocol; tensors of torch, JAX and others offer it."""

    def __dlpack__(self) -> Any:
        """Return the capsule."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the kind of device, and which."""


ArrayLike: TypeAlias = npt.NDArray[Any] | SupportsDLPack


def as_array(values: ArrayLike, name: str) -> npt.NDArray[Any]:
    """Return a NumPy array over the memory of an array or tensor; nothing is copied.

    Args:
        values: a NumPy array, or anything with `__dlpack__`, such as a torch tensor on the CPU.
        name: what it is called in messages.

    Raises:
        InputError: it is neither, it lies on a device, or its type or its record of gradients keeps it from being lent.
    """
    if isinstance(values, np.ndarray):
        return values
    if not hasattr(values, "__dlpack__"):
        raise InputError(f"{name} must be a NumPy array or a tensor, not {type(values).__name__}")
    if int(values.__dlpack_device__()[0]) not in _HOST_DEVICES:
        raise InputError(
            f"{name} lies on a GPU; copy it with .cpu(), or use blt_patcher.tensors, which does so and copies back"
        )
    try:
        return np.from_dlpack(values)  # type: ignore[arg-type]  # NumPy's protocol has more arguments, all optional
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as a NumPy array ({error}); detach it, or convert its type") from error
