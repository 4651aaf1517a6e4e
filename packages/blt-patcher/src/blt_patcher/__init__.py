"""Patching for byte-level language models: schemes, batch kernels and the byte-at-a-time form.

Importing this package needs NumPy and Numba, never torch; scoring documents with an entropy model is in
`blt_patcher.entropies` (`pip install 'blt-patcher[entropy]'`).
"""

from blt_patcher.boundaries import (
    PatchedDocuments,
    count_patches,
    patch_document,
    patch_documents,
    patch_lengths,
)
from blt_patcher.incremental import IncrementalPatcher
from blt_patcher.schemes import (
    LONGEST_PATCH,
    SCHEMES,
    BpeScheme,
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    FlagScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
    describe_scheme,
    scheme_class,
    scheme_from_json,
    scheme_names,
    scheme_to_json,
)

__all__ = [
    "LONGEST_PATCH",
    "SCHEMES",
    "BpeScheme",
    "ByteScheme",
    "EntropyCombinedScheme",
    "EntropyMonotonicScheme",
    "EntropyScheme",
    "FlagScheme",
    "IncrementalPatcher",
    "PatchScheme",
    "PatchedDocuments",
    "SpaceScheme",
    "StaticScheme",
    "count_patches",
    "describe_scheme",
    "patch_document",
    "patch_documents",
    "patch_lengths",
    "scheme_class",
    "scheme_from_json",
    "scheme_names",
    "scheme_to_json",
]
