"""Prompts and pictures to what the graphs take, with the processor files of the bundle.

Uses transformers for tokenizer and image processor, but not torch.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from vkvx.errors import BundleError, InputError, VkvxError
from vkvx.manifest import Manifest, ModelInfo, TensorSpec
from vkvx.models.family import Source
from vkvx.models.pictures.base import Encoded, prompt_positions
from vkvx.models.pictures.kinds import open_pictures
from vkvx.models.processor_files import ProcessorFiles
from vkvx.packages import missing

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = Union[str, Path, "Image"]
Pictures = Picture | Sequence[Picture] | None
Message = Mapping[str, Any]

PLACEHOLDER = "<image>"
"""Stands for a picture in a prompt, whatever the model's own token for it is."""


@dataclass(frozen=True)
class Prepared:
    """A prompt ready to run.

    ``token_ids`` INT32 [n] hold the image token once a visual token, ``picture_lengths`` the visual tokens of each
    picture. ``vision_calls`` are the inputs of the vision graph, call by call. ``positions`` INT32 [3, n] are those of
    the rotary embedding, from 0, in models that place pictures in time, rows and columns. ``picture_sizes`` are height
    and width of each picture in pixels, before the image processor resized it.
    """

    token_ids: np.ndarray
    vision_calls: tuple[dict[str, np.ndarray], ...]
    picture_lengths: tuple[int, ...]
    positions: np.ndarray | None = None
    picture_sizes: tuple[tuple[int, int], ...] = ()


def listed(pictures: Pictures) -> list[Picture]:
    """None, one picture or several, as a list."""
    if pictures is None:
        return []
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]  # type: ignore[list-item]


class Processor:
    """Tokenizer, image processor and chat template, for a model whose vision graph has these inputs.

    For any number of threads: the libraries' tokenizers and image processors are made for one thread at a time, so each
    has a lock here. The two are apart, so that decoding the next token need not wait until somebody's pictures are
    ready.
    """

    def __init__(self, files: ProcessorFiles, info: ModelInfo, pixel_inputs: Sequence[TensorSpec]) -> None:
        """Raises BundleError for a way with pictures that is not known."""
        self._tokenizer: Any = files.tokenizer
        self._images: Any = files.images
        self._template = files.chat_template
        self._tokenizer_lock = threading.Lock()
        self._images_lock = threading.Lock()
        self._pictures = open_pictures(info.pictures)
        self._inputs = tuple(pixel_inputs)
        self._image_token_id = info.image_token_id
        self._token = str(self._tokenizer.convert_ids_to_tokens(info.image_token_id))
        self._prompt = info.prompt
        self._picture = info.prompt.picture or self._token

    @classmethod
    def of_bundle(cls, bundle: Path, manifest: Manifest) -> Processor:
        """The processor of a bundle. Raises BundleError if its files do not load."""
        directory = bundle / manifest.processor
        try:
            files = ProcessorFiles.load(directory)
        except VkvxError:
            raise
        except Exception as error:  # transformers raises many kinds for damaged files
            raise BundleError(
                f"cannot load the processor in {directory} ({_first_line(error)}); export the model again"
            ) from error
        return cls(files, manifest.model, manifest.graphs["vision"].inputs)

    @classmethod
    def of_checkpoint(cls, source: Source, info: ModelInfo) -> Processor:
        """The processor of a checkpoint. Raises ModelError if its files do not load or do not fit the model."""
        return cls(source.processor(), info, source.family.pixel_inputs(source.config))

    def prepare(self, prompt: str, images: Sequence[Picture] = (), *, first: bool = True) -> Prepared:
        """Tokens and pixels of a prompt that has one ``<image>`` for each picture.

        ``first`` is False for text that continues a sequence: it gets no begin-of-sequence token. Raises InputError if
        placeholders and pictures differ in number, a picture cannot be read, or the prompt is empty.
        """
        if not isinstance(prompt, str):
            raise InputError(f"a prompt must be a string, got {type(prompt).__name__}")
        pieces = prompt.replace(PLACEHOLDER, self._picture).replace(self._token, self._picture).split(self._picture)
        if len(pieces) - 1 != len(images):
            raise InputError(
                f"the prompt has {len(pieces) - 1} {PLACEHOLDER} and comes with {len(images)} "
                f"{'picture' if len(images) == 1 else 'pictures'}; put one {PLACEHOLDER} into it for each picture"
            )
        encoded = self._encode(images) if images else []
        pictures = "".join(piece + one.text for piece, one in zip(pieces, encoded, strict=False))
        own = self._prompt.begin if first else ""
        text = f"{pictures}{own}{pieces[-1]}{self._prompt.end}"
        with self._tokenizer_lock:
            begin = self._tokenizer.bos_token
            special = first and not own and not (begin and text.startswith(begin))
            ids = np.asarray(self._tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)
        if not ids.size:
            raise InputError("the prompt is empty; give at least one character")
        lengths = tuple(one.tokens for one in encoded)
        visual = ids == self._image_token_id
        if np.count_nonzero(visual) != sum(lengths):
            raise BundleError(f"the tokenizer does not keep '{self._token}' apart; export the model again")
        calls = self._pictures.join(encoded) if encoded else ()
        sizes = tuple(one.size for one in encoded)
        return Prepared(ids, calls, lengths, prompt_positions(visual, encoded), sizes)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        with self._tokenizer_lock:
            return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether :meth:`format` works."""
        return self._template is not None

    @property
    def plain_picture(self) -> str:
        """A picture before the text of a prompt that no chat template makes."""
        return PLACEHOLDER if self._prompt.begin else f"{PLACEHOLDER}\n"

    def format(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation by the model's chat template, up to where the answer begins.

        Messages are ``{"role": "user", "content": "..."}``; content may also be a list of ``{"type": "image"}`` and
        ``{"type": "text", "text": "..."}``. Raises InputError if the bundle has no template or it refuses the messages.
        """
        if self._template is None:
            raise InputError("this bundle has no chat template; write the prompt as the model expects it")
        listed = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            listed.append({**message, "content": content})
        try:
            with self._tokenizer_lock:
                text = self._tokenizer.apply_chat_template(
                    listed, chat_template=self._template, tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # a template is a program of the model's authors
            raise InputError(f"the chat template refuses these messages: {_first_line(error)}") from error
        return text.replace(self._picture, PLACEHOLDER)

    def _encode(self, images: Sequence[Picture]) -> list[Encoded]:
        """Pictures one by one: the image processor gets each alone, so that it is not padded to the size of others."""
        with self._images_lock:  # it also guards the warnings filters, which load_picture changes for all threads
            return [self._encode_one(load_picture(image)) for image in images]

    def _encode_one(self, image: Image) -> Encoded:
        try:
            features = self._images(images=[image], return_tensors="np", **self._pictures.call_options)
            encoded = self._pictures.encode(features, self._token)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"the image processor refuses the picture: {_first_line(error)}") from error
        arrays = {}
        for spec in self._inputs:
            array = arrays[spec.name] = np.ascontiguousarray(encoded.arrays[spec.name], spec.dtype)
            sizes = zip(array.shape, spec.shape, strict=True)
            if any(isinstance(expected, int) and given != expected for given, expected in sizes):
                raise InputError(
                    f"the image processor gives {spec.name} of shape {list(array.shape)}, the vision graph takes "
                    f"{list(spec.shape)}; export the model again with its own preprocessor_config.json"
                )
        return replace(encoded, arrays=arrays, size=(image.height, image.width))


def load_picture(source: Picture) -> Image:
    """Read a picture (a path, or an image of Pillow) as RGB, turned upright by its EXIF orientation.

    Raises InputError, which names the file, if it is missing, no picture, damaged, or has absurdly many pixels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise missing("PIL", error) from error
    if isinstance(source, Image.Image):
        image, name = source, "the picture"
    elif isinstance(source, (str, Path)):
        image, name = None, str(source)
        if not Path(source).is_file():
            raise InputError(f"no picture at {name}; give the path of an image file")
    else:
        raise InputError(f"a picture must be a path or a PIL image, got {type(source).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if image is None:
                with Image.open(name) as opened:
                    return ImageOps.exif_transpose(opened).convert("RGB")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels; give a smaller picture") from error
    except PermissionError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, ValueError, zlib.error, ...
        raise InputError(
            f"{name} cannot be read as a picture ({_first_line(error)}); give a PNG, JPEG or WebP file"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
