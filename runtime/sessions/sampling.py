"""Options of generation, and the choice of the next token from logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from vkvx.errors import NumericError, OptionError
from vkvx.models.pictures.limits import PixelLimits

_TYPES: dict[str, tuple[tuple[type, ...], type, str]] = {
    "int": ((int, np.integer), int, "a whole number"),
    "float": ((int, float, np.integer, np.floating), float, "a number"),
    "bool": ((bool, np.bool_), bool, "True or False"),
}
"""By annotation of an option: what may be given, what it becomes, and the words for it."""


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate.

    ``max_new_tokens`` limits the answer. ``temperature`` 0 takes the likeliest token (greedy), otherwise logits are
    divided by it. ``top_k`` keeps the k likeliest tokens (0: all), ``top_p`` the likeliest that together reach this
    probability (1: all). ``repetition_penalty`` divides positive and multiplies negative logits of tokens seen in
    prompt or answer (1: off; Keskar et al., arXiv 1909.05858). ``seed`` makes sampling repeatable. ``stop`` strings
    end the answer and are not part of it. ``ignore_eos`` goes on past the end-of-sequence token.

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
            ("seed", self.seed >= 0, "0 or positive"),
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


class Sampler:
    """Chooses the tokens of one row. Each row has its own generator, so a row samples in a batch what it samples alone.

    ``excluded`` tokens are never chosen.
    """

    def __init__(self, options: GenerationOptions, vocab_size: int, excluded: Iterable[int] = ()) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._seen = np.zeros(vocab_size, bool)
        self._excluded = [token for token in excluded if 0 <= token < vocab_size]

    def observe(self, token_ids: np.ndarray | list[int]) -> None:
        """Note tokens of the prompt or the answer for the repetition penalty; ids past the vocabulary are ignored."""
        if self._options.repetition_penalty != 1:
            ids = np.asarray(token_ids, np.int64)
            self._seen[ids[(ids >= 0) & (ids < len(self._seen))]] = True

    def sample(self, logits: np.ndarray) -> int:
        """The next token from FP32 logits [V]. Raises NumericError if they are not numbers."""
        options = self._options
        scores = logits.astype(np.float64 if options.temperature else np.float32)  # a copy in either case
        scores[self._excluded] = -np.inf
        if options.repetition_penalty != 1:
            seen, penalty = scores[self._seen], options.repetition_penalty
            scores[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        best = int(np.argmax(scores))  # the first NaN if there is one
        if not np.isfinite(scores[best]):
            raise NumericError(f"the decoder returned {scores[best]} among the logits")
        token = best if options.temperature == 0 else self._draw(scores)
        self.observe([token])
        return token

    def _draw(self, scores: np.ndarray) -> int:
        options = self._options
        order = np.argsort(-scores, kind="stable")
        if options.top_k:
            order = order[: options.top_k]
        weights = np.exp((scores[order] - scores[order[0]]) / options.temperature)
        total = np.cumsum(weights)
        keep = len(order)
        if options.top_p < 1:
            # The likeliest tokens up to and with the one that reaches top_p.
            keep = int(np.searchsorted(total, options.top_p * total[-1])) + 1
        chosen = np.searchsorted(total[:keep], self._random.random() * total[keep - 1], side="right")
        return int(order[min(int(chosen), keep - 1)])
