"""Patched shard directories to test on, with entropies that come from no model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.blt_patcher.shards import make_bytes

from blt_data import ShardDirectory
from blt_patcher import PatchScheme
from blt_patcher.precompute import precompute


class HashScorer:
    """Entropies that look random and depend on each byte and the one before it alone, as a tiny model's would."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.seed = seed
        # Coarse, so that many are equal and thresholds have ties to break.
        self.table = np.round(rng.exponential(1.4, (260, 260)), 1).clip(0, 5.4).astype(np.float16)

    @property
    def identity(self) -> dict[str, Any]:
        return {"fingerprint": f"hash-{self.seed}", "config": {"seed": self.seed}, "reset_at_newlines": False}

    @property
    def settings(self) -> dict[str, Any]:
        return {"window_tokens": 64}

    def score_bytes(self, content: bytes) -> npt.NDArray[np.float16]:
        """Entropies of one document."""
        tokens = np.concatenate([[1], np.frombuffer(content, np.uint8).astype(np.int64) + 4, [2]])
        before = np.concatenate([[0], tokens[:-1]])
        nats: npt.NDArray[np.float16] = self.table[before, tokens]
        return nats

    def score(
        self,
        content: npt.NDArray[np.uint8],
        content_offsets: npt.NDArray[np.int64],
        *,
        name: str = "the documents",
        advance: Callable[[int], None] | None = None,
    ) -> npt.NDArray[np.float16]:
        pieces = [
            self.score_bytes(content[low:high].tobytes()) for low, high in itertools.pairwise(content_offsets.tolist())
        ]
        nats = np.concatenate([*pieces, np.empty(0, np.float16)])
        if advance is not None:
            advance(nats.size)
        return nats


def make_patched(
    directory: Path,
    scheme: PatchScheme,
    *,
    shards: list[list[bytes]] | None = None,
    seed: int = 0,
    scored: bool = True,
    **options: Any,
) -> ShardDirectory:
    """Write byte shards beside a directory (`NAME-bytes`) and patch them into it; entropies are kept if scored."""
    source = directory.with_name(f"{directory.name}-bytes")
    made = ShardDirectory.open(source) if source.exists() else make_bytes(source, shards=shards, seed=seed)
    scorer = HashScorer(seed) if scored else None
    precompute(made, directory, scheme=scheme, scorer=scorer, keep_entropies=scored, **options)
    return ShardDirectory.open(directory)
