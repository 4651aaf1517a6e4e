"""From raw text to a trained BLT and a report in one command, on a laptop."""

from blt_train.quickstart.pipeline import QuickstartOptions, run_quickstart

__all__ = ["QuickstartOptions", "run_quickstart"]
