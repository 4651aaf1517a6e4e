"""What is shown of a document: all of its bytes, once, whatever they are, and every boundary."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from tests.blt_patcher import plain

from blt_data.errors import InputError
from blt_patcher import (
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    StaticScheme,
    patch_document,
)
from blt_patcher.viewing import GlyphKind, PatchView, printable, render_patches, split_glyphs
from blt_patcher.viewing.terminal import PALETTES

#: Text of many scripts, marks, joiners, emoji, and bytes that are no text.
texts = st.one_of(
    st.text(max_size=30).map(lambda text: text.encode("utf-8", errors="surrogatepass")),
    st.lists(st.sampled_from(["نص ", "हिन्दी", "中文", "👩🏽‍🚀", "e\u0301", "\u200f", "\n", "\x1b[31m", "ไทย"])).map(
        lambda words: "".join(words).encode()
    ),
    st.binary(max_size=40),
    st.tuples(st.text(max_size=9).map(lambda t: t.encode(errors="ignore")), st.binary(max_size=4)).map(b"".join),
)


def view_of(content: bytes, scheme: PatchScheme, **options: int) -> PatchView:
    nats = np.random.default_rng(len(content)).exponential(1.4, len(content) + 2).astype(np.float16)
    lengths = patch_document(scheme, content, nats)
    data = np.frombuffer(content, np.uint8)
    return PatchView(title="it", content=data, patch_lengths=lengths, entropies=nats, scheme=scheme, **options)


@given(data=texts)
def test_glyphs_cover_every_byte_once_and_are_what_utf8_says(data: bytes) -> None:
    glyphs = split_glyphs(data)
    assert [glyph.start for glyph in glyphs] == [0, *(glyph.end for glyph in glyphs[:-1])][: len(glyphs)]
    assert not data or glyphs[-1].end == len(data)
    for glyph in glyphs:
        own = data[glyph.start : glyph.end]
        assert glyph.label
        assert glyph.label.isprintable()
        if glyph.kind is GlyphKind.HEX:
            assert bytes.fromhex(glyph.label) == own
        else:
            character = own.decode()
            assert len(character) == 1
            if glyph.kind is GlyphKind.TEXT:
                assert glyph.label == character
    # The standard library's decoder and this one find the same bytes to be no text; controls are shown as bytes too.
    broken = data.decode("utf-8", errors="backslashreplace").count("\\x") - data.count(b"\\x")
    controls = sum(byte < 0x20 or byte == 0x7F for byte in data) - sum(data.count(byte) for byte in b"\n\t\r")
    assert sum(glyph.kind is GlyphKind.HEX for glyph in glyphs) == broken + controls


def read_back(text: str) -> bytes:
    """The bytes that a line shown without colour stands for, where no character had to be named."""
    text = text.replace("⟨BOS⟩", "").replace("⟨EOS⟩", "").replace("│", "").replace("┊", "").replace("◌", "")
    text = text.replace("↵\n", "\n").replace("⇥", "\t").replace("␍", "\r")
    pieces = re.split(r"\\x([0-9a-f]{2})", text)
    return b"".join(bytes.fromhex(piece) if index % 2 else piece.encode() for index, piece in enumerate(pieces))


@given(
    data=st.one_of(st.text("aé中 \n\t😀ह", max_size=30).map(str.encode), st.binary(max_size=30)),
    scheme=plain.schemes,
)
def test_without_colour_boundaries_and_bytes_can_be_read_back(data: bytes, scheme: PatchScheme) -> None:
    view = view_of(data, scheme)
    lines = [line.plain for line in render_patches(view)]
    text = "\n".join(lines) + ("\n" if data.endswith(b"\n") and not lines[-1].endswith("⟨EOS⟩") else "")
    assert text.count("│") + text.count("┊") == view.patch_lengths.size - 1
    named = any(glyph.kind is GlyphKind.CODE or glyph.label in "│┊◌↵⇥␍\\" for glyph in split_glyphs(data))
    if not named:
        assert read_back(text) == data


@given(data=texts, scheme=plain.schemes, width=st.integers(1, 30), palette=st.sampled_from([None, *PALETTES.values()]))
def test_lines_are_as_wide_as_the_terminal_and_hold_no_controls(
    data: bytes, scheme: PatchScheme, width: int, palette: object
) -> None:
    lines = render_patches(view_of(data, scheme), palette=palette, width=width)  # type: ignore[arg-type]
    for line in lines:
        assert line.plain.isprintable()
        # One glyph may be wider than a terminal that is narrower than it.
        assert cell_len(line.plain) <= max(width, 16)
        assert bool(line.spans) == (palette is not None)


def test_patches_take_the_two_grounds_in_turn() -> None:
    view = view_of(b"abcdef", StaticScheme(patch_length=2))
    (line,) = render_patches(view, palette=PALETTES["256"])
    grounds = [(line.plain[span.start : span.end], getattr(span.style, "bgcolor", None)) for span in line.spans]
    by_text: dict[object, str] = {}
    for text, ground in grounds:
        by_text[ground] = by_text.get(ground, "") + text
    assert sorted(by_text.values()) == ["abef", "⟨BOS⟩cd⟨EOS⟩"]


@given(data=texts, scheme=plain.schemes, first=st.integers(0, 40), count=st.integers(1, 40))
def test_a_window_shows_its_part_and_cuts_no_character(
    data: bytes, scheme: PatchScheme, first: int, count: int
) -> None:
    first = min(first, len(data))
    whole, part = view_of(data, scheme), view_of(data, scheme, first_byte=first, shown_bytes=count)
    begin, end = part.window
    assert 0 <= first - begin <= 3
    assert end - begin <= count + 3
    assert end > begin or first == len(data)
    assert part.shown_content == data[begin:end]
    low, high = part.token_window
    assert part.tokens() == whole.tokens()[low:high]
    assert [patch for patch in whole.patches() if patch.start < high and patch.end > low] == [
        type(patch)(
            patch.index,
            next(p.start for p in whole.patches() if p.index == patch.index),
            next(p.end for p in whole.patches() if p.index == patch.index),
            patch.length,
        )
        for patch in part.patches()
    ]
    starts = {0, *(glyph.end for glyph in split_glyphs(data))}
    if end - begin > 4:
        assert begin in starts
        assert end in starts


@given(data=st.binary(max_size=40), scheme=plain.schemes)
def test_a_token_starts_a_patch_where_it_exceeds_the_bar(data: bytes, scheme: PatchScheme) -> None:
    view = view_of(data, scheme)
    assert view.entropies is not None
    tokens = view.tokens()
    assert [token.token for token in tokens] == list(range(len(data) + 2))
    assert [token.entropy for token in tokens[1:]] == [float(nats) for nats in view.entropies[:-1]]
    has_bars = isinstance(scheme, (EntropyScheme, EntropyMonotonicScheme, EntropyCombinedScheme))
    for token in tokens:
        if token.bar is not None and token.entropy is not None and scheme.max_patch_length is None:
            assert has_bars
            assert token.starts == (token.entropy > token.bar)
    if isinstance(scheme, EntropyScheme):
        assert all(token.bar == scheme.threshold for token in tokens[2:])


def test_what_does_not_fit_together_is_refused() -> None:
    content, lengths = np.frombuffer(b"abc", np.uint8), np.array([1, 4], np.uint16)
    with pytest.raises(InputError, match="it: its patches do not cover its 3 bytes"):
        PatchView(title="it", content=content, patch_lengths=lengths[:1])
    with pytest.raises(InputError, match="it: has 3 entropies for 5 tokens"):
        PatchView(title="it", content=content, patch_lengths=lengths, entropies=np.zeros(3, np.float16))
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="it: has an entropy that is not a finite number"):
            PatchView(title="it", content=content, patch_lengths=lengths, entropies=np.full(5, bad, np.float16))
    with pytest.raises(InputError, match="it: has no byte 4; it has 3 bytes"):
        PatchView(title="it", content=content, patch_lengths=lengths, first_byte=4)
    with pytest.raises(InputError, match="show at least 1"):
        PatchView(title="it", content=content, patch_lengths=lengths, shown_bytes=0)


@given(text=st.text(st.characters(), max_size=20))
def test_names_are_shown_without_controls(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text
    elif "\\" not in text and text.isascii():
        assert shown.encode().decode("unicode_escape") == text
