"""``vkvx calibrate``: records what queries a model has while it answers, and what they attend to.

Answer by answer: the prompt is prefilled exactly, the model's own greedy answer (or the one that the data gives) is fed
once, and each attention layer's queries add to that layer's moments. Nothing but these sums is kept. They are in the
file after each answer, so a run that ends early goes on from there, and gives the same to the bit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.errors import CapacityError, NumericError, OptionError
from vkvx.evaluation.run import DEVICES, MAX_NEW_TOKENS, content_of, is_bundle
from vkvx.evaluation.tasks import Sample, Task, digits, prepare, questions
from vkvx.manifest import FLOAT_DTYPES, Progress
from vkvx.models.registry import ALIASES, resolve
from vkvx.packages import TORCH, require
from vkvx.runtime.sessions.processor import Processor
from vkvx.storage import check_file, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from vkvx.evaluation.torch_runner import TorchRunner
    from vkvx.models.graph.moments import Moments
    from vkvx.runtime.transformers.cache import CacheCall

SAMPLES = 32


@dataclass(frozen=True)
class Calibrated:
    """What a file of moments holds now; ``recorded`` answers of it are of this run."""

    path: str
    model: str
    data: str
    device: str
    dtype: str
    samples: int
    tokens: int
    recorded: int

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON."""
        return asdict(self)


def calibrate(
    target: str | Path,
    output: str | Path,
    *,
    data: str | Path | None = None,
    samples: int = SAMPLES,
    device: str = "auto",
    dtype: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    force: bool = False,
    progress: Progress | None = None,
) -> Calibrated:
    """Record the moments that ``metrics_file=`` (``--metrics-file``) takes.

    Args:
        target: a checkpoint (alias, directory, hub id).
        output: the file. One that holds fewer answers of the same run gets the missing ones.
        data: file of JSON lines with "image" or "images", "prompt" and, if the model's own shall not be taken,
            "answers", the first of which counts. Bundled models may do without: they get pages that they were
            trained on.
        samples: record so many, the first ones; a file of fewer samples gives what it has.
        device: "auto", "cpu" or "cuda".
        dtype: "float16" (default on a GPU), "bfloat16", "float32" (default on a CPU).
        max_new_tokens: length of an answer; longer ones are cut.
        force: start anew in place of a file of another run, or a damaged one.
        progress: called as progress(stage, done, total).

    Raises VkvxError: OptionError, ModelError, InputError, CapacityError, NumericError, StorageError, DependencyError.
    """
    for name, value, least in (("samples", samples, 1), ("max-new-tokens", max_new_tokens, 2)):
        if value < least:
            raise OptionError(f"--{name} {value} is not supported; give at least {least}")
    if device not in DEVICES:
        raise OptionError(f"unknown device '{device}'; give device= (--device) {' or '.join(DEVICES)}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise OptionError(f"dtype '{dtype}' is not supported; give dtype= (--dtype) {' or '.join(FLOAT_DTYPES)}")
    if is_bundle(target):
        raise OptionError(f"{target} is a bundle, whose metrics are made; give the checkpoint, and export it again")
    require("eval", *TORCH, *(["sklearn"] if data is None else []))
    from vkvx.evaluation.torch_runner import TorchRunner, choose_device
    from vkvx.models.graph.moments import LEAST_SAMPLES, Moments

    task = _task(target, data, samples)
    if task.count < LEAST_SAMPLES:
        raise OptionError(f"{task.count} samples are too few to calibrate on; give at least {LEAST_SAMPLES}")
    path = Path(output)
    check_file(path, "output= (--output)")
    source, chosen = resolve(target), choose_device(device)
    dtype = dtype or ("float16" if chosen == "cuda" else "float32")
    info = source.info(dtype)
    run = {
        "checkpoint": content_of(source),
        "data": task.identity,
        "dtype": dtype,
        "longest answer": max_new_tokens,
    }
    moments = Moments.empty(info, source.config, task.name, run)
    version = _version(path)
    if path.exists() and path.stat().st_size:
        moments = _found(path, moments, info, source.config, force)
    begun = moments.samples
    if begun > task.count:
        raise OptionError(f"{path} holds {begun} answers; give samples= (--samples) {begun} or more, or another output")
    report: Progress = progress or (lambda stage, done, total: None)
    if begun < task.count:
        if task.is_given:
            processor = Processor.of_checkpoint(source, info)
            for number, sample in enumerate(task.samples(range(begun, task.count))):
                report("check samples", number, task.count - begun)
                prepare(sample, processor, info.max_positions, max_new_tokens, in_torch=True)
        report("load", 0, 1)
        runner = TorchRunner(source, chosen, dtype, max_new_tokens)
        report("load", 1, 1)
        for sample in task.samples(range(begun, task.count)):
            report("calibrate", sample.index, task.count)
            _record(runner, sample, moments, own=not task.is_given)
            if _version(path) != version:  # its answers would be lost
                raise OptionError(
                    f"another run has written {path} meanwhile; wait for its end, or choose another output= (--output)"
                )
            write_file(path, moments.to_bytes(info))
            version = _version(path)
    report("calibrate", task.count, task.count)
    counts = (moments.samples, moments.tokens, moments.samples - begun)
    return Calibrated(str(path), source.name, task.name, chosen, dtype, *counts)


def _task(target: str | Path, data: str | Path | None, samples: int) -> Task:
    if data is not None:
        return questions(Path(data), samples, (), answered=False)
    if not isinstance(ALIASES.get(str(target)), Path):
        raise OptionError(
            f"there are no pictures to calibrate {target} on; give data= (--data) FILE.jsonl, "
            "or export without a file of metrics: then they come from the weights alone"
        )
    return digits(samples, "train")


def _version(path: Path) -> tuple[int, int] | None:
    """Tells whether a file is the one that was there; each write makes a new one."""
    if not path.exists():
        return None
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns


def _found(path: Path, wanted: Moments, info: Any, config: Any, force: bool) -> Moments:
    """What the file holds of the same run. Raises OptionError for anything else, unless it is to be replaced."""
    from vkvx.models.graph.moments import read_moments

    try:
        found = read_moments(path, info, config)
    except OptionError as error:
        if force:
            return wanted
        raise OptionError(f"{error}, with another output= (--output), or start anew with force= (--force)") from error
    if found.run == wanted.run:
        return found
    if force:
        return wanted
    different = next(name for name in wanted.run if found.run.get(name) != wanted.run[name])
    raise OptionError(
        f"{path} is of another run: its {different} is another; "
        "choose another output= (--output), or start anew with force= (--force)"
    )


def _record(runner: TorchRunner, sample: Sample, moments: Moments, *, own: bool) -> None:
    """Add the queries along the answer to a sample. Raises what reading it raises, and NumericError."""
    import torch

    recorder = _Recorder(runner)
    answer = None
    if sample.answers and not own:
        pictures = runner.processor.placeholder_ids
        tokens = [token for token in runner.processor.encode(sample.answers[0]) if token not in pictures]
        answer = [*tokens, *runner.info.eos_token_ids[:1]][: runner.max_new_tokens] or None
    try:
        batch = runner.start([sample], [answer], recorder)
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{sample.place}: no room on the GPU for its prompt and answer; give smaller ones"
        ) from error
    for number, layer in enumerate(runner.info.caches):
        for total, found in ((moments.query[number], recorder.query), (moments.attention[number], recorder.attention)):
            if number in found:  # not if the answer ends at once
                total += found[number].cpu()
            if not total.isfinite().all():
                raise NumericError(
                    f"{sample.place}: queries of layer {layer} are infinite or no numbers; "
                    "give dtype= (--dtype) bfloat16 or float32"
                )
    moments.samples += 1
    moments.tokens += len(batch.answers[0]) - 1


class _Recorder:
    """An observer that sums up the queries of one answer by cache, on the device of each layer."""

    def __init__(self, runner: TorchRunner) -> None:
        from vkvx.models.graph.metric import layer_rotary

        self._info = runner.info
        self._rotary = layer_rotary(runner.family, runner.model)
        self.query: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}

    def __call__(self, call: CacheCall, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        from vkvx.evaluation.torch_runner import ObservedCache
        from vkvx.models.graph.metric import rotation
        from vkvx.models.graph.moments import picture_shares, second_moments, unrotated

        facts, cache, own = self._info.layers[layer], call.cache, call.cache.cache_of[layer]
        assert call.positions is not None
        assert isinstance(cache, ObservedCache)
        # Answers are text, which is at the same time, row and column.
        positions = call.positions[0] if call.positions.dim() == 2 else call.positions[1, 0]
        turns = rotation(self._rotary[layer], positions.to(query.device))
        queries = query[0].float()
        count = int(call.text_count[0])  # at 16 bits all that is cached are text rows
        keys = cache.buffers(own, key)["text_key"][0, :, :count]
        visual = cache.visual(call)[0].to(query.device)
        shares = picture_shares(queries, keys, visual, facts.scale, facts.softcap, facts.sliding_window)
        raw = unrotated(queries, turns, facts.rotary_dim, facts.rotary_interleaved)
        self.query[own] = self.query.get(own, 0) + second_moments(raw, facts.kv_heads)
        if facts.keys_of is None:  # values of other layers' caches have other output projections behind them
            self.attention[own] = self.attention.get(own, 0) + shares.sum(1)
