"""What a backend does for a session, and what is known of one before it is opened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vkvx.errors import InputError, OptionError
from vkvx.manifest import Manifest
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Call
from vkvx.runtime.engines.manifest import Limits

PROVIDERS = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class SampledRow:
    """How a backend chooses the next token of a row: options of generation, and ``step``, how many it has chosen."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    step: int
    wants_log_probability: bool


class PendingTokens(Protocol):
    """What :meth:`SamplingBackend.launch` chose, perhaps not done yet."""

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for it: tokens INT32 [B], and log-probabilities FP32 [B].

        A token is -1 where logits are no numbers, -2 where all are excluded.
        """


class CallInParts(ABC):
    """A call of one row that is launched part by part, so that other calls fit in between; tokens as of
    :class:`PendingTokens` once all are. Counts of the cache are those after the call when the last part is launched.

    No other call of several positions may be launched before that; a call whose last part never comes has no effect.
    """

    @abstractmethod
    def advance(self) -> bool:
        """Launch the next part; whether there are others."""

    @abstractmethod
    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`PendingTokens.result`."""


class Backend(Protocol):
    """Runs the model of one bundle over one cache, for calls from any thread, one at a time.

    ``provider`` is where: "cpu" or "cuda"; ``device`` says it to people: "CPU", "NVIDIA H200 (GPU 0)".
    """

    name: str
    provider: str
    device: str
    manifest: Manifest
    cache: PackedCache
    closed: bool

    @property
    def limits(self) -> Limits | None:
        """The most that a call may bring, None where only memory limits it."""

    @property
    def samples(self) -> bool:
        """Whether it can choose tokens itself: whether it is a :class:`SamplingBackend`."""

    def encode(self, pixel_inputs: Mapping[str, np.ndarray]) -> Any:
        """Embeddings [tokens of all pictures, hidden] of pictures, from what the image processor returns.

        A NumPy array, or one on a device that ``np.asarray`` copies to main memory.
        """

    def place(self, call: Call, embeds: Sequence[Any]) -> Any:
        """``visual_embeds`` [B, Nv, hidden] of a call, from what :meth:`encode` gave for its pictures, in order.

        It is good for the next :meth:`step` only.
        """

    def step(self, call: Call, visual_embeds: Any | None) -> np.ndarray:
        """Run the decoder once: logits FP32 [B, V] at each row's last token.

        ``visual_embeds`` [B, Nv, hidden] comes from :meth:`place` or :func:`vkvx.runtime.calls.place_embeds`; None if
        no row has a picture. Caches and counts of the call's slots are updated in place. The caller has checked that
        everything fits. If this raises, the counts are as before.
        """

    def close(self) -> None:
        """Free models and buffers; a second time does nothing.

        Afterwards only the counts of ``cache`` may be used.
        """


@runtime_checkable
class DividedTower(Protocol):
    """A backend whose vision tower runs in parts, between which other calls fit."""

    def encode_in_parts(self, pixel_inputs: Mapping[str, np.ndarray]) -> Generator[None, None, Any]:
        """As :meth:`Backend.encode`, to the bit; yields between parts. Closing it in their midst frees what it holds.

        Only one may be under way.
        """


class SamplingBackend(Backend, Protocol):
    """A backend that chooses tokens itself."""

    def begin(self, slot: int, seen: Sequence[int], excluded: Sequence[int]) -> None:
        """A sequence starts in a slot. ``seen`` tokens are those of its history, ``excluded`` ones are never chosen."""

    def exclude(self, slot: int, excluded: Sequence[int]) -> None:
        """Other tokens are never chosen in a slot from now on."""

    def launch(self, call: Call, visual_embeds: Any | None, rows: Sequence[SampledRow]) -> PendingTokens | CallInParts:
        """Like :meth:`Backend.step`, and choose the next token of each row; nothing is waited for.

        -1 in the input of a decode step is the token chosen last in the row's slot. Counts of the cache are those after
        the call when this returns. A call that brings a prompt may come back in parts, none of which is launched.
        """


@dataclass(frozen=True)
class Candidate:
    """A backend that may run a bundle on this machine; nothing of it is loaded yet.

    ``reason`` says what speaks for it, ``against`` why ``auto`` passes over it: None where it does not, "" where there
    is nothing to tell. ``limits`` are those of :attr:`Backend.limits`; ``gpu`` is the CUDA index of the GPU that it
    uses if it uses one. ``open(slots=, visual_tokens=, text_tokens=, verify=)`` opens it. ``check()`` raises what is
    wrong with it as far as that is known without the files of the bundle: before they are read and compared.
    """

    name: str
    reason: str
    against: str | None
    open: Callable[..., Backend]
    limits: Limits | None = None
    gpu: int = 0
    check: Callable[[], None] = lambda: None


def against_gpu(provider: str, threads: int | None) -> str | None:
    """Why somebody who gave these options wants no GPU; None if they leave it open."""
    if provider == "cpu":
        return "the CPU was asked for"
    return None if threads is None else "a number of CPU threads was asked for"


def check_machine(provider: str, threads: int | None) -> None:
    """Raise OptionError for a ``provider`` that is not known, or no thread at all."""
    if provider not in PROVIDERS:
        raise OptionError(f"unknown provider '{provider}' (--provider): give one of {', '.join(PROVIDERS)}")
    if threads is not None and threads < 1:
        raise OptionError(f"threads (--threads) must be at least 1, got {threads}")


def check_open(backend: Backend) -> None:
    """Raise InputError if the backend is closed."""
    if backend.closed:
        raise InputError("the session is closed; open the bundle again with Session.load()")
