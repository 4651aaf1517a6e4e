"""The token ids of the released BLT checkpoints: four special ids, then one id for each byte value."""

BOE_ID = 0
"""Beginning of example; also what fills a sequence that no document fills."""
BOS_ID = 1
"""First token of every framed document."""
EOS_ID = 2
"""Last token of every framed document."""
RESERVED_ID = 3
"""Kept free, as in the released checkpoints."""
BYTE_OFFSET = 4
"""Byte value b has id b + BYTE_OFFSET."""
VOCABULARY_SIZE = 260
"""Number of token ids."""
