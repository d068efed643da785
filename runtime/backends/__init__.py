"""What runs the graphs of a bundle: a folder per backend, and the registry that chooses one."""
