"""The baselines of the quickstart: the same training cost spent without learned patch boundaries.

- static: the same BLT on patches of a fixed length, the calibrated mean rounded; a step costs nearly the same, the rest
  is made up in steps.
- byte: a byte-level transformer without patches, trained for as many steps as the BLT's operations pay for.

Operations are the forward pass's, exactly counted (`blt_model.flops`), times the bytes of a step; as in the paper, what
the entropy LM costs is left out, and the summary says so.
"""

from __future__ import annotations

from pathlib import Path

from blt_data import read_manifest
from blt_model import BLTConfig, ByteLMConfig, blt_flops, byte_lm_flops, preset
from blt_train.config_parsing import load_config
from blt_train.metrics import read_metrics
from blt_train.quickstart.stages import Stage, warmup_steps

STATIC, BYTE = "static", "byte"


def baseline_stages(root: Path, *, blt_steps: int) -> list[Stage]:
    """Return the commands that train both baselines.

    Args:
        root: the quickstart's directory, its own BLT trained.
        blt_steps: training steps of that BLT.

    Raises:
        InputError: the patched shards are damaged.
    """
    patched = read_manifest(root / "patches" / "train")
    documents, framed = patched.documents, patched.bytes + 2 * patched.documents
    mean_patch = framed / max(patched.patches or 1, 1)
    fixed_patch = max(round(mean_patch), 1)
    mean_document = min(framed / max(documents, 1), load_config("quickstart-blt").data.sequence_tokens)
    blt = preset("blt-tiny")
    byte_lm = preset("entropy-tiny")
    if not isinstance(blt, BLTConfig) or not isinstance(byte_lm, ByteLMConfig):
        raise TypeError("the presets of the quickstart have changed their architecture")
    spent = blt_steps * blt_flops(blt, patch_length=mean_patch, document_bytes=mean_document)["total"]
    static_steps = round(spent / blt_flops(blt, patch_length=fixed_patch, document_bytes=mean_document)["total"])
    byte_steps = round(spent / byte_lm_flops(byte_lm, document_bytes=mean_document)["total"])
    return [
        *(_static_patches(root, part, fixed_patch) for part in ("train", "holdout")),
        Stage(
            title=f"Train the static-patch baseline, {fixed_patch} tokens a patch, equal operations",
            arguments=(
                "blt-train", "launch", "quickstart-blt", f"run={root / STATIC}",
                f"data.train={root / 'patches-static' / 'train'}",
                f"data.holdout={root / 'patches-static' / 'holdout'}",
                "entropy_model=null",
                f"schedule.total_steps={static_steps}", f"schedule.warmup_steps={warmup_steps(static_steps)}",
            ),
        ),
        Stage(
            title="Train the byte-level baseline, equal operations",
            arguments=(
                "blt-train", "launch", "quickstart-entropy", f"run={root / BYTE}",
                f"data.train={root / 'bytes' / 'train'}", f"data.holdout={root / 'bytes' / 'holdout'}",
                f"schedule.total_steps={byte_steps}", f"schedule.warmup_steps={warmup_steps(byte_steps)}",
            ),
        ),
    ]  # fmt: skip


def _static_patches(root: Path, part: str, patch_length: int) -> Stage:
    return Stage(
        title=f"Cut the {part} text into patches of fixed length",
        arguments=(
            "blt-patch", "precompute", str(root / "bytes" / part), "--output", str(root / "patches-static" / part),
            "--scheme", "static", "--patch-length", str(patch_length),
        ),
    )  # fmt: skip


def baseline_figures(root: Path) -> dict[str, str]:
    """Return the baselines' held-out BPB, name to formatted value.

    Args:
        root: the quickstart's directory, both baselines trained.
    """
    names = {STATIC: "static-patch baseline, held-out BPB", BYTE: "byte-level baseline, held-out BPB"}
    figures = {"baselines": "equal training operations, the entropy LM not counted"}
    for run, name in names.items():
        steps, evaluations = read_metrics(root / run)
        figures[name] = f"{evaluations[-1].holdout_bpb:.3f} ({len(steps)} steps)"
    return figures
