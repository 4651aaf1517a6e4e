"""Documents out of source files, in batches of columns; nothing altered, and nothing dropped but what is counted.

`read_unit(unit, reading, policy=…, advance=…)` yields `DocumentBatch`es in the file's order. Contents are exactly the
UTF-8 of the source. What cannot be read goes to the `ErrorPolicy` as an `InputError` that names file and row, counted
from 1 as editors do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from blt_data.documents import DocumentBatch
from blt_data.errors import InputError, SetupError
from blt_data.readers.arrow import read_arrow
from blt_data.readers.context import Advance, Context
from blt_data.readers.json_lines import read_json_lines
from blt_data.readers.opened import OpenParquet
from blt_data.readers.parquet import read_parquet
from blt_data.readers.reasons import DAMAGED
from blt_data.readers.text import read_python, read_text
from blt_data.reading import Reading, Unit
from blt_data.skips import ErrorPolicy
from blt_data.sources import Format

__all__ = ["Advance", "OpenParquet", "read_unit"]

_READERS: Final[Mapping[Format, Callable[[Context], Iterator[DocumentBatch]]]] = {
    Format.PARQUET: read_parquet,
    Format.ARROW: read_arrow,
    Format.JSON_LINES: read_json_lines,
    Format.TEXT: read_text,
    Format.PYTHON: read_python,
}


def read_unit(
    unit: Unit, reading: Reading, *, policy: ErrorPolicy, advance: Advance, opened: OpenParquet | None = None
) -> Iterator[DocumentBatch]:
    """Yield the documents of a unit in their order.

    A file that turns out damaged is left at that point: with `--on-error skip` the documents before stay, and the rest
    of the unit is counted, in bytes of the unit's weight.

    Args:
        unit: a file, or some row groups of a Parquet file.
        reading: names of the source and of its columns.
        policy: is handed every bad row and file; its `skips` count what is left out.
        advance: told of the unit's weight as it is consumed, also of what is skipped.
        opened: keeps a Parquet file open for the next unit; None opens and closes it here.

    Raises:
        SetupError: the file has no such column (`ColumnError`) or may not be read, whatever the policy says.
        InputError: the file is damaged, or holds something that is no document, and the policy says fail.
        OSError: the file cannot be read, now.
    """
    told = 0

    def tell(amount: int) -> None:
        nonlocal told
        # Headers and padding count too: in the end it is the unit's weight, whatever the format.
        amount = min(amount, unit.weight - told)
        told += amount
        advance(amount)

    context = Context(
        unit=unit,
        reading=reading,
        policy=policy,
        advance=tell,
        opened=OpenParquet() if opened is None else opened,
    )
    try:
        yield from _READERS[unit.file.format](context)
        tell(unit.weight - told)
    except SetupError:
        raise
    except InputError as error:
        # With the policy fail, an error that it raised itself comes by here, and is raised again.
        policy.bad(error, DAMAGED, unit.weight - told)
        tell(unit.weight - told)
    finally:
        if opened is None:
            context.opened.close()
