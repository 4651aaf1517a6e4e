"""Starting and resuming in a run directory: what may differ from the checkpoint, and what may not.

What decides the numbers (model, order of data, batch, optimizer, schedule, precision, seed, the data itself) must be
as it was; where and how fast it runs (device, processes, mesh, micro batch, threads, compile), what is evaluated and
kept, and where files lie may change.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blt_model import ModelError, from_json, to_json
from blt_model.weights.native import load_model, model_fingerprint, save_model
from blt_train.checkpoint import (
    FORMAT_VERSION,
    Model,
    RunDirectory,
    Section,
    TrainerState,
    load_section,
    read_trainer_state,
    resume_another,
)
from blt_train.config_parsing import config_from_mapping, config_to_mapping, config_to_yaml
from blt_train.errors import CheckpointError, ConfigError
from blt_train.files import publish_directory, replace_text
from blt_train.inputs import Inputs
from blt_train.metrics import truncate_metrics
from blt_train.parallel.building import empty_model
from blt_train.runtime import Runtime
from blt_train.samples import truncate_samples

log = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
ENTROPY_MODEL_NAME = "entropy-model"

#: Config keys that a resumed run must share with its checkpoint; a section stands for all its keys.
FIXED_KEYS = (
    "data.sequence_tokens",
    "data.sequence_patches",
    "data.sequence_documents",
    "batch.sequences_per_step",
    "optimizer",
    "schedule",
    "precision",
    "parallel.float8",
    "seed",
)

#: Keys of those sections that decide nothing but when training gives up.
FREE_KEYS = ("optimizer.max_nonfinite_steps",)


def prepare_run(run: RunDirectory, inputs: Inputs, *, resume: bool) -> None:
    """Make a run directory ready, on the first rank only: check, clean, write the config, cut the metrics.

    Args:
        run: locked by the caller.
        inputs: of the run.
        resume: False refuses a directory that has a checkpoint.

    Raises:
        CheckpointError: the run's checkpoint does not fit the inputs, or `resume` is False and there is one.
    """
    run.restore_latest()
    latest = run.latest()
    step = -1
    if latest is not None:
        if not resume:
            raise CheckpointError(f"{run.path}: already holds a run ({latest.name}); choose another run= or resume it")
        state = read_trainer_state(latest)
        check_resumable(latest, state, inputs)
        step = state.step
        log.info("resuming from %s", latest)
    run.clean()
    # A launch that was killed behind its last checkpoint had no time for it.
    run.retain(inputs.config.checkpoint)
    truncate_metrics(run.path, step)
    truncate_samples(run.path, step)
    replace_text(run.path / CONFIG_NAME, config_to_yaml(inputs.config))
    if inputs.entropy_model is not None:
        _keep_entropy_model(run.path / ENTROPY_MODEL_NAME, inputs)


def check_resumable(checkpoint: Path, state: TrainerState, inputs: Inputs) -> None:
    """Refuse a checkpoint that was made with another model, other data, or another config where that matters.

    Args:
        checkpoint: its directory, for messages.
        state: its `trainer.json`.
        inputs: of the run that would go on from it.

    Raises:
        CheckpointError: naming the first difference and the mend.
    """
    if state.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: was written by an earlier version of blt-train, which read the data in another order: it "
            "can be evaluated, exported and generated from, but not resumed; choose another run= to start anew"
        )
    mend = "set it back to resume, or choose another run= to start anew"
    present = to_json(inputs.architecture)
    try:
        saved = to_json(from_json(_read_json(checkpoint / "config.json")))
    except ModelError as error:
        reason = str(error).removesuffix(".")
        raise CheckpointError(f"{checkpoint / 'config.json'}: {reason}; {resume_another(checkpoint)}") from error
    if saved["architecture"] != present["architecture"]:
        raise CheckpointError(
            f"{checkpoint}: holds a model of architecture {saved['architecture']}, the config says "
            f"{present['architecture']}: {mend}"
        )
    _refuse_difference(checkpoint, "model: ", _flat(saved), _flat(present), mend)
    _refuse_other_data(checkpoint, state, inputs)
    fixed = [
        {key: value for key, value in _flat(config).items() if _is_fixed(key)}
        for config in (_with_defaults(state.config), config_to_mapping(inputs.config))
    ]
    _refuse_difference(checkpoint, "", fixed[0], fixed[1], mend)


def _with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a saved config with the keys that are new since it was saved, at the defaults that keep what was done."""
    try:
        return config_to_mapping(config_from_mapping(config))
    except ConfigError:
        # It holds what is no key any more; the comparison tells whether that matters.
        return config


def _refuse_other_data(checkpoint: Path, state: TrainerState, inputs: Inputs) -> None:
    """Raise the error that says in what the data differs from that of the checkpoint, if it does."""
    mend = "name the data that it was trained on, or choose another run= to start anew"
    saved, present = state.data, inputs.data_state()
    if saved["kind"] != present["kind"]:
        raise CheckpointError(
            f"{checkpoint}: was trained on {saved['kind']} shards, here they are {present['kind']} shards: {mend}"
        )
    if saved["sources"].keys() != present["sources"].keys():
        names = [", ".join(sorted(data["sources"])) for data in (saved, present)]
        raise CheckpointError(f"{checkpoint}: was trained on the sources {names[0]}, here they are {names[1]}: {mend}")
    for name, source in present["sources"].items():
        before = saved["sources"][name]
        where = inputs.sources[name].groups.directory.path
        for key in ("scheme", "entropy_model"):
            values = [item["provenance"].get(key) for item in (before, source)]
            if values[0] != values[1]:
                raise CheckpointError(
                    f"{checkpoint}: was trained on other data than {where}, of {_words(key)} {_short(values[0])} "
                    f"where here it is {_short(values[1])}: {mend}"
                )
        if before["fingerprint"] != source["fingerprint"]:
            raise CheckpointError(
                f"{checkpoint}: was trained on other data than {where} (fingerprint {before['fingerprint'][:12]}, here "
                f"{source['fingerprint'][:12]}): {mend}"
            )
        for key in sorted({*before, *source} - {"fingerprint", "provenance"}):
            if before.get(key) != source.get(key):
                raise CheckpointError(
                    f"{checkpoint}: was trained with the {_words(key)} {before.get(key)} of the source {name}, here it "
                    f"is {source.get(key)}: set it back to resume, or choose another run= to start anew"
                )


def _words(key: str) -> str:
    return key.replace("_", " ")


def _short(value: object) -> str:
    """Return a part of a provenance for a message."""
    if isinstance(value, Mapping) and isinstance(value.get("fingerprint"), str):
        return str(value["fingerprint"])[:12]
    return json.dumps(value)


def load_for_resume(checkpoint: Path, inputs: Inputs, runtime: Runtime) -> tuple[Model, TrainerState]:
    """Load a checkpoint's model, each rank the rows that it holds.

    Args:
        checkpoint: its directory, checked by `check_resumable`.
        inputs: of the run that goes on from it.
        runtime: this process's place.

    Returns:
        The model, ready to train, and the rest of the trainer's state.

    Raises:
        CheckpointError: the weights are damaged.
    """
    model, _ = empty_model(inputs.architecture, inputs.config, runtime.device, runtime.mesh)
    load_section(checkpoint, Section.MODEL, model.state_dict())
    return model, read_trainer_state(checkpoint)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is missing or damaged; {resume_another(path.parent)}") from error


def _is_fixed(key: str) -> bool:
    return key not in FREE_KEYS and any(key == fixed or key.startswith(fixed + ".") for fixed in FIXED_KEYS)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = prefix + key
        flat.update(_flat(value, name + ".") if isinstance(value, Mapping) else {name: value})
    return flat


def _refuse_difference(
    checkpoint: Path, what: str, saved: Mapping[str, Any], present: Mapping[str, Any], mend: str
) -> None:
    """Raise the error that names the first key in which two flat configs differ, if any."""
    for key in sorted({*saved, *present}):
        if saved.get(key) != present.get(key):
            raise CheckpointError(
                f"{checkpoint}: was trained with {what}{key} = {saved.get(key)!r}, the config says "
                f"{present.get(key)!r}: {mend}"
            )


def _keep_entropy_model(directory: Path, inputs: Inputs) -> None:
    """Copy the entropy model into the run, unless it is there, so that the run can generate on its own."""
    if inputs.entropy_model is None:
        return
    if (directory / "config.json").exists():
        present = load_model(directory)
        if model_fingerprint(present) == inputs.entropy_fingerprint:
            return
    temporary = directory.with_name(f".tmp-{directory.name}")
    if temporary.exists():
        shutil.rmtree(temporary)
    save_model(inputs.entropy_model, temporary)
    publish_directory(temporary, directory)
