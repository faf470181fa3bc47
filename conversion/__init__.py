"""Converts checkpoints of other libraries to Hub folders that load with transformers."""
