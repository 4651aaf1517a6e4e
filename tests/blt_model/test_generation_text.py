"""Characters and stop strings in a stream of bytes."""

from __future__ import annotations

import random

import pytest
from tests.blt_model.generation_oracle import fresh_seed

from blt_model.generation import decode_stream
from blt_model.generation.text import StopStrings


def test_characters_appear_whole() -> None:
    data = "aé東🙂".encode()
    assert list(decode_stream(bytes([value]) for value in data)) == ["a", "é", "東", "🙂"]
    # A character that the text did not get to finish is not shown.
    assert "".join(decode_stream([data[:-1]])) == "aé東"
    assert "".join(decode_stream([b"\xff\x80a"])) == "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}a"


def test_any_cutting_gives_the_same_text() -> None:
    rng = random.Random(fresh_seed())
    for _ in range(50):
        data = bytes(rng.choices([*"aé東🙂".encode(), 0xFF, 0xC0], k=40))
        cuts = sorted(rng.choices(range(41), k=6))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, 40], strict=True)]
        text = "".join(decode_stream(pieces))
        assert data.decode("utf-8", "replace").startswith(text)
        assert len(data.decode("utf-8", "replace")) - len(text) <= 1


@pytest.mark.parametrize("stops", [(), (b"ab",), (b"aab", b"b"), (b"abab", b"ba"), (b"a", b"ca"), (b"aaaa",)])
def test_stop_strings_by_brute_force(stops: tuple[bytes, ...]) -> None:
    """The first stop string ends the text, and nothing of it is ever shown."""
    rng = random.Random(fresh_seed())
    for _ in range(100):
        data = bytes(rng.choices(b"abc", k=25))
        watcher, content, shown = StopStrings(stops), bytearray(), 0
        found = None
        for byte in data:
            content.append(byte)
            if found := watcher.match(content):
                break
            released = watcher.released(content)
            assert shown <= released <= len(content)
            # What is held back is the beginning of a stop string.
            assert released == len(content) or any(stop.startswith(content[released:]) for stop in stops)
            shown = released
        ends = [data.index(stop) + len(stop) for stop in stops if stop in data]
        assert (found is not None) == bool(ends)
        if found is not None:
            assert len(content) == min(ends)
            assert shown <= len(content) - len(found)
