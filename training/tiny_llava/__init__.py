"""Training and measuring tiny-llava: `python -m training.tiny_llava.train`."""
