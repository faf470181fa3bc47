"""Readers of data sets, one file a format; `formats` chooses among them."""
