"""Passes over the ONNX half, one a file."""
