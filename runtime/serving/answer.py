"""What a request to a server gets: its chunks as they come, for threads and for coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from typing import Any

from vkvx.errors import VkvxError, describe
from vkvx.runtime.sessions.generation import Chunk, Generation


class ChunkStream:
    """The chunks of one request and its end: written by the server's thread, read by any."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], object]] = []

    def put(self, chunk: Chunk) -> None:
        """Add a chunk; the one with the generation is the last."""
        with self._changed:
            self._chunks.append(chunk)
            self._tell()

    def fail(self, error: BaseException) -> None:
        """End with an error, if it has not ended."""
        with self._changed:
            if not self._ended:
                self._error = error
                self._tell()

    def listen(self, listener: Callable[[], object]) -> None:
        """Call ``listener`` after each change, in the thread that makes it."""
        with self._changed:
            self._listeners.append(listener)

    def forget(self, listener: Callable[[], object]) -> None:
        """No longer call it."""
        with self._changed:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def has(self, index: int) -> bool:
        """Whether :meth:`get` would not wait."""
        with self._changed:
            return index < len(self._chunks) or self._ended

    def get(self, index: int, timeout: float | None) -> Chunk:
        """See :meth:`Answer.chunk`."""
        with self._changed:
            if not self._changed.wait_for(lambda: index < len(self._chunks) or self._ended, timeout):
                raise TimeoutError(f"no chunk {index} after {timeout:g} s; wait longer, or cancel() the request")
            if index < len(self._chunks):
                return self._chunks[index]
        if self._error is None:
            raise IndexError(f"the answer has {len(self._chunks)} chunks, there is no chunk {index}")
        raise _for_client(self._error)

    @property
    def _ended(self) -> bool:
        return self._error is not None or bool(self._chunks and self._chunks[-1].generation is not None)

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in list(self._listeners):
            with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody waits any more
                listener()


class Answer:
    """The answer to one request. Iterate over it, ``async`` or not, or wait for its :meth:`result` or ``await`` it.

    Chunks stay, so that several may read them, and one reader several times. Whoever leaves an iteration before its end
    cancels the request, and so does dropping the last reference to the answer. ``number`` is the request's in the log
    of the server.
    """

    def __init__(self, number: int, stream: ChunkStream, cancel: Callable[[int], object]) -> None:
        self.number = number
        self._stream = stream
        self._cancel = weakref.finalize(self, cancel, number)
        self._cancel.atexit = False

    def chunk(self, index: int, timeout: float | None = None) -> Chunk:
        """Chunk number ``index``, from 0; waits for it.

        Raises TimeoutError after ``timeout`` seconds, VkvxError if the request failed before, IndexError past the last.
        """
        return self._stream.get(index, timeout)

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks up to the last, which holds the whole generation. Raises VkvxError if the request fails."""
        index = 0
        while True:
            chunk = self.chunk(index)
            index += 1
            try:
                yield chunk
            except GeneratorExit:
                self.cancel()
                raise
            if chunk.generation is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """The same for a coroutine; no thread waits meanwhile."""
        changed, index = asyncio.Event(), 0
        listener = partial(asyncio.get_running_loop().call_soon_threadsafe, changed.set)
        self._stream.listen(listener)
        try:
            while True:
                changed.clear()
                if not self._stream.has(index):
                    await changed.wait()
                    continue
                chunk = self.chunk(index)
                index += 1
                yield chunk
                if chunk.generation is not None:
                    return
        except (GeneratorExit, asyncio.CancelledError):
            self.cancel()
            raise
        finally:
            self._stream.forget(listener)

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the whole answer. Raises TimeoutError after ``timeout`` seconds; the request goes on then."""
        deadline = None if timeout is None else time.monotonic() + timeout
        index = 0
        while True:
            chunk = self.chunk(index, None if deadline is None else max(0.0, deadline - time.monotonic()))
            if chunk.generation is not None:
                return chunk.generation
            index += 1

    def __await__(self) -> Generator[Any, None, Generation]:
        return self._whole().__await__()

    async def _whole(self) -> Generation:
        last = [chunk async for chunk in self][-1]
        assert last.generation is not None
        return last.generation

    def cancel(self) -> None:
        """End the request, unless it has ended; its slot is free after the step that runs."""
        self._cancel()


def _for_client(error: BaseException) -> VkvxError:
    """A VkvxError from this one: each reader gets its own, since to raise an error changes its traceback."""
    own = copy.copy(error) if isinstance(error, VkvxError) else VkvxError(describe(error))
    own.__cause__ = error if error.__traceback__ else None  # what was never raised tells nothing more
    return own
