"""Models as files that run without Python: what is in the graph (`graph`), and the formats that it is written in.

Nothing is imported here, so that naming one format does not need the libraries of another.
"""
