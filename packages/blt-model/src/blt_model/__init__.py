"""The Byte Latent Transformer and its entropy language model in PyTorch."""
