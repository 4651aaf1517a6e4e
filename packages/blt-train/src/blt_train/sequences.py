"""The endless stream of training sequences, from one source or a mixture of several.

A global batch is a run of neighbouring sequences of the stream and flows over the ends of epochs, so no document is
dropped there. Each sequence is of one source, and each source has its own epochs. The stream has no state: whoever
knows a step knows its sequences.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blt_train.documents import Int64Array
from blt_train.mixture import Interleaving
from blt_train.plan import Plan
from blt_train.sequence_counts import write_counts
from blt_train.source_stream import SourceStream


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFigures:
    """What a global batch holds of one source."""

    targets: int
    """Predictions: bytes and EOS."""

    bytes: int
    """Predictions that are bytes."""

    patches: int
    """Real patches; 0 for the byte LM."""

    epoch: float
    """Passes over the source completed at the batch's end."""

    share: float
    """Share of all sequences up to the batch's end that are of this source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchFigures:
    """What a global batch holds; known from the plan, so equal on every rank without communication."""

    targets: int
    """Predictions: bytes and EOS."""

    bytes: int
    """Predictions that are bytes."""

    patches: int
    """Real patches; 0 for the byte LM."""

    capacity_tokens: int
    """Tokens with padding."""

    epoch: float
    """Passes over the data completed at the batch's end; of a mixture, over all sources' bytes taken together."""

    sources: Mapping[str, SourceFigures]
    """The same by source."""

    document_tokens: Int64Array = field(compare=False)
    """int64 [N]: input tokens of each document, or piece of one, in the batch; what attention costs depends on them."""

    document_patches: npt.NDArray[np.float64] = field(compare=False)
    """float64 [N]: patches of each; those of a sequence are shared out by tokens. Zeros for the byte LM."""

    @property
    def utilisation(self) -> float:
        """Real tokens divided by tokens with padding."""
        return self.targets / self.capacity_tokens

    @property
    def mean_patch_length(self) -> float | None:
        """Real input tokens per patch; None for the byte LM."""
        return self.targets / self.patches if self.patches else None


class SequenceStream:
    """All sequences of training, numbered from 0 without end."""

    def __init__(
        self,
        sources: Mapping[str, SourceStream],
        *,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare the stream; no plan is made yet.

        Args:
            sources: at least one, all of the same capacity.
            weights: share of the sequences of each source, above 0; None for equal ones.
            seed: of the order in which the sources take turns.
            keys: of `sequence_counts`, by source; None keeps no counts.
        """
        # By name, so that the order in which a config lists them does not matter.
        self._sources = {name: sources[name] for name in sorted(sources)}
        self._streams = list(self._sources.values())
        self._interleaving = Interleaving([weights[name] if weights else 1 for name in self._sources], seed=seed)
        self._keys = keys
        self._saved = self._counts()
        self.capacity = self._streams[0].capacity

    def sequences(self, first: int, count: int) -> list[tuple[Plan, int]]:
        """Return sequences first to first + count - 1 as (plan, index within it)."""
        if len(self._streams) == 1:
            return [(plan, row) for plan, rows in self._streams[0].spans(first, count) for row in rows]
        found = []
        for index in range(first, first + count):
            source, number = self._interleaving.place(index)
            group, row = self._streams[source].locate(number)
            found.append((self._streams[source].plan(group), row))
        return found

    def figures(self, first: int, count: int) -> BatchFigures:
        """Return what sequences first to first + count - 1 hold together; count is at least 1."""
        before, after = self._interleaving.counts(first), self._interleaving.counts(first + count)
        sources: dict[str, SourceFigures] = {}
        tokens: list[Int64Array] = []
        patches: list[npt.NDArray[np.float64]] = []
        for (name, stream), start, end in zip(self._sources.items(), before, after, strict=True):
            spans = stream.spans(start, end - start)
            for plan, rows in spans:
                of_documents = _document_figures(plan, rows)
                tokens.append(of_documents[0])
                patches.append(of_documents[1])
            sources[name] = SourceFigures(
                targets=sum(int(plan.sequence_tokens[rows.start : rows.stop].sum()) for plan, rows in spans),
                bytes=sum(int(plan.sequence_bytes[rows.start : rows.stop].sum()) for plan, rows in spans),
                patches=sum(int(plan.sequence_patches[rows.start : rows.stop].sum()) for plan, rows in spans),
                epoch=stream.passes(end),
                share=end / (first + count),
            )
        return BatchFigures(
            targets=sum(item.targets for item in sources.values()),
            bytes=sum(item.bytes for item in sources.values()),
            patches=sum(item.patches for item in sources.values()),
            capacity_tokens=count * self.capacity.tokens,
            epoch=self._epoch(sources),
            sources=sources,
            document_tokens=np.concatenate(tokens),
            document_patches=np.concatenate(patches),
        )

    def plan_ahead(self, first: int, count: int) -> None:
        """Have a thread plan the large groups that come after those of some sequences, unless that is being done.

        Args:
            first: number of the first sequence.
            count: of sequences.
        """
        claims = []
        for stream, number in zip(self._streams, self._interleaving.counts(first + count), strict=True):
            group = stream.claim_next(number - 1) if number else None
            if group is not None:
                claims.append((stream, group))
        if claims:
            # Nobody waits for it: what it has not done by the end of training is not needed.
            threading.Thread(target=_plan_all, args=(claims,), name="planner", daemon=True).start()

    def save_counts(self, run: Path) -> None:
        """Keep what is known of the groups' sizes in the run directory, for a resumed run to begin at once.

        Args:
            run: the run directory.
        """
        counts = self._counts()
        if self._keys is not None and counts != self._saved:
            write_counts(run, self._keys, counts)
            self._saved = counts

    def _counts(self) -> dict[str, Sequence[int]]:
        return {name: stream.counts for name, stream in self._sources.items()}

    def _epoch(self, sources: Mapping[str, SourceFigures]) -> float:
        """Return the passes over all sources' documents, weighted by their bytes."""
        if len(sources) == 1:
            return next(iter(sources.values())).epoch
        sizes = {name: stream.groups.directory.manifest.bytes for name, stream in self._sources.items()}
        return sum(sources[name].epoch * size for name, size in sizes.items()) / max(1, sum(sizes.values()))


def _plan_all(claims: Sequence[tuple[SourceStream, int]]) -> None:
    """Plan groups before they are needed; what cannot be read is an error where it is needed, not here."""
    for stream, group in claims:
        with contextlib.suppress(Exception):
            stream.plan(group)


def _document_figures(plan: Plan, rows: range) -> tuple[Int64Array, npt.NDArray[np.float64]]:
    """Return int64 [N] tokens and float64 [N] patches of all pieces of some sequences of a plan."""
    chosen = slice(rows.start, rows.stop)
    counts = plan.num_pieces[chosen]
    ends = np.cumsum(counts)
    pieces = np.repeat(plan.first_piece[chosen] - ends + counts, counts) + np.arange(ends[-1])
    tokens: Int64Array = plan.piece_end[pieces] - plan.piece_start[pieces]
    per_token: npt.NDArray[np.float64] = plan.sequence_patches[chosen] / plan.sequence_tokens[chosen]
    return tokens, np.multiply(tokens, np.repeat(per_token, counts), dtype=np.float64)
