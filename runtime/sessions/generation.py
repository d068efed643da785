"""Answers, and the state of a request from its prompt to the end of its answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from vkvx.errors import BundleError, CapacityError, NumericError, OptionError
from vkvx.manifest import Progress
from vkvx.runtime.backends.base import Backend, DividedTower, SampledRow, SamplingBackend
from vkvx.runtime.calls import Row
from vkvx.runtime.sessions import nonfinite
from vkvx.runtime.sessions.pieces import behind, check_prefill_chunk, cut
from vkvx.runtime.sessions.processor import Prepared, Processor
from vkvx.runtime.sessions.reuse import Fed, KeptSequences
from vkvx.runtime.sessions.sampling import Choice, GenerationOptions, Sampler, checked
from vkvx.runtime.sessions.text import IncrementalDecoder, StopStrings


@dataclass(frozen=True)
class Generation:
    """An answer. ``text`` is without the white space that many models begin with. ``token_ids`` are all tokens chosen,
    the end-of-sequence token and those of a stop string included.

    ``finish_reason`` is "eos", "stop" or "length". ``prompt_tokens`` counts what came before the answer with this call,
    ``visual_tokens`` how many of them were visual, and ``reused_tokens`` how many were in the cache already.
    ``prefill_seconds`` include the vision tower; ``decode_seconds`` are those of the steps after the first token,
    waiting for the consumer of a stream not included. ``logprobs`` are those of ``token_ids`` by the model's logits,
    None unless they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    visual_tokens: int
    prefill_seconds: float
    decode_seconds: float
    logprobs: tuple[float, ...] | None = None
    reused_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, by the time they took (0 if there was only one)."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Chunk:
    """What a step added to row ``row``. ``text`` may be empty: incomplete characters and possible beginnings of stop
    strings are held back. ``logprobs`` are those of ``token_ids`` if they were asked for. The last chunk of a row has a
    ``finish_reason`` and the whole ``generation``."""

    row: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    generation: Generation | None = None
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Failure:
    """What ended row ``row`` before its end: an error of its pictures, of its logits or of its text."""

    row: int
    error: Exception


class Request:
    """One row: a prompt to run on top of ``history``, and its state while it runs.

    ``history`` holds every token of the sequence and is extended in place. What of it is not in the cache yet is what
    the next call feeds; that is at least the token chosen last. ``slot`` None asks for a free slot, which is given
    back at the end. A prompt of more than ``prefill_chunk`` tokens is fed in pieces, one call after another, see
    :mod:`vkvx.runtime.sessions.pieces`; with ``cut_after_pictures`` one ends behind the pictures of each turn. A
    request that asks for a free slot goes on from one of the ``kept`` sequences where it can. ``progress`` is called
    with the stage "vision".

    ``followers`` are requests for other answers to the same prompt, which fork from this one when its prompt was fed.
    """

    def __init__(
        self,
        row: int,
        prepared: Prepared,
        options: GenerationOptions,
        processor: Processor,
        backend: Backend,
        *,
        slot: int | None = None,
        history: list[int] | None = None,
        prefill_chunk: int | None = None,
        cut_after_pictures: bool = False,
        kept: KeptSequences | None = None,
        progress: Progress | None = None,
    ) -> None:
        model = backend.manifest.model
        self.row = row
        self.slot = slot
        self.owns_slot = slot is None
        self.prepared = prepared
        self.options = options
        self.history = [] if history is None else history
        self._backend = backend
        self._progress = progress
        self._eos = () if options.ignore_eos else model.eos_token_ids
        # The token of a picture or a video without one means nothing to the decoder, so it is never chosen.
        self._sampler = Sampler(options, model.vocab_size, processor.placeholder_ids, self._eos)
        self._launched = 0  # calls that choose a token of the answer
        self._read = 0  # of them, those whose tokens are known
        self._excluded: tuple[int, ...] | None = None  # what the backend knows; None: nothing of this request
        self._decoder = IncrementalDecoder(processor.decode)
        self._stops = StopStrings(options.stop)
        self._base = len(self.history)
        self._start = 0 if slot is None else backend.cache.length(slot)
        self._fed = np.concatenate([np.array(self.history[self._start :], np.int32), prepared.token_ids])
        # Part of a prompt could not be taken back from states that hold others.
        whole = bool(model.linear_layers and self._start)
        limits = (None, False) if whole else (prefill_chunk, cut_after_pictures)
        self._pieces = deque(cut(self._fed, prepared.picture_lengths, backend.manifest, *limits))
        self.followers: list[Request] = []
        self._logits: np.ndarray | None = None  # that the first token is chosen from, as the followers need them
        self._kept = kept if self.owns_slot else None
        self._prompt = Fed.of_prompt(prepared, self._pieces, backend.manifest) if self._kept else None
        self._reused = 0  # tokens of the prompt that are in the slot already
        self._reused_pictures = 0
        self._vision_calls = prepared.vision_calls  # of pictures that are not
        self._mark: tuple[np.ndarray, ...] = ()  # of the slot before the prompt
        self._first_position = 0  # of the prompt, for the rotary embedding
        self._text: list[str] = []
        self._answer: list[int] = []
        self._embeds: list[Any] = []  # until the first token
        self._logprobs: list[float] = []
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.finish_reason: str | None = None

    def check(self) -> None:
        """Raise CapacityError unless prompt and answer fit; nothing is changed."""
        cache, model = self._backend.cache, self._backend.manifest.model
        lengths, answer = self.prepared.picture_lengths, self.options.max_new_tokens - 1  # the last is never fed
        fed = self._base - self._start + len(self.prepared.token_ids) + answer
        if self._start + fed > model.max_positions:
            raise CapacityError(
                f"prompt and answer end at position {self._start + fed}, the model knows {model.max_positions}; "
                f"{self._shorter}"
            )
        cache.check_capacity(self.slot, *cache.demand(lengths, fed - sum(lengths)))
        limits, longest = self._backend.limits, max(map(len, self._pieces))
        if limits is not None and longest > limits.input_len:
            what = "the prompt" if len(self._pieces) == 1 else "a piece of the prompt"
            raise CapacityError(
                f"{what} has {longest} tokens with its pictures, the engine takes {limits.input_len} in a call; "
                f"build it with `vkvx build BUNDLE --max-input-len {longest}`{self._pieces_help(limits.input_len)}, "
                f"or {self._shorter}"
            )

    def _pieces_help(self, limit: int) -> str:
        """That a prompt may be fed in pieces, if it may."""
        try:
            check_prefill_chunk(self._backend.manifest, limit)
        except OptionError:
            return ""
        return f", feed it in pieces by prefill_chunk= (--prefill-chunk) {limit}" if len(self._pieces) == 1 else ""

    @property
    def _shorter(self) -> str:
        """What can be done about a prompt that is too long, what takes the most of it first."""
        lengths, answer = self.prepared.picture_lengths, self.options.max_new_tokens - 1
        visual = sum(lengths)
        wishes = [
            (visual, f"give fewer or smaller pictures ({len(lengths)} take {visual} of these tokens)"),
            (len(self.prepared.token_ids) - visual, "shorten the prompt"),
            (self._base, "start another conversation"),
            (answer, "lower max_new_tokens= (--max-new-tokens)"),
        ]
        return ", or ".join(wish for tokens, wish in sorted(wishes, key=lambda one: -one[0]) if tokens)

    def admit(self) -> None:
        """Take a slot if there is none yet, and make the prompt part of the history."""
        cache = self._backend.cache
        if self.slot is not None:
            self._mark = cache.mark(self.slot)
            self._first_position = int(cache.next_position[self.slot]) + self._base - self._start
        elif self._kept is None or self._prompt is None:
            self.slot = cache.acquire()
        else:
            self.slot, self._reused = self._kept.take(self._prompt)
            self._skip(self._prompt)
        self.history.extend(self.prepared.token_ids.tolist())
        self._sampler.observe(self.history)

    def follow(self, leader: Request) -> None:
        """Take a slot, and what the prompt of ``leader`` left in its own: the slots hold the same then.

        :meth:`choose_first` gives the first token. Raises CapacityError if there is no slot.
        """
        assert leader.slot is not None
        self.slot = self._backend.cache.acquire()
        self._backend.cache.fork(leader.slot, self.slot)
        self.history.extend(self.prepared.token_ids.tolist())
        self._sampler.observe(self.history)
        self._pieces.clear()
        self._launched, self._reused = 1, len(self.prepared.token_ids)
        self._logits = leader._logits  # of the first token
        self.prefill_seconds = leader.prefill_seconds

    def choose_first(self) -> Choice:
        """The first token of a follower. Raises NumericError and OptionError."""
        assert self._logits is not None
        logits, self._logits = self._logits, None
        return self.choose(logits)

    def _skip(self, prompt: Fed) -> None:
        """Drop what need not be fed of the prompt."""
        lengths = [one.length for one in prompt.pictures if one.end <= self._reused]
        if len(self._vision_calls) == len(prompt.pictures):  # a call each: else all run, for the pictures that are left
            self._reused_pictures = len(lengths)
            self._vision_calls = self._vision_calls[len(lengths) :]
        missing = sum(lengths[: self._reused_pictures])
        self._pieces = deque(behind(self._pieces, self._reused, sum(lengths), missing))

    @property
    def is_prefilling(self) -> bool:
        """Whether pieces of the prompt are still to be fed."""
        return bool(self._pieces)

    @property
    def next_length(self) -> int:
        """How many tokens the next piece of the prompt has."""
        return len(self._pieces[0])

    def encode(self, *, in_parts: bool) -> Generator[None, None, list[Any]]:
        """Return embeddings of the prompt's pictures, up to those of the next piece; none if it has no pictures.

        They come from a call after another, so that memory for one of them suffices. With ``in_parts`` it yields where
        other calls fit in between: where the backend's tower stops, and behind what was encoded. Started anew, it goes
        on with the next call.
        """
        piece, calls = self._pieces[0], self._vision_calls
        if not piece.picture_lengths:
            return []
        wanted, before = sum(self.prepared.picture_lengths[self._reused_pictures :]), len(self._embeds)
        while len(self._embeds) < len(calls) and (self._encoded < piece.last_embed or piece.last_embed == wanted):
            inputs, backend = calls[len(self._embeds)], self._backend
            if in_parts and isinstance(backend, DividedTower):
                embeds = yield from backend.encode_in_parts(inputs)
            else:
                embeds = backend.encode(inputs)
            self._embeds.append(embeds)
            if self._progress is not None:
                self._progress("vision", len(self._embeds), len(calls))
        if self._encoded < piece.last_embed or (len(self._embeds) == len(calls) and self._encoded != wanted):
            raise BundleError(
                f"the vision graph makes {self._encoded} visual tokens of pictures that have {wanted} by the manifest; "
                "export the model again"
            )
        if in_parts and len(self._embeds) > before:
            yield
        return self._embeds

    @property
    def _encoded(self) -> int:
        return sum(embeds.shape[0] for embeds in self._embeds)

    @property
    def wants_more(self) -> bool:
        """Whether another call is to be launched: the answer has not ended, as far as is known."""
        return self.finish_reason is None and self._launched < self.options.max_new_tokens

    def next_row(self) -> Row:
        """What the next call feeds of this request: -1 for a token that the host has not read."""
        assert self.slot is not None
        cache = self._backend.cache
        if not self._pieces:
            is_unread = self._launched > len(self._answer)
            fed = np.array([-1] if is_unread else self.history[cache.length(self.slot) :], np.int32)
            self._launched += 1
            return cache.row(self.slot, fed)
        piece = self._pieces.popleft()
        if not self._pieces:
            self._launched += 1
        positions = self.prepared.positions
        return piece.row(cache, self.slot, self._fed, positions, self._first_position, embeds=self._encoded)

    def prepare_choice(self) -> SampledRow:
        """How the backend chooses the token of the call that is about to be launched; tells it what it lacks."""
        assert self.slot is not None
        backend = cast(SamplingBackend, self._backend)
        options, step = self.options, self._launched - 1
        if self._pieces:  # the prompt goes on: whatever is chosen is dropped
            return SampledRow(0.0, 0, 1.0, 1.0, 0, step=0, wants_log_probability=False)
        excluded = self._sampler.excluded(step)
        if self._excluded is None:
            backend.begin(self.slot, self.history if options.repetition_penalty != 1 else (), excluded)
        elif excluded != self._excluded:
            backend.exclude(self.slot, excluded)
        self._excluded = excluded
        return SampledRow(
            options.temperature,
            min(options.top_k, self._backend.manifest.model.vocab_size),
            options.top_p,
            options.repetition_penalty,
            options.seed,
            step=step,
            wants_log_probability=options.logprobs,
        )

    @property
    def needs_host(self) -> bool:
        """Whether the host has to know a token before the next is chosen: rules look back, others choose from the same
        logits, or what is fed too much could not be taken back from a slot that goes on, as states of linear attention
        cannot."""
        is_linear = bool(self._backend.manifest.model.linear_layers)
        return self._sampler.looks_back or bool(self.followers) or (is_linear and not self.owns_slot)

    def choose(self, logits: np.ndarray) -> Choice:
        """The next token from logits [V], on the host. Raises NumericError and OptionError."""
        self._excluded = None  # the backend does not know of this token
        if self.followers:
            self._logits = logits
        return self._sampler.choose(logits)

    def note_piece(self, seconds: float) -> None:
        """A call of so many seconds fed a piece of the prompt that is not the last."""
        self.prefill_seconds += seconds

    def accept(self, choice: Choice | Exception, seconds: float) -> Chunk:
        """Take over the token that a call of so many seconds chose, or raise the error that it is.

        That of logits that are no numbers (-1) names the part of the model that comes first.
        """
        if self._answer:
            self.decode_seconds += seconds
        else:
            self.prefill_seconds += seconds
        embeds, self._embeds = self._embeds, []
        self._read += 1
        try:
            token, logprob = checked(choice)
        except Exception as error:
            if not isinstance(error, NumericError):
                raise
            assert self.slot is not None
            lengths = self.prepared.picture_lengths[self._reused_pictures :]
            reason = nonfinite.explain(self._backend, self.slot, embeds, (*[0] * self._reused_pictures, *lengths))
            raise NumericError(f"{error}; {reason}") from error
        self._sampler.note(token)
        logprobs = None if logprob is None else (logprob,)
        self._logprobs += logprobs or ()
        self._answer.append(token)
        self.history.append(token)
        text = ""
        if token in self._eos:
            self.finish_reason = "eos"
        else:
            text = self._stops.push(self._decoder.push(token))
            if self._stops.found is None and len(self._answer) == self.options.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            text += self._stops.push(self._decoder.flush())
        if self._stops.found is not None:
            self.finish_reason = "stop"
        elif self.finish_reason:
            text += self._stops.flush()
        if not any(self._text):
            text = text.lstrip()
        self._text.append(text)
        if self.finish_reason is None:
            return Chunk(self.row, text, (token,), logprobs=logprobs)
        generation = Generation(
            text="".join(self._text),
            token_ids=tuple(self._answer),
            finish_reason=self.finish_reason,
            prompt_tokens=self._prompt_tokens,
            visual_tokens=sum(self.prepared.picture_lengths),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            logprobs=tuple(self._logprobs) if self.options.logprobs else None,
            reused_tokens=self._reused,
        )
        return Chunk(self.row, text, (token,), self.finish_reason, generation, logprobs)

    def leave(self, *, keep: bool = False) -> None:
        """End the request, at its end or before: give the slot back, or undo a prompt of which a part was not fed.

        ``keep``: what is in a slot that is given back is sound, so that others may go on from it.
        """
        cache = self._backend.cache
        if self.slot is None:
            return
        if keep and self._kept is not None and self._prompt is not None:
            self._kept.keep(self.slot, self._prompt.grown(self.history))
        elif self.owns_slot:
            cache.release(self.slot)
        elif cache.length(self.slot) < self._base + len(self.prepared.token_ids):
            cache.rewind(self.slot, self._mark)
            del self.history[self._base :]
        else:  # what a call under way feeds is not part of the history
            fed = self._base + len(self.prepared.token_ids) + max(0, self._read - 1)
            cache.retract(self.slot, cache.length(self.slot) - fed)

    @property
    def _prompt_tokens(self) -> int:
        return len(self.history) - len(self._answer) - self._start
