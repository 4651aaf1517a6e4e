"""Whatever lies in a shard directory, readers give a shard or one sentence, and commands end with one line each."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blt_data import InputError, Manifest, Shard, ShardDirectory, ShardKind, read_manifest, verify_directory
from blt_data.commands.inspect import inspect_command
from blt_data.commands.merge import merge_command
from blt_data.commands.verify import verify_command
from blt_data.shards.manifest import MANIFEST_VERSION

from .shard_samples import make_directory, some_documents

SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

#: Values that JSON can hold, and that programs stumble over.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63 - 1, 2**63, -(2**63), 10**30, 0, -1])
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["bytes", "patched", "blt-shards", "f" * 64, "\ud800", "shard-00000.arrow", "../x", "\0"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small directory of each kind and compression."""
    folder = tmp_path_factory.mktemp("samples")
    made = {}
    for kind in ShardKind:
        for compression in ("none", "zstd"):
            path = folder / f"{kind}-{compression}"
            parts = [some_documents(1, 4), some_documents(2, 3)]
            entropies = kind is ShardKind.PATCHED
            make_directory(path, parts, kind=kind, entropies=entropies, compression=compression)
            made[path.name] = path
    return made


@contextmanager
def one_sentence(beginning: str) -> Iterator[None]:
    """Let an `InputError` of one line pass, and nothing else."""
    message = None
    try:
        yield
    except InputError as error:
        message = str(error)
    assert message is None or re.fullmatch(rf"{beginning}[^\n]+", message)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any, how: str) -> Any:
    """Return a copy with the value at a path replaced, removed or doubled."""
    if not path:
        return new
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    if how == "remove":
        del holder[path[-1]]
    elif how == "double" and isinstance(holder, list):
        holder.append(holder[path[-1]])
    else:
        holder[path[-1]] = new
    return copy


@SLOW
@given(data=VALUES | st.just({}))
def test_any_json_is_a_manifest_or_an_input_error(data: Any) -> None:
    with suppress(InputError):
        Manifest.from_json(data)
    with suppress(InputError):
        Manifest.from_json({"format": "blt-shards", "version": MANIFEST_VERSION, "kind": "bytes", "shards": data})


@SLOW
@given(new=VALUES, how=st.sampled_from(["replace", "remove", "double"]), place=st.integers(0, 10**6))
def test_a_changed_manifest_is_a_manifest_or_an_input_error(
    samples: dict[str, Path], new: Any, how: str, place: int
) -> None:
    whole = json.loads((samples["patched-none"] / "manifest.json").read_text())
    paths = list(places(whole))
    data = changed(whole, paths[place % len(paths)], new, how)
    read: list[Manifest] = []
    with one_sentence(""):
        read.append(Manifest.from_json(data))
    for manifest in read:
        # What was read is what is written, and all of it can be counted.
        assert Manifest.from_json(manifest.to_json()) == manifest
        assert (
            manifest.documents + manifest.bytes + sum(skip.count + skip.bytes for skip in manifest.skipped.values())
            >= 0
        )


@SLOW
@given(data=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_a_manifest_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-manifest"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(InputError, match=r"^.*manifest\.json: [^\n]*$"):
        read_manifest(folder)


def touch_all(shard: Shard) -> None:
    """Read everything of a shard."""
    for row in range(len(shard)):
        shard.content(row).tobytes()
        with suppress(InputError):
            shard.patch_lengths(row).tolist()
        with suppress(InputError):
            shard.entropies(row).tolist()


@settings(max_examples=400, deadline=None)
@given(
    sample=st.sampled_from(["bytes-none", "bytes-zstd", "patched-none", "patched-zstd"]),
    seed=st.integers(0, 2**32),
    edits=st.integers(1, 6),
    cut=st.floats(0, 1.2),
)
def test_a_damaged_shard_is_a_shard_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory,
    samples: dict[str, Path],
    sample: str,
    seed: int,
    edits: int,
    cut: float,
) -> None:
    """Opened after verification, as commands do: a file whose bytes changed is never used without its checksum."""
    source = random.Random(seed)
    data = bytearray((samples[sample] / "shard-00000.arrow").read_bytes())
    for _ in range(edits):
        place = source.randrange(len(data))
        # Bytes are changed, set to extremes, or moved, which is what makes lengths and offsets wrong.
        match source.randrange(4):
            case 0:
                data[place] ^= 1 << source.randrange(8)
            case 1:
                data[place : place + 4] = source.choice([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"])
            case 2:
                data[place : place + 8] = source.randbytes(8)
            case _:
                other = source.randrange(len(data))
                data[place : place + 16] = data[other : other + 16]
    path = tmp_path_factory.getbasetemp() / "damaged.arrow"
    path.write_bytes(bytes(data[: int(cut * len(data))]))
    with one_sentence(r"[^\n]*damaged\.arrow: "):
        touch_all(Shard.open(path, verify=True))


@SLOW
@given(data=st.binary(max_size=300), magic=st.booleans())
def test_any_bytes_are_no_shard(tmp_path_factory: pytest.TempPathFactory, data: bytes, magic: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "any.arrow"
    path.write_bytes(b"ARROW1\0\0" + data + b"ARROW1" if magic else data)
    with pytest.raises(InputError, match=r"^[^\n]*any\.arrow: [^\n]*$"):
        Shard.open(path, verify=True)


@SLOW
@given(
    columns=st.lists(
        st.tuples(
            st.sampled_from(["document_id", "content", "source", "patch_lengths", "entropies", "x"]),
            st.sampled_from(
                [pa.string(), pa.large_binary(), pa.int64(), pa.dictionary(pa.int32(), pa.string()), pa.null()]
            ),
        ),
        max_size=5,
    ),
    metadata=st.dictionaries(
        st.sampled_from(["blt.format", "blt.version", "blt.kind", "blt.documents", "blt.bytes", "blt.provenance"]),
        st.sampled_from(["blt-shard", "1", "0", "bytes", "patched", "{}", "[]", "null", "\u0660"])
        | st.binary(max_size=4),
    ),
    rows=st.integers(0, 2),
)
def test_an_arrow_file_that_is_no_shard(
    tmp_path_factory: pytest.TempPathFactory,
    columns: list[tuple[str, pa.DataType]],
    metadata: dict[str, str | bytes],
    rows: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "arrow.arrow"
    schema = pa.schema([pa.field(name, kind) for name, kind in columns], metadata=metadata)
    batch = pa.record_batch([pa.nulls(rows, kind) for _, kind in columns], schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(InputError, match=r"^[^\n]*arrow\.arrow: [^\n]*$"):
        Shard.open(path, verify=True)


COMMANDS: list[tuple[click.Command, list[str]]] = [
    (verify_command, []),
    (inspect_command, ["--documents", "3"]),
    (merge_command, ["--output", "OUT"]),
    (merge_command, ["--output", "OUT", "--shard-size", "100", "--compression", "zstd"]),
]


@settings(max_examples=120, deadline=None)
@given(
    sample=st.sampled_from(["bytes-none", "patched-zstd"]),
    seed=st.integers(0, 2**32),
    target=st.sampled_from(["manifest.json", "manifest.json", "shard-00000.arrow", "shard-00001.arrow"]),
    command=st.sampled_from(COMMANDS),
    new=VALUES,
)
def test_commands_over_damaged_directories_end_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory,
    samples: dict[str, Path],
    sample: str,
    seed: int,
    target: str,
    command: tuple[click.Command, list[str]],
    new: Any,
) -> None:
    source = random.Random(seed)
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(samples[sample], folder / "d")
    file = folder / "d" / target
    if target == "manifest.json" and source.random() < 0.7:
        value = json.loads(file.read_text())
        paths = list(places(value))
        text = json.dumps(changed(value, source.choice(paths), new, source.choice(["replace", "remove", "double"])))
        file.write_text(text)
    else:
        data = bytearray(file.read_bytes())
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        file.write_bytes(bytes(data[: source.choice([len(data), source.randrange(len(data))])]))
    arguments = [str(folder / "out") if argument == "OUT" else argument for argument in command[1]]
    result = CliRunner().invoke(command[0], [str(folder / "d"), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1)
    told = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in told)
    assert bool(told) == (result.exit_code == 1)
    if command[0] is not verify_command:
        assert len(told) <= 1
        if result.exit_code == 1:
            assert result.stdout == ""
            assert not (folder / "out" / "manifest.json").exists()
    if result.exit_code == 0 and target != "manifest.json" and command[0] is verify_command:
        raise AssertionError("a flipped bit was not seen")


def test_the_samples_are_whole(samples: dict[str, Path]) -> None:
    """Else the tests above would pass by refusing everything."""
    for path in samples.values():
        assert verify_directory(path) == []
        directory = ShardDirectory.open(path)
        for index in range(len(directory)):
            touch_all(directory.verified_shard(index))
