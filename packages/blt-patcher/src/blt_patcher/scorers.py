"""What gives entropies, and how to make one elsewhere: none of this imports torch before it must."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError
from blt_data.openmp import spin_less

if TYPE_CHECKING:
    from blt_patcher.entropies import EntropyScorer


class ScorerIdentity(Protocol):
    """What provenance tells of a scorer."""

    @property
    def identity(self) -> dict[str, Any]:
        """The model's fingerprint and configuration, and where its contexts begin."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides on the last bits of the result besides the model."""


class Scorer(ScorerIdentity, Protocol):
    """What gives entropies; `entropies.EntropyScorer` does."""

    def score(
        self,
        content: npt.NDArray[np.uint8],
        content_offsets: npt.NDArray[np.int64],
        *,
        name: str = ...,
        advance: Callable[[int], None] | None = None,
    ) -> npt.NDArray[np.float16]:
        """Return float16 [N + 2D] nats after each framed token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownIdentity:
    """What provenance tells of a scorer that runs elsewhere."""

    identity: dict[str, Any]
    """See `ScorerIdentity`."""
    settings: dict[str, Any]
    """See `ScorerIdentity`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerSpec:
    """An entropy model and how to run it: picklable, so that every worker of a job can load the same scorer."""

    model: Path
    """A model directory, a checkpoint, or a training run, whose latest checkpoint is meant."""
    device: str | None = None
    """torch's name of a device; None takes a GPU if there is one."""
    window_tokens: int | None = None
    """Tokens that the model sees at once; None takes what suits the device."""
    precision: str | None = None
    """`float32`, `bfloat16` or `float16`; None takes what suits device and model."""
    compile: bool | None = None
    """Whether to compile the model; None does so on a GPU, but not in float16."""
    reset_at_newlines: bool = False
    """Start the model's context afresh at every newline token."""

    def load(self) -> EntropyScorer:
        """Load the model onto its device.

        Raises:
            InputError: there is no such model or device, or torch is not installed.
        """
        entropies = self._entropies()
        device = entropies.choose_device(self.device)
        scorer: EntropyScorer = entropies.EntropyScorer(
            entropies.load_entropy_model(self.model),
            device=device,
            window_tokens=self.window_tokens,
            precision=self.precision,
            compile=self.compile,
            reset_at_newlines=self.reset_at_newlines,
        )
        return scorer

    def describe(self, device: str) -> KnownIdentity:
        """Return what a scorer on a device tells of itself, without that device.

        Args:
            device: kind of device, `cpu` or `cuda`.

        Raises:
            InputError: there is no such model, or torch is not installed.
        """
        entropies = self._entropies()
        model = entropies.load_entropy_model(self.model)
        settings = entropies.scoring_settings(
            model,
            device,
            window_tokens=self.window_tokens,
            precision=self.precision,
            compile=self.compile,
        )
        return KnownIdentity(identity=entropies.scorer_identity(model, self.reset_at_newlines), settings=settings)

    def _entropies(self) -> Any:
        """Import the module that needs torch, once there is something to do with it."""
        if not self.model.is_dir():
            raise InputError(
                f"{self.model}: no such model directory; name one that blt-train wrote, such as RUN/latest"
            )
        spin_less()
        try:
            from blt_patcher import entropies
        except ModuleNotFoundError as error:
            raise InputError(f"entropies need {error.name}; pip install 'blt-patcher[entropy]'") from error
        return entropies


def check_same_scorer(here: ScorerIdentity, provenance: Mapping[str, Any], place: str) -> None:
    """Refuse a scorer that would not give what a job's provenance says.

    Args:
        here: the scorer that was loaded.
        provenance: of the shards to write.
        place: where it was loaded, for the message.

    Raises:
        InputError: the model or its settings differ.
    """
    for key, values in (("entropy_model", here.identity), ("entropy_settings", here.settings)):
        stated = provenance.get(key) or {}
        for name in values:
            if stated.get(name) != values[name]:
                raise InputError(
                    f"{place}: {key.replace('_', ' ')} has another {name} ({_brief(values[name])}) than where the job "
                    f"was started ({_brief(stated.get(name))}); give all workers the same model, packages and devices"
                )


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
