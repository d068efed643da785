"""Small damage to what a bundle holds: JSON, the ends of an ONNX graph, plain bytes.

``choose(n)`` says what is done: a number from 0 to n - 1, of a seeded generator or of a fuzzer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Choose = Callable[[int], int]

EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, -5, 2, 3, 31, 33, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**30, -(10**30)),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x",
        "foo",
        "P",
        "0*P",
        "-1*P",
        "99999999999*P",
        "2*",
        "*P",
        "a*b*c",
        "\ud800",
        "\x00",
        "é\n",
        "x" * 5000,
    ),
    *("..", "../outside", "/etc/hostname", "processor/../../outside", "C:\\x", "a//b", "float16", "int64", "prefix"),
    *([], {}, [[]], [None], {"": 0}, [1, 2, 3], [[[[[[[[]]]]]]]]),
)


def mutated(value: Any, choose: Choose) -> Any:
    """Parsed JSON with one place changed: replaced, removed, doubled, swapped with another, or renamed.

    What is not changed is shared with ``value``, which stays as it is.
    """
    if not isinstance(value, dict | list) or not value:
        return EXTREMES[choose(len(EXTREMES))]
    holder = value.copy()
    keys = list(range(len(holder))) if isinstance(holder, list) else list(holder)
    key = keys[choose(len(keys))]
    if isinstance(holder[key], dict | list) and choose(4):
        holder[key] = mutated(holder[key], choose)
        return holder
    match choose(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(choose(len(holder) + 1), holder[key])
        case 2:
            other = keys[choose(len(keys))]
            holder[key], holder[other] = holder[other], holder[key]
        case 3 if isinstance(holder, dict):
            names = [one for one in EXTREMES if isinstance(one, str)]
            holder[names[choose(len(names))]] = holder.pop(key)
        case 4 if isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += choose(5) - 2
        case _:
            holder[key] = EXTREMES[choose(len(EXTREMES))]
    return holder


def mutated_bytes(data: bytes, choose: Choose) -> bytes:
    """Bytes that are cut off, or of which some are changed, left out or doubled."""
    start = choose(len(data) + 1)
    end = min(len(data), start + 1 + choose(64))
    match choose(4):
        case 0:
            return data[:start]
        case 1:
            return data[:start] + data[end:]
        case 2:
            return data[:end] + data[start:]
        case _:
            return data[:start] + bytes(choose(256) for _ in range(end - start)) + data[end:]


def mutate_graph(model: Any, choose: Choose) -> None:
    """Change an input, an output or the place of a weight of an ONNX ModelProto."""
    sides = (model.graph.input, model.graph.output)
    side = sides[choose(2)]
    weights = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if not side:
        return
    info = side[choose(len(side))]
    shape = info.type.tensor_type.shape
    match choose(9):
        case 0:
            info.name = ("foo", "", "x" * 5000, side[choose(len(side))].name)[choose(4)]
        case 1:
            info.type.tensor_type.elem_type = choose(30)
        case 2 if shape.dim:
            shape.dim[choose(len(shape.dim))].dim_value = (-1, 0, 1, 2**31, 2**62)[choose(5)]
        case 3 if shape.dim:
            shape.dim[choose(len(shape.dim))].dim_param = ("B", "S", "foo", "", "2*P", "x" * 5000)[choose(6)]
        case 4:
            shape.dim.add().dim_param = "B"
        case 5:
            side.remove(info)
        case 6:
            other = side[choose(len(side))]
            info.name, other.name = other.name, info.name
        case 7 if weights:
            entries = weights[choose(len(weights))].external_data
            entries[choose(len(entries))].value = ("/etc/hostname", "../outside", "-1", "9" * 30, "", "x")[choose(6)]
        case _ if weights:
            dims = weights[choose(len(weights))].dims
            dims[choose(len(dims))] = (-1, 0, 2**31, 2**62)[choose(4)]
