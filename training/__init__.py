"""What made the bundled checkpoints: `python -m training.train tiny-llava`."""
