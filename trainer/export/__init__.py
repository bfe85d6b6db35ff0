"""Write trained models as Hugging Face folders and as deltas, a block at a time."""
