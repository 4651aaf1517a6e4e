"""Documents to Arrow byte shards for byte-level language models."""
