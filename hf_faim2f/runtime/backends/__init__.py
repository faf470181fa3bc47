"""The runtimes that a model's network can run in: one file each, with `open_network`."""
