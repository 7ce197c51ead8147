"""Oracles: data whose best possible noise predictor is known in closed form.

For a Gaussian mixture p(x_0) = sum_k w_k N(m_k, C_k) there is nothing to train.  Noising maps one
mixture to another, and its score (the gradient of log p) gives the noise predictor that a network
could at best learn:

    p(x_t)         =  sum_k w_k N(A m_k, A C_k A + S^2)             A = alpha(t),  S = sigma(t)
    E[eps | x_t]   =  -S grad log p(x_t)                            (Tweedie's formula)

A and S are diagonal matrices, so **every coordinate may have a timestep of its own**.  That is all
that several modalities need: (x_t, y_s) is one vector whose first numbers are at t and whose last
are at s.  With y at 0 the formula gives the predictor of p(x | y), and with y pure noise at T that
of p(x), because there alpha(T) y_0 says next to nothing.  (How much it still says depends on the
schedule: alpha(T) is 5e-5 for "cosine", .0064 for "linear" and .068 for "scaled-linear".  With the
last, N(0, I) is not quite the data at T, and the marginal is only approximate.)

Sources: Tweedie's formula: Efron, JASA 106 (2011); conditionals of Gaussians: Bishop, Pattern
Recognition and Machine Learning (2006), eq. 2.81 and 2.82.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .config import Part
from .schedule import NoiseSchedule

Numbers = Tensor | Sequence  # nested lists will do

class GaussianMixture:
    """sum_k w_k N(m_k, C_k) in d dimensions, or a batch of such mixtures.

    Args:
        weights: (*, K), at least 0; brought to sum to 1.
        means: (*, K, d).
        stds: standard deviations of components whose coordinates are independent, (K, d) or
            anything that broadcasts to means; or else
        covs: covariance matrices (*, K, d, d).

    All is computed in float64 on the CPU.  ``*`` is a batch of mixtures, as :meth:`noised` and
    :meth:`conditional` make them: none for the mixture one starts from.

    Raises:
        ValueError: shapes that do not fit, weights that are no probabilities, both or neither of
            stds and covs, or covariances that are not symmetric and positive definite.
    """

    def __init__(
        self,
        weights: Numbers,
        means: Numbers,
        *,
        stds: Numbers | float | None = None,
        covs: Numbers | None = None,
    ):
        self._unlikely: Tensor | None = None  # the log-likelihood of strangers, once asked for
        if (stds is None) == (covs is None):
            raise ValueError("give either stds or covs")
        weights, means = _wide(weights), _wide(means)
        if means.ndim < 2 or weights.shape[-1:] != means.shape[-2:-1]:
            raise ValueError(f"weights must be (K,) and means (K, d), got {tuple(weights.shape)} "
                             f"and {tuple(means.shape)}")
        if not (weights >= 0).all() or not (weights.sum(-1) > 0).all():
            raise ValueError(f"weights must be at least 0 and not all 0, got {weights.tolist()}")
        if covs is None:
            try:
                covs = torch.diag_embed(_wide(stds).square().expand(means.shape[-2:]))
            except RuntimeError:
                raise ValueError(f"stds must broadcast to (K, d) = {tuple(means.shape[-2:])}, got "
                                 f"{tuple(_wide(stds).shape)}") from None
        self.weights = weights / weights.sum(-1, keepdim=True)                 # (*, K)
        self.means = means                                                     # (*, K, d)
        self.covs = _wide(covs)                                                # (*, K, d, d)
        if self.covs.shape[-3:] != (*means.shape[-2:], means.shape[-1]):
            raise ValueError(f"covs must be (K, d, d) = {(*means.shape[-2:], means.shape[-1])}, "
                             f"got {tuple(self.covs.shape)}")
        self.tril, failed = torch.linalg.cholesky_ex(self.covs)                # C = tril tril^T
        if failed.any() or not self.covs.isclose(self.covs.mT).all():
            raise ValueError("covs must be symmetric and positive definite (stds above 0)")

    @property
    def dim(self) -> int:
        """d, the numbers in one sample."""
        return self.means.shape[-1]

    # ---- the mixture itself -----------------------------------------------------------------

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws from each mixture of the batch: (n, *, d) float64."""
        batch = torch.broadcast_shapes(self.weights.shape[:-1], self.means.shape[:-2])
        u = torch.rand(n, *batch, 1, dtype=torch.float64, generator=generator)
        below = (u > self.weights.cumsum(-1)).sum(-1)                          # (n, *)
        k = below.clamp(max=self.weights.shape[-1] - 1)[..., None, None]       # (n, *, 1, 1)
        mean = self.means.expand(*batch, -1, -1)[None].take_along_dim(k, -2).squeeze(-2)
        tril = self.tril.expand(*batch, -1, -1, -1)[None].take_along_dim(k[..., None], -3)
        z = torch.randn(n, *batch, self.dim, dtype=torch.float64, generator=generator)
        return mean + (tril.squeeze(-3) @ z[..., None]).squeeze(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x): (*, d) -> (*)."""
        return self._log_joint_and_pull(x)[0].logsumexp(-1)

    def strangers(self, x: Tensor) -> float:
        """The share of points x (N, d) that are less likely than 99% of the data.

        For the mixture's own samples it is 0.01, within chance.
        """
        if self._unlikely is None:
            own = self.sample(50_000, torch.Generator().manual_seed(3))
            self._unlikely = self.log_prob(own).quantile(0.01)
        return (self.log_prob(x) < self._unlikely).double().mean().item()

    def responsibilities(self, x: Tensor) -> Tensor:
        """p(component k | x): (*, d) -> (*, K)."""
        return self._log_joint_and_pull(x)[0].softmax(-1)

    def score(self, x: Tensor) -> Tensor:
        """grad log p(x) = sum_k p(k | x) C_k^-1 (m_k - x): (*, d) -> (*, d)."""
        log_joint, pull = self._log_joint_and_pull(x)
        return (log_joint.softmax(-1)[..., None] * pull).sum(-2)

    def mean(self) -> Tensor:
        """(*, d)."""
        return (self.weights[..., None] * self.means).sum(-2)

    def cov(self) -> Tensor:
        """(*, d, d): the mean of the covariances plus the covariance of the means."""
        off = self.means - self.mean()[..., None, :]                           # (*, K, d)
        each = self.covs + off[..., :, None] * off[..., None, :]               # (*, K, d, d)
        return (self.weights[..., None, None] * each).sum(-3)

    def _log_joint_and_pull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log w_k + log N(x; m_k, C_k), and C_k^-1 (m_k - x): (*, d) -> (*, K), (*, K, d)."""
        x = _wide(x)
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must be (*, {self.dim}), got {tuple(x.shape)}")
        off = self.means - x[..., None, :]                                     # (*, K, d)
        pull = (self.precisions * off[..., None, :]).sum(-1)  # for tiny d quicker than matmul
        log_det = 2 * self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)       # (*, K)
        log_normal = -0.5 * ((off * pull).sum(-1) + log_det + self.dim * math.log(math.tau))
        return self.weights.log() + log_normal, pull

    @cached_property
    def precisions(self) -> Tensor:
        """C_k^-1, (*, K, d, d)."""
        return torch.cholesky_inverse(self.tril)

    # ---- blocks of coordinates --------------------------------------------------------------

    def marginal(self, dims: Sequence[int]) -> "GaussianMixture":
        """The distribution of some coordinates, whatever the others are."""
        dims = list(dims)
        return GaussianMixture(self.weights, self.means[..., dims],
                               covs=self.covs[..., dims, :][..., dims])

    def conditional(self, dims: Sequence[int], value: Numbers) -> "GaussianMixture":
        """The distribution of the other coordinates, in their order, given those in ``dims``.

            p(x | y) = sum_k p(k | y) N(m_x + G (y - m_y), C_xx - G C_yx),     G = C_xy C_yy^-1

        Args:
            dims: the coordinates that are known, y.
            value: what they are, (*, len(dims)); a batch of values gives a batch of mixtures.

        Raises:
            ValueError: a value of another length than dims.
        """
        y, known = list(dims), self.marginal(dims)
        weights = known.responsibilities(value)                                # (*, K)
        x = [i for i in range(self.dim) if i not in y]
        c_xy = self.covs[..., x, :][..., y]                                    # (*, K, x, y)
        gain = torch.cholesky_solve(c_xy.mT, known.tril).mT                    # (*, K, x, y)
        off = (_wide(value)[..., None, :] - known.means)[..., None]            # (*, K, y, 1)
        means = self.means[..., x] + (gain @ off).squeeze(-1)
        covs = self.covs[..., x, :][..., x] - gain @ c_xy.mT
        return GaussianMixture(weights, means, covs=covs)

    # ---- under noise ------------------------------------------------------------------------

    def noised(self, t: Tensor | float, schedule: NoiseSchedule) -> "GaussianMixture":
        """The distribution of x_t.

        Args:
            t: one timestep, one for each sample (B,), or one for each coordinate too (B, d).  More
                than one timestep makes a batch of mixtures.
        """
        alpha, sigma = _coefficients(t, schedule)                              # (*, d) or (*, 1)
        alpha, sigma = alpha[..., None, :], sigma[..., None, :]                # (*, 1, d)
        noise = torch.diag_embed(sigma.square().expand(*sigma.shape[:-1], self.dim))
        scale = alpha[..., :, None] * alpha[..., None, :]                      # (*, 1, d, d)
        return GaussianMixture(self.weights, alpha * self.means, covs=scale * self.covs + noise)

    def eps(self, x: Tensor, t: Tensor | float, schedule: NoiseSchedule) -> Tensor:
        """E[eps | x_t] = -sigma grad log p(x_t), the exact noise predictor.

        Args:
            x: noisy data (*, d).
            t: as in :meth:`noised`.  A coordinate at t = 0 is clean, and its eps 0.
        """
        _, sigma = _coefficients(t, schedule)
        return -sigma * self.noised(t, schedule).score(x)


def smiley() -> GaussianMixture:
    """A face of 51 Gaussians in the plane: a ring, two eyes and a mouth; mean 0, variance near 1.

    What the lessons draw where a result has to be compared with an exact one.
    """
    ring, mouth = torch.arange(40) * math.tau / 40, torch.linspace(1.2, 1.8, 9) * math.pi
    radius = torch.cat([torch.ones(40), torch.full((9,), 0.55)])
    arcs = torch.cat([ring, mouth])
    arcs = radius[:, None] * torch.stack([arcs.cos(), arcs.sin()], 1)          # (49, 2)
    means = torch.cat([arcs, torch.tensor([[-0.35, 0.3], [0.35, 0.3]])])
    weights = torch.cat([torch.full((40,), 4 / 320), torch.full((9,), 2 / 72),
                         torch.full((2,), 1 / 8)])
    stds = torch.cat([torch.full((49,), 0.05), torch.full((2,), 0.08)])[:, None]
    raw = GaussianMixture(weights, means, stds=stds)
    scale = (raw.cov().trace() / raw.dim).sqrt()
    return GaussianMixture(weights, (means - raw.mean()) / scale, stds=stds / scale)


class OracleNet(nn.Module):
    """A joint network that knows the answer: called like ``UViT``, it needs no training.

    ``NoisePredictor``, every solver and ``UniDiffuser.sample_latents`` run on it as they do on a
    trained network, so what they return can be compared with exact samples.

    Args:
        mixture: of all parts' numbers side by side, in the order of ``parts``.
        parts: as for a network.
        schedule: the noise schedule whose timesteps it is fed.
        prediction: what it returns: "eps", "x0" or "v".

    Raises:
        ValueError: a mixture of another dimension than the parts have together.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        parts: Sequence[Part],
        schedule: NoiseSchedule,
        prediction: str = "eps",
    ):
        super().__init__()
        self.mixture, self.parts = mixture, tuple(parts)
        self.schedule, self.prediction = schedule, prediction
        clocks = tuple(dict.fromkeys(p.clock for p in self.parts))
        self.cfg = SimpleNamespace(parts=self.parts, clocks=clocks)  # what a pipeline asks for
        if (total := sum(p.numel for p in self.parts)) != mixture.dim:
            raise ValueError(f"the parts have {total} numbers together, the mixture {mixture.dim}")

    def forward(
        self,
        x: Mapping[str, Tensor],
        t: Mapping[str, Tensor],
        data_type: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The exact prediction for every part, each modality at its own timestep.

        Args:
            x: part name -> noisy data (B, *shape).
            t: clock -> timesteps (B,).
            data_type: not used.
        """
        flat = torch.cat([x[p.name].flatten(1) for p in self.parts], 1)        # (B, d)
        clocks = torch.cat([t[p.clock][:, None].expand(-1, p.numel) for p in self.parts], 1)
        eps = self.mixture.eps(flat, clocks, self.schedule).to(flat)
        pieces = eps.split([p.numel for p in self.parts], 1)
        return {p.name: self.schedule.convert(piece.unflatten(1, p.shape), "eps", self.prediction,
                                              x[p.name], t[p.clock])
                for p, piece in zip(self.parts, pieces, strict=True)}


def _wide(x: Numbers | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64, device="cpu")


def _coefficients(t: Tensor | float, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """alpha and sigma, with a last axis for the coordinates: (1,), (B, 1) or (B, d)."""
    t = _wide(t)
    t = t if t.ndim > 1 else t[..., None]
    return schedule.alpha(t), schedule.sigma(t)
