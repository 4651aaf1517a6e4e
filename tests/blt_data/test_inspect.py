"""`blt-data inspect`: its figures are those of another count, and its page holds together."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from blt_data import InputError, ShardKind
from blt_data.commands.inspect import inspect_command
from blt_data.inspection import inspect_directory
from blt_data.inspection.scripts import CLASSES, count_scripts
from blt_data.skips import SkipCount, Skips

from .shard_samples import Document, make_directory, some_documents

#: First word of a letter's Unicode name, where it names one of our scripts otherwise than we do.
NAMED = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "ORIYA": "Odia", "CANADIAN": "Canadian syllabics"}


def counted(data: bytes) -> dict[str, tuple[int, int]]:
    table = count_scripts(np.frombuffer(data, np.uint8))
    return {name: (int(row[0]), int(row[1])) for name, row in zip(CLASSES, table, strict=True) if row.any()}


def test_letters_are_of_the_script_that_their_name_says() -> None:
    """Over every letter of Unicode; blocks that scripts share are why it is not all of them."""
    letters: dict[str, list[str]] = {}
    for character in map(chr, range(0x110000)):
        if unicodedata.category(character)[0] == "L":
            word = unicodedata.name(character, "").split(" ")[0]
            letters.setdefault(NAMED.get(word, word.capitalize()), []).append(character)
    for script in set(CLASSES[:30]) & set(letters):
        right, _ = counted("".join(letters[script]).encode())[script]
        assert right >= 0.8 * len(letters[script]), script
        if script in ("Latin", "Cyrillic", "Greek", "Hebrew", "Han", "Hangul", "Devanagari", "Thai"):
            assert right >= 0.95 * len(letters[script]), script
    assert set(CLASSES[:30]) <= set(letters) | {"Kana"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Latin é", {"Latin": (6, 7), "white space": (1, 1)}),
        ("x = f(1);\n", {"Latin": (2, 2), "ASCII punctuation and code signs": (4, 4), "white space": (3, 3)}),
        ("привет", {"Cyrillic": (6, 12)}),
        ("漢字かな한글", {"Han": (2, 6), "Kana": (2, 6), "Hangul": (2, 6)}),
        ("سلام", {"Arabic": (4, 8)}),
        ("हिन्दी", {"Devanagari": (6, 18)}),
        ("12²٣", {"digits and numbers": (4, 6)}),
        ("—«»€", {"other punctuation and symbols": (4, 10)}),
        ("🐍☃", {"emoji and pictographs": (2, 7)}),
        ("\0\u200d\ufeff", {"control and format": (3, 7)}),
        ("\u00a0\u3000\u2028", {"white space": (3, 8)}),
        ("\ue000\U0010ffff", {"private or unassigned": (2, 7)}),
    ],
)
def test_kinds_of_characters(text: str, expected: dict[str, tuple[int, int]]) -> None:
    found = counted(text.encode())
    assert {name: pair for name, pair in found.items() if name in expected} == expected
    assert sum(size for _, size in found.values()) == len(text.encode())


@given(text=st.text(max_size=60), copies=st.sampled_from([1, 50_000]))
def test_characters_and_bytes_add_up(text: str, copies: int) -> None:
    """Also across the seams of blocks of four megabytes."""
    data = (text * copies).encode()[: 9 << 20]
    expected = Counter({name: pair[0] * copies for name, pair in counted(text.encode()).items()})
    found = counted(data)
    assert sum(size for _, size in found.values()) == len(data)
    if len(data) == len(text.encode()) * copies:
        assert {name: count for name, (count, _) in found.items()} == dict(expected)


@given(data=st.binary(max_size=40))
def test_bytes_that_are_no_text_are_counted_one_by_one(data: bytes) -> None:
    found = counted(data)
    invalid = sum(0xDC80 <= ord(character) <= 0xDCFF for character in data.decode(errors="surrogateescape"))
    assert found.get("no UTF-8", (0, 0)) == (invalid, invalid)
    assert sum(size for _, size in found.values()) == len(data)


def parts() -> list[list[Document]]:
    return [some_documents(1, 40), some_documents(2, 7, source="t", longest=5000), [("empty", b"", "t0")]]


def test_figures_are_those_of_another_count(tmp_path: Path) -> None:
    make_directory(tmp_path / "d", parts())
    seen: list[int] = []
    found = inspect_directory(tmp_path / "d", documents=3, on_progress=lambda *amounts: seen.append(amounts[1]))
    documents = [document for part in parts() for document in part]
    lengths = [len(content) for _, content, _ in documents]
    assert (found.documents, found.bytes, found.shards, seen) == (48, sum(lengths), 3, [40, 7, 1])
    assert found.sample.startswith("all 3 shards: 48 documents")
    of_bin = Counter(length.bit_length() for length in lengths)
    assert {item.last.bit_length(): item.documents for item in found.lengths if item.documents} == dict(of_bin)
    for item in found.lengths:
        inside = [length for length in lengths if item.first <= length <= item.last]
        assert (item.documents, item.bytes) == (len(inside), sum(inside))
    names = Counter(source for _, _, source in documents)
    assert {share.name: share.count for share in found.sources} == dict(names)
    assert sum(share.bytes for share in found.sources) == sum(lengths)
    assert {share.name: (share.count, share.bytes) for share in found.scripts} == _sum_of_counts(documents)
    values = dict(found.quantiles)
    assert values["median"] == sorted(lengths)[23]
    assert (values["minimum"], values["maximum"]) == (min(lengths), max(lengths))
    assert values["mean"] == pytest.approx(sum(lengths) / 48)
    assert {document.document_id for document in found.shown} < {name for name, _, _ in documents}
    assert dict(found.facts)["of.1.two"] == "none"


def _sum_of_counts(documents: list[Document]) -> dict[str, tuple[int, int]]:
    total: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for _, content, _ in documents:
        for name, (characters, amount) in counted(content).items():
            total[name] += characters
            size[name] += amount
    return {name: (total[name], size[name]) for name in total}


def test_a_sample_is_drawn_by_its_seed_and_says_its_size(tmp_path: Path) -> None:
    make_directory(tmp_path / "d", [[(f"{index}", bytes(100), "s")] * 3 for index in range(20)])
    shown = set()
    for seed in range(6):
        first = inspect_directory(tmp_path / "d", sample_bytes=1000, documents=2, seed=seed)
        assert first == inspect_directory(tmp_path / "d", sample_bytes=1000, documents=2, seed=seed)
        assert (first.shards, first.documents, first.bytes) == (4, 12, 1200)
        assert first.sample == f"4 of 20 shards, drawn with seed {seed}: 12 documents, 1,200 bytes"
        shown.add(tuple(document.document_id for document in first.shown))
    assert len(shown) > 3
    assert inspect_directory(tmp_path / "d", sample_bytes=1).shards == 1


class Page(HTMLParser):
    """Checks that what is opened is closed, and that nothing is fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        assert {name for name, _ in attrs}.isdisjoint({"src", "href", "onload"})
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_terminal_and_page_tell_the_same(tmp_path: Path) -> None:
    documents = [("<b>&id", "<script>alert('é')</script>".encode() + bytes([0xFF]), "<source>")]
    skipped = Skips({"no JSON": SkipCount(count=12, bytes=3456)})
    make_directory(tmp_path / "d", [documents, parts()[0]], kind=ShardKind.PATCHED, entropies=True, skipped=skipped)
    page = tmp_path / "page.html"
    arguments = [str(tmp_path / "d"), "--documents", "100", "--html", str(page)]
    result = CliRunner().invoke(inspect_command, arguments)
    assert result.exit_code == 0, result.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = Page(page.read_text("utf-8"))
    assert parsed.open == []
    told = " ".join(parsed.text)
    lengths = inspect_directory(tmp_path / "d").lengths
    assert parsed.counts["svg"] == len(lengths) + 3 + len(inspect_directory(tmp_path / "d").scripts)
    assert "script" not in parsed.counts
    for text in ("no JSON", "3,456", "<script>alert('é')</script>\\xff", "<b>&id", "<source>", "list<item: halffloat"):
        assert text in told
        assert text in result.stdout
    assert "mean patch" in result.stdout
    assert "sample: all 2 shards: 41 documents" in result.stdout
    assert re.search(r"│ ██+", result.stdout)
    before = page.read_bytes()
    assert CliRunner().invoke(inspect_command, arguments).exit_code == 0
    assert page.read_bytes() == before


def test_a_directory_without_documents(tmp_path: Path) -> None:
    for name, shards in (("none", []), ("empty", [list[Document]()])):
        make_directory(tmp_path / name, shards)
        page = tmp_path / "page.html"
        result = CliRunner().invoke(inspect_command, [str(tmp_path / name), "--html", str(page)])
        assert result.exit_code == 0, result.stderr
        assert Page(page.read_text()).open == []


def test_train_and_holdout_are_both_shown(tmp_path: Path) -> None:
    for split in ("train", "holdout"):
        make_directory(tmp_path / split, [some_documents(5, 3)])
    result = CliRunner().invoke(inspect_command, [str(tmp_path)])
    assert (result.exit_code, result.stdout.count("kind: bytes")) == (0, 2)
    (tmp_path / "holdout" / "manifest.json").unlink()
    result = CliRunner().invoke(inspect_command, [str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "holdout: has no manifest.json" in result.stderr


def test_damage_in_the_sample_is_told_and_nothing_is_shown(tmp_path: Path) -> None:
    make_directory(tmp_path / "d", parts())
    file = tmp_path / "d" / "shard-00001.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"shard-00001\.arrow: does not have the checksum"):
        inspect_directory(tmp_path / "d")
    result = CliRunner().invoke(inspect_command, [str(tmp_path / "d"), "--html", str(tmp_path / "page.html")])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--documents", "-1"], "documents"),
        (["--sample-seed", "-1"], "sample-seed"),
        (["--sample-size", "0"], "sample-size"),
        (["--preview-bytes", "0"], "preview-bytes"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(inspect_command, [str(tmp_path), *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_huge_options(tmp_path: Path) -> None:
    make_directory(tmp_path / "d", parts())
    huge = str(10**30)
    arguments = [str(tmp_path / "d"), "--documents", huge, "--preview-bytes", huge, "--sample-seed", huge]
    result = CliRunner().invoke(inspect_command, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(" bytes)\n") == 1 + 48


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    make_directory(tmp_path / "d", parts())
    result = CliRunner().invoke(
        inspect_command, [str(tmp_path / "d"), "--html", str(tmp_path / "absent" / "page.html")]
    )
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .*page\.html.*: No such file or directory\n", result.stderr)
