"""One text at a time, with a step's host work beside the GPU's and most bytes in a single graph.

Whether a byte completes a patch is known when the entropy model has run, and mostly it does not: the decoder then reads
the patch that it read before. So the decoder and the choice of the next byte run ahead, beside the entropy model. Where
the byte does complete a patch, the latent transformer runs, and the decoder and the choice once more; what the first
run of the decoder left in its cache is overwritten.

All counters lie on the device and are moved on by the graphs, so that a step uploads nothing but a random number.
Kernels write what the host reads to its memory: the entropy as soon as it is known, upon which the host decides. The
next byte's step has been launched by then, and waits on the device for the host's word (see `go_ahead`): where a patch
is complete it is skipped, and launched again behind what that changes. If the next byte is found to end the text, its
step was in vain, and is overwritten by the next text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from blt_model.generation import fused
from blt_model.generation.go_ahead import GoAhead, flat_view, launches_wait
from blt_model.generation.graphs import Fork, bucket
from blt_model.generation.resident import Tap
from blt_model.generation.session import BLTSession

Choose: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From logits [1, V] and a random number float64 [1] to a token int64 [1] and its log-probability float64 [1]."""


_LOOKS = 1_000_000
"""At a result that has not come, before the host waits in another way."""
_PATIENCE = 100
"""Times so many, while the device may be waiting for the host, which must not wait for the driver then."""


def _looked(numbers: Any, at: int, looks: int) -> float:
    """A number that a kernel writes, seen before that is known to have ended; nan if none has come."""
    for _ in range(looks):
        number = float(numbers[at])
        if not math.isnan(number):
            return number
    return math.nan


class SingleRowSession(BLTSession):
    """Text of a BLT in the one row that there is; besides what every session can, it runs ahead."""

    _choose: Choose
    _kind: Hashable

    @property
    def runs_ahead(self) -> bool:
        """Whether the methods here may be used: where steps are graphs."""
        return self._runner.enabled

    def start(self, token: int, choose: Choose, kind: Hashable) -> None:
        """Begin to run ahead, with the first token after an admitted text.

        Args:
            token: the first to take.
            choose: how the tokens after it are chosen; runs on the device, from tensors that stay where they are.
            kind: equal for what chooses in the same way from the same tensors; "likeliest" for what reads no random
                number.
        """
        if not hasattr(self, "_results"):
            pinned = self.device.type == "cuda"
            self._row = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._patch_position = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._go_ahead = go_ahead = self._new_go_ahead()
            self._uniform = torch.zeros(1, dtype=torch.float64, device=self.device)
            if go_ahead is not None:
                self._uniform = go_ahead.uniform
            self._host_uniform = torch.zeros(1, dtype=torch.float64, pin_memory=pinned)
            # Of running ahead and of patches, for steps of even and odd positions: a token and its log-probability.
            # Nothing is a number before it has come.
            self._results = torch.zeros(2, 2, 2, dtype=torch.float64, pin_memory=pinned)
            if self._is_fused:
                self._one_head = fused.Head(self._norm, self._head)
            self._host_entropy = torch.full((1,), math.nan, dtype=torch.float32, pin_memory=pinned)
            # Views of the same memory, much quicker to read and write number by number: between an entropy and the
            # launch of what follows it the device may have nothing to do.
            self._results_back, self._number_out = flat_view(self._results), flat_view(self._host_uniform)
            self._entropy_back = flat_view(self._host_entropy)
        if self._go_ahead is not None:
            self._go_ahead.restart()
        self._choose, self._kind = choose, kind
        # A step that was launched in vain has left one.
        self._entropy_back[0] = math.nan
        self._is_likeliest = kind == "likeliest"
        self._tokens.fill_(token)
        self._patch_position.fill_(int(self._patch_counts[0]))
        self._numbers.host[:2] = self._positions, self._open_lengths
        if self._entropy_steps is not None:
            self._numbers.host[2] = self._entropy_steps.positions
        # All are counted up by a step; so this is what the first was before.
        self._numbers.host[3] = self._positions - 1
        self._numbers.upload()

    def _new_go_ahead(self) -> GoAhead | None:
        """Words for steps that are launched ahead of the decision; None where not all of their kernels heed them."""
        lm = self._entropy_steps
        if not self._is_fused or self._hashes is None or self._stacks.whole is None or lm is None or launches_wait():
            return None
        return GoAhead(self.device) if lm.is_resident and lm.context_start is None else None

    def launch(self, uniform: float) -> None:
        """Take the present token and choose the next as if no patch were complete; does not wait.

        Args:
            uniform: the random number of the choice.
        """
        if not self._has_room():
            self._reserve(int(self._positions[0]) + 1, int(self._open_lengths[0]) + 1)
        self._launch(uniform, is_wanted=True)

    def _has_room(self) -> bool:
        """Whether the present token has its place everywhere."""
        room = self._room
        return bool(
            self._positions[0] < room[0] and self._open_lengths[0] < room[1] and self._patch_counts[0] < room[2]
        )

    def _launch(self, uniform: float, *, is_wanted: bool) -> None:
        """Launch the present token's step; if it is not known to be wanted, it waits for the word."""
        results, at = self._results_back, 2 * (int(self._positions[0]) % 2)
        results[at] = results[at + 1] = results[at + 4] = results[at + 5] = math.nan
        changed = [self._numbers.device, self._tokens, self._results, self._host_entropy]
        if self._hashes is not None:
            changed.append(self._hashes.symbols)
        if self._go_ahead is None:
            self._number_out[0] = uniform
        else:
            self._go_ahead.begin(uniform)
            changed.append(self._go_ahead.state)
            if is_wanted:
                self._go_ahead.say(wanted=True)
        self._runner.run(("ahead", self._kind), self._ahead, changed)

    def finish(self, token: int, uniform: float | None) -> tuple[int, float]:
        """Wait for what was launched, and where it completed a patch, run what that changes.

        Args:
            token: the one that was taken.
            uniform: the random number for what follows the next token, which is launched at once; None to launch
                nothing.

        Returns:
            The next token, now the present one, and its log-probability.
        """
        # What the host has to keep up is done while the device works.
        at = 2 * (int(self._positions[0]) % 2)
        self._positions[0] += 1
        self._open_lengths[0] += 1
        go_ahead = None
        if uniform is not None and self._has_room() and self._runner.has(("ahead", self._kind)):
            go_ahead = self._go_ahead
        completes = True
        try:
            if go_ahead is not None and uniform is not None:
                self._launch(uniform, is_wanted=False)
            completes = self._completes(token)
        finally:
            # The device waits for this, whatever happens.
            if go_ahead is not None:
                go_ahead.say(wanted=not completes)
        if completes:
            self._take_patch()
            at += 4
        # Without kernels of our own results are told apart by when they come.
        if uniform is not None and self._is_fused and (completes or go_ahead is None):
            self.launch(uniform)
        next_token, log_probability = self._seen(self._results_back, at), self._seen(self._results_back, at + 1)
        if uniform is not None and not self._is_fused:
            self.launch(uniform)
        return int(next_token), log_probability

    def _completes(self, token: int) -> bool:
        """Whether the token that was taken completes a patch, once its entropy has come."""
        entropy = math.nan
        if self._entropy_steps is not None:
            self._entropy_steps.advance([token])
            entropy = self._seen(self._entropy_back, 0) if self._go_ahead is None else self._entropy_seen()
            self._entropy_back[0] = math.nan
            if math.isinf(entropy):
                entropy = math.nan
        return self._patchers[0].push(token, entropy)

    def _seen(self, numbers: Any, at: int) -> float:
        """A number of a result, once it has come."""
        number = _looked(numbers, at, _LOOKS if self._is_fused else 0)
        if math.isnan(number) and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return float(numbers[at])

    def _entropy_seen(self) -> float:
        """The entropy, once it has come, while the device may be waiting for the host: so that is not waited for."""
        while math.isnan(number := _looked(self._entropy_back, 0, _PATIENCE * _LOOKS)):
            if self.device.type == "cuda":
                # This raises what has gone wrong.
                torch.cuda.current_stream(self.device).query()
        return number

    def _ahead(self) -> None:
        positions, open_lengths, lm_positions, _ = self._numbers.device
        lm, whole, go_ahead = self._entropy_steps, self._stacks.whole, self._go_ahead
        skipped = None if go_ahead is None else go_ahead.skipped
        x = lm_x = None
        if go_ahead is not None:
            x, lm_x = self._embed_ahead(go_ahead)
            lm_positions = go_ahead.place
        elif not self._is_likeliest:
            self._uniform.copy_(self._host_uniform, non_blocking=True)
        fork = Fork(self.device)
        # First of all, as the most depends on it.
        if whole is not None and x is None:
            x = self._embed(self._tokens, positions)
        with fork.branch():
            if lm is not None:
                lm_plan = lm.plan_static(self._tokens, lm_positions, self._programs.entropy_model, skipped)
                self._put_entropies(self._tokens, lm_plan, self._host_entropy if self._is_fused else None, lm_x)
        if whole is None or x is None:
            plan = self._plan_static(self._encoder, positions, None, self._encoder.capacity, self._programs.model)
            self._states[:1] = self._encode(self._tokens, positions, open_lengths, plan)
            x = self._decoded_row(positions, self._programs.model)
        else:
            tap = Tap(self._states, self._patch_steps.open_bytes[0, 0], open_lengths)
            x = whole(x, positions, self._programs.model, tap, skipped)
        chosen = self._chosen(x)
        if go_ahead is None:
            # The other line has read the counters by then, and what it changes is there. Where words are waited for, it
            # has its place from elsewhere, and neither line waits for the other's end.
            fork.join()
        if lm is not None and lm.context_start is not None:
            lm_positions.copy_(torch.where(self._tokens == lm.context_start, 0, lm_positions))
        if lm is not None and not self._is_fused:
            self._host_entropy.copy_(self._entropies[:1], non_blocking=True)
        self._hand_over(x, chosen, self._numbers.device.view(-1), self._results[0], before=0, skipped=skipped)
        if go_ahead is not None:
            fork.join()

    def _embed_ahead(self, go_ahead: GoAhead) -> tuple[Tensor, Tensor | None]:
        """Embed the present token for the encoder and the entropy model, and wait for the word."""
        lm, config = self._entropy_steps, self._model.config.hash_embedding
        if lm is None or config is None or self._hashes is None:
            raise RuntimeError("no word is waited for without an entropy model and hash embeddings")
        weight = self._model.encoder.embedding.weight
        positions, _, lm_positions, _ = self._numbers.device
        embedded = fused.embed(
            self._tokens, positions, self._hashes, weight, average=config.average, lm_table=lm.embedding, moves=False
        )
        fused.await_word(go_ahead, lm_positions, self._tokens, self._hashes, draws=not self._is_likeliest)
        return embedded

    def _take_patch(self) -> None:
        """Run the latent transformer for the complete patch, and choose once more."""
        changed = [self._tokens, self._numbers.device, self._patch_position, self._results]
        if self._is_fused:
            longest = bucket(int(self._open_lengths[0]), self._patch_steps.open_capacity)
            self._runner.run(("again", self._kind, longest), lambda: self._again(longest), changed)
            self._patch_counts[0] += 1
            self._open_lengths[0] = 0
        else:
            self._complete(np.zeros(1, dtype=np.int64))
            self._runner.run(("again", self._kind), lambda: self._again(None), changed)

    def _again(self, longest: int | None) -> None:
        """Do what a complete patch changes; its length's next power of two is None if it has been run."""
        open_lengths, before = self._numbers.device[1], self._numbers.device[3]
        if longest is not None:
            step = fused.FusedStep(self._patch_position, self._row)
            self._patch_steps.complete_one(self._row, step, longest, open_lengths)
        x = self._decoded_row(before, self._programs.all)
        self._hand_over(x, self._chosen(x), self._patch_position, self._results[1], before=1, cleared=open_lengths)

    def _decoded_row(self, positions: Tensor, programs: int) -> Tensor:
        """The decoder's states [1, dim] from those that the encoder has left."""
        plan = self._plan_static(self._decoder, positions, None, self._decoder.capacity, programs)
        return self._decoded(self._states, plan)

    def _chosen(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The next token and its log-probability after the decoder's states; None where handing over chooses."""
        if self._is_fused and self._is_likeliest:
            return None
        return self._choose(self._logits_of(x), self._uniform)

    def _hand_over(
        self,
        x: Tensor,
        chosen: tuple[Tensor, Tensor] | None,
        counters: Tensor,
        result: Tensor,
        *,
        before: int,
        cleared: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> None:
        """Leave what was found for the next step and the host, and count up; for the position so many before."""
        options = {"before": before, "cleared": cleared, "skipped": skipped}
        place = self._numbers.device[0]
        if chosen is None:
            self._one_head.likeliest(x, self._tokens, counters, place, result, **options)
            return
        token, log_probability = chosen
        if self._is_fused:
            fused.hand_over(token, log_probability, self._tokens, counters, place, result, **options)
            return
        if cleared is not None:
            cleared.zero_()
        # As the place is known to the device alone, both halves take what was found.
        for half in result:
            half[:1].copy_(token, non_blocking=True)
            half[1:].copy_(log_probability, non_blocking=True)
        counters.add_(1)
        self._tokens.copy_(token)
