"""The specification pages agree with the code, and their examples run."""

from __future__ import annotations

import argparse
import doctest
import re
from dataclasses import fields
from pathlib import Path

import pytest
import tomllib

from vkvx import cli
from vkvx.cli import terminal
from vkvx.cli.models import describe_families
from vkvx.evaluation import convert
from vkvx.format import QUANTILE_ALPHA, SHRINK_KEY, SHRINK_VALUE, STATE_NAMES
from vkvx.manifest import FORMAT, FORMAT_VERSION, LayerInfo, Manifest, ModelInfo, Quantization
from vkvx.models.preset_processors import write_processor
from vkvx.models.presets import preset_config
from vkvx.models.refusals import REFUSALS
from vkvx.plugins import delta_rule, operator
from vkvx.sampling import GenerationInfo

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def table(page: str, first_column: str) -> list[list[str]]:
    """Rows of the table whose first heading this is."""
    lines = [line.strip() for line in (ROOT / page).read_text(encoding="utf-8").splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page: Path) -> None:
    blocks = re.findall(r"^```pycon\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert bool(blocks) == (page.name == "format.md")
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    shared: dict[str, object] = {}
    for block in blocks:
        test = parser.get_doctest(block, shared, page.name, str(page), 0)
        runner.run(test, clear_globs=False)
        shared = test.globs
    assert runner.failures == 0
    assert runner.tries == sum(block.count(">>> ") for block in blocks)


@pytest.mark.parametrize(
    ("column", "definitions"),
    [
        ("input", operator.INPUTS),
        ("metric input", operator.METRIC_INPUTS),
        ("window input", operator.WINDOW_INPUTS),
        ("text row of 8 bits", operator.TEXT_ROWS_8),
        ("output", operator.OUTPUTS),
        ("rule input", delta_rule.INPUTS),
        ("rule output", delta_rule.OUTPUTS),
    ],
)
def test_tensors_of_the_operator(column: str, definitions: tuple[operator.TensorDefinition, ...]) -> None:
    rows = table("docs/operator.md", column)
    documented = [(name.strip("`"), dtype, shape.strip("`")) for name, dtype, shape, _ in rows]
    assert documented == [(d.name, d.dtype, f"[{', '.join(d.shape)}]") for d in definitions]


def test_attributes_of_the_operator() -> None:
    rows = table("docs/operator.md", "attribute")
    kinds = {int: "int", float: "float", str: "string"}
    expected = [
        [name, kinds[type(value)], str(value)] for name, value in operator.OperatorAttributes().to_dict().items()
    ]
    assert [[name.strip("`"), kind, default] for name, kind, default, _ in rows] == expected


def test_cache_tensors_of_the_format() -> None:
    documented = {name.strip("`"): shape.strip("`") for name, _, shape, _ in table("docs/format.md", "tensor")}
    caches = {d.name: f"[{', '.join(d.shape)}]" for d in operator.INPUTS if d.name.startswith(("visual_", "text_"))}
    del caches["visual_index"], caches["text_index"]
    assert documented == caches
    states = [name.strip("`") for name, *_ in table("docs/format.md", "state")]
    assert tuple(states) == STATE_NAMES


def test_defaults_of_the_quantisers() -> None:
    rows = table("docs/format.md", "bits")
    documented = [tuple(float(cell) for cell in row) for row in rows]
    assert documented == [(bits, QUANTILE_ALPHA[bits], SHRINK_KEY[bits], SHRINK_VALUE[bits]) for bits in (1, 2, 4, 8)]


def test_keys_of_the_manifest() -> None:
    """The page has tables of keys: of the manifest, its ``model``, ``generation``, ``layers`` and ``quantization``."""
    text = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| key \| type \| meaning \|\n\|.*\n((?:\|.*\n)+)", text, flags=re.M)
    documented = [[line.split("`")[1] for line in rows.splitlines()] for rows in tables]
    assert documented == [
        ["format", "format_version", *(field.name for field in fields(Manifest))],
        [field.name for field in fields(ModelInfo)],
        [field.name for field in fields(GenerationInfo)],
        [field.name for field in fields(LayerInfo)],
        [field.name for field in fields(Quantization)],
    ]
    assert f"`{FORMAT}`" in text
    assert f"version {FORMAT_VERSION}" in text.splitlines()[0]


def test_nobody_is_told_to_install_from_an_index() -> None:
    """None has vkvx. ``packages.extra`` knows where it came from, the README says where it comes from."""
    sources = [path for room in (*ROOT.glob("*/__init__.py"),) for path in room.parent.rglob("*.py")]
    assert len(sources) > 200
    for path in {*PAGES, *sources, ROOT / "Makefile"} - {ROOT / "vkvx/packages.py"}:
        found = re.search(r"pip install [^`\n]*?(?<![\w/-])vkvx\b(?!-)", path.read_text(encoding="utf-8"))
        assert found is None, f"{path} says {found}"


def test_bytes_of_a_picture_in_the_readme() -> None:
    shapes = {"LLaVA-1.5-7B": (32, 32, 128), "LLaVA-1.5-13B": (40, 40, 128), "tiny-llava": (4, 2, 64)}
    for name, tokens, *cells in table("README.md", "model"):
        layers, heads, dim = shapes.pop(name)
        groups = -(-int(tokens) // 640)
        packed = [groups * layers * heads * dim * (640 * 2 * bits // 8 + 10) for bits in (8, 4, 2, 1)]
        assert cells == [terminal.human_bytes(count) for count in (int(tokens) * layers * heads * dim * 4, *packed)]
    assert not shapes


def test_families_and_aliases() -> None:
    families = describe_families()
    expected = [
        [
            *(family["name"], f"`{family['architecture']}`", ", ".join(family["decoders"]), family["verified"]),
            ", ".join(f"`{alias}`" for alias in family["aliases"]),
        ]
        for family in families
    ]
    assert table("docs/models.md", "family") == expected
    named = [pair for family in families for pair in family["aliases"].items()]
    documented = [tuple(cell.strip("`") for cell in row) for row in table("docs/models.md", "alias")]
    assert documented == named


def test_refused_architectures() -> None:
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSALS.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    expected = [[", ".join(names), reason] for reason, names in reasons.items()]
    assert table("docs/models.md", "refused architecture") == expected


def test_example_of_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = preset_config("internvl3-8b")
    directory = tmp_path / "internvl3-8b"
    config.save_pretrained(directory)
    write_processor(directory, config)
    assert cli.main(["check", str(directory)]) == 0
    example = f"$ vkvx check ./internvl3-8b\n{capsys.readouterr().out}```"
    assert example in (ROOT / "docs/models.md").read_text(encoding="utf-8")


def test_links() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            path = page.parent / target[0] if target[0] else page
            assert path.exists(), f"{page.name} links to {target[0]}"
            if target[1]:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert target[1] in anchors, f"{page.name} links to #{target[1]}"


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All actions of a parser, those of its verbs included."""
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                found += _actions(verb)
    return found


def test_options_that_the_pages_name_exist() -> None:
    actions = [*_actions(cli.build_parser()), *_actions(convert.build_parser())]
    known = {option for action in actions for option in action.option_strings}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        used = {
            option
            for line in re.findall(r"vkvx [a-z]+ .*|`--[^`]*`", text)
            for option in re.findall(r"--[a-z-]+", line)
        }
        assert used <= known, f"{page.name} names {used - known}"


def test_every_option_is_documented() -> None:
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    options = {action.option_strings[-1] for action in _actions(cli.build_parser()) if action.option_strings}
    assert {option for option in options if not re.search(rf"{option}\b", page)} == set()


def test_packaging_knows_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {"vkvx", "evaluation", "export", "models", "plugins", "runtime"}
    found = set()
    for top in folders:
        for path in (ROOT / top).rglob("*.py"):
            folder = path.parent.relative_to(ROOT)
            name = ".".join(folder.parts)
            found.add(name if top == "vkvx" else f"vkvx.{name}")
    assert set(settings["packages"]) == found
    # A package without an entry of its own lies in its parent's folder.
    assert settings["package-dir"] == {top if top == "vkvx" else f"vkvx.{top}": top for top in folders}


def test_pins_are_within_the_allowed_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[canonicalize_name(name)] = version
    extras = [entry for entries in project["optional-dependencies"].values() for entry in entries]
    for line in [*project["dependencies"], *extras]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in ("vkvx", "onnxruntime-gpu", "tensorrt"):  # alternatives that need a GPU
            continue
        assert requirement.specifier.contains(pins[name]), line
