"""A Transformer and everything its training loop needs, written from scratch in plain PyTorch."""
