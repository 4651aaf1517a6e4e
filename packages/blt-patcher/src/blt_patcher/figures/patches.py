"""A document's patches drawn: a column for each byte, the entropy before it, the threshold, and bands for patches.

The entropy drawn above a byte is that of the prediction it was drawn from, H[j-1] for token j: the number that the
scheme compares with its threshold. So a dot above the dashed line stands over the first byte of a patch. Long
documents go on in more rows. A character of several bytes is written once across their columns, with the bytes below
it, since a boundary may cut it; scripts written from the right are laid out in the order of their bytes, from the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from blt_data.framing import FRAME_TOKENS
from blt_patcher.figures.canvas import Dot, Drawing, Ink, Label, Path, Rect, Spot
from blt_patcher.figures.scales import nice_ticks, nice_top
from blt_patcher.schemes import describe_scheme
from blt_patcher.viewing.glyphs import GlyphKind, code_point, split_glyphs
from blt_patcher.viewing.view import PatchView, ShownToken

#: Width of a drawing, in pixels.
DEFAULT_WIDTH: Final = 1120.0

_LEFT, _RIGHT = 46.0, 14.0
_HEAD, _LENGTHS, _PANEL, _TEXT, _BYTES, _GAP = 54.0, 14.0, 92.0, 25.0, 13.0, 18.0

#: Share of a row that may stay empty so that it ends where a patch does.
_RAGGED: Final = 0.12

_SPECIAL_WIDTH, _ASCII_WIDTH, _BYTE_WIDTH = 32.0, 15.0, 12.0


@dataclass(frozen=True, slots=True)
class _Cell:
    """What is written once: a character over its bytes' columns, a byte, or BOS or EOS."""

    tokens: tuple[ShownToken, ...]
    label: str
    kind: GlyphKind
    data: bytes
    """The bytes, none for BOS and EOS."""

    @property
    def column(self) -> float:
        """Width of each byte's column."""
        if not self.data:
            return _SPECIAL_WIDTH
        if len(self.data) > 1:
            return _BYTE_WIDTH
        return _ASCII_WIDTH if self.kind is not GlyphKind.HEX else _ASCII_WIDTH + 3

    @property
    def width(self) -> float:
        return self.column * len(self.tokens)

    @property
    def starts(self) -> bool:
        """Whether a patch starts with it."""
        return self.tokens[0].starts


@dataclass(frozen=True, slots=True)
class _Column:
    """One token's place in a row."""

    token: ShownToken
    cell: _Cell
    x: float
    width: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True, slots=True)
class _Scale:
    """The entropy axis."""

    low: float
    high: float

    def y(self, panel_top: float, nats: float) -> float:
        """Return the height of a value; what is outside the axis is drawn at its end."""
        share = (min(max(nats, self.low), self.high) - self.low) / (self.high - self.low)
        return panel_top + _PANEL * (1 - share)


def draw_patches(view: PatchView, *, width: float = DEFAULT_WIDTH) -> Drawing:
    """Lay out a document's patches.

    Args:
        view: the document; what it shows of itself is drawn whole, in as many rows as it takes.
        width: of the drawing in pixels; its height follows.

    Returns:
        The drawing. Every byte has a spot with `data-token`, `data-patch` and `data-byte` (hexadecimal).
    """
    tokens = view.tokens()
    rows = _fold(_cells(view, tokens), _room(width), ragged=_RAGGED)
    layout = _Layout.of(view, tokens, rows)
    drawing = Drawing(width, _HEAD + len(rows) * (layout.row_height + _GAP), f"Patches of {view.title}")
    _draw_head(drawing, view, layout, _describe(view))
    for number, cells in enumerate(rows):
        _draw_row(drawing, cells, _HEAD + number * (layout.row_height + _GAP), layout)
    return drawing


def draw_compared(above: PatchView, below: PatchView, *, width: float = DEFAULT_WIDTH) -> Drawing:
    """Lay out two patchings of one document, one above the other, column for column.

    Args:
        above: one patching; its entropies are drawn, if it has any.
        below: another one of the same bytes, of which the same are shown.
        width: of the drawing in pixels; its height follows.

    Returns:
        The drawing. Boundaries that only one of them has stand out. Only the upper bytes have spots.
    """
    tokens = above.tokens(), below.tokens()
    cells_above, cells_below = _cells(above, tokens[0]), _cells(below, tokens[1])
    rows = _fold(cells_above, _room(width), ragged=0)
    layout = _Layout.of(above, tokens[0], rows)
    height = layout.row_height + _LENGTHS + _TEXT
    drawing = Drawing(width, _HEAD + len(rows) * (height + _GAP), f"Patchings of {above.title} and {below.title}")
    _draw_head(drawing, above, layout, f"{above.title}: {_describe(above)}", f"{below.title}: {_describe(below)}")
    starts = [{token.token for token in each if token.starts} for each in tokens]
    apart = frozenset(starts[0] ^ starts[1])
    done = 0
    for number, cells in enumerate(rows):
        top = _HEAD + number * (height + _GAP)
        _draw_row(drawing, cells, top, layout, apart)
        others = cells_below[done : done + len(cells)]
        done += len(cells)
        columns = _place(others)
        top += layout.row_height + _LENGTHS
        _draw_bands(drawing, columns, top, _TEXT, _lengths(below), apart)
        _draw_text(drawing, others, columns, top, with_bytes=False)
        for name, y in ((above.title, top - _LENGTHS - layout.row_height / 2 + 6), (below.title, top + 17.5)):
            drawing.add(Label(8, y, name, 12, bold=True))
    return drawing


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the rows of a figure share."""

    scale: _Scale | None
    """The entropy axis, if entropies are drawn."""
    row_height: float
    has_bars: bool
    """Whether a threshold decides."""
    lengths: dict[int, int]
    """Tokens of each patch shown."""

    @classmethod
    def of(cls, view: PatchView, tokens: Sequence[ShownToken], rows: Sequence[Sequence[_Cell]]) -> _Layout:
        """Return the layout of a view's rows."""
        scale = _scale(tokens) if view.entropies is not None else None
        wide = any(len(cell.data) > 1 for row in rows for cell in row)
        height = _LENGTHS + (_PANEL if scale else 0) + _TEXT + (_BYTES if wide else 0)
        return cls(scale, height, any(token.bar is not None for token in tokens), _lengths(view))


def _lengths(view: PatchView) -> dict[int, int]:
    """Return the length in tokens of each patch that is shown."""
    return {patch.index: patch.length for patch in view.patches()}


def _draw_row(
    drawing: Drawing, cells: Sequence[_Cell], top: float, layout: _Layout, apart: frozenset[int] = frozenset()
) -> None:
    """Draw one row: bands, entropies, characters, and spots to point at."""
    columns = _place(cells)
    band_top, band_height = top + _LENGTHS, layout.row_height - _LENGTHS
    _draw_bands(drawing, columns, band_top, band_height, layout.lengths, apart)
    text_top = band_top
    if layout.scale is not None:
        _draw_panel(drawing, columns, text_top, layout.scale)
        text_top += _PANEL
    _draw_text(drawing, cells, columns, text_top)
    for column in columns:
        tip, data = _about(column, layout.lengths)
        drawing.add(Spot(column.x, band_top, column.width, band_height, tip, data))


def _room(width: float) -> float:
    """Return what a row of columns may take."""
    return max(width - _LEFT - _RIGHT, 4 * _SPECIAL_WIDTH)


def _cells(view: PatchView, tokens: Sequence[ShownToken]) -> list[_Cell]:
    """Return what is written, in order, BOS and EOS included where they are shown."""
    first, last = view.token_window
    content = view.shown_content
    cells = []
    if first == 0:
        cells.append(_Cell((tokens[0],), "BOS", GlyphKind.CODE, b""))
    offset = max(first, 1) - first
    for glyph in split_glyphs(content):
        own = tuple(tokens[offset + glyph.start : offset + glyph.end])
        cells.append(_Cell(own, glyph.label, glyph.kind, content[glyph.start : glyph.end]))
    if last == view.content.size + FRAME_TOKENS:
        cells.append(_Cell((tokens[-1],), "EOS", GlyphKind.CODE, b""))
    return cells


def _fold(cells: Sequence[_Cell], room: float, *, ragged: float) -> list[list[_Cell]]:
    """Cut cells into rows, at a patch's end where that leaves less than a share `ragged` of a row empty."""
    rows: list[list[_Cell]] = []
    row: list[_Cell] = []
    used = 0.0
    for cell in cells:
        if row and used + cell.width > room:
            place = next((index for index in range(len(row) - 1, 0, -1) if row[index].starts), 0)
            carried = row[place:] if place and not cell.starts else []
            if sum(other.width for other in carried) > ragged * room:
                carried = []
            rows.append(row[: len(row) - len(carried)])
            row, used = list(carried), sum(other.width for other in carried)
        row.append(cell)
        used += cell.width
    return [*rows, row] if row else rows


def _place(cells: Sequence[_Cell]) -> list[_Column]:
    columns = []
    x = _LEFT
    for cell in cells:
        for token in cell.tokens:
            columns.append(_Column(token, cell, x, cell.column))
            x += cell.column
    return columns


def _scale(tokens: Sequence[ShownToken]) -> _Scale:
    """Return an axis that holds every shown entropy and the threshold."""
    values = [value for token in tokens for value in (token.entropy, token.bar) if value is not None]
    # A threshold far above every entropy would press them all onto the axis.
    entropies = [token.entropy for token in tokens if token.entropy is not None]
    most = max(entropies, default=1.0)
    high = max([value for value in values if value <= 1.6 * most], default=most)
    return _Scale(min(0.0, min(entropies, default=0.0)), nice_top(max(high, 0.5)))


def _describe(view: PatchView) -> str:
    tokens, patches = view.content.size + FRAME_TOKENS, view.patch_lengths.size
    scheme = f" · {_shortened(describe_scheme(view.scheme), 60)}" if view.scheme is not None else ""
    return f"{patches:,} patches · mean {tokens / patches:.3g} tokens{scheme}"


def _draw_head(drawing: Drawing, view: PatchView, layout: _Layout, *lines: str) -> None:
    first, last = view.window
    shown = f", bytes {first:,} to {last:,} shown" if view.is_partial else ""
    size = f"{view.content.size:,} bytes{shown}"
    if len(lines) == 1:
        drawing.add(Label(_LEFT, 22, _shortened(view.title, 90), 15, bold=True))
        drawing.add(Label(_LEFT, 41, f"{size} · {lines[0]}", 12, Ink.SOFT))
    else:
        for number, line in enumerate(lines):
            text = f"{line} · {size}" if number == 0 else line
            drawing.add(Label(_LEFT, 22 + 19 * number, _shortened(text, 130), 12, Ink.SOFT))
    if layout.scale is None:
        return
    x, y = max(drawing.width - 178, _LEFT + 300), 18.0
    drawing.add(
        Path(((x, y), (x + 20, y)), Ink.CURVE, 1.4),
        Dot(x + 10, y, 2.2, Ink.CURVE),
        Label(x + 28, y + 4, "entropy before each byte", 11, Ink.SOFT),
    )
    if layout.has_bars:
        drawing.add(
            Path(((x, y + 22), (x + 20, y + 22)), Ink.BAR, 1.2, dashed=True),
            Dot(x + 10, y + 17, 3.2, Ink.FIRE),
            Label(x + 28, y + 24, "above the threshold", 11, Ink.SOFT),
        )


def _draw_bands(
    drawing: Drawing,
    columns: Sequence[_Column],
    top: float,
    height: float,
    lengths: dict[int, int],
    apart: frozenset[int],
) -> None:
    """Draw each patch's band, its length above it, and a mark where it begins; starts in `apart` stand out."""
    begin = 0
    for index in range(1, len(columns) + 1):
        if index < len(columns) and columns[index].token.patch == columns[begin].token.patch:
            continue
        first, last = columns[begin], columns[index - 1]
        patch, x, width = first.token.patch, first.x, last.x + last.width - first.x
        drawing.add(Rect(x, top, width, height, Ink.BAND_B if patch % 2 else Ink.BAND_A))
        if first.token.starts:
            stands_out = first.token.token in apart
            mark = ((x, top - 3), (x, top + height))
            drawing.add(Path(mark, Ink.FIRE if stands_out else Ink.SOFT, 2.2 if stands_out else 1.1))
        length = str(lengths[patch])
        if width >= 6.2 * len(length) and lengths[patch] > 1:
            drawing.add(Label(x + width / 2, top - 4, length, 9, Ink.SOFT, "middle"))
        begin = index


def _draw_panel(drawing: Drawing, columns: Sequence[_Column], top: float, scale: _Scale) -> None:
    """Draw the entropies of a row, the axis, and what they must exceed."""
    x_end = columns[-1].x + columns[-1].width
    for tick in nice_ticks(scale.low, scale.high, 3):
        y = scale.y(top, tick)
        drawing.add(
            Path(((_LEFT - 4, y), (x_end, y)), Ink.LINE, 0.6),
            Label(_LEFT - 8, y + 3.5, f"{tick:g}", 10, Ink.SOFT, "end"),
        )
    drawing.add(Label(_LEFT - 8, top + _PANEL + 15, "nats", 9, Ink.SOFT, "end"))
    _draw_bar(drawing, columns, top, scale)
    known = [(column.middle, column.token.entropy) for column in columns if column.token.entropy is not None]
    if len(known) > 1:
        drawing.add(Path(tuple((x, scale.y(top, nats)) for x, nats in known), Ink.CURVE, 1.3))
    for column in columns:
        token = column.token
        if token.entropy is not None:
            fires = token.bar is not None and token.entropy > token.bar
            y = scale.y(top, token.entropy)
            drawing.add(Dot(column.middle, y, 3.2 if fires else 2.0, Ink.FIRE if fires else Ink.CURVE))


def _draw_bar(drawing: Drawing, columns: Sequence[_Column], top: float, scale: _Scale) -> None:
    """Draw the threshold: one dashed line where it is the same for all, a step for each token where it is not."""
    run: list[tuple[float, float]] = []
    for column in columns:
        bar = column.token.bar
        if bar is None or not scale.low <= bar <= scale.high:
            _draw_run(drawing, run)
            run = []
            continue
        y = scale.y(top, bar)
        if run and run[-1][1] != y:
            _draw_run(drawing, run)
            run = []
        run += [(column.x, y), (column.x + column.width, y)]
    _draw_run(drawing, run)


def _draw_run(drawing: Drawing, run: Sequence[tuple[float, float]]) -> None:
    if run:
        drawing.add(Path((run[0], run[-1]), Ink.BAR, 1.2, dashed=True))


def _draw_text(
    drawing: Drawing, cells: Sequence[_Cell], columns: Sequence[_Column], top: float, *, with_bytes: bool = True
) -> None:
    """Write the characters, and the bytes below those that have several."""
    index = 0
    for cell in cells:
        own = columns[index : index + len(cell.tokens)]
        index += len(cell.tokens)
        middle = (own[0].x + own[-1].x + own[-1].width) / 2
        drawing.add(_character(cell, middle, top + 17.5))
        if with_bytes and len(cell.data) > 1:
            for column, byte in zip(own, cell.data, strict=True):
                drawing.add(Label(column.middle, top + _TEXT + 8, f"{byte:02x}", 7.5, Ink.SOFT, "middle", mono=True))


def _character(cell: _Cell, x: float, y: float) -> Label:
    match cell.kind:
        case GlyphKind.HEX:
            return Label(x, y - 1, cell.label, 10.5, Ink.FIRE, "middle", mono=True)
        case GlyphKind.CODE:
            size = min(9.5, 1.5 * cell.width / len(cell.label))
            return Label(x, y - 2, cell.label, size, Ink.SOFT, "middle")
        case GlyphKind.SPACE:
            return Label(x, y - (3 if cell.label == "␣" else 0), cell.label, 13, Ink.SOFT, "middle")
        case _:
            return Label(x, y, cell.label, 15.5, Ink.INK, "middle", fallback=code_point(cell.label[-1]))


def _about(column: _Column, lengths: dict[int, int]) -> tuple[str, dict[str, str]]:
    """Return what is said of a token, and its data for programs."""
    token, cell = column.token, column.cell
    data = {"token": str(token.token), "patch": str(token.patch)}
    if cell.data:
        byte = cell.data[cell.tokens.index(token)]
        data["byte"] = f"{byte:02x}"
        character = f", {cell.label}" if cell.kind is not GlyphKind.HEX else ""
        place = f" ({cell.tokens.index(token) + 1} of {len(cell.data)})" if len(cell.data) > 1 else ""
        lines = [f"byte {token.token - 1:,}: {byte:02x}{character}{place}"]
    else:
        lines = [{"BOS": "BOS, before the first byte", "EOS": "EOS, after the last byte"}[cell.label]]
    plural = "" if lengths[token.patch] == 1 else "s"
    lines.append(f"patch {token.patch:,}: {lengths[token.patch]:,} token{plural}")
    if token.entropy is not None:
        bar = ""
        if token.bar is not None:
            bar = f" {'>' if token.entropy > token.bar else '≤'} {token.bar:.4g}"
        lines.append(f"entropy before it: {token.entropy:.4g}{bar} nats")
        data["entropy"] = f"{token.entropy:.6g}"
    if token.starts:
        lines.append("starts a patch")
    return "\n".join(lines), data


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
