"""Prompts and pictures to what the graphs take, with the processor files of the bundle.

Uses transformers for tokenizer and image processor, but not torch.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import BundleError, CapacityError, InputError, VkvxError
from vkvx.manifest import Manifest, ModelInfo, Progress, TensorSpec
from vkvx.models.family import Source
from vkvx.models.pictures.base import Encoded, Filmed, Taken, prompt_positions
from vkvx.models.pictures.kinds import open_pictures
from vkvx.models.pictures.limits import NO_LIMITS, PixelLimits
from vkvx.models.processor_files import ProcessorFiles, check_folder, loading
from vkvx.models.videos import open_videos
from vkvx.runtime.sessions.pictures import Picture, first_line, load_picture
from vkvx.runtime.sessions.text import check_text
from vkvx.runtime.sessions.videos import Video, open_clip

if TYPE_CHECKING:
    from PIL.Image import Image

Message = Mapping[str, Any]

PLACEHOLDER = "<image>"
"""Stands for a picture in a prompt, whatever the model's own token for it is."""
VIDEO_PLACEHOLDER = "<video>"
"""Stands for a video."""


@dataclass(frozen=True)
class Prepared:
    """A prompt ready to run.

    ``token_ids`` INT32 [n] hold the image token once a visual token, ``picture_lengths`` the visual tokens of each
    picture. ``vision_calls`` are the inputs of the vision graph, call by call. ``positions`` INT32 [3, n] are those of
    the rotary embedding, from 0, in models that place pictures in time, rows and columns. ``picture_sizes`` are height
    and width of each picture in pixels, before the image processor resized it. The frames of a video, some to a patch,
    count as pictures; ``frames`` is their number in all videos.
    """

    token_ids: np.ndarray
    vision_calls: tuple[dict[str, np.ndarray], ...]
    picture_lengths: tuple[int, ...]
    positions: np.ndarray | None = None
    picture_sizes: tuple[tuple[int, int], ...] = ()
    frames: int = 0


def user_message(text: str, pictures: int, videos: int = 0) -> dict[str, Any]:
    """A user's message for a chat template: pictures, videos, then the text, unless that says where these are."""
    if PLACEHOLDER in text or (videos and VIDEO_PLACEHOLDER in text):
        return {"role": "user", "content": text}
    content: list[dict[str, str]] = [{"type": "image"}] * pictures + [{"type": "video"}] * videos
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


class Processor:
    """Tokenizer, image processor and chat template, for a model whose vision graph has these inputs.

    For any number of threads: the libraries' tokenizers and image processors are made for one thread at a time, so each
    has a lock here. The two are apart, so that decoding the next token need not wait until somebody's pictures are
    ready.
    """

    def __init__(self, files: ProcessorFiles, info: ModelInfo, pixel_inputs: Sequence[TensorSpec]) -> None:
        """Raises BundleError for a way with pictures that is not known, ModelError for one with videos."""
        self._tokenizer: Any = files.tokenizer
        self._images: Any = files.images
        self._template = files.chat_template
        self._tokenizer_lock = threading.Lock()
        self._images_lock = threading.Lock()
        self._pictures = open_pictures(info.pictures)
        self._inputs = tuple(pixel_inputs)
        self._image_token_id = info.image_token_id
        self._token = str(self._tokenizer.convert_ids_to_tokens(info.image_token_id))
        self._videos = open_videos(self._pictures, files.videos, files.images)
        self._video_token = self._pictures.video_mark if isinstance(self._pictures, Filmed) else ""
        self._max_positions = info.max_positions
        self._vocab_size = info.vocab_size
        self._prompt = info.prompt
        self._picture = info.prompt.picture or self._token

    @classmethod
    def of_bundle(cls, bundle: Path, manifest: Manifest) -> Processor:
        """The processor of a bundle. Raises BundleError if its files do not load."""
        directory = bundle / manifest.processor
        with loading(directory):
            check_folder(directory, {Path(name).name for name in manifest.files if (bundle / name).parent == directory})
            files = ProcessorFiles.load(directory)
            files.check_sizes(open_pictures(manifest.model.pictures).limited)
            files.check_tokens(
                manifest.model, lambda words: BundleError(f"{directory}: {words}; export the model again")
            )
            return cls(files, manifest.model, manifest.graphs["vision"].inputs)

    @classmethod
    def of_checkpoint(cls, source: Source, info: ModelInfo) -> Processor:
        """The processor of a checkpoint. Raises ModelError if its files do not load or do not fit the model."""
        return cls(source.processor(), info, source.family.pixel_inputs(source.config))

    def prepare(
        self,
        prompt: str,
        images: Sequence[Picture] = (),
        videos: Sequence[Video] = (),
        *,
        first: bool = True,
        limits: PixelLimits = NO_LIMITS,
        fps: float | None = None,
        progress: Progress | None = None,
    ) -> Prepared:
        """Tokens and pixels of a prompt that has one ``<image>`` for each picture and one ``<video>`` for each video.

        ``first`` is False for text that continues a sequence: it gets no begin-of-sequence token. ``limits`` of the
        pixels of pictures replace the image processor's. ``fps`` is how many frames a second are taken of a video file
        (None: as the checkpoint's video processor says), or how many there were of frames that are pictures.
        ``progress`` is called with the stage "frames".

        Raises InputError if placeholders and pictures or videos differ in number, one of them cannot be read, the model
        takes no videos, or the prompt is empty, CapacityError for a video that is too long for the model, OptionError
        for limits that do not suit, and DependencyError for a video file without PyAV.
        """
        check_text(prompt, "a prompt")
        options = {"size": limits.size(self._images, self._pictures.limited)} if limits else {}
        if videos:
            self.check_videos()
        prompt = prompt.replace(PLACEHOLDER, self._picture).replace(self._token, self._picture)
        if self._video_token:
            prompt = prompt.replace(VIDEO_PLACEHOLDER, self._video_token)
        marks = [mark for mark in (self._picture, self._video_token) if mark]
        pieces = re.split(f"({'|'.join(map(re.escape, marks))})", prompt)
        for mark, placeholder, given, noun in (
            (self._picture, PLACEHOLDER, images, "picture"),
            (self._video_token, VIDEO_PLACEHOLDER, videos, "video"),
        ):
            if mark and pieces.count(mark) != len(given):
                raise InputError(
                    f"the prompt has {pieces.count(mark)} {placeholder} and comes with {len(given)} "
                    f"{noun}{'' if len(given) == 1 else 's'}; put one {placeholder} into it for each {noun}"
                )
        encoded: list[Encoded] = []
        frames = seen = 0
        left, films = iter(images), iter(videos)
        for place, piece in enumerate(pieces):
            if piece == self._picture:
                seen += 1
                found = self._encode(next(left), options, f"picture {seen}")
            elif self._video_token and piece == self._video_token:
                found, count = self._encode_video(next(films), fps, progress)
                frames += count
            else:
                continue
            encoded += found
            pieces[place] = "".join(one.text for one in found)
        own = self._prompt.begin if first else ""
        text = f"{''.join(pieces[:-1])}{own}{pieces[-1]}{self._prompt.end}"
        with self._tokenizer_lock:
            begin = self._tokenizer.bos_token
            special = first and not own and not (begin and text.startswith(begin))
            ids = np.asarray(self._tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)
        if not ids.size:
            raise InputError("the prompt is empty; give at least one character")
        if (most := int(ids.max())) >= self._vocab_size:
            token = self._tokenizer.convert_ids_to_tokens(most)
            raise InputError(f"the prompt has the token '{token}', which the model does not know; leave it out")
        lengths = tuple(one.tokens for one in encoded)
        visual = ids == self._image_token_id
        if np.count_nonzero(visual) != sum(lengths):
            raise BundleError(f"the tokenizer does not keep '{self._token}' apart; export the model again")
        calls = self._pictures.join(encoded) if encoded else ()
        sizes = tuple(one.size for one in encoded)
        return Prepared(ids, calls, lengths, prompt_positions(visual, encoded), sizes, frames)

    def check_videos(self) -> None:
        """Raise InputError if the model takes no videos."""
        if self._videos is None:
            raise InputError("this model takes no videos; give some of the frames as pictures: images= (--image)")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        with self._tokenizer_lock:
            return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Tokens that stand for pictures and videos; without these they mean nothing to the decoder."""
        found = self._tokenizer.get_added_vocab().get(self._video_token)
        return (self._image_token_id,) if found is None else (self._image_token_id, found)

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

        Messages are ``{"role": "user", "content": "..."}``; content may also be a list of ``{"type": "image"}``,
        ``{"type": "video"}`` and ``{"type": "text", "text": "..."}``. Raises InputError if the bundle has no template
        or it refuses the messages.
        """
        if self._template is None:
            raise InputError("this bundle has no chat template; write the prompt as the model expects it")
        listed = []
        for message in messages:
            content = message["content"]
            for text in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
                check_text(text, "a message")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            listed.append({**message, "content": content})
        try:
            with self._tokenizer_lock:
                text = self._tokenizer.apply_chat_template(
                    listed, chat_template=self._template, tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # a template is a program of the model's authors
            raise InputError(f"the chat template refuses these messages: {first_line(error)}") from error
        text = text.replace(self._picture, PLACEHOLDER)
        return text.replace(self._video_token, VIDEO_PLACEHOLDER) if self._video_token else text

    def _encode(self, image: Picture, options: Mapping[str, Any], name: str) -> list[Encoded]:
        """A picture. The image processor gets each alone, so that it is not padded to the size of others."""
        with self._images_lock:  # it also guards the warnings filters, which load_picture changes for all threads
            loaded = load_picture(image, name=name)
            with _refusals():
                features = self._features(loaded, {**self._pictures.call_options, **options})
                encoded = self._pictures.encode(features, self._token)
        return [replace(self._checked(encoded), size=(loaded.height, loaded.width))]

    def _encode_video(self, video: Video, fps: float | None, progress: Progress | None) -> tuple[list[Encoded], int]:
        """The pictures of a video, and how many frames are in them."""
        videos, pictures = self._videos, self._pictures
        assert videos is not None
        assert isinstance(pictures, Filmed)
        with self._images_lock:
            clip = open_clip(video, fps)
            taken = Taken(videos.frames(clip.total, clip.rate, clip.sampling), clip.total, clip.rate)
            count = len(taken.indices)
            height, width = videos.resized(count, clip.height, clip.width)
            # Before anything is decoded: an hour of video does not fit into any memory.
            pairs = -(-count // videos.temporal_patch_size)
            tokens = pairs * pictures.frame_tokens(height, width, videos.patch_size)
            if tokens > self._max_positions:
                raise CapacityError(
                    f"{count} frames of {clip.name} make {tokens} visual tokens, the model knows {self._max_positions} "
                    "positions; take fewer of a file by fps= (--fps), or cut the video"
                )
            options = {
                **pictures.frame_options,
                "image_mean": list(videos.image_mean),
                "image_std": list(videos.image_std),
                "rescale_factor": videos.rescale_factor,
            }

            def features() -> Iterator[Mapping[str, Any]]:
                for number, frame in enumerate(clip.frames(taken.indices)):
                    if progress is not None:
                        progress("frames", number, count)
                    yield self._features(frame.resize((width, height), videos.resample), options)

            with _refusals():
                found = pictures.encode_video(
                    features(), taken, self._token, videos.temporal_patch_size, videos.patch_size
                )
                encoded = [replace(self._checked(one), size=(clip.height, clip.width)) for one in found]
        if progress is not None:
            progress("frames", count, count)
        return encoded, count

    def _features(self, image: Image, options: Mapping[str, Any]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._images(images=[image], return_tensors="np", **options)
        return found

    def _checked(self, encoded: Encoded) -> Encoded:
        """With arrays of the types that the vision graph takes. Raises InputError if their shapes are others."""
        arrays = {}
        for spec in self._inputs:
            array = arrays[spec.name] = np.ascontiguousarray(encoded.arrays[spec.name], spec.dtype)
            sizes = zip(array.shape, spec.shape, strict=True)
            if any(isinstance(expected, int) and given != expected for given, expected in sizes):
                raise InputError(
                    f"the image processor gives {spec.name} of shape {list(array.shape)}, the vision graph takes "
                    f"{list(spec.shape)}; export the model again with its own preprocessor_config.json"
                )
        return replace(encoded, arrays=arrays)


@contextmanager
def _refusals() -> Iterator[None]:
    """What an image processor raises, as an InputError."""
    try:
        yield
    except (VkvxError, MemoryError):
        raise
    except Exception as error:  # whatever settings and shapes that do not suit lead to
        raise InputError(f"the image processor refuses the picture: {first_line(error)}") from error
