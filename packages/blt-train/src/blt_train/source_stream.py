"""The endless stream of one source's sequences: epoch after epoch, group after group, each with its own plan.

Sequence number k of a source lies in the group before which at most k sequences are. How many a group has, its plan
tells; all groups before the one in question must have been planned once, by this process or by an earlier one whose
counts were kept (see `sequence_counts`).
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence

from blt_train.errors import CheckpointError
from blt_train.groups import ShardGroups
from blt_train.plan import Capacity, Plan, plan_epoch
from blt_train.sequence_counts import COUNTS_NAME

#: Plans kept in memory: of the group that the trainer is in, the one that the loader is in, and the one to come.
_KEPT_PLANS = 3
#: Groups of fewer documents are planned when they are needed: it takes a few milliseconds.
AHEAD_DOCUMENTS = 50_000


class SourceStream:
    """All sequences of one source, numbered from 0 without end; many threads may ask at the same time."""

    def __init__(self, groups: ShardGroups, capacity: Capacity, *, seed: int, counts: Sequence[int] = ()) -> None:
        """Prepare the stream; no plan is made yet.

        Args:
            groups: the documents.
            capacity: of each sequence.
            seed: of the order.
            counts: sequences of the first groups, epoch after epoch, as far as they are known.
        """
        self.groups = groups
        self.capacity = capacity
        self._seed = seed
        #: First sequence of each group whose number of sequences is known, and of the one after.
        self._starts = list(itertools.accumulate(counts, initial=0))
        #: Number of the first group of each epoch as far as asked for, the groups of all epochs being numbered through.
        self._first_groups = [0]
        self._kept: OrderedDict[int, Plan] = OrderedDict()
        self._claimed: set[int] = set()
        # The last guards the small tables and is never held for long; the other two while plans are made.
        self._locating, self._planning, self._lock = threading.RLock(), threading.Lock(), threading.Lock()

    @property
    def counts(self) -> list[int]:
        """Sequences of each group whose number of sequences is known, epoch after epoch."""
        return [after - before for before, after in itertools.pairwise(list(self._starts))]

    def locate(self, index: int) -> tuple[int, int]:
        """Return (group, sequence within it) of a sequence, the groups of all epochs being numbered through.

        Args:
            index: the sequence's number in the stream, from 0.
        """
        if self._starts[-1] <= index:
            with self._locating:
                while self._starts[-1] <= index:
                    number = len(self._starts) - 1
                    self._starts.append(self._starts[-1] + self.plan(number).num_sequences)
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def place(self, number: int) -> tuple[int, int]:
        """Return (epoch, group within it) of a group.

        Args:
            number: of the group, all epochs' being numbered through.
        """
        with self._lock:
            while self._first_groups[-1] <= number:
                groups = self.groups.shards_of_epoch(len(self._first_groups) - 1)
                self._first_groups.append(self._first_groups[-1] + len(groups))
            epoch = bisect.bisect_right(self._first_groups, number) - 1
            return epoch, number - self._first_groups[epoch]

    def plan(self, number: int) -> Plan:
        """Return the plan of a group; the latest few are kept, and a plan that is being made is waited for.

        Args:
            number: of the group, all epochs' being numbered through.

        Raises:
            CheckpointError: the counts given at the start are not of these documents.
            InputError: the shards cannot be read.
        """
        if (plan := self._kept_plan(number)) is not None:
            return plan
        with self._planning:
            if (plan := self._kept_plan(number)) is not None:
                return plan
            plan = self._make(number)
            with self._lock:
                self._kept[number] = plan
                while len(self._kept) > _KEPT_PLANS:
                    self._kept.popitem(last=False)
            return plan

    def spans(self, first: int, count: int) -> list[tuple[Plan, range]]:
        """Return the plans and the sequences in each that sequences first to first + count - 1 are."""
        spans = []
        while count > 0:
            number, row = self.locate(first)
            taken = min(count, self._starts[number + 1] - first)
            spans.append((self.plan(number), range(row, row + taken)))
            first += taken
            count -= taken
        return spans

    def passes(self, count: int) -> float:
        """Return how many times the first `count` sequences go through the documents."""
        if count == 0:
            return 0.0
        number, row = self.locate(count - 1)
        epoch, group = self.place(number)
        before, after = self.groups.shares_of_epoch(epoch)[group : group + 2]
        done = (row + 1) / (self._starts[number + 1] - self._starts[number])
        # Both terms are exact at either end.
        return epoch + (before * (1 - done) + after * done)

    def claim_next(self, index: int) -> int | None:
        """Return the group after that of a sequence if it is large and nobody has planned or claimed it yet.

        Args:
            index: the sequence's number in the stream.
        """
        number = self.locate(index)[0] + 1
        epoch, group = self.place(number)
        before, after = self.groups.shares_of_epoch(epoch)[group : group + 2]
        if (after - before) * self.groups.directory.manifest.documents < AHEAD_DOCUMENTS:
            return None
        with self._lock:
            if number in self._kept or number in self._claimed:
                return None
            self._claimed.add(number)
        return number

    def _kept_plan(self, number: int) -> Plan | None:
        with self._lock:
            plan = self._kept.get(number)
            if plan is not None:
                self._kept.move_to_end(number)
            return plan

    def _make(self, number: int) -> Plan:
        """Make the plan of a group."""
        epoch, group = self.place(number)
        only = self.groups.is_one_group
        plan = plan_epoch(
            self.groups.documents(epoch, group),
            self.capacity,
            seed=self._seed,
            epoch=epoch,
            group=None if only else group,
        )
        if number < len(self._starts) - 1 and plan.num_sequences != self._starts[number + 1] - self._starts[number]:
            raise CheckpointError(
                f"{self.groups.directory.path}: group {group} of epoch {epoch} has {plan.num_sequences} sequences, the "
                f"run's {COUNTS_NAME} says {self._starts[number + 1] - self._starts[number]}: delete that file"
            )
        return plan
