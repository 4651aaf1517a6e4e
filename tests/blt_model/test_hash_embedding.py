"""Hash n-gram embeddings against Python's whole numbers."""

import dataclasses
from typing import Any

import pytest
import torch

from blt_model.config import HashEmbeddingConfig
from blt_model.hash_embedding import PRIMES, HashEmbedding, hash_rows

TOKENS = [1, 104, 105, 104, 105, 104, 2, 1, 259, 4, 104, 105, 104, 105]
POSITIONS = [*range(7), *range(7)]
CONFIG = HashEmbeddingConfig(ngram_sizes=(3, 1, 6), num_functions=2, table_size=101)


def expected_rows(config: HashEmbeddingConfig) -> list[list[int]]:
    rows = []
    for place, position in enumerate(POSITIONS):
        row: list[int] = []
        for function in range(config.num_functions):
            for n in config.ngram_sizes:
                # Oldest first; what lies before the document is id 0.
                gram = [
                    TOKENS[place - d] - (4 if config.raw_bytes else 0) if d <= position else 0
                    for d in reversed(range(n))
                ]
                if config.newest_first:
                    gram.reverse()
                total = sum(token * PRIMES[function] ** power for power, token in enumerate(gram))
                wrapped = (total + 2**63) % 2**64 - 2**63
                row.append(wrapped % config.table_size + len(row) * config.table_size)
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    "options", [{}, {"newest_first": True}, {"raw_bytes": True}, {"newest_first": True, "raw_bytes": True}]
)
def test_rows(options: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **options)
    assert hash_rows(torch.tensor(TOKENS), torch.tensor(POSITIONS), config).tolist() == expected_rows(config)


@pytest.mark.parametrize("omit_partial", [False, True])
def test_embedding_is_the_sum_of_its_rows(omit_partial: bool) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, omit_partial=omit_partial)
    embedding = HashEmbedding(config, 8).double()
    torch.nn.init.normal_(embedding.weight)
    result = embedding(torch.tensor(TOKENS), torch.tensor(POSITIONS))
    sizes = config.ngram_sizes * config.num_functions
    for place, row in enumerate(expected_rows(config)):
        kept = [r for r, n in zip(row, sizes, strict=True) if not omit_partial or n <= POSITIONS[place] + 1]
        torch.testing.assert_close(result[place], embedding.weight[kept].sum(0))
