"""Entropy patching for byte-level language models: schemes, kernels and the entropy job."""
