"""Two patchings compared, against sets of boundaries counted one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.blt_patcher import plain
from tests.blt_patcher.patched import make_patched
from tests.blt_patcher.shards import make_bytes

import blt_patcher.compare as module
from blt_data import Manifest, ShardDirectory, ShardKind, write_manifest, write_shard
from blt_data.errors import InputError
from blt_patcher import ByteScheme, EntropyScheme, PatchScheme, SpaceScheme, StaticScheme
from blt_patcher.compare import compare, first_difference
from blt_patcher.precompute import precompute
from blt_patcher.repatch import repatch


def boundaries(lengths: np.ndarray) -> set[int]:
    """The tokens from 2 on that start a patch."""
    found, token = set(), 0
    for length in lengths.tolist():
        if token >= 2:
            found.add(token)
        token += length
    return found


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    return make_patched(tmp_path_factory.mktemp("compare") / "stored", EntropyScheme(threshold=1.5), seed=8)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scheme=plain.schemes, wanted=st.integers(0, 5), run=st.sampled_from([1, 100, 10_000]))
def test_figures_are_those_of_plain_sets(
    stored: ShardDirectory,
    tmp_path_factory: pytest.TempPathFactory,
    scheme: PatchScheme,
    wanted: int,
    run: int,
) -> None:
    path = tmp_path_factory.mktemp("other") / "other"
    repatch(stored, path, scheme=scheme)
    other = ShardDirectory.open(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TOKENS_PER_RUN", run)
        found = compare(stored, other, examples=wanted)
    common = only_a = only_b = identical = 0
    ranks = []
    for index, row in stored.documents():
        a, b = (boundaries(each.shard(index).patch_lengths(row)) for each in (stored, other))
        common, only_a, only_b = common + len(a & b), only_a + len(a - b), only_b + len(b - a)
        identical += a == b
        if a != b:
            union = len(a | b)
            ranks.append((union < 16, len(a & b) / union, -union, stored.shard(index).document_id(row)))
    assert (found.common, found.only_a, found.only_b) == (common, only_a, only_b)
    assert (found.documents, found.identical) == (stored.manifest.documents, identical)
    assert found.recall == (common / (common + only_a) if common + only_a else 1.0)
    assert found.precision == (common / (common + only_b) if common + only_b else 1.0)
    assert found.jaccard == (common / (common + only_a + only_b) if common + only_a + only_b else 1.0)
    assert found.stats_a.patches == stored.manifest.patches
    assert found.stats_b.patches == other.manifest.patches
    told = [(e.common + e.only_a + e.only_b < 16, e.jaccard) for e in found.examples]
    assert told == [rank[:2] for rank in sorted(ranks)][:wanted]
    for example in found.examples:
        lengths = [
            each.shard(place[0]).patch_lengths(place[1])
            for each, place in ((stored, example.place_a), (other, example.place_b))
        ]
        sets = [boundaries(each) for each in lengths]
        assert example.only_a == len(sets[0] - sets[1])
        assert first_difference(*lengths) == min(sets[0] ^ sets[1])


def test_the_same_patching_agrees_with_itself(stored: ShardDirectory) -> None:
    done: list[int] = []
    found = compare(stored, stored, advance=done.append)
    assert (found.jaccard, found.identical, found.examples) == (1.0, stored.manifest.documents, ())
    assert sum(done) == 2 * stored.manifest.bytes
    assert first_difference(*[stored.shard(0).patch_lengths(0)] * 2) is None


@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_other_sharding_and_order_change_nothing(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("sharding")
    rng = np.random.default_rng(seed)
    documents = [rng.integers(97, 104, size, dtype=np.uint8).tobytes() for size in rng.integers(0, 60, 30)]
    # Documents of equal id and others of equal content: ids here are made from the content's first letters.
    named = [(content[:1].decode() or "empty", content) for content in documents]
    directories = {}
    for name, order, cuts in (("a", np.arange(30), 3), ("b", rng.permutation(30), 5)):
        make_named(path / f"{name}-bytes", [[named[i] for i in part] for part in np.array_split(order, cuts)])
        for scheme in (SpaceScheme(), StaticScheme(patch_length=3)):
            output = path / f"{name}-{scheme.name}"
            precompute(ShardDirectory.open(path / f"{name}-bytes"), output, scheme=scheme)
            directories[name, scheme.name] = ShardDirectory.open(output)
    same = compare(directories["a", "space"], directories["a", "static"], examples=0)
    other = compare(directories["a", "space"], directories["b", "static"], examples=4)
    assert same.to_json() == {**other.to_json(), "examples": []}
    for example in other.examples:
        places = (directories["a", "space"], example.place_a), (directories["b", "static"], example.place_b)
        contents = [directory.shard(index).content(row).tobytes() for directory, (index, row) in places]
        assert contents[0] == contents[1]
    assert compare(directories["a", "space"], directories["b", "space"]).jaccard == 1.0


def make_named(directory: Path, shards: list[list[tuple[str, bytes]]]) -> None:
    directory.mkdir()
    entries = [
        write_shard(
            directory / f"shard-{number:05}.arrow",
            kind=ShardKind.BYTES,
            document_ids=[name for name, _ in documents],
            contents=[content for _, content in documents],
            sources=["x"] * len(documents),
            provenance={},
        )
        for number, documents in enumerate(shards)
    ]
    write_manifest(directory, Manifest(kind=ShardKind.BYTES, shards=tuple(entries)))


def test_other_documents_are_refused(tmp_path: Path) -> None:
    def patched(name: str, shards: list[list[bytes]]) -> ShardDirectory:
        precompute(make_bytes(tmp_path / f"{name}-bytes", shards=shards), tmp_path / name, scheme=ByteScheme())
        return ShardDirectory.open(tmp_path / name)

    one = patched("one", [[b"abc", b"defg"]])
    with pytest.raises(InputError, match=r"one has 2 documents and .*two has 3; compare two patchings of the same"):
        compare(one, patched("two", [[b"abc", b"defg", b""]]))
    with pytest.raises(InputError, match=r"one has 7 bytes and .*three has 8"):
        compare(one, patched("three", [[b"abc", b"defgh"]]))
    with pytest.raises(InputError, match=r"document '0-0' of .*one has other content in .*four; compare two"):
        compare(one, patched("four", [[b"abd", b"defg"]]))
    with pytest.raises(InputError, match=r"document '0-1' of .*one is missing in .*five"):
        compare(one, patched("five", [[b"abc"], [b"defg"]]))


def test_damage_is_found(stored: ShardDirectory, tmp_path: Path) -> None:
    repatch(stored, tmp_path / "out", scheme=SpaceScheme())
    file = tmp_path / "out" / "shard-00002.arrow"
    data = bytearray(file.read_bytes())
    data[data.index(b"patch ") + 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"shard-00002.arrow: does not have the checksum"):
        compare(stored, ShardDirectory.open(tmp_path / "out"))
