"""Finds a checkpoint by alias, local directory or hub id, and the family for its architecture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vkvx.errors import ModelError
from vkvx.models.family import Family, Source
from vkvx.models.idefics3 import Idefics3, SmolVLM
from vkvx.models.internvl import InternVL
from vkvx.models.llava import Llava
from vkvx.models.qwen_vl import Qwen2VL, Qwen25VL
from vkvx.packages import missing

TINY_LLAVA = Path(__file__).resolve().parent / "tiny_llava"
ALIASES: dict[str, str | Path] = {
    "tiny-llava": TINY_LLAVA,
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
}
FAMILIES: dict[str, Family] = {
    family.architecture: family for family in (Llava(), InternVL(), Idefics3(), SmolVLM(), Qwen2VL(), Qwen25VL())
}

CONFIG_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
WEIGHT_FILES = ("*.safetensors",)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(
    name_or_path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Source:
    """Find the checkpoint, download it if it is on the hub, and read its config. Without ``weights`` only the config.

    An alias comes first (write ``./llava`` for a directory of that name), then a local directory, then a hub id.
    Raises ModelError if there is no such model, it cannot be downloaded, or no family knows its architecture.
    """
    name = str(name_or_path)
    target = ALIASES.get(name, name)
    directory = Path(target).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ModelError(f"'{name}' is on this machine and has no revisions; leave out --revision")
        origin = name if name in ALIASES else str(directory.resolve())
        label = name if name in ALIASES else directory.resolve().name
        config, family = _read_config(directory, trust_remote_code)
        return Source(label, origin, directory.resolve(), config, family, None, trust_remote_code)
    if not _is_hub_id(str(target)):
        if directory.exists() or _is_path(name):
            raise ModelError(f"'{name}' is not a directory; give a directory with config.json and *.safetensors")
        raise ModelError(
            f"unknown model '{name}'; give one of {', '.join(ALIASES)}, a local directory, or a hub id (owner/name)"
        )
    hub_id = str(target)
    # The architecture is checked before gigabytes of weights are fetched.
    directory = _download(hub_id, CONFIG_FILES, cache_dir, revision)
    config, family = _read_config(directory, trust_remote_code)
    if weights:
        directory = _download(hub_id, CONFIG_FILES + WEIGHT_FILES, cache_dir, revision)
    label = name if name in ALIASES else hub_id.split("/")[1]
    return Source(label, hub_id, directory, config, family, directory.name, trust_remote_code)


def family_of(model: Any) -> Family:
    """The family of a loaded transformers model. Raises ModelError if its class is not supported."""
    names = [base.__name__ for base in type(model).__mro__]
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise ModelError(f"models of class {names[0]} are not supported; supported: {', '.join(FAMILIES)}")
    return family


def sample_pages() -> list[Path]:
    """The pages that come with tiny-llava, as PNG files, sorted."""
    return sorted((TINY_LLAVA / "pages").glob("*.png"))


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not _is_path(name)


def _download(hub_id: str, patterns: tuple[str, ...], cache_dir: str | Path | None, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise missing("huggingface_hub", error) from error
    local = "give the directory of a checkpoint that is on this machine instead of its hub id"
    try:
        path = snapshot_download(hub_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns))
    except GatedRepoError as error:
        raise ModelError(f"'{hub_id}' wants its terms accepted; do so, run `hf auth login`, or {local}") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"'{hub_id}' has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model '{hub_id}', or hides it; run `hf auth login`, or {local}") from error
    except (OSError, ValueError, RuntimeError) as error:  # no network, a time-out, a server that is down
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot download '{hub_id}' ({reason}); without a network, {local}") from error
    return Path(path)


def _read_config(directory: Path, trust_remote_code: bool) -> tuple[Any, Family]:
    path = directory / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        architectures = data.get("architectures") or []
    except FileNotFoundError:
        raise ModelError(f"{directory} holds no config.json; give the directory of a Hugging Face checkpoint") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot read {path} ({error}); download the checkpoint again") from error
    family = next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
    if family is None:
        given = ", ".join(map(str, architectures)) or f"none (model type {data.get('model_type')})"
        raise ModelError(f"architecture {given} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise missing("transformers", error) from error
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its validators of the day raise
        reason = " ".join(str(error).split())
        raise ModelError(f"transformers cannot read {path}: {reason}") from error
    family.check(config)
    return config, family
