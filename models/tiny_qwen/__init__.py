"""A small Qwen3-VL that reads pages of handwritten digits, of varying size, one or two at a time.

The folder is a complete Hugging Face checkpoint (`Qwen3VLForConditionalGeneration`, 5.7 million parameters, float16).
`vkvx.models.tiny_llava.data` draws its pages; the scripts that trained it lie in `training`.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent
"""Folder of the checkpoint, for `from_pretrained`."""
