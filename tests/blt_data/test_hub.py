"""The hub through its own client, against a server that speaks its API and fails as it does."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import blt_data.plan
from blt_data import InputError
from blt_data.errors import SetupError
from blt_data.skips import ErrorPolicy, OnError
from blt_data.sources import resolve_source, retrying
from blt_data.sources.retrying import ATTEMPTS, RemoteError
from blt_data.sources.secrets import scrub

from .corpora import HARD_TEXTS, read_documents
from .hub_server import Fault, Hub, Place, commit_of, serve
from .reading import Found, plan_of, read_plan, read_source

FINEWEB = "HuggingFaceFW/fineweb-edu"
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "fineweb-edu-sample"
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"


def fineweb_file(generator: np.random.Generator, name: str, rows: int) -> bytes:
    """Return a file with FineWeb-Edu's columns and types."""
    texts = [
        HARD_TEXTS[int(generator.integers(len(HARD_TEXTS)))] + generator.bytes(int(size)).hex()
        for size in generator.integers(0, 400, rows)
    ]
    table = pa.table(
        {
            "text": texts,
            "id": [f"<urn:uuid:{name}-{row}>" for row in range(rows)],
            "dump": ["CC-MAIN-2024-10"] * rows,
            "url": [f"https://example.org/{row}" for row in range(rows)],
            "file_path": ["s3://commoncrawl/x.warc.gz"] * rows,
            "language": ["en"] * rows,
            "language_score": generator.random(rows),
            "token_count": generator.integers(0, 999, rows),
            "score": generator.random(rows),
            "int_score": generator.integers(0, 5, rows),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=7, compression="zstd")
    return sink.getvalue()


def fineweb_layout() -> dict[str, bytes]:
    generator = np.random.default_rng(5)
    files = {f"sample/10BT/{index:03d}_00000.parquet": b"" for index in range(3)}
    files |= {f"sample/100BT/{index:03d}_00000.parquet": b"" for index in range(2)}
    files |= {f"data/CC-MAIN-2024-10/train-{index:05d}-of-00002.parquet": b"" for index in range(2)}
    files |= {"data/CC-MAIN-2013-20/train-00000-of-00001.parquet": b""}
    files = {path: fineweb_file(generator, path, 20) for path in files}
    return files | {"README.md": b"# FineWeb-Edu", ".gitattributes": b"*.parquet lfs"}


def expected(files: dict[str, bytes], prefix: str, source: str) -> list[Found]:
    """Return the documents of all files under a prefix, as pyarrow alone reads them."""
    found: list[Found] = []
    for path in sorted(path for path in files if path.startswith(prefix)):
        table = pq.read_table(io.BytesIO(files[path]), columns=["text", "id"]).to_pylist()
        for row, record in enumerate(table, start=1):
            found.append((source, path.removeprefix(prefix), row, record["id"], record["text"].encode()))
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.002)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = fineweb_layout()
    older = {**files, "sample/10BT/000_00000.parquet": fineweb_file(np.random.default_rng(9), "older", 9)}
    hub = Hub(
        dataset=FINEWEB,
        revisions={commit_of("new"): files, commit_of("old"): older},
        branches={"main": commit_of("new"), "v1.0": commit_of("old"), "refs/convert/parquet": commit_of("old")},
        page=2,
    )
    with serve(hub):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def files_of_hub(hub: Hub, commit: str = "new") -> dict[str, bytes]:
    return dict(hub.revisions[commit_of(commit)])


@pytest.mark.parametrize(
    ("source", "prefix"),
    [
        ("fineweb-edu/sample-10BT", "sample/10BT/"),
        ("fineweb-edu/sample-100BT", "sample/100BT/"),
        ("fineweb-edu/CC-MAIN-2024-10", "data/CC-MAIN-2024-10/"),
        ("fineweb-edu", "data/"),
        ("fineweb-edu/default", "data/"),
        (f"hf://datasets/{FINEWEB}/sample/10BT", "sample/10BT/"),
        (f"hf://datasets/{FINEWEB}/sample/10BT/", "sample/10BT/"),
        (f"hf://datasets/{FINEWEB}/sample/**/*.parquet", "sample/"),
        (f"hf://datasets/{FINEWEB}", ""),
    ],
)
def test_layout_of_fineweb_edu(hub: Hub, source: str, prefix: str) -> None:
    plan = plan_of(source)
    files = {path: data for path, data in files_of_hub(hub).items() if path.endswith(".parquet")}
    name = source if source.startswith("fineweb") else "fineweb-edu"
    assert read_plan(plan) == expected(files, prefix, name)
    origin = plan.sources[0].provenance()
    assert (origin["dataset"], origin["commit"]) == (FINEWEB, commit_of("new"))


def test_listed_once_whoever_reads(hub: Hub) -> None:
    plan = plan_of("fineweb-edu/sample-10BT", shard_bytes=100)
    assert len(plan.tasks) > 3
    pages, infos = len(hub.asked("tree")), len(hub.asked("info"))
    # Three files on pages of two.
    assert (infos, pages) == (1, 2)
    tasks = pickle.loads(pickle.dumps(plan.tasks))
    found = read_plan(replace(plan, tasks=tasks))
    assert found == expected(files_of_hub(hub), "sample/10BT/", "fineweb-edu/sample-10BT")
    assert (len(hub.asked("info")), len(hub.asked("tree"))) == (infos, pages)


def test_a_file_is_one_download_however_many_units_it_has(hub: Hub) -> None:
    plan = plan_of("fineweb-edu/sample-10BT", shard_bytes=1)
    assert sum(len(task.units) for task in plan.tasks) == 9
    before = len(hub.asked("cdn"))
    # Each footer is one request, whatever is in the file.
    assert before == 3
    read_plan(plan)
    assert len(hub.asked("cdn")) - before == 3


def test_a_single_file_and_a_file_of_any_name(hub: Hub) -> None:
    found = read_source(f"hf://datasets/{FINEWEB}/sample/10BT/001_00000.parquet")
    only = {"001_00000.parquet": files_of_hub(hub)["sample/10BT/001_00000.parquet"]}
    assert found == expected(only, "", "fineweb-edu")
    assert read_source(f"hf://datasets/{FINEWEB}/README.md") == [
        ("fineweb-edu", "README.md", 1, "README.md", b"# FineWeb-Edu")
    ]


def test_unrecognised_files_are_counted(hub: Hub) -> None:
    assert plan_of(f"hf://datasets/{FINEWEB}").skipped.to_json() == {
        "unrecognised file": {"count": 2, "bytes": len("# FineWeb-Edu*.parquet lfs")}
    }


@pytest.mark.parametrize("revision", ["v1.0", "refs/convert/parquet", commit_of("old")])
def test_revision_pins_a_commit(hub: Hub, revision: str) -> None:
    older = expected(files_of_hub(hub, "old"), "sample/10BT/", "fineweb-edu/sample-10BT")
    plan = plan_of("fineweb-edu/sample-10BT", revision=revision)
    assert read_plan(plan) == older
    origin = plan.sources[0].provenance()
    assert (origin["revision"], origin["commit"]) == (revision, commit_of("old"))
    in_url = read_source(f"hf://datasets/{FINEWEB}@{revision}/sample/10BT")
    assert [found[1:] for found in in_url] == [found[1:] for found in older]


def test_branch_that_moves_while_the_job_runs(hub: Hub) -> None:
    plan = plan_of("fineweb-edu/sample-10BT")
    hub.branches = {"main": commit_of("old")}
    assert read_plan(plan) == expected(files_of_hub(hub), "sample/10BT/", "fineweb-edu/sample-10BT")


@pytest.mark.parametrize(
    "fault",
    [
        Fault(place="info", status=429, retry_after="0"),
        Fault(place="info", status=503, times=3),
        Fault(place="info", stall=0.01),
        Fault(place="tree", status=504),
        Fault(place="tree", stall=0.01),
        Fault(place="resolve", status=429, retry_after="0", times=2),
        Fault(place="resolve", status=502),
        Fault(place="cdn", status=503, times=ATTEMPTS - 1),
        Fault(place="cdn", status=403),
        Fault(place="cdn", stall=0.01, times=2),
        Fault(place="cdn", cut_after=0, times=2),
        Fault(place="cdn", cut_after=1, times=3),
        Fault(place="cdn", cut_after=4000, times=9),
    ],
    ids=str,
)
def test_passing_trouble_changes_nothing(hub: Hub, fault: Fault) -> None:
    fault = replace(fault)
    hub.faults.append(fault)
    files = files_of_hub(hub)
    assert read_source("fineweb-edu/sample-10BT") == expected(files, "sample/10BT/", "fineweb-edu/sample-10BT")
    assert fault.times == 0


def test_busy_listing_is_asked_again(hub: Hub) -> None:
    hub.faults.append(Fault(place="tree", status=429, retry_after="0"))
    assert len(plan_of("fineweb-edu/sample-10BT").sources[0].source.files) == 3
    assert len(hub.asked("tree")) == 3


@pytest.mark.parametrize("place", ["info", "tree", "resolve", "cdn"])
def test_silence_is_not_waited_for(hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(huggingface_hub.constants, name, 0.2)
    hub.faults.append(Fault(place=place, stall=5))
    started = time.monotonic()
    assert len(read_source("fineweb-edu/sample-10BT")) == 60
    assert time.monotonic() - started < 4


def test_prepare_lists_once_for_all_workers(hub: Hub, tmp_path: Path) -> None:
    hub.token = TOKEN
    hub.faults += [Fault(place="cdn", cut_after=3000, times=2), Fault(place="resolve", status=429, retry_after="0")]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "blt_data.cli", "prepare", "--source", "fineweb-edu/sample-10BT", "--workers", "2"]
    command += ["--output", str(tmp_path / "out"), "--shard-size", "50kB", "--no-shuffle"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    assert "2 workers" in done.stderr
    documents = expected(files_of_hub(hub), "sample/10BT/", "")
    assert read_documents(tmp_path / "out") == [row[3:] for row in documents]
    assert (len(hub.asked("info")), len(hub.asked("tree"))) == (1, 2)
    assert TOKEN not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_every_cut_of_a_stream_is_mended(hub: Hub) -> None:
    """JSON lines are one long download; wherever it is cut, it goes on at the next byte."""
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in HARD_TEXTS)
    data = zstandard.compress(lines)
    hub.revisions = {commit_of("new"): {"a.jsonl.zst": data}}
    whole = read_source(f"hf://datasets/{FINEWEB}/a.jsonl.zst")
    assert [found[4].decode() for found in whole] == HARD_TEXTS
    for cut in range(0, len(data), max(1, len(data) // 40)):
        hub.faults = [Fault(place="cdn", cut_after=cut)]
        assert read_source(f"hf://datasets/{FINEWEB}/a.jsonl.zst") == whole
        if cut:
            assert hub.asked("cdn")[-1].range == f"bytes={cut}-"


@pytest.mark.parametrize("place", ["info", "resolve", "cdn"])
def test_lasting_trouble_is_told_in_one_sentence(hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    plan = plan_of("fineweb-edu/sample-10BT")
    hub.faults.append(Fault(place=place, status=503, times=10**6))
    for policy in (ErrorPolicy(), ErrorPolicy(OnError.SKIP)):
        with pytest.raises(RemoteError, match=rf"{ATTEMPTS} times in a row \(HTTP status 503\)") as caught:
            plan_of("fineweb-edu/sample-10BT") if place == "info" else read_plan(plan, policy)
        # Not the rows are bad: another attempt of the task may well succeed.
        assert not policy.skips
        assert "\n" not in str(caught.value)
        assert TOKEN not in str(caught.value)
        assert "s3cret" not in str(caught.value)


def test_the_server_says_how_long_to_wait(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    hub.faults += [
        Fault(place="resolve", status=429, retry_after="37"),
        Fault(place="resolve", status=503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
        Fault(place="cdn", status=429, retry_after="100000"),
        Fault(place="cdn", status=503, retry_after="soon"),
    ]
    assert read_source("fineweb-edu/sample-10BT")
    asked = sorted(pauses)
    assert len(asked) == 4
    assert 37 <= asked[2] <= 38
    assert retrying.LONGEST_ASKED <= asked[3] <= retrying.LONGEST_ASKED + 1
    assert asked[1] < 1


def test_pauses_grow_and_are_not_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 1.0)
    for _ in range(20):
        with pytest.raises(RemoteError, match="there: could not be read"):
            retrying.with_retries(lambda: 1 / 0, "there")
    rounds = np.array(pauses).reshape(20, ATTEMPTS - 1)
    doubled = 2.0 ** np.arange(ATTEMPTS - 1)
    assert (rounds >= 0.5 * doubled).all()
    assert (rounds <= 1.5 * doubled).all()
    assert (rounds.std(axis=0) > 0).all()


def test_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = TOKEN
    with pytest.raises(SetupError, match="accept the dataset's terms on its page and set HF_TOKEN"):
        plan_of("fineweb-edu/sample-10BT")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    plan = plan_of("fineweb-edu/sample-10BT")
    hub.requests.clear()
    files = files_of_hub(hub)
    assert read_plan(plan) == expected(files, "sample/10BT/", "fineweb-edu/sample-10BT")
    assert {request.authorization for request in hub.asked("resolve")} == {f"Bearer {TOKEN}"}
    assert {request.authorization for request in hub.asked("cdn")} == {None}
    assert TOKEN.encode() not in pickle.dumps(plan)
    assert TOKEN not in json.dumps(plan.sources[0].provenance())
    # A token that is withdrawn half-way is no damage of a file, whatever is done about damage.
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SetupError, match="set HF_TOKEN"):
        read_plan(plan, ErrorPolicy(OnError.SKIP))


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("hf://datasets/HuggingFaceFW/nothing", None, "there is no such dataset, or it is private"),
        ("fineweb-edu/sample-10BT", "v9", "has no such revision"),
        ("fineweb-edu/sample-11BT", None, r"did you mean fineweb-edu/sample-10BT\?"),
        ("fineweb-edu/data/*.parquet", None, "has no config.*it has default, sample-10BT.*CC-MAIN"),
        ("dclm-baseline-1.0/global-shard_11_of_10", None, "did you mean dclm-baseline-1.0/global-shard_"),
        (f"hf://datasets/{FINEWEB}/sample/1BT", None, "no such file or directory is in the dataset"),
        (f"hf://datasets/{FINEWEB}/none/x.parquet", None, "no such file or directory"),
        (f"hf://datasets/{FINEWEB}/sample/10BT/*.jsonl", None, "no file matches this glob"),
        (f"hf://datasets/{FINEWEB}@v1.0/sample", "main", "names a revision, and so does --revision main"),
        ("hf://datasets/squad", None, r"write hf://datasets/OWNER/NAME\[@REVISION\]/PATH"),
        ("hf://datasets/a..b/c--d/x", None, "is no dataset of the hub"),
        ("hf://openai/whisper", None, "is no dataset of the hub"),
        ("python-stdlib", "main", "--revision main is for datasets on the hub"),
        ("fineweb-eduu", None, "no such file or directory; name one.*fineweb-edu.*hf://datasets"),
    ],
)
def test_mistakes_are_told_in_one_sentence(hub: Hub, source: str, revision: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_source(source, revision=revision)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith((source.split("@")[0], "hf://datasets/HuggingFaceFW/fineweb-edu@v9/sample"))


def test_offline_mode_is_respected(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SetupError, match="HF_HUB_OFFLINE forbids"):
        resolve_source("fineweb-edu/sample-10BT")
    assert not hub.requests


def test_file_of_another_size_than_listed_is_refused(hub: Hub) -> None:
    plan = plan_of("fineweb-edu/sample-10BT")
    files = files_of_hub(hub)
    files["sample/10BT/001_00000.parquet"] += b"more"
    hub.revisions = {commit_of("new"): files}
    with pytest.raises(InputError, match=r"001_00000.parquet: has [\d,]+ bytes where the listing says"):
        read_plan(plan)


def test_damaged_remote_footer(hub: Hub) -> None:
    files = files_of_hub(hub)
    files["sample/10BT/001_00000.parquet"] = files["sample/10BT/001_00000.parquet"][:-3]
    hub.revisions = {commit_of("new"): files}
    with pytest.raises(InputError, match=r"001_00000.parquet: is a damaged or truncated Parquet file"):
        plan_of("fineweb-edu/sample-10BT")
    plan = plan_of("fineweb-edu/sample-10BT", skip=True)
    bad = files.pop("sample/10BT/001_00000.parquet")
    assert plan.skipped.to_json() == {"damaged file": {"count": 1, "bytes": len(bad)}}
    assert read_plan(plan) == expected(files, "sample/10BT/", "fineweb-edu/sample-10BT")


def test_many_files_are_planned_without_their_footers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blt_data.plan, "_MOST_FOOTERS", 2)
    plan = plan_of("fineweb-edu/sample-10BT")
    assert not hub.asked("resolve")
    files = files_of_hub(hub)
    assert plan.weight == sum(len(data) for path, data in files.items() if path.startswith("sample/10BT/"))
    assert read_plan(plan) == expected(files, "sample/10BT/", "fineweb-edu/sample-10BT")


def test_layout_of_dclm(hub: Hub) -> None:
    """Shards of DCLM lack a final newline, and their ids are nested."""
    hub.dataset = "mlfoundations/dclm-baseline-1.0"
    files, documents = {}, []
    for shard in range(3):
        path = f"global-shard_0{1 + shard // 2}_of_10/local-shard_{shard}_of_10/shard_00000000_processed.jsonl.zst"
        records = [
            {"text": f"{text} {shard}", "url": "u", "metadata": {"WARC-Record-ID": f"<urn:uuid:{shard}-{row}>"}}
            for row, text in enumerate(HARD_TEXTS)
        ]
        files[path] = zstandard.compress(b"\n".join(json.dumps(record).encode() for record in records))
        documents += [(f"<urn:uuid:{shard}-{row}>", f"{text} {shard}".encode()) for row, text in enumerate(HARD_TEXTS)]
    hub.revisions = {commit_of("new"): files | {"README.md": b"x", "global-shard_01_of_10/notes.txt": b"no"}}
    found = read_source("dclm-baseline-1.0")
    assert [row[3:] for row in found] == documents
    first = read_source("dclm-baseline-1.0/global-shard_01_of_10")
    assert [row[3:] for row in first] == documents[: 2 * len(HARD_TEXTS)]
    assert {row[0] for row in first} == {"dclm-baseline-1.0/global-shard_01_of_10"}


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.blt_data.reading import plan_of, read_plan
plan = plan_of(sys.argv[2], shard_bytes=2000)
found = read_plan(plan)
print(len(plan.tasks), len(found), sum(len(row[4]) for row in found))
"""


def test_endpoint_and_token_of_the_environment(hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.token = TOKEN
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(repository), "fineweb-edu/sample-10BT"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    documents = expected(files_of_hub(hub), "sample/10BT/", "")
    tasks, count, size = map(int, done.stdout.split())
    assert tasks > 1
    assert (count, size) == (len(documents), sum(len(row[4]) for row in documents))
    assert TOKEN not in done.stdout + done.stderr
    assert len(hub.asked("info")) == 1


def test_messages_of_libraries_lose_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-old-style-token")
    text = (
        f"GET https://cdn.example/a?X-Amz-Signature=abc&Expires=1 with {TOKEN} and an-old-style-token "
        "s3://key:secret@host/b https://x.example/c?page=2"
    )
    assert scrub(text) == "GET https://cdn.example/a?… with *** and *** s3://***@host/b https://x.example/c?page=2"


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared with real data")
def test_real_text_arrives_as_pyarrow_reads_it(hub: Hub) -> None:
    files = {path.relative_to(SHARED).as_posix(): path.read_bytes() for path in SHARED.rglob("*.parquet")}
    hub.revisions = {commit_of("new"): files}
    hub.faults = [Fault(place="cdn", cut_after=1_000_000, times=3)]
    found = read_source("fineweb-edu/sample-10BT")
    assert found == expected(files, "sample/10BT/", "fineweb-edu/sample-10BT")
    assert len(found) == 3396
