"""`blt-patch compare`: two patchings of the same documents side by side."""

from __future__ import annotations

import json
from pathlib import Path

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import friendly_errors, print_table, progress
from blt_data.errors import InputError
from blt_patcher.commands.terminal import ColorChoice, PatchPrinter, color_option
from blt_patcher.compare import DEFAULT_EXAMPLES, Comparison, Difference, compare, first_difference
from blt_patcher.schemes import PatchScheme, scheme_from_json
from blt_patcher.stats import draw_histograms_side_by_side, provenance_rows
from blt_patcher.viewing import PatchView, printable

#: Bytes shown of an example: before the first difference, and in all, on the terminal and on a page.
_LEAD_BYTES, _TERMINAL_BYTES, _PAGE_BYTES = 40, 160, 420


@click.command("compare", epilog="Example: blt-patch compare data/patched data/space --html compare.html")
@click.argument("first", metavar="DIR_A", type=click.Path(path_type=Path))
@click.argument("second", metavar="DIR_B", type=click.Path(path_type=Path))
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    default=DEFAULT_EXAMPLES,
    show_default=True,
    metavar="N",
    help="Documents to show, those that differ most.",
)
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with figures.")
@color_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@friendly_errors
def compare_command(
    first: Path, second: Path, examples: int, html: Path | None, color: ColorChoice, as_json: bool
) -> None:
    """Compare two patchings of the same documents: boundaries in common, lengths, and where they differ most.

    A boundary is a patch's start at a token from 2 on; tokens 0 and 1 start one under every scheme.
    """
    a, b = (ShardDirectory.open(path, kind=ShardKind.PATCHED) for path in (first, second))
    with progress("comparing", a.manifest.bytes + b.manifest.bytes, "B") as bar:
        found = compare(a, b, examples=examples, advance=bar.advance)
    if html is not None:
        _write_page(html, found, a, b)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
        return
    print_table("patchings", _directory_rows(found, a, b), header=("", "A", "B"))
    print_table("agreement", _agreement_rows(found))
    click.echo(draw_histograms_side_by_side(found.stats_a, found.stats_b))
    _print_examples(found, a, b, PatchPrinter(color))


def _directory_rows(found: Comparison, a: ShardDirectory, b: ShardDirectory) -> list[tuple[object, ...]]:
    told = [provenance_rows(directory.manifest) for directory in (a, b)]
    return [
        ("directory", str(a.path), str(b.path)),
        *((name, *(rows.get(name, "none") for rows in told)) for name in dict.fromkeys([*told[0], *told[1]])),
        ("patches", found.stats_a.patches, found.stats_b.patches),
        ("mean patch length", f"{found.stats_a.mean:.4f}", f"{found.stats_b.mean:.4f}"),
        ("boundaries", found.boundaries_a, found.boundaries_b),
    ]


def _agreement_rows(found: Comparison) -> dict[str, object]:
    identical = found.identical / found.documents if found.documents else 1.0
    return {
        "documents": found.documents,
        "with the same patches": f"{found.identical:,} ({100 * identical:.2f}%)",
        "boundaries in common": found.common,
        "of A's boundaries, B has (recall)": f"{100 * found.recall:.2f}%",
        "of B's boundaries, A has (precision)": f"{100 * found.precision:.2f}%",
        "of all boundaries, both have (Jaccard)": f"{100 * found.jaccard:.2f}%",
    }


def _views(example: Difference, a: ShardDirectory, b: ShardDirectory, limit: int) -> tuple[PatchView, PatchView]:
    """Return both patchings of a document, from a little before their first difference."""
    shards = a.shard(example.place_a[0]), b.shard(example.place_b[0])
    rows = example.place_a[1], example.place_b[1]
    token = first_difference(*(shard.patch_lengths(row) for shard, row in zip(shards, rows, strict=True))) or 1
    views = [
        PatchView(
            title=name,
            content=shard.content(row),
            patch_lengths=shard.patch_lengths(row),
            entropies=shard.entropies(row) if shard.has_entropies else None,
            scheme=_scheme(directory),
            first_byte=max(token - 1 - _LEAD_BYTES, 0),
            shown_bytes=limit,
        )
        for name, directory, shard, row in zip("AB", (a, b), shards, rows, strict=True)
    ]
    return views[0], views[1]


def _scheme(directory: ShardDirectory) -> PatchScheme | None:
    told = directory.manifest.provenance.get("scheme")
    try:
        return scheme_from_json(told) if isinstance(told, dict) else None
    except InputError:
        # Unknown here; the boundaries can be compared all the same.
        return None


def _heading(example: Difference) -> str:
    return (
        f"{printable(example.document_id)}: {example.common:,} boundaries in common, {example.only_a:,} only in A, "
        f"{example.only_b:,} only in B"
    )


def _print_examples(found: Comparison, a: ShardDirectory, b: ShardDirectory, printer: PatchPrinter) -> None:
    for example in found.examples:
        printer.print_lines(["", _heading(example)])
        for name, view in zip("AB", _views(example, a, b, _TERMINAL_BYTES), strict=True):
            printer.print(view, f"{name}  ")


def _write_page(path: Path, found: Comparison, a: ShardDirectory, b: ShardDirectory) -> None:
    from blt_patcher.figures import Section, draw_compared, draw_histograms, html_page, write_page

    table = [
        tuple(str(f"{cell:,}" if isinstance(cell, int) else cell) for cell in row)
        for row in _directory_rows(found, a, b)
    ]
    sections = [
        Section(header=("", "A", "B"), rows=table),
        Section(drawings=[draw_histograms([found.stats_a, found.stats_b], [f"A: {a.path}", f"B: {b.path}"])]),
    ]
    sections += [
        Section(
            heading=printable(example.document_id),
            note=_heading(example).removeprefix(f"{printable(example.document_id)}: ")
            + "; shown from a little before the first "
            "difference.",
            drawings=[draw_compared(*_views(example, a, b, _PAGE_BYTES))],
        )
        for example in found.examples
    ]
    lead = "Two patchings of the same documents. A boundary is a patch's start at a token from 2 on."
    write_page(path, html_page("Patchings compared", lead, _agreement_rows(found), sections))
