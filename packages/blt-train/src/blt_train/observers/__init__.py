"""Where metrics go besides the run's own files: TensorBoard and Weights & Biases.

An observer is told everything in a thread of its own, so a slow disk or network does not slow training; if it fails,
training goes on, and a warning says once that it is told no more. The run's `metrics.jsonl` has everything anyhow.
"""

from blt_train.observers.background import BackgroundObserver
from blt_train.observers.choice import check_observers, open_observers
from blt_train.observers.protocol import Observer, Record

__all__ = ["BackgroundObserver", "Observer", "Record", "check_observers", "open_observers"]
