"""The onnxruntime backend."""

from __future__ import annotations

from pathlib import Path

from vkvx.manifest import Manifest
from vkvx.packages import RUN, require
from vkvx.runtime.backends.base import Backend, Candidate


def find(bundle: Path, manifest: Manifest, provider: str, threads: int | None) -> list[Candidate]:
    """onnxruntime, which runs every bundle, on a CPU or on a GPU. See :mod:`vkvx.runtime.backends.registry`."""

    def open_backend(*, slots: int, visual_tokens: int, text_tokens: int, verify: bool) -> Backend:
        from vkvx.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

        capacity = {"slots": slots, "visual_tokens": visual_tokens, "text_tokens": text_tokens}
        return OnnxRuntimeBackend(bundle, manifest, provider=provider, threads=threads, **capacity)

    def check() -> None:
        require("onnxruntime", *RUN)
        if provider == "cuda":
            import onnxruntime

            from vkvx.runtime.backends.onnxruntime.backend import choose_provider

            choose_provider(onnxruntime, provider)

    return [Candidate("onnxruntime", "", None, open_backend, check=check)]
