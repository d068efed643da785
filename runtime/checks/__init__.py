"""What tells whether a bundle is right, how fast it is, and what fits a GPU."""
