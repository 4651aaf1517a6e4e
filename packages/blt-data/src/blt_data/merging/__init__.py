"""Joining shard directories into one."""

from blt_data.merging.plan import MergeConfig, MergePlan, plan_merge
from blt_data.merging.run import run_merge

__all__ = ["MergeConfig", "MergePlan", "plan_merge", "run_merge"]
