"""Text from models: with caches, exact, in batches; and by recomputation, to compare with."""

from blt_model.generation.engine import Event, Generator
from blt_model.generation.patching import NewPatcher, NextPatch
from blt_model.generation.requests import Completion, Finish, Request, SamplingOptions
from blt_model.generation.scoring import Score
from blt_model.generation.text import CharacterStream, decode_stream

__all__ = [
    "CharacterStream",
    "Completion",
    "Event",
    "Finish",
    "Generator",
    "NewPatcher",
    "NextPatch",
    "Request",
    "SamplingOptions",
    "Score",
    "decode_stream",
]
