"""`blt-patch show`: a text's or a document's patches, on the terminal and as a figure."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import numpy.typing as npt

from blt_data import ShardDirectory, ShardKind
from blt_data.console import ByteSize, friendly_errors, print_table
from blt_data.errors import InputError
from blt_patcher.boundaries import patch_document
from blt_patcher.calibrate import calibrate
from blt_patcher.commands.model_options import ModelOptions, model_options
from blt_patcher.commands.options import SchemeChoice, scheme_choice_options
from blt_patcher.commands.scoring import as_entropy_based
from blt_patcher.commands.terminal import ColorChoice, PatchPrinter, color_option
from blt_patcher.lookup import find_document
from blt_patcher.schemes import PatchScheme, scheme_from_json
from blt_patcher.viewing import PatchView, printable
from blt_patcher.viewing.view import DEFAULT_SHOWN_BYTES, MAX_FIGURE_BYTES

if TYPE_CHECKING:
    from blt_patcher.entropies import EntropyScorer

#: A file to show is read whole; a larger one is for precompute.
_LARGEST_FILE = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """What is to be shown, and what is known of it already."""

    title: str
    content: npt.NDArray[np.uint8]
    entropies: npt.NDArray[np.float16] | None = None
    patch_lengths: npt.NDArray[np.uint16] | None = None
    scheme: PatchScheme | None = None
    model: dict[str, object] | None = None


@click.command(
    "show",
    epilog='Examples: blt-patch show --text "Byte by byte." --scheme space. With a model: blt-patch show --file a.txt '
    "--entropy-model runs/entropy/latest --threshold 1.3 --html patches.html. A stored document: "
    "blt-patch show --directory data/patched --document doc-17 --png patches.png",
)
@click.option("--text", metavar="TEXT", help="Show this text.")
@click.option("--file", "file", type=click.Path(path_type=Path, allow_dash=True), metavar="F", help="Or this file (-).")
@click.option("--directory", type=click.Path(path_type=Path), metavar="DIR", help="Or a document of a shard directory.")
@click.option("--document", metavar="ID", help="The document's id  [the first one].")
@click.option("--from-byte", type=click.IntRange(min=0), default=0, metavar="N", help="First byte to show  [0].")
@click.option(
    "--limit",
    type=ByteSize(),
    default=DEFAULT_SHOWN_BYTES,
    show_default=True,
    metavar="SIZE",
    help="Bytes to show at most.",
)
@click.option("--entropy-model", type=click.Path(path_type=Path), metavar="M", help="Model or run to score it with.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with the figure.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Write the figure as SVG.")
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE", help="Write the figure as PNG.")
@color_option
@friendly_errors
@scheme_choice_options
@model_options
def show_command(
    text: str | None,
    file: Path | None,
    directory: Path | None,
    document: str | None,
    from_byte: int,
    limit: int,
    choice: SchemeChoice,
    entropy_model: Path | None,
    running: ModelOptions,
    html: Path | None,
    svg: Path | None,
    png: Path | None,
    color: ColorChoice,
) -> None:
    """Show the patches of a text, a file, or a document of a shard directory.

    Bytes that are no text are shown in hexadecimal, any script is rendered. A patched directory is shown as it is
    patched, or, with scheme options, as it would be. Figures show the entropy before each byte and the threshold.
    """
    subject = _subject(text, file, directory, document)
    spec = running.spec(entropy_model)
    # A text to look at is scored before a model is compiled.
    scorer = None if spec is None else dataclasses.replace(spec, compile=bool(running.compile_model)).load()
    _check_figures(min(limit, len(subject.content) - from_byte), html, svg, png)
    view = _view(subject, choice, scorer, from_byte, limit)
    _write_figures(view, html, svg, png)
    PatchPrinter(color).print(view)
    click.echo()
    files = {name: str(path) for name, path in (("html", html), ("svg", svg), ("png", png)) if path is not None}
    print_table("patches", {**view.figures(), **files})


def _check_figures(size: int, *files: Path | None) -> None:
    """Refuse figures that nothing could show: a byte takes some 330 bytes of a page.

    Raises:
        InputError: the figure would have too many bytes.
    """
    if size > MAX_FIGURE_BYTES and any(file is not None for file in files):
        raise InputError(
            f"a figure of {size:,} bytes could not be looked at; give --limit {MAX_FIGURE_BYTES // 1000}kB or less, "
            "and --from-byte for what comes later"
        )


def _subject(text: str | None, file: Path | None, directory: Path | None, document: str | None) -> _Subject:
    """Return what the options name.

    Raises:
        InputError: they name nothing, or more than one thing, or what is not there.
    """
    if sum(option is not None for option in (text, file, directory)) != 1:
        raise InputError("what is to be shown? give one of --text, --file and --directory")
    if document is not None and directory is None:
        raise InputError("--document is the id of a document in a --directory; give that too, or leave it out")
    if text is not None:
        # What the shell passed as undecodable bytes comes back as those bytes.
        return _Subject(title="text", content=_array(os.fsencode(text)))
    if file is not None:
        return _Subject(
            title="standard input" if str(file) == "-" else printable(str(file)), content=_array(_read(file))
        )
    assert directory is not None
    return _stored(directory, document)


def _stored(path: Path, document: str | None) -> _Subject:
    """Return a document of a shard directory and what is stored of it."""
    directory = ShardDirectory.open(path)
    index, row = find_document(directory, document)
    shard = directory.verified_shard(index)
    title = printable(shard.document_id(row))
    if directory.kind is ShardKind.BYTES:
        return _Subject(title=title, content=shard.content(row))
    told, model = (directory.manifest.provenance.get(key) for key in ("scheme", "entropy_model"))
    try:
        scheme = scheme_from_json(told) if isinstance(told, dict) else None
    except InputError:
        # A scheme of a later release or of another package: its patches can be shown all the same.
        scheme = None
    return _Subject(
        title=title,
        content=shard.content(row),
        entropies=shard.entropies(row) if shard.has_entropies else None,
        patch_lengths=shard.patch_lengths(row),
        scheme=scheme,
        model=dict(model) if isinstance(model, dict) else None,
    )


def _view(
    subject: _Subject, choice: SchemeChoice, scorer: EntropyScorer | None, first_byte: int, limit: int
) -> PatchView:
    """Patch the subject as asked, or take the patches it has.

    Raises:
        InputError: it has none and none are asked for, or the scheme needs entropies that nothing gives.
    """
    scheme, lengths, nats = subject.scheme, subject.patch_lengths, subject.entropies
    if not choice.given and lengths is None:
        raise InputError(
            "no patch scheme is chosen; give --scheme space, which needs no model, or --entropy-model and --threshold "
            "or --target-patch-length"
        )
    request = choice.resolve() if choice.given else None
    if request is not None:
        scheme, lengths = request.scheme, None
    if scorer is not None:
        nats = scorer.score(subject.content, _offsets(subject.content), name=subject.title)
        # Stored boundaries are another model's.
        lengths = None
    if lengths is None:
        if scheme is None:
            raise InputError("the stored scheme is unknown to this program; say how to patch with --scheme")
        if scheme.needs_entropies:
            if nats is None:
                raise InputError(
                    f"scheme {scheme.name} needs entropies; name an --entropy-model, or choose a scheme that needs "
                    "none, such as --scheme space"
                )
            choice.check_model(scorer.identity if scorer is not None else subject.model)
        if request is not None and request.free is not None and request.target is not None and nats is not None:
            offsets = _offsets(subject.content)
            found = calibrate(as_entropy_based(scheme), request.free, request.target, subject.content, offsets, nats)
            scheme = found.scheme
        lengths = patch_document(scheme, subject.content, nats if scheme.needs_entropies else None)
    return PatchView(
        title=subject.title,
        content=subject.content,
        patch_lengths=lengths,
        entropies=nats,
        scheme=scheme,
        first_byte=first_byte,
        shown_bytes=limit,
    )


def _write_figures(view: PatchView, html: Path | None, svg: Path | None, png: Path | None) -> None:
    """Write the figure to the files asked for."""
    if html is None and svg is None and png is None:
        return
    from blt_patcher.figures import Section, draw_patches, html_page, write_page, write_png, write_svg

    drawing = draw_patches(view)
    if svg is not None:
        write_svg(svg, drawing)
    if png is not None:
        write_png(png, drawing)
    if html is not None:
        lead = (
            "Each column is a byte, each band a patch with its length in tokens above it. Point at a byte to read more."
        )
        figures = {name: value for name, value in view.figures().items() if name != "document"}
        write_page(html, html_page(f"Patches of {view.title}", lead, figures, [Section(drawings=[drawing])]))


def _read(file: Path) -> bytes:
    """Return a file's bytes, or those of standard input."""
    if str(file) == "-":
        data = sys.stdin.buffer.read(_LARGEST_FILE + 1)
    elif file.is_dir():
        raise InputError(f"{file}: is a directory; name a file, or show a document of it with --directory")
    else:
        with file.open("rb") as opened:
            data = opened.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise InputError(f"{file}: has more than {_LARGEST_FILE >> 20} MiB; prepare and precompute it, then show parts")
    return data


def _array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)


def _offsets(content: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return np.array([0, content.size], dtype=np.int64)
