"""Engines that were built are kept while ``ENGINE_REVISION`` stays; whoever changes what shapes one is reminded of it.

``python tests/runtime/engines/test_engine_revision.py`` writes the digests of the code as it is.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from vkvx.runtime.engines.build import ENGINE_REVISION

ROOT = Path(__file__).parents[3]
RECORD = Path(__file__).with_name("engine_revision.json")
ENGINES = ("build", "dialect", "library", "limits", "network", "options")


def modules(root: Path = ROOT) -> list[Path]:
    """What shapes an engine."""
    folder = root / "runtime" / "engines"
    return [root / "vkvx/opset.py", *(folder / f"{name}.py" for name in ENGINES), *sorted(folder.glob("lowering/*.py"))]


def normalised(node: Any) -> Any:
    """A syntax tree without places, comments and docstrings, and without what Python versions write differently."""
    if isinstance(node, ast.AST):
        fields = [(name, normalised(value)) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind")]
        return [type(node).__name__, *([name, value] for name, value in fields if value not in ([], None))]
    if isinstance(node, list):
        return [normalised(one) for one in node if not is_docstring(one)]
    return node if node is None or isinstance(node, str) else repr(node)


def is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def digest(text: str) -> str:
    return hashlib.sha256(json.dumps(normalised(ast.parse(text))).encode()).hexdigest()[:16]


def digests() -> dict[str, str]:
    return {path.relative_to(ROOT).as_posix(): digest(path.read_text(encoding="utf-8")) for path in modules()}


def test_a_change_of_what_shapes_an_engine_is_noticed() -> None:
    recorded, found = json.loads(RECORD.read_text()), digests()
    changed = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
    assert not changed, (
        f"{', '.join(changed)} shape engines and have changed. If the same bundle and options give other engines now, "
        f"raise ENGINE_REVISION ({ENGINE_REVISION}) in runtime/engines/build.py: engines that were built stay in use "
        f"otherwise. Then run `python {Path(__file__).relative_to(ROOT)}` and commit what it writes."
    )


def test_all_modules_are_covered() -> None:
    assert all(path.is_file() for path in modules())
    folder = ROOT / "runtime" / "engines"
    others = {"__init__", "gpus", "layers", "log", "manifest", "memory", "progress"}  # do not shape engines
    assert {path.stem for path in folder.glob("*.py")} == {*ENGINES, *others}


def test_a_new_pass_is_covered(tmp_path: Path) -> None:
    path = tmp_path / "runtime" / "engines" / "lowering" / "new.py"
    path.parent.mkdir(parents=True)
    path.touch()
    assert path in modules(tmp_path)


def test_comments_and_docstrings_do_not_count_and_code_does() -> None:
    code = "def f(x):\n    return x + 1\nLIMIT = 3\n"
    told = '"""A."""\ndef f(x):\n    """Adds."""\n    # One.\n    return (x\n        + 1)\nLIMIT = 3\n"""Most."""\n'
    assert digest(code) == digest(told)
    for other in (code.replace("1", "2"), code.replace("1", "True"), code.replace("LIMIT", "MOST"), code + "f(1)\n"):
        assert digest(other) != digest(code)
    assert digest("x = None") != digest("x = 'None'")


if __name__ == "__main__":
    RECORD.write_text(json.dumps(digests(), indent=1) + "\n")
