"""Whether entropies and boundaries depend on how documents are batched: score a sample twice and count differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blt_data.executors import Report
from blt_patcher.boundaries import PatchedDocuments, patch_documents
from blt_patcher.schemes import PatchScheme
from blt_patcher.scorers import Scorer
from blt_patcher.windows import framed_offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchingReport:
    """How much two batchings of the same documents differ."""

    documents: int
    tokens: int
    """Framed tokens of all documents."""
    entropies: int
    """Tokens whose float16 entropies differ."""
    largest: float
    """Largest difference of two entropies of a token, in nats."""
    boundaries: int
    """Tokens that start a patch in one batching and not in the other."""
    patches: int
    """Patches of the first batching."""

    def rows(self) -> dict[str, object]:
        """Return the report as rows of a table."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "entropies that differ": self.entropies,
            "largest difference": f"{self.largest:.3g} nats",
            "patches": self.patches,
            "boundaries that differ": self.boundaries,
        }


def compare_batchings(
    scorer: Scorer,
    report: Report,
    scheme: PatchScheme,
    content: npt.NDArray[np.uint8],
    content_offsets: npt.NDArray[np.int64],
) -> BatchingReport:
    """Score documents in their order and in the reverse order, so that each has other neighbours and other cuts.

    Args:
        scorer: gives the entropies.
        report: called with the framed tokens done since its last call, 0, and the tokens again.
        scheme: how to patch.
        content: uint8 [N] the documents' bytes.
        content_offsets: int64 [D + 1] where each document's bytes begin.

    Raises:
        InputError: the entropies are not finite.
    """
    sizes = np.diff(content_offsets)
    tokens = framed_offsets(content_offsets)
    nats = scorer.score(content, content_offsets, name="the sample", advance=lambda n: report(n, 0, n))
    turned = np.concatenate([content[:0], *(content[a:b] for a, b in _spans(content_offsets)[::-1])])
    offsets = np.concatenate([[0], np.cumsum(sizes[::-1])]).astype(np.int64)
    back = scorer.score(turned, offsets, name="the sample in reverse order", advance=lambda n: report(n, 0, n))
    again = np.concatenate([nats[:0], *(back[a:b] for a, b in _spans(framed_offsets(offsets))[::-1])])
    before = _starts(patch_documents(scheme, content, content_offsets, nats), tokens)
    after = _starts(patch_documents(scheme, content, content_offsets, again), tokens)
    difference = np.abs(nats.astype(np.float64) - again.astype(np.float64))
    return BatchingReport(
        documents=sizes.size,
        tokens=int(tokens[-1]),
        entropies=int(np.count_nonzero(nats != again)),
        largest=float(difference.max(initial=0.0)),
        boundaries=int(np.setxor1d(before, after, assume_unique=True).size),
        patches=int(before.size),
    )


def _spans(offsets: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


def _starts(patched: PatchedDocuments, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the places, among all framed tokens, where patches begin: patches cover all tokens without a gap."""
    ends = np.cumsum(patched.lengths, dtype=np.int64)
    if ends.size and ends[-1] != tokens[-1]:
        raise AssertionError("patches do not cover the documents")
    starts: npt.NDArray[np.int64] = ends - patched.lengths
    return starts
