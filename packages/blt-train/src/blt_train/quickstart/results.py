"""What the quickstart shows at its end, read from the files that its stages left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blt_data import InputError, Shard, ShardDirectory, ShardKind, read_manifest
from blt_data.console import format_bytes
from blt_train.metrics import EvaluationMetrics, StepMetrics, read_metrics
from blt_train.quickstart.stages import Stage, StageClock
from blt_train.report import Command, HeatmapPatch, ReportContent, curve_of_run, heatmap_patches

#: Held-out bytes drawn as a heat map.
HEATMAP_BYTES = 1200


def threshold_of(patches: Path) -> float:
    """Return the entropy threshold of a patched shard directory, in nats.

    Args:
        patches: the directory.

    Raises:
        InputError: the directory is damaged or was made with another scheme.
    """
    scheme = read_manifest(patches).provenance.get("scheme")
    threshold = scheme.get("threshold") if isinstance(scheme, dict) else None
    if not isinstance(threshold, float | int):
        raise InputError(f"{patches}: was not made with an entropy threshold; delete it and run quickstart again")
    return float(threshold)


def collect_figures(root: Path) -> dict[str, str]:
    """Return the figures of a finished quickstart, name to formatted value.

    Args:
        root: the quickstart's directory.

    Raises:
        InputError: a stage's files are damaged.
    """
    train, holdout = (read_manifest(root / "bytes" / part) for part in ("train", "holdout"))
    patched = read_manifest(root / "patches" / "train")
    _, entropy_evaluations = _metrics_of(root / "entropy")
    steps, evaluations = _metrics_of(root / "blt")
    framed = patched.bytes + 2 * patched.documents
    seconds = sum(step.seconds for step in steps)
    return {
        "corpus": f"{format_bytes(train.bytes)} in {train.documents:,} documents",
        "held out": f"{format_bytes(holdout.bytes)} in {holdout.documents:,} documents",
        "entropy LM, held-out BPB": f"{entropy_evaluations[-1].holdout_bpb:.3f}",
        "threshold": f"{threshold_of(root / 'patches' / 'train'):.4f} nats",
        "mean patch length": f"{framed / (patched.patches or 1):.2f} tokens",
        "BLT, held-out BPB before training": f"{evaluations[0].holdout_bpb:.3f}",
        "BLT, held-out BPB after training": f"{evaluations[-1].holdout_bpb:.3f}",
        "BLT, training speed": f"{sum(step.bytes for step in steps) / max(seconds, 1e-9):,.0f} bytes/s",
    }


def _metrics_of(run: Path) -> tuple[tuple[StepMetrics, ...], tuple[EvaluationMetrics, ...]]:
    steps, evaluations = read_metrics(run)
    if not steps or not evaluations:
        raise InputError(
            f"{run}: its metrics hold no evaluation; give a larger --limit-bytes, so that documents are held out"
        )
    return steps, evaluations


def page_content(
    root: Path, figures: dict[str, str], stages: Sequence[Stage], clock: StageClock, *, prompt: str
) -> ReportContent:
    """Return what the report page shows.

    Args:
        root: the quickstart's directory.
        figures: name to formatted value.
        stages: the commands in the order run.
        clock: knows how long they took.
        prompt: what the sample text begins with.

    Raises:
        InputError: a stage's files are damaged.
        OSError: a file cannot be read.
    """
    patches, caption = _heatmap(root / "patches" / "holdout")
    runs = {"entropy": "Entropy LM", "blt": "BLT", "static": "BLT, static patches", "byte": "Byte-level baseline"}
    text = (root / "sample.txt").read_bytes().decode("utf-8", errors="replace")
    return ReportContent(
        title="BLT quickstart",
        figures=figures,
        curves=[
            curve_of_run(root / name, title) for name, title in runs.items() if (root / name / "metrics.jsonl").exists()
        ],
        heatmap=patches,
        heatmap_caption=caption,
        prompt=prompt,
        continuation=text.removeprefix(prompt),
        commands=[Command(title=stage.title, line=stage.line, seconds=clock.seconds(stage)) for stage in stages],
    )


def _heatmap(directory: Path) -> tuple[list[HeatmapPatch], str]:
    """Return the heat map of the first held-out document that is long enough to be worth a look."""
    shards = ShardDirectory.open(directory, kind=ShardKind.PATCHED)
    chosen: tuple[Shard, int] | None = None
    for index, row in shards.documents():
        shard = shards.shard(index)
        size = shard.content(row).size
        if chosen is None or size > chosen[0].content(chosen[1]).size:
            chosen = (shard, row)
        if size >= HEATMAP_BYTES:
            break
    if chosen is None:
        return [], "No document was held out."
    shard, row = chosen
    patches = heatmap_patches(
        shard.content(row), shard.patch_lengths(row), shard.entropies(row), limit_bytes=HEATMAP_BYTES
    )
    return patches, f"The beginning of the held-out document {shard.document_id(row)}."
