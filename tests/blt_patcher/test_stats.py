"""Figures of patch lengths against plain counting."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tests.blt_patcher.shards import make_bytes

from blt_data import ShardDirectory
from blt_data.errors import InputError
from blt_patcher import SpaceScheme, StaticScheme
from blt_patcher.grouped_stats import GroupedStats, GroupStats, by_id, by_source
from blt_patcher.precompute import precompute
from blt_patcher.stats import QUANTILES, PatchStats, collect_stats, draw_histogram, draw_histograms_side_by_side


def test_figures_are_those_of_all_lengths(tmp_path: Path) -> None:
    source = make_bytes(tmp_path / "bytes")
    precompute(source, tmp_path / "out", scheme=SpaceScheme())
    directory = ShardDirectory.open(tmp_path / "out")
    lengths = np.concatenate([directory.shard(index).patch_column()[1] for index in range(len(directory))])
    stats = collect_stats(directory)
    assert stats.patches == lengths.size == directory.manifest.patches
    assert stats.tokens == int(lengths.sum())
    assert stats.mean == pytest.approx(float(lengths.mean()))
    for share in QUANTILES:
        assert stats.quantile(share) == int(np.quantile(lengths, share, method="inverted_cdf"))
    figures = stats.to_json()
    assert figures["longest"] == int(lengths.max())
    assert sum(bar["patches"] for bar in figures["histogram"]) == lengths.size
    for bar in figures["histogram"]:
        assert bar["patches"] == int(((lengths >= bar["from"]) & (lengths <= bar["to"])).sum())


def test_histogram_has_no_gaps_up_to_the_longest_patch() -> None:
    counts = np.zeros(65_536, np.int64)
    counts[[1, 3, 16, 17, 40, 65_535]] = [10, 5, 1, 2, 3, 1]
    stats = PatchStats(documents=1, bytes=10**6, counts=counts)
    bars = stats.histogram()
    assert bars[0] == (1, 1, 10)
    assert bars[16] == (17, 32, 2)
    assert bars[17] == (33, 64, 3)
    assert bars[-1][1] >= 65_535
    assert [low for low, _, _ in bars[1:]] == [high + 1 for _, high, _ in bars[:-1]]
    lines = draw_histogram(stats).splitlines()
    assert len(lines) == len(bars)
    assert lines[0].endswith("45.45% " + "█" * 50)
    assert lines[2].endswith("█" * 25)
    assert lines[1].endswith("0.00%")


def test_nothing_to_count() -> None:
    stats = PatchStats(documents=0, bytes=0, counts=np.zeros(65_536, np.int64))
    assert (stats.mean, stats.quantile(0.5), stats.histogram()) == (0.0, 0, [])
    assert draw_histogram(stats) == "(no patches)"


@pytest.mark.parametrize("what", ["patches", "content"])
def test_a_flipped_byte_is_noticed(tmp_path: Path, what: str) -> None:
    source = make_bytes(tmp_path / "bytes", shards=[[b"x" * 1000]])
    precompute(source, tmp_path / "out", scheme=StaticScheme(patch_length=7))
    file = tmp_path / "out" / "shard-00000.arrow"
    data = bytearray(file.read_bytes())
    data[data.index(np.full(20, 7, np.uint16).tobytes() if what == "patches" else b"xxxx")] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"shard-00000.arrow: does not have the checksum"):
        collect_stats(ShardDirectory.open(tmp_path / "out"))


def test_two_histograms_share_their_bars() -> None:
    counts = np.zeros((2, 65_536), np.int64)
    counts[0, [1, 3]] = [30, 10]
    counts[1, [3, 20]] = [1, 1]
    a, b = (PatchStats(documents=1, bytes=100, counts=row) for row in counts)
    lines = draw_histograms_side_by_side(a, b).splitlines()
    assert [line.split()[0] for line in lines] == ["length", *map(str, range(1, 17)), "17–32"]
    shares = [[float(share) for share in re.findall(r"([0-9.]+)%", line)] for line in lines[1:]]
    assert [shares[place] for place in (0, 1, 2, 16)] == [[75.0, 0.0], [0.0, 0.0], [25.0, 50.0], [0.0, 50.0]]
    assert lines[1].count("█") == 24
    assert lines[3].count("█") == 8 + 16
    nothing = PatchStats(documents=0, bytes=0, counts=np.zeros(65_536, np.int64))
    assert draw_histograms_side_by_side(nothing, nothing) == "(no patches)"


def test_groups_are_counted_document_by_document(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    words = ["plain ", "größer", "日本語", "👩🏽‍🚀", "", "\n"]
    shards = [
        ["".join(words[i] for i in rng.integers(0, 6, size)).encode() for size in rng.integers(0, 30, 20)]
        for _ in range(3)
    ]
    precompute(make_bytes(tmp_path / "bytes", shards=shards), tmp_path / "out", scheme=SpaceScheme())
    directory = ShardDirectory.open(tmp_path / "out")
    expected: dict[str, dict[str, list[int]]] = {"source": {}, "id": {}}
    for index, row in directory.documents():
        shard = directory.shard(index)
        content = shard.content(row).tobytes()
        counts = [1, len(content), len(content.decode()), shard.patch_lengths(row).size]
        own_id = shard.document_id(row)
        for kind, name in (("source", shard.source(row)), ("id", own_id[-1] if own_id[-1] in "0123" else "(no match)")):
            sums = expected[kind].setdefault(name, [0, 0, 0, 0])
            expected[kind][name] = [a + b for a, b in zip(sums, counts, strict=True)]
    for kind, group_of in (("source", by_source), ("id", by_id(re.compile(r"([0-3])$")))):
        grouped = GroupedStats(group_of)
        stats = collect_stats(directory, visit=grouped.add)
        found = {
            name: [group.documents, group.bytes, group.characters, group.patches]
            for name, group in grouped.groups.items()
        }
        assert found == expected[kind]
        assert sum(group.patches for group in grouped.groups.values()) == stats.patches
        sizes = [group.bytes for _, group in grouped.largest_first()]
        assert sizes == sorted(sizes, reverse=True)
    group = GroupStats(documents=2, bytes=10, characters=6, patches=5)
    assert (group.mean, group.bytes_per_character, group.characters_per_patch) == (14 / 5, 10 / 6, 2.0)
    assert GroupStats().to_json()["mean_patch_length"] == 0
