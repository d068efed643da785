"""The C++ example: compiles against real headers, links a real TensorRT, reads the file that its script saves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from plugin_calls import Builds, run
from samples import Page

from vkvx.plugins import build

EXAMPLES = build.SOURCES.parent / "examples"
PROMPT = "USER: <image>\nTranscribe the page. ASSISTANT:"


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    """nvcc for host code, with TensorRT's headers."""
    headers = build.find_headers()
    if shutil.which("nvcc") is None or headers is None:
        pytest.skip("needs nvcc and TensorRT's headers")
    return ["nvcc", "-std=c++17", "-Xcompiler=-Wno-deprecated-declarations", "-isystem", str(headers)]


def test_builds_and_says_how_it_is_used(tmp_path: Path) -> None:
    library, headers = Builds(tmp_path).runtime, build.find_headers()
    if library is None or headers is None or shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("needs CMake, nvcc, TensorRT's headers and the package tensorrt-rtx-cu13")
    definitions = (f"-DTENSORRT_HEADERS={headers}", f"-DTENSORRT_LIBRARY={library}")
    run(["cmake", "-S", str(EXAMPLES), "-B", str(tmp_path), *definitions])
    run(["cmake", "--build", str(tmp_path)])
    program = str(tmp_path / "vkvx_generate")
    usage = subprocess.run([program], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "ENGINE PLUGIN INPUTS.npz" in usage.stderr
    (tmp_path / "text").write_text("no archive, but longer than the end of one")
    missing = subprocess.run([program, "e", "p", str(tmp_path / "text")], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert "is no .npz file" in missing.stderr


def test_reads_what_the_script_saves(compiler: list[str], tiny_bundle: Path, pages: list[Page], tmp_path: Path) -> None:
    saved = tmp_path / "inputs.npz"
    script = str(build.SOURCES.parents[1] / "examples" / "save_inputs.py")
    run([sys.executable, script, str(tiny_bundle), str(saved), "--prompt", PROMPT, "--image", str(pages[0].path)])
    arrays = dict(np.load(saved))
    assert arrays["visual_embeds"].shape[:2] == arrays["visual_index"].shape
    assert arrays["visual_embeds"].any()
    assert set(arrays) == {
        "visual_embeds",
        "input_ids",
        "position_ids",
        "visual_index",
        "text_index",
        "last_index",
        "slot",
    }
    assert {array.dtype for name, array in arrays.items() if name != "visual_embeds"} == {np.dtype(np.int32)}

    source = tmp_path / "read.cpp"
    source.write_text(
        '#include <cstdio>\n#include "npz.h"\nint main(int, char** argv) {\n'
        "  try {\n"
        "    for (const auto& [name, array] : npz::read(argv[1])) {\n"
        '      unsigned sum = 0;\n      std::printf("%s %s", name.c_str(), array.type.c_str());\n'
        '      for (int64_t n : array.shape) std::printf(" %ld", static_cast<long>(n));\n'
        "      for (unsigned char byte : array.bytes) sum = sum * 31 + byte;\n"
        '      std::printf(" %u\\n", sum);\n    }\n'
        '  } catch (const std::exception& error) { std::printf("%s\\n", error.what()); return 1; }\n}\n'
    )
    program = str(tmp_path / "read")
    run([*compiler, "-I", str(EXAMPLES), str(source), "-o", program])
    printed = subprocess.run([program, str(saved)], capture_output=True, text=True, check=True).stdout
    expected = []
    for name in sorted(arrays):
        array, total = arrays[name], 0
        for byte in array.tobytes():
            total = (total * 31 + byte) % 2**32
        expected.append(" ".join([name, array.dtype.str, *map(str, array.shape), str(total)]))
    assert printed.splitlines() == expected

    # Damage: cut off anywhere, compressed, or in another order.
    whole = saved.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 30):
        saved.write_bytes(whole[:size])
        assert subprocess.run([program, str(saved)], capture_output=True, check=False).returncode == 1
    np.savez_compressed(saved, **arrays)
    refused = subprocess.run([program, str(saved)], capture_output=True, text=True, check=False)
    assert "is compressed; write it with numpy.savez" in refused.stdout
    np.savez(saved, x=np.asfortranarray(np.ones((2, 3))))
    refused = subprocess.run([program, str(saved)], capture_output=True, text=True, check=False)
    assert "not in C order" in refused.stdout
