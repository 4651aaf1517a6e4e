"""Which observers a config asks for, and whether their packages are there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blt_train.config import LoggingConfig, WandbMode
from blt_train.errors import ConfigError
from blt_train.observers.background import BackgroundObserver
from blt_train.observers.tensorboard import TensorBoardObserver
from blt_train.observers.weights_and_biases import WandbObserver


def check_observers(config: LoggingConfig) -> None:
    """Check that the packages of all observers that a config asks for are installed.

    Args:
        config: what is asked for.

    Raises:
        ConfigError: one is not; the message has the command that installs it.
    """
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb is not WandbMode.OFF}
    for package, is_wanted in wanted.items():
        if is_wanted and not _is_installed(package):
            given = getattr(config, package)
            off = "off" if package == "wandb" else "false"
            raise ConfigError(
                f"logging.{package} is {str(given).lower()}, but the package {package} is not installed: run pip "
                f"install 'blt-train[{package}]', or set logging.{package}={off}"
            )


def _is_installed(package: str) -> bool:
    """Return whether a package can be imported; a folder of its name in the working directory is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def open_observers(
    logging: LoggingConfig, run: Path, config: Mapping[str, Any], *, first_step: int
) -> list[BackgroundObserver]:
    """Start the observers that a config asks for.

    Args:
        logging: what is asked for, checked by `check_observers`.
        run: the run directory.
        config: of the run, as nested plain values, for the dashboards.
        first_step: the step that training goes on with, from 1.
    """
    observers = []
    if logging.tensorboard:
        make_board = partial(TensorBoardObserver, run, config, first_step=first_step)
        observers.append(BackgroundObserver("TensorBoard", make_board))
    if logging.wandb is not WandbMode.OFF:
        make_wandb = partial(WandbObserver, run, config, logging, first_step=first_step)
        observers.append(BackgroundObserver("Weights & Biases", make_wandb))
    return observers
