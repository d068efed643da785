"""The CUDA kernels of the operator: ``libvkvx``, how it is built and found, and its interface for Python."""
