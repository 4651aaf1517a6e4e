"""Training, evaluation and generation for the Byte Latent Transformer."""
