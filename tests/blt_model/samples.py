"""Random documents and patches for the tests of blt_model."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]


def framed_document(rng: np.random.Generator, num_bytes: int) -> Array:
    """BOS, random byte ids, EOS."""
    return np.concatenate([[1], rng.integers(4, 260, num_bytes), [2]])


def repetitive_document(rng: np.random.Generator, num_bytes: int) -> Array:
    """BOS, bytes of a three-letter alphabet (so that n-grams recur), EOS."""
    return np.concatenate([[1], rng.integers(100, 103, num_bytes), [2]])


def random_patches(rng: np.random.Generator, num_tokens: int, longest: int = 9) -> Array:
    """Patch lengths over num_tokens framed tokens; the first patch holds one."""
    lengths, left = [1], num_tokens - 1
    while left:
        lengths.append(min(left, int(rng.integers(1, longest + 1))))
        left -= lengths[-1]
    return np.array(lengths)
