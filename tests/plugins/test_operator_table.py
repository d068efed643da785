"""What is generated from the operator's table: it is current, C and ctypes agree, and an addition reaches all of it."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vkvx.errors import OptionError, VkvxError
from vkvx.format import QUANTIZERS
from vkvx.plugins import c_interface, generate, library
from vkvx.plugins.operator import OperatorAttributes, Range, attribute

ROOT = Path(__file__).parents[2]
needs_c = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
needs_cpp = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@dataclass(frozen=True)
class Wider(OperatorAttributes):
    """The table with a quantiser, an attribute and an enumeration more."""

    quantizer: str = attribute("lloyd", choices=(*QUANTIZERS, "lattice"))
    lattice_radius: float = attribute(1.5, "of VKVX_LATTICE", within=Range(least=1.0, most=2.0, below=True))
    rounding: str = attribute("nearest", choices=("nearest", "stochastic"))


def run(folder: Path, compiler: Iterable[str], source: str, table: type[OperatorAttributes]) -> list[str]:
    """Words that a program with the headers of a table prints."""
    (folder / "vkvx.h").write_text(generate.header(generate.HEADER.read_text(), table))
    (folder / "operator_table.h").write_text(generate.table_header(table))
    (folder / "program.c").write_text(source)
    command = [*compiler, "-Wall", "-Wextra", "-Werror", str(folder / "program.c"), "-o", str(folder / "program")]
    subprocess.run(command, check=True)
    return subprocess.run([str(folder / "program")], capture_output=True, text=True, check=True).stdout.split()


def test_the_generated_files_are_current() -> None:
    """`python -m vkvx.plugins.generate` would change nothing."""
    text = generate.HEADER.read_text()
    assert generate.header(text) == text
    assert generate.table_header() == generate.TABLE.read_text()


def test_a_header_without_its_marks_is_refused() -> None:
    with pytest.raises(VkvxError, match="has lost the marks"):
        generate.header(generate.HEADER.read_text().replace(generate.END, ""))


@needs_c
@pytest.mark.parametrize("table", [OperatorAttributes, Wider])
def test_the_struct_of_ctypes_is_that_of_the_header(tmp_path: Path, table: type[OperatorAttributes]) -> None:
    """Offset and size of each field, and all numbers, in C99."""
    fields = library.ctypes_fields(c_interface.struct_fields(table))
    struct = type("Struct", (ctypes.Structure,), {"_fields_": fields})
    numbers = {
        constant: number
        for enumeration in (c_interface.RESULTS, *c_interface.enumerations(table).values())
        for number, constant in enumerate(enumeration.constants)
    }
    numbers |= {"VKVX_ABI_VERSION": c_interface.ABI_VERSION, "VKVX_MAX_HEAD_DIM": c_interface.MAX_HEAD_DIM}
    lines = [
        *(f"SHOW(offsetof(VkvxParams, {name})) SHOW(sizeof(((VkvxParams *)0)->{name}))" for name, _ in fields),
        *(f"SHOW({name})" for name in numbers),
        "SHOW(sizeof(VkvxParams))",
    ]
    source = '#include <stdio.h>\n#include "vkvx.h"\n#define SHOW(x) printf("%d\\n", (int)(x));\n'
    source += f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    expected = [(getattr(struct, name).offset, ctypes.sizeof(kind)) for name, kind in fields]
    printed = run(tmp_path, ("cc", "-std=c99", "-pedantic"), source, table)
    assert [int(x) for x in printed] == [
        *(x for pair in expected for x in pair),
        *numbers.values(),
        ctypes.sizeof(struct),
    ]


@needs_cpp
def test_what_is_added_to_the_table_reaches_c_plus_plus(tmp_path: Path) -> None:
    """A quantiser and attributes more: names, numbers, defaults, ranges and the struct, by the table alone."""
    source = """
    #include <cstdio>
    #include <iterator>
    #include "operator_table.h"
    int main() {
      vkvx::Attributes a;
      a.quantizer = "lattice";
      a.rounding = "stochastic";
      const VkvxParams p = vkvx::params_of(a, [](const char*, const std::string& given, const auto& names) {
        for (size_t i = 0; i < std::size(names); ++i) if (given == names[i]) return static_cast<int32_t>(i);
        return -1;
      });
      std::printf("%d %d %d %g [%s]\\n", p.quantizer, p.quantizer == VKVX_LATTICE, p.rounding, p.lattice_radius, a.out_of_range().c_str());
      a.lattice_radius = 2;
      std::printf("%s\\n", a.out_of_range().c_str());
      vkvx::Attributes::visit(a, [](const char* name, const auto&) { std::printf("%s ", name); });
      for (const auto& field : vkvx::kNumbered) std::printf("%s %d %s\\n", field.name, field.count, field.constants);
      std::printf("%d\\n", vkvx::kNeedsMetrics[VKVX_LATTICE]);
    }
    """  # noqa: E501
    words = run(tmp_path, ("c++", "-std=c++17", "-x", "c++"), source, Wider)
    text = " ".join(words)
    assert words[:5] == ["5", "1", "1", "1.5", "[]"]
    assert "lattice_radius is 2.000000; give at least 1 and less than 2" in text
    assert " ".join(Wider().to_dict()) in text
    assert "quantizer 6 VKVX_MINMAX, VKVX_QUANTILE, VKVX_SHRINK, VKVX_LLOYD, VKVX_SHAPED or VKVX_LATTICE" in text
    assert "rounding 2 VKVX_ROUNDING_NEAREST or VKVX_ROUNDING_STOCHASTIC" in text
    assert words[-1] == "0"


def test_what_is_added_to_the_table_is_checked_in_python() -> None:
    assert Wider(quantizer="lattice").lattice_radius == 1.5
    with pytest.raises(OptionError, match=r"lattice radius 2\.0 is not supported: give at least 1 and less than 2"):
        Wider(lattice_radius=2.0)
    with pytest.raises(OptionError, match="unknown rounding 'up': give one of nearest, stochastic"):
        Wider(rounding="up")
    with pytest.raises(OptionError, match="softcap nan is not supported: give at least 0"):
        Wider(softcap=float("nan"))


def test_the_iterations_of_lloyd_are_written_once() -> None:
    """And once more by the generator, for the kernels."""
    files = [*ROOT.glob("vkvx/**/*.py"), *(p for p in ROOT.glob("plugins/**/*.*") if p.suffix in (".py", ".h", ".cuh"))]
    places = [p.name for p in files if re.search(r"^.*lloyd_?iterations = \d", p.read_text(), re.IGNORECASE | re.M)]
    assert places == ["format.py", "operator_table.h"]
