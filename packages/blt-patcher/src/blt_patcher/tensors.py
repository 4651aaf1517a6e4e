"""Patch lengths as torch tensors, padded as models take them; needs torch, which `blt_patcher` itself never imports.

`patch_documents` and `patch_lengths` take tensors as well, read them where they lie, and need no torch for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt_data.errors import InputError
from blt_data.framing import BOS_ID, BYTE_OFFSET, EOS_ID, FRAME_TOKENS, VOCABULARY_SIZE
from blt_patcher.boundaries import patch_documents, patch_lengths
from blt_patcher.schemes import FlagScheme, PatchScheme, SpaceScheme


def padded_patch_lengths(
    scheme: PatchScheme,
    *,
    entropies: Tensor | None = None,
    input_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Return the patch lengths of a batch of token rows, as `BltForCausalLM.forward(patch_lengths=…)` takes them.

    A row is `[BOS, bytes…]` or `[BOS, bytes…, EOS]`, padded on the right to T tokens. That model reads from the lengths
    of each row also whether a patch begins after its last token: only then may the last position look at the last
    patch. So the lengths cover one token more than a row has, and all of its padding is counted to the last of them,
    where no position looks at it: each row sums to T + 1. (Zeros in the place of padding would have the last position
    look at a patch of no token.) For the bare lengths use `patch_documents` or `patch_lengths`.

    `BltForCausalLM`'s own patcher makes the same patches of a single row, but decides on the entropies as they are, not
    on those rounded to float16, and writes a patch after the last token as a length of 0. In a batch it patches padding
    as if it were text.

    Tensors on a GPU are copied to the CPU, which waits for the GPU, and the result is copied back.

    Args:
        scheme: the rule.
        entropies: [B, T] nats after each token, of any floating type, rounded to float16 here; for schemes that read
            entropies. The value after a row's last token decides on the patch after it.
        input_ids: integers [B, T], the token ids of the released models; for schemes that read bytes (`space`, `bpe`,
            users' own). `static` and `byte` take either.
        lengths: integers [B], each row's tokens without padding, 1 to T; None if no row is padded.
        threads: how many threads to use, as in `patch_documents`.

    Returns:
        int64 [B, P], P being the largest number of patches of a row; 0 where a row has fewer. On the device of
        `entropies`, or else of `input_ids`.

    Raises:
        InputError: a tensor that the scheme reads is missing, shapes do not fit each other, a row is no framed
            document, or an entropy is not finite.
    """
    given = entropies if entropies is not None else input_ids
    if given is None:
        raise InputError("there is nothing to patch; give entropies or input_ids")
    if given.ndim != 2 or (entropies is not None and input_ids is not None and entropies.shape != input_ids.shape):
        shapes = " and ".join(str(list(value.shape)) for value in (entropies, input_ids) if value is not None)
        raise InputError(f"entropies and input_ids must be [rows, tokens], both alike, not {shapes}")
    if scheme.needs_entropies and entropies is None:
        raise InputError(f"scheme {scheme.name} needs entropies; give those of an entropy model")
    width = given.shape[1]
    sizes = _row_lengths(lengths, *given.shape)
    nats = None if entropies is None or not scheme.needs_entropies else _scored_rows(entropies, sizes)
    if isinstance(scheme, (SpaceScheme, FlagScheme)):
        if input_ids is None:
            raise InputError(f"scheme {scheme.name} reads bytes; give input_ids")
        rows = _patch_rows(scheme, input_ids.detach().cpu().numpy(), sizes, nats, threads)
    else:
        offsets = np.concatenate([[0], np.cumsum(sizes + 1)])
        values = np.concatenate([np.empty(0, dtype=np.float16), *nats]) if nats else np.zeros(offsets[-1], np.float16)
        patched = patch_lengths(values, offsets, scheme, threads=threads)
        rows = [patched.document(row) for row in range(sizes.size)]
    return torch.from_numpy(_pad(rows, width + 1)).to(given.device)


def _row_lengths(lengths: Tensor | None, rows: int, tokens: int) -> npt.NDArray[np.int64]:
    """Return int64 [B], the tokens of each row."""
    if lengths is None:
        return np.full(rows, tokens, dtype=np.int64)
    if lengths.shape != (rows,) or lengths.is_floating_point():
        raise InputError(
            f"lengths must be {rows} whole numbers, one for each row, not {lengths.dtype} {list(lengths.shape)}"
        )
    sizes: npt.NDArray[np.int64] = lengths.detach().cpu().numpy().astype(np.int64)
    if rows and (int(sizes.min()) < 1 or int(sizes.max()) > tokens):
        raise InputError(f"lengths must be 1 to {tokens}, the tokens of a row; found {sizes.min()} to {sizes.max()}")
    return sizes


def _scored_rows(entropies: Tensor, sizes: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
    """Return the entropies of each row, and one more for the token after it, which is never used."""
    host = entropies.detach().cpu()
    # NumPy has no bfloat16, whose numbers float32 has all.
    array: npt.NDArray[Any] = (host.float() if host.dtype == torch.bfloat16 else host).numpy()
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float16)
    return [np.pad(row[:size], (0, 1)) for row, size in zip(array, sizes, strict=True)]


def _patch_rows(
    scheme: PatchScheme,
    ids: npt.NDArray[Any],
    sizes: npt.NDArray[np.int64],
    nats: list[npt.NDArray[Any]] | None,
    threads: int | None,
) -> list[npt.NDArray[np.uint16]]:
    """Patch rows of token ids as documents; to a row without EOS the token after it is its EOS."""
    bodies = []
    for index, size in enumerate(sizes):
        row = ids[index, :size]
        ended = size > 1 and row[-1] == EOS_ID
        body = row[1:-1] if ended else row[1:]
        if row[0] != BOS_ID or bool(np.any((body < BYTE_OFFSET) | (body >= VOCABULARY_SIZE))):
            raise InputError(f"row {index} of input_ids is no framed document; it must be BOS, bytes and perhaps EOS")
        bodies.append((body - BYTE_OFFSET).astype(np.uint8))
    bounds = np.cumsum([0, *(body.size for body in bodies)], dtype=np.int64)
    scored = None
    if nats is not None:
        pieces = [values[: body.size + FRAME_TOKENS] for values, body in zip(nats, bodies, strict=True)]
        scored = np.concatenate([np.empty(0, dtype=np.float16), *pieces])
    content = np.concatenate([np.empty(0, dtype=np.uint8), *bodies])
    patched = patch_documents(scheme, content, bounds, scored, threads=threads)
    return [patched.document(row) for row in range(sizes.size)]


def _pad(rows: list[npt.NDArray[np.uint16]], total: int) -> npt.NDArray[np.int64]:
    """Return int64 [B, P]: each row's lengths, the last one longer so that all sum to a total, then zeros."""
    padded = np.zeros((len(rows), max((row.size for row in rows), default=0)), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : row.size] = row
        padded[index, row.size - 1] += total - int(row.sum(dtype=np.int64))
    return padded
