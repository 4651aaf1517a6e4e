"""The causes for which readers leave something out."""

from typing import Final

#: The rest of a unit that turned out damaged.
DAMAGED: Final = "damaged file"
#: Rows, each of these.
NO_UTF8: Final = "no UTF-8"
NO_TEXT: Final = "no text"
NO_JSON: Final = "no JSON object"
BAD_ID: Final = "unusable id"
