"""Bits per byte on held-out documents, every byte of them.

Documents are packed in the shards' order, and only those longer than a sequence are cut (at patch boundaries), so a
document's loss does not depend on its neighbours, on the number of ranks or on the batch size.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it

from blt_data.console import ProgressBar
from blt_model import ByteLM
from blt_model.loss import CHUNK_TOKENS
from blt_model.packed import IGNORED_TARGET
from blt_model.weights.native import load_model
from blt_train.averages import take_averages
from blt_train.batches import BatchBuilder
from blt_train.checkpoint import TRAINER_NAME, Model, checkpoint_directory, read_trainer_state
from blt_train.config import DEFAULT_SEQUENCE_TOKENS, Precision
from blt_train.documents import DocumentTable, Int64Array, read_documents
from blt_train.errors import CheckpointError, ConfigError
from blt_train.inputs import open_shards, scoring_fingerprint
from blt_train.metrics import bits_per_byte
from blt_train.parallel.compilation import uncompiled
from blt_train.parallel.sharding import free_gathered
from blt_train.plan import PADDING_PATCHES, Capacity, Plan, pack
from blt_train.runtime import Runtime, autocast, choose_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Figures of some documents."""

    nll: float
    """Summed negative log-likelihood of all targets, in nats."""

    targets: int
    """Predictions: every byte and one EOS per document."""

    bytes: int
    """Raw bytes."""

    documents: int
    """Documents."""

    @property
    def bpb(self) -> float:
        """Bits per byte: nll / (ln 2 x bytes)."""
        return bits_per_byte(self.nll, self.bytes)

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nll / self.targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Tally):
    """Figures of one evaluation, all documents together and by source."""

    by_source: Mapping[str, Tally]
    """Of each source that has a document, where there are several; empty where there is one."""

    @property
    def bpb_by_source(self) -> dict[str, float] | None:
        """Bits per byte of each source that has a byte; None where there is only one source."""
        return {name: tally.bpb for name, tally in self.by_source.items() if tally.bytes} or None


def evaluate(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    sequence_tokens: int | None = None,
    sequences_per_batch: int = 8,
    precision: Precision = Precision.FLOAT32,
    device: str = "auto",
    averaged: bool = False,
    progress: ProgressBar | None = None,
) -> Evaluation:
    """Evaluate a model on a shard directory.

    Args:
        checkpoint: a run directory, a checkpoint in it, or a model directory.
        data: shard directory: byte shards for the byte LM, patched shards for the BLT.
        max_bytes: take the first documents up to this many bytes, at least one; None for all.
        sequence_tokens: length at which longer documents are cut; None for that of the training, or 2048 for a model
            directory without training state.
        sequences_per_batch: sequences per forward pass.
        precision: of the forward pass.
        device: `auto`, `cpu` or `cuda`.
        averaged: take the moving average of the weights, which a run keeps where `optimizer.ema_decay` is set.
        progress: told of raw bytes done.

    Returns:
        The figures.

    Raises:
        CheckpointError: there is no such checkpoint, or its weights are not finite.
        ConfigError: the data was patched by another rule than the model's training data, or holds no byte.
        InputError: the data is missing, damaged or of the wrong kind.
    """
    directory = checkpoint_directory(checkpoint)
    model = load_model(directory, device=choose_device(device))
    if averaged:
        take_averages(model, directory)
    _refuse_nonfinite(model, directory)
    shards = open_shards(data, model.config, verify=True)
    if (directory / TRAINER_NAME).exists():
        state = read_trainer_state(directory)
        trained = {key: state.provenance.get(key) for key in ("scheme", "entropy_model")}
        given = {key: shards.manifest.provenance.get(key) for key in ("scheme", "entropy_model")}
        if trained["scheme"] != given["scheme"] or state.entropy_model != scoring_fingerprint(given):
            raise ConfigError(
                f"{data}: was not patched as the model's training data (scheme {trained['scheme']}, here "
                f"{given['scheme']}): run blt-patch precompute on it with the training data's options"
            )
        sequence_tokens = sequence_tokens or int(state.config["data"]["sequence_tokens"])
    return evaluate_model(
        model,
        read_documents(shards),
        sequence_tokens=sequence_tokens or DEFAULT_SEQUENCE_TOKENS,
        sequences_per_batch=sequences_per_batch,
        max_bytes=max_bytes,
        precision=precision,
        runtime=Runtime(device=choose_device(device)),
        progress=progress,
    )


def _refuse_nonfinite(model: Model, directory: Path) -> None:
    """Refuse weights of which nothing but NaN can come.

    Raises:
        CheckpointError: some number is not finite; its tensor is named.
    """
    for name, weights in model.named_parameters():
        if not bool(torch.isfinite(weights).all()):
            raise CheckpointError(
                f"{directory}: holds weights that are not finite, the first in {name}, so there are no bits per byte; "
                "name an earlier checkpoint"
            )


def evaluate_holdouts(
    model: Model,
    holdouts: Mapping[str, DocumentTable],
    *,
    sequence_tokens: int,
    runtime: Runtime,
    sequences_per_batch: int = 8,
    max_bytes: int | None = None,
    precision: Precision = Precision.FLOAT32,
    before_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Evaluate a model on several sets of documents, each a source, or on one, by the sources that its documents name.

    Args:
        model: on the runtime's device; all ranks call it and all get the sums.
        holdouts: documents by source, at least one.
        sequence_tokens: length at which longer documents are cut.
        runtime: this process's place.
        sequences_per_batch: sequences per forward pass.
        max_bytes: take the first documents of each source up to this many bytes, at least one; None for all.
        precision: of the forward pass.
        before_batch: called before each forward pass, equally often on all ranks; may raise to end the evaluation.

    Raises:
        ConfigError: a source's documents hold no byte.
    """
    results = {
        name: evaluate_model(
            model,
            documents,
            sequence_tokens=sequence_tokens,
            runtime=runtime,
            sequences_per_batch=sequences_per_batch,
            max_bytes=max_bytes,
            precision=precision,
            before_batch=before_batch,
        )
        for name, documents in holdouts.items()
    }
    if len(results) == 1:
        return next(iter(results.values()))
    return Evaluation(
        nll=sum(result.nll for result in results.values()),
        targets=sum(result.targets for result in results.values()),
        bytes=sum(result.bytes for result in results.values()),
        documents=sum(result.documents for result in results.values()),
        by_source=results,
    )


# Not inference mode: the tensors that sharded modules gather would be of no use to training afterwards.
@torch.no_grad()
def evaluate_model(
    model: Model,
    documents: DocumentTable,
    *,
    sequence_tokens: int,
    runtime: Runtime,
    sequences_per_batch: int = 8,
    max_bytes: int | None = None,
    precision: Precision = Precision.FLOAT32,
    progress: ProgressBar | None = None,
    before_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Evaluate a model in memory; with several ranks, all call it and all get the sums.

    All ranks run equally many forward passes, some perhaps over padding alone, as each pass of a sharded model is one
    of all ranks together.

    Args:
        model: on the runtime's device, perhaps sharded.
        documents: what to evaluate on.
        sequence_tokens: length at which longer documents are cut.
        runtime: this process's place.
        sequences_per_batch: sequences per forward pass.
        max_bytes: take the first documents up to this many bytes, at least one; None for all.
        precision: of the forward pass.
        progress: told of this rank's raw bytes done.
        before_batch: called before each forward pass, equally often on all ranks; may raise to end the evaluation.

    Raises:
        ConfigError: the documents hold no byte, so there are no bits per byte.
    """
    chosen = _first_documents(documents, max_bytes)
    num_bytes = int(documents.tokens[chosen].sum()) - chosen.size
    if num_bytes == 0:
        raise ConfigError(f"{documents.path}: holds no byte to evaluate on; name other held-out data")
    # Any document that fits into the tokens fits into the patches too: none is cut for its patches' sake.
    patches = 0 if isinstance(model, ByteLM) else sequence_tokens + PADDING_PATCHES
    capacity = Capacity(tokens=sequence_tokens, patches=patches, documents=sequence_tokens + 1)
    plan = pack(documents, chosen, capacity, keep_whole=True)
    builder = BatchBuilder(capacity, sequences_per_batch)
    sums = np.zeros(len(documents.source_names))
    waiting: tuple[torch.Tensor, Int64Array] | None = None
    # What is compiled for training's shapes would be compiled anew for these.
    with _evaluating(model), uncompiled(model):
        for part in _parts_of_rank(plan.num_sequences, sequences_per_batch, runtime):
            if before_batch is not None:
                before_batch()
            batch = builder.build([(plan, index) for index in part]).to(runtime.device)
            with autocast(runtime.device, precision):
                logits = model(batch.packed)
            nll = _token_nll(logits, batch.targets)
            # The numbers of the batch before are fetched while the GPU works on this one.
            _add_by_source(sums, waiting)
            waiting = nll, _sources_of_tokens(documents, plan, part, sequence_tokens)
            if progress is not None:
                progress.advance(int(plan.sequence_bytes[part.start : part.stop].sum()))
    _add_by_source(sums, waiting)
    return _evaluation(documents, chosen, runtime.sum(sums.tolist()))


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Set a model to evaluate in the block, and leave it as it was, also where the block raises."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        free_gathered(model)
        model.train(was_training)


def _parts_of_rank(num_sequences: int, per_batch: int, runtime: Runtime) -> list[range]:
    """Return the sequences of each of this rank's batches; equally many batches on all ranks, the last ones empty."""
    stride = runtime.world_size * per_batch
    starts = range(runtime.rank * per_batch, runtime.rank * per_batch + num_sequences, stride)
    count = -(-num_sequences // stride)
    return [range(min(starts[i], num_sequences), min(starts[i] + per_batch, num_sequences)) for i in range(count)]


def _token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return float32 [T]: the negative log-likelihood of each position's target, 0 for padding, worked out in chunks.

    Args:
        logits: [T, V] of any floating dtype.
        targets: int64 [T].
    """
    rows = [slice(start, start + CHUNK_TOKENS) for start in range(0, len(logits), CHUNK_TOKENS)]
    return torch.cat(
        [
            F.cross_entropy(logits[part].float(), targets[part], ignore_index=IGNORED_TARGET, reduction="none")
            for part in rows
        ]
    )


def _sources_of_tokens(documents: DocumentTable, plan: Plan, part: range, sequence_tokens: int) -> Int64Array:
    """Return int64 [n]: the source of each position of a batch's sequences; a sequence's padding is any source's."""
    sources = np.zeros((len(part), sequence_tokens), dtype=np.int64)
    for row, sequence in enumerate(part):
        first = plan.first_piece[sequence]
        pieces = slice(first, first + plan.num_pieces[sequence])
        lengths = plan.piece_end[pieces] - plan.piece_start[pieces]
        sources[row, : lengths.sum()] = np.repeat(documents.source[plan.piece_document[pieces]], lengths)
    return sources.reshape(-1)


def _add_by_source(sums: npt.NDArray[np.float64], batch: tuple[torch.Tensor, Int64Array] | None) -> None:
    """Add a batch's losses to the sums of their sources, in the order of positions, so always to the same rounding."""
    if batch is not None:
        nll, sources = batch
        weights = nll[: sources.size].double().cpu().numpy()
        sums += np.bincount(sources, weights=weights, minlength=sums.size)


def _evaluation(documents: DocumentTable, chosen: Int64Array, sums: Sequence[float]) -> Evaluation:
    """Return the figures of the chosen documents, whose summed losses by source are given."""
    source, tokens = documents.source[chosen], documents.tokens[chosen]
    by_source = {}
    for index, name in enumerate(documents.source_names):
        mine = tokens[source == index]
        if mine.size:
            count, targets = int(mine.size), int(mine.sum())
            by_source[name] = Tally(nll=sums[index], targets=targets, bytes=targets - count, documents=count)
    targets = int(tokens.sum())
    return Evaluation(
        nll=math.fsum(sums),
        targets=targets,
        bytes=targets - chosen.size,
        documents=chosen.size,
        by_source=by_source if len(by_source) > 1 else {},
    )


def _first_documents(documents: DocumentTable, max_bytes: int | None) -> Int64Array:
    """Return int64 [n]: the first documents up to so many bytes, at least up to the first that has any."""
    order = np.arange(documents.num_documents, dtype=np.int64)
    if max_bytes is None:
        return order
    ends = np.cumsum(documents.tokens - 1)
    first_with_bytes = int(np.searchsorted(ends, 1))
    return order[: max(int(np.searchsorted(ends, max_bytes, side="right")), first_with_bytes + 1)]
