"""Typed errors. Every message is one line: what was given, what was expected, and what to do about it."""

from __future__ import annotations


class VkvxError(Exception):
    """Base of all errors that a user can cause or fix. The command line prints it in one line and exits 2."""


class OptionError(VkvxError):
    """An option or argument has a value that is not supported."""


class ModelError(VkvxError):
    """A model cannot be found, read, or is of a family that has no adapter."""


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


class DependencyError(VkvxError):
    """A package or device that the operation needs is missing."""


class StorageError(VkvxError):
    """Output cannot be written: it exists already, or the disk is full."""
