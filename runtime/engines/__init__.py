"""Builds TensorRT engines from a bundle, and describes those that were built."""
