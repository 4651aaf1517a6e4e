"""Memory-mapped columns as kernels see them: an address and a length.

Lists of arrays would do the same, at the price of 0.8 s of compilation in every process and a reference count per
access. Whoever passes an address must keep the array that it points into.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]  # numba is untyped
def _pointer_intrinsic(typing_context: Any, address: Any) -> Any:
    """Return an address as a pointer, inside a kernel."""
    signature = types.voidptr(types.int64)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, code


# What numba makes of these two is not what their Python types say.
_array: Any = numba.carray  # type: ignore[attr-defined, unused-ignore]
_pointer: Any = _pointer_intrinsic


@numba.njit(cache=True, nogil=True)
def bytes_at(address: int, count: int) -> npt.NDArray[np.uint8]:
    """Return uint8 [count] that begins at an address, inside a kernel."""
    content: npt.NDArray[np.uint8] = _array(_pointer(address), (count,), np.uint8)
    return content


@numba.njit(cache=True, nogil=True)
def lengths_at(address: int, count: int) -> npt.NDArray[np.uint16]:
    """Return uint16 [count] that begins at an address, inside a kernel."""
    lengths: npt.NDArray[np.uint16] = _array(_pointer(address), (count,), np.uint16)
    return lengths
