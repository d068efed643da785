"""Tokenizer, image processor and chat template of a directory: a checkpoint's, or the processor of a bundle.

They are loaded apart: transformers' own processor of a family with videos asks for torch and torchvision.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkvx.errors import BundleError, ModelError, VkvxError
from vkvx.manifest import ModelInfo
from vkvx.models.videos import FILE as VIDEO_FILE
from vkvx.models.videos import read_settings
from vkvx.packages import missing

IMAGE_FILE, NESTED_FILE = "preprocessor_config.json", "processor_config.json"
MOST_PIXELS, MOST_SIDE = 1 << 28, 1 << 14
"""Of a picture, and of a side of it, as image processors make them."""
_TEMPLATES = ("chat_template.jinja", "chat_template.json", NESTED_FILE)
"""Files that may hold the template of a processor, the newest kind first."""
_TOKENIZER = "tokenizer_config.json"


@dataclass
class ProcessorFiles:
    """``tokenizer`` and ``images`` (an image processor for Pillow) of transformers, and the chat template if any.

    ``videos`` are the settings of the video processor, if there is one. ``image_file`` is the name of the file that
    those of the image processor are in.
    """

    tokenizer: Any
    images: Any
    chat_template: str | None
    videos: dict[str, Any] | None = None
    image_file: str = IMAGE_FILE

    @classmethod
    def load(cls, directory: Path, trust_remote_code: bool = False) -> ProcessorFiles:
        """Load what the directory holds; whatever transformers and its libraries raise for damaged files comes out."""
        tokenizers, _ = _auto_classes()
        tokenizer = tokenizers.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
        images = load_images(directory, trust_remote_code)
        template = _read_template(directory) or tokenizer.chat_template
        return cls(tokenizer, images, template, read_settings(directory), image_settings_file(directory))

    def save(self, directory: Path) -> None:
        """Write them into a new directory, from which :meth:`load` reads the same."""
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(directory)
        self.images.save_pretrained(directory)
        if self.videos is not None:
            (directory / VIDEO_FILE).write_text(json.dumps(self.videos, indent=2) + "\n", encoding="utf-8")

    def check_tokens(self, info: ModelInfo, fail: Callable[[str], Exception]) -> None:
        """Raise what ``fail`` makes unless the tokenizer can be that of a model: its size, the tokens that it names.

        The tokenizer may have fewer tokens than the decoder, or more that were added; prompts with these are refused.
        """
        if self.tokenizer.vocab_size > info.vocab_size:
            raise fail(f"the tokenizer has {self.tokenizer.vocab_size} tokens, the decoder {info.vocab_size}")
        if info.image_token_id not in self.tokenizer.added_tokens_decoder:
            raise fail(f"the image token {info.image_token_id} is no added token of the tokenizer")
        ends = info.eos_token_ids
        if ends and all(self.tokenizer.convert_ids_to_tokens(token) is None for token in ends):
            raise fail(f"the tokenizer has none of the tokens that end an answer, {list(ends[:8])}")

    def check_sizes(self, limited: bool) -> None:
        """Raise BundleError for sizes of pictures that no model has, before a picture is scaled to them.

        ``limited`` says that they are pixels of a whole picture, else they are those of a side.
        """
        most = MOST_PIXELS if limited else MOST_SIDE
        for name in ("size", "crop_size", "max_image_size"):
            given = getattr(self.images, name, None) or {}
            for side, pixels in dict(given).items():
                if pixels is not None and not 0 < pixels <= most:
                    raise BundleError(
                        f"the image processor's {name} has {side} {pixels}, not 1 to {most}; export again"
                    )

    def require_tokens(self, *marks: str) -> None:
        """Raise ModelError unless each mark is one token of the tokenizer."""
        for mark in marks:
            if len(self.tokenizer(mark, add_special_tokens=False)["input_ids"]) != 1:
                raise ModelError(f"the tokenizer has no token '{mark}'; download its files again")


def check_folder(directory: Path, known: Collection[str]) -> None:
    """Raise BundleError unless a folder holds the files ``known`` by their names alone, and these name no others.

    transformers reads whatever lies beside them, and some settings are paths of files that it opens wherever they are.
    """
    for path in directory.iterdir():
        if path.name not in known and not path.name.startswith("."):
            raise BundleError(f"{path} is no file of the bundle; remove it, or export the model again")
    path = directory / _TOKENIZER
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export the model again") from error
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key.endswith(("_file", "_files")) and value is not None:
            raise BundleError(f"{path} names a file by {reprlib.repr(key)}; do not trust this bundle")


@contextmanager
def damage(what: str) -> Iterator[None]:
    """Turn whatever transformers and its libraries raise over damaged files into a BundleError that begins so."""
    try:
        yield
    except (VkvxError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what Rust code panics with is no Exception
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BundleError(f"{what} ({reason[:200]}); export the model again") from error


def load_images(directory: Path, trust_remote_code: bool = False) -> Any:
    """The image processor alone; raises as :meth:`ProcessorFiles.load`."""
    _, images = _auto_classes()
    # The PIL variant gives the same pixels whether or not torchvision is installed.
    return images.from_pretrained(
        str(directory), backend="pil", local_files_only=True, trust_remote_code=trust_remote_code
    )


def image_settings_file(directory: Path) -> str:
    """The file that transformers reads the settings of the image processor from."""
    nested = directory / NESTED_FILE
    if nested.is_file() and "image_processor" in json.loads(nested.read_text(encoding="utf-8")):
        return NESTED_FILE
    return IMAGE_FILE


def _read_template(directory: Path) -> str | None:
    for name in _TEMPLATES:
        path = directory / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        if name.endswith(".jinja"):
            return text
        template = json.loads(text).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _auto_classes() -> tuple[Any, Any]:
    # transformers advises to install torch where it is missing; here it is not needed.
    advice = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        from transformers import AutoImageProcessor, AutoTokenizer
    except ImportError as error:
        raise missing("transformers", error) from error
    finally:
        del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
        if advice is not None:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = advice
    return AutoTokenizer, AutoImageProcessor
