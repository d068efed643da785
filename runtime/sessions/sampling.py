"""Options of generation, and the choice of the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from vkvx.errors import NumericError, OptionError
from vkvx.manifest import Manifest
from vkvx.models.pictures.limits import PixelLimits
from vkvx.sampling import RANGES, SamplingRules


def _kind(allowed: tuple[type, ...], convert: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, allowed) or (isinstance(value, bool) and convert is not bool):
            raise ValueError
        return convert(value)

    return read


def _list_of(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read_all(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(read(entry) for entry in value)

    return read_all


_WHOLE = _kind((int, np.integer), int)
_TYPES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int": (_WHOLE, "a whole number"),
    "float": (_kind((int, float, np.integer, np.floating), float), "a number"),
    "bool": (_kind((bool, np.bool_), bool), "True or False"),
    "tuple[str, ...]": (_list_of(_kind((str,), str)), "strings that are not empty"),
    "tuple[int, ...]": (_list_of(_WHOLE), "a list of token ids"),
    "tuple[tuple[int, ...], ...]": (_list_of(_list_of(_WHOLE)), "lists of token ids, none empty"),
}
"""By annotation of an option: what makes it of what is given (ValueError if that is none), and the words for it."""
_UNIT_WEIGHT = np.float32(2**38)
"""Of the likeliest token: weights are integers, whose sum does not depend on the order."""


@dataclass(frozen=True)
class GenerationOptions(SamplingRules):
    """How to generate: the rules of :class:`SamplingRules`, and these.

    ``max_new_tokens`` limits the answer. ``seed`` makes sampling repeatable. ``ignore_eos`` goes on past the
    end-of-sequence token. ``logprobs`` asks for the log-probability of each token, by the logits as the model gives
    them.

    ``min_pixels`` and ``max_pixels`` limit the pixels of the prompt's pictures once they are resized, in place of the
    bundle's image processor; they may be narrower or wider than its own. Only for models that have such limits.
    ``fps`` is how many frames a second are taken of a video file (None: as the checkpoint's video processor says), and
    of frames that are given as pictures how many there were.

    An object of this class says all; a bundle's own defaults (:func:`default_options`) do not change it.
    """

    max_new_tokens: int = 256
    seed: int = 0
    ignore_eos: bool = False
    logprobs: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for entry in fields(self):
            value, kind = getattr(self, entry.name), str(entry.type)
            if value is None and kind.endswith("None"):
                continue
            read, expected = _TYPES[kind.removesuffix(" | None")]
            try:
                object.__setattr__(self, entry.name, read(value))
            except ValueError:
                raise self._refused(entry.name, expected) from None
        ranges = {
            "max_new_tokens": (lambda value: value >= 1, "at least 1"),
            **RANGES,
            "seed": (lambda value: 0 <= value < 2**64, "0 or positive, and below 2^64"),
            "fps": (lambda value: value is None or 0 < value < float("inf"), "a positive number"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid(getattr(self, name)):
                raise self._refused(name, expected)
        if self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens (--min-new-tokens) {self.min_new_tokens} is more than max_new_tokens "
                f"(--max-new-tokens) {self.max_new_tokens}; give limits in this order"
            )
        self.limits.check()

    def _refused(self, name: str, expected: str) -> OptionError:
        return OptionError(f"{name} ({_flag(name)}) must be {expected}, got {getattr(self, name)!r}")

    @property
    def limits(self) -> PixelLimits:
        """Of the pixels of pictures."""
        return PixelLimits(self.min_pixels, self.max_pixels)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_options(manifest: Manifest, max_new_tokens: Any = None) -> GenerationOptions:
    """What holds for a bundle unless a caller gives something else: the rules of its checkpoint.

    A caller's ``max_new_tokens`` comes before the checkpoint's least length. Raises OptionError for a wrong one.
    """
    plain = GenerationOptions() if max_new_tokens is None else GenerationOptions(max_new_tokens=max_new_tokens)
    rules = manifest.generation.rules()
    if "min_new_tokens" in rules:
        rules["min_new_tokens"] = min(rules["min_new_tokens"], plain.max_new_tokens)
    return replace(plain, **rules)


def changed_options(base: GenerationOptions | None, changes: dict[str, Any]) -> GenerationOptions:
    """Options with some fields changed.

    Raises OptionError for unknown fields, values out of range, and changes that have no effect on a greedy answer.
    """
    known = [entry.name for entry in fields(GenerationOptions)]
    for name in changes:
        if name not in known:
            raise OptionError(f"unknown option '{name}': give some of {', '.join(known)}")
    options = replace(base or GenerationOptions(), **changes)
    _check_effect(options, changes)
    return options


def _check_effect(options: GenerationOptions, given: Mapping[str, Any]) -> None:
    """Raise OptionError for what was given to a choice among tokens, where the likeliest one is taken."""
    for name in ("top_k", "top_p", "seed"):
        if options.temperature == 0 and name in given and getattr(options, name) != getattr(GenerationOptions, name):
            raise OptionError(
                f"{name} ({_flag(name)}) has no effect at temperature 0, which takes the likeliest token; give "
                "temperature (--temperature) as well, such as 0.7, or leave it out"
            )


class Choice(NamedTuple):
    """A token, and its log-probability by the logits as they were given, if that was asked for."""

    token: int
    log_probability: float | None = None


class Sampler:
    """Chooses the tokens of one row. Each row has its own generator, so a row samples in a batch what it samples alone.

    ``excluded`` tokens are never chosen; ``ends`` are those that end the answer. Rules of tokens are those of the
    logits processors of transformers, to the token. ``vkvx_sample`` makes the same choices on a GPU: the n-th is the
    first number of Philox4x64-10 for the seed as key and n as counter, weights are integers, and a token is looked up
    in the order of the vocabulary. Tokens as likely as the last one that ``top_k`` or ``top_p`` keeps are kept, too.
    """

    def __init__(
        self,
        options: GenerationOptions,
        vocab_size: int,
        excluded: Iterable[int] = (),
        ends: Iterable[int] = (),
    ) -> None:
        def known(tokens: Iterable[int]) -> np.ndarray:
            return np.array(sorted(token for token in set(tokens) if 0 <= token < vocab_size), np.int64)

        self._options = options
        self._seen = np.zeros(vocab_size, bool)
        self._ends = known(ends)
        # An end of sequence is no bad word, as in transformers: an answer could not end otherwise.
        words = [word for word in options.bad_words_ids if len(word) > 1 or word[0] not in self._ends]
        alone = (word[0] for word in words if len(word) == 1)
        self._never = known((*excluded, *options.suppress_tokens, *alone))
        self._not_first = known(options.begin_suppress_tokens)
        self._words = [word for word in words if len(word) > 1 and word[-1] < vocab_size]
        self._chosen = 0
        self._history: list[int] = []
        self._followers: dict[tuple[int, ...], set[int]] = {}

    def observe(self, token_ids: np.ndarray | list[int]) -> None:
        """Note tokens of the prompt or the answer, for the rules that look back."""
        if self._options.repetition_penalty != 1:
            ids = np.asarray(token_ids, np.int64)
            self._seen[ids[(ids >= 0) & (ids < len(self._seen))]] = True
        size = self._options.no_repeat_ngram_size
        if size or self._words:
            history = self._history
            for token in map(int, token_ids):
                if size and len(history) >= size - 1:
                    self._followers.setdefault(tuple(history[len(history) - size + 1 :]), set()).add(token)
                history.append(token)

    def _repeated(self) -> list[int]:
        """Tokens that would end an n-gram a second time, or a bad word."""
        history, size = self._history, self._options.no_repeat_ngram_size
        found = [word[-1] for word in self._words if history[1 - len(word) :] == list(word[:-1])]
        if size and len(history) >= size - 1:
            repeated = self._followers.get(tuple(history[len(history) - size + 1 :]), ())
            found += [token for token in repeated if 0 <= token < len(self._seen)]
        return found

    @property
    def looks_back(self) -> bool:
        """Whether what is excluded depends on the tokens before."""
        return bool(self._options.no_repeat_ngram_size or self._words)

    def excluded(self, step: int) -> tuple[int, ...]:
        """Tokens that are not chosen as token ``step`` of the answer, from 0, whatever came before."""
        first = self._not_first if step == 0 else ()
        return (*self._never, *first, *(self._ends if step < self._options.min_new_tokens else ()))

    def note(self, token: int) -> None:
        """A token was chosen."""
        self._chosen += 1
        self.observe([token])

    def choose(self, logits: np.ndarray) -> Choice:
        """The next token from FP32 logits [V]; :meth:`note` it.

        Raises NumericError if they are not numbers, OptionError if no token is left.
        """
        options = self._options
        scores = logits.astype(np.float32)  # a copy
        if options.repetition_penalty != 1:
            seen, penalty = scores[self._seen], np.float32(options.repetition_penalty)
            scores[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        scores[[*self.excluded(self._chosen), *self._repeated()]] = -np.inf
        best = int(np.argmax(scores))  # the first NaN if there is one
        if not np.isfinite(scores[best]):
            raise none_left() if scores[best] == -np.inf else not_numbers(float(scores[best]))
        token = best if np.float32(options.temperature) == 0 else self._draw(scores, scores[best])
        return Choice(token, log_probability(logits, token) if options.logprobs else None)

    def _draw(self, scores: np.ndarray, best: np.float32) -> int:
        options = self._options
        with np.errstate(over="ignore", under="ignore"):
            weights = (np.exp((scores - best) / np.float32(options.temperature)) * _UNIT_WEIGHT).astype(np.uint64)
        if 0 < options.top_k < len(scores):
            weights[scores < np.partition(scores, -options.top_k)[-options.top_k]] = 0
        if options.top_p < 1:
            order = np.argsort(-scores, kind="stable")
            sums = np.cumsum(weights[order])
            target = math.ceil(float(np.float32(options.top_p)) * float(sums[-1]))
            last = np.searchsorted(sums, np.uint64(max(1, min(target, int(sums[-1])))))
            weights[scores < scores[order[last]]] = 0
        sums = np.cumsum(weights)
        random = np.random.Philox(key=options.seed, counter=self._chosen).random_raw()
        wanted = int(random) * int(sums[-1]) >> 64
        return int(np.searchsorted(sums, np.uint64(wanted), side="right"))


def log_probability(logits: np.ndarray, token: int) -> float:
    """Of a token by FP32 logits [V]: their log-softmax."""
    best = logits.max()
    return float(logits[token] - best - np.log(np.exp(logits - best).sum()))


NOT_NUMBERS, NONE_LEFT = -1, -2
"""In place of a token that a backend could not choose."""


def checked(choice: Choice | Exception) -> Choice:
    """The choice, if it is one. Raises the error that it is or stands for."""
    if isinstance(choice, Exception):
        raise choice
    if choice.token == NOT_NUMBERS:
        raise not_numbers(float("nan"))
    if choice.token == NONE_LEFT:
        raise none_left()
    return choice


def not_numbers(value: float) -> NumericError:
    """The error of a row with a logit that is no number, or whose greatest is infinite."""
    return NumericError(f"the decoder returned {value} among the logits")


def none_left() -> OptionError:
    """The error of a row whose options exclude all tokens."""
    return OptionError(
        "no token is left to choose; loosen suppress_tokens=, bad_words_ids= or no_repeat_ngram_size= "
        "(--no-repeat-ngram-size)"
    )
