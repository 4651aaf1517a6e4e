"""Patching for byte-level language models: schemes, batch kernels and the byte-at-a-time form.

Importing this package needs NumPy and Numba, never torch; scoring documents with an entropy model is in
`blt_patcher.entropies` (`pip install 'blt-patcher[entropy]'`).
"""

from blt_patcher.boundaries import PatchedDocuments, count_patches, patch_document, patch_documents
from blt_patcher.incremental import IncrementalPatcher
from blt_patcher.schemes import (
    LONGEST_PATCH,
    SCHEMES,
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
    describe_scheme,
    scheme_from_json,
    scheme_to_json,
)

__all__ = [
    "LONGEST_PATCH",
    "SCHEMES",
    "ByteScheme",
    "EntropyCombinedScheme",
    "EntropyMonotonicScheme",
    "EntropyScheme",
    "IncrementalPatcher",
    "PatchScheme",
    "PatchedDocuments",
    "SpaceScheme",
    "StaticScheme",
    "count_patches",
    "describe_scheme",
    "patch_document",
    "patch_documents",
    "scheme_from_json",
    "scheme_to_json",
]
