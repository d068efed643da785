"""Measurements behind choices in the code: ``python -m benchmarks NAME`` prints and writes ``results/NAME.json``."""
