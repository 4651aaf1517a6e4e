"""Looking into shard directories: what they hold, by a sample that says how large it is."""

from blt_data.inspection.collect import Inspection, SampleDocument, inspect_directory
from blt_data.inspection.page import write_page
from blt_data.inspection.preview import escape_bytes
from blt_data.inspection.terminal import print_inspection

__all__ = [
    "Inspection",
    "SampleDocument",
    "escape_bytes",
    "inspect_directory",
    "print_inspection",
    "write_page",
]
