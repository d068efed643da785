"""Functions of one name for versions of onnxruntime that do not tell them apart by their overloads: 1.23 to 1.26."""

from __future__ import annotations

import re
from typing import Any

KNOWN_SINCE = (1, 27)
"""Versions from here on call the function whose overload a node names."""
FOLDER_ENTRY = "session.model_external_initializers_file_folder_path"
"""Session configuration: where weights lie of a model that is given as bytes."""


def are_known(version: str) -> bool:
    """Whether this version of onnxruntime knows overloads."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= KNOWN_SINCE


def separate(model: Any) -> None:
    """Give each function of an ONNX ModelProto, and its nodes, a name that holds its overload, in place."""
    for function in model.functions:
        function.name, function.overload = _name(function.name, function.overload), ""
    for node in model.graph.node:
        node.op_type, node.overload = _name(node.op_type, node.overload), ""


def _name(name: str, overload: str) -> str:
    return f"{name}_{overload}" if overload else name
