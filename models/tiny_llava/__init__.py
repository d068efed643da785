"""A small LLaVA that reads pages of handwritten digits.

The folder is a complete Hugging Face checkpoint (`LlavaForConditionalGeneration`, 5.5 million parameters, float16);
`data` draws pages and asks about them. The scripts that trained it lie in `training`.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent
"""Folder of the checkpoint, for `from_pretrained`."""
