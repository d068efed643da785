"""A small InternVL that reads pages of handwritten digits, cut into tiles.

The folder is a complete Hugging Face checkpoint (`InternVLForConditionalGeneration`, 5.1 million parameters, float16).
`vkvx.models.tiny_llava.data` draws its pages; the scripts that trained it lie in `training`.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent
"""Folder of the checkpoint, for `from_pretrained`."""
