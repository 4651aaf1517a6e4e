"""Shard directories that the tests of training read, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.blt_train.samples import text_documents, write_documents, write_patched


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bytes`, `bytes-holdout`, `patched` and `patched-holdout`; nobody writes to it."""
    root = tmp_path_factory.mktemp("corpus")
    train, holdout = text_documents(60, seed=1), text_documents(8, seed=2)
    write_documents(root / "bytes", train)
    write_documents(root / "bytes-holdout", holdout)
    write_patched(root / "patched", train)
    write_patched(root / "patched-holdout", holdout)
    return root


@pytest.fixture
def workplace(tmp_path: Path, corpus: Path) -> Path:
    """A folder of the test's own in which the corpus's directories can be found."""
    for directory in corpus.iterdir():
        (tmp_path / directory.name).symlink_to(directory)
    return tmp_path
