"""Calls that stop in their midst and go on later: a vision tower, between whose layers decode steps run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor, nn

PART = 1 << 40
"""A part of a tower ends behind the layer that reaches so many multiplications: 6 ms of an H200, about as long as a
part of a prompt in an 8B model takes, see :mod:`vkvx.runtime.backends.torch.prefills`."""


def in_turns(call: Callable[[Callable[[], None]], Any]) -> Generator[None, None, Any]:
    """Run ``call(pause)``, yield where it calls ``pause``, and return what it returns.

    It has a thread of its own, which stands still while the caller goes on, and the other way round. Closing the
    generator raises GeneratorExit where it stands, and waits for its end.
    """
    ours, its = threading.Semaphore(0), threading.Semaphore(0)
    results, errors = list[Any](), list[BaseException]()
    is_closed = False

    def pause() -> None:
        ours.release()
        its.acquire()
        if is_closed:
            raise GeneratorExit

    def run() -> None:
        try:
            results.append(call(pause))
        except BaseException as error:
            errors.append(error)
        ours.release()

    # A process may end while it stands still.
    thread = threading.Thread(target=run, name="vkvx-turns", daemon=True)
    thread.start()
    try:
        while True:
            ours.acquire()
            if errors:
                raise errors[0]
            if results:
                return results[0]
            yield
            its.release()
    finally:
        is_closed = True
        its.release()
        thread.join()
        errors.clear()  # their frames know of this list, and of memory of a GPU


class LayerPauses:
    """Calls :attr:`pause`, while there is one, behind the layer of a vision tower that ends a part of its work.

    Towers are plain sequences of layers, in a list of modules outside the decoder.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self.pause: Callable[[], None] | None = None
        self._done = 0
        inner = set(decoder.modules())
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and module not in inner:
                for layer in module:
                    layer.register_forward_hook(self._count)

    def _count(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Multiplications by weights, and those of attention."""
        if self.pause is None:
            return
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        tokens, width = hidden.shape[-2:]
        weights = sum(one.numel() for one in layer.parameters())
        self._done += hidden.numel() // width * (weights + 2 * tokens * width)
        if self._done >= PART:
            self._done = 0
            self.pause()
