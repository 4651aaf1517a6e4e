"""Damaged and random files: documents or one sentence, never a traceback, whatever the policy."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blt_data import InputError
from blt_data.skips import ErrorPolicy, OnError

from .corpora import HARD_TEXTS
from .reading import Found, plan_of, read_plan

TEXTS = [text[:200] for text in HARD_TEXTS]
IDS = [f"{index}" for index in range(len(TEXTS))]


def table() -> pa.Table:
    return pa.table({"text": TEXTS, "id": IDS, "kind": pa.array(["a", "b"] * 7).dictionary_encode()})


def parquet(**options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(), sink, row_group_size=5, **options)
    return sink.getvalue()


def arrow(*, stream: bool, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table().schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table(), max_chunksize=5)
    return sink.getvalue()


LINES = b"\n".join(json.dumps({"text": text, "id": name}).encode() for text, name in zip(TEXTS, IDS, strict=True))
SEEDS = {
    "plain.parquet": parquet(),
    "zstd.parquet": parquet(compression="zstd", use_dictionary=False, write_page_checksum=True),
    "v2.parquet": parquet(data_page_version="2.0", column_encoding="DELTA_BYTE_ARRAY", use_dictionary=False),
    "file.arrow": arrow(stream=False),
    "zstd.arrow": arrow(stream=False, compression="zstd"),
    "stream.arrow": arrow(stream=True),
    "lz4.ipc": arrow(stream=True, compression="lz4"),
    "a.jsonl": LINES,
    "a.jsonl.zst": zstandard.compress(LINES),
}


def read_or_refuse(path: Path) -> None:
    """Read a file under both policies; the one sentence of the strict one has no line break and names the file."""
    policy = ErrorPolicy(OnError.SKIP)
    whole, refusal = attempt(path, ErrorPolicy())
    found, mistake = attempt(path, policy)
    for message in (refusal, mistake):
        assert "\n" not in message
        assert not message or str(path) in message
    # No policy lets a column that is not there pass, and nothing else ends a run that skips.
    assert not mistake or "column" in mistake
    if not mistake:
        assert bool(policy.skips) is bool(refusal)
        assert refusal or found == whole


def attempt(path: Path, policy: ErrorPolicy) -> tuple[list[Found], str]:
    """Return the documents of a file, or the sentence with which it is refused."""
    try:
        plan = plan_of(path, shard_bytes=100, skip=policy.on_error is OnError.SKIP)
        policy.skips.merge(plan.skipped)
        return read_plan(plan, policy), ""
    except InputError as error:
        return [], str(error)


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    kind = st.sampled_from(["flip", "set", "delete", "insert", "truncate", "word"])
    return draw(st.lists(st.tuples(kind, st.integers(0, 2**32), st.integers(0, 2**32)), min_size=1, max_size=4))


def mutate(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    changed = bytearray(data)
    for kind, where, what in changes:
        at = where % max(1, len(changed))
        if kind == "flip" and changed:
            changed[at] ^= 1 << what % 8
        elif kind == "set" and changed:
            changed[at] = what % 256
        elif kind == "delete":
            del changed[at : at + 1 + what % 8]
        elif kind == "insert":
            changed[at:at] = what.to_bytes(5, "little")
        elif kind == "truncate":
            del changed[at:]
        else:
            # The lengths and offsets of both formats are words.
            changed[at : at + 4] = what.to_bytes(5, "little")[:4]
    return bytes(changed)


@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=mutations())
def test_mutated_files(tmp_path: Path, name: str, changes: list[tuple[str, int, int]]) -> None:
    path = tmp_path / name
    path.write_bytes(mutate(SEEDS[name], changes))
    read_or_refuse(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.ipc", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), head=st.sampled_from([b"", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"{"]))
def test_random_bytes(tmp_path: Path, name: str, data: bytes, head: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(head + data + (b"PAR1" if head == b"PAR1" else b""))
    read_or_refuse(path)


@pytest.mark.parametrize("name", ["plain.parquet", "file.arrow", "stream.arrow", "a.jsonl.zst"])
def test_every_truncation_of_a_few(tmp_path: Path, name: str) -> None:
    data = SEEDS[name]
    path = tmp_path / name
    for length in random.sample(range(len(data)), 60):
        path.write_bytes(data[:length])
        read_or_refuse(path)
    path.write_bytes(data)
    assert [row[4].decode() for row in read_plan(plan_of(path))] == TEXTS


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "id", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.dictionaries(st.sampled_from(["text", "id", "x"]), json_values), max_size=4))
def test_any_json(tmp_path: Path, records: list[object]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8", errors="surrogatepass")
    read_or_refuse(path)
