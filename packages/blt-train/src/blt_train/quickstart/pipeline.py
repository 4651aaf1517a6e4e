"""The quickstart: prepare, train the entropy LM, patch, train the BLT, evaluate, generate, report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click

from blt_data.console import print_table
from blt_train.errors import ConfigError
from blt_train.quickstart.baselines import baseline_figures, baseline_stages
from blt_train.quickstart.results import collect_figures, page_content, threshold_of
from blt_train.quickstart.stages import Stage, StageClock, run_stages, warmup_steps
from blt_train.report import write_report

#: Bytes on which the threshold is found: enough for the mean patch length to hold within a few percent.
CALIBRATION_BYTES = 400_000


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartOptions:
    """What a user may choose; the defaults need no files and no network."""

    output: Path
    """Directory of everything that is made."""
    source: str
    """What `blt-data prepare --source` takes."""
    limit_bytes: int
    """Corpus size at most, in bytes."""
    holdout_fraction: float
    """Share of the documents that is held out."""
    target_patch_length: float
    """Mean patch length to calibrate for, in framed tokens."""
    entropy_steps: int
    """Training steps of the entropy LM."""
    blt_steps: int
    """Training steps of the BLT and of each baseline's equal."""
    prompt: str
    """What the sample text begins with."""
    baselines: bool
    """Whether the byte-level and static-patch baselines are trained too."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("limit_bytes", "entropy_steps", "blt_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def run_quickstart(options: QuickstartOptions) -> Path:
    """Run the whole pipeline; what an earlier run has finished is kept.

    Args:
        options: what to do and where.

    Returns:
        The report's path.

    Raises:
        SystemExit: a stage failed; it has said why.
        OSError: the output cannot be written.
    """
    started = time.monotonic()
    root = options.output
    root.mkdir(parents=True, exist_ok=True)
    clock = StageClock(root / "stage_seconds.json")
    total = 10 if options.baselines else 6

    stages = _stages_before_threshold(options)
    run_stages(stages, clock, first=1, total=total)
    after = _stages_after_threshold(options, threshold_of(root / "patches" / "train"))
    run_stages(after, clock, first=len(stages) + 1, total=total)
    stages += after

    figures = collect_figures(root)
    if options.baselines:
        extra = baseline_stages(root, blt_steps=options.blt_steps)
        run_stages(extra, clock, first=len(stages) + 1, total=total)
        stages += extra
        figures |= baseline_figures(root)
    report = root / "report.html"
    write_report(report, page_content(root, figures, stages, clock, prompt=options.prompt))
    print_table("Quickstart", figures)
    click.echo(f"Report: {report}  ({time.monotonic() - started:.0f} s in all)")
    return report


def _stages_before_threshold(options: QuickstartOptions) -> list[Stage]:
    root = options.output
    prepare = Stage(
        title="Prepare the corpus: documents to byte shards",
        arguments=(
            "blt-data", "prepare", "--source", options.source, "--output", str(root / "bytes"),
            "--holdout-fraction", f"{options.holdout_fraction:g}", "--limit-bytes", str(options.limit_bytes),
        ),
    )  # fmt: skip
    entropy = Stage(
        title="Train the entropy LM: how surprising is each next byte?",
        arguments=(
            "blt-train", "launch", "quickstart-entropy", f"run={root / 'entropy'}",
            f"data.train={root / 'bytes' / 'train'}", f"data.holdout={root / 'bytes' / 'holdout'}",
            f"schedule.total_steps={options.entropy_steps}",
            f"schedule.warmup_steps={warmup_steps(options.entropy_steps)}",
        ),
    )  # fmt: skip
    patch = Stage(
        title="Calibrate the threshold and cut the training text into patches",
        arguments=(
            "blt-patch", "precompute", str(root / "bytes" / "train"), "--output", str(root / "patches" / "train"),
            "--entropy-model", str(root / "entropy" / "latest"),
            "--target-patch-length", f"{options.target_patch_length:g}",
            "--sample-bytes", str(CALIBRATION_BYTES), "--entropies", "float16",
        ),
    )  # fmt: skip
    return [prepare, entropy, patch]


def _stages_after_threshold(options: QuickstartOptions, threshold: float) -> list[Stage]:
    root = options.output
    patch = Stage(
        title="Cut the held-out text into patches at the same threshold",
        arguments=(
            "blt-patch", "precompute", str(root / "bytes" / "holdout"), "--output", str(root / "patches" / "holdout"),
            "--entropy-model", str(root / "entropy" / "latest"), "--threshold", repr(threshold),
            "--entropies", "float16",
        ),
    )  # fmt: skip
    train = Stage(
        title="Train the BLT",
        arguments=(
            "blt-train", "launch", "quickstart-blt", f"run={root / 'blt'}",
            f"data.train={root / 'patches' / 'train'}", f"data.holdout={root / 'patches' / 'holdout'}",
            f"entropy_model={root / 'entropy' / 'latest'}",
            f"schedule.total_steps={options.blt_steps}", f"schedule.warmup_steps={warmup_steps(options.blt_steps)}",
        ),
    )  # fmt: skip
    generate = Stage(
        title="Generate text",
        arguments=(
            "blt-train", "generate", "--checkpoint", str(root / "blt"), "--prompt", options.prompt,
            "--max-new-bytes", "200", "--temperature", "0.7", "--seed", "0", "--output", str(root / "sample.txt"),
        ),
    )  # fmt: skip
    return [patch, train, generate]
