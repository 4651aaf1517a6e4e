"""Scheme `bpe`: the tokens of any Hugging Face tokenizer as patches, to compare with tokenized models.

Needs `blt-patcher[bpe]` to patch; naming and reading such a scheme does not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError
from blt_data.framing import FRAME_TOKENS
from blt_patcher.rules import FlagScheme

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Bytes of documents tokenized at once; a tokenizer's record of its work is many times as large.
_BATCH_BYTES: Final = 1 << 20

#: Bytes that are no UTF-8, as Python's `surrogateescape` decodes them.
_ESCAPED: Final = re.compile("[\udc80-\udcff]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class BpeScheme(FlagScheme):
    """A patch for each token of a tokenizer.

    - A patch starts at the first byte of every token. A character that several tokens make up (of a byte-level
      tokenizer) is not cut: those that begin within it start nothing. What no token covers, such as white space that
      some tokenizers leave out, belongs to the patch before it.
    - Tokens are those of the document's text alone: the tokenizer adds none, does not cut, does not pad, and drops
      nothing at random, whatever its file says. Text that looks like a special token is tokenized like one.
    - A byte that is no UTF-8 is a patch, and the texts on both sides of it are tokenized by themselves.
    - BOS and EOS are patches of their own.

    Not incremental: what comes later may join or part the tokens before.
    """

    name: ClassVar[str] = "bpe"

    tokenizer: str
    """SHA-256 of the tokenizer's JSON file, in hexadecimal digits."""

    tokenizer_json: str | None = field(default=None, repr=False, compare=False, metadata={"json": False})
    """The file's text; None in a scheme that came from JSON, which says how a shard was made but cannot patch."""

    def __post_init__(self) -> None:
        super(BpeScheme, self).__post_init__()
        if not isinstance(self.tokenizer, str) or not re.fullmatch("[0-9a-f]{64}", self.tokenizer):
            raise InputError(
                f"tokenizer of scheme bpe is {self.tokenizer!r}; it must be the SHA-256 of a tokenizer file, which "
                "BpeScheme.from_file finds"
            )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, max_patch_length: int | None = None) -> BpeScheme:
        """Return the scheme of a tokenizer.

        Args:
            path: a JSON file of the `tokenizers` library, usually called `tokenizer.json`.
            max_patch_length: longest patch in tokens, if any.

        Raises:
            InputError: the file cannot be read, is no tokenizer, or the `tokenizers` library is not installed.
        """
        try:
            data = Path(path).read_bytes()
            text = data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a tokenizer's JSON ({error}); name another file") from error
        try:
            _load(text)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return cls(tokenizer=hashlib.sha256(data).hexdigest(), tokenizer_json=text, max_patch_length=max_patch_length)

    def starts(
        self, content: npt.NDArray[np.uint8], entropies: npt.NDArray[np.float16] | None
    ) -> npt.NDArray[np.bool_]:
        """Return which framed tokens of one document start a patch; see `FlagScheme.starts`."""
        return self.flags(content, np.array([0, content.size], dtype=np.int64), entropies)

    def flags(
        self,
        content: npt.NDArray[np.uint8],
        content_offsets: npt.NDArray[np.int64],
        entropies: npt.NDArray[np.float16] | None,
    ) -> npt.NDArray[np.bool_]:
        """Return which framed tokens start a patch, bool [N + 2D]; see `FlagScheme.flags`.

        Raises:
            InputError: the scheme came from JSON without its file, or the `tokenizers` library is not installed.
        """
        if self.tokenizer_json is None:
            raise InputError(
                f"scheme bpe knows its tokenizer by fingerprint alone ({self.tokenizer[:12]}…); name the file "
                "(--scheme bpe --tokenizer FILE, or BpeScheme.from_file)"
            )
        tokenizer = _load(self.tokenizer_json)
        documents = content_offsets.size - 1
        flags = np.zeros(int(content_offsets[-1] - content_offsets[0]) + FRAME_TOKENS * documents, dtype=np.bool_)
        for first, end in _batches(content_offsets):
            texts: list[_Text] = []
            for document in range(first, end):
                low, high = int(content_offsets[document]), int(content_offsets[document + 1])
                place = low - int(content_offsets[0]) + FRAME_TOKENS * document
                flags[[place, place + 1, place + high - low + 1]] = True
                texts += _texts(content[low:high].tobytes(), place + 1, flags)
            encodings = tokenizer.encode_batch([text.text for text in texts], add_special_tokens=False)
            for text, encoding in zip(texts, encodings, strict=True):
                spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
                characters = spans[spans[:, 1] > spans[:, 0], 0]
                flags[text.place + text.byte_of_character[characters]] = True
        return flags


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """A stretch of valid UTF-8 in a document."""

    text: str
    """The characters, at least one."""

    place: int
    """Index of the first one's framed token."""

    byte_of_character: npt.NDArray[np.int64]
    """int64 [characters] where each one begins, in bytes from the first."""


def _batches(content_offsets: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut the documents into runs that begin within the same so many bytes."""
    groups = (content_offsets[:-1] - content_offsets[0]) // _BATCH_BYTES
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), groups.size]
    return itertools.pairwise(edges)


def _texts(content: bytes, place: int, flags: npt.NDArray[np.bool_]) -> list[_Text]:
    """Return the stretches of valid UTF-8 of a document, and flag each other byte and what follows it.

    Args:
        content: the document.
        place: index of its first byte in `flags`.
        flags: bool, by framed token, written.
    """
    decoded = content.decode(errors="surrogateescape")
    points = np.frombuffer(decoded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    escaped = (points >= 0xDC80) & (points <= 0xDCFF)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    sizes[escaped] = 1
    begins = np.cumsum(sizes) - sizes
    broken = begins[escaped]
    flags[place + broken] = True
    flags[place + broken + 1] = True
    texts = []
    first = 0
    for match in [*_ESCAPED.finditer(decoded), None]:
        end = len(decoded) if match is None else match.start()
        if end > first:
            begin = int(begins[first])
            texts.append(
                _Text(text=decoded[first:end], place=place + begin, byte_of_character=begins[first:end] - begin)
            )
        first = 0 if match is None else match.end()
    return texts


@lru_cache(maxsize=4)
def _load(text: str) -> Tokenizer:
    """Return a tokenizer that does nothing but cut text, the same each time.

    Args:
        text: a tokenizer's JSON.

    Raises:
        InputError: it is none, or the library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise InputError(f"scheme bpe needs {error.name}; pip install 'blt-patcher[bpe]'") from error
    try:
        values: dict[str, Any] = json.loads(text)
        values["truncation"] = values["padding"] = None
        if values["model"].get("dropout") is not None:
            values["model"]["dropout"] = None
        return Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # the library raises nothing more special
        raise InputError(f"holds no tokenizer that can be loaded ({error}); name a tokenizer.json") from error
