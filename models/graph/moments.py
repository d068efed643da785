"""Second moments of a model's own queries, which `vkvx calibrate` records, and the file that holds them.

A query is taken back to position 0 before it counts: what the rotary embedding of any other position makes of it
follows from that, so one recording tells the queries of all distances behind a picture. What values are multiplied into
is the output projection of each query head, by what the head takes from pictures: the sum of squares of their tokens'
shares of its attention, as errors of tokens are independent of each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vkvx.errors import OptionError
from vkvx.manifest import CalibrationInfo, ModelInfo
from vkvx.options import keyword
from vkvx.plugins.rotary import rotary_pairs

FORMAT, VERSION = "vkvx-metrics", 1
LEAST_SAMPLES = 4
"""Fewer are refused: a handful of answers may look at a corner of what others look at."""
ENOUGH_SAMPLES = 16
"""Fewer are warned of: a model with many ways to answer may not have shown them."""
_KINDS = ("query", "attention")


@dataclass
class Moments:
    """Sums over the recorded queries, FP32 on the CPU, an entry for each cache of the model.

    ``query`` [Hkv, D, D] are the second moments of queries by KV head, ``attention`` [Hq] what each query head
    took from pictures. ``samples`` and ``tokens`` count answers and the tokens fed along them. ``data`` tells
    people what they were, ``run`` what else two recordings must share to be one.
    """

    model: str
    query: list[Tensor]
    attention: list[Tensor]
    data: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0

    @classmethod
    def empty(cls, info: ModelInfo, config: Any, data: str, run: Mapping[str, Any]) -> Moments:
        """Of nothing yet."""
        shapes = _shapes(info)
        query, attention = ([torch.zeros(shapes[f"{kind}.{i}"]) for i in info.caches] for kind in _KINDS)
        return cls(digest(info, config), query, attention, data, run)

    @property
    def calibration(self) -> CalibrationInfo:
        """What a manifest says of it."""
        return CalibrationInfo(self.data, self.samples, self.tokens)

    def to_bytes(self, info: ModelInfo) -> bytes:
        """The contents of a file."""
        from safetensors.torch import save

        said = {"model": self.model, "data": self.data, "run": self.run, "samples": self.samples, "tokens": self.tokens}
        tensors = {
            f"{kind}.{i}": tensor
            for kind, each in zip(_KINDS, (self.query, self.attention), strict=True)
            for i, tensor in zip(info.caches, each, strict=True)
        }
        return save(tensors, {"format": FORMAT, "version": str(VERSION), "about": json.dumps(said, sort_keys=True)})


def read_moments(path: str | Path, info: ModelInfo, config: Any) -> Moments:
    """Read a file of `vkvx calibrate` for a model. Raises OptionError for one that is damaged or of another model."""
    from safetensors import SafetensorError, safe_open

    path, option = Path(path), keyword("metrics_file")
    if not path.is_file():
        raise OptionError(f"no file at {path}; give {option} what `vkvx calibrate` has written")
    wanted = _shapes(info)
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            if said.get("format") != FORMAT:
                raise OptionError(f"{path} holds no recorded moments; give {option} what `vkvx calibrate` has written")
            if said.get("version") != str(VERSION):
                found = said.get("version")
                raise OptionError(f"{path} is of version {found}, this vkvx reads {VERSION}; calibrate again")
            about = json.loads(said["about"])
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if about["model"] != digest(info, config) or shapes != wanted:
                raise OptionError(f"{path} is of another model: {_difference(shapes, wanted)}; calibrate {info.name}")
            tensors = {name: file.get_tensor(name) for name in wanted}
        moments = Moments(
            about["model"],
            query=[tensors[f"query.{i}"] for i in info.caches],
            attention=[tensors[f"attention.{i}"] for i in info.caches],
            data=str(about["data"]),
            run=dict(about["run"]),
            samples=int(about["samples"]),
            tokens=int(about["tokens"]),
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise OptionError(f"{path} is damaged ({' '.join(str(error).split())}); calibrate again") from error
    for name, tensor in tensors.items():
        least = tensor if name.startswith("attention") else tensor.diagonal(dim1=-2, dim2=-1)
        if tensor.dtype != torch.float32 or not tensor.isfinite().all() or least.min() < 0:
            raise OptionError(f"{path} holds numbers in {name} that are no moments; calibrate again")
    return moments


def read_checked(path: str | Path, info: ModelInfo, config: Any, warn: Callable[[str], object]) -> Moments:
    """As :func:`read_moments`; OptionError also for too few answers, and a line to ``warn`` with for few."""
    moments = read_moments(path, info, config)
    remedy = f"`vkvx calibrate --samples {ENOUGH_SAMPLES}` goes on with them"
    if moments.samples < LEAST_SAMPLES:
        raise OptionError(f"{path} holds {moments.samples} answers, at least {LEAST_SAMPLES} are needed; {remedy}")
    if moments.tokens < 1:
        raise OptionError(f"{path} holds no queries, as all answers end at once; calibrate on other questions")
    if moments.samples < ENOUGH_SAMPLES:
        warn(f"{path} holds {moments.samples} answers, fewer than the {ENOUGH_SAMPLES} that show more: {remedy}")
    return moments


def digest(info: ModelInfo, config: Any) -> str:
    """SHA-256 of what a model's queries have in common with those of another checkpoint of the same form."""
    facts = {
        **{name: getattr(info, name) for name in ("architecture", "query_heads", "hidden_size", "vocab_size")},
        "layers": [asdict(layer) for layer in info.layers],
        "rotary": getattr(config.text_config, "rope_parameters", None),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _shapes(info: ModelInfo) -> dict[str, tuple[int, ...]]:
    layers = {i: info.layers[i] for i in info.caches}
    query = {f"query.{i}": (layer.kv_heads, layer.head_dim, layer.head_dim) for i, layer in layers.items()}
    return {**query, **{f"attention.{i}": (info.query_heads,) for i in layers}}


def _difference(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    if len(found) != len(wanted):
        return f"it has {len(found) // len(_KINDS)} layers, the model {len(wanted) // len(_KINDS)}"
    for name, shape in wanted.items():
        if found.get(name) != shape:
            return f"its {name} is {list(found.get(name, ()))}, the model's {list(shape)}"
    return "its configuration differs"


# Recording


def unrotated(query: Tensor, turns: Tensor, rotary_dim: int = 0, rotary_interleaved: bool = False) -> Tensor:
    """Queries FP32 [..., S, D] as they are at position 0, from those at the positions of ``turns`` [S, 2, D].

    A factor of the rotary embedding stays in, squared: a metric is scaled anyway. ``rotary_dim`` and
    ``rotary_interleaved`` are as in :func:`vkvx.plugins.rotary.rotary_pairs`.
    """
    partner, sign = (
        torch.from_numpy(x).to(query.device) for x in rotary_pairs(query.shape[-1], rotary_dim, rotary_interleaved)
    )
    cosine, sine = turns.unbind(-2)
    return query * cosine - query.index_select(-1, partner) * (sine * sign)


def picture_shares(
    query: Tensor, keys: Tensor, visual: Tensor, scale: float, softcap: float = 0.0, window: int = 0
) -> Tensor:
    """How much the pictures get of each query's attention: the sum of squares of their tokens' shares, FP32 [Hq, S].

    ``query`` FP32 [Hq, S, D] are those of the last S tokens whose ``keys`` [Hkv, n, D] are given, ``visual`` BOOL [n]
    tells which of all are pictures'. ``softcap`` and ``window`` are as in LayerInfo.
    """
    grouped = query.unflatten(0, (keys.shape[0], -1))
    scores = (grouped @ keys.float().unsqueeze(1).transpose(-1, -2)).flatten(0, 1) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    own, count = query.shape[-2], keys.shape[-2]
    behind = torch.arange(count - own, count, device=query.device)[:, None] - torch.arange(count, device=query.device)
    hidden = (behind < 0) | (behind >= (window or count))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)[..., visual].square().sum(-1)


def second_moments(query: Tensor, kv_heads: int) -> Tensor:
    """Sum of q q^T over the queries of each KV head: ``query`` FP32 [Hq, S, D] to [Hkv, D, D]."""
    rows = query.unflatten(0, (kv_heads, -1)).flatten(1, 2)
    return rows.transpose(-1, -2) @ rows


def mixed(prior: Tensor, recorded: Tensor, share: float) -> Tensor:
    """``share`` of the prior and the rest of what was recorded, both [..., D, D] scaled to one trace; FP32.

    Where nothing was recorded the prior stays alone.
    """
    sizes = [_trace(x) for x in (prior, recorded)]
    scaled = [x.float() / torch.where(size > 0, size, 1.0) for x, size in zip((prior, recorded), sizes, strict=True)]
    return torch.where(sizes[1] > 0, share * scaled[0] + (1 - share) * scaled[1], scaled[0])


def _trace(x: Tensor) -> Tensor:
    return x.float().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def prior_share(samples: int, strength: float) -> float:
    """The weights' part of a metric from so many answers."""
    return strength / (strength + samples)


def head_weights(attention: Tensor, share: float, kv_heads: int) -> Tensor:
    """What the query heads of a KV head count, [Hq] with a mean of 1 in each KV head; alike where nothing is known."""
    groups = attention.unflatten(0, (kv_heads, -1))
    mean = groups.mean(1, keepdim=True)
    even = torch.ones_like(groups)
    return torch.where(mean > 0, share * even + (1 - share) * groups / torch.where(mean > 0, mean, 1.0), even).flatten()
