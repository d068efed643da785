"""Typed errors. Every message is one line: what was given, what was expected, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vkvx.runtime.sessions.generation import Generation


class VkvxError(Exception):
    """Base of all errors that a user can cause or fix. The command line prints it in one line and exits 2."""


class OptionError(VkvxError):
    """An option or argument has a value that is not supported."""


class ModelError(VkvxError):
    """A model cannot be found, read, or is of a family that has no family."""


class BundleError(VkvxError):
    """A bundle is incomplete, damaged, unsafe, or of a newer format."""


class EngineError(VkvxError):
    """An engine directory is missing, incomplete, damaged, or made for something else."""


class BuildError(VkvxError):
    """TensorRT cannot build an engine from a bundle: a node it does not take, or too little memory."""


class DeviceError(VkvxError):
    """A GPU or its driver fails at something that it should be able to do."""


class InputError(VkvxError):
    """A prompt or picture cannot be used."""


class CapacityError(VkvxError):
    """A sequence does not fit into the cache it is meant for."""


class NumericError(VkvxError):
    """A model's output is infinite or no number: its type cannot hold it, or weights are damaged."""


class BatchError(VkvxError):
    """Some of several prompts failed.

    ``errors`` holds the error of each prompt that failed, by its index in the list of prompts (from 0), and
    ``generations`` one entry per prompt: its answer, or None if it failed.
    """

    def __init__(self, errors: dict[int, Exception], generations: list[Generation | None]) -> None:
        super().__init__(errors, generations)
        self.errors = errors
        self.generations = generations

    def __str__(self) -> str:
        row, first = min(self.errors.items())
        failed = f"{len(self.errors)} of {len(self.generations)} prompts failed"
        return f"{failed}, first prompts[{row}]: {describe(first)}"


class RequestCancelledError(VkvxError):
    """A request to a server was cancelled before its answer ended."""


class ServerClosedError(VkvxError):
    """A server was closed before an answer ended, or takes no requests any more."""


class BusyError(VkvxError):
    """As many requests wait for a server as it lets wait."""


class DeadlineError(VkvxError):
    """A request to a server did not end within the time that it was given."""


class DependencyError(VkvxError):
    """A package or device that the operation needs is missing."""


class StorageError(VkvxError):
    """Output cannot be written: it exists already, or the disk is full."""


def describe(error: BaseException) -> str:
    """The message of a VkvxError, which explains itself; type and message of any other error."""
    return str(error) if isinstance(error, VkvxError) else f"{type(error).__name__}: {error}"
