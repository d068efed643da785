"""Options of generation, and the choice of the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from vkvx.errors import OptionError, VkvxError
from vkvx.models.pictures.limits import PixelLimits

_TYPES: dict[str, tuple[tuple[type, ...], type, str]] = {
    "int": ((int, np.integer), int, "a whole number"),
    "float": ((int, float, np.integer, np.floating), float, "a number"),
    "bool": ((bool, np.bool_), bool, "True or False"),
}
"""By annotation of an option: what may be given, what it becomes, and the words for it."""
_UNIT_WEIGHT = np.float32(2**40)
"""Of the likeliest token: weights are integers, whose sum does not depend on the order."""


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate.

    ``max_new_tokens`` limits the answer. ``temperature`` 0 takes the likeliest token (greedy), otherwise logits are
    divided by it. ``top_k`` keeps the k likeliest tokens (0: all), ``top_p`` the likeliest that together reach this
    probability (1: all). ``repetition_penalty`` divides positive and multiplies negative logits of tokens seen in
    prompt or answer (1: off; Keskar et al., arXiv 1909.05858). ``seed`` makes sampling repeatable. ``stop`` strings
    end the answer and are not part of it. ``ignore_eos`` goes on past the end-of-sequence token. ``logprobs`` asks for
    the log-probability of each token, by the logits as the model gives them.

    ``min_pixels`` and ``max_pixels`` limit the pixels of the prompt's pictures once they are resized, in place of the
    bundle's image processor; they may be narrower or wider than its own. Only for models that have such limits.
    ``fps`` is how many frames a second are taken of a video file (None: as the checkpoint's video processor says), and
    of frames that are given as pictures how many there were.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stop, (str, list, tuple)):
            raise OptionError(f"stop (--stop) must be strings that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for entry in fields(self):
            value, kind = getattr(self, entry.name), str(entry.type)
            known = _TYPES.get(kind.removesuffix(" | None"))
            if known is None or (value is None and kind.endswith("None")):
                continue
            allowed, convert, noun = known
            if not isinstance(value, allowed) or (isinstance(value, bool) and convert is not bool):
                raise OptionError(f"{entry.name} ({_flag(entry.name)}) must be {noun}, got {value!r}")
            object.__setattr__(self, entry.name, convert(value))
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "positive (1 is off)"),
            ("seed", 0 <= self.seed < 2**64, "0 or positive, and below 2^64"),
            ("fps", self.fps is None or 0 < self.fps < float("inf"), "a positive number"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "strings that are not empty"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise OptionError(f"{name} ({_flag(name)}) must be {expected}, got {getattr(self, name)!r}")
        self.limits.check()

    @property
    def limits(self) -> PixelLimits:
        """Of the pixels of pictures."""
        return PixelLimits(self.min_pixels, self.max_pixels)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def changed_options(base: GenerationOptions | None, changes: dict[str, Any]) -> GenerationOptions:
    """Options with some fields changed. Raises OptionError for unknown fields and values out of range."""
    known = [entry.name for entry in fields(GenerationOptions)]
    for name in changes:
        if name not in known:
            raise OptionError(f"unknown option '{name}': give some of {', '.join(known)}")
    return replace(base or GenerationOptions(), **changes)


class Choice(NamedTuple):
    """A token, and its log-probability by the logits as they were given, if that was asked for."""

    token: int
    log_probability: float | None = None


class Sampler:
    """Chooses the tokens of one row. Each row has its own generator, so a row samples in a batch what it samples alone.

    ``excluded`` tokens are never chosen. ``vkvx_sample`` is the same on a GPU: the n-th draw is the first number of
    Philox4x64-10 for the seed as key and n as counter, weights are integers, and a token is looked up in the order of
    the vocabulary. Tokens as likely as the last one that ``top_k`` or ``top_p`` keeps are kept, too.
    """

    def __init__(self, options: GenerationOptions, vocab_size: int, excluded: Iterable[int] = ()) -> None:
        self._options = options
        self._random = np.random.Philox(key=options.seed)
        self._seen = np.zeros(vocab_size, bool)
        self._excluded = [token for token in excluded if 0 <= token < vocab_size]

    def observe(self, token_ids: np.ndarray | list[int]) -> None:
        """Note tokens of the prompt or the answer for the repetition penalty; ids past the vocabulary are ignored."""
        if self._options.repetition_penalty != 1:
            ids = np.asarray(token_ids, np.int64)
            self._seen[ids[(ids >= 0) & (ids < len(self._seen))]] = True

    def sample(self, logits: np.ndarray) -> Choice:
        """The next token from FP32 logits [V]. Raises VkvxError if they are not numbers."""
        options = self._options
        scores = logits.astype(np.float32)  # a copy
        if options.repetition_penalty != 1:
            seen, penalty = scores[self._seen], np.float32(options.repetition_penalty)
            scores[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        scores[self._excluded] = -np.inf
        best = int(np.argmax(scores))  # the first NaN if there is one
        if not np.isfinite(scores[best]):
            raise not_numbers(float(scores[best]))
        token = best if np.float32(options.temperature) == 0 else self._draw(scores, scores[best])
        self.observe([token])
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
            weights[scores < scores[order[np.searchsorted(sums, max(1, target))]]] = 0
        sums = np.cumsum(weights)
        wanted = int(self._random.random_raw(4)[0]) * int(sums[-1]) >> 64
        return int(np.searchsorted(sums, wanted, side="right"))


def log_probability(logits: np.ndarray, token: int) -> float:
    """Of a token by FP32 logits [V]: their log-softmax."""
    best = logits.max()
    return float(logits[token] - best - np.log(np.exp(logits - best).sum()))


def not_numbers(value: float) -> VkvxError:
    """The error of a row whose greatest logit is not a number or infinite."""
    return VkvxError(f"the decoder returned {value} among the logits; compare bundle and model with `vkvx validate`")
