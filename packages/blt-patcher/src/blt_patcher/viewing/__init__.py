"""Looking at patches: documents as glyphs and patches, on a terminal; `figures` draws the same."""

from blt_patcher.viewing.glyphs import Glyph, GlyphKind, printable, split_glyphs
from blt_patcher.viewing.terminal import render_patches
from blt_patcher.viewing.view import PatchView, ShownPatch, ShownToken

__all__ = ["Glyph", "GlyphKind", "PatchView", "ShownPatch", "ShownToken", "printable", "render_patches", "split_glyphs"]
