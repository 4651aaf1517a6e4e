"""Training on a mixture: what the metrics say of its sources, resuming, and what a resume refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.blt_train.samples import assert_same_run, blt_config, text_documents, write_patched

from blt_train import CheckpointError, TrainConfig, train


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_patched(tmp_path / "web", text_documents(20, seed=1), num_shards=3)
    write_patched(tmp_path / "code", text_documents(8, seed=2, mean_words=15))
    write_patched(tmp_path / "code-holdout", text_documents(4, seed=3))
    return tmp_path


def config_of(place: Path, name: str, *overrides: str, weight: float = 3) -> TrainConfig:
    return blt_config(
        place,
        name,
        "data.train=null",
        f"data.sources.web={{train: {place / 'web'}, weight: {weight}}}",
        f"data.sources.code={{train: {place / 'code'}, holdout: {place / 'code-holdout'}}}",
        "data.sequence_tokens=64",
        "batch.sequences_per_step=8",
        "schedule.total_steps=6",
        "checkpoint.every=3",
        *overrides,
    )


def test_a_mixture_is_trained_on_and_resumed(place: Path) -> None:
    whole = train(config_of(place, "whole"))
    for step in whole.steps:
        assert step.sources is not None
        assert step.source_epochs is not None
        assert sum(step.sources.values()) == pytest.approx(1)
        # Two of eight sequences are of the smaller source, whose sequences are about as full as the other's.
        assert step.sources["code"] == pytest.approx(0.25, abs=0.08)
    last = whole.steps[-1].source_epochs
    assert last is not None
    # The small source has been read more than once, the large one has not.
    assert last["code"] > 1 > last["web"] > 0
    assert whole.evaluations
    part = train(config_of(place, "part"))
    assert part.is_finished
    (place / "part" / "latest").unlink()
    (place / "part" / "latest").symlink_to("checkpoints/step-00000003")
    # In another number of threads.
    again = config_of(place, "part", "data.workers=3", "data.prefetch=1")
    assert train(again).is_finished
    assert_same_run(place / "whole", place / "part")


def test_a_resume_refuses_another_mixture(place: Path) -> None:
    train(config_of(place, "run", "schedule.total_steps=3"))
    refusals = {
        "was trained with the weight 0.25 of the source code, here it is 0.5": config_of(place, "run", weight=1),
        "was trained with the group documents None of the source web, here it is 10": config_of(
            place, "run", "data.group_documents=10"
        ),
        "was trained on the sources code, web, here they are code, more, web": config_of(
            place, "run", f"data.sources.more={{train: {place / 'code'}}}"
        ),
        "was trained on other data than": config_of(place, "run", f"data.sources.web.train={place / 'code'}"),
    }
    for message, config in refusals.items():
        with pytest.raises(CheckpointError) as caught:
            train(config)
        assert message in str(caught.value)
    assert train(config_of(place, "run", "schedule.total_steps=3", weight=3)).is_finished
