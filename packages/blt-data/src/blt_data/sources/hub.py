"""Datasets on the hub: listed once at a pinned commit, read over HTTP by the hub's own client.

The endpoint is the client's (`HF_ENDPOINT`), and so is the token (`HF_TOKEN`, or that of `hf auth login`), which is
sent to the hub and to nobody else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import quote

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # exported, but not by its stubs

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
from blt_data.sources.globs import compile_glob, fixed_prefix, has_magic
from blt_data.sources.retrying import (
    ByteStream,
    RemoteError,
    RetryingFile,
    TemporaryError,
    temporary_status,
    with_retries,
)

T = TypeVar("T")

PREFIX: Final = "hf://datasets/"

_REVISION: Final = r"refs/(?:convert/[^/]+|pr/\d+)|[^/]+"
_PATH: Final = re.compile(rf"([^/@]+/[^/@]+)(?:@({_REVISION}))?(?:/(.*))?")

#: Bytes that are rather read and thrown away than skipped by another request.
_SKIP_BYTES: Final = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class HubPath:
    """Files of a dataset on the hub."""

    dataset: str
    """OWNER/NAME."""
    path: str = ""
    """Path or glob in the repository; nothing means all of it."""
    revision: str | None = None
    """Branch, tag or commit; None is the main branch."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.dataset}{revision}{f'/{self.path}' if self.path else ''}"


def parse_hub_url(url: str) -> HubPath:
    """Return what an `hf://` URL names.

    Args:
        url: `hf://datasets/OWNER/NAME[@REVISION][/PATH]`.

    Raises:
        InputError: it is anything else.
    """
    match = _PATH.fullmatch(url.removeprefix(PREFIX)) if url.startswith(PREFIX) else None
    if match is None:
        raise InputError(f"{url}: is no dataset of the hub; write hf://datasets/OWNER/NAME[@REVISION]/PATH")
    revision = match[2].replace("%2F", "/") if match[2] else None
    return HubPath(dataset=match[1], revision=revision, path=(match[3] or "").strip("/"))


def hub_source(where: HubPath, *, name: str | None, kind: Format | None) -> Source:
    """List the files of a dataset, at the commit that its revision is now.

    Args:
        where: the dataset, and which of its files.
        name: what the source is called; None takes the dataset's name.
        kind: format of all files, or None to go by their names.

    Raises:
        InputError: there is no such dataset, revision or file, or it may not be read.
        RemoteError: the hub does not answer.
    """
    commit = _commit_of(where)
    found = _listing(where, commit)
    files, others = list[SourceFile](), list[_Entry]()
    whole_directory = not has_magic(where.path) and not (len(found) == 1 and found[0].path == where.path)
    base = where.path if whole_directory else fixed_prefix(where.path)
    for entry in found:
        relative = entry.path.removeprefix(f"{base}/") if base else entry.path
        check_name(relative, entry.path)
        recognised = format_of(entry.path, kind) if whole_directory else format_of_named(entry.path, kind)
        if recognised is None:
            others.append(entry)
            continue
        files.append(
            SourceFile(
                location=str(HubPath(dataset=where.dataset, path=entry.path, revision=commit)),
                relative=relative,
                format=recognised[0],
                compression=recognised[1],
                size=entry.size,
                version=entry.version,
            )
        )
    if not files:
        raise InputError(f"{where}: holds no {RECOGNISED}; name files of other names by a glob")
    origin = {"dataset": where.dataset, "path": where.path, "revision": where.revision or "main", "commit": commit}
    return Source(
        name=name or where.dataset.split("/")[1],
        files=in_order(files),
        origin=origin,
        skipped=unrecognised(len(others), sum(entry.size for entry in others)),
    )


def _commit_of(where: HubPath) -> str:
    """Return the commit that a revision is now."""
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = _ask(
        lambda: HfApi().dataset_info(where.dataset, revision=where.revision, expand=["sha"], timeout=timeout), where
    )
    if info.sha is None:
        raise RemoteError(f"{where}: the hub does not tell its commit; run the same command again")
    return info.sha


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A file of a listing."""

    path: str
    size: int
    version: str
    """SHA-256 of a large file, git's object id of another."""


def _listing(where: HubPath, commit: str) -> list[_Entry]:
    """Return the files that a path, a directory or a glob names.

    Raises:
        InputError: there is none.
    """
    matches = compile_glob(where.path)
    whole = not has_magic(where.path)
    # A file is found in the listing of its directory; so one listing serves, whatever the path turns out to be.
    found = [
        entry
        for entry in _tree(where, commit, fixed_prefix(where.path))
        if matches.fullmatch(entry.path) or (whole and (not where.path or entry.path.startswith(f"{where.path}/")))
    ]
    if not found:
        what = "file matches this glob" if not whole else "such file or directory is in the dataset"
        page = f"{constants.ENDPOINT}/datasets/{where.dataset}/tree/{commit}"
        raise InputError(f"{where}: no {what}; see {page}")
    return found


def _tree(where: HubPath, commit: str, folder: str) -> Iterator[_Entry]:
    """Yield all files under a folder, page by page.

    The client's own listing waits for ever for a server that says nothing, and begins anew when a page fails.
    """
    url: str | None = f"{constants.ENDPOINT}/api/datasets/{where.dataset}/tree/{commit}"
    url = f"{url}/{quote(folder, safe='')}?recursive=true" if folder else f"{url}?recursive=true"
    while url is not None:
        entries, url = _ask(partial(_page, url), where)
        for entry in entries:
            if entry["type"] == "file":
                version = entry["lfs"]["oid"] if entry.get("lfs") else entry["oid"]
                yield _Entry(path=entry["path"], size=entry["size"], version=version)


def _page(url: str) -> tuple[list[dict[str, Any]], str | None]:
    """Return the entries of one page, and where the next one is."""
    response = get_session().get(url, headers=build_hf_headers(), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    following = response.links.get("next", {}).get("url")
    # The token is for the hub alone.
    if following is not None and not following.startswith(f"{constants.ENDPOINT}/"):
        raise TemporaryError("the next page of the listing is said to be on another host")
    return response.json(), following


def _ask(request: Callable[[], T], where: HubPath) -> T:
    """Return the hub's answer, trying again when it is busy.

    Raises:
        InputError: its answer is no.
        RemoteError: it does not answer.
    """

    def attempt() -> T:
        try:
            return request()
        except HFValidationError as error:
            raise InputError(f"{where}: is no dataset of the hub; write hf://datasets/OWNER/NAME/PATH") from error
        except OfflineModeIsEnabled as error:
            raise _offline(str(where)) from error
        except HfHubHTTPError as error:
            raise _refusal(error.response.status_code, error.response.headers, str(where)) from error

    return with_retries(attempt, str(where))


def _offline(location: str) -> SetupError:
    return SetupError(f"{location}: HF_HUB_OFFLINE forbids to ask the hub; unset it, or name files on this machine")


def _refusal(status: int, headers: Any, location: str) -> Exception:
    """Return what to raise for an HTTP status that is no success."""
    temporary = temporary_status(status, headers)
    if temporary is not None:
        return temporary
    code = headers.get("X-Error-Code", "")
    if code == "GatedRepo" or status == 403:
        return SetupError(
            f"{location}: the hub does not let this account read it; accept the dataset's terms on its page and set "
            "HF_TOKEN"
        )
    if status == 401 or code == "RepoNotFound":
        return SetupError(
            f"{location}: there is no such dataset, or it is private; check its name, or set HF_TOKEN to a token that "
            "may read it"
        )
    if code == "RevisionNotFound":
        return SetupError(f"{location}: the dataset has no such revision; name a branch, a tag or a commit of it")
    if status == 404:
        return SetupError(f"{location}: the dataset has no such file or directory; check the path and --revision")
    return SetupError(f"{location}: the hub refuses to send it (HTTP status {status}); check the path and HF_TOKEN")


def open_hub_file(file: SourceFile) -> RetryingFile:
    """Open a file of the hub.

    Args:
        file: one that `hub_source` listed.
    """
    where = parse_hub_url(file.location)
    url = hf_hub_url(where.dataset, where.path, repo_type="dataset", revision=where.revision)
    return RetryingFile(file.location, file.size, lambda position: _HubStream(url, file, position))


class _HubStream(ByteStream):
    """One HTTP response with a file's bytes from a position on."""

    def __init__(self, url: str, file: SourceFile, position: int) -> None:
        self._stack = ExitStack()
        self._position = position
        self._rest = b""
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if position:
            headers["Range"] = f"bytes={position}-"
        try:
            # A redirect leads to another host, to which the client does not send the token on.
            response = self._stack.enter_context(
                get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            )
            if response.status_code == 200 and position:
                raise TemporaryError("the server does not send parts of files")
            if response.status_code not in (200, 206) and response.history:
                # The other host knows the signature in the link alone; the hub makes a new one at the next try.
                raise temporary_status(response.status_code, response.headers) or TemporaryError(
                    f"HTTP status {response.status_code} of {response.url.host}"
                )
            if response.status_code not in (200, 206):
                raise _refusal(response.status_code, response.headers, file.location)
            _check_total(response.headers, file)
            self._pieces: Iterator[bytes] = response.iter_raw()
        except OfflineModeIsEnabled as error:
            raise _offline(file.location) from error
        except BaseException:
            self._stack.close()
            raise

    def read(self, size: int, /) -> bytes:
        """Return the next bytes; none at the end, or where the connection was closed early."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        data, self._rest = self._rest[:size], self._rest[size:]
        self._position += len(data)
        return data

    def skip_to(self, position: int, /) -> bool:
        """Read on to a position not far ahead."""
        if not 0 <= position - self._position <= _SKIP_BYTES:
            return False
        while self._position < position:
            if not self.read(position - self._position):
                return False
        return True

    def close(self) -> None:
        """Give the connection back."""
        self._stack.close()


def _check_total(headers: Any, file: SourceFile) -> None:
    """Refuse a file that is not as long as it was listed.

    Raises:
        InputError: it is not.
    """
    total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    if total.isdigit() and int(total) != file.size:
        raise InputError(
            f"{file.location}: has {int(total):,} bytes where the listing says {file.size:,}; run the same command "
            "again, and if that does not help, tell the dataset's owner"
        )
