"""Runs a bundle: packed cache, backends, generation, conversations. The names below are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vkvx.runtime.backend import Backend, open_backend
    from vkvx.runtime.cache import PackedCache
    from vkvx.runtime.conversation import Conversation
    from vkvx.runtime.generation import Chunk, Generation
    from vkvx.runtime.layout import Call, Row, build_call, place_embeds
    from vkvx.runtime.processor import Processor
    from vkvx.runtime.sampling import GenerationOptions
    from vkvx.runtime.session import Session

_HOMES = {
    "Backend": "backend",
    "Call": "layout",
    "Chunk": "generation",
    "Conversation": "conversation",
    "Generation": "generation",
    "GenerationOptions": "sampling",
    "PackedCache": "cache",
    "Processor": "processor",
    "Row": "layout",
    "Session": "session",
    "build_call": "layout",
    "open_backend": "backend",
    "place_embeds": "layout",
}

__all__ = [
    "Backend",
    "Call",
    "Chunk",
    "Conversation",
    "Generation",
    "GenerationOptions",
    "PackedCache",
    "Processor",
    "Row",
    "Session",
    "build_call",
    "open_backend",
    "place_embeds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vkvx.runtime' has no attribute {name!r}")
    return getattr(import_module(f"vkvx.runtime.{_HOMES[name]}"), name)
