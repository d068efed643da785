"""Writes a bundle's graph in the ONNX that a version of TensorRT takes, by small passes. Weights are not touched.

Each pass says in ``ensures`` what holds after it; what it cannot bring about is a BuildError, not a parser's riddle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import PassBase, PassError, PostconditionError

from vkvx.errors import BuildError, ModelError
from vkvx.opset import OLD as OLD_OPSET
from vkvx.opset import lower_opset
from vkvx.runtime.engines.dialect import Dialect
from vkvx.runtime.engines.lowering.branches import TakeBranch
from vkvx.runtime.engines.lowering.extents import StaticExtents
from vkvx.runtime.engines.lowering.frequencies import SplitFrequencies
from vkvx.runtime.engines.lowering.functions import InlineFunctions, StripFunctions
from vkvx.runtime.engines.lowering.names import UniqueNames
from vkvx.runtime.engines.lowering.rows import PlaceByProduct
from vkvx.runtime.engines.lowering.shapes import PlainReshape, WholeShape
from vkvx.runtime.engines.lowering.slices import SliceAxes
from vkvx.runtime.engines.lowering.types import PluginTypes, check_types
from vkvx.runtime.engines.lowering.vectors import ArgMaxOfMatrix
from vkvx.runtime.engines.lowering.words import SignedWords


def legalise(path: Path, dialect: Dialect, *, plugin_free: bool) -> bytes:
    """An ONNX file as the parser takes it, serialised; its weights stay external, relative to ``path``.

    Without ``plugin_free`` the operator's nodes are left for the plugin, else its function's body takes their place.
    Raises BuildError.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx-ir raise types of their own
        raise BuildError(f"{path} is not a readable ONNX file ({error}); export the model again") from error
    check_types(model, bfloat16=dialect.bfloat16, version=dialect.version)
    for one in passes(dialect, plugin_free=plugin_free):
        try:
            one(model)
        except (PassError, PostconditionError, ModelError) as error:
            reason = error.__cause__ or error
            raise BuildError(
                f"{path.name} cannot be written for TensorRT {dialect.version}: {reason} "
                f"({type(one).__name__}); export the model again with this version of vkvx"
            ) from error
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def passes(dialect: Dialect, *, plugin_free: bool) -> Iterator[PassBase]:
    """The passes for a version, in order."""
    if plugin_free:
        yield from (InlineFunctions(), StaticExtents(), TakeBranch(), SignedWords(), SliceAxes(), ArgMaxOfMatrix())
        yield UniqueNames()
    else:
        yield StripFunctions()
    if dialect.opset is not None:
        yield LowerOpset(dialect.opset)
    if not dialect.shape_and_reshape_attributes:
        yield from (WholeShape(), PlainReshape(), SplitFrequencies())
        if not plugin_free:
            yield from (PlaceByProduct(), PluginTypes())


class LowerOpset(ir.passes.InPlacePass):
    """Rewrites a graph of a newer opset as one of ``opset``."""

    def __init__(self, opset: int) -> None:
        super().__init__()
        self._opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        newer = model.opset_imports[""] > self._opset
        if newer and self._opset == OLD_OPSET:
            lower_opset(model)
        return ir.passes.PassResult(model, newer)

    def ensures(self, model: ir.Model) -> None:
        """The opset is no newer."""
        if model.opset_imports[""] > self._opset:
            raise PostconditionError(f"opset {model.opset_imports['']} is newer than {self._opset}")
