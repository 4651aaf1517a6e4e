"""Keeping tokens and signatures out of messages and files."""

from __future__ import annotations

import os
import re
from typing import Final

_HUB_TOKEN: Final = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_USER_INFO: Final = re.compile(r"(?<=://)[^/\s@'\"]+:[^/\s@'\"]*@")
_QUERY: Final = re.compile(r"(?<=\?)[^\s'\"<>)]*(?:token|signature|credential|expires|key|policy)=[^\s'\"<>)]*", re.I)


def scrub(text: str) -> str:
    """Return a text without hub tokens, passwords in URLs, and signed query strings.

    Args:
        text: a message, perhaps of a library.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(name, "").strip()
        if token:
            text = text.replace(token, "***")
    text = _HUB_TOKEN.sub("***", text)
    return _QUERY.sub("…", _USER_INFO.sub("***@", text))
