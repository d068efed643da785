"""Rules by which the tokens of an answer are chosen: options of a caller, and what a bundle keeps of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class SamplingRules:
    """How the next token is chosen.

    ``temperature`` 0 takes the likeliest token (greedy), otherwise logits are divided by it. ``top_k`` keeps the k
    likeliest tokens (0: all), ``top_p`` the likeliest that together reach this probability (1: all).
    ``repetition_penalty`` divides positive and multiplies negative logits of tokens seen in prompt or answer (1: off;
    Keskar et al., arXiv 1909.05858). No ``no_repeat_ngram_size`` tokens follow each other twice in prompt and answer
    (0: off). The end of sequence is not chosen among the first ``min_new_tokens``. ``suppress_tokens`` are never
    chosen, ``begin_suppress_tokens`` not as the first token, ``bad_words_ids`` not one after another. ``stop`` strings
    end the answer and are not part of it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationInfo(SamplingRules):
    """The rules that hold for a bundle unless a caller gives others: those of the checkpoint's generation_config.json.

    ``ignored`` names what that file also asks for, and what no sampler here can do.
    """

    ignored: tuple[str, ...] = ()

    def rules(self) -> dict[str, Any]:
        """The rules that are not those of :class:`SamplingRules` itself."""
        plain = SamplingRules()
        return {name: value for name in RULES if (value := getattr(self, name)) != getattr(plain, name)}


RULES = tuple(entry.name for entry in fields(SamplingRules))
_LARGE = 1e30
"""Logits are FP32, and so is what they are divided or multiplied by."""
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: 0 <= value < _LARGE, "0 (greedy) or a positive number below 1e30"),
    "top_k": (lambda value: value >= 0, "0 (off) or positive"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "repetition_penalty": (lambda value: 1 / _LARGE < value < _LARGE, "between 1e-30 and 1e30 (1 is off)"),
    "no_repeat_ngram_size": (lambda value: value >= 0, "0 (off) or positive"),
    "min_new_tokens": (lambda value: value >= 0, "0 (off) or positive"),
    "suppress_tokens": (lambda value: min(value, default=0) >= 0, "token ids"),
    "begin_suppress_tokens": (lambda value: min(value, default=0) >= 0, "token ids"),
    "bad_words_ids": (lambda value: all(word and min(word) >= 0 for word in value), "lists of token ids, none empty"),
    "stop": (lambda value: all(value), "strings that are not empty"),
}
"""By rule: whether a value of its type will do, and the words for what will."""
