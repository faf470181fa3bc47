"""Readers of datasets, one module per format; `hf_faim2f.data.formats` selects among them."""
