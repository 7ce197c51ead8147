"""Solvers: from noise to data (and back) in a number of steps.

A solver knows neither networks nor tasks.  It is given ``predict(x, t) -> eps``, a state ``x`` at
``times[0]`` and a falling list of ``times``.  It is a generator, which yields ``(t, x)`` after
each step, so that a caller may draw, stop or count as it likes.  ``last(...)`` runs one to its end.

    DDIM          x_s = alpha_s x0_hat + sqrt(sigma_s^2 - eta^2 v) eps_hat + eta sqrt(v) z
                  v   = (sigma_s^2 / sigma_t^2) (1 - alpha_t^2 / alpha_s^2)       posterior variance
    DPM-Solver++  x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) D,   h = lambda_s - lambda_t

with ``x0_hat = (x_t - sigma_t eps_hat) / alpha_t`` and D a blend of such data predictions.

Sources: DDPM (Ho et al., arXiv:2006.11239, eq. 7), DDIM (Song et al., arXiv:2010.02502, eq. 12
and 16), DPM-Solver++ (Lu et al., arXiv:2211.01095, algorithms 1 and 2), and the orders of the
"fast" plan: DPM-Solver (Lu et al., arXiv:2206.00927, sec. 3.4).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .schedule import NoiseSchedule, T

Predictor = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> eps; t is a 0-dimensional tensor
States = Iterator[tuple[float, Tensor]]

SPACINGS = ("time", "logsnr")


def time_grid(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "time",
    start: float = T,
    end: float = 0.0,
) -> list[float]:
    """``steps + 1`` falling timesteps from ``start`` to ``end``.

    Args:
        spacing: ``"time"`` is even in t; ``"logsnr"`` is even in lambda, where an end of 0
            (infinite log-SNR) is reached by one last step from t = 1.

    Raises:
        ValueError: fewer than one step, an unknown spacing, times outside ``[0, T]``, or
            ``"logsnr"`` from ``start <= 1`` to 0.
    """
    if steps < 1:
        raise ValueError(f"a solver needs at least 1 step, got steps={steps}")
    if not 0 <= end < start <= T:
        raise ValueError(f"times must satisfy 0 <= end < start <= {T}, got start={start} and "
                         f"end={end}")
    if spacing == "time" or (spacing == "logsnr" and steps == 1):
        return torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()
    if spacing != "logsnr":
        raise ValueError(f"unknown spacing {spacing!r}: choose one of {SPACINGS}")
    if end == 0 and start <= 1:
        raise ValueError(f"spacing 'logsnr' reaches t = 0 from t = 1, so it must start above 1, "
                         f"got start={start}")
    inner, tail = (steps, []) if end > 0 else (steps - 1, [0.0])
    ends = schedule.lambda_(torch.tensor([start, end or 1.0], dtype=torch.float64))
    lambdas = torch.linspace(ends[0], ends[1], inner + 1, dtype=torch.float64)
    times = schedule.inverse_lambda(lambdas).tolist()
    return [float(start), *times[1:-1], float(end or 1.0), *tail]


def last(states: States) -> Tensor:
    """Run a solver to its end and return the final state."""
    kept = deque(states, maxlen=1)
    if not kept:
        raise ValueError("the solver was given fewer than two times, so it took no step")
    return kept[0][1]


class _Node:
    """One point in time: its coefficients, in the state's precision."""

    def __init__(self, schedule: NoiseSchedule, t: float, like: Tensor):
        wide = torch.tensor(t, dtype=torch.float64)
        as_state = {"device": like.device, "dtype": like.dtype}
        self.t = torch.tensor(t, **as_state)
        self.alpha = schedule.alpha(wide).to(**as_state)
        self.sigma = schedule.sigma(wide).to(**as_state)
        self.lam = schedule.lambda_(wide).to(device=like.device)  # float64: differences matter

    def data(self, predict: Predictor, x: Tensor) -> Tensor:
        """The data prediction x0_hat at this time."""
        return (x - self.sigma * predict(x, self.t)) / self.alpha


# ---- DDIM and ancestral DDPM -------------------------------------------------------------------


def ddim(
    predict: Predictor,
    x: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[float],
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> States:
    """DDIM: deterministic with ``eta = 0``, ancestral sampling with ``eta = 1``.

    Run with rising times it inverts itself: see :func:`ddim_invert`.

    Args:
        predict: the noise predictor; x: state (B, ...) at ``times[0]``.
        eta: how much of the posterior's variance is drawn anew at each step, in [0, 1].
        generator: source of that noise.

    Raises:
        ValueError: eta outside [0, 1], or above 0 with rising times.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if eta > 0 and any(t <= s for t, s in pairwise(times)):
        raise ValueError(f"noise can be drawn anew only with falling times, got {list(times)}")
    for t, s in pairwise(times):
        now, then = _Node(schedule, t, x), _Node(schedule, s, x)
        eps = predict(x, now.t)
        x0 = (x - now.sigma * eps) / now.alpha
        if eta == 0:
            x = then.alpha * x0 + then.sigma * eps
        else:
            kept = (now.alpha / then.alpha) ** 2
            variance = eta**2 * (then.sigma / now.sigma) ** 2 * (1 - kept)
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=_home(generator, x))
            direction = (then.sigma**2 - variance).clamp(min=0).sqrt()
            x = then.alpha * x0 + direction * eps + variance.sqrt() * z.to(x.device)
        yield s, x


def ddpm(
    predict: Predictor,
    x: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[float],
    generator: torch.Generator | None = None,
) -> States:
    """Ancestral sampling: each step draws from the posterior q(x_s | x_t, x0_hat).

    With one step per integer time it is DDPM with the smaller of its two variances; with fewer
    steps the same posterior jumps further.
    """
    return ddim(predict, x, schedule, times, eta=1.0, generator=generator)


def ddim_invert(
    predict: Predictor,
    x: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[float],
) -> States:
    """From data to the noise that :func:`ddim` would have turned into it: the ODE run upwards.

    Args:
        x: data (B, ...); times: falling, as for sampling.  At t = 0 the noise in x is not defined,
            so data is taken to be the state at the last time above 0.
    """
    rising = [t for t in reversed(times) if t > 0]
    return ddim(predict, x, schedule, rising)


# ---- DPM-Solver++ ------------------------------------------------------------------------------


def dpm_multistep(
    predict: Predictor,
    x: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[float],
    order: int = 2,
) -> States:
    """DPM-Solver++ that reuses the previous prediction ("2M"): one call per step.

    Order 1 equals DDIM.  The first step, and a last step to t = 0, are of order 1.
    """
    if order not in (1, 2):
        raise ValueError(f"the multistep solver has orders 1 and 2, got order={order}")
    before, d_before = None, None
    for t, s in pairwise(times):
        now, then = _Node(schedule, t, x), _Node(schedule, s, x)
        d = d_now = now.data(predict, x)
        if order == 2 and before is not None and s > 0:
            ratio = (now.lam - before.lam) / (then.lam - now.lam)
            d = d_now + (0.5 / ratio).to(x.dtype) * (d_now - d_before)
        x = _exponential_step(x, now, then, d)
        before, d_before = now, d_now
        yield s, x


def dpm_singlestep(
    predict: Predictor,
    x: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[float],
    order: int = 3,
) -> States:
    """DPM-Solver++ in single steps of order up to 3, the plan UniDiffuser samples with.

    A step of order k spans k intervals of the grid and calls the network at each of their starts,
    so the number of calls is ``len(times) - 1`` whatever the order.  Yields after each whole step.

    Raises:
        ValueError: an order other than 1 to 3, or times that end at 0, where lambda is infinite and
            no order above 1 exists (the official sampler ends at t = 1).
    """
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver++ has orders 1 to 3, got order={order}")
    if len(times) > 1 and times[-1] <= 0:
        raise ValueError(f"the singlestep solver must end above t = 0 (at 1, say), got {times[-1]}")
    i = 0
    for k in singlestep_orders(len(times) - 1, order):
        nodes = [_Node(schedule, t, x) for t in times[i : i + k + 1]]
        x = (_single_1, _single_2, _single_3)[k - 1](predict, x, nodes)
        i += k
        yield times[i], x


def singlestep_orders(steps: int, order: int = 3) -> list[int]:
    """Orders that sum to ``steps`` and end low, where the data prediction bends most."""
    if order < 3 or steps < 1:
        return [order] * (steps // order) + [1] * (steps % order)
    full, rest = divmod(steps, 3)
    if rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [3] * full + [rest]


def _exponential_step(x: Tensor, now: _Node, then: _Node, d: Tensor) -> Tensor:
    """The linear part of the ODE solved exactly, with the data prediction held at d."""
    shrink = torch.expm1(now.lam - then.lam).to(x.dtype)  # exp(-h) - 1; -1 for a step to t = 0
    return then.sigma / now.sigma * x - then.alpha * shrink * d


def _single_1(predict: Predictor, x: Tensor, nodes: list[_Node]) -> Tensor:
    now, then = nodes
    return _exponential_step(x, now, then, now.data(predict, x))


def _single_2(predict: Predictor, x: Tensor, nodes: list[_Node]) -> Tensor:
    now, middle, then = nodes
    d = now.data(predict, x)
    d_middle = middle.data(predict, _exponential_step(x, now, middle, d))
    r = ((middle.lam - now.lam) / (then.lam - now.lam)).to(x.dtype)
    return _exponential_step(x, now, then, d + (d_middle - d) / (2 * r))


def _single_3(predict: Predictor, x: Tensor, nodes: list[_Node]) -> Tensor:
    now, first, second, then = nodes
    h1, h2, h = (node.lam - now.lam for node in nodes[1:])
    d = now.data(predict, x)
    slope1 = first.data(predict, _exponential_step(x, now, first, d)) - d
    x2 = _exponential_step(x, now, second, d)
    x2 = x2 + second.alpha * (h2 / h1 * _phi2(h2)).to(x.dtype) * slope1
    slope2 = second.data(predict, x2) - d
    ends = _exponential_step(x, now, then, d)
    return ends + then.alpha * (h / h2 * _phi2(h)).to(x.dtype) * slope2


def _phi2(h: Tensor) -> Tensor:
    """(exp(-h) - 1) / h + 1, the weight of a prediction that changes linearly over the step."""
    return torch.expm1(-h) / h + 1


def _home(generator: torch.Generator | None, x: Tensor) -> torch.device:
    return x.device if generator is None else generator.device


SOLVERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++2m": dpm_multistep,
    "dpm++fast": dpm_singlestep,
}
