"""From what the user names to an ordered list of source files."""

from __future__ import annotations

import glob
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from blt_data.errors import InputError
from blt_data.sample import PYTHON_STDLIB
from blt_data.sources.files import Format, Source
from blt_data.sources.local import glob_source, local_source, standard_library
from blt_data.sources.names import COLLECTIONS, collection_of
from blt_data.sources.secrets import scrub

if TYPE_CHECKING:
    from blt_data.sources.hub import HubPath

_URL: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


def resolve_source(
    source: str, *, revision: str | None = None, leave_out: Path | None = None, kind: Format | None = None
) -> Source:
    """Find the files of a source, sorted by their relative path; remote ones are listed here and nowhere else.

    What exists on this machine comes before a short name of the same spelling.

    Args:
        source: `python-stdlib`; a file, a directory (searched recursively; links to directories are not followed) or a
            glob; a short name such as `fineweb-edu/sample-10BT`; `hf://datasets/OWNER/NAME[@REVISION]/PATH`; or any
            URL that fsspec knows. A file named directly or by a glob is read as text if its name says nothing else.
        revision: branch, tag or commit of a dataset on the hub.
        leave_out: a directory whose files are never part of the source (the output).
        kind: format of all files, or None to go by their names.

    Raises:
        InputError: nothing is there, or nothing that can be read as documents.
        OSError: a directory cannot be listed; `RemoteError` if a remote one does not answer.
    """
    if not source:
        # An unset variable of a shell must not turn into the working directory.
        raise InputError(f"the source is an empty text; name a file, a directory, a quoted glob, or {PYTHON_STDLIB}")
    if _URL.match(source):
        return _at_url(source, revision, leave_out, kind)
    found = _on_this_machine(source, leave_out, kind)
    if found is not None:
        _refuse_revision(source, revision)
        return found
    named = collection_of(source)
    if named is None:
        raise InputError(
            f"{source}: no such file or directory{' and no file that matches' if glob.has_magic(source) else ''}; name "
            f"one, or a quoted glob, {PYTHON_STDLIB}, {', '.join(COLLECTIONS)}, or a URL such as "
            "hf://datasets/OWNER/NAME"
        )
    collection, pattern, name = named
    return replace(
        _on_the_hub(f"hf://datasets/{collection.dataset}/{pattern}", revision, name, kind),
        id_column=collection.id_column,
    )


def _on_this_machine(source: str, leave_out: Path | None, kind: Format | None) -> Source | None:
    if source == PYTHON_STDLIB:
        return standard_library()
    path = Path(source)
    if path.exists():
        return local_source(path, leave_out, kind)
    return glob_source(source, leave_out, kind) if glob.has_magic(source) else None


def _at_url(url: str, revision: str | None, leave_out: Path | None, kind: Format | None) -> Source:
    if url.startswith("hf://"):
        return _on_the_hub(url, revision, None, kind)
    _refuse_revision(url, revision)
    protocol, _, rest = url.partition("://")
    if protocol in ("file", "local"):
        # With `file://` a path is written as in a URL, where %20 is a space.
        found = _on_this_machine(unquote(rest.removeprefix("localhost")), leave_out, kind)
        if found is None:
            raise InputError(f"{url}: no such file or directory; check the path")
        return found
    _require("fsspec")
    from blt_data.sources.remote import remote_source

    return remote_source(url, kind)


def _on_the_hub(url: str, revision: str | None, name: str | None, kind: Format | None) -> Source:
    _require("huggingface_hub")
    from blt_data.sources.hub import hub_source, parse_hub_url

    where: HubPath = parse_hub_url(url)
    if revision is not None:
        if where.revision is not None and where.revision != revision:
            raise InputError(f"{url}: names a revision, and so does --revision {revision}; leave one out")
        where = replace(where, revision=revision)
    return hub_source(where, name=name, kind=kind)


def _refuse_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise InputError(
            f"{scrub(source)}: --revision {revision} is for datasets on the hub, and this is none; leave it out"
        )


def _require(package: str) -> None:
    try:
        __import__(package)
    except ModuleNotFoundError:
        raise InputError(
            f"reading from the network needs {package}, which is not installed; pip install 'blt-data[prepare]'"
        ) from None
