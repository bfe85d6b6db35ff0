"""Models: loading them, their blocks, adapters, loss and weights on disk."""
