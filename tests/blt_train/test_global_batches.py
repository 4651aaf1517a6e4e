"""Global batches are the same for every number of ranks and loader threads, over two epochs, whatever the data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.blt_train.samples import blt_config, sequence_rows, text_documents, write_documents, write_patched

from blt_data.shards import ShardDirectory
from blt_patcher import EntropyScheme, SpaceScheme, scheme_to_json
from blt_train import ConfigError, load_config
from blt_train.config_parsing import config_to_yaml
from blt_train.inputs import open_inputs
from blt_train.loader import Loader, Slice
from blt_train.sequences import SequenceStream

PER_STEP = 12
TOKENS = 96

DATA = {
    "single": ["data.train=web"],
    "grouped": ["data.train=web", "data.group_documents=9"],
    "mixture": ["data.train=null", "data.sources.web={train: web, weight: 3}", "data.sources.code={train: code}"],
    "grouped mixture": [
        "data.train=null",
        "data.group_documents=9",
        "data.sources.web={train: web, weight: 3}",
        "data.sources.code={train: code}",
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_patched(root / "web", text_documents(24, seed=1), num_shards=5)
    write_patched(root / "code", text_documents(9, seed=2), num_shards=3)
    return root


def stream_for(data: Path, overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> SequenceStream:
    monkeypatch.chdir(data)
    config = blt_config(data, "run", f"data.sequence_tokens={TOKENS}", *overrides)
    return open_inputs(config, verify=False).open_stream()


def steps_of_two_epochs(stream: SequenceStream) -> int:
    """Steps until every source has been read twice."""
    step = 0
    while min(item.epoch for item in stream.figures(step * PER_STEP, PER_STEP).sources.values()) < 2:
        step += 1
    return step + 1


def hashes(stream: SequenceStream, steps: int, *, world_size: int, per_micro_batch: int, workers: int) -> list[str]:
    """The hash of each step's global batch, put together from what the ranks read."""
    batches = [[b""] * PER_STEP for _ in range(steps)]
    for rank in range(world_size):
        part = Slice(
            sequences_per_step=PER_STEP,
            sequences_per_micro_batch=per_micro_batch,
            rank=rank,
            world_size=world_size,
        )
        with Loader(stream, part, first_step=0, end_step=steps, workers=workers, prefetch=3) as loader:
            tasks = [(step, micro_batch) for step in range(steps) for micro_batch in range(part.micro_batches)]
            for (step, micro_batch), batch in zip(tasks, loader, strict=True):
                first = part.sequences(step, micro_batch).start - step * PER_STEP
                batches[step][first : first + per_micro_batch] = sequence_rows(batch, TOKENS)
    assert all(row for rows in batches for row in rows)
    return [hashlib.sha256(b"".join(rows)).hexdigest() for rows in batches]


@pytest.mark.parametrize("name", DATA)
def test_ranks_and_threads_do_not_matter(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_for(data, DATA[name], monkeypatch)
    steps = steps_of_two_epochs(stream)
    expected = hashes(stream, steps, world_size=1, per_micro_batch=PER_STEP, workers=0)
    assert len(set(expected)) == steps
    for world_size in (1, 2, 3, 4):
        for workers in (0, 2):
            # Every rank opens the data for itself.
            stream = stream_for(data, DATA[name], monkeypatch)
            per_micro_batch = {1: 4, 2: 3, 3: 2, 4: 1}[world_size]
            found = hashes(stream, steps, world_size=world_size, per_micro_batch=per_micro_batch, workers=workers)
            assert found == expected, (world_size, workers)


def test_data_decide_the_batches(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, overrides in (*DATA.items(), ("seed", [*DATA["single"], "seed=1"])):
        stream = stream_for(data, overrides, monkeypatch)
        found[name] = hashes(stream, 3, world_size=1, per_micro_batch=PER_STEP, workers=0)[2]
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("tokens", [2048, 8192])
def test_utilisation_of_text_as_long_as_fineweb(tmp_path: Path, tokens: int) -> None:
    # Lengths of FineWeb-Edu's documents: log-normal, half of them below 3 kB, 5 kB on average; patches of 4.5 bytes.
    generator = np.random.default_rng(0)
    sizes = np.minimum(generator.lognormal(np.log(3000), 1.0, size=600).astype(int), 200_000)
    documents = [generator.integers(32, 127, size, dtype=np.uint8).tobytes() for size in sizes]
    entropies = [generator.exponential(size=size + 2).astype(np.float16) for size in sizes]
    write_patched(tmp_path / "patched", documents, EntropyScheme(threshold=np.log(4.5)), entropies=entropies)
    inputs = open_inputs(blt_config(tmp_path, "run", f"data.sequence_tokens={tokens}"), verify=False)
    stream = inputs.open_stream()
    figures = stream.figures(0, stream.sequences(0, 1)[0][0].num_sequences)
    assert figures.epoch == 1
    assert figures.bytes == sizes.sum()
    assert figures.utilisation >= 0.95
    # And the capacity of patches is not bought with patches that nobody uses.
    assert figures.patches / (figures.capacity_tokens / tokens * inputs.capacity.patches) > 0.85


def test_sources_that_do_not_fit_each_other(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    write_patched(tmp_path / "other", text_documents(4), SpaceScheme(max_patch_length=3))
    write_documents(tmp_path / "bytes", text_documents(4))
    mixture = ["data.train=null", "data.sources.web={train: web}"]

    def refused(match: str, *overrides: str) -> None:
        with pytest.raises(ConfigError, match=match):
            open_inputs(blt_config(data, "run", *mixture, *overrides), verify=False)

    refused("other: was patched with another scheme than web", f"data.sources.b={{train: {tmp_path}/other}}")
    refused(
        "other: was patched with another scheme than web", f"data.sources.b={{train: web, holdout: {tmp_path}/other}}"
    )
    with pytest.raises(ValueError, match="bytes: holds shards of kind bytes, needed is kind patched"):
        open_inputs(blt_config(data, "run", *mixture, f"data.sources.b={{train: {tmp_path}/bytes}}"), verify=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources.a={train: x}"], "data.train is 'd', but there are data.sources too"),
        (["data.train=null"], "data.train is missing"),
        (["data.train=null", "data.holdout=h", "data.sources.a={train: x}"], "data.holdout is 'h', but there are"),
        (
            ["data.train=null", "data.sources.a={train: x, weight: 0}"],
            "data.sources.a.weight must be a finite number above 0, not 0",
        ),
        (
            ["data.train=null", "data.sources.a={train: x, weight: .inf}"],
            "data.sources.a.weight must be a finite number above 0",
        ),
        (["data.train=null", "data.sources.a={}"], "data.sources.a.train is missing"),
        (["data.train=null", "data.sources.a=3"], "data.sources.a must be a mapping of keys, not 3"),
        (["data.train=null", "data.sources.a={train: x, wait: 1}"], "unknown key data.sources.a.wait; did you mean "),
        (["data.train=null", "data.sources={'a b': {train: x}}"], "a key of data.sources must be a name of letters"),
        (["data.workers=-1"], "data.workers must be at least 0"),
        (["data.group_documents=0"], "data.group_documents must be at least 1, not 0"),
    ],
)
def test_configs_of_data_that_are_wrong(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("debug-blt", ["run=r", "data.train=d", *overrides])
    assert message in str(caught.value)


def test_a_mixture_is_read_back_as_written(tmp_path: Path) -> None:
    config = load_config("debug-blt", ["run=r", *DATA["mixture"], "data.sources.code.holdout=h"])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.data.sources["web"].weight == 3
    changed = load_config(tmp_path / "config.yaml", ["data.sources.web.weight=2"])
    assert (changed.data.sources["web"].weight, changed.data.sources["code"].holdout) == (2, "h")


def test_state_of_the_data_names_what_decides_its_order(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    inputs = open_inputs(
        blt_config(data, "run", *DATA["grouped mixture"], "data.sources.web.holdout=code"), verify=False
    )
    state = inputs.data_state()
    assert state["kind"] == "patched"
    assert list(state["sources"]) == ["code", "web"]
    fingerprint = ShardDirectory.open("web").manifest.fingerprint()
    web = state["sources"]["web"]
    assert (web["fingerprint"], web["weight"], web["group_documents"]) == (fingerprint, 0.75, 9)
    assert web["provenance"]["scheme"] == scheme_to_json(SpaceScheme())
    assert state["sources"]["code"]["group_documents"] is None
    assert list(inputs.holdouts) == ["web"]
    single = open_inputs(blt_config(data, "run", "data.train=web", "data.holdout=code"), verify=False)
    assert list(single.data_state()["sources"]) == ["train"]
    assert list(single.holdouts) == ["holdout"]
