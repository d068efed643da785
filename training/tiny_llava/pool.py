"""A pool of training pages that worker processes keep renewing while the model trains on it.

Drawing a page takes about 10 ms of one core and a training step needs a hundred pages at once: so pages are drawn all
the time, in every core, and a step picks at random from the few thousand newest ones, which lie on the accelerator.
"""

from __future__ import annotations

import mmap
import multiprocessing
import queue
import threading
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from vkvx.models.tiny_llava import data

CHUNK = 32
"""Pages that a worker draws in one go."""


def _draw(buffer: np.ndarray, orders: Any, done: Any) -> None:
    """Worker: fill chunks of the shared buffer [slots, CHUNK, 336, 336, 3] with the pages of consecutive seeds."""
    while True:
        slot, seed = orders.get()
        records = []
        for i in range(CHUNK):
            page = data.page(seed + i, "train")
            buffer[slot, i] = np.asarray(page.image)
            records.append((page.digits, page.marks))
        done.put((slot, records))


class PagePool:
    """`pixels` is uint8 [capacity, 336, 336, 3] on the device; `records[i]` holds the digits and the marks of page i.

    Make it before anything touches CUDA: the workers are forked.
    """

    def __init__(self, capacity: int, workers: int, first_seed: int) -> None:
        self.capacity, self.size, self.next_seed = capacity // CHUNK * CHUNK, 0, first_seed
        self._position, slots = 0, 2 * workers
        context = multiprocessing.get_context("fork")
        shape = (slots, CHUNK, data.SIZE, data.SIZE, 3)
        # Anonymous shared memory: inherited by the forked workers and not limited by the size of /dev/shm.
        self._buffer = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=np.uint8).reshape(shape)
        self._orders, self._done = context.SimpleQueue(), context.SimpleQueue()
        data.handwriting("train")  # loaded once, before the fork
        for slot in range(slots):
            self._order(slot)
        arguments = (self._buffer, self._orders, self._done)
        self._workers = [context.Process(target=_draw, args=arguments, daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()
        self._lock = threading.Lock()
        self._ready: queue.Queue[tuple[torch.Tensor, list]] = queue.Queue(maxsize=16)

    def start(self, device: torch.device, pages: int) -> None:
        """Begin to fill the pool on a device and wait for the first pages."""
        self.pixels = torch.empty((self.capacity, data.SIZE, data.SIZE, 3), dtype=torch.uint8, device=device)
        self.records: list[tuple[np.ndarray, tuple[data.Mark, ...]]] = []
        threading.Thread(target=self._upload, args=(device,), daemon=True).start()
        while self.size < min(pages, self.capacity):
            self._store(*self._ready.get())

    def refill(self, pages: int) -> None:
        """Take over pages that are ready, about this many at most, in place of the oldest ones."""
        for _ in range(-(-pages // CHUNK)):
            if self._ready.empty():
                break
            self._store(*self._ready.get())

    def paused(self) -> threading.Lock:
        """As a context: no page is copied to the device meanwhile."""
        return self._lock

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()

    def _order(self, slot: int) -> None:
        self._orders.put((slot, self.next_seed))
        self.next_seed += CHUNK

    def _upload(self, device: torch.device) -> None:
        """Thread: copy finished chunks to the device, beside the training step's own stream."""
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream) if stream else nullcontext():
            while True:
                slot, records = self._done.get()
                with self._lock:
                    chunk = torch.from_numpy(self._buffer[slot]).to(device, copy=True)
                    if stream:
                        stream.synchronize()
                self._ready.put((chunk, records))
                self._order(slot)

    def _store(self, chunk: torch.Tensor, records: list) -> None:
        if chunk.is_cuda:  # it was made on the other stream: keep its memory until this copy is done
            chunk.record_stream(torch.cuda.current_stream(chunk.device))
        at = self._position
        self.pixels[at : at + CHUNK] = chunk
        self.records[at : at + CHUNK] = records
        self._position = (at + CHUNK) % self.capacity
        self.size = max(self.size, at + CHUNK)
