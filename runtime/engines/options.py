"""What can be asked of an engine build, and what each TensorRT refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vkvx.errors import DependencyError, OptionError
from vkvx.runtime.engines.library import TensorRTLibrary
from vkvx.runtime.engines.limits import GivenLimits

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT for RTX builds for."""
EMBED = "embed"


@dataclass(frozen=True)
class BuildOptions:
    """Options of ``vkvx build``; the flags of the same names are documented in ``docs/cli.md``.

    ``compute_capabilities`` are such as "8.9", none for the GPU of the machine. ``plugin`` is the path of a library,
    "embed", or None for the one that ``vkvx plugin build`` makes. ``workspace`` is in bytes. ``output`` is the
    engines' directory, None for one in the bundle.
    """

    backend: str = "auto"
    compute_capabilities: tuple[str, ...] = ()
    limits: GivenLimits = field(default_factory=GivenLimits)
    workspace: int | None = None
    timing_cache: Path | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    strip_plan: bool = False
    plugin_free: bool = False
    plugin: str | None = None
    output: Path | None = None
    force: bool = False

    def recorded(self) -> dict[str, int | str | bool | None]:
        """What the engines depend on besides their limits, for ``engine.json``."""
        return {
            "workspace": self.workspace,
            "optimization_level": self.optimization_level,
            "version_compatible": self.version_compatible,
            "hardware_compatible": self.hardware_compatible,
            "weight_streaming": self.weight_streaming,
            "strip_plan": self.strip_plan,
            "plugin_free": self.plugin_free,
        }


def choose_capabilities(library: TensorRTLibrary, given: tuple[str, ...], native: list[str]) -> tuple[str, ...]:
    """The compute capabilities to build for: what was given, else that of the machine's first GPU.

    ``native`` are those of the machine's GPUs, such as "8.9", in CUDA's order.

    Raises OptionError for one that is not understood or that the library does not build for, and DependencyError if
    a GPU is needed and there is none.
    """
    for name in given:
        if not re.fullmatch(r"\d{1,2}\.\d", name):
            raise OptionError(f"--compute-capability {name} is not understood: give one such as 8.9")
    chosen = tuple(sorted(set(given or native[:1]), key=lambda name: tuple(map(int, name.split(".")))))
    if library.needs_gpu:
        if not native:
            raise DependencyError(
                f"{library.name} builds engines on a GPU, and there is none here; give --backend rtx, which needs none"
            )
        if len(chosen) > 1 or chosen[0] not in native:
            raise OptionError(
                f"{library.name} builds for the GPU of this machine ({', '.join(native)}), not for "
                f"{', '.join(chosen)}; build there, or give --backend rtx"
            )
        return chosen
    if not chosen:
        raise OptionError(
            "there is no GPU here to build for; give --compute-capability with that of the GPU to run on, such as 8.9"
        )
    for name in chosen:
        if name not in RTX_CAPABILITIES or not hasattr(library.module.ComputeCapability, f"SM{name.replace('.', '')}"):
            raise OptionError(
                f"{library.name} does not build for compute capability {name}: it knows {', '.join(RTX_CAPABILITIES)}"
                + ("; H100 and H200 need --backend tensorrt" if name == "9.0" else "")
            )
    return chosen


def check_options(library: TensorRTLibrary, options: BuildOptions, *, has_gpu: bool) -> None:
    """Raise OptionError for what the library does not offer here, and for options that exclude each other."""
    module, level = library.module, options.optimization_level
    if level is not None and not 0 <= level <= 5:
        raise OptionError(f"--optimization-level must be 0 to 5, got {level}")
    if options.workspace is not None and options.workspace < 1:
        raise OptionError(f"--workspace must be at least 1 byte, got {options.workspace}")
    if options.plugin_free and options.plugin is not None:
        raise OptionError("--plugin-free engines need no plugin; leave out --plugin or --plugin-free")
    if options.plugin == EMBED and not hasattr(module.IBuilderConfig, "plugins_to_serialize"):
        raise OptionError(f"{library.name} cannot embed a plugin; leave out --plugin embed: the library is copied")
    if library.backend == "rtx":
        reasons = {
            "--timing-cache": (options.timing_cache, "it times nothing when it builds"),
            "--hardware-compatible": (options.hardware_compatible, "give several --compute-capability instead"),
            "--optimization-level": (level, "it has but one"),
            "--version-compatible": (options.version_compatible, "it comes without a lean runtime"),
            "--strip-plan": (options.strip_plan and not has_gpu, "it strips weights only on a machine with a GPU"),
        }
        for flag, (value, reason) in reasons.items():
            if value not in (None, False):
                raise OptionError(f"{library.name} offers no {flag}: {reason}; leave it out")
    if options.hardware_compatible and not hasattr(module, "HardwareCompatibilityLevel"):
        raise OptionError(f"{library.name} offers no --hardware-compatible; leave it out")
    if options.weight_streaming and not library.is_strongly_typed:
        raise OptionError(f"{library.name} offers no --weight-streaming; leave it out, or install a newer TensorRT")
    if options.strip_plan and options.weight_streaming:
        raise OptionError("--strip-plan leaves no weights to stream; leave out --weight-streaming or --strip-plan")
    for name, flag, field_name in _FLAGS:
        if getattr(options, field_name):
            library.builder_flag(name, flag)


_FLAGS = (
    ("VERSION_COMPATIBLE", "--version-compatible", "version_compatible"),
    ("WEIGHT_STREAMING", "--weight-streaming", "weight_streaming"),
    ("STRIP_PLAN", "--strip-plan", "strip_plan"),
)


_OLD_LEVEL = 0
"""The optimisation level of TensorRT 8.6 if none was asked for: tiny-llava takes it 1.5 minutes then, and more than
five at level 3, its own default."""


def configure(library: TensorRTLibrary, builder: Any, options: BuildOptions, capabilities: tuple[str, ...]) -> Any:
    """An ``IBuilderConfig`` with everything but profiles, timing cache, plugin and progress."""
    module = library.module
    config = builder.create_builder_config()
    if library.backend == "rtx":
        config.num_compute_capabilities = len(capabilities)
        for i, name in enumerate(capabilities):
            config.set_compute_capability(getattr(module.ComputeCapability, f"SM{name.replace('.', '')}"), i)
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
    level = options.optimization_level
    if level is None and not library.is_strongly_typed:
        level = _OLD_LEVEL
    if level is not None:
        config.builder_optimization_level = level
    if options.hardware_compatible:
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
    for name, flag, field_name in _FLAGS:
        if getattr(options, field_name):
            config.set_flag(library.builder_flag(name, flag))
    if options.strip_plan:
        config.set_flag(library.builder_flag("REFIT_IDENTICAL", "--strip-plan"))
    aliases = getattr(module.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None)
    if library.plugin_interface == 3 and aliases is not None and not options.plugin_free:
        config.set_preview_feature(aliases, True)
    if not library.is_strongly_typed:
        # Layers may take FP16, and take it where the graph has it: see :func:`vkvx.runtime.engines.network.parse`.
        config.set_flag(module.BuilderFlag.FP16)
        config.set_flag(module.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        # Each captured decode step has a context of its own, all with one profile.
        config.set_preview_feature(module.PreviewFeature.PROFILE_SHARING_0806, True)
        # With it there are no kernels for decoders of 16 bits, and those of fewer bits end in a segmentation fault.
        config.set_preview_feature(module.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, False)
        # No layer of a decoder needs cuBLAS or cuDNN, which need not be installed then.
        config.set_tactic_sources(0)
    return config
