"""Sessions over an open bundle: prompts and pictures in, generated text out."""
