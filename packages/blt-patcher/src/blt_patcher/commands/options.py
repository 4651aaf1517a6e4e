"""Options that several subcommands of `blt-patch` share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from blt_data.console import ByteSize
from blt_data.errors import InputError
from blt_patcher.calibrate import DEFAULT_SAMPLE_BYTES
from blt_patcher.scheme_file import SchemeFile, read_scheme_file
from blt_patcher.scheme_options import SchemeOptions, resolve_scheme
from blt_patcher.schemes import SCHEMES, EntropyScheme, PatchScheme, scheme_names

Command = TypeVar("Command", bound=Callable[..., Any])


def combine_options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Return one decorator that adds several options, in the order given."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


scheme_options = combine_options(
    click.option("--threshold", type=float, metavar="T", help="θ in nats, of schemes entropy and entropy-combined."),
    click.option(
        "--relative-threshold",
        type=float,
        metavar="R",
        help="θ_r in nats, of schemes entropy-monotonic and entropy-combined.",
    ),
    click.option("--max-patch-length", type=int, metavar="M", help="Longest patch in tokens; longer ones are split."),
)
sample_option = click.option(
    "--sample-bytes",
    type=ByteSize(),
    default=DEFAULT_SAMPLE_BYTES,
    show_default=True,
    metavar="SIZE",
    help="Bytes to calibrate on: evenly spaced documents.",
)
entropy_scheme_option = click.option(
    "--scheme",
    type=click.Choice([name for name, cls in SCHEMES.items() if cls.needs_entropies]),
    default=EntropyScheme.name,
    show_default=True,
    help="The scheme whose threshold to find.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeChoice:
    """What a command line says of the scheme, in options or in a scheme file."""

    options: SchemeOptions
    file: SchemeFile | None

    @property
    def given(self) -> bool:
        """Whether anything is said at all."""
        return self.file is not None or self.options != SchemeOptions()

    def resolve(self) -> ResolvedScheme:
        """Return the scheme asked for.

        Raises:
            InputError: options are missing, contradict each other or are out of range.
        """
        if self.file is not None:
            return ResolvedScheme(scheme=self.file.scheme, free=None, target=None, calibration=self.file.calibration)
        request = resolve_scheme(self.options)
        return ResolvedScheme(
            scheme=request.scheme, free=request.free, target=self.options.target_patch_length, calibration=None
        )

    def check_model(self, identity: Mapping[str, Any] | None) -> None:
        """Refuse entropies of another model than a scheme file's threshold was found with; see `SchemeFile`."""
        if self.file is not None:
            self.file.check_model(identity)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedScheme:
    """A scheme, and what is known or still to be found of its threshold."""

    scheme: PatchScheme
    """Complete but for the free threshold, which stands at 0."""
    free: str | None
    """The threshold that calibration is to find for `target`, or None."""
    target: float | None
    """The mean patch length to calibrate for, in framed tokens."""
    calibration: Mapping[str, Any] | None
    """How the threshold was found, from a scheme file, for provenance."""


class SchemeName(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click alone
    """The name of a scheme, ours or an installed one; those installed are looked for only once a name is given."""

    name = "scheme"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what help shows: our own names."""
        return f"[{'|'.join(SCHEMES)}|NAME]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, if there is such a scheme."""
        names = scheme_names()
        if value not in names:
            self.fail(f"{value!r} is not one of {', '.join(map(repr, names))}.", param, ctx)
        return str(value)


_choice_options = combine_options(
    click.option(
        "--scheme",
        type=SchemeName(),
        help="How to patch; NAME is one that another package brings  [entropy, if it has a threshold].",
    ),
    click.option(
        "--scheme-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The scheme that blt-patch calibrate --output found.",
    ),
    click.option(
        "--target-patch-length", type=float, metavar="L", help="Find the threshold for L tokens per patch first."
    ),
    click.option("--patch-length", type=int, metavar="K", help="Tokens per patch of scheme static."),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="The tokenizer.json whose tokens are the patches of scheme bpe.",
    ),
    click.option(
        "--scheme-option",
        multiple=True,
        metavar="KEY=VALUE",
        callback=lambda _context, _option, values: values or None,
        help="A field of a scheme that another package brings; may be repeated.",
    ),
    scheme_options,
)


def scheme_choice_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add every option that says how to patch; the command gets them as one argument, `choice`: a `SchemeChoice`."""
    names = [field.name for field in fields(SchemeOptions)]

    @functools.wraps(command)
    def gathered(*args: Any, scheme_file: Path | None, **values: Any) -> Any:
        options = SchemeOptions(**{name: values.pop(name) for name in names if name in values})
        if scheme_file is not None and options != SchemeOptions():
            given = next(name for name in names if getattr(options, name) is not None)
            flag = "--" + given.replace("_", "-")
            raise InputError(f"--scheme-file says all there is to say of the scheme; leave {flag} out, or the file")
        file = read_scheme_file(scheme_file) if scheme_file is not None else None
        return command(*args, choice=SchemeChoice(options=options, file=file), **values)

    return _choice_options(gathered)
