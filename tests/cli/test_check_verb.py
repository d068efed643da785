"""The verbs `check` and `models`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vkvx.models.registry import ALIASES, FAMILIES


def test_check_prints_a_table_or_json(cli: Callable) -> None:
    result = cli("check", "tiny-llava", "--picture", "640x480", "--picture", "100x2000")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(
        "tiny-llava can be exported\nfamily       LLaVA-1.5, Pixtral: LlavaForConditionalGeneration\n"
    )
    rows = [line.split() for line in result.out.splitlines()]
    assert ["640x480", "576", "640", "85.0", "KiB"] in [row[:5] for row in rows]
    data = json.loads(cli("check", "tiny-llava", "--json").out)
    assert (data["supported"], data["group_size"], data["model"]["layers"][0]["head_dim"]) == (True, 640, 64)
    assert [picture["width"] for picture in data["pictures"]] == [1024, 1280, 1920, 1240]
    assert list(data["pictures"][0]["bytes"]) == ["1", "2", "4", "8", "16"]


def test_what_cannot_be_exported_is_code_1(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Ovis"]}')
    result = cli("check", tmp_path)
    assert (result.code, result.err) == (1, "")
    assert result.out.startswith(f"{tmp_path.name} cannot be exported: architecture Ovis is not supported: it exists ")
    assert result.out.count("\n") == 1
    data = json.loads(cli("check", tmp_path, "--json").out)
    assert not data["supported"]
    assert "Ovis" in data["reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("./absent",), "is not a directory"),
        (("no-such-model",), "unknown model"),
        (("tiny-llava", "--revision", "main"), "--revision"),
        (("tiny-llava", "--picture", "abc"), "--picture abc is not understood"),
        (("tiny-llava", "--picture", "640"), "--picture 640 is not understood"),
        (("tiny-llava", "--picture", "640x"), "--picture 640x is not understood"),
        (("tiny-llava", "--picture", "0x5"), "(--picture) of 0x5"),
        (("tiny-llava", "--picture", "20000x20"), "(--picture) of 20000x20"),
        (("tiny-llava", "--group-size", "100"), "group size 100"),
        (("tiny-llava", "--group-size", "x"), "--group-size x"),
    ],
)
def test_wrong_inputs_are_one_line_and_code_2(cli: Callable, arguments: tuple[str, ...], words: str) -> None:
    for json_too in ((), ("--json",)):
        result = cli("check", *arguments, *json_too)
        assert result.code == 2
        assert (json.loads(result.out)["error"]["message"] in result.err) if json_too else result.out == ""
        assert result.err.startswith("vkvx: error: ")
        assert result.err.count("\n") == 1
        assert words in result.err


def test_a_bundle_cannot_be_checked(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "vkvx.json").write_text("{}")
    result = cli("check", tmp_path)
    assert result.code == 2
    assert "is a bundle, not a checkpoint" in result.err


def test_check_needs_no_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None  # as if it were not installed\n"
        "from vkvx.cli import main\nsys.exit(main(['check', 'tiny-llava', '--picture', '640x480']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "640x480     576        640" in done.stdout


def test_models(cli: Callable) -> None:
    result = cli("models")
    assert result.code == 0
    assert all(name in result.out for name in (*FAMILIES, *ALIASES))
    data = json.loads(cli("models", "--json").out)
    assert [family["architecture"] for family in data] == list(FAMILIES)
    assert [alias for family in data for alias in family["aliases"]] == list(ALIASES)
    assert [("trained tiny-llava" in family["verified"]) for family in data] == [True] + [False] * (len(FAMILIES) - 1)
