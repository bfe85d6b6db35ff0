"""Turn data sources into samples on disk (render, tokenise, pack) and deal these to ranks in batches."""
