"""Converts checkpoints of other libraries to model folders that work anywhere in the Hugging Face ecosystem."""
