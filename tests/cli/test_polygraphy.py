"""Polygraphy's tools on a bundle: what docs/polygraphy.md says runs as it stands; the files of ``vkvx validate``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import Result
from fakes import manifest
from samples import Page

from vkvx.errors import DependencyError, OptionError, StorageError
from vkvx.runtime.checks.call_files import check_call_files

PAGE = Path(__file__).parents[2] / "docs" / "polygraphy.md"
FAILS = " # fails"


@pytest.fixture(scope="module")
def ran(tiny_bundle: Path, pages: list[Page], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Everything on the page, in a folder; what each command printed."""
    from vkvx.cli import main

    folder = tmp_path_factory.mktemp("polygraphy")
    shutil.copytree(tiny_bundle, folder / "tiny")
    shutil.copy(pages[0].path, folder / "page.png")
    # Polygraphy imports torch for every file, where there is one: that is nine tenths of the time, and not used.
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "torch.py").write_text('raise ImportError("hidden")')
    plain = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.M | re.S):
            if language == "python":
                Path(block.splitlines()[0].removeprefix("# ")).write_text(block)
                continue
            assert language == "sh"
            for line in block.splitlines():
                if line.startswith("vkvx "):
                    assert main(line.split()[1:]) == 0
                    continue
                environment = plain if "--pluginref" in line else plain | {"PYTHONPATH": str(hidden)}
                command = ["bash", "-ec", line]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == (1 if line.endswith(FAILS) else 0), f"{line}\n{done.stdout}\n{done.stderr}"
                printed[line] = done.stdout
    return folder, printed


def of(ran: tuple[Path, dict[str, str]], *words: str) -> str:
    (found,) = (text for line, text in ran[1].items() if all(word in line for word in words))
    return found


def test_the_same_calls_give_the_same(ran: tuple[Path, dict[str, str]]) -> None:
    text = of(ran, "run tiny/decoder.onnx")
    assert "vs. vkvx-onnxruntime | Passed: 2/2 iterations" in text
    assert "Comparing Output: 'present.3.visual_key'" in text


def test_the_reference_is_known(ran: tuple[Path, dict[str, str]]) -> None:
    text = of(ran, "--pluginref")
    assert re.search(r"onnxrt-runner\S+ \S* ?vs. pluginref-runner.* Passed: 1/1 iterations", text), text[-2000:]
    assert "PASSED | Output: 'present.0.text_value'" in text


def test_a_broken_graph_is_cut_down_to_the_node(ran: tuple[Path, dict[str, str]]) -> None:
    assert "FAILED | Output" in of(ran, "run broken.onnx", FAILS)
    (node,) = onnx.load(ran[0] / "reduced.onnx").graph.node
    assert node.op_type == "Abs"


def test_files_hold_calls_in_order(ran: tuple[Path, dict[str, str]]) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    inputs = load_json(str(ran[0] / "inputs.json"))
    ((name, outputs),) = RunResults.load(str(ran[0] / "outputs.json")).items()
    assert name == "vkvx-onnxruntime"
    graph = onnx.load(ran[0] / "tiny" / "decoder.onnx", load_external_data=False).graph
    prefill, decode = inputs
    assert list(prefill) == [entry.name for entry in graph.input]
    assert list(outputs[0]) == [entry.name for entry in graph.output]
    assert prefill["text_count"].tolist() == [0, 0]
    assert decode["input_ids"].tolist() == [[int(outputs[0]["logits"][0].argmax())]]
    assert decode["visual_embeds"].shape == (1, 0, prefill["visual_embeds"].shape[2])
    for name, past in ((name, array) for name, array in decode.items() if name.startswith("past.")):
        present = outputs[0][name.replace("past.", "present.")]
        assert (past.shape, past.dtype) == (present.shape, present.dtype)
        assert past[1].any()  # the picture, and the text
        assert not past[0].any()
    np.testing.assert_array_equal(decode["text_count"], outputs[0]["text_count_out"])
    np.testing.assert_array_equal(decode["text_count"] + [0, 1], outputs[1]["text_count_out"])


def test_what_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tmp_path / "one.json"
    with pytest.raises(OptionError, match=r"--save-inputs.* bfloat16"):
        check_call_files(manifest(dtype="bfloat16"), save_inputs=one, save_outputs=None)
    with pytest.raises(OptionError, match="name one file"):
        check_call_files(manifest(), save_inputs=one, save_outputs=tmp_path / ".." / tmp_path.name / "one.json")
    with pytest.raises(StorageError, match=r"--save-outputs"):
        check_call_files(manifest(), save_inputs=None, save_outputs=tmp_path / "none" / "one.json")
    check_call_files(manifest(dtype="bfloat16"), save_inputs=None, save_outputs=None)
    monkeypatch.setattr("vkvx.packages._is_there", lambda module: module != "polygraphy")
    with pytest.raises(DependencyError, match=r"package 'polygraphy' is missing; run .*\[polygraphy\]"):
        check_call_files(manifest(), save_inputs=one, save_outputs=None)


def test_the_verb_says_so_in_one_line(cli: Callable[..., Result], tiny_bundle: Path, tmp_path: Path) -> None:
    result: Any = cli("validate", tiny_bundle, "--save-inputs", tmp_path)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("vkvx: error: ")
    assert not any(tmp_path.iterdir())
