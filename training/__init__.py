"""Scripts that made the bundled checkpoints."""
