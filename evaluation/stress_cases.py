"""The cases of the stress set: from a ``StressSetting`` to a ``StressOutcome``. Docstrings justify the limits.

Inputs are drawn on the CPU from a seed of the case, so they are the same for all methods and devices. Unless a case
says otherwise, tensors are FP32, so what is measured is quantisation and not the rounding of the model's type, and
scores have a standard deviation of 1.5 nats: neither flat nor peaked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vkvx.evaluation.stress import GROUP_SIZE, Case, Sequences, StressOutcome, StressSetting, exact

SHARPNESS = 1.5
"""Standard deviation of scores, in nats."""


@dataclass(frozen=True)
class Needles:
    """A picture with needles: ``key``, ``value`` [n, D], and ``query`` [q, D] of the tokens at ``positions``.

    ``codes`` [256, D] are what values may be, ``right`` [q] which of them each query wants.
    """

    key: Tensor
    value: Tensor
    query: Tensor
    positions: list[int]
    codes: Tensor
    right: Tensor

    def found(self, output: Tensor) -> Tensor:
        """Which outputs [q, D] are nearest to the right code: BOOL [q]."""
        return (output @ self.codes.T).argmax(-1) == self.right


def needles(random: torch.Generator, tokens: int, channels: int = 64) -> Needles:
    """The tensors of :func:`needle`."""
    key = torch.randn(tokens, channels, generator=random)
    codes = _codes(random, 256, channels)
    choice = torch.randint(len(codes), (tokens,), generator=random)
    group = tokens // 2 // GROUP_SIZE * GROUP_SIZE
    # Each place is where the first of four needles lies; the others follow, or precede at the end of a group.
    after = (0, tokens // 3, group, group + 200, 3 * tokens // 4, tokens - GROUP_SIZE)
    positions = [p + i for p in after for i in range(4)] + [p - i for p in (group - 1, tokens - 1) for i in range(4)]
    margins = torch.tensor([0.0, 3.0, 10.0, 30.0]).repeat(len(positions) // 4)
    # Orthogonal queries, so that no needle is in the way of another.
    query = SHARPNESS * math.sqrt(channels) * torch.linalg.qr(torch.randn(channels, channels, generator=random)).Q
    query = query[: len(positions)]
    _place(key, query, positions, math.log(tokens) + SHARPNESS**2 / 2 + margins, channels**-0.5)
    return Needles(key, codes[choice], query, positions, codes, choice[positions])


def outlier_channels(setting: StressSetting) -> StressOutcome:
    """A few channels of the keys have 10 to 50 times the spread of the others, and means of 5 to 10 times that.

    A picture shows 32 objects, 32 tokens each; a query asks for one and the answer is its code. Objects come in pairs
    that differ in the 8 outlying channels of 64 alone, which carry half of the scores. The query is scaled inversely to
    the channels, so exact attention is what it would be without outliers, and gives every answer. Levels are per
    channel, so outliers should cost nothing. Figure: error of the outputs divided by what it is without outliers.
    Limit: 1.25, and all answers right. In mathematics the first is 1; rounding an offset of 13 spreads to FP16 adds an
    RMS error of at most 0.004 spreads to one of at least 0.006 at 8 bits, and of more at fewer.
    """
    random = _generator(1)
    heads, channels, objects, outliers = setting.sizes.heads, 64, 32, 8
    centre = torch.randn(heads, objects // 2, channels, generator=random)
    twin = torch.cat([-centre[..., :outliers], centre[..., outliers:]], -1)
    centre = torch.cat([centre, twin], 1)
    noise = torch.randn(heads, objects, GROUP_SIZE * 4 // objects, channels, generator=random)
    key = ((centre[:, :, None] + noise) / math.sqrt(2)).flatten(1, 2)
    codes = _codes(random, heads, objects, channels)
    value = codes.repeat_interleave(noise.shape[2], dim=1)
    order = torch.randperm(key.shape[1], generator=random)
    spread, mean = torch.ones(channels), torch.zeros(channels)
    spread[:outliers] = torch.logspace(1, math.log10(50), outliers)
    mean[:outliers] = spread[:outliers] * (5 + 5 * torch.rand(outliers, generator=random)) * _signs(random, outliers)
    weight = torch.full((channels,), math.sqrt(channels / 2 / (channels - outliers)))
    weight[:outliers] = math.sqrt(channels / 2 / outliers)
    query = (SHARPNESS * centre * weight).flatten(0, 1)[None]
    errors = []
    for factor, shift in ((torch.ones(channels), torch.zeros(channels)), (spread, mean)):
        k, v, q = (key * factor + shift)[None, :, order], value[None, :, order], query / factor
        sequences = Sequences(setting, heads, channels, key.shape[1])
        sequences.picture(k, v)
        # The step's own token lies at the mean as well, so the mean shifts all scores alike and changes nothing.
        answer = sequences.ask(q, own_key=shift).cpu()
        errors.append(float((answer - exact(q, k, v, own_key=shift)).square().mean().sqrt()))
        right = (answer[0].unflatten(0, (heads, objects)) @ codes.transpose(-1, -2)).argmax(-1) == torch.arange(objects)
    figure = errors[1] / errors[0]
    return _outcome(sequences, figure, figure <= 1.25 and bool(right.all()))


def needle(setting: StressSetting) -> StressOutcome:
    """One token among 10,000 is the one that a query wants, at eight places and by four margins.

    The needle's score is so far above the others that exact attention gives it half of the weight, or 3, 10 or 30 nats
    more. Its value is one of 256 codes, as are those of all others; the answer is the code nearest to the output.
    Figure: share of right answers. Limit: all, because exact attention finds all. A method whose errors grow with the
    spread of a channel lifts some of the 10,000 above the needle, or levels the needle down to them.
    """
    drawn = needles(_generator(2), setting.sizes.needle_tokens)
    sequences = Sequences(setting, 1, drawn.key.shape[-1], len(drawn.key))
    sequences.picture(drawn.key[None, None], drawn.value[None, None])
    found = drawn.found(sequences.ask(drawn.query[None]).cpu()[0])
    return _outcome(sequences, float(found.float().mean()), bool(found.all()))


def flat_attention(setting: StressSetting) -> StressOutcome:
    """A query with no preference: the answer is the mean of all values, whose distribution is skewed.

    2,000 tokens, so the last group is padded, and padding must not count. Figure: error of the mean in standard
    deviations of the channel, root of the mean square over channels. Limit: 1 / sqrt(tokens). That is what would be
    left of independent rounding errors without bias and as large as the spread itself, so it allows any number of bits
    and only a bias exceeds it.
    """
    random = _generator(3)
    heads, channels, tokens = setting.sizes.heads, 64, 2_000
    key = torch.randn(1, heads, tokens, channels, generator=random)
    value = 1 - torch.rand(1, heads, tokens, channels, generator=random).clamp(min=1e-6).log()
    query = 1e-3 * torch.randn(1, heads, channels, generator=random)
    sequences = Sequences(setting, heads, channels, tokens)
    sequences.picture(key, value)
    error = sequences.ask(query).cpu() - exact(query, key, value)
    figure = float((error / value[0].std(1)).square().mean().sqrt())
    return _outcome(sequences, figure, figure <= tokens**-0.5)


def tiny_variance(setting: StressSetting) -> StressOutcome:
    """Channels that are constant, or vary by up to 3 units in the last place of FP16 around a mean up to 30,000.

    All numbers are FP16 ones. Figure: largest error of the output, in units in the last place of FP16 at the channel's
    mean, constant channels included. Limit: 4. An output is a mean of decoded values; these should lie in the range of
    the data, 3 units, but for the rounding of levels to FP16, half a unit at each end, and exact attention lies in that
    range too. A method that does not work on differences from the mean leaves it at once.
    """
    random = _generator(4)
    tokens = 2 * GROUP_SIZE
    constant = torch.tensor([0.0, 1.0, -7.0, 60000.0, 2.0**-10, 2.0**-24, -0.25, 2048.0])
    mean = torch.tensor([1.0, -1.0, 100.0, -100.0, 1000.0, -1000.0, 30000.0, -30000.0]).repeat(3)
    unit = 2.0 ** (mean.abs().log2().floor() - 10)
    varying = mean + unit * torch.randint(4, (tokens, len(mean)), generator=random)
    data = torch.cat([constant.expand(tokens, -1), varying], 1)[None, None]
    units = torch.cat([2.0 ** (constant.abs().clamp(min=2.0**-14).log2().floor() - 10), unit])
    query = torch.randn(1, 16, data.shape[-1], generator=random)
    # Scores of the picture above 0, which is that of the step's own token.
    query = query * (query @ data[0, 0].mean(0)).sign()[..., None]
    sequences = Sequences(setting, 1, data.shape[-1], tokens)
    sequences.picture(data, data)
    figure = float(((sequences.ask(query).cpu() - exact(query, data, data)).abs() / units).max())
    return _outcome(sequences, figure, figure <= 4)


def long_text(setting: StressSetting) -> StressOutcome:
    """4,096 text tokens after a picture of 1,152: the share of attention that the picture gets must be kept.

    In one channel visual values are 1 and text values 0, so the output there is the share; exact ones are near 0.1, 0.5
    and 0.9. Quantised scores vary less or more than exact ones, which makes the picture lose or gain weight as a whole.
    Figure: largest difference of the share, over 48 queries. Limit: 0.05: the output moves by that part of the distance
    between what the picture says and what the text says, so more than a twentieth of one is not replaced by the other.
    """
    random = _generator(5)
    channels, visual, text = 64, 1_152, setting.sizes.text_tokens
    keys = [torch.randn(1, 1, n, channels, generator=random) for n in (visual, text)]
    values = [torch.randn(1, 1, n, channels, generator=random) for n in (visual, text)]
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        key[..., 0], value[..., 0] = i, 1 - i
    query = SHARPNESS * torch.randn(1, 48, channels, generator=random)
    share = torch.tensor([0.1, 0.5, 0.9]).repeat(16)
    query[..., 0] = (math.log(visual / text) - (share / (1 - share)).log()) * math.sqrt(channels)
    sequences = Sequences(setting, 1, channels, visual, text)
    sequences.picture(keys[0], values[0])
    sequences.text(keys[1], values[1])
    wanted = exact(query, torch.cat(keys, 2), torch.cat(values, 2))[..., 0]
    figure = float((sequences.ask(query).cpu()[..., 0] - wanted).abs().max())
    return _outcome(sequences, figure, figure <= 0.05)


def several_pictures(setting: StressSetting) -> StressOutcome:
    """Four pictures whose keys differ in scale by 30 and 900 times, with needles in each.

    The keys of each picture vary in 32 channels of their own, around means of 30 times their spread, and hardly in the
    others. Each has 8 needles, 10 nats above half of the exact weight. Figure: share of the needles found. Limit:
    all, as in ``needle``; and the words and parameters of each picture are, bit for bit, those that it gets alone in a
    cache: pictures share no levels.
    """
    random = _generator(6)
    scales, block, tokens, needles = (1 / 30, 1.0, 30.0, 1.0), 32, 2 * GROUP_SIZE, 8
    channels, heads = block * len(scales), setting.sizes.heads
    mean = 30 * torch.tensor(scales).repeat_interleave(block) * _signs(random, channels)
    codes = _codes(random, 256, channels)
    choice = torch.randint(len(codes), (len(scales), heads, tokens), generator=random)
    positions = [i * tokens // needles + 9 * i for i in range(needles)]
    pictures, queries = [], []
    for i, scale in enumerate(scales):
        own = slice(i * block, (i + 1) * block)
        noise = torch.randn(heads, tokens, channels, generator=random)
        query = torch.zeros(heads, needles, channels)
        # Half of the scale goes to the scores: 32 of 128 channels vary.
        query[..., own] = 2 * SHARPNESS * torch.randn(heads, needles, block, generator=random)
        gap = torch.full((needles,), math.log(tokens * len(scales)) + SHARPNESS**2 / 2 + 10)
        for h in range(heads):
            _place(noise[h, :, own], query[h, :, own], positions, gap, channels**-0.5)
        small = torch.full((channels,), 1 / 3000)
        small[own] = 1
        pictures.append((noise * small * scale + mean)[None])
        queries.append(query / scale)
    sequences = Sequences(setting, heads, channels, tokens * len(scales))
    apart = True
    for i, key in enumerate(pictures):
        value = codes[choice[i]][None]
        sequences.picture(key, value)
        alone = Sequences(setting, heads, channels, tokens)
        alone.picture(key, value)
        apart &= _same_pictures(sequences, i, alone, 0, len(scales))
    answer = sequences.ask(torch.stack(queries, 1).flatten(0, 2)[None])[0].cpu()
    right = choice[:, :, positions].transpose(0, 1).flatten()
    figure = float(((answer @ codes.T).argmax(-1) == right).float().mean())
    return _outcome(sequences, figure, figure == 1 and apart)


def same_picture_twice(setting: StressSetting) -> StressOutcome:
    """A picture that comes twice gets the same words and levels, bit for bit, and half of the attention each time.

    The values of the copies differ in two constant channels, (1, 0) and (0, 1), so the outputs there are their shares.
    Figure: largest distance of that share from a half. Limit: tokens times 2^-23, the rounding of an FP32 sum of
    so many weights: equal codes have equal scores, at any number of bits.
    """
    random = _generator(7)
    channels, tokens = 64, 3 * GROUP_SIZE
    key = torch.randn(1, 1, tokens, channels, generator=random)
    value = torch.randn(1, 1, tokens, channels, generator=random)
    query = SHARPNESS * torch.randn(1, 32, channels, generator=random)
    sequences = Sequences(setting, 1, channels, 2 * tokens)
    for copy in (0, 1):
        value[..., copy], value[..., 1 - copy] = 1, 0
        sequences.picture(key, value)
    shares = sequences.ask(query).cpu()[..., :2]
    figure = float((shares[..., 0] / shares.sum(-1) - 0.5).abs().max())
    # The levels of the two marked channels differ, and are checked by their effect.
    same = _same_pictures(sequences, 0, sequences, 1, 2, channels=slice(2, None))
    return _outcome(sequences, figure, figure <= 2 * tokens * 2.0**-23 and same)


def long_answer(setting: StressSetting) -> StressOutcome:
    """4,096 decode steps after a picture: the cache of the picture does not drift, and no step is forgotten.

    A query that only looks at the picture gets the same output before and after; one that only looks at the answer gets
    the mean value of all steps; visual words and parameters stay, bit for bit. Figure: the larger of the two
    differences, relative to the root of the mean square of values. Limit: tokens times 2^-23, the rounding of FP32
    sums; it says nothing of bits, since stored tokens are not quantised again.
    """
    random = _generator(8)
    channels, visual, steps = 32, GROUP_SIZE, setting.sizes.steps
    key, value = (torch.randn(1, 1, visual + steps, channels, generator=random) for _ in range(2))
    # The first channel tells the picture from the answer, by 50 nats at the queries below.
    key[:, :, :visual, 0], key[:, :, visual:, 0] = 5, -5
    query = torch.randn(1, 16, channels, generator=random)
    query[..., 0] = 10 * math.sqrt(channels)
    query[:, 8:] = 0
    query[:, 8:, 0] = -10 * math.sqrt(channels)
    sequences = Sequences(setting, 1, channels, visual, steps)
    sequences.picture(key[:, :, :visual], value[:, :, :visual])
    before, cache = sequences.ask(query[:, :8]), {name: x.clone() for name, x in sequences.caches.items()}
    key, value = key[:, :, visual:].to(setting.device), value[:, :, visual:].to(setting.device)
    step_query = query[:, :1, None].to(setting.device)
    for i in range(steps):
        sequences.step(step_query, key[:, :, i : i + 1], value[:, :, i : i + 1])
    after = sequences.ask(query)
    drift = float((after[:, :8] - before).abs().max())
    forgotten = float((after[:, 8:] - value.mean(2)).abs().max())
    same = all(torch.equal(_bits(sequences.caches[n]), _bits(cache[n])) for n in cache if n.startswith("visual"))
    figure = max(drift, forgotten)
    return _outcome(sequences, figure, same and figure <= (visual + steps) * 2.0**-23)


def extreme_values(setting: StressSetting) -> StressOutcome:
    """Pictures with the largest FP16 numbers, infinities, NaN and denormals, in FP16, beside a plain one.

    One batch, one kind a row. Every output must be finite: of all rows in decode steps, and in the calls that bring the
    pictures of those rows whose input is finite. There attention is exact, and exact attention over NaN is NaN.
    The plain row gets the words and parameters, bit for bit, that it gets alone. Figure: share of numbers in the
    outputs of decode steps that are not finite. Limit: 0.
    """
    random = _generator(9)
    channels, tokens, rows = 64, GROUP_SIZE, 6
    key, value = (torch.randn(rows, 1, tokens, channels, generator=random) for _ in range(2))
    for x in (key, value):
        x[1] = 65504.0 * x[1].sign()
        spots = torch.rand(2, 1, tokens, channels, generator=random) < 0.02
        x[2] = torch.where(spots[0], torch.inf * x[2].sign(), x[2])
        x[3] = torch.where(spots[1], torch.nan, x[3])
        x[4] *= 2.0**-20
        x[5] = 65504.0
    query = torch.randn(rows, 32, channels, generator=random)
    sequences = Sequences(setting, 1, channels, tokens, rows=rows, dtype=torch.float16)
    sequences.picture(key, value)
    sequences.finite[2:4] = True  # their own call is exact attention over infinities and NaN
    figure = 1 - float(sequences.ask(query).isfinite().float().mean())
    alone = Sequences(setting, 1, channels, tokens, dtype=torch.float16)
    alone.picture(key[:1], value[:1])
    return _outcome(sequences, figure, figure == 0 and _same_pictures(sequences, 0, alone, 0, 1))


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        outlier_channels,
        needle,
        flat_attention,
        tiny_variance,
        long_text,
        several_pictures,
        same_picture_twice,
        long_answer,
        extreme_values,
    )
}
"""All cases by name."""


def _outcome(sequences: Sequences, figure: float, passed: bool) -> StressOutcome:
    """An outcome that fails as well if any output was NaN or infinite."""
    return StressOutcome(figure, passed and math.isfinite(figure) and bool(sequences.finite.all()))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _signs(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(2, shape, generator=random).float() * 2 - 1


def _codes(random: torch.Generator, *shape: int) -> Tensor:
    """Code words of -1 and 1: nearly orthogonal, and of one length."""
    return _signs(random, *shape)


def _place(key: Tensor, query: Tensor, positions: list[int], gap: Tensor, scale: float) -> None:
    """Add to key [n, D] at each position what lifts its score by ``gap`` for its query [positions, D], in place."""
    lift = gap[:, None] / scale * query / query.square().sum(-1, keepdim=True)
    key[positions] += lift


def _bits(x: Tensor) -> Tensor:
    """Integers of the same bits, so that NaN equals NaN and 0 differs from -0."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def _same_pictures(
    a: Sequences, picture_a: int, b: Sequences, picture_b: int, room: int, channels: slice = slice(None)
) -> bool:
    """Whether two pictures of one length have equal words and, in these channels, equal parameters, bit for bit.

    Compared is row 0; each cache has room for so many pictures of that length.
    """
    for name in ("visual_key", "visual_key_params", "visual_value", "visual_value_params"):
        x, y = _bits(a.caches[name][0]), _bits(b.caches[name][0])
        size = x.shape[1] // room
        x = x[:, picture_a * size : (picture_a + 1) * size]
        y = y[:, picture_b * size : (picture_b + 1) * size]
        if name.endswith("params"):
            x, y = x[..., channels], y[..., channels]
        if not torch.equal(x, y):
            return False
    return True
