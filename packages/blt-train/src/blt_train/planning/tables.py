"""A plan as tables and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from blt_data.console import format_bytes
from blt_train.model_flops import TRAINING_FACTOR
from blt_train.planning.planner import RunPlan

_BILLION = 1e9


def parameter_rows(plan: RunPlan) -> dict[str, object]:
    """Return parameters by part.

    Args:
        plan: of the run.
    """
    return {part.replace("_", " "): count for part, count in plan.parameters.items()}


def arithmetic_rows(plan: RunPlan) -> list[tuple[object, ...]]:
    """Return operations per byte: part, forward, training, share of all.

    Args:
        plan: of the run.
    """
    whole = plan.forward_flops_per_byte["total"]
    return [
        (part.replace("_", " "), _flops(count), _flops(TRAINING_FACTOR * count), f"{100 * count / whole:.1f}%")
        for part, count in plan.forward_flops_per_byte.items()
    ]


def memory_rows(plan: RunPlan) -> dict[str, object]:
    """Return memory by part, and with each mode of activation checkpointing.

    Args:
        plan: of the run.
    """
    rows: dict[str, object] = {part: format_bytes(count) for part, count in plan.memory.items()}
    rows["all"] = f"{format_bytes(plan.memory_bytes)} of {format_bytes(plan.memory_limit)}"
    for mode, count in plan.memory_by_checkpointing.items():
        rows[f"all, with activation_checkpointing={mode}"] = format_bytes(count)
    return rows


def summary_rows(plan: RunPlan) -> dict[str, object]:
    """Return the figures of the whole run.

    Args:
        plan: of the run.
    """
    assumed = plan.assumptions
    rows: dict[str, object] = {
        "GPUs": f"{plan.gpus} x {plan.gpu.upper()} at {100 * assumed.mfu:.3g}% MFU (assumed)",
        "micro batch": f"{plan.tokens_per_micro_batch:,} tokens, {plan.micro_batches} per step and GPU",
        "bytes per step": format_bytes(plan.bytes_per_step),
        "steps": plan.steps,
        "bytes": format_bytes(plan.bytes),
        "operations": f"{plan.flops:.3g}",
        "speed": f"{format_bytes(plan.bytes_per_second)}/s",
        "time": time_text(plan.days),
        "GPU hours": f"{plan.gpu_hours:,.0f}",
    }
    if plan.scoring_gpu_hours is not None:
        rows[f"before it, scoring with {assumed.entropy_preset}"] = (
            f"{plan.scoring_flops:.3g} operations, {plan.scoring_gpu_hours:,.0f} GPU hours"
        )
        rows["assumed patch length"] = f"{assumed.patch_length:g} tokens"
    rows["assumed document length"] = f"{assumed.document_bytes:,} bytes"
    return rows


def plan_to_json(plan: RunPlan, changes: list[str] | None) -> dict[str, Any]:
    """Return a plan as plain JSON values.

    Args:
        plan: of the run.
        changes: what makes it fit, where it does not; None where nothing does, or it fits.
    """
    fields = dataclasses.asdict(plan)
    fields["assumptions"] = {key: _plain(value) for key, value in fields["assumptions"].items()}
    return {**fields, "fits": plan.fits, "changes_that_fit": changes}


def time_text(days: float) -> str:
    """Return a time in the unit that suits it.

    Args:
        days: how long.
    """
    if days >= 2:
        return f"{days:,.1f} days"
    hours = 24 * days
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else str(value)


def _flops(count: float) -> str:
    return f"{count / _BILLION:.3f} GFLOP"
