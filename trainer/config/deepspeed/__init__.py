"""Make the DeepSpeed dictionary of a run: read a preset or a file, fill it from the run configuration, and check it.

Imports no torch. Two steps, because bucket sizes need the model: `resolve` before it is built, `size_buckets` after.
"""
