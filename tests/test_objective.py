"""The training objective: its timesteps, its weights, and what it is zero and least for."""

import math

import pytest
import torch
from torch import Tensor, nn

from minidiffuser.config import Part
from minidiffuser.objective import (
    WEIGHTINGS,
    TimestepMix,
    error_weight,
    joint_loss,
    snr_weight,
)
from minidiffuser.oracles import GaussianMixture, OracleNet
from minidiffuser.schedule import PREDICTIONS, NoiseSchedule, T

SCHEDULE = NoiseSchedule("scaled-linear")
PARTS = (Part("text", (3, 4), clock="text"), Part("image", (2, 4, 4), clock="image", patch=2))
CLOCKS = ("image", "text")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(batch: int = 16, parts=PARTS, seed: int = 1) -> dict[str, Tensor]:
    own = generator(seed)
    return {p.name: torch.randn(batch, *p.shape, generator=own) for p in parts}


def loss_of(net, x0=None, seed: int = 0, **options):
    options = {"parts": PARTS, "clocks": CLOCKS, "generator": generator(seed), **options}
    return joint_loss(net, SCHEDULE, x0 or data(), **options)


class Net:
    """``answer(part, x_t, t)`` for every part; remembers what it was fed."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x, t, data_type):
        self.x, self.t, self.data_type = x, t, data_type
        return {p.name: self.answer(p, x[p.name], t[p.clock]) for p in PARTS}


def zeros() -> Net:
    return Net(lambda part, x, t: torch.zeros_like(x))


def knows(x0: dict[str, Tensor], prediction: str, error: float = 0.0) -> Net:
    """A network told the clean data: its prediction is right, or off by ``error`` in x0."""
    return Net(lambda part, x, t: SCHEDULE.convert(x0[part.name] + error, "x0", prediction, x, t))


# ---- timesteps ---------------------------------------------------------------------------------


def uniform_p_value(values: Tensor, cells: int) -> float:
    """Pearson's chi-square test that integers in [0, cells) are equally likely."""
    counts = torch.bincount(values, minlength=cells).double()
    expected = len(values) / cells
    chi_square = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((cells - 1) / 2).double(), chi_square / 2))


def tenths(t: Tensor) -> Tensor:
    """1 .. T -> 0 .. 9"""
    return ((t - 1) * 10 // T).long()


def test_clocks_are_uniform_and_independent():
    """All 10 x 10 cells of the square equally likely; a right draw fails 1 seed in 10,000."""
    t = TimestepMix().draw(50_000, CLOCKS, generator())
    assert t.dtype == torch.float32
    assert t.shape == (50_000, 2)
    assert torch.equal(t, t.round())
    assert (float(t.min()), float(t.max())) == (1, T)  # 1 - (1 - 1e-3)^1e5: certain
    assert uniform_p_value(10 * tenths(t[:, 0]) + tenths(t[:, 1]), 100) > 1e-4
    shared = 10 * tenths(t[:, 0]) + tenths(t[:, 0])
    assert uniform_p_value(shared, 100) < 1e-4  # one clock for both would be noticed


def test_samples_of_a_batch_are_independent():
    """Correlation of neighbours: |r| sqrt(n) > 4.5 for one seed in 150,000."""
    t = TimestepMix().draw(20_000, ("image",), generator())[:, 0]
    r = torch.corrcoef(torch.stack([t[:-1], t[1:]]))[0, 1]
    assert abs(float(r)) * math.sqrt(len(t)) < 4.5


@pytest.mark.parametrize("share, edge", [("given", 0), ("ignored", T)])
def test_an_edge_has_one_free_clock_and_the_others_exactly_at_it(share, edge):
    t = TimestepMix(square=0, **{share: 1.0}).draw(20_000, ("a", "b", "c"), generator())
    free = t != edge
    assert (free.sum(1) <= 1).all()  # for "ignored" the free one may be at T by chance
    once = free[free.sum(1) == 1]
    assert len(once) > 0.99 * len(t)
    assert uniform_p_value(once.long().argmax(1), 3) > 1e-4
    assert uniform_p_value(tenths(t[free & (t < T)]), 10) > 1e-4
    assert float(t[free].min()) == 1


def test_the_diagonal_has_one_timestep_for_all():
    t = TimestepMix(square=0, diagonal=1).draw(20_000, ("a", "b", "c"), generator())
    assert (t == t[:, :1]).all()
    assert uniform_p_value(tenths(t[:, 0]), 10) > 1e-4


def test_shares_are_kept():
    """Each kind's frequency within 4.5 standard errors: a right mix fails 1 seed in 50,000."""
    n = 40_000
    t = TimestepMix(square=3, given=5, ignored=1, diagonal=1).draw(n, CLOCKS, generator())
    chance = 1 / T  # of hitting T, or each other, from the square
    for found, p in [
        ((t == 0).any(1), 0.5),
        ((t == T).any(1), 0.1 + 0.3 * (2 * chance - chance**2) + (0.5 + 0.1) * chance),
        (t[:, 0] == t[:, 1], 0.1 + (0.3 + 0.1) * chance),
    ]:
        error = float(found.float().mean()) - p
        assert abs(error) < 4.5 * math.sqrt(p * (1 - p) / n)


def test_favour_says_which_modality_is_the_free_one():
    n = 20_000
    t = TimestepMix(square=0, given=1, favour=(3, 1)).draw(n, CLOCKS, generator())
    error = float((t[:, 0] > 0).float().mean()) - 0.75
    assert abs(error) < 4.5 * math.sqrt(0.75 * 0.25 / n)
    always = TimestepMix(square=0, given=1, favour=(0, 1)).draw(500, CLOCKS, generator())
    assert (always[:, 0] == 0).all()
    assert (always[:, 1] > 0).all()


@pytest.mark.parametrize("shares, message", [
    ({"square": -1.0}, "timestep shares"),
    ({"square": 0.0}, "not all 0"),
    ({"given": math.nan}, "timestep shares"),
    ({"diagonal": math.inf}, "finite"),
    ({"favour": (1.0, -1.0)}, "favour"),
    ({"favour": (0.0, 0.0)}, "favour"),
])
def test_shares_that_are_none_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        TimestepMix(**shares)


@pytest.mark.parametrize("favour", [(1.0,), (1.0, 1.0, 1.0)])
def test_favour_has_a_share_for_each_clock(favour):
    with pytest.raises(ValueError, match="one share for each of"):
        TimestepMix(given=1, favour=favour).draw(4, CLOCKS, generator())


# ---- weights -----------------------------------------------------------------------------------

ALL_T = torch.arange(1, T + 1, dtype=torch.float64)


@pytest.mark.parametrize("weighting, weight", [
    ("eps", lambda alpha, sigma: alpha**2 / sigma**2),
    ("v", lambda alpha, sigma: 1 / sigma**2),
    ("x0", lambda alpha, sigma: torch.ones_like(alpha)),
    ("min-snr", lambda alpha, sigma: (alpha**2 / sigma**2).clamp(max=5)),
    ("clipped-v", lambda alpha, sigma: (1 / sigma**2).clamp(max=5)),
])
def test_weights_on_the_data_error(weighting, weight):
    expected = weight(SCHEDULE.alpha(ALL_T), SCHEDULE.sigma(ALL_T))
    torch.testing.assert_close(snr_weight(weighting, SCHEDULE, ALL_T), expected)
    torch.testing.assert_close(error_weight("x0", weighting, SCHEDULE, ALL_T), expected)


def test_min_snr_is_the_table_of_its_paper():
    """min(SNR, 5) / SNR for eps, min(SNR, 5) / (SNR + 1) for v; both sides of the clamp are met."""
    snr = SCHEDULE.snr(ALL_T)
    assert 0 < int((snr > 5).sum()) < T
    for prediction, scale in (("eps", snr), ("v", snr + 1)):
        got = error_weight(prediction, "min-snr", SCHEDULE, ALL_T)
        torch.testing.assert_close(got, snr.clamp(max=5) / scale)
    assert float(snr_weight("min-snr", SCHEDULE, ALL_T, gamma=2).max()) == 2


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_prediction_under_its_own_weighting_is_plain_squared_error(prediction):
    weight = error_weight(prediction, prediction, SCHEDULE, ALL_T)
    assert torch.equal(weight, torch.ones_like(ALL_T))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_at_the_ends(prediction, weighting):
    ends = torch.tensor([0.0, 1.0, T])
    assert error_weight(prediction, weighting, SCHEDULE, ends).isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_does_not_depend_on_what_is_predicted(weighting):
    """One and the same answer, put as eps, x0 or v, costs the same under every weighting."""
    x0 = data()
    wrong = [knows(x0, prediction, error=0.3) for prediction in PREDICTIONS]
    losses = [loss_of(net, x0, prediction=prediction, weighting=weighting)
              for net, prediction in zip(wrong, PREDICTIONS, strict=True)]
    for loss in losses:
        for p in PARTS:
            expected = 0.3**2 * snr_weight(weighting, SCHEDULE, loss.t[p.clock])
            torch.testing.assert_close(loss.per_part[p.name], expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(loss.total, losses[0].total, rtol=1e-3, atol=0)


# ---- the loss ----------------------------------------------------------------------------------


def test_data_is_noised_to_each_clocks_own_timestep():
    """x_t = alpha x0 + sigma eps: so (x_t - alpha x0) / sigma must be N(0, I), and the same eps."""
    net, x0 = zeros(), data(batch=2000)
    loss = loss_of(net, x0)
    for p in PARTS:
        t = loss.t[p.clock]
        assert torch.equal(net.t[p.clock], t)
        eps = SCHEDULE.convert(x0[p.name], "x0", "eps", net.x[p.name], t)
        # what a network that predicts 0 is charged is eps itself
        torch.testing.assert_close(loss.per_part[p.name], eps.square().flatten(1).mean(1),
                                   rtol=1e-3, atol=1e-3)
        n = eps.numel()  # two z-values: one beyond 4.5 for 1 seed in 70,000
        assert abs(float(eps.mean())) * math.sqrt(n) < 4.5
        assert abs(float(eps.var()) - 1) * math.sqrt(n / 2) < 4.5
    assert not torch.equal(loss.t["image"], loss.t["text"])


def test_total_is_the_sum_over_parts_of_the_mean_over_samples():
    loss = loss_of(zeros())
    assert loss.per_part.keys() == {"text", "image"}
    assert all(v.shape == (16,) for v in loss.per_part.values())
    expected = sum(v.mean() for v in loss.per_part.values())
    torch.testing.assert_close(loss.total, expected)


def test_part_weights_are_factors():
    plain = loss_of(zeros())
    weighted = loss_of(zeros(), part_weights={"text": 0.25})
    expected = plain.per_part["image"].mean() + 0.25 * plain.per_part["text"].mean()
    torch.testing.assert_close(weighted.total, expected)


def test_parts_of_one_clock_share_its_timestep():
    parts = (*PARTS, Part("clip_img", (1, 5), clock="image"))
    seen = {}

    def net(x, t, data_type):
        seen.update(x=x, t=t)
        return x

    x0 = data(parts=parts)
    loss = joint_loss(net, SCHEDULE, x0, parts=parts, clocks=CLOCKS, generator=generator())
    assert seen["t"].keys() == {"image", "text"}
    assert loss.per_part.keys() == {"text", "image", "clip_img"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_perfect_network_costs_nothing(prediction, weighting):
    x0 = data()
    mix = TimestepMix(1, 1, 1, 1)
    loss = loss_of(knows(x0, prediction), x0, prediction=prediction, weighting=weighting, mix=mix)
    worse = loss_of(zeros(), x0, prediction=prediction, weighting=weighting, mix=mix)
    assert float(loss.total) < 1e-5 * float(worse.total)


def test_the_oracle_costs_what_theory_says():
    """No network can do better than E[eps | x_t, y_s], and its loss is known for a Gaussian.

    Cov(eps | noisy pair) = I - S (A C A + S^2)^-1 S, with each sample's own (t, s).  The mean over
    the batch of (loss - that) has a standard error; both parts within 4.5, once in 70,000 not.
    """
    gaussian = GaussianMixture([1.0], [[0.5, -0.5]], covs=[[[1.0, 0.8], [0.8, 1.0]]])
    parts = (Part("image", (1, 1), clock="image"), Part("text", (1, 1), clock="text"))
    n = 20_000
    x0 = gaussian.sample(n, generator(1))
    loss = joint_loss(
        OracleNet(gaussian, parts, SCHEDULE), SCHEDULE,
        {"image": x0[:, None, :1], "text": x0[:, None, 1:]},
        parts=parts, clocks=CLOCKS, generator=generator(), mix=TimestepMix(1, 0.5, 0.5, 0.5))
    t = torch.stack([loss.t["image"], loss.t["text"]], 1).double()             # (n, 2)
    precision = torch.linalg.inv(gaussian.noised(t, SCHEDULE).covs[:, 0])      # (n, 2, 2)
    least = 1 - SCHEDULE.sigma(t) ** 2 * precision.diagonal(dim1=-2, dim2=-1)
    for i, name in enumerate(("image", "text")):
        expected = least[:, i] * (t[:, i] > 0)
        difference = loss.per_part[name].double() - expected
        assert abs(float(difference.mean())) < 4.5 * float(difference.std()) / math.sqrt(n)
        assert 0.05 < float(expected.mean()) < 0.9


def test_a_given_part_is_fed_clean_and_costs_nothing():
    net, x0 = zeros(), data(batch=200)
    loss = loss_of(net, x0, mix=TimestepMix(square=0, given=1))
    for p in PARTS:
        given = loss.t[p.clock] == 0
        assert 0 < int(given.sum()) < 200
        assert torch.equal(net.x[p.name][given], x0[p.name][given])
        assert (loss.per_part[p.name][given] == 0).all()
        assert (loss.per_part[p.name][~given] > 0).all()


def test_data_type_reaches_the_network():
    net, kinds = zeros(), torch.arange(16) % 2
    loss_of(net, data_type=kinds)
    assert torch.equal(net.data_type, kinds)


def test_the_same_seed_gives_the_same_loss():
    first, again, other = (loss_of(zeros(), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.total, again.total)
    assert torch.equal(first.t["text"], again.t["text"])
    assert not torch.equal(first.total, other.total)
    assert not torch.equal(first.t["text"], other.t["text"])


class Scales(nn.Module):
    """One number to learn per part: predicts it times x_t."""

    def __init__(self):
        super().__init__()
        self.scale = nn.ParameterDict({p.name: nn.Parameter(torch.zeros(())) for p in PARTS})

    def forward(self, x, t, data_type):
        return {name: scale * x[name] for name, scale in self.scale.items()}


def test_gradients_reach_each_part_and_only_where_weighed():
    net = Scales()
    loss = loss_of(net, part_weights={"text": 0.0})
    loss.total.backward()
    assert float(net.scale["text"].grad) == 0
    # eps = (x_t - alpha x0) / sigma: predicting more of x_t than none of it is better
    assert float(net.scale["image"].grad) < 0
    assert not any(v.requires_grad for v in loss.per_part.values())


def test_descent_lowers_the_loss():
    net = Scales()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = loss_of(net)
        loss.total.backward()
        optimiser.step()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("options, message", [
    ({"prediction": "noise"}, "unknown prediction 'noise'"),
    ({"weighting": "p2"}, "unknown weighting 'p2'.*min-snr"),
    ({"prediction": "p2", "weighting": "p2"}, "unknown"),
    ({"part_weights": {"txet": 2.0}}, "part_weights must name parts.*txet"),
    ({"x0": {"text": torch.zeros(2, 3, 4)}}, r"\['image'\] missing"),
    ({"x0": {**data(2), "image": torch.zeros(3, 2, 4, 4)}}, r"t \(2,\) must be.*\(3,\)"),
    ({"x0": {**data(2), "text": torch.zeros(2, 3, 4).long()}}, "floating point"),
])
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(zeros(), **options)


def test_error_weight_refuses_an_unknown_prediction():
    with pytest.raises(ValueError, match=r"unknown prediction 'noise'"):
        error_weight("noise", "eps", SCHEDULE, ALL_T)
