"""What a backend does for a session, and which there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vkvx.errors import OptionError
from vkvx.manifest import Manifest
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.engine_manifest import Limits
from vkvx.runtime.layout import Call

BACKENDS = ("onnxruntime",)
PROVIDERS = ("auto", "cpu", "cuda")


class Backend(Protocol):
    """Runs the graphs of one bundle over one cache."""

    manifest: Manifest
    cache: PackedCache
    limits: Limits | None
    """The most that a call may bring, None where only memory limits it."""

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

        ``visual_embeds`` [B, Nv, hidden] comes from :meth:`place` or :func:`vkvx.runtime.layout.place_embeds`; None if
        no row has a picture. Caches and counts of the call's slots are updated in place. The caller has checked that everything
        fits. If this raises, the counts are as before.
        """


def open_backend(
    name: str,
    bundle: Path,
    manifest: Manifest,
    *,
    slots: int,
    visual_tokens: int,
    text_tokens: int,
    provider: str = "auto",
    threads: int | None = None,
) -> Backend:
    """Open a bundle in a backend by name. Raises OptionError, DependencyError, BundleError."""
    if name not in BACKENDS:
        raise OptionError(f"unknown backend '{name}': give one of {', '.join(BACKENDS)}")
    from vkvx.runtime.onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        bundle,
        manifest,
        slots=slots,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        provider=provider,
        threads=threads,
    )
