"""Where patches begin in a text that grows, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from blt_model.errors import ModelError

Starts = npt.NDArray[np.bool_]


class NextPatch(Protocol):
    """A patch scheme, one token at a time."""

    def push(self, token_id: int, entropy: float) -> bool:
        """Take the next token of the framed document.

        Args:
            token_id: its id, BOS first.
            entropy: of the entropy model after it, in nats; nan where there is no entropy model.

        Returns:
            Whether the token after it starts a new patch.
        """
        ...

    def reset(self) -> None:
        """Begin a new document."""
        ...


NewPatcher: TypeAlias = Callable[[], NextPatch]
"""Makes a patcher for one text; texts of a batch patch independently."""


def push_all(patcher: NextPatch, tokens: Sequence[int], entropies: Sequence[float]) -> Starts:
    """Push the tokens of a text from its beginning.

    Args:
        patcher: at the beginning of a document.
        tokens: n ids, BOS first.
        entropies: after each of them, in nats; nan without entropy model.

    Returns:
        bool [n + 1] whether each token starts a patch, the one after the last included.

    Raises:
        ModelError: the first byte shall belong to the patch of BOS, which leaves the decoder without a patch to read.
    """
    starts = np.array([True, *map(patcher.push, tokens, entropies)])
    if not starts[1]:
        raise ModelError("the patch scheme put the first byte into the patch of BOS, which must be a patch by itself.")
    return starts
