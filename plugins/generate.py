"""Writes what C and C++ know of the operator: ``python -m vkvx.plugins.generate``, after each change of the table.

That is a part of ``csrc/vkvx.h``, between two marks, and all of ``csrc/operator_table.h``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from vkvx.errors import VkvxError
from vkvx.format import LLOYD_ITERATIONS, METRIC_QUANTIZERS, SHAPED_FLAT_STEP, SHAPED_STEP, SHAPED_STEP_SLOPE, TILE
from vkvx.plugins import c_interface
from vkvx.plugins.build import SOURCES
from vkvx.plugins.c_interface import Enumeration, Field, enumerations, struct_fields
from vkvx.plugins.operator import (
    ALL_INPUTS,
    INPUTS,
    METRIC_INPUTS,
    NAME,
    OUTPUTS,
    TEXT_ROWS_8,
    VERSION,
    WINDOW_INPUTS,
    OperatorAttributes,
    Range,
    TensorDefinition,
    definitions,
)

BEGIN = "/* Written by `python -m vkvx.plugins.generate`, to the mark below. */\n"
END = "/* End of what is written. */\n"
HEADER, TABLE = SOURCES / "vkvx.h", SOURCES / "operator_table.h"

Table = type[OperatorAttributes]

_HEADER_PART = """\
/* clang-format off */
#define VKVX_ABI_VERSION {version}
#define VKVX_MAX_HEAD_DIM {head_dim}
#define VKVX_MAX_VOCAB {vocab}

{enumerations}
/* Kernels of the attention: the fastest that takes the shape, or a certain one (for tests and measurements). */
{kernels}

/* Letters as in docs/operator.md, where T is the type of dtype. Strides are in elements; the last axis of every tensor
 * is contiguous, and so are all tensors without a stride here. At 16 bits key_bits and value_bits are 16, and
 * visual_capacity is 0. */
typedef struct VkvxParams {{
{fields}
}} VkvxParams;

/* How the next token of a row is chosen. */
typedef struct VkvxSampleRow {{
{sample_row}
}} VkvxSampleRow;

/* Of a call of vkvx_sample. Bc: slots, of which each row has one of its own. */
typedef struct VkvxSampleParams {{
{sample}
}} VkvxSampleParams;
/* clang-format on */
"""

_TABLE_HEADER = """\
// The operator's table in C++, written by `python -m vkvx.plugins.generate`.
// clang-format off
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "vkvx.h"

namespace vkvx {{

inline constexpr const char* kName = "{name}";
inline constexpr const char* kVersion = "{version}";
inline constexpr int kTile = {tile};  // visual tokens
inline constexpr int kLloydIterations = {iterations};
inline constexpr float kShapedStep[] = {{{steps}}};  // by bits
inline constexpr float kShapedFlatStep = {flat_step}f, kShapedStepSlope = {slope}f;  // at 1 bit

// Names in the order of their numbers in vkvx.h.
{names}
inline constexpr bool kNeedsMetrics[] = {{{metrics}}};  // by quantiser

// A field of VkvxParams that holds one of `count` numbers, and the names of these in C.
struct Numbered {{
  const char* name;
  int32_t VkvxParams::*field;
  int count;
  const char* constants;
}};
inline constexpr Numbered kNumbered[] = {{
{numbered}
}};

inline constexpr int kInputs = {inputs}, kMetricInputs = {metric_inputs}, kWindowInputs = {window_inputs};
inline constexpr int kOutputs = {outputs};
// The input whose memory an output shares; -1 for none.
inline constexpr int kAliases[kOutputs] = {{{aliases}}};

// Sizes of docs/operator.md: kC128 is C/128, kD32 is D/32, kD41 is D/4+1.
// In a shape, numbers above 0 stand for themselves.
inline constexpr int kSymbols = {symbols};
enum Symbol {{ {symbol} = -kSymbols, {other_symbols} }};
{symbol_names}

enum class Type {{ kModel, kInt32, kFloat16, kFloat32 }};

// An input; `field` is where its address lies in VkvxParams.
struct Tensor {{
  const char* name;
  Type type;
  int rank;
  int shape[{rank}];
  size_t field;
}};
inline constexpr Tensor kTable[kInputs + kMetricInputs + kWindowInputs] = {{
{tensors}
}};
// With text rows of 8 bits, in place of the inputs kTextRows.
inline constexpr int kTextRows[] = {{{text_rows}}};
inline constexpr Tensor kTextRows8[] = {{
{text_rows_8}
}};

// A field that is a size: that of a symbol, times the field `unit` if there is one.
struct Size {{
  const char* name;
  int32_t VkvxParams::*field;
  Symbol symbol;
  int32_t VkvxParams::*unit;
}};
inline constexpr Size kSizes[] = {{
{sizes}
}};

// Attributes of a node, with the defaults of the table.
struct Attributes {{
{members}

  // Calls visit(name, member) for each, in the order of the table.
  template <class Self, class Visit>
  static void visit(Self& self, Visit&& visit) {{
{visits}
  }}

  // What is wrong with the first attribute that is out of its range; empty if none is.
  std::string out_of_range() const {{
{ranges}
    return {{}};
  }}
}};

// What the attributes fill. number_of(name of the attribute, its value, names) gives the number of a name.
template <class NumberOf>
VkvxParams params_of(const Attributes& a, NumberOf&& number_of) {{
  VkvxParams p{{}};
  p.size = sizeof(VkvxParams);
{assignments}
  return p;
}}

}}  // namespace vkvx
"""


def header(text: str, table: Table = OperatorAttributes) -> str:
    """The text of ``vkvx.h`` with its written part made new."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise VkvxError(f"{HEADER} has lost the marks of its written part; restore the lines {BEGIN!r} and {END!r}")
    known = enumerations(table)
    kernels = known.pop("kernel")
    part = _HEADER_PART.format(
        version=c_interface.ABI_VERSION,
        head_dim=c_interface.MAX_HEAD_DIM,
        vocab=c_interface.MAX_VOCAB,
        enumerations=_lines(map(_enum, (c_interface.RESULTS, *known.values()))),
        kernels=_enum(kernels),
        fields=_lines(_declaration(field, known.get(field.name)) for field in struct_fields(table)),
        sample_row=_lines(_declaration(field, None) for field in c_interface.SAMPLE_ROW_FIELDS),
        sample=_lines(_declaration(field, None) for field in c_interface.SAMPLE_FIELDS),
    )
    return before + BEGIN + part + END + after


def table_header(table: Table = OperatorAttributes) -> str:
    """The text of ``operator_table.h``."""
    known, attributes, params = enumerations(table), definitions(table), struct_fields(table)
    inputs = ALL_INPUTS
    names = [tensor.name for tensor in inputs]
    shapes = [tensor.shape for tensor in (*inputs, *TEXT_ROWS_8)]
    symbols = list(dict.fromkeys(size for shape in shapes for size in shape if not size.isdigit()))
    return _TABLE_HEADER.format(
        name=NAME,
        version=VERSION,
        tile=TILE,
        iterations=LLOYD_ITERATIONS,
        steps=", ".join(f"{SHAPED_STEP.get(bits, 0.0)}f" for bits in range(max(SHAPED_STEP) + 1)),
        flat_step=SHAPED_FLAT_STEP,
        slope=SHAPED_STEP_SLOPE,
        names=_lines(_names(_array(field), e.names) for field, e in known.items()),
        metrics=", ".join(str(name in METRIC_QUANTIZERS).lower() for name in known["quantizer"].names),
        numbered=_lines(_numbered(field, e) for field, e in known.items()),
        inputs=len(INPUTS),
        metric_inputs=len(METRIC_INPUTS),
        window_inputs=len(WINDOW_INPUTS),
        outputs=len(OUTPUTS),
        aliases=", ".join(str(names.index(t.name)) if t.name in names else "-1" for t in OUTPUTS),
        symbols=len(symbols),
        symbol=_symbol(symbols[0]),
        other_symbols=", ".join(map(_symbol, symbols[1:])),
        symbol_names=_names("kSymbolNames", symbols),
        rank=max(len(tensor.shape) for tensor in inputs),
        tensors=_lines(map(_tensor, inputs)),
        text_rows=", ".join(str(names.index(t.name)) for t in TEXT_ROWS_8),
        text_rows_8=_lines(map(_tensor, TEXT_ROWS_8)),
        sizes=_lines(_size(field) for field in params if field.size),
        members=_lines(f"  {_member(f.name, f.default)}" for f in fields(table)),
        visits=_lines(f'    visit("{name}", self.{name});' for name in attributes),
        ranges=_lines(_check(name, a.within) for name, a in attributes.items() if a.within),
        assignments=_lines(_assignment(field, known) for field in params if field.attribute),
    )


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _enum(enumeration: Enumeration) -> str:
    return f"enum {{ {', '.join(f'{name} = {i}' for i, name in enumerate(enumeration.constants))} }};"


def _declaration(field: Field, numbers: Enumeration | None) -> str:
    base, bracket, length = field.type.partition("[")
    declaration = f"  {base}{'' if base.endswith('*') else ' '}{field.name}{bracket}{length};"
    meaning = field.meaning or (f"{numbers.constants[0]} to {numbers.constants[-1]}" if numbers else "")
    line = f"{declaration:36} /* {meaning} */" if meaning else declaration
    if field.name == WINDOW_INPUTS[0].name:
        return f"  /* With a sliding window; null otherwise. */\n{line}"
    if field.name != METRIC_INPUTS[0].name:
        return line
    quantizers = ", ".join(Enumeration(METRIC_QUANTIZERS).constants)
    return f"  /* Of {quantizers}, for calls with visual entries that are to be packed; null otherwise. */\n{line}"


def _names(array: str, names: Iterable[str]) -> str:
    quoted = ", ".join(f'"{name}"' for name in names)
    return f"inline constexpr const char* {array}[] = {{{quoted}}};"


def _array(field: str) -> str:
    """The array with the names of an enumeration."""
    return f"k{field.title().replace('_', '')}Names"


def _numbered(field: str, enumeration: Enumeration) -> str:
    *others, last = enumeration.constants
    constants = f"{', '.join(others)} or {last}"
    return f'    {{"{field}", &VkvxParams::{field}, {len(enumeration.names)}, "{constants}"}},'


def _symbol(size: str) -> str:
    return f"k{size[0].upper()}{size[1:].replace('/', '').replace('+', '')}"


def _tensor(tensor: TensorDefinition) -> str:
    kind = {"T": "kModel", "int32": "kInt32", "float16": "kFloat16", "float32": "kFloat32"}[tensor.dtype]
    shape = ", ".join(size if size.isdigit() else _symbol(size) for size in tensor.shape)
    offset = f"offsetof(VkvxParams, {tensor.name})"
    return f'    {{"{tensor.name}", Type::{kind}, {len(tensor.shape)}, {{{shape}}}, {offset}}},'


def _size(field: Field) -> str:
    unit = f"&VkvxParams::{field.unit}" if field.unit else "nullptr"
    return f'    {{"{field.name}", &VkvxParams::{field.name}, {_symbol(field.size)}, {unit}}},'


def _member(name: str, default: object) -> str:
    if isinstance(default, str):
        return f'std::string {name} = "{default}";'
    return f"float {name} = {default}f;" if isinstance(default, float) else f"int32_t {name} = {default};"


def _check(name: str, within: Range) -> str:
    condition = " && ".join(f"{name} {sign} {bound}f" for sign, bound in within.conditions())
    return f'    if (!({condition})) return "{name} is " + std::to_string({name}) + "; give {within}";'


def _assignment(field: Field, known: dict[str, Enumeration]) -> str:
    value = f"a.{field.attribute}"
    if field.name in known:
        value = f'number_of("{field.attribute}", {value}, {_array(field.name)})'
    return f"  p.{field.name} = {value};"


def main() -> None:
    """Write both files."""
    HEADER.write_text(header(HEADER.read_text(encoding="utf-8")), encoding="utf-8")
    TABLE.write_text(table_header(), encoding="utf-8")


if __name__ == "__main__":
    main()
