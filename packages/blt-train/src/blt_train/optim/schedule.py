"""The learning rate of each step."""

from __future__ import annotations

import math

from blt_train.config import ScheduleConfig, ScheduleKind


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of a step.

    Args:
        step: optimizer step, counted from 1 to `schedule.total_steps`.
        peak: the rate after the warm-up.
        schedule: warm-up, length, course and final fraction.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    first = decay_start(schedule)
    if step <= first:
        return peak
    progress = (step - first) / (schedule.total_steps - first)
    # How much of the way down from the peak is left.
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind is ScheduleKind.COSINE else 1 - progress
    floor = schedule.min_lr_fraction
    return peak * (floor + (1 - floor) * left)


def decay_start(schedule: ScheduleConfig) -> int:
    """Return the last step that has the peak rate; the decay begins after it.

    Args:
        schedule: warm-up, length and course.
    """
    if schedule.kind is ScheduleKind.CONSTANT:
        return schedule.total_steps
    if schedule.kind is ScheduleKind.COSINE:
        return schedule.warmup_steps
    return max(schedule.warmup_steps, schedule.total_steps - round(schedule.decay_fraction * schedule.total_steps))
