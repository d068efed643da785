"""Prompts and pictures to what the graphs take, with the processor files of the bundle.

Uses transformers for tokenizer and image processor, but not torch.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import BundleError, CapacityError, InputError, VkvxError
from vkvx.manifest import Manifest, ModelInfo, Progress, TensorSpec
from vkvx.models.family import Source
from vkvx.models.pictures.base import Encoded, Filmed, Taken, prompt_positions
from vkvx.models.pictures.kinds import open_pictures
from vkvx.models.pictures.limits import NO_LIMITS, PixelLimits
from vkvx.models.processor_files import ProcessorFiles, check_folder, damage
from vkvx.models.videos import open_videos
from vkvx.packages import require
from vkvx.runtime.sessions.marks import LiteralTokenizer, Marks
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
_FAILS = "the tokenizer of the model fails"


@dataclass(frozen=True)
class Prepared:
    """A prompt ready to run.

    ``token_ids`` INT32 [n] hold the image token once a visual token, ``picture_lengths`` the visual tokens of each
    picture. ``vision_calls`` are the inputs of the vision graph, call by call. ``positions`` INT32 [3, n] are those of
    the rotary embedding, from 0, in models that place pictures in time, rows and columns. ``picture_sizes`` are height
    and width of each picture in pixels, before the image processor resized it. The frames of a video, some to a patch,
    count as pictures; ``frames`` is their number in all videos. ``picture_digests`` are the SHA-256 of what each
    picture brings to ``vision_calls``; without them no other prompt goes on from this one.
    """

    token_ids: np.ndarray
    vision_calls: tuple[dict[str, np.ndarray], ...]
    picture_lengths: tuple[int, ...]
    positions: np.ndarray | None = None
    picture_sizes: tuple[tuple[int, int], ...] = ()
    frames: int = 0
    picture_digests: tuple[bytes, ...] = ()


def user_message(text: str, pictures: int, videos: int = 0) -> dict[str, Any]:
    """A user's message: pictures, videos, then the text, unless that says by ``<image>`` and ``<video>`` where they go.

    Without a picture ``<image>`` is text, without a video ``<video>`` is; beside one, ``<\\image>`` is.
    """
    check_text(text, "a message")
    given = (("image", PLACEHOLDER, pictures), ("video", VIDEO_PLACEHOLDER, videos))
    kinds = {placeholder: kind for kind, placeholder, count in given if count}
    split = Marks(kinds).split(text)
    content = [
        {"type": kind} for kind, placeholder, count in given if placeholder not in split.marks for _ in range(count)
    ]
    for place, piece in enumerate(split.texts):
        content += [{"type": "text", "text": piece}] if piece or not split.marks else []
        content += [{"type": kinds[split.marks[place]]}] if place < len(split.marks) else []
    return {"role": "user", "content": content, **({"is_placed": True} if split.marks else {})}


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
        self._picture_marks = {PLACEHOLDER, self._token, self._picture}
        self._video_marks = {VIDEO_PLACEHOLDER, self._video_token} if self._video_token else set[str]()
        self._special = self._special_tokens()
        names = {token.content for token in self._special.values()}
        self._marks = Marks(names | self._picture_marks | self._video_marks)
        self._special_names = names
        self._literal: LiteralTokenizer | None = None  # made for the first text that needs it

    @classmethod
    def of_bundle(cls, bundle: Path, manifest: Manifest) -> Processor:
        """The processor of a bundle. Raises BundleError if its files do not load."""
        require("onnxruntime", "transformers", "jinja2")
        directory = bundle / manifest.processor
        with damage(f"cannot load the processor in {directory}"):
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
        room: int | None = None,
        progress: Progress | None = None,
    ) -> Prepared:
        """Tokens and pixels of a prompt that has one ``<image>`` for each picture and one ``<video>`` for each video.

        These and special tokens count wherever they stand in it, unless a backslash makes text of them: ``<\\image>``
        (see :meth:`escape`). ``first`` is False for text that continues a sequence: it gets no begin-of-sequence token.
        ``limits`` of the pixels of pictures replace the image processor's. ``fps`` is how many frames a second are
        taken of a video file (None: as the checkpoint's video processor says), or how many there were of frames that
        are pictures. Pictures that make more than ``room`` visual tokens are refused before pixels of that many are
        made (None: those of any number are). ``progress`` is called with the stage "frames".

        Raises InputError if placeholders and pictures or videos differ in number, one of them cannot be read, the model
        takes no videos, or the prompt is empty, CapacityError for pictures without room, a video or a text that no
        tokens of the model could hold, OptionError for limits that do not suit, and DependencyError for a video file
        without PyAV.
        """
        check_text(prompt, "a prompt")
        self._check_length(prompt)
        options = {"size": limits.size(self._images, self._pictures.limited, self._max_positions)} if limits else {}
        if videos:
            self.check_videos()
        split = self._marks.split(prompt)
        for known, placeholder, given, noun in (
            (self._picture_marks, PLACEHOLDER, images, "picture"),
            (self._video_marks, VIDEO_PLACEHOLDER, videos, "video"),
        ):
            count = sum(mark in known for mark in split.marks)
            if known and count != len(given):
                raise InputError(
                    f"the prompt has {count} {placeholder} and comes with {len(given)} {noun}"
                    f"{'' if len(given) == 1 else 's'}; put one {placeholder} into it for each {noun}, and write "
                    f"{self.escape(placeholder)} for the text"
                )
        encoded: list[Encoded] = []
        written: list[str] = []  # what takes the place of each mark
        frames = seen = 0
        behind = 0  # the last picture or video
        left, films = iter(images), iter(videos)
        for place, mark in enumerate(split.marks, 1):
            if mark in self._picture_marks:
                seen += 1
                found = self._encode(next(left), options, f"picture {seen}", room, sum(one.tokens for one in encoded))
            elif mark in self._video_marks:
                found, count = self._encode_video(next(films), fps, progress)
                frames += count
            else:
                written.append(mark)
                continue
            encoded += found
            written.append("".join(one.text for one in found))
            behind = place
        if first and self._prompt.begin:
            split.texts.insert(behind, "")
            written.insert(behind, self._prompt.begin)
        ids = self._tokenize(split.texts, written, split.literals, first=first)
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
        digests = tuple(one.digest for one in encoded)
        return Prepared(ids, calls, lengths, prompt_positions(visual, encoded), sizes, frames, digests)

    def check_limits(self, limits: PixelLimits) -> None:
        """Raise OptionError for limits of pixels that do not suit the model."""
        if limits:
            limits.size(self._images, self._pictures.limited, self._max_positions)

    def _tokenize(self, texts: list[str], written: list[str], literals: frozenset[str], *, first: bool) -> np.ndarray:
        """Token ids INT32 [n] of texts and of what is written between them; special tokens count in the latter only."""
        begin, own = self._tokenizer.bos_token, first and bool(self._prompt.begin)
        whole = "".join(a + b for a, b in zip(texts, [*written, self._prompt.end], strict=True))
        special = first and not own and (bool(texts[0]) or written[:1] != [begin])
        with self._tokenizer_lock, damage(_FAILS):
            if not literals & self._special_names:
                return np.asarray(self._tokenizer(whole, add_special_tokens=special)["input_ids"], np.int32)
            if self._literal is None:
                self._literal = LiteralTokenizer(self._tokenizer, self._special)
            pieces = zip(texts, [*map(self._literal.special, written), self._prompt.end], strict=True)
            return np.asarray(self._literal("".join(a + b for a, b in pieces), special), np.int32)

    def _special_tokens(self) -> dict[int, Any]:
        """Special tokens by their ids; those of pictures and videos among them, whatever the tokenizer's files say."""
        own = {self._token, self._picture, self._video_token}
        added = self._tokenizer.added_tokens_decoder
        return {number: token for number, token in added.items() if token.special or token.content in own}

    def _check_length(self, prompt: str) -> None:
        """Refuse what cannot fit before it is split: tokens take a hundred times the memory, and others wait."""
        if len(prompt) > self._max_positions and len(prompt) > self._max_positions * self._longest_token:
            raise CapacityError(
                f"the prompt has {len(prompt)} characters, the model knows {self._max_positions} positions, and no "
                f"token has more than {self._longest_token} characters; shorten the prompt"
            )

    @cached_property
    def _longest_token(self) -> int:
        with self._tokenizer_lock:
            return max(map(len, self._tokenizer.get_vocab()))

    def check_videos(self) -> None:
        """Raise InputError if the model takes no videos."""
        if self._videos is None:
            raise InputError("this model takes no videos; give some of the frames as pictures: images= (--image)")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        with self._tokenizer_lock, damage(_FAILS):
            return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def encode(self, text: str) -> list[int]:
        """Token ids of an answer's text."""
        with self._tokenizer_lock, damage(_FAILS):
            return list(self._tokenizer.encode(text, add_special_tokens=False))

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
        ``{"type": "video"}`` and ``{"type": "text", "text": "..."}``. All text in them is text: placeholders and
        special tokens in it are escaped in the prompt that comes out. Raises InputError if the bundle has no template,
        or what is given are no messages, or the template refuses them.
        """
        if self._template is None:
            raise InputError(
                "this bundle has no chat template; write the whole prompt as the model expects it, one <image> for a "
                "picture, and give --raw-prompt to `vkvx run`, or the prompt as it is to generate()"
            )
        text = self._marks.settle(self._render([self._listed(message) for message in messages]))
        text = text.replace(self._picture, PLACEHOLDER)
        return text.replace(self._video_token, VIDEO_PLACEHOLDER) if self._video_token else text

    def plain(self, message: Message) -> str:
        """The prompt of a user's message without a chat template: its parts one after another."""
        is_placed = message.get("is_placed")
        marks = {"image": PLACEHOLDER if is_placed else self.plain_picture}
        marks["video"] = VIDEO_PLACEHOLDER if is_placed else f"{VIDEO_PLACEHOLDER}\n"
        pieces = (marks.get(part["type"]) or self._marks.guard(part["text"]) for part in message["content"])
        return self._marks.settle("".join(pieces))

    def escape(self, text: str) -> str:
        """Text for a prompt, in which no placeholder and no special token counts: ``<\\image>`` for ``<image>``."""
        check_text(text, "a text")
        return self._marks.escape(text)

    def _listed(self, message: Message) -> dict[str, Any]:
        """A message for a template, with its content as parts and its text guarded. Raises InputError."""
        if not isinstance(message, Mapping) or "content" not in message:
            raise InputError('a message is not understood; write {"role": "user", "content": "..."}')
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
        if not all(isinstance(part, Mapping) and "type" in part for part in parts):
            raise InputError('the content of a message must be text or parts such as {"type": "text", "text": "..."}')
        for part in parts:
            check_text(part.get("text", ""), "a message")
        guarded = self._guarded({**message, "content": parts})
        if guarded.pop("is_placed", False) and not self._keeps_order:
            marks = {"image": self._picture, "video": self._video_token}
            inline = "".join(marks.get(part["type"]) or part["text"] for part in guarded["content"])
            guarded["content"] = [{"type": "text", "text": inline}]
        return guarded

    def _guarded(self, value: Any) -> Any:
        """With breaks in all text but that of types."""
        if isinstance(value, str):
            return self._marks.guard(value)
        if isinstance(value, Mapping):
            return {name: one if name == "type" else self._guarded(one) for name, one in value.items()}
        return [self._guarded(one) for one in value] if isinstance(value, (list, tuple)) else value

    @cached_property
    def _keeps_order(self) -> bool:
        """Whether the template leaves pictures and videos where they stand among texts; some put them in front."""
        kinds = {"image": self._picture, "video": self._video_token}
        content: list[dict[str, str]] = [{"type": "text", "text": "part 0"}]
        for kind in ("image", *(["video"] if self._video_token else [])):
            content += [{"type": kind}, {"type": "text", "text": f"part {len(content)}"}]
        try:
            text = self._render([{"role": "user", "content": content}])
        except InputError:
            return False
        wanted = [kinds.get(part["type"]) or part["text"] for part in content]
        return re.search(".*".join(map(re.escape, wanted)), text, re.DOTALL) is not None

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            with self._tokenizer_lock:
                text: str = self._tokenizer.apply_chat_template(
                    messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # a template is a program of the model's authors
            raise InputError(f"the chat template refuses these messages: {first_line(error)}") from error
        return text

    def _encode(
        self, image: Picture, options: Mapping[str, Any], name: str, room: int | None, taken: int
    ) -> list[Encoded]:
        """A picture, of whose ``room`` those before it have ``taken`` some.

        The image processor gets each alone, so that it is not padded to the size of others.
        """
        with self._images_lock:  # it also guards the warnings filters, which load_picture changes for all threads
            loaded = load_picture(image, name=name)
            if room is not None and taken + (tokens := self._least_tokens(loaded, options)) > room:
                raise CapacityError(
                    f"there is no room for {name}, which makes {'some' if tokens == 1 else tokens} visual tokens: the "
                    f"cache holds {room}, and the pictures before it take {taken}; give fewer or smaller ones, lower "
                    "max_pixels= (--max-pixels), or raise visual_tokens= (--max-visual-tokens)"
                )
            with _refusals():
                features = self._features(loaded, {**self._pictures.call_options, **options})
                encoded = self._pictures.encode(features, self._token)
        return [replace(self._checked(encoded), size=(loaded.height, loaded.width))]

    def _least_tokens(self, image: Image, options: Mapping[str, Any]) -> int:
        """Visual tokens that a picture makes: their number if its pixels are limited, else one at least."""
        if not self._pictures.limited:
            return 1
        size, unit = options.get("size"), self._images.merge_size**2
        limits = {} if size is None else {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        with _refusals():
            patches = self._images.get_number_of_image_patches(image.height, image.width, limits)
        return int(patches) // int(unit)

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
                    f"{list(spec.shape)}; export the model again, with the settings of its own image processor"
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
