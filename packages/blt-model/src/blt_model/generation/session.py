"""Texts under way: what models and caches hold of them, and the steps that take them one byte further.

A step has two halves. `encode` runs what needs the new byte only: the entropy model and the local encoder. Then the
host decides, row by row, whether the byte was the last of its patch, and `decode` runs the latent transformer for the
rows where it was, and the local decoder for all. A ByteLM has no second half.

Position i of the decoder reads the latent output of the patch before the one that holds token i + 1: if token i + 1
starts a patch, that is the patch that token i completes, else it is the one that was read before. So a row reads its
newest complete patch at every step, and the latent transformer runs when a patch is complete, once.

Legend: n rows in use, m rows that complete a patch, V vocabulary.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM, next_byte_entropy
from blt_model.caches import AttentionCache, AttentionStep
from blt_model.config import TransformerConfig
from blt_model.generation import fused
from blt_model.generation.byte_lm_steps import ByteLMSteps, StepNumbers
from blt_model.generation.graphs import Fork, GraphRunner, bucket
from blt_model.generation.patch_steps import BLTFiller, PatchSteps
from blt_model.generation.patching import NewPatcher, NextPatch, push_all
from blt_model.generation.prefill import PackedTexts, TextPatches, entropies_of, prefill_blt, prefill_byte_lm
from blt_model.generation.resident import Parts, Programs, ResidentStack
from blt_model.generation.steps import BlockStep, HashHistory, Norm, block_steps
from blt_model.vocabulary import VOCABULARY_SIZE

Ints = npt.NDArray[np.int64]
Plan: TypeAlias = AttentionStep | fused.FusedStep


class Session(Protocol):
    """Texts under way; those in use are the first rows."""

    rows: int
    device: torch.device

    def admit(self, first_row: int, texts: Sequence[Sequence[int]]) -> Tensor:
        """Begin rows with texts (token ids, BOS first), the first in first_row; returns logits [texts, V]."""
        ...

    def encode(self, tokens: Tensor) -> Tensor | None:
        """Take the next token of the first n rows, int64 [n]; returns entropies float32 [n], if there are any."""
        ...

    def decode(self, tokens: Sequence[int], entropies: Sequence[float] | None, live: Sequence[bool]) -> Tensor:
        """Logits [n, V] after these tokens; rows that are not live have ended, and theirs mean nothing."""
        ...

    def move_row(self, source: int, target: int) -> None:
        """Put a row in another's place; the source is then of no use."""
        ...

    def fork_row(self, source: int, target: int) -> None:
        """Begin a row with the text of another that was admitted and has made no step yet."""
        ...

    def patches(self, row: int) -> int:
        """Complete patches of a row: its positions in the latent transformer."""
        ...


class ByteLMSession:
    """Texts of a ByteLM."""

    def __init__(self, model: ByteLM, rows: int, *, graphs: bool = True) -> None:
        """Make room.

        Args:
            model: whose weights are used as they lie.
            rows: texts at once.
            graphs: replay CUDA graphs where the model is on CUDA.
        """
        self.rows, self.device = rows, model.embedding.weight.device
        self._runner = GraphRunner(self.device, enabled=graphs)
        self._is_fused = self._runner.enabled and fused.available(model)
        self._steps = ByteLMSteps(model, rows, is_fused=self._is_fused)
        self._numbers = StepNumbers(1, rows, self.device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._head, self._norm = model.head.weight, Norm.of(model.norm)
        self._logits = torch.zeros(rows, VOCABULARY_SIZE, dtype=model.embedding.weight.dtype, device=self.device)

    def admit(self, first_row: int, texts: Sequence[Sequence[int]]) -> Tensor:
        """See `Session`."""
        packed = PackedTexts.pack(texts, self.device)
        states = prefill_byte_lm(self._steps.model, packed, self._steps.filler(first_row, packed))
        return self._head_of(states[torch.from_numpy(packed.ends - 1).to(self.device)])

    def _head_of(self, states: Tensor) -> Tensor:
        if self._is_fused and len(states) <= self.rows:
            return fused.normed_linear(states, self._norm, self._head)
        return F.linear(self._norm(states), self._head)

    def encode(self, tokens: Tensor) -> None:
        """See `Session`."""
        count = len(tokens)
        if self._steps.cache.reserve(int(self._steps.positions[:count].max()) + 1):
            self._runner.clear()
        if not self._runner.enabled:
            self._logits[:count] = self._head_of(self._steps.step(tokens, self._steps.plan(tokens)))
        else:
            size = bucket(count, self.rows)
            self._tokens[:count] = tokens
            self._numbers.host[0] = self._steps.positions
            self._numbers.upload()
            self._runner.run(size, lambda: self._static(size))

    def _static(self, size: int) -> None:
        tokens = self._tokens[:size]
        plan = self._steps.plan_static(tokens, self._numbers.device[0, :size])
        self._logits[:size] = self._head_of(self._steps.step(tokens, plan))

    def decode(self, tokens: Sequence[int], entropies: Sequence[float] | None, live: Sequence[bool]) -> Tensor:
        """See `Session`."""
        self._steps.advance(tokens)
        return self._logits[: len(tokens)]

    def move_row(self, source: int, target: int) -> None:
        """See `Session`."""
        self.fork_row(source, target)

    def fork_row(self, source: int, target: int) -> None:
        """See `Session`."""
        self._steps.copy_row(source, target)

    def patches(self, row: int) -> int:
        """See `Session`; a ByteLM has no patches."""
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacks:
    """A BLT's stacks in one launch each; None where they are not."""

    encoder: ResidentStack | None = None
    decoder: ResidentStack | None = None
    whole: ResidentStack | None = None
    """Encoder and decoder at once, with the encoder's output tapped."""


class BLTSession:
    """Texts of a BLT."""

    def __init__(
        self,
        model: BLT,
        rows: int,
        *,
        new_patcher: NewPatcher,
        entropy_model: ByteLM | None,
        context_start: int | None = None,
        graphs: bool = True,
    ) -> None:
        """Make room.

        Args:
            model: whose weights are used as they lie.
            rows: texts at once.
            new_patcher: makes a patcher for one text.
            entropy_model: gives the patchers their entropies, on the model's device; None where they need none.
            context_start: the token that begins a context of the entropy model's own; None for none.
            graphs: replay CUDA graphs where the model is on CUDA.
        """
        config, weight = model.config, model.encoder.embedding.weight
        self.rows, self.device = rows, weight.device
        self._model, self._new_patcher = model, new_patcher
        self._runner = GraphRunner(self.device, enabled=graphs)
        models: list[BLT | ByteLM] = [model] if entropy_model is None else [model, entropy_model]
        self._is_fused = self._runner.enabled and all(fused.available(one) for one in models)
        self._entropy_steps = None
        if entropy_model is not None:
            self._entropy_steps = ByteLMSteps(entropy_model, rows, context_start=context_start, is_fused=self._is_fused)
        self._encoder = AttentionCache(config.encoder, rows, dtype=weight.dtype, device=self.device)
        self._decoder = AttentionCache(config.decoder, rows, dtype=weight.dtype, device=self.device)
        self._shares_plan = _plan_key(config.encoder) == _plan_key(config.decoder)
        self._patch_steps = PatchSteps(model, rows, is_fused=self._is_fused)
        hashes = model.encoder.hash_embedding
        self._hashes = None if hashes is None else HashHistory(hashes, rows)
        self._encoder_blocks = self._block_steps(model.encoder.blocks)
        self._decoder_blocks = self._block_steps(model.decoder.blocks)
        self._encoder_cross = _places(model.encoder.cross_attention)
        self._decoder_cross = _places(model.decoder.cross_attention)
        self._stacks = self._resident_stacks() if self._is_fused else Stacks()
        self._programs = Programs.of(self.device, has_entropy_model=entropy_model is not None)
        self._norm, self._head = Norm.of(model.decoder.norm), model.decoder.head.weight
        self._lm_head = fused.Head.of(entropy_model) if entropy_model is not None and self._is_fused else None
        # Positions, open lengths, positions in the entropy model, and where one row runs ahead the position before.
        self._numbers = StepNumbers(4, rows, self.device)
        self._patch_numbers = StepNumbers(3, rows, self.device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._positions = np.zeros(rows, dtype=np.int64)
        self._patch_counts = np.zeros(rows, dtype=np.int64)
        self._open_lengths = np.zeros(rows, dtype=np.int64)
        self._patchers: list[NextPatch] = [new_patcher() for _ in range(rows)]
        self._admitted: list[tuple[Sequence[int], Sequence[float]]] = [((), ())] * rows
        # What captured steps hand on.
        self._states = weight.new_zeros((rows, config.encoder.dim))
        self._entropies = torch.zeros(rows, dtype=torch.float32, device=self.device)
        self._logits = weight.new_zeros((rows, VOCABULARY_SIZE))
        self._decoder_plan: AttentionStep | None = None
        self._addresses: tuple[int, ...] = ()
        self._room = (0, 0, 0)
        """Positions, open bytes and patches of which there is room for, as of the last `_reserve`."""

    def admit(self, first_row: int, texts: Sequence[Sequence[int]]) -> Tensor:
        """See `Session`."""
        # Prompts may make buffers grow.
        self._room = (0, 0, 0)
        packed = PackedTexts.pack(texts, self.device)
        entropies = [math.nan] * len(packed.tokens)
        if self._entropy_steps is not None:
            lm = self._entropy_steps
            entropies = entropies_of(lm.model, packed, lm.context_start, lm.filler(first_row, packed))
        starts = []
        for index, (text, begin, end) in enumerate(zip(texts, packed.starts, packed.ends, strict=True)):
            patcher = self._patchers[first_row + index]
            patcher.reset()
            self._admitted[first_row + index] = text, entropies[begin:end]
            starts.append(push_all(patcher, text, entropies[begin:end]))
        patches = TextPatches.of(starts)
        filler = BLTFiller(self._patch_steps, (self._encoder, self._decoder), first_row, packed, patches)
        logits = prefill_blt(self._model, packed, patches, packed.ends - 1, filler)
        for index, text in enumerate(texts):
            if self._hashes is not None:
                self._hashes.fill(first_row + index, torch.tensor(text, device=self.device))
        rows = slice(first_row, first_row + len(texts))
        self._positions[rows] = packed.lengths
        self._patch_counts[rows], self._open_lengths[rows] = patches.complete_counts, patches.open_lengths
        return logits

    def encode(self, tokens: Tensor) -> Tensor | None:
        """See `Session`."""
        count = len(tokens)
        positions, open_lengths = self._positions[:count], self._open_lengths[:count]
        self._reserve(int(positions.max()) + 1, int(open_lengths.max()) + 1)
        if self._runner.enabled:
            size = bucket(count, self.rows)
            self._tokens[:count] = tokens
            self._numbers.host[:2] = self._positions, self._open_lengths
            if self._entropy_steps is not None:
                self._numbers.host[2] = self._entropy_steps.positions
            self._numbers.upload()
            changed = [] if self._hashes is None else [self._hashes.symbols]
            self._runner.run(("encode", size), lambda: self._encode_static(size), changed)
        else:
            plan = self._encoder.plan(positions)
            self._decoder_plan = plan if self._shares_plan else self._decoder.plan(positions)
            lm_plan = None if self._entropy_steps is None else self._entropy_steps.plan(tokens)
            slots = torch.from_numpy(np.arange(count) * self._patch_steps.open_capacity + open_lengths)
            places = torch.from_numpy(positions).to(self.device)
            if lm_plan is not None:
                self._put_entropies(tokens, lm_plan)
            self._states = self._encode(tokens, places, slots.to(self.device), plan)
        positions += 1
        open_lengths += 1
        return None if self._entropy_steps is None else self._entropies[:count]

    def _reserve(self, positions: int, open_length: int) -> None:
        """Make room for positions and open bytes in every row."""
        wanted = positions, open_length, int(self._patch_counts.max()) + 1
        if all(map(operator.le, wanted, self._room)):
            return
        if self.device.type == "cuda":
            # Graphs that may be forgotten below are not under way then.
            torch.cuda.current_stream(self.device).synchronize()
        caches = [self._encoder, self._decoder]
        if self._entropy_steps is not None:
            caches.append(self._entropy_steps.cache)
        for cache in caches:
            cache.reserve(positions)
        self._patch_steps.reserve_open(open_length)
        self._patch_steps.latent.reserve(wanted[2])
        if self._runner.enabled:
            buffers = [cache.rotary.table for cache in (*caches, self._patch_steps.latent)]
            buffers += [cache.keys for cache in (*caches, self._patch_steps.latent)]
            addresses = tuple(buffer.data_ptr() for buffer in (*buffers, self._patch_steps.open_bytes))
            if addresses != self._addresses:
                self._runner.clear()
                self._addresses = addresses
        latent = self._patch_steps.latent
        self._room = min(cache.room for cache in caches), self._patch_steps.open_capacity, latent.room

    def _resident_stacks(self) -> Stacks:
        """The stacks in one launch each, where that can be."""
        config = self._model.config
        encoder, decoder = (block_steps(part.blocks) for part in (self._model.encoder, self._model.decoder))
        # What is kept of a byte is the state after the last layer alone.
        has_one_state = list(self._encoder_cross) == [len(encoder) - 1]
        reads = self._patch_steps.decoder_parts(decoder, self._decoder, self._decoder_cross)
        stack = fused.resident_stack(reads)
        if not has_one_state:
            return Stacks(decoder=stack)
        whole = None
        if replace(config.encoder, num_layers=1) == replace(config.decoder, num_layers=1):
            parts = replace(
                reads,
                blocks=[*encoder, *decoder],
                caches=[self._encoder, self._decoder],
                crosses={layer + len(encoder): cross for layer, cross in reads.crosses.items()},
                tap=len(encoder) - 1,
            )
            whole = fused.resident_stack(parts)
        own = fused.resident_stack(Parts(blocks=encoder, caches=[self._encoder]))
        return Stacks(encoder=own, decoder=stack, whole=whole)

    def _block_steps(self, blocks: Iterable[object]) -> Sequence[BlockStep | fused.FusedBlock]:
        steps = block_steps(blocks)
        return fused.block_steps(steps) if self._is_fused else steps

    def _plan_static(
        self, cache: AttentionCache, positions: Tensor, rows: Tensor | None, length: int, programs: int = 0
    ) -> Plan:
        if self._is_fused:
            return fused.FusedStep(positions, rows, programs or self._programs.all)
        return cache.plan_static(positions, rows, length)

    def _encode_static(self, size: int) -> None:
        positions, open_lengths, lm_positions = self._numbers.device[:3, :size]
        tokens = self._tokens[:size]
        plan = self._plan_static(self._encoder, positions, None, self._encoder.capacity, self._programs.model)
        slots = torch.arange(size, device=self.device) * self._patch_steps.open_capacity + open_lengths
        # The entropy model and the encoder read nothing of each other.
        fork = Fork(self.device)
        with fork.branch():
            if self._entropy_steps is not None:
                lm_plan = self._entropy_steps.plan_static(tokens, lm_positions, self._programs.entropy_model)
                self._put_entropies(tokens, lm_plan)
        self._states[:size] = self._encode(tokens, positions, slots, plan)
        fork.join()

    def _put_entropies(self, tokens: Tensor, plan: Plan, out: Tensor | None = None, x: Tensor | None = None) -> None:
        """Run the entropy model for tokens, int64 [n], or their embeddings, if they have been read.

        Leaves float32 [n] nats; without a place to write them to, in the usual one.
        """
        lm = self._entropy_steps
        if lm is None:
            return
        states = lm.step(tokens, plan, x)
        out = self._entropies if out is None else out
        if self._lm_head is not None and len(states) == 1:
            self._lm_head.entropy(states, out, plan.skipped if isinstance(plan, fused.FusedStep) else None)
        elif self._is_fused:
            fused.put_entropies(states, lm.model, out)
        else:
            out[: len(tokens)] = next_byte_entropy(lm.model.wide_logits(states))

    def _encode(self, tokens: Tensor, positions: Tensor, slots: Tensor, plan: Plan) -> Tensor:
        """Byte states [n, dim]."""
        x = self._embed(tokens, positions)
        if self._stacks.encoder is not None and isinstance(plan, fused.FusedStep):
            x = self._stacks.encoder(x, plan.positions, plan.programs)
            self._patch_steps.put_open(0, slots, x)
            return x
        for layer, block in enumerate(self._encoder_blocks):
            x = block(x, self._encoder, layer, plan)  # type: ignore[arg-type]  # blocks and plans are of one kind
            if layer in self._encoder_cross:
                self._patch_steps.put_open(self._encoder_cross[layer], slots, x)
        return x

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        weight, config = self._model.encoder.embedding.weight, self._model.config.hash_embedding
        if self._hashes is None:
            return F.embedding(tokens, weight)
        if self._is_fused:
            return fused.embed(tokens, positions, self._hashes, weight, average=config.average)[0]
        x = F.embedding(tokens, weight) + self._hashes.push(tokens, positions)
        return x / (1 + config.num_tables) if config.average else x

    def decode(self, tokens: Sequence[int], entropies: Sequence[float] | None, live: Sequence[bool]) -> Tensor:
        """See `Session`."""
        count = len(tokens)
        if self._entropy_steps is not None:
            self._entropy_steps.advance(tokens)
        values = [math.nan] * count if entropies is None else entropies
        new = zip(tokens, values, live, strict=True)
        ended = [
            row for row, (token, value, lives) in enumerate(new) if lives and self._patchers[row].push(token, value)
        ]
        if ended:
            self._complete(np.array(ended))
        if not self._runner.enabled and self._decoder_plan is not None:
            return self._decode(self._states, self._decoder_plan)
        size = bucket(count, self.rows)
        self._runner.run(("decode", size), lambda: self._decode_static(size))
        return self._logits[:count]

    def _decode_static(self, size: int) -> None:
        plan = self._plan_static(self._decoder, self._numbers.device[0, :size], None, self._decoder.capacity)
        self._logits[:size] = self._decode(self._states[:size], plan)

    def _decode(self, x: Tensor, plan: Plan) -> Tensor:
        """Logits [n, V] from byte states [n, dim]."""
        return self._logits_of(self._decoded(x, plan))

    def _logits_of(self, x: Tensor) -> Tensor:
        if self._is_fused:
            return fused.normed_linear(x, self._norm, self._head)
        return F.linear(self._norm(x), self._head)

    def _decoded(self, x: Tensor, plan: Plan) -> Tensor:
        """The decoder's states [n, dim] from the encoder's."""
        if self._stacks.decoder is not None and isinstance(plan, fused.FusedStep):
            return self._stacks.decoder(x, plan.positions, plan.programs)
        for layer, block in enumerate(self._decoder_blocks):
            if layer in self._decoder_cross:
                x = self._patch_steps.read(self._decoder_cross[layer], x)
            x = block(x, self._decoder, layer, plan)  # type: ignore[arg-type]  # blocks and plans are of one kind
        return x

    def _complete(self, rows: Ints) -> None:
        """Run the latent transformer for the rows whose open patch is complete."""
        steps, latent = self._patch_steps, self._patch_steps.latent
        positions, lengths = self._patch_counts[rows], self._open_lengths[rows]
        longest = int(lengths.max())
        if not self._runner.enabled:
            mask = None
            if int(lengths.min()) < longest:
                mask = torch.from_numpy(np.arange(longest) < lengths[:, None]).to(self.device)
            steps.complete(torch.from_numpy(rows).to(self.device), latent.plan(positions, rows), longest, mask)
        else:
            size = bucket(len(rows), self.rows)
            # A row that stands in the step twice is written twice, with the same values.
            filled = np.concatenate([np.arange(len(rows)), np.zeros(size - len(rows), dtype=np.int64)])
            self._patch_numbers.host[:, :size] = rows[filled], positions[filled], lengths[filled]
            shape = size, bucket(longest, steps.open_capacity), bucket(int(positions.max()) + 1, latent.capacity)
            self._runner.run(("patch", *shape), lambda: self._complete_static(*shape))
        self._patch_counts[rows] += 1
        self._open_lengths[rows] = 0

    def _complete_static(self, size: int, longest: int, length: int) -> None:
        self._patch_numbers.upload()
        rows, positions, lengths = self._patch_numbers.device[:, :size]
        mask = torch.arange(longest, device=self.device) < lengths[:, None]
        plan = self._plan_static(self._patch_steps.latent, positions, rows, length)
        self._patch_steps.complete(rows, plan, longest, mask)

    def move_row(self, source: int, target: int) -> None:
        """See `Session`."""
        self._copy_row(source, target)
        patchers = self._patchers
        patchers[source], patchers[target] = patchers[target], patchers[source]

    def fork_row(self, source: int, target: int) -> None:
        """See `Session`."""
        self._copy_row(source, target)
        self._patchers[target].reset()
        push_all(self._patchers[target], *self._admitted[source])

    def _copy_row(self, source: int, target: int) -> None:
        positions = int(self._positions[source])
        for cache in (self._encoder, self._decoder):
            cache.copy_row(source, target, positions)
        if self._entropy_steps is not None:
            self._entropy_steps.copy_row(source, target)
        if self._hashes is not None:
            self._hashes.symbols[target] = self._hashes.symbols[source]
        counts = int(self._patch_counts[source]), int(self._open_lengths[source])
        self._patch_steps.copy_row(source, target, patches=counts[0], open_length=counts[1])
        for numbers in (self._positions, self._patch_counts, self._open_lengths):
            numbers[target] = numbers[source]

    def patches(self, row: int) -> int:
        """See `Session`."""
        return int(self._patch_counts[row])


def _plan_key(config: TransformerConfig) -> tuple[object, ...]:
    """What a step's plan depends on, besides the positions."""
    return config.window, config.rope_theta, config.head_dim, config.kv_heads


def _places(modules: torch.nn.ModuleDict) -> dict[int, int]:
    """The layers that have cross-attention, each with its place among them."""
    return {int(layer): index for index, layer in enumerate(modules)}
