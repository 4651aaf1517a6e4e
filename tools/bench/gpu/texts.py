"""Documents to measure with: English text of FineWeb-Edu's lengths, from the sample where it is, or generated."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blt_data import frame

SAMPLE = Path(__file__).resolve().parents[4] / "shared" / "data" / "fineweb-edu-sample"

Tokens = npt.NDArray[np.uint16]


def sample_folder() -> Path | None:
    """The folder of the sample's Parquet files: $BLT_SAMPLE, or beside the checkout; None where there is none."""
    folder = Path(os.environ.get("BLT_SAMPLE", SAMPLE))
    return folder if any(folder.rglob("*.parquet")) else None


def documents(total_bytes: int, *, seed: int = 0) -> list[bytes]:
    """Documents of so many bytes in all: the sample's, again and again, or made up ones of the same lengths."""
    folder, rng = sample_folder(), np.random.default_rng(seed)
    made: list[bytes] = []
    size = 0
    pool = _made_up(rng, min(total_bytes, 4_000_000)) if folder is None else _read(folder)
    while size < total_bytes:
        made.append(pool[len(made) % len(pool)])
        size += len(made[-1])
    made[-1] = made[-1][: len(made[-1]) - (size - total_bytes)] or b"."
    return made


def _read(folder: Path) -> list[bytes]:
    import pyarrow.parquet as pq

    files = sorted(folder.rglob("*.parquet"))
    return [text.as_py().encode() for file in files for text in pq.read_table(file, columns=["text"]).column(0)]


def _made_up(rng: np.random.Generator, total: int) -> list[bytes]:
    """Words of random letters in documents whose lengths spread as web pages' do: median 3 kB, mean 5 kB."""
    result = []
    while total > 0:
        length = int(np.clip(rng.lognormal(8.0, 1.0), 40, 100_000))
        letters = rng.integers(97, 123, length, dtype=np.uint8)
        letters[rng.random(length) < 0.18] = 32
        result.append(letters.tobytes()[: max(1, total)])
        total -= length
    return result


def pieces(total_tokens: int, longest: int, *, seed: int = 0) -> list[Tokens]:
    """Framed documents cut into pieces of at most `longest` input tokens, of so many input tokens in all."""
    result: list[Tokens] = []
    left = total_tokens
    for document in documents(total_tokens, seed=seed):
        framed = frame(document)
        # A piece of n input tokens holds n + 1: the last is only predicted.
        for begin in range(0, len(framed) - 1, longest):
            piece = framed[begin : begin + min(longest, left) + 1]
            if len(piece) > 1:
                result.append(piece)
                left -= len(piece) - 1
            if left <= 0:
                return result
    return result


def patch_lengths(tokens: int, mean: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Random patch lengths over so many framed tokens, the first patch of one token."""
    lengths = [1]
    left = tokens - 1
    while left > 0:
        length = min(left, int(rng.geometric(1 / mean)))
        lengths.append(length)
        left -= length
    return np.array(lengths, dtype=np.int64)
