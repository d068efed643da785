"""Sessions: a bundle opened in a backend, ready to answer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, overload

from vkvx.errors import InputError, OptionError, VkvxError
from vkvx.manifest import Manifest, Progress
from vkvx.runtime.backends.base import Backend, check_open
from vkvx.runtime.backends.registry import choose_backend
from vkvx.runtime.bundles import load_manifest
from vkvx.runtime.sessions.conversation import Conversation
from vkvx.runtime.sessions.generation import Chunk, Generation, Request
from vkvx.runtime.sessions.pictures import Pictures, listed
from vkvx.runtime.sessions.pieces import check_cut_after_pictures, check_prefill_chunk
from vkvx.runtime.sessions.processor import Message, Prepared, Processor
from vkvx.runtime.sessions.reuse import KeptSequences
from vkvx.runtime.sessions.sampling import GenerationOptions, changed_options, default_options
from vkvx.runtime.sessions.scheduler import run
from vkvx.runtime.sessions.videos import Video, listed_videos

if TYPE_CHECKING:
    from vkvx.runtime.backends.torch.backend import TorchBackend

__all__ = ["Chunk", "Conversation", "Generation", "GenerationOptions", "Session"]

DEFAULT_PICTURES = 4
DEFAULT_TEXT_TOKENS = 1024


class Session:
    """A bundle with a cache of ``slots`` sequences. Make one with :meth:`load`; use it from one thread.

    ``backend.name`` and ``backend.device`` say what runs it and where, ``backend_reason`` why. After :meth:`close`
    its methods, its conversations and its streams that still run raise InputError.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        processor: Processor,
        backend_reason: str = "it was asked for",
        prefill_chunk: int | None = None,
        *,
        cut_after_pictures: bool = False,
        reuse: bool = False,
    ) -> None:
        self.manifest = manifest
        self.backend = backend
        self.processor = processor
        self.backend_reason = backend_reason
        self.prefill_chunk = prefill_chunk
        self.cut_after_pictures = cut_after_pictures
        self.kept = KeptSequences(backend) if reuse else None

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: str = "auto",
        provider: str = "auto",
        slots: int = 1,
        visual_tokens: int | None = None,
        text_tokens: int | None = None,
        threads: int | None = None,
        prefill_chunk: int | None = None,
        cut_after_pictures: bool = False,
        reuse: bool = True,
        verify: bool = True,
        compile: bool = False,
        progress: Progress | None = None,
        processor: Processor | None = None,
    ) -> Session:
        """Open a bundle directory.

        ``visual_tokens`` and ``text_tokens`` are the capacity of a slot: by default four pictures (large ones
        where they vary in size), and 1024 text tokens or as many as the model has positions. ``backend`` is
        "onnxruntime", "torch", "tensorrt", "rtx", or "auto": engines that were built for the GPU, torch on a GPU
        with the CUDA kernels, elsewhere onnxruntime. ``provider`` is "cpu", "cuda" or "auto". ``threads`` are those of
        a CPU. ``prefill_chunk`` feeds prompts of more tokens in pieces of at most so many, between which other rows go
        on; later pieces read earlier ones from the packed cache (None: prompts stay whole, and are exact while they
        run). ``cut_after_pictures`` ends a piece behind the last picture of each turn. With ``reuse`` slots keep their
        last sequences until they are needed, and a prompt of :meth:`generate` and :meth:`stream` that starts with the
        same tokens and pictures goes on from there, as far as it gets the same by that: with packed pictures, what
        follows one can be reused only with ``cut_after_pictures``. ``verify`` compares the SHA-256 of each file with
        the manifest, and an engine's logits with the golden sample. ``compile`` is for torch on a GPU: decode steps
        become a fifth to a quarter faster, after half a minute at the first step of each number of rows. ``processor``
        is the bundle's, where it is open already and the files were compared before that.

        Raises BundleError, EngineError, OptionError, DependencyError, DeviceError, CapacityError.
        """
        directory = Path(bundle)
        manifest = load_manifest(directory)
        if slots < 1:
            raise OptionError(f"slots must be at least 1, got {slots}")
        if visual_tokens is not None and visual_tokens < 0:
            raise OptionError(f"visual_tokens (--max-visual-tokens) must be at least 0, got {visual_tokens}")
        if text_tokens is not None and text_tokens < 1:
            raise OptionError(f"text_tokens (--max-text-tokens) must be at least 1, got {text_tokens}")
        check_prefill_chunk(manifest, prefill_chunk)
        check_cut_after_pictures(manifest, cut_after_pictures)
        model, size = manifest.model, manifest.quantization.group_size
        found = choose_backend(backend, directory, manifest, provider, threads)
        if compile and found.name != "torch":
            raise OptionError(f"compile= is for the torch backend on a GPU, not {found.name}; leave it out")
        if verify and processor is None:
            manifest.verify(directory, progress)
        limits = found.limits
        if visual_tokens is None:
            visual_tokens = -(-model.usual_tokens // size) * DEFAULT_PICTURES * size
            if limits is not None:  # at 16 bits pictures lie among the text rows
                visual_tokens = min(visual_tokens, limits.visual_tokens or limits.text_tokens // 2)
        if text_tokens is None:
            text_tokens = min(model.max_positions, DEFAULT_TEXT_TOKENS)
            if limits is not None:
                capacity = limits.text_tokens - (0 if manifest.layout.is_packed else visual_tokens)
                text_tokens = max(1, min(text_tokens, capacity))
        opened = found.open(slots=slots, visual_tokens=visual_tokens, text_tokens=text_tokens, verify=verify)
        try:
            if compile:
                cast("TorchBackend", opened).compile()
            if prefill_chunk is not None and found.name == "torch":
                cast("TorchBackend", opened).capture_prefills(prefill_chunk)
        except VkvxError:
            opened.close()
            raise
        opened_processor = processor or Processor.of_bundle(directory, manifest)
        return cls(
            *(manifest, opened, opened_processor, found.reason, prefill_chunk),
            cut_after_pictures=cut_after_pictures,
            reuse=reuse,
        )

    def request(
        self, row: int, prepared: Prepared, options: GenerationOptions, progress: Progress | None = None
    ) -> Request:
        """A request for a scheduler over this session's slots. Raises CapacityError if it does not fit an empty one."""
        request = Request(
            *(row, prepared, options, self.processor, self.backend),
            prefill_chunk=self.prefill_chunk,
            cut_after_pictures=self.cut_after_pictures,
            kept=self.kept,
            progress=progress,
        )
        request.check()
        return request

    @overload
    def generate(
        self,
        prompts: str,
        images: Pictures = None,
        videos: str | Path | Sequence[Video] | None = None,
        *,
        options: GenerationOptions | None = None,
        **changes: Any,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Pictures] | None = None,
        videos: Sequence[str | Path | Sequence[Video] | None] | None = None,
        *,
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        **changes: Any,
    ) -> list[Generation]: ...

    def generate(
        self, prompts: Any, images: Any = None, videos: Any = None, *, options: Any = None, **changes: Any
    ) -> Any:
        """Answer one prompt, or several at once.

        A prompt is text with one ``<image>`` for each of its pictures and one ``<video>`` for each of its videos
        (:meth:`format` applies the chat template). A picture is a path, the bytes of a file, an open file, a UINT8
        array or a PIL image. A video is the path of a file or of a folder of frames; or it is a list of frames, in a
        list of videos. For one prompt ``images`` is a picture or a list of them, for a list of prompts a list with such
        an entry (or None) for each, and so are ``videos``.
        Options are fields of :class:`GenerationOptions`, given as keywords or as ``options`` (for a list of prompts
        also one per prompt, for instance to give each its own seed). What keywords leave out is as the checkpoint's
        generation_config.json says (``manifest.generation``); ``options`` say all.

        A row gets in a batch what it gets alone. With more prompts than free slots, the next prompt starts when a row
        ends.

        Raises InputError, OptionError, and CapacityError before anything runs if a prompt with its answer does not fit.
        If a prompt of several fails while it runs (the decoder returned NaN for it, for instance), the others are
        answered, and a BatchError that holds their answers is raised then. An error of the whole call, such as a GPU
        that runs out of memory, is raised at once, and so is the error of a prompt that is alone.
        """
        single = isinstance(prompts, str)
        results: dict[int, Generation] = {}
        for chunk in self.stream(prompts, images, videos, options=options, **changes):
            if chunk.generation is not None:
                results[chunk.row] = chunk.generation
        return results[0] if single else [results[row] for row in range(len(results))]

    def stream(
        self,
        prompts: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        *,
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        **changes: Any,
    ) -> Generator[Chunk, None, None]:
        """Like :meth:`generate`, but iterate over what each step adds. Errors of the input come at once.

        A prompt of several that fails while it runs has no further chunks; the BatchError comes after the last chunk of
        the others. Closing the iterator ends all rows and frees their slots.
        """
        check_open(self.backend)
        if isinstance(prompts, str):
            prompts, images, videos = [prompts], [images], [videos]
        images, videos = ([None] * len(prompts) if given is None else given for given in (images, videos))
        for given, noun in ((images, "picture"), (videos, "video")):
            if not isinstance(given, Sequence) or len(given) != len(prompts):
                raise InputError(
                    f"{len(prompts)} prompts need a list of as many entries of {noun}s (None for no {noun})"
                )
        if options is None or isinstance(options, GenerationOptions):
            options = [self.options(options, changes)] * len(prompts)
        elif len(options) != len(prompts):
            raise OptionError(f"{len(prompts)} prompts need as many entries of options, got {len(options)}")
        else:
            options = [self.options(one, changes) for one in options]
        requests = []
        for row, (prompt, pictures, clips, chosen) in enumerate(zip(prompts, images, videos, options, strict=True)):
            prepared = self.processor.prepare(
                *(prompt, listed(pictures), listed_videos(clips)),
                limits=chosen.limits,
                fps=chosen.fps,
                room=self.room,
            )
            requests.append(self.request(row, prepared, chosen))
        return run(self.backend, requests, self.prefill_chunk)

    @property
    def room(self) -> int:
        """Most visual tokens of a slot: what :meth:`Processor.prepare` may make of the pictures of a prompt."""
        return self.backend.cache.visual_room

    def conversation(self) -> Conversation:
        """Start a conversation in a free slot. Raises CapacityError if there is none."""
        check_open(self.backend)
        return Conversation(self.backend, self.processor, self.prefill_chunk, self.cut_after_pictures)

    def format(self, messages: Sequence[Message]) -> str:
        """The prompt of messages by the model's chat template. See :meth:`Processor.format`."""
        return self.processor.format(messages)

    def escape(self, text: str) -> str:
        """Text for a prompt of your own, in which no placeholder and no special token counts."""
        return self.processor.escape(text)

    def options(self, base: GenerationOptions | None, changes: dict[str, Any]) -> GenerationOptions:
        """``base``, or without one the bundle's defaults, with some fields changed; OptionError for wrong ones."""
        return changed_options(base or default_options(self.manifest, changes.get("max_new_tokens")), changes)

    def close(self) -> None:
        """Free the model and the cache; a second time does nothing."""
        self.backend.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
