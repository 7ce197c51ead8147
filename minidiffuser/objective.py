"""The training objective: one independent clock per modality, one loss per part.

    l = sum over parts of  E  w(t) || target - net(x_t, y_s, t, s) ||^2 / dim,
        t, s drawn independently,   x_t = alpha(t) x_0 + sigma(t) eps

which with the target eps and w = 1 is the UniDiffuser loss (arXiv:2303.06555, eq. 5 and alg. 1).

**Predictions and weights.**  eps, x_0 and v errors differ only by a factor, so any network output
can be trained under any weighting.  As a weight on the x_0 error, with SNR = alpha^2 / sigma^2:

    eps loss: SNR     v loss: SNR + 1     x0 loss: 1
    min-SNR-g: min(SNR, g)                clipped v: min(SNR + 1, g)

The weights of eps and min-SNR vanish where noise is all there is, which is where a conditional
sampler decides what to draw; those of eps and v grow without bound where there is almost none.
Clipped v does neither.  (Min-SNR: Hang et al., arXiv:2303.09556, eq. 6; x_0 outputs under the v
loss with large patches: Li & He, arXiv:2511.13720.)

**Which timesteps.**  The paper draws (t, s) from the whole square.  Conditional sampling only ever
visits an edge of it (the given modality at 0, or the ignored one at T), so a fraction of each batch
may be put there: that is the ``TimestepMix``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import Part
from .errors import choose
from .schedule import NoiseSchedule, T

WEIGHTINGS = ("eps", "v", "x0", "min-snr", "clipped-v")


@dataclass(frozen=True)
class TimestepMix:
    """Where in the timestep square samples are put; the four shares are relative.

    Args:
        square: every clock uniform on {1, ..., T} on its own (the paper's objective).
        given: one modality noisy, the others clean at 0.
        ignored: one modality noisy, the others pure noise at T.
        diagonal: one timestep for all.
        noise_bias: b, where the last three draw t = T u^(1/b) with u uniform: 1 is uniform, and
            above it more is learned where little of the data is left, which is where conditional
            samples are decided.
        favour: the modality that ``given`` and ``ignored`` pick, as shares in the order of clocks;
            empty for equal shares.
    """

    square: float = 1.0
    given: float = 0.0
    ignored: float = 0.0
    diagonal: float = 0.0
    noise_bias: float = 1.0
    favour: tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "favour", tuple(self.favour))
        shares = self.shares
        if not 0 < self.noise_bias < math.inf:
            raise ValueError(f"noise_bias must be above 0 and finite, got {self.noise_bias}")
        for name, values in (("timestep shares", shares), ("favour", self.favour or (1.0,))):
            if not (all(v >= 0 for v in values) and 0 < sum(values) < math.inf):  # NaN is refused
                raise ValueError(f"{name} must be finite, at least 0 and not all 0, got {values}")

    @property
    def shares(self) -> list[float]:
        return [self.square, self.given, self.ignored, self.diagonal]

    def draw(self, batch: int, clocks: tuple[str, ...], generator: torch.Generator) -> Tensor:
        """Timesteps (batch, number of clocks), float32 whole numbers in [0, T]."""
        n = len(clocks)
        if self.favour and len(self.favour) != n:
            raise ValueError(f"favour={self.favour} must have one share for each of {clocks}")
        shares, favour = torch.tensor(self.shares).float(), torch.tensor(self.favour or (1,) * n)
        kind = torch.multinomial(shares, batch, True, generator=generator)[:, None]  # (B, 1)
        chosen = torch.multinomial(favour.float(), batch, True, generator=generator)[:, None]
        other = torch.arange(n) != chosen                                      # (B, n)
        u = 1 - torch.rand(batch, n, generator=generator)                      # in (0, 1]
        u = torch.where(kind == 0, u, u ** (1 / self.noise_bias))
        t = torch.ceil(T * u)                                                  # 1, ..., T
        t = torch.where((kind == 1) & other, 0, t)
        t = torch.where((kind == 2) & other, T, t)
        t = torch.where(kind == 3, t[:, :1], t)
        return t


@dataclass
class Loss:
    """What one batch cost. ``total`` is a scalar to call ``backward`` on.

    ``per_part``: part name -> (B,) weighted mean squared error, 0 where the part was given clean.
    ``t``: clock -> (B,) the timesteps drawn.
    """

    total: Tensor
    per_part: dict[str, Tensor]
    t: dict[str, Tensor]


def snr_weight(weighting: str, schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """The weight on the x_0 error at ``t`` (B,): see the table at the head of this file."""
    snr = schedule.snr(t.clamp(min=1))  # SNR is infinite at 0, where nothing is left to predict
    if weighting == "eps":
        return snr
    if weighting == "v":
        return snr + 1
    if weighting == "x0":
        return torch.ones_like(snr)
    if weighting == "min-snr":
        return snr.clamp(max=gamma)
    if weighting == "clipped-v":
        return (snr + 1).clamp(max=gamma)
    raise ValueError(f"unknown weighting {weighting!r}: choose one of {WEIGHTINGS}")


def error_weight(
    prediction: str, weighting: str, schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0
) -> Tensor:
    """The weight (B,) on the squared error of the network's own output.

    The x_0 error is (sigma / alpha) times the eps error and sigma times the v error.
    """
    weight = snr_weight(weighting, schedule, t, gamma)
    if prediction == weighting:
        return torch.ones_like(weight)
    per_x0 = {"x0": 1.0, "eps": 1 / schedule.snr(t.clamp(min=1)),
              "v": schedule.sigma(t.clamp(min=1)) ** 2}
    return weight * choose("prediction", prediction, per_x0)


def joint_loss(
    net: nn.Module,
    schedule: NoiseSchedule,
    x0: Mapping[str, Tensor],
    *,
    parts: tuple[Part, ...],
    clocks: tuple[str, ...],
    generator: torch.Generator,
    prediction: str = "eps",
    weighting: str = "eps",
    gamma: float = 5.0,
    mix: TimestepMix = TimestepMix(),
    part_weights: Mapping[str, float] | None = None,
    data_type: Tensor | None = None,
) -> Loss:
    """Noise a batch, each modality to its own timestep, and measure what the network predicts.

    Args:
        net: called as ``net(x, t, data_type)``; it may be wrapped (DDP, FSDP, compiled), which is
            why ``parts`` and ``clocks`` are passed beside it.
        x0: part name -> clean data (B, *shape).
        generator: on the CPU; draws timesteps and noise, so that a run repeats on any device.
        prediction: what the network's output is; weighting: see the head of this file.
        part_weights: part name -> factor of its loss, 1 by default.

    Raises:
        ValueError: unknown prediction or weighting, or data that does not fit the network.
    """
    names = [p.name for p in parts]
    factors = dict.fromkeys(names, 1.0) | dict(part_weights or {})
    if missing := set(names) - set(x0):
        raise ValueError(f"x0 must hold the parts {names}, {sorted(missing)} missing")
    if len(factors) > len(names):
        raise ValueError(f"part_weights must name parts among {names}, got {list(part_weights)}")
    first = x0[parts[0].name]
    drawn = mix.draw(len(first), clocks, generator).to(first.device)           # (B, clocks)
    t = {clock: drawn[:, i] for i, clock in enumerate(clocks)}
    noise = {p.name: _noise(x0[p.name], generator) for p in parts}
    x = {p.name: schedule.perturb(x0[p.name], t[p.clock], noise[p.name]) for p in parts}
    out = net(x, t, data_type)

    per_part = {}
    for p in parts:
        known = {"eps": noise[p.name], "x0": x0[p.name]}
        target = known.get(prediction)
        if target is None:
            target = schedule.convert(noise[p.name], "eps", prediction, x[p.name], t[p.clock])
        error = (out[p.name].float() - target).square().flatten(1).mean(1)     # (B,)
        weight = error_weight(prediction, weighting, schedule, t[p.clock], gamma)
        per_part[p.name] = weight * error * (t[p.clock] > 0)
    total = sum(factors[name] * loss.mean() for name, loss in per_part.items())
    return Loss(total, {k: v.detach() for k, v in per_part.items()}, t)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, I) of a tensor's shape, drawn on the CPU."""
    return torch.randn(like.shape, generator=generator).to(like.device)
