"""Bits per byte on held-out documents, every byte of them.

Documents are packed in the shards' order, and only those longer than a sequence are cut (at patch boundaries), so a
document's loss does not depend on its neighbours, on the number of ranks or on the batch size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

from blt_data.console import ProgressBar
from blt_model import ByteLM
from blt_model.loss import cross_entropy_sum
from blt_model.weights.native import load_model
from blt_train.checkpoint import TRAINER_NAME, Model, checkpoint_directory, read_trainer_state
from blt_train.config import DEFAULT_SEQUENCE_TOKENS, Precision
from blt_train.documents import DocumentTable, read_documents
from blt_train.errors import ConfigError
from blt_train.inputs import open_shards, scoring_fingerprint
from blt_train.loader import BatchBuilder
from blt_train.metrics import bits_per_byte
from blt_train.plan import PADDING_PATCHES, Capacity, pack
from blt_train.runtime import Runtime, autocast, choose_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Figures of one evaluation."""

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


def evaluate(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    sequence_tokens: int | None = None,
    sequences_per_batch: int = 8,
    precision: Precision = Precision.FLOAT32,
    device: str = "auto",
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
        progress: told of raw bytes done.

    Returns:
        The figures.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: the data was patched by another rule than the model's training data, or holds no byte.
        InputError: the data is missing, damaged or of the wrong kind.
    """
    directory = checkpoint_directory(checkpoint)
    model = load_model(directory, device=choose_device(device))
    shards = open_shards(data, model.config, verify=True)
    if (directory / TRAINER_NAME).exists():
        state = read_trainer_state(directory)
        trained = {key: state.data["provenance"].get(key) for key in ("scheme", "entropy_model")}
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


@torch.inference_mode()
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
) -> Evaluation:
    """Evaluate a model in memory; with several ranks, all call it and all get the sums.

    Args:
        model: on the runtime's device, without wrappers.
        documents: what to evaluate on.
        sequence_tokens: length at which longer documents are cut.
        runtime: this process's place.
        sequences_per_batch: sequences per forward pass.
        max_bytes: take the first documents up to this many bytes, at least one; None for all.
        precision: of the forward pass.
        progress: told of this rank's raw bytes done.

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
    builder = BatchBuilder(documents, capacity, sequences_per_batch)
    was_training = model.training
    model.eval()
    nll = torch.zeros((), dtype=torch.float64, device=runtime.device)
    stride = runtime.world_size * sequences_per_batch
    for first in range(runtime.rank * sequences_per_batch, plan.num_sequences, stride):
        part = range(first, min(first + sequences_per_batch, plan.num_sequences))
        batch = builder.build([(plan, index) for index in part]).to(runtime.device)
        with autocast(runtime.device, precision):
            # `forward` itself, not the call: a model compiled for training's shapes would be compiled anew.
            logits = model.forward(batch.packed)
        nll += cross_entropy_sum(logits, batch.targets).double()
        if progress is not None:
            progress.advance(int(plan.sequence_bytes[part.start : part.stop].sum()))
    model.train(was_training)
    targets = int(plan.sequence_tokens.sum())
    return Evaluation(nll=runtime.sum([nll.item()])[0], targets=targets, bytes=num_bytes, documents=chosen.size)


def _first_documents(documents: DocumentTable, max_bytes: int | None) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return int64 [n]: the first documents up to so many bytes, at least up to the first that has any."""
    order = np.arange(documents.num_documents, dtype=np.int64)
    if max_bytes is None:
        return order
    ends = np.cumsum(documents.tokens - 1)
    first_with_bytes = int(np.searchsorted(ends, 1))
    return order[: max(int(np.searchsorted(ends, max_bytes, side="right")), first_with_bytes + 1)]
