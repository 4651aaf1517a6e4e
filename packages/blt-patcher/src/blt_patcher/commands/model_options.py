"""Options that say how the entropy model is run, gathered into one value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from blt_data.errors import InputError
from blt_patcher.commands.options import combine_options
from blt_patcher.scorers import ScorerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """What the command line says of the entropy model's run; None where an option is not given."""

    window_tokens: int | None = None
    device: str | None = None
    precision: str | None = None
    compile_model: bool | None = None
    reset_at_newlines: bool = False

    def spec(self, model: Path | None) -> ScorerSpec | None:
        """Return how to make the scorer, or None without a model.

        Args:
            model: the model's directory.

        Raises:
            InputError: there is no model to which an option could apply.
        """
        if model is None:
            if self != ModelOptions():
                raise InputError(
                    "--window-tokens, --device, --precision, --compile and --reset-at-newlines are for an entropy "
                    "model; leave them out"
                )
            return None
        # `latest` is a link that moves on while the model is still trained; all workers must load the same one.
        latest = model / "latest"
        return ScorerSpec(
            model=(latest if latest.is_dir() else model).resolve(),
            device=self.device,
            window_tokens=self.window_tokens,
            precision=self.precision,
            compile=self.compile_model,
            reset_at_newlines=self.reset_at_newlines,
        )


_options = combine_options(
    click.option("--window-tokens", type=int, metavar="N", help="Tokens the entropy model sees at once."),
    click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N  [the GPU if there is one]."),
    click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Arithmetic of the entropy model  [float16 on a GPU, bfloat16 with --compile].",
    ),
    click.option(
        "--compile/--no-compile",
        "compile_model",
        default=None,
        help="Compile the entropy model: half a minute at the start, twice the speed in bfloat16; float16 needs none  "
        "[with --precision bfloat16 or float32 on a GPU].",
    ),
    click.option(
        "--reset-at-newlines",
        is_flag=True,
        help="Start the entropy model's context afresh at every new line, as the paper's largest model does.",
    ),
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options on how to run the entropy model; the command gets one argument, `running`: a `ModelOptions`."""
    names = [field.name for field in fields(ModelOptions)]

    @functools.wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        running = ModelOptions(**{name: values.pop(name) for name in names})
        return command(*args, running=running, **values)

    return _options(gathered)
