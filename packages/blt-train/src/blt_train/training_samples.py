"""Text that the model writes while it is being trained: the same prompts every time, so that one sees it learn.

Generation needs whole weights on one rank. Where they are sharded, they are gathered to the first rank's CPU, tensor by
tensor; the first rank generates, on its GPU if there is room, and the others wait.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from blt_model import ByteLM, ModelError, Request, SamplingOptions
from blt_model.weights.streaming import build_model
from blt_patcher import scheme_from_json
from blt_train.checkpoint import Model
from blt_train.config import Precision
from blt_train.errors import ConfigError
from blt_train.generation import generator_of
from blt_train.inputs import Inputs
from blt_train.models import OpenedModel
from blt_train.parallel.compilation import uncompiled
from blt_train.parallel.rows import whole
from blt_train.runtime import Runtime
from blt_train.samples import Sample, sample_of

log = logging.getLogger(__name__)

#: Randomness of the draws: the likeliest byte alone soon repeats itself.
TEMPERATURE = 0.8
#: The gathered weights go to the GPU where so many times their bytes are free, for caches and the work itself.
_ROOM = 1.5


class TrainingSampler:
    """Continues a config's prompts with the model as it stands."""

    def __init__(self, inputs: Inputs, runtime: Runtime) -> None:
        """Find out how the model is to be run.

        Args:
            inputs: of the run.
            runtime: this process's place.

        Raises:
            ConfigError: there are prompts, but the run does not know the entropy model that makes patches.
        """
        self._inputs, self._runtime = inputs, runtime
        self._logging = inputs.config.logging
        self._scheme = None
        self._resets_at_newlines = False
        if not self._logging.samples:
            return
        provenance = inputs.directory.manifest.provenance
        if inputs.entropy_fingerprint is not None and inputs.entropy_model is None:
            raise ConfigError(
                "logging.samples needs the entropy model that made the patches: name its directory with "
                "entropy_model, or set logging.samples=[]"
            )
        scheme = provenance.get("scheme")
        if isinstance(scheme, dict):
            self._scheme = scheme_from_json(scheme)
        scored_by = provenance.get("entropy_model")
        self._resets_at_newlines = isinstance(scored_by, dict) and bool(scored_by.get("reset_at_newlines", False))

    def is_due(self, step: int, *, was_evaluated: bool) -> bool:
        """Return whether samples are taken after a step.

        Args:
            step: optimizer steps done.
            was_evaluated: an evaluation was due, too.
        """
        if not self._logging.samples:
            return False
        every = self._logging.sample_every
        is_last = step == self._inputs.config.schedule.total_steps
        return is_last or (was_evaluated if every is None else step > 0 and step % every == 0)

    def sample(self, model: Model, step: int) -> list[Sample]:
        """Continue all prompts; every rank calls it.

        Args:
            model: in training, perhaps sharded.
            step: optimizer steps done.

        Returns:
            A sample per prompt on the first rank, nothing on the others. Generation that fails is a warning.
        """
        with self._on_first_rank(model) as complete:
            samples: list[Sample] = []
            if complete is not None:
                try:
                    samples = self._generate(complete, step)
                except (ModelError, RuntimeError) as error:  # the GPU's memory among them
                    log.warning("no samples of step %d (%s); training goes on", step, " ".join(str(error).split()))
        self._runtime.barrier()
        return samples

    @contextlib.contextmanager
    def _on_first_rank(self, model: Model) -> Iterator[Model | None]:
        """Yield a model with whole weights on the first rank and None on the others."""
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            was_training = model.training
            model.eval()
            yield model if self._runtime.is_main else None
            model.train(was_training)
            return
        tensors: dict[str, Tensor] = {}
        dtype = torch.bfloat16 if self._inputs.config.precision is Precision.BFLOAT16 else torch.float32
        for name, parameter in model.named_parameters():
            tensor = whole(parameter)
            if self._runtime.is_main:
                tensors[name] = tensor.to("cpu", dtype)
        if not self._runtime.is_main:
            yield None
            return
        with torch.device("meta"):
            copy = build_model(self._inputs.architecture)
        copy.load_state_dict(tensors, assign=True)
        yield copy.eval().to(self._device_for(tensors))

    def _device_for(self, tensors: dict[str, Tensor]) -> torch.device:
        """Return the GPU if a copy of the weights fits it beside training's, else the CPU."""
        device = self._runtime.device
        if device.type != "cuda":
            return device
        needed = _ROOM * sum(tensor.nbytes for tensor in tensors.values())
        free, _ = torch.cuda.mem_get_info(device)
        return device if free > needed else torch.device("cpu")

    def _generate(self, model: Model, step: int) -> list[Sample]:
        device = next(model.parameters()).device
        prompts = self._logging.samples
        with self._entropy_model_on(device) as entropy_model, uncompiled(model):
            opened = OpenedModel(
                model=model,
                scheme=None if isinstance(model, ByteLM) else self._scheme,
                entropy_model=entropy_model,
                reset_at_newlines=self._resets_at_newlines,
                source=self._inputs.directory.path,
            )
            completions = generator_of(opened, rows=len(prompts)).generate(
                Request(
                    prompt=prompt.encode("utf-8"),
                    max_new_bytes=self._logging.sample_bytes,
                    sampling=SamplingOptions(temperature=TEMPERATURE, seed=index),
                )
                for index, prompt in enumerate(prompts)
            )
        return [
            sample_of(step, index, prompt, completion.content, str(completion.finish))
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    @contextlib.contextmanager
    def _entropy_model_on(self, device: torch.device) -> Iterator[ByteLM | None]:
        """Yield the entropy model on a device; afterwards it takes no room there."""
        model = None if self._scheme is None or not self._scheme.needs_entropies else self._inputs.entropy_model
        yield None if model is None else model.eval().to(device)
        if model is not None:
            model.to("cpu")
