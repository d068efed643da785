"""The TensorRT backend: engines over a packed cache in GPU memory."""
