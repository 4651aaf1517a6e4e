"""A whole stack of blocks for one token in one launch: the host's side of `resident.cu`, where the why is written.

The kernel is compiled at first use by NVRTC, which like the driver's bindings comes with torch on Linux; no compiler
needs to be installed. It needs the copy engine of compute capability 9, and a multiprocessor for each of its programs,
all at once: it is launched cooperatively, so that a launch begins when there is room for all of it.

Legend: L layers, H heads, E head width, K vectors of a patch, C places of a cache, S parts of a head's attention.
A patch is read by absorbed keys and values; see `absorbed`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blt_model.caches import AttentionCache
from blt_model.config import TransformerConfig
from blt_model.errors import ModelError
from blt_model.generation.absorbed import AbsorbedPatch, padded
from blt_model.generation.machine_code import checked, compiles_for, machine_code
from blt_model.generation.steps import BlockStep, CrossStep

_WIDE_ROW = 1_024
"""Numbers of a row above which it is wide."""
_WARPS = 8
"""Of a program, that multiply."""
_KV_NUMBERS = 2 * 4096
"""Numbers of keys, and of values, under way at once."""
_MOST_SHARED = 232_448 - 1_024
"""Bytes of shared memory of a program; the system keeps the last."""
_LONG = 1_024
"""Places of a cache above which heads are cut into eight parts, not four."""

PHASES = (
    "stream taken",
    "patch scored",
    "patch read",
    "heads made",
    "attended",
    "attention taken",
    "middle made",
    "middle taken",
    "hidden made",
    "hidden taken",
    "end made",
)
"""Of a layer, by what has been done at their ends; only layers that read a patch have the second and the third."""
_MOST_PROGRAMS = 256
"""Of which stamps are kept."""

ARGUMENTS: tuple[Any, ...] = (*[ctypes.c_void_p] * 12, ctypes.c_int, ctypes.c_float)
"""The types of the kernel's arguments."""

_MAP = np.dtype(
    [
        ("weight", np.uint64),
        *((name, np.int32) for name in ("units", "inputs", "kind", "each", "extra", "before", "most", "shared")),
    ]
)
_LAYER = np.dtype(
    [
        ("cross_norm", np.uint64),
        ("attention_norm", np.uint64),
        ("feed_norm", np.uint64),
        ("keys", np.uint64),
        ("values", np.uint64),
        ("cross_residual", np.float32),
        ("unused", np.int32),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How a stack goes about it, which changes nothing of what it computes but the order of sums."""

    slot: int
    """Bytes of a slot of weights, where its rows are not too long: a multiple of 128."""
    in_flight: int
    """Slots that are under way at once; 0 for as many as there are."""
    stamps: bool = False
    """Whether programs note when they have ended each phase of a layer; see `ResidentStack.stamps`."""


_NARROW = Manner(slot=49_152, in_flight=1)
_WIDE = Manner(slot=24_576, in_flight=2)
"""How stacks with narrow rows go about it, and those with wide ones: measured on an H200."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the kernel is compiled for."""

    dim: int
    hidden: int
    heads: int
    width: int
    splits: int
    scores: int
    """Of a byte that reads a patch; 0 where no layer does."""
    vectors: int
    """K."""
    maps: int
    layers: int
    is_bfloat16: bool
    tap: int = -1
    """The layer whose output is kept besides the last's; -1 for none."""
    manner: Manner

    @property
    def layer_words(self) -> int:
        """Words of 32 bits that programs exchange in a layer."""
        return 6 * self.dim + self.splits * (self.dim + 2 * self.heads) + self.hidden

    @property
    def slot(self) -> int:
        """Bytes of a slot of the ring: of two rows at least, and as many as make large pieces of narrow ones."""
        return max(self.manner.slot, -(-4 * max(self.dim, self.hidden) // 128) * 128)

    @property
    def slots(self) -> int:
        """Of the ring: as many as there is room for."""
        attention = 3 * self.width + _WARPS * (self.width + 2)
        floats = max(self.dim, self.hidden, attention) + 2 * self.dim + self.width + _WARPS * 32
        floats += (_WARPS + 1) * padded(self.scores)
        fixed = (
            4 * _KV_NUMBERS
            + 4 * floats
            + 2 * self.dim * (2 if self.scores else 1)
            + 8 * 8
            + 256  # what alignment takes
            + _MAP.itemsize * self.maps
            + _LAYER.itemsize * self.layers
        )
        return (_MOST_SHARED - fixed) // (self.slot + 16)

    def macros(self) -> dict[str, int]:
        """What the source has to have defined."""
        return {
            "DIM": self.dim,
            "HIDDEN": self.hidden,
            "HEADS": self.heads,
            "WIDTH": self.width,
            "SPLITS": self.splits,
            "SCORES": self.scores,
            "VECTORS": self.vectors,
            "MAPS": self.maps,
            "LAYERS": self.layers,
            "WARPS": _WARPS,
            "SLOTS": self.slots,
            "SLOT": self.slot,
            "TAP": self.tap,
            "IN_FLIGHT": min(self.manner.in_flight, self.slots),
            "STAMPS": int(self.manner.stamps),
            "BFLOAT16": int(self.is_bfloat16),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Programs:
    """How many programs the launches of a step take, one to a multiprocessor."""

    all: int
    """Of a launch that is alone."""
    model: int
    """Of the encoder's or the decoder's, beside"""
    entropy_model: int
    """the entropy model's."""

    @classmethod
    def of(cls, device: torch.device, *, has_entropy_model: bool) -> Programs:
        """Give about half of a device's multiprocessors to each of the two.

        They slow each other down, and the fewer there are the less. Of 132 the model is given 64, as many as there are
        parts of a head's attention in `blt-1b`: with fewer some programs would have two. The entropy model has fewer
        such parts, and is given 52: measured on an H200.
        """
        if device.type != "cuda":
            return cls(all=1, model=1, entropy_model=1)
        everything = torch.cuda.get_device_properties(device).multi_processor_count
        if not has_entropy_model:
            return cls(all=everything, model=everything, entropy_model=1)
        model = max(1, everything * 16 // 33)
        return cls(all=everything, model=model, entropy_model=max(1, everything * 29 // 33 - model))


def source() -> str:
    """The kernel's source."""
    return resources.files("blt_model.generation").joinpath("resident.cu").read_text(encoding="utf-8")


def fits(config: TransformerConfig) -> bool:
    """Whether the kernel can run stacks of a shape."""
    width = config.head_dim
    widths_fit = config.dim % 8 == 0 and config.feed_forward_dim % 8 == 0 and config.dim <= 8_192
    heads_fit = config.kv_heads == config.num_heads and config.num_heads * width == config.dim
    return widths_fit and heads_fit and 16 <= width <= 256 and width & (width - 1) == 0


def available(device: torch.device) -> bool:
    """Whether the kernel can be compiled and run on a device."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return major >= 9 and room >= _MOST_SHARED and compiles_for(10 * major + minor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A stack, where it lies."""

    blocks: Sequence[BlockStep]
    caches: Sequence[AttentionCache]
    """Of the blocks, one after another, one row each; equal in all but their layers."""
    crosses: Mapping[int, CrossStep] = field(default_factory=dict)
    """The layers that read a patch before their block, with their parameters."""
    patch: AbsorbedPatch | None = None
    """The newest patch, as those layers read it."""
    tap: int = -1
    """The layer whose output is kept besides; -1 for none."""

    def cache_places(self) -> tuple[tuple[int, int], ...]:
        """Where the caches lie, and their capacities."""
        return tuple((cache.keys.data_ptr(), cache.capacity) for cache in self.caches)

    def sizes(self, manner: Manner | None = None) -> Sizes:
        """What the kernel is compiled for, as the caches are now; the manner is the usual one where it is None."""
        first, layers = self.blocks[0], len(self.blocks)
        dim = first.query_key_value.shape[1]
        return Sizes(
            dim=dim,
            hidden=first.feed_forward_output.shape[1],
            heads=first.num_heads,
            width=first.head_dim,
            splits=4 if self.caches[0].capacity <= _LONG else 8,
            scores=0 if self.patch is None else self.patch.scores,
            vectors=1 if self.patch is None else self.patch.vectors,
            maps=4 * layers + 2 * len(self.crosses),
            layers=layers,
            is_bfloat16=first.query_key_value.dtype == torch.bfloat16,
            tap=self.tap,
            manner=manner or (_WIDE if dim > _WIDE_ROW else _NARROW),
        )

    def fit(self) -> bool:
        """Whether the kernel can run the stack: its shape, and room for rings of two slots."""
        if (self.patch is None) != (not self.crosses) or not all(fits(cache.config) for cache in self.caches):
            return False
        sizes = self.sizes()
        # A slot has to hold what sixteen outputs take from a patch.
        return sizes.slots >= 2 and sizes.slot >= 32 * padded(sizes.scores)

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Of every block."""
        return [pair for cache in self.caches for pair in zip(cache.keys, cache.values, strict=True)]


class StackTables:
    """What the kernel reads and writes besides the token: where weights and caches lie, and what programs exchange."""

    def __init__(self, parts: Parts, manner: Manner | None = None) -> None:
        """Point to weights and caches as they lie; the manner is the usual one where it is None."""
        first = parts.blocks[0]
        self.parts = parts
        weight = first.query_key_value
        self.device = weight.device
        self.rotary, self.capacity = parts.caches[0].rotary, parts.caches[0].capacity
        self.sizes = parts.sizes(manner)
        self.eps = first.attention_norm.eps
        words = 2 * self.sizes.layer_words
        self.exchange = torch.zeros(words, dtype=torch.int32, device=self.device)
        self.state = torch.zeros(2, dtype=torch.int32, device=self.device)
        self.layers = self._layers()
        self._maps: dict[int, Tensor] = {}
        self._places = parts.cache_places()

    def is_current(self) -> bool:
        """Whether the caches still lie where they lay."""
        return self.parts.cache_places() == self._places

    def maps(self, programs: int) -> Tensor:
        """The table of maps, as bytes, for so many programs."""
        if programs not in self._maps:
            self._maps[programs] = self._make_maps(programs)
        return self._maps[programs]

    def arguments(
        self,
        x: Tensor,
        out: Tensor,
        positions: Tensor,
        programs: int,
        tap: Tap | None = None,
        skipped: Tensor | None = None,
    ) -> tuple[int | float, ...]:
        """What the kernel takes; see `ResidentStack`."""
        taps = (out, out, positions) if tap is None else (tap.out, tap.rows, tap.row)
        tensors = (self.maps(programs), self.layers, self.exchange, self.state, x, out, positions, self.rotary.table)
        pointers = [tensor.data_ptr() for tensor in (*tensors, *taps)]
        return (*pointers, 0 if skipped is None else skipped.data_ptr(), self.capacity, self.eps)

    def _make_maps(self, programs: int) -> Tensor:
        table = np.zeros(self.sizes.maps, dtype=_MAP)
        index = before = 0
        patch = self.parts.patch
        reads = iter(() if patch is None else zip(patch.keys, patch.values, strict=True))
        for layer, block in enumerate(self.parts.blocks):
            scores: Tensor | None = None
            answers: Tensor | None = None
            if layer in self.parts.crosses:
                scores, answers = next(reads)
            # In the order in which they are multiplied, which is that of the kernel's kinds.
            maps = scores, answers, block.query_key_value, block.output, block.gate_value, block.feed_forward_output
            for kind, weight in enumerate(maps):
                if weight is None:
                    continue
                is_shared, inputs = weight is scores or weight is answers, weight.shape[1]
                units = -(-self.sizes.scores // 2) if weight is scores else len(weight) // 2
                each, extra = (units, 0) if is_shared else divmod(units, programs)
                most = self.sizes.slot // (4 * inputs)
                if weight is answers:
                    # Its outputs are taken by sixteens.
                    most -= most % 8
                table[index] = (weight.data_ptr(), units, inputs, kind, each, extra, before, most, is_shared)
                # The programs with a unit more are others in the next map.
                index, before = index + 1, (before + extra) % programs
        return self._bytes(table)

    def _layers(self) -> Tensor:
        table = np.zeros(self.sizes.layers, dtype=_LAYER)
        held = self.parts.keys_values()
        for row, block, (keys, values) in zip(table, self.parts.blocks, held, strict=True):
            row["attention_norm"] = block.attention_norm.weight.data_ptr()
            row["feed_norm"] = block.feed_forward_norm.weight.data_ptr()
            row["keys"], row["values"] = keys.data_ptr(), values.data_ptr()
        for layer, cross in self.parts.crosses.items():
            row = table[layer]
            row["cross_norm"], row["cross_residual"] = cross.query_norm.weight.data_ptr(), float(cross.residual)
        return self._bytes(table)

    def _bytes(self, table: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(table.view(np.uint8)).to(self.device)


@dataclass(frozen=True, slots=True)
class Tap:
    """Where the output of a stack's tapped layer goes."""

    out: Tensor
    """[1, dim]."""
    rows: Tensor
    """[rows, dim], contiguous, of which one takes it too:"""
    row: Tensor
    """int64 [1]."""


class ResidentStack:
    """A stack over caches of one row, on CUDA."""

    def __init__(self, parts: Parts) -> None:
        """Nothing is compiled before the first call."""
        self._parts = parts
        self.manner = parts.sizes().manner
        self._tables: StackTables | None = None

    def take(self, manner: Manner) -> None:
        """Go about it so from now on."""
        self.manner, self._tables = manner, None

    def compiled(self, manner: Manner) -> None:
        """Compile what a manner needs, ahead of the first call."""
        tables = StackTables(self._parts, manner)
        _kernel(tables.sizes, tables.device.index)

    def stamps(self, programs: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """When the programs of the last launch ended the phases, if the stack's manner has stamps.

        Args:
            programs: of that launch.

        Returns:
            uint64 [L, phases, programs, 3]: nanoseconds of a clock that all share, cycles of the multiprocessor's own,
            and the cycles for which the program's first warp had waited for weights until then. See `PHASES`.
        """
        from cuda.bindings import driver

        tables = self._tables
        if tables is None or not tables.sizes.manner.stamps:
            raise ModelError("no launch of this stack has left stamps; take a manner with stamps.")
        kept = np.zeros((tables.sizes.layers, len(PHASES), _MOST_PROGRAMS, 3), dtype=np.uint64)
        torch.cuda.synchronize(tables.device)
        module = checked(driver.cuFuncGetModule(_kernel(tables.sizes, tables.device.index)[0]))
        pointer, _ = checked(driver.cuModuleGetGlobal(module, b"stamps"))
        checked(driver.cuMemcpyDtoH(kept.ctypes.data, pointer, kept.nbytes))
        return kept[:, :, :programs]

    def __call__(
        self, x: Tensor, positions: Tensor, programs: int, tap: Tap | None = None, skipped: Tensor | None = None
    ) -> Tensor:
        """Run one token.

        The first call after a cache was replaced makes tables, which a graph cannot capture.

        Args:
            x: [1, dim] contiguous.
            positions: int64 [1] its position.
            programs: how many multiprocessors to take; 0 for all.
            tap: for the output of the layer that the stack's parts name.
            skipped: int64 [1] on the device; where it is not nought, nothing is done, and the result means nothing.

        Returns:
            [1, dim].
        """
        if self._tables is None or not self._tables.is_current():
            self._tables = StackTables(self._parts, self.manner)
        tables = self._tables
        programs = programs or torch.cuda.get_device_properties(x.device).multi_processor_count
        # Every program has to have a unit of every gated map.
        programs = min(programs, tables.sizes.hidden)
        out = torch.empty_like(x)
        kernel = _kernel(tables.sizes, x.device.index)
        stream = torch.cuda.current_stream(x.device)
        _launch(kernel, programs, tables.arguments(x, out, positions, programs, tap, skipped), stream)
        return out


_NOT_EARLY: set[int] = set()
"""Devices whose driver was found to refuse cooperative launches that begin early."""


def _launch(kernel: tuple[Any, int], programs: int, arguments: tuple[Any, ...], stream: torch.cuda.Stream) -> None:
    """Launch all programs or none, if the driver can before the kernel ahead of them has ended."""
    from cuda.bindings import driver

    function, shared = kernel
    cooperative, early = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    cooperative.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    cooperative.value.cooperative = 1
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    launch = driver.CUlaunchConfig()
    launch.gridDimX, launch.gridDimY, launch.gridDimZ = programs, 1, 1
    launch.blockDimX, launch.blockDimY, launch.blockDimZ = 32 * (_WARPS + 1), 1, 1
    launch.sharedMemBytes, launch.hStream = shared, stream.cuda_stream
    if stream.device_index not in _NOT_EARLY:
        launch.attrs, launch.numAttrs = [cooperative, early], 2
        outcome = driver.cuLaunchKernelEx(launch, function, (arguments, ARGUMENTS), 0)
        refusals = driver.CUresult.CUDA_ERROR_NOT_SUPPORTED, driver.CUresult.CUDA_ERROR_INVALID_VALUE
        if outcome[0] not in refusals:
            checked(outcome)
            return
        _NOT_EARLY.add(stream.device_index)
    launch.attrs, launch.numAttrs = [cooperative], 1
    checked(driver.cuLaunchKernelEx(launch, function, (arguments, ARGUMENTS), 0))


@functools.cache
def _kernel(sizes: Sizes, device: int) -> tuple[Any, int]:
    """The kernel, loaded on a device, and its bytes of shared memory."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        module = checked(driver.cuModuleLoadData(compiled(sizes, 10 * major + minor)))
        function = checked(driver.cuModuleGetFunction(module, b"resident_stack"))
        bytes_pointer, _ = checked(driver.cuModuleGetGlobal(module, b"shared_bytes"))
        shared = ctypes.c_int()
        checked(driver.cuMemcpyDtoH(ctypes.addressof(shared), bytes_pointer, 4))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, shared.value))
    return function, shared.value


def compiled(sizes: Sizes, architecture: int) -> bytes:
    """The kernel's machine code for sizes and an architecture; see `machine_code`."""
    return machine_code(source(), sizes.macros(), architecture)
