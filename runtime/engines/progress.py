"""What a build tells while it runs, and how it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from vkvx.manifest import Progress

_T = TypeVar("_T")
_STEPS = 1000


class BuildProgress:
    """The fraction of a build that is done, from nested phases of steps. Thread-safe, as TensorRT wants it."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self._stage, self._progress = stage, progress
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps done, steps
        self._shown = -1
        self.cancelled = False

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins, within a step of ``parent``."""
        with self._lock:
            self._phases[phase] = (parent, 0, max(1, steps))
            self._show()

    def step(self, phase: str, step: int) -> bool:
        """Step number ``step`` of a phase is done; returns whether to go on."""
        with self._lock:
            if phase in self._phases:
                parent, _, steps = self._phases[phase]
                self._phases[phase] = (parent, min(step + 1, steps), steps)
                self._show()
        return not self.cancelled

    def finish(self, phase: str) -> None:
        """A phase has ended."""
        with self._lock:
            self._phases.pop(phase, None)

    def done(self) -> None:
        """The build has ended."""
        self._progress(self._stage, _STEPS, _STEPS)

    def fraction(self) -> float:
        """Share of the outermost phase that is done, with those inside it."""
        roots = [name for name, (parent, _, _) in self._phases.items() if parent not in self._phases]
        return self._of(roots[0]) if roots else 0.0

    def _of(self, phase: str) -> float:
        _, done, steps = self._phases[phase]
        inner = [self._of(name) for name, (parent, _, _) in self._phases.items() if parent == phase]
        return min(1.0, (done + min(sum(inner), 1.0)) / steps)

    def _show(self) -> None:
        # Phases that repeat must not make the bar go back.
        now = min(int(_STEPS * self.fraction()), _STEPS - 1)
        if now > self._shown:
            self._shown = now
            self._progress(self._stage, now, _STEPS)


def monitor(module: Any, progress: BuildProgress) -> Any:
    """An ``IProgressMonitor`` that reports to ``progress``; None where TensorRT has no such thing (before 10)."""
    if not hasattr(module, "IProgressMonitor"):
        return None

    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


def run_cancellable(work: Callable[[], _T], cancel: Callable[[], None]) -> _T:
    """Run ``work`` in a thread of its own; Ctrl-C calls ``cancel``, waits for the end of the work and is raised.

    A call into TensorRT would otherwise hold Ctrl-C back until the engine is built.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    # An event, because Thread.join believes that the thread has ended once Ctrl-C has interrupted it.
    ended = threading.Event()
    threading.Thread(target=call, name="vkvx-build", daemon=True).start()
    try:
        while not ended.wait(0.1):
            pass
    except BaseException:
        cancel()
        ended.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]
