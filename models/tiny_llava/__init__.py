"""A small LLaVA that reads pages of handwritten digits, with the scripts that made it.

The folder is a complete Hugging Face checkpoint (`LlavaForConditionalGeneration`, 5.5 million parameters, float16)
beside its own sources: `data` draws pages and asks about them, `model` holds architecture, tokenizer and processor,
`train` and `evaluate` are scripts. Importing this package imports none of them.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent
"""Folder of the checkpoint, for `from_pretrained`."""
