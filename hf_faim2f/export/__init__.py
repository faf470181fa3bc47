"""Exports models to formats that run without Python: `onnx`, `tensorrt`, and int8 with `quantize`.

Nothing is imported here, so that one format does not need the libraries of another.
"""
