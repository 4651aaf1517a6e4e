"""Files behind any URL that fsspec knows: object stores, HTTP, memory."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import fsspec
from fsspec.core import url_to_fs

from blt_data.errors import InputError, SetupError
from blt_data.sources.files import (
    RECOGNISED,
    Format,
    Source,
    SourceFile,
    check_name,
    format_of,
    format_of_named,
    in_order,
    unrecognised,
)
from blt_data.sources.globs import fixed_prefix, has_magic
from blt_data.sources.retrying import ByteStream, RetryingFile, TemporaryError, temporary_status, with_retries
from blt_data.sources.secrets import scrub

T = TypeVar("T")

#: Protocol to the package that fsspec needs for it.
_DRIVERS: Final[Mapping[str, str]] = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "adl": "adlfs",
    "oci": "ocifs",
    "oss": "ossfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
}

#: Names under which file systems tell what changes with a file's content, the surest first.
_VERSIONS: Final = (
    "ETag",
    "etag",
    "md5Hash",
    "md5",
    "checksum",
    "oid",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "modified",
    "updated",
    "created",
)

_BLOCK_BYTES: Final = 8 << 20


def remote_source(url: str, kind: Format | None) -> Source:
    """List the files behind a URL.

    Args:
        url: of a file, a directory, or a glob.
        kind: format of all files, or None to go by their names.

    Raises:
        InputError: there is nothing, it may not be read, or the file system's driver is not installed.
        RemoteError: the other side does not answer.
    """
    shown = scrub(url)
    system, path = _connect(url)
    entries, base, whole = _ask(lambda: _listing(system, path, shown), shown)
    files, others, other_bytes = list[SourceFile](), 0, 0
    before, after = _around(url, path)
    for name, entry in entries.items():
        relative = name.removeprefix(base).lstrip("/") if base else name.lstrip("/")
        check_name(relative, name)
        recognised = format_of(name, kind) if whole else format_of_named(name, kind)
        if recognised is None:
            others, other_bytes = others + 1, other_bytes + int(entry.get("size") or 0)
            continue
        if entry.get("size") is None:
            raise InputError(f"{shown}: the size of {relative} is not told; copy the files to this machine first")
        files.append(
            SourceFile(
                location=f"{before}{name}{after}",
                relative=relative,
                format=recognised[0],
                compression=recognised[1],
                size=int(entry["size"]),
                version=next((str(entry[key]) for key in _VERSIONS if entry.get(key) is not None), ""),
            )
        )
    if not files:
        raise InputError(f"{shown}: holds no {RECOGNISED}; name files of other names by a glob")
    title = posixpath.basename(base.rstrip("/")) if whole or len(files) > 1 else files[0].relative
    return Source(
        name=title or url.partition("://")[0],
        files=in_order(files),
        origin={"url": shown},
        skipped=unrecognised(others, other_bytes),
    )


def _listing(system: Any, path: str, shown: str) -> tuple[dict[str, dict[str, Any]], str, bool]:
    """Return path to details of the files, the directory they are relative to, and whether all of it was named.

    Raises:
        InputError: there is none.
    """
    # What another job of this process listed may have changed since.
    system.invalidate_cache()
    if has_magic(path):
        entries = {name: entry for name, entry in system.glob(path, detail=True).items() if entry["type"] == "file"}
        if not entries:
            raise InputError(f"{shown}: no file matches this glob; check it")
        return entries, fixed_prefix(path), False
    entry = system.info(path)
    if entry["type"] == "file":
        return {entry["name"]: entry}, posixpath.dirname(entry["name"]), False
    return system.find(path, detail=True), path, True


def _around(url: str, path: str) -> tuple[str, str]:
    """Return what stands before and after the path in a URL, to name the other files of the listing.

    Raises:
        InputError: the URL is of a kind that says nothing of the sort.
    """
    first, chain, rest = url.partition("::")
    stem = first.rstrip("/")
    if not stem.endswith(path.rstrip("/")):
        raise InputError(f"{scrub(url)}: fsspec lists no files behind such a URL; name the files by a plain URL")
    return stem.removesuffix(path.rstrip("/")), chain + rest


def _connect(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    Raises:
        SetupError: fsspec does not know it, or its driver is not installed.
    """
    protocol = url.partition("://")[0]
    shown = scrub(url)
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        package = _DRIVERS.get(protocol)
        mend = f"pip install {package}" if package else scrub(" ".join(str(error).split()))
        raise SetupError(f"{shown}: {protocol}:// needs a package that is not installed; {mend}") from None
    except ValueError as error:
        known = protocol in fsspec.available_protocols()
        problem = scrub(" ".join(str(error).split())) if known else f"{protocol}:// is no kind of URL that fsspec knows"
        raise SetupError(f"{shown}: {problem}; check the URL") from None
    return system, str(path)


def _ask(request: Callable[[], T], shown: str) -> T:
    def attempt() -> T:
        try:
            return request()
        except Exception as error:
            raise _judged(error, shown) from error

    return with_retries(attempt, shown)


def _judged(error: Exception, shown: str) -> Exception:
    """Return what to raise for a driver's error: bad input, or something temporary."""
    if isinstance(error, InputError | TemporaryError):
        return error
    if isinstance(error, FileNotFoundError):
        return SetupError(f"{shown}: there is no such file or directory; check the URL")
    reason = scrub(" ".join(str(error).split()) or type(error).__name__)
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__ or status in (401, 403):
        return SetupError(f"{shown}: may not be read ({reason}); set the credentials that its driver looks for")
    if isinstance(error, NotImplementedError | ImportError | IsADirectoryError | TypeError | ValueError):
        return SetupError(f"{shown}: cannot be read ({reason}); check the URL")
    if isinstance(status, int):
        return temporary_status(status, getattr(error, "headers", None) or {}) or SetupError(
            f"{shown}: the server refuses to send it (HTTP status {status}); check the URL"
        )
    return TemporaryError(reason)


def open_remote_file(file: SourceFile) -> RetryingFile:
    """Open a file behind a URL.

    Args:
        file: one that `remote_source` listed.
    """
    return RetryingFile(scrub(file.location), file.size, lambda position: _RemoteStream(file, position))


class _RemoteStream(ByteStream):
    """An open file of fsspec."""

    def __init__(self, file: SourceFile, position: int) -> None:
        self._shown = scrub(file.location)
        try:
            # The file system is kept: of an archive it holds the file that all is in.
            self._system, path = _connect(file.location)
            self._file = self._system.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")
        except Exception as error:
            raise _judged(error, self._shown) from error
        size = getattr(self._file, "size", None)
        if isinstance(size, int) and size != file.size:
            self._file.close()
            raise InputError(
                f"{self._shown}: has {size:,} bytes where it had {file.size:,} when it was listed; run the same "
                "command again"
            )
        self.skip_to(position)

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""
        try:
            return bytes(self._file.read(size))
        except Exception as error:
            raise _judged(error, self._shown) from error

    def skip_to(self, position: int, /) -> bool:
        """Go on at another position."""
        self._file.seek(position)
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
