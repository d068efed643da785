"""From what an image processor makes of a picture to inputs of the vision graph and tokens of the prompt. No torch."""
