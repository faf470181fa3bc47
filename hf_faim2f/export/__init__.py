"""Exporting models to formats that run without Python: `onnx`, `tensorrt`, and int8 by `quantize`.

Nothing is imported here, so that using one format does not need the libraries of another.
"""
