"""Scheme `bpe`, with tokenizers trained here on text made here."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_patcher.shards import make_bytes
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from blt_data import ShardDirectory
from blt_data.errors import InputError
from blt_patcher import BpeScheme, patch_document, patch_documents, scheme_from_json, scheme_to_json
from blt_patcher.cli import main

WORDS = [
    "patch",
    "patches",
    "byte",
    "entropy",
    "größer",
    "Entropie",
    "日本語",
    "naïve",
    "the",
    "then",
    "12",
    "1234",
    "🙂",
]


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(41)
    return [" ".join(rng.choice(WORDS, 9)) + "." for _ in range(count)]


def train(kind: str) -> Tokenizer:
    """A small tokenizer of one of three sorts; all have more in their files than cutting text needs."""
    trainer: trainers.Trainer
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE(dropout=0.5))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "word-piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=100, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(sentences(300), trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    return tokenizer


@pytest.fixture(scope="module", params=["byte-level", "word-piece", "unigram"])
def tokenizer_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(request.param).save(str(path))
    return path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> BpeScheme:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train("byte-level").save(str(path))
    return BpeScheme.from_file(path)


def plain_reading(path: Path) -> Tokenizer:
    """The tokenizer of a file without what has nothing to do with where tokens begin."""
    values = json.loads(path.read_text())
    values["model"].pop("dropout", None)
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def test_a_patch_for_each_token_of_text(tokenizer_file: Path) -> None:
    scheme, tokenizer = BpeScheme.from_file(tokenizer_file), plain_reading(tokenizer_file)
    for text in [*sentences(20), "größer 日本語🙂", "ﬁ ½ naı̈ve  \n\n  the", "unknown ʘ words", "a"]:
        lengths = patch_document(scheme, text.encode())
        starts = np.cumsum([0, *lengths]).tolist()
        # Character by character: where the bytes of each one begin among the framed tokens.
        places = [1 + len(text[:index].encode()) for index in range(len(text))]
        expected = {0, 1, len(text.encode()) + 1, len(text.encode()) + 2}
        expected |= {places[start] for start, end in tokenizer.encode(text).offsets if end > start}
        assert starts == sorted(expected)


def test_tokens_of_a_byte_level_tokenizer_are_the_patches_of_ascii(byte_level: BpeScheme) -> None:
    assert byte_level.tokenizer_json is not None
    values = json.loads(byte_level.tokenizer_json)
    values["model"]["dropout"] = values["truncation"] = values["padding"] = None
    tokenizer = Tokenizer.from_str(json.dumps(values))
    text = "the patches, then 1234 entropy <|end|> bytes"
    tokens = tokenizer.encode(text).tokens
    assert patch_document(byte_level, text.encode()).tolist() == [1, *map(len, tokens), 1]
    assert "<|end|>" in tokens


def test_characters_of_several_tokens_are_whole(byte_level: BpeScheme) -> None:
    # Characters that training never saw are several tokens of a byte each.
    lengths = patch_document(byte_level, "ʘ𝄞".encode()).tolist()
    assert lengths == [1, 2, 4, 1]


# Bytes at random, and text that breaks off within characters or holds an encoded surrogate.
PIECES = [b"the", b" ", b"\xff", b"\xe6\x97", "日".encode(), b"\xed\xa0\x80", b"\n"]
broken_texts = st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join))


@settings(max_examples=150, deadline=None)
@given(content=broken_texts)
def test_total_on_any_bytes(byte_level: BpeScheme, content: bytes) -> None:
    lengths = patch_document(byte_level, content)
    assert int(lengths.sum()) == len(content) + 2
    assert lengths[0] == lengths[-1] == 1
    starts = set(np.cumsum([0, *lengths]).tolist())
    # Valid stretches by Python's own decoder: a byte that is none stands alone.
    place = 0
    while place < len(content):
        try:
            content[place:].decode()
            break
        except UnicodeDecodeError as error:
            bad = range(place + error.start, place + error.end)
            assert {byte + 1 for byte in bad} | {byte + 2 for byte in bad} <= starts
            place += error.end
    # And nothing starts within a valid character.
    text = content.decode(errors="surrogateescape")
    begins = np.cumsum([0, *(len(char.encode(errors="surrogateescape")) for char in text)]) + 1
    assert starts <= {0, *begins.tolist(), len(content) + 2}


def test_documents_are_patched_alone_and_in_batches(byte_level: BpeScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [text.encode() for text in sentences(30)] + [b"", b"\xff", b"", b"x" * 300]
    content = np.frombuffer(b"ab" + b"".join(documents), np.uint8)
    offsets = np.cumsum([2, *map(len, documents)])
    for batch in (1, 100, 1 << 20):
        monkeypatch.setattr("blt_patcher.bpe._BATCH_BYTES", batch)
        patched = patch_documents(byte_level, content, offsets)
        for index, document in enumerate(documents):
            np.testing.assert_array_equal(patched.document(index), patch_document(byte_level, document))
    limited = BpeScheme(tokenizer=byte_level.tokenizer, tokenizer_json=byte_level.tokenizer_json, max_patch_length=2)
    for lengths, whole in zip(
        (patch_document(limited, document).tolist() for document in documents),
        (patch_document(byte_level, document).tolist() for document in documents),
        strict=True,
    ):
        assert lengths == [part for length in whole for part in [2] * (length // 2) + [1] * (length % 2)]


def test_the_json_form_names_the_tokenizer_by_its_fingerprint(tokenizer_file: Path) -> None:
    scheme = BpeScheme.from_file(tokenizer_file, max_patch_length=16)
    digest = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    values = scheme_to_json(scheme)
    assert values == {"scheme": "bpe", "version": 1, "max_patch_length": 16, "tokenizer": digest}
    again = scheme_from_json(values)
    assert again == scheme
    with pytest.raises(InputError, match="knows its tokenizer by fingerprint alone"):
        patch_document(again, b"text")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"{}", "holds no tokenizer that can be loaded"),
        (b"[1]", "holds no tokenizer that can be loaded"),
        (b"\xff", "cannot be read as a tokenizer's JSON"),
        (b'{"model": {"type": "Nonsense"}}', "holds no tokenizer that can be loaded"),
    ],
)
def test_files_that_hold_no_tokenizer_are_refused(data: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"tokenizer.json: {sentence}"):
        BpeScheme.from_file(path)
    with pytest.raises(InputError, match=r"missing\.json: cannot be read"):
        BpeScheme.from_file(tmp_path / "missing.json")
    with pytest.raises(InputError, match="must be the SHA-256"):
        BpeScheme(tokenizer="gpt2")


def test_precompute_on_the_command_line(tokenizer_file: Path, tmp_path: Path) -> None:
    make_bytes(tmp_path / "bytes")
    arguments = ["precompute", str(tmp_path / "bytes"), "--output", str(tmp_path / "out"), "--scheme", "bpe"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code != 0
    assert "scheme bpe needs --tokenizer" in refused.output
    done = CliRunner().invoke(main, [*arguments, "--tokenizer", str(tokenizer_file), "--max-patch-length", "9"])
    assert done.exit_code == 0, done.output
    directory = ShardDirectory.open(tmp_path / "out")
    provenance: dict[str, Any] = dict(directory.manifest.provenance)
    assert provenance["scheme"]["tokenizer"] == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    assert "tokenizers" in provenance["packages"]
    scheme = BpeScheme.from_file(tokenizer_file, max_patch_length=9)
    shard = directory.shard(0)
    for row in range(5):
        np.testing.assert_array_equal(shard.patch_lengths(row), patch_document(scheme, shard.content(row)))


def test_bytes_of_different_documents_do_not_meet(byte_level: BpeScheme) -> None:
    # The bytes of one character, a document each: none is text, whatever the neighbours.
    content = np.frombuffer("日".encode(), np.uint8)
    patched = patch_documents(byte_level, content, np.arange(4))
    assert [patched.lengths[low:high].tolist() for low, high in pairwise(patched.offsets)] == [[1, 1, 1]] * 3
