"""Runs an evaluation: finds the target, goes through batches and settings, keeps records, sums up."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx import __version__
from vkvx.errors import CapacityError, OptionError
from vkvx.evaluation.examples import choose_examples
from vkvx.evaluation.metrics import METRIC_MODULES
from vkvx.evaluation.records import Record, Records
from vkvx.evaluation.result import Result, summarise
from vkvx.evaluation.settings import Setting, options_of, product, setting_name, settle
from vkvx.evaluation.tasks import Sample, Task, open_task, prepare
from vkvx.export.options import ExportOptions
from vkvx.manifest import FILE_NAME, FLOAT_DTYPES, Manifest, Progress, sha256
from vkvx.models.checkpoint import read_checkpoint
from vkvx.models.family import Source
from vkvx.models.registry import ALIASES, resolve, resolve_origin
from vkvx.packages import RUN, TORCH, require
from vkvx.runtime.sessions.pieces import check_cut_after_pictures
from vkvx.runtime.sessions.processor import Processor

if TYPE_CHECKING:
    from vkvx.evaluation.bundle_runner import BundleRunner
    from vkvx.evaluation.torch_runner import Batch, TorchRunner

DEVICES = ("auto", "cpu", "cuda")
MAX_NEW_TOKENS, BATCH = 64, 8
PACKAGES = ("numpy", "torch", "transformers", "onnxruntime")
_SAMPLED_BYTES = 1 << 16


def evaluate(
    target: str | Path,
    task: str | None = None,
    settings: Sequence[ExportOptions] | None = None,
    *,
    data: str | Path | None = None,
    samples: int | None = None,
    metrics: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    batch: int = BATCH,
    max_new_tokens: int = MAX_NEW_TOKENS,
    model: str | None = None,
    reference: bool = True,
    cut_after_pictures: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    examples: int = 0,
) -> Result:
    """Measure what quantising the visual cache costs a model.

    Args:
        target: a checkpoint (alias, directory, hub id), run in torch, or a bundle directory, run in onnxruntime.
        task: "digits", the default: held-out pages of tiny-llava; or leave it out and give ``data``.
        settings: options of the cache; 16 bits, the reference, always run as well. Default: 4, 2 and 1 bits. A bundle
            has one setting, its own.
        data: file of JSON lines with "image", "images" or "video", "prompt", "answers" and maybe "choices".
        samples: run so many, the first ones (default: 100 pages, all of a file).
        metrics: of ``data``: some of ``TEXT_METRICS`` in :mod:`vkvx.evaluation.metrics` (default: exact, f1).
        device: "auto", "cpu" or "cuda".
        dtype: of a checkpoint: "float16" (default on a GPU), "bfloat16", "float32" (default on a CPU).
        batch: samples at a time.
        max_new_tokens: length of an answer.
        model: of a bundle: where its checkpoint is, if not where the manifest says.
        reference: of a bundle: whether its checkpoint is run, too, to compare with.
        cut_after_pictures: of a bundle: end a call of the prompt behind the pictures of each turn, as in a session.
        output: file that keeps a record for each sample and setting; the same call goes on where it ended.
        force: start that file anew if it is of another evaluation, or damaged.
        progress: called as progress(stage, done, total).
        examples: so many samples with their pictures and answers are kept in the result.

    Raises VkvxError: OptionError, ModelError, BundleError, InputError, CapacityError, StorageError, DependencyError.
    """
    asked = open_task(task, data, samples, metrics)
    require("eval", *needed_modules(asked, bundle=is_bundle(target), reference=reference))
    plan = make_plan(
        target, asked, settings, device=device, dtype=dtype, batch=batch, max_new_tokens=max_new_tokens,
        model=model, reference=reference, cut_after_pictures=cut_after_pictures, progress=progress,
    )  # fmt: skip
    if force and output is None:
        raise OptionError("force= (--force) has no effect without output= (--output); leave it out, or give both")
    with Records(output, plan.fingerprint, force=force) as records:
        run(plan, records, progress)
        figures, histograms = summarise(records, plan.settings, asked)
        shown = choose_examples(records, plan.settings, asked, examples)
    return replace(plan.result(figures, histograms), examples=shown)


@dataclass(frozen=True)
class EvaluationPlan:
    """What is run: ``source`` in torch, ``bundle`` in onnxruntime with ``source`` as its reference, if there is one.

    Without ``generate`` the packed settings are only run along the reference's answers. ``cut_after_pictures`` is of a
    bundle.
    """

    target: str
    task: Task
    settings: list[Setting]
    device: str
    dtype: str
    batch: int
    max_new_tokens: int
    source: Source | None
    bundle: Path | None = None
    manifest: Manifest | None = None
    generate: bool = True
    cut_after_pictures: bool = False

    @property
    def kind(self) -> str:
        """The engine of the packed settings."""
        return "torch" if self.bundle is None else "onnxruntime"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What records must share to be of one evaluation; the number of samples is not part of it."""
        contents = {}
        if self.source is not None:
            contents["checkpoint"] = content_of(self.source)
        if self.bundle is not None:
            contents["bundle"] = hashlib.sha256((self.bundle / FILE_NAME).read_bytes()).hexdigest()
        for path in _metrics_files(self.settings):
            contents[str(path)] = sha256(path)
        return {
            "target": self.target,
            "contents": contents,
            "task": self.task.name,
            "task identity": self.task.identity,
            "settings": {setting.name: setting.to_json() for setting in self.settings},
            "kind": self.kind,
            "device": self.device,
            "dtype": self.dtype,
            "longest answer": self.max_new_tokens,
            "answers": self.generate,
            "versions": {"vkvx": __version__, **_versions()},
        }

    def result(self, figures: Any, histograms: Any) -> Result:
        """The result with what was run."""
        return Result(
            target=self.target,
            kind=self.kind,
            device=self.device,
            dtype=self.dtype,
            task=self.task.name,
            samples=self.task.count,
            environment=environment(self.device),
            settings=figures,
            histograms=histograms,
        )


def needed_modules(task: Task, *, bundle: bool = False, reference: bool = True) -> list[str]:
    """The Python modules that an evaluation takes, so that missing ones are told before anything is read."""
    found = [*(RUN if bundle else ()), *(TORCH if reference or not bundle else ())]
    found += [] if task.is_given else ["sklearn"]
    return list(dict.fromkeys(found + [METRIC_MODULES[name] for name in task.metrics if name in METRIC_MODULES]))


def make_plan(
    target: str | Path,
    task: Task,
    settings: Sequence[ExportOptions] | None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    batch: int = BATCH,
    max_new_tokens: int = MAX_NEW_TOKENS,
    model: str | None = None,
    reference: bool = True,
    generate: bool = True,
    cut_after_pictures: bool = False,
    progress: Progress | None = None,
) -> EvaluationPlan:
    """Find the target and check everything that can be checked before weights are read. Arguments as in evaluate."""
    for name, value in (("batch", batch), ("max-new-tokens", max_new_tokens)):
        if value < 1:
            raise OptionError(f"--{name} {value} is not supported; give at least 1")
    if device not in DEVICES:
        raise OptionError(f"unknown device '{device}'; give device= (--device) {' or '.join(DEVICES)}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise OptionError(f"dtype '{dtype}' is not supported; give dtype= (--dtype) {' or '.join(FLOAT_DTYPES)}")
    if is_bundle(target):
        if settings is not None:
            raise OptionError(
                "a bundle has one setting, its own; leave the options of the cache out, or give the checkpoint"
            )
        if dtype is not None:
            raise OptionError("dtype= (--dtype) has no effect on a bundle, which has its own; leave it out")
        return _plan_bundle(
            Path(target), task, device, batch, max_new_tokens, model, reference, cut_after_pictures, progress
        )
    only_of_bundles = (
        ("--model", model),
        ("--no-reference", not reference),
        ("--cut-after-pictures", cut_after_pictures),
    )
    for name, given in only_of_bundles:
        if given not in (None, False):
            raise OptionError(f"{name} has no effect on a checkpoint; leave it out, or give a bundle")
    from vkvx.evaluation.torch_runner import choose_device
    from vkvx.models.graph.moments import read_checked

    source = resolve(target)
    chosen = choose_device(device)
    dtype = dtype or ("float16" if chosen == "cuda" else "float32")
    info = source.info(dtype)
    settled = settle(product({}) if settings is None else settings, info.cached_layers, info.typical_tokens)
    for path in _metrics_files(settled):
        read_checked(path, info, source.config, warnings.warn)
    return EvaluationPlan(source.name, task, settled, chosen, dtype, batch, max_new_tokens, source, generate=generate)


def _metrics_files(settings: Sequence[Setting]) -> list[Path]:
    given = dict.fromkeys(setting.options.metrics_file for setting in settings)
    return [Path(path) for path in given if path is not None]


def is_bundle(target: str | Path) -> bool:
    """Whether this is a bundle's directory; an alias comes first, as elsewhere."""
    return str(target) not in ALIASES and (Path(target) / FILE_NAME).is_file()


def _plan_bundle(
    bundle: Path,
    task: Task,
    device: str,
    batch: int,
    max_new_tokens: int,
    model: str | None,
    reference: bool,
    cut_after_pictures: bool,
    progress: Progress | None,
) -> EvaluationPlan:
    import onnxruntime

    from vkvx.runtime.backends.onnxruntime.backend import choose_provider

    manifest = Manifest.load(bundle)
    check_cut_after_pictures(manifest, cut_after_pictures)
    manifest.verify(bundle, progress)
    info = manifest.model
    provider = choose_provider(onnxruntime, device)
    options = options_of(manifest.quantization, info.typical_tokens)
    name = setting_name(options, manifest.quantization) + (", cut after pictures" if cut_after_pictures else "")
    of_bundle: dict[str, Any] = {"bundle": bundle, "manifest": manifest, "cut_after_pictures": cut_after_pictures}
    if not reference:
        if model is not None:
            raise OptionError("model= (--model) has no effect with --no-reference; leave one of the two out")
        own = Setting(name, options, manifest.quantization, reference=False)
        return EvaluationPlan(str(bundle), task, [own], provider, info.dtype, batch, max_new_tokens, None, **of_bundle)
    from vkvx.runtime.backends.torch.loading import check_same_model

    source = resolve_origin(bundle, info, model, "--no-reference")
    check_same_model(source, manifest)
    (base,) = settle([], info.cached_layers, info.typical_tokens)
    if base.name == name:
        name = f"{name}, onnxruntime"
    own = Setting(name, options, manifest.quantization, reference=False)
    return EvaluationPlan(
        str(bundle), task, [base, own], provider, info.dtype, batch, max_new_tokens, source, **of_bundle
    )


def run(plan: EvaluationPlan, records: Records, progress: Progress | None = None) -> None:
    """Make the records that are not there yet: all settings of a batch, then the next batch.

    Samples of a user are prepared once before weights are read, so that one that cannot be used is told at once.
    """
    count, names = plan.task.count, [setting.name for setting in plan.settings]
    missing = [i for i in range(count) if any(records.get(i, name) is None for name in names)]
    done, total = (count - len(missing)) * len(names), count * len(names)
    if not missing:
        return
    report: Progress = progress or (lambda stage, done, total: None)
    if plan.task.is_given:
        _check_samples(plan, missing, report)
    report("load", 0, 1)
    engine = _Engine(plan)
    report("load", 1, 1)
    report("evaluate", done, total)
    try:
        for start in range(0, len(missing), plan.batch):
            indices = missing[start : start + plan.batch]
            for made in engine.measure(list(plan.task.samples(indices)), records):
                records.add(made)
                done += len(indices)
                report("evaluate", done, total)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which a bundle alone does not need
            raise
        raise CapacityError(f"no room on the GPU for {plan.batch} samples at a time; lower batch= (--batch)") from error
    finally:
        engine.close()


def _check_samples(plan: EvaluationPlan, indices: Sequence[int], report: Progress) -> None:
    """Prepare each sample once: raises what :func:`vkvx.evaluation.tasks.prepare` raises."""
    if plan.bundle is not None:
        assert plan.manifest is not None
        info, processor = plan.manifest.model, Processor.of_bundle(plan.bundle, plan.manifest)
    else:
        assert plan.source is not None
        info = plan.source.info(plan.dtype)
        processor = Processor.of_checkpoint(plan.source, info)
    for done, sample in enumerate(plan.task.samples(indices)):
        report("check samples", done, len(indices))
        prepare(sample, processor, info.max_positions, plan.max_new_tokens, in_torch=plan.source is not None)
    report("check samples", len(indices), len(indices))


class _Engine:
    """The runners of a plan."""

    def __init__(self, plan: EvaluationPlan) -> None:
        self._plan = plan
        self._torch: TorchRunner | None = None
        self._bundle: BundleRunner | None = None
        if plan.source is not None:
            from vkvx.evaluation.torch_runner import TorchRunner

            device = "auto" if plan.device == "cuda" and plan.bundle is not None else plan.device
            self._torch = TorchRunner(plan.source, device, plan.dtype, plan.max_new_tokens)
        if plan.bundle is not None:
            from vkvx.evaluation.bundle_runner import BundleRunner

            assert plan.manifest is not None
            self._bundle = BundleRunner(
                *(plan.bundle, plan.manifest, plan.device, plan.batch, plan.max_new_tokens),
                cut_after_pictures=plan.cut_after_pictures,
            )

    def measure(self, samples: list[Sample], records: Records) -> Iterator[list[Record]]:
        """The records of a batch, setting by setting; of a setting that is complete an empty list."""
        reference: Batch | None = None
        if self._torch is not None:
            base = self._plan.settings[0]
            known = [records.get(sample.index, base.name) for sample in samples]
            reference = self._torch.start(samples, [None if entry is None else entry.tokens for entry in known])
            yield self._torch.reference_records(reference, base)
        for setting in self._plan.settings:
            if setting.reference:
                continue
            if all(records.get(sample.index, setting.name) for sample in samples):
                yield []
            elif self._bundle is not None:
                yield self._bundle.measure(samples, setting, reference)
            else:
                assert self._torch is not None
                assert reference is not None
                yield self._torch.measure(
                    reference, setting, generate=self._plan.generate, histograms=samples[0].index == 0
                )

    def close(self) -> None:
        """Drop what the bundle holds."""
        if self._bundle is not None:
            self._bundle.close()


def environment(device: str) -> dict[str, Any]:
    """Versions and machine."""
    found: dict[str, Any] = {"python": platform.python_version(), **_versions(), "cpu": _cpu(), "cores": os.cpu_count()}
    if device == "cuda":
        try:
            import torch

            found["gpu"] = torch.cuda.get_device_name()
        except (ImportError, AssertionError, RuntimeError):  # onnxruntime alone, or a torch without CUDA
            found["gpu"] = None
    return found


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def content_of(source: Source) -> str:
    """A digest that a checkpoint with other weights does not have: of config, headers, and the ends of its files."""
    digest = hashlib.sha256((source.directory / "config.json").read_bytes())
    for path in sorted({tensor.file for tensor in read_checkpoint(source.directory).values()}):
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, path.stat().st_size - _SAMPLED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
