"""The forward process: how much signal and how much noise there is at each timestep.

    x_t = alpha(t) x_0 + sigma(t) eps,      eps ~ N(0, I),      alpha(t)^2 + sigma(t)^2 = 1

**The timestep convention of the whole package.**  ``t`` is a real number in ``[0, T]`` with
``T = 1000``.  ``t = 0`` is clean data, an integer ``t = n`` is data after the first ``n`` of ``T``
noising steps (``alpha_bar_n = prod_{i<=n} (1 - beta_i)``), and ``t = T`` is as noisy as it gets.
Between integers ``log alpha`` is interpolated linearly.  The network is fed ``t`` itself, neither
shifted nor rescaled.

Sources: DDPM (Ho et al., arXiv:2006.11239, eq. 4); log-SNR and its use by solvers: DPM-Solver
(Lu et al., arXiv:2206.00927, sec. 2); cosine: Nichol & Dhariwal (arXiv:2102.09672, eq. 17);
v: Salimans & Ho (arXiv:2202.00512, app. D).
"""

import math

import torch
from torch import Tensor

from .errors import choose

T = 1000  # number of noising steps, and the timestep that stands for "all noise"

PREDICTIONS = ("eps", "x0", "v")  # what a network may predict


def linear_betas(start: float = 1e-4, end: float = 0.02) -> Tensor:
    """DDPM's betas, evenly spaced. Returns (T,) float64."""
    return torch.linspace(start, end, T, dtype=torch.float64)


def scaled_linear_betas(start: float = 0.00085, end: float = 0.0120) -> Tensor:
    """Stable Diffusion's and UniDiffuser's betas: evenly spaced in their square root. (T,)."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), T, dtype=torch.float64) ** 2


def cosine_betas(offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """The betas whose alpha_bar follows a squared cosine; the last ones clipped. (T,) float64."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


SCHEDULES = {
    "scaled-linear": scaled_linear_betas,
    "linear": linear_betas,
    "cosine": cosine_betas,
}


class NoiseSchedule:
    """alpha, sigma and log-SNR at any real timestep, and the conversions that need them.

    Every method takes ``t`` as a number or a tensor of any shape with values in ``[0, T]`` and
    returns a tensor of the same shape: float32, or float64 if ``t`` is float64.

    Args:
        name: ``"scaled-linear"`` (UniDiffuser), ``"linear"`` (DDPM) or ``"cosine"``.

    Raises:
        ValueError: unknown name, or a timestep outside ``[0, T]``.
    """

    T = T

    def __init__(self, name: str = "scaled-linear"):
        betas = choose("noise schedule", name, SCHEDULES)()
        self.name = name
        log_alpha = 0.5 * torch.log1p(-betas).cumsum(0)
        self._log_alpha = torch.cat([log_alpha.new_zeros(1), log_alpha])  # (T + 1,), index is t

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.name!r})"

    # ---- as functions of t ------------------------------------------------------------------

    def log_alpha(self, t: Tensor | float) -> Tensor:
        """log alpha(t), piecewise linear in t; 0 at t = 0 and falling."""
        t, wide = _prepare(t)
        if wide.numel() and (wide.min() < 0 or wide.max() > T or wide.isnan().any()):
            raise ValueError(
                f"timesteps must lie in [0, {T}], got {wide.min():g} to {wide.max():g}"
            )
        grid = self._log_alpha.to(wide)
        left = wide.floor().clamp(max=T - 1).long()
        return torch.lerp(grid[left], grid[left + 1], wide - left).to(t.dtype)

    def alpha(self, t: Tensor | float) -> Tensor:
        """Signal scale, sqrt(alpha_bar): 1 at t = 0, falling towards 0."""
        return self._exact(t, torch.exp)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise scale, sqrt(1 - alpha_bar): 0 at t = 0, rising towards 1."""
        return self._exact(t, lambda log_alpha: _noise_power(log_alpha).sqrt())

    def alpha_bar(self, t: Tensor | float) -> Tensor:
        """alpha(t)^2, the fraction of the variance that is signal."""
        return self._exact(t, lambda log_alpha: torch.exp(2 * log_alpha))

    def lambda_(self, t: Tensor | float) -> Tensor:
        """Half log-SNR, log(alpha / sigma): +inf at t = 0 and falling; the solvers' clock."""
        return self._exact(t, lambda la: la - 0.5 * _noise_power(la).log())

    def snr(self, t: Tensor | float) -> Tensor:
        """Signal-to-noise ratio, alpha^2 / sigma^2: +inf at t = 0."""
        return self._exact(t, lambda la: torch.exp(2 * la) / _noise_power(la))

    def inverse_lambda(self, lam: Tensor | float) -> Tensor:
        """The t at which ``lambda_(t) == lam``; values beyond the schedule's ends give the ends."""
        lam, wide = _prepare(lam)
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * wide, threshold=700.0)
        grid = -self._log_alpha.to(wide)                          # rising, as searchsorted needs
        right = torch.searchsorted(grid, (-log_alpha).contiguous()).clamp(1, T)
        fraction = (-log_alpha - grid[right - 1]) / (grid[right] - grid[right - 1])
        return (right - 1 + fraction.clamp(0, 1)).to(lam.dtype)

    def _exact(self, t: Tensor | float, function) -> Tensor:
        # In float64 inside: 1 - exp(2 log alpha) loses most of float32's digits near t = 0.
        t, wide = _prepare(t)
        return function(self.log_alpha(wide)).to(t.dtype)

    # ---- on data ----------------------------------------------------------------------------

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw from q(x_t | x_0), given the noise.

        Args:
            x0: clean data (B, ...).
            t: timesteps (B,), or a number for the whole batch.
            noise: N(0, I) of x0's shape.

        Raises:
            ValueError: shapes that do not belong together, or data that is not floating point.
        """
        if noise.shape != x0.shape:
            raise ValueError(f"noise {tuple(noise.shape)} must have x0's shape {tuple(x0.shape)}")
        alpha, sigma = self._coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def convert(self, value: Tensor, source: str, target: str, x: Tensor, t: Tensor) -> Tensor:
        """Express a prediction made at (x_t, t) as another of the three equivalent targets.

        ``eps`` is the noise, ``x0`` the data and ``v = alpha eps - sigma x_0``.  Given x_t, any one
        of them determines the other two (at 0 < t; alpha is above 0 on every schedule here).

        Args:
            value: the prediction (B, ...); source, target: two of ``PREDICTIONS``.
            x: the noisy data (B, ...) the prediction was made for; t: (B,) or a number.
        """
        for kind in (source, target):
            if kind not in PREDICTIONS:
                raise ValueError(f"unknown prediction {kind!r}: choose one of {PREDICTIONS}")
        if source == target:
            return value
        alpha, sigma = self._coefficients(t, x)
        if source == "eps":
            eps, x0 = value, (x - sigma * value) / alpha
        elif source == "x0":
            eps, x0 = (x - alpha * value) / sigma.clamp(min=1e-6), value
        else:
            eps, x0 = sigma * x + alpha * value, alpha * x - sigma * value
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[target]

    def _coefficients(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), shaped to broadcast over x (B, ...)."""
        if not x.is_floating_point():  # alpha would be rounded to 0
            raise ValueError(f"x must be floating point, got {x.dtype}: convert it with x.float()")
        t = t.to(x.device) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        if t.ndim and t.shape != x.shape[:1]:
            raise ValueError(f"t {tuple(t.shape)} must be one number or ({x.shape[0]},), as x is "
                             f"{tuple(x.shape)}")
        _, t = _prepare(t)
        t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t
        return self.alpha(t).to(x), self.sigma(t).to(x)


def _noise_power(log_alpha: Tensor) -> Tensor:
    """sigma^2 = 1 - exp(2 log alpha), to full precision; abs makes the -0 at t = 0 a 0."""
    return torch.expm1(2 * log_alpha).abs()


def _prepare(t: Tensor | float) -> tuple[Tensor, Tensor]:
    """t as a floating tensor, and the same in the widest dtype its device has."""
    t = torch.as_tensor(t)
    t = t if t.dtype == torch.float64 else t.float()
    return t, t.to(torch.float32 if t.device.type == "mps" else torch.float64)
