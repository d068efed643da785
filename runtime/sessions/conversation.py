"""A conversation: one slot of the cache, whose packed history later turns build on."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from vkvx.errors import InputError
from vkvx.manifest import Progress
from vkvx.runtime.backends.base import Backend, check_open
from vkvx.runtime.sessions.generation import Chunk, Generation, Request
from vkvx.runtime.sessions.pictures import Picture, listed
from vkvx.runtime.sessions.processor import Message, Prepared, Processor, user_message
from vkvx.runtime.sessions.sampling import GenerationOptions, changed_options, default_options
from vkvx.runtime.sessions.scheduler import run
from vkvx.runtime.sessions.videos import Video, listed_videos


class Conversation:
    """Turns over one packed history. Made by :meth:`Session.conversation`; close it when done.

    The history is every token fed, which is more than the text shown where a stop string or an interruption ended an
    answer: those tokens stay. The token chosen last is fed with the next turn. They also stay if the decoder's logits
    turn out not to be numbers: that error ends the answer only, but what follows on such a history likely fails too.
    """

    def __init__(
        self,
        backend: Backend,
        processor: Processor,
        prefill_chunk: int | None = None,
        cut_after_pictures: bool = False,
    ) -> None:
        self._backend = backend
        self._processor = processor
        self._prefill_chunk = prefill_chunk
        self._cut_after_pictures = cut_after_pictures
        self._slot: int | None = backend.cache.acquire()
        self._history: list[int] = []
        self._messages: list[Message] = []
        self._running: Generator[Chunk, None, None] | Generator[str, None, None] | None = None
        self.last: Generation | None = None
        """The last answer that came to its end."""

    def ask(
        self,
        text: str,
        images: Picture | Sequence[Picture] = (),
        videos: str | Path | Sequence[Video] = (),
        *,
        options: GenerationOptions | None = None,
        **changes: Any,
    ) -> Generator[str, None, None]:
        """Ask as a user, by the model's chat template, and iterate over pieces of the answer.

        Pictures and videos go before the text, unless the text says where by ``<image>`` and ``<video>``; without a
        picture these are text, and so is ``<\\image>`` beside one. Special tokens in it are text. Options as in
        :meth:`Session.generate`. Errors (InputError, OptionError, CapacityError) come at once and change nothing.
        Asking again ends an answer that is still being read.
        """
        pictures, clips = listed(images), listed_videos(videos)
        self._stop_running()
        if clips:
            self._processor.check_videos()
        message = user_message(text, len(pictures), len(clips))
        chunks = self._start(self._turn(message), pictures, clips, options, changes)
        answer = self._answer(message, chunks)
        self._running = answer
        return answer

    def generate(
        self,
        prompt: str,
        images: Picture | Sequence[Picture] = (),
        videos: str | Path | Sequence[Video] = (),
        *,
        options: GenerationOptions | None = None,
        **changes: Any,
    ) -> Generation:
        """Continue the history by a prompt as it is (no chat template, one ``<image>`` a picture) and answer it."""
        generation = None
        for chunk in self.stream(prompt, images, videos, options=options, **changes):
            generation = chunk.generation
        assert generation is not None
        return generation

    def stream(
        self,
        prompt: str | Prepared,
        images: Picture | Sequence[Picture] = (),
        videos: str | Path | Sequence[Video] = (),
        *,
        options: GenerationOptions | None = None,
        progress: Progress | None = None,
        **changes: Any,
    ) -> Generator[Chunk, None, None]:
        """Like :meth:`generate`, step by step. Errors come at once, the cache changes when the iteration starts.

        What :meth:`Processor.prepare` made of a prompt and its pictures may stand for them. ``progress`` is called with
        the stages "frames" and "vision".
        """
        self._stop_running()
        self._running = chunks = self._start(prompt, listed(images), listed_videos(videos), options, changes, progress)
        return chunks

    def fork(self) -> Conversation:
        """A second conversation with the same history, in a slot of its own. Only what is valid is copied."""
        self._stop_running()
        slot = self._open_slot()
        twin = Conversation(self._backend, self._processor, self._prefill_chunk, self._cut_after_pictures)
        self._backend.cache.fork(slot, twin._open_slot())
        twin._history, twin._messages, twin.last = list(self._history), list(self._messages), self.last
        return twin

    def close(self) -> None:
        """Give the slot back."""
        if self._slot is not None:
            self._stop_running()
            self._backend.cache.release(self._slot)
            self._slot = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def slot(self) -> int:
        """The row of the cache that holds the history."""
        return self._open_slot()

    @property
    def messages(self) -> tuple[Message, ...]:
        """What :meth:`ask` has said and got so far."""
        return tuple(self._messages)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token of the history, the image token once for each visual token."""
        return tuple(self._history)

    @property
    def bytes_used(self) -> int:
        """Bytes of the cache that the history takes."""
        return self._backend.cache.bytes_used(self._open_slot())

    def _open_slot(self) -> int:
        check_open(self._backend)
        if self._slot is None:
            raise InputError("this conversation is closed; start another with session.conversation()")
        return self._slot

    def _stop_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _start(
        self,
        prompt: str | Prepared,
        images: list[Picture],
        videos: list[Video],
        options: GenerationOptions | None,
        changes: dict[str, Any],
        progress: Progress | None = None,
    ) -> Generator[Chunk, None, None]:
        slot = self._open_slot()
        defaults = default_options(self._backend.manifest, changes.get("max_new_tokens"))
        chosen = changed_options(options or defaults, changes)
        prepared = prompt
        if not isinstance(prepared, Prepared):
            first = not self._history
            prepared = self._processor.prepare(
                *(prepared, images, videos),
                first=first,
                limits=chosen.limits,
                fps=chosen.fps,
                room=self._backend.cache.visual_room,
                progress=progress,
            )
        prepared = self._without_repeated_end(prepared)
        request = Request(
            *(0, prepared, chosen, self._processor, self._backend),
            slot=slot,
            history=self._history,
            prefill_chunk=self._prefill_chunk,
            cut_after_pictures=self._cut_after_pictures,
            progress=progress,
        )
        request.check()
        return self._remember(run(self._backend, [request], self._prefill_chunk))

    def _remember(self, chunks: Generator[Chunk, None, None]) -> Generator[Chunk, None, None]:
        with closing(chunks):
            for chunk in chunks:
                self.last = chunk.generation or self.last
                yield chunk

    def _answer(self, message: Message, chunks: Generator[Chunk, None, None]) -> Generator[str, None, None]:
        said = ""
        known = len(self._history)
        try:
            for chunk in chunks:
                said += chunk.text
                yield chunk.text
        finally:
            chunks.close()
            if len(self._history) > known:
                self._messages += [message, {"role": "assistant", "content": said}]

    def _turn(self, message: Message) -> str:
        """The text to feed for a message: all of it at first, later what follows the last answer."""
        processor = self._processor
        if not processor.has_chat_template:
            return processor.plain(message)
        if not self._messages:
            return processor.format([message])
        answer = f"\x02{secrets.token_hex(8)}\x03"  # stands for the last one; no text of a user can be the same
        earlier = [*self._messages[:-1], {"role": "assistant", "content": answer}]
        _, found, following = processor.format([*earlier, message]).rpartition(answer)
        if not found:
            raise InputError("the chat template changes answers; use generate() with prompts of your own")
        return following

    def _without_repeated_end(self, prepared: Prepared) -> Prepared:
        """Drop an end-of-sequence token that a template puts after an answer if the model ended the answer by it."""
        eos = self._backend.manifest.model.eos_token_ids
        ids = prepared.token_ids
        if self._history and len(ids) > 1 and ids[0] == self._history[-1] and ids[0] in eos:
            positions = None if prepared.positions is None else prepared.positions[:, 1:] - 1
            return replace(prepared, token_ids=ids[1:], positions=positions)
        return prepared
