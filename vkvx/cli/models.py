"""``vkvx models``: the families that can be exported, and the names of some checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vkvx.cli import terminal


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "models",
        help="list the families that can be exported, and aliases",
        description="The families of models that can be exported, what tests compare, and aliases of checkpoints.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the families."""
    families = describe_families()
    if args.json:
        terminal.print_json(families)
        return 0
    rows = [("family", "architecture", "decoders", "verified")]
    aliases = [("alias", "checkpoint")]
    for family in families:
        rows.append((family["name"], family["architecture"], ", ".join(family["decoders"]), family["verified"]))
        aliases += family["aliases"].items()
    print("\n".join([*terminal.columns(rows, str.ljust), "", *terminal.columns(aliases, str.ljust)]))
    return 0


def describe_families() -> list[dict[str, Any]]:
    """Each family: ``name``, ``architecture``, ``decoders``, ``verified`` in words, ``aliases`` with what they name."""
    from vkvx.models.registry import FAMILIES

    described = []
    for architecture, family in FAMILIES.items():
        aliases = family.aliases
        verified = f"{', '.join(family.tested_models)}: random checkpoints against transformers"
        bundled = [alias for alias, target in aliases.items() if isinstance(target, Path)]
        if bundled:
            verified += f"; trained {', '.join(bundled)}"
        described.append(
            {
                "name": family.title,
                "architecture": architecture,
                "decoders": family.text_models,
                "verified": verified,
                "aliases": {
                    alias: "in this package" if alias in bundled else str(target) for alias, target in aliases.items()
                },
            }
        )
    return described
