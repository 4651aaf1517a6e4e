"""One text at a time, with a step's host work beside the GPU's and most bytes in a single graph.

Whether a byte completes a patch is known when the entropy model has run, and mostly it does not: the decoder then reads
the patch that it read before. So the decoder and the choice of the next byte run ahead, beside the entropy model. Where
the byte does complete a patch, the latent transformer runs, and the decoder and the choice once more; what the first
run of the decoder left in its cache is overwritten.

All counters lie on the device and are moved on by the graphs, so that a step uploads nothing but a random number, and
the host waits once for a byte that completes no patch. What the host reads is written to its memory by a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from blt_model.generation import fused
from blt_model.generation.graphs import Fork, bucket
from blt_model.generation.resident import Tap
from blt_model.generation.session import BLTSession
from blt_model.vocabulary import EOS_ID

Choose: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From logits [1, V] and a random number float64 [1] to a token int64 [1] and its log-probability float64 [1]."""


_LOOKS = 100_000
"""At a result that has not come, before the host waits in another way."""


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
        if not hasattr(self, "_result"):
            pinned = self.device.type == "cuda"
            self._result = torch.zeros(3, dtype=torch.float64, device=self.device)
            self._row = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._patch_position = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._uniform = torch.zeros(1, dtype=torch.float64, device=self.device)
            self._host_result = torch.zeros(3, dtype=torch.float64, pin_memory=pinned)
            self._host_uniform = torch.zeros(1, dtype=torch.float64, pin_memory=pinned)
            # Views of the same memory, quicker to read and write number by number.
            self._numbers_back, self._number_out = self._host_result.numpy(), self._host_uniform.numpy()
        self._choose, self._kind = choose, kind
        self._is_likeliest = kind == "likeliest"
        self._tokens.fill_(token)
        self._patch_position.fill_(int(self._patch_counts[0]))
        self._numbers.host[:2] = self._positions, self._open_lengths
        if self._entropy_steps is not None:
            self._numbers.host[2] = self._entropy_steps.positions
        self._numbers.upload()

    def launch(self, uniform: float) -> None:
        """Take the present token and choose the next as if no patch were complete; does not wait.

        Args:
            uniform: the random number of the choice.
        """
        self._reserve(int(self._positions[0]) + 1, int(self._open_lengths[0]) + 1)
        self._number_out[0] = uniform
        self._numbers_back[:] = math.nan
        changed = [self._numbers.device, self._tokens]
        if self._hashes is not None:
            changed.append(self._hashes.symbols)
        self._runner.run(("ahead", self._kind), self._ahead, changed)

    def finish(self, token: int, uniform: float | None) -> tuple[int, float]:
        """Wait for what was launched, and where it completed a patch, run what that changes.

        Args:
            token: the one that was taken.
            uniform: the random number for what follows the next token, which is launched at once unless that token ends
                the text; None to launch nothing.

        Returns:
            The next token, now the present one, and its log-probability.
        """
        # What the host has to keep up is done while the device works.
        self._positions[0] += 1
        self._open_lengths[0] += 1
        if self._entropy_steps is not None:
            self._entropy_steps.advance([token])
        self._wait(3 if self._entropy_steps is not None else 2)
        if self._patchers[0].push(token, float(self._numbers_back[2])):
            self._take_patch()
            self._wait(2)
        next_token, log_probability, _ = self._numbers_back.tolist()
        if uniform is not None and next_token != EOS_ID:
            self.launch(uniform)
        return int(next_token), log_probability

    def _wait(self, count: int) -> None:
        """Wait until so many numbers of a result have come."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._is_fused:
            # They are seen before the kernel that writes them is known to have ended.
            back = self._numbers_back
            for _ in range(_LOOKS):
                if all(back[index] == back[index] for index in range(count)):  # not NaN
                    return
        stream.synchronize()

    def _ahead(self) -> None:
        positions, open_lengths, lm_positions = self._numbers.device
        lm, whole = self._entropy_steps, self._stacks.whole
        fork = Fork(self.device)
        if not self._is_likeliest:
            self._uniform.copy_(self._host_uniform, non_blocking=True)
        # First of all, as the most depends on it.
        x = None if whole is None else self._embed(self._tokens, positions)
        with fork.branch():
            if lm is not None:
                lm_plan = lm.plan_static(self._tokens, lm_positions, self._programs.entropy_model)
                self._put_entropies(self._tokens, lm_plan)
        if whole is None or x is None:
            plan = self._plan_static(self._encoder, positions, None, self._encoder.capacity, self._programs.model)
            self._states[:1] = self._encode(self._tokens, positions, open_lengths, plan)
            logits = self._decode_row(positions, self._programs.model)
        else:
            tap = Tap(self._states, self._patch_steps.open_bytes[0, 0], open_lengths)
            x = whole(x, positions, self._programs.model, tap)
            logits = fused.normed_linear(x, self._norm, self._head)
        chosen = self._choose(logits, self._uniform)
        fork.join()
        if lm is not None and lm.context_start is not None:
            lm_positions.copy_(torch.where(self._tokens == lm.context_start, 0, lm_positions))
        self._hand_over(*chosen, None if lm is None else self._entropies, self._numbers.device.view(-1))

    def _take_patch(self) -> None:
        """Run the latent transformer for the complete patch, and choose once more."""
        changed = [self._tokens, self._numbers.device, self._patch_position]
        if self._is_fused:
            self._numbers_back[:2] = math.nan
            longest = bucket(int(self._open_lengths[0]), self._patch_steps.open_capacity)
            self._runner.run(("again", self._kind, longest), lambda: self._again(longest), changed)
            self._patch_counts[0] += 1
            self._open_lengths[0] = 0
        else:
            self._complete(np.zeros(1, dtype=np.int64))
            self._runner.run(("again", self._kind), lambda: self._again(None), changed)

    def _again(self, longest: int | None) -> None:
        """Do what a complete patch changes; its length's next power of two is None if it has been run."""
        positions, open_lengths, _ = self._numbers.device
        if longest is not None:
            step = fused.FusedStep(self._patch_position, self._row)
            self._patch_steps.complete_one(self._row, step, longest, open_lengths)
        open_lengths.zero_()
        chosen = self._choose(self._decode_row(positions - 1, self._programs.all), self._uniform)
        self._hand_over(*chosen, None, self._patch_position)

    def _decode_row(self, positions: Tensor, programs: int) -> Tensor:
        """Logits [1, V] from the states that the encoder has left."""
        plan = self._plan_static(self._decoder, positions, None, self._decoder.capacity, programs)
        return self._decode(self._states, plan)

    def _hand_over(self, token: Tensor, log_probability: Tensor, entropies: Tensor | None, counters: Tensor) -> None:
        """Leave what was found for the next step and the host, and count up."""
        if self._is_fused:
            fused.hand_over(token, log_probability, entropies, self._tokens, counters, self._host_result)
            return
        self._result[:1], self._result[1:2] = token, log_probability
        if entropies is not None:
            self._result[2:] = entropies
        counters.add_(1)
        self._tokens.copy_(token)
        self._host_result.copy_(self._result, non_blocking=True)
