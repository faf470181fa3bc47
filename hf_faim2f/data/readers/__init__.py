"""Readers of data sets, one file per format; `hf_faim2f.data.formats` chooses among them."""
