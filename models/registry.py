"""Finds a checkpoint by alias, local directory or hub id, and the family for its architecture."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vkvx.errors import BundleError, ModelError
from vkvx.manifest import FILE_NAME as BUNDLE_FILE
from vkvx.manifest import ModelInfo
from vkvx.models.checkpoint import CONFIG_FILE
from vkvx.models.family import Family, Source
from vkvx.models.gemma3 import Gemma3
from vkvx.models.gemma4 import Gemma4
from vkvx.models.glm_v import Glm4V, Glm46V, GlmOcr
from vkvx.models.idefics3 import Idefics3, SmolVLM
from vkvx.models.internvl import InternVL
from vkvx.models.lighton_ocr import LightOnOcr
from vkvx.models.llava import TINY_LLAVA, Llava
from vkvx.models.llava_next import LlavaNext
from vkvx.models.llava_onevision import LlavaOneVision
from vkvx.models.paddleocr_vl import PaddleOcrVL
from vkvx.models.paligemma import PaliGemma
from vkvx.models.pixtral import Mistral3
from vkvx.models.qwen3_5 import Qwen35
from vkvx.models.qwen3_vl import Qwen3VL
from vkvx.models.qwen_vl import Qwen2VL, Qwen25VL
from vkvx.models.refusals import REFUSALS
from vkvx.packages import missing

_KNOWN = (
    *(Llava, LlavaNext, LlavaOneVision, InternVL, Idefics3, SmolVLM),
    *(Qwen2VL, Qwen25VL, Qwen3VL, Qwen35, Glm4V, Glm46V, GlmOcr, PaddleOcrVL, Mistral3, LightOnOcr),
    *(Gemma3, PaliGemma, Gemma4),
)
FAMILIES: dict[str, Family] = {kind.architecture: kind() for kind in _KNOWN}
ALIASES = {alias: target for family in FAMILIES.values() for alias, target in family.aliases.items()}
"""Directories and hub ids by the short names that people may give."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model*", "adapters.safetensors", "*lora_weights.*")
"""Names that peft, mlx and diffusers give to the files of an adapter."""

CONFIG_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
WEIGHT_FILES = ("*.safetensors",)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Location:
    """Where a checkpoint, its config files at least, lies on this machine. The fields are those of :class:`Source`."""

    name: str
    origin: str
    directory: Path
    revision: str | None


def resolve(
    name_or_path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Source:
    """Find the checkpoint, download it if it is on the hub, and read its config. Without ``weights`` only the config.

    Raises ModelError if :func:`locate` does not find it or :func:`read_source` cannot use it.
    """
    place = locate(name_or_path, cache_dir=cache_dir, revision=revision)
    # The architecture is checked before gigabytes of weights are fetched.
    source = read_source(place, trust_remote_code)
    if weights and place.revision is not None:
        directory = _download(place.origin, CONFIG_FILES + WEIGHT_FILES, cache_dir, revision)
        _refuse_adapter(directory)
        source = replace(source, directory=directory, revision=directory.name)
    return source


def locate(name_or_path: str | Path, *, cache_dir: str | Path | None = None, revision: str | None = None) -> Location:
    """Find a checkpoint, and download its config files if it is on the hub.

    An alias comes first (write ``./llava`` for a directory of that name), then a local directory, then a hub id.
    Raises ModelError if there is no such checkpoint, or it cannot be downloaded.
    """
    name = str(name_or_path)
    target = ALIASES.get(name, name)
    directory = Path(target).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ModelError(f"'{name}' is on this machine and has no revisions; leave out --revision")
        if cache_dir is not None:
            raise ModelError(f"'{name}' is on this machine, nothing is downloaded; leave out cache_dir= (--cache-dir)")
        directory = directory.resolve()
        label, origin = (name, name) if name in ALIASES else (directory.name, str(directory))
        return Location(label, origin, _with_config(directory), None)
    if not _is_hub_id(str(target)):
        if directory.exists() or _is_path(name):
            raise ModelError(f"'{name}' is not a directory; give a directory with config.json and *.safetensors")
        raise ModelError(
            f"unknown model '{name}'; give one of {', '.join(ALIASES)}, a local directory, or a hub id (owner/name)"
        )
    hub_id = str(target)
    directory = _with_config(_download(hub_id, CONFIG_FILES, cache_dir, revision))
    return Location(name if name in ALIASES else hub_id.split("/")[1], hub_id, directory, directory.name)


def origin_for(source: Source, bundle: Path) -> str:
    """What the manifest of a bundle holds of where its checkpoint is; :func:`resolve_origin` finds it by that.

    An alias or a hub id; of a directory the way there from the bundle, or "" where that leads through the root: that
    would tell whoever gets the bundle how somebody's disk is laid out.
    """
    if not Path(source.origin).is_absolute():
        return source.origin
    here = bundle.resolve()
    try:
        shared = Path(os.path.commonpath([here, source.origin]))
    except ValueError:  # two drives
        return ""
    return "" if shared == Path(shared.anchor) else Path(os.path.relpath(source.origin, here)).as_posix()


def resolve_origin(bundle: Path, info: ModelInfo, model: str | None, otherwise: str) -> Source:
    """The checkpoint ``model``, or where that is None the one that a bundle was exported from.

    ``otherwise`` is what people can do without one. Raises ModelError as :func:`resolve`.
    """
    if model is not None:
        return resolve(model)
    if not info.source:
        raise ModelError(
            f"the manifest does not say where the checkpoint '{info.name}' is; give model= (--model) its directory, or "
            f"{otherwise}"
        )
    is_path = info.source.startswith(".")
    try:
        if is_path:
            return resolve(os.path.normpath(bundle.resolve() / info.source))
        return resolve(info.source, revision=info.revision)
    except ModelError as error:
        reason = str(error).partition(";")[0]
        raise ModelError(
            f"the checkpoint that {bundle} was exported from is not there ({reason}); give model= (--model) with its "
            f"place, or {otherwise}"
        ) from error


def read_bundle(bundle: Path) -> Source:
    """The model in a bundle, whose weights and config are those of a checkpoint. Raises BundleError and ModelError."""
    if not (bundle / CONFIG_FILE).is_file():
        raise BundleError(
            f"{bundle} holds no {CONFIG_FILE}, which older exports left out and torch needs; export the model again, "
            "or give --backend onnxruntime"
        )
    directory = bundle.resolve()
    return read_source(Location(directory.name, str(directory), directory, None))


def read_source(place: Location, trust_remote_code: bool = False) -> Source:
    """Read the config of a checkpoint.

    Raises ModelError if it cannot be read, or the checkpoint is an adapter, of an architecture that no family knows,
    or one that its family refuses.
    """
    config, family = _read_config(place.directory, trust_remote_code)
    return Source(place.name, place.origin, place.directory, config, family, place.revision, trust_remote_code)


def family_of(model: Any) -> Family:
    """The family of a loaded transformers model. Raises ModelError if its class is not supported."""
    names = [base.__name__ for base in type(model).__mro__]
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise ModelError(f"models of class {names[0]} are not supported{_why(names)}")
    return family.variant(model.config)


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


def _with_config(directory: Path) -> Path:
    if (directory / BUNDLE_FILE).is_file():
        raise ModelError(f"{directory} is a bundle, not a checkpoint; give the checkpoint that it was exported from")
    if not (directory / CONFIG_FILE).is_file() and _adapter(directory) is None:
        raise ModelError(f"{directory} holds no {CONFIG_FILE}; give the directory of a Hugging Face checkpoint")
    return directory


def _adapter(directory: Path) -> Path | None:
    """A file of an adapter in the directory, or in a folder of it: peft makes one for an adapter with a name."""
    found = (path for folder in ("", "*/") for name in ADAPTER_FILES for path in directory.glob(folder + name))
    return min((path for path in found if path.is_file()), default=None)


def _refuse_adapter(directory: Path) -> None:
    if (adapter := _adapter(directory)) is not None:
        raise ModelError(
            f"{directory} holds a LoRA or another PEFT adapter ({adapter.relative_to(directory)}), which would be left "
            "out; merge it with merge_and_unload of peft, save model and processor with save_pretrained, and give that "
            "directory; or move the adapter elsewhere if the model is meant without it"
        )


def _read_config(directory: Path, trust_remote_code: bool) -> tuple[Any, Family]:
    _refuse_adapter(directory)
    path = directory / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        architectures = [str(name) for name in data.get("architectures") or ()]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"cannot read {path} ({error}); download the checkpoint again") from error
    family = next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
    if family is None:
        raise _unsupported(architectures, data.get("model_type"))
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise missing("transformers", error) from error
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its validators of the day raise
        reason = " ".join(str(error).split())
        raise ModelError(f"transformers cannot read {path}: {reason}") from error
    family = family.variant(config)
    family.check(config)
    return config, family


def _unsupported(architectures: list[str], model_type: object) -> ModelError:
    given = ", ".join(architectures) or f"none (model type {model_type})"
    return ModelError(f"architecture {given} is not supported{_why(architectures)}")


def _why(names: list[str]) -> str:
    """What follows "not supported": the reason of the first that has one, else the names that are supported."""
    reason = next((REFUSALS[name] for name in names if name in REFUSALS), None)
    return f"; supported: {', '.join(FAMILIES)}" if reason is None else f": {reason}"
