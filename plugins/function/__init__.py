"""The operator's body as a model-local ONNX function of standard ops, for runtimes without a kernel of their own.

The body follows ``vkvx.plugins.torch_op`` and ``docs/operator.md``. It uses only operators and types that both the CPU
and the CUDA provider of onnxruntime implement, and computes in FP32. A function cannot branch on attributes, so each
distinct set of attributes has a body of its own, told apart by its overload name.
"""

from __future__ import annotations

import onnx
from onnx import helper

from vkvx.errors import OptionError
from vkvx.format import CACHE_NAMES, WORD_BITS
from vkvx.plugins.function.append import append_text, append_visual
from vkvx.plugins.function.attention import attend
from vkvx.plugins.function.builder import Builder
from vkvx.plugins.function.call import NodeSizes, read_call
from vkvx.plugins.function.visual import VisualCache
from vkvx.plugins.operator import DOMAIN, NAME, OUTPUTS, OperatorAttributes

DTYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float32": onnx.TensorProto.FLOAT,
}
MIN_OPSET = 17


def attention_function(
    attributes: OperatorAttributes,
    *,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    opset: int = 18,
    overload: str = "",
) -> onnx.FunctionProto:
    """Build the function ``vkvx::VisualKVAttention`` for one set of attributes.

    Inputs (``attributes.inputs``) and outputs are those of the table (``vkvx.plugins.operator``), the updated
    caches being named ``present_*``. All attributes are declared, so that nodes may carry them for plugins; the body
    holds their values.

    Args:
        attributes: of the nodes that refer to this function.
        query_heads: a multiple of kv_heads.
        kv_heads: heads of keys, values and caches.
        head_dim: a multiple of 32.
        dtype: the model's float type: float16, bfloat16 or float32.
        opset: of the model, at least 17.
        overload: tells functions of one model apart (IR version 10 or newer).

    Raises:
        OptionError: for heads, a head size, a type or an opset that cannot be.
    """
    if query_heads % kv_heads:
        raise OptionError(f"{query_heads} query heads cannot share {kv_heads} KV heads: give a multiple")
    if head_dim % WORD_BITS:
        raise OptionError(f"head dim {head_dim} is not supported: it must be a multiple of {WORD_BITS}")
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype '{dtype}': give one of {', '.join(DTYPES)}")
    if opset < MIN_OPSET:
        raise OptionError(f"opset {opset} is not supported: give {MIN_OPSET} or newer")
    shape = NodeSizes(query_heads, kv_heads, head_dim, attributes.group_size)
    packed, elem_type = attributes.is_packed, DTYPES[dtype]

    b = Builder(opset)
    # The minimum and maximum of the affine correction need at least one group to range over.
    call = read_call(b, shape, attributes)
    visual = VisualCache(b, shape, attributes, call) if packed else None
    b.add("Identity", [attend(b, shape, attributes, call, visual, elem_type)], ["output"])
    append_text(b, shape, attributes, call, elem_type)
    if packed:
        append_visual(b, shape, attributes, call, elem_type)
    else:
        for name in CACHE_NAMES[:4]:
            b.add("Identity", [name], [f"present_{name}"])
    outputs = [f"present_{t.name}" if t.name in CACHE_NAMES else t.name for t in OUTPUTS]
    return helper.make_function(
        DOMAIN,
        NAME,
        [t.name for t in attributes.inputs],
        outputs,
        b.nodes,
        [helper.make_opsetid("", opset)],
        attributes=list(attributes.to_dict()),
        overload=overload,
    )
