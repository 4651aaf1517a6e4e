"""How many bytes of tensors a forward pass leaves alive for its backward pass, on any device, pretended ones too."""

from __future__ import annotations

import contextlib
import gc
import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blt_model import attention


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Remembers the storage of every tensor that an operation returns, as long as something holds it."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, function: Any, kinds: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # Operations that return views return what was there before.
                if storage._cdata not in self._known:
                    self._seen[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return result

    def live_bytes(self) -> int:
        """Bytes of what is still there."""
        gc.collect()
        return sum(size for reference, size in self._seen.values() if reference() is not None)


def held_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that a forward pass holds when it has returned its loss, beyond what was there before.

    Args:
        forward: returns the loss.
        known: what was there before.
    """
    with _Storages(known) as storages:
        loss = forward()
        held: int = storages.live_bytes()
    del loss
    return held


def _varlen(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, window_size: tuple[int, int]) -> Tensor:
    """torch's attention below the function that asks a real GPU for its kind."""
    operation = torch.ops.torch_attn._varlen_attn
    result: Tensor = operation(query, key, value, *arguments, window_size=list(window_size))[0]
    return result


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Let code run as on a GPU, on tensors without content, with the attention that half precision takes there."""
    importlib.import_module("torch.nn.attention.varlen")  # registers the operation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "is_tuned_for", lambda _: True)
        patch.setattr(attention, "_VARLEN_OPTIONS", frozenset({"window_size"}))
        patch.setattr(attention, "varlen_attn", _varlen, raising=False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


@contextlib.contextmanager
def pretended_autocast() -> Iterator[None]:
    """Autocast to bfloat16 on CUDA, which `torch.autocast` refuses where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
