"""The endless stream of training sequences: epoch after epoch, each with its own plan.

Sequence g of the stream is sequence g - (sequences of all earlier epochs) of its epoch. A global batch is a run of
neighbouring sequences and flows over the end of an epoch, so no document is dropped there. The stream has no state:
whoever knows a step knows its sequences.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from blt_train.documents import DocumentTable, Int64Array
from blt_train.plan import Capacity, Plan, plan_epoch

#: Plans kept in memory: the current epoch's, its neighbours' at the border.
_CACHED_PLANS = 3


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
    """Passes over the data completed at the batch's end, in sequences."""

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

    def __init__(self, documents: DocumentTable, capacity: Capacity, *, seed: int) -> None:
        """Prepare the stream; no plan is made yet.

        Args:
            documents: the training documents.
            capacity: of each sequence.
            seed: of the order.
        """
        self.documents = documents
        self.capacity = capacity
        self.plan = functools.lru_cache(maxsize=_CACHED_PLANS)(self._plan)
        self._seed = seed
        #: First sequence of each epoch whose plan has been made, and of the one after.
        self._epoch_starts = [0]
        # The loader's thread and the trainer ask at the same time.
        self._lock = threading.Lock()

    def _plan(self, epoch: int) -> Plan:
        return plan_epoch(self.documents, self.capacity, seed=self._seed, epoch=epoch)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (epoch, sequence within it) of a sequence of the stream.

        Args:
            index: the sequence's number in the stream, from 0.
        """
        with self._lock:
            while self._epoch_starts[-1] <= index:
                epoch = len(self._epoch_starts) - 1
                self._epoch_starts.append(self._epoch_starts[-1] + self.plan(epoch).num_sequences)
        epoch = int(np.searchsorted(self._epoch_starts, index, side="right")) - 1
        return epoch, index - self._epoch_starts[epoch]

    def figures(self, first: int, count: int) -> BatchFigures:
        """Return what sequences first to first + count - 1 hold together."""
        targets, content, patches = 0, 0, 0
        document_tokens: list[Int64Array] = []
        document_patches: list[npt.NDArray[np.float64]] = []
        epoch, sequence = 0, 0
        for index in range(first, first + count):
            epoch, sequence = self.locate(index)
            plan = self.plan(epoch)
            targets += int(plan.sequence_tokens[sequence])
            content += int(plan.sequence_bytes[sequence])
            patches += int(plan.sequence_patches[sequence])
            pieces = slice(plan.first_piece[sequence], plan.first_piece[sequence] + plan.num_pieces[sequence])
            document_tokens.append(plan.piece_end[pieces] - plan.piece_start[pieces])
            per_token = plan.sequence_patches[sequence] / max(1, plan.sequence_tokens[sequence])
            document_patches.append(document_tokens[-1] * per_token)
        return BatchFigures(
            targets=targets,
            bytes=content,
            patches=patches,
            capacity_tokens=count * self.capacity.tokens,
            epoch=epoch + (sequence + 1) / self.plan(epoch).num_sequences,
            document_tokens=np.concatenate(document_tokens),
            document_patches=np.concatenate(document_patches),
        )
