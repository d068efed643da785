"""Runs a bundle: packed cache, backends, generation, conversations. The names below are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vkvx.runtime.backends.base import Backend
    from vkvx.runtime.backends.registry import open_backend
    from vkvx.runtime.cache import PackedCache
    from vkvx.runtime.calls import Call, Row, build_call, place_embeds
    from vkvx.runtime.sessions.conversation import Conversation
    from vkvx.runtime.sessions.generation import Chunk, Generation
    from vkvx.runtime.sessions.processor import Processor
    from vkvx.runtime.sessions.sampling import GenerationOptions
    from vkvx.runtime.sessions.session import Session

_HOMES = {
    "Backend": "backends.base",
    "Call": "calls",
    "Chunk": "sessions.generation",
    "Conversation": "sessions.conversation",
    "Generation": "sessions.generation",
    "GenerationOptions": "sessions.sampling",
    "PackedCache": "cache",
    "Processor": "sessions.processor",
    "Row": "calls",
    "Session": "sessions.session",
    "build_call": "calls",
    "open_backend": "backends.registry",
    "place_embeds": "calls",
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
