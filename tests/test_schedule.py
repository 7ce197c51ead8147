"""The forward process: its numbers, their precision, and the conversions built on them."""

import math

import pytest
import torch

from minidiffuser.schedule import PREDICTIONS, SCHEDULES, NoiseSchedule, T

# The official scaled-linear process as its code computes it, in float32 betas: hence six digits,
# and fewer for lambda at n = 1, where 1 - alpha_bar is a difference of nearly equal numbers.
OFFICIAL = [
    # quantity, n, value, tolerance
    ("alpha_bar", 1, 0.99915, 1e-6),
    ("alpha", 1, 0.99957491, 1e-6),
    ("sigma", 1, 0.02915476, 1e-6),
    ("lambda_", 1, 3.5346992, 2e-5),
    ("alpha_bar", 500, 0.27766965, 1e-6),
    ("lambda_", 500, -0.4780258, 1e-6),
    ("alpha_bar", 999, 0.0047166989, 1e-6),
    ("alpha_bar", 1000, 0.0046600985, 1e-6),
    ("alpha", 1000, 0.06826491, 1e-6),
    ("sigma", 1000, 0.99766723, 1e-6),
    ("lambda_", 1000, -2.6820242, 1e-6),
    ("snr", 1000, 0.004682, 1e-6),
]
NAMES = sorted(SCHEDULES)


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- alpha, sigma, lambda ----------------------------------------------------------------------


@pytest.mark.parametrize("quantity, n, value, tolerance", OFFICIAL)
def test_official_values(quantity, n, value, tolerance):
    got = getattr(NoiseSchedule("scaled-linear"), quantity)(float64(n))
    assert float(got) == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize("name, beta", [
    ("linear", lambda i: 1e-4 + (0.02 - 1e-4) * (i - 1) / (T - 1)),
    ("scaled-linear", lambda i: (math.sqrt(0.00085) * (T - i) + math.sqrt(0.012) * (i - 1)) ** 2
     / (T - 1) ** 2),
])
@pytest.mark.parametrize("n", [1, 2, 500, 999, 1000])
def test_alpha_bar_is_the_product_of_the_first_n(name, beta, n):
    expected = math.prod(1 - beta(i) for i in range(1, n + 1))
    assert float(NoiseSchedule(name).alpha_bar(float64(n))) == pytest.approx(expected, rel=1e-9)


def test_cosine_follows_its_closed_form_up_to_the_clipped_end():
    cosine = NoiseSchedule("cosine")
    power = [math.cos((n / T + 0.008) / 1.008 * math.pi / 2) ** 2 for n in range(T + 1)]
    for n in (1, 250, 500, 750, 998, 999):
        assert float(cosine.alpha_bar(float64(n))) == pytest.approx(power[n] / power[0], rel=1e-9)
    last = cosine.alpha_bar(float64(999, 1000))
    assert float(last[1] / last[0]) == pytest.approx(1 - 0.999, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_between_integers_log_alpha_is_linear(name):
    alpha = NoiseSchedule(name).alpha
    for n in (0, 3, 999):
        expected = alpha(float64(n)) ** 0.75 * alpha(float64(n + 1)) ** 0.25
        torch.testing.assert_close(alpha(float64(n + 0.25)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_signal_falls_and_noise_rises(name):
    schedule, t = NoiseSchedule(name), torch.linspace(0, T, 4001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    torch.testing.assert_close(schedule.alpha_bar(t), alpha**2)
    torch.testing.assert_close(schedule.log_alpha(t).exp(), alpha)
    torch.testing.assert_close(schedule.lambda_(t[1:]), (alpha / sigma).log()[1:])
    torch.testing.assert_close(schedule.snr(t[1:]), ((alpha / sigma) ** 2)[1:])
    assert (alpha.diff() < 0).all()
    assert (schedule.lambda_(t).diff() < 0).all()
    assert float(alpha[-1]) > 0  # so that x0 can be had from eps even at T


@pytest.mark.parametrize("t", [0, 0.0, torch.tensor(0), float64(0)])
def test_zero_is_clean(t):
    schedule = NoiseSchedule()
    assert float(schedule.alpha(t)) == 1
    assert float(schedule.sigma(t)) == 0
    assert math.copysign(1, float(schedule.sigma(t))) == 1  # -0 would turn 1 / sigma to -inf
    assert float(schedule.lambda_(t)) == math.inf
    assert float(schedule.snr(t)) == math.inf


# ---- dtypes and shapes -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["log_alpha", "alpha", "sigma", "alpha_bar", "lambda_", "snr"])
@pytest.mark.parametrize("t, dtype", [
    (7, torch.float32),
    (7.5, torch.float32),
    (torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.float32),
    (torch.tensor([7.5], dtype=torch.float16), torch.float32),
    (torch.tensor([7.5]), torch.float32),
    (float64(7.5, 8), torch.float64),
    (torch.empty(0), torch.float32),
])
def test_any_shape_of_numbers_integers_and_floats(method, t, dtype):
    got = getattr(NoiseSchedule(), method)(t)
    assert got.dtype == dtype
    assert got.shape == torch.as_tensor(t).shape
    exact = getattr(NoiseSchedule(), method)(torch.as_tensor(t).double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_float32_keeps_its_digits_near_zero(name):
    # 1 - alpha^2 computed in float32 would be 0 here.
    t = torch.tensor([1e-4, 1e-3, 0.01])
    narrow, wide = NoiseSchedule(name).sigma(t), NoiseSchedule(name).sigma(t.double())
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-6, atol=0)
    assert (narrow > 0).all()


@pytest.mark.parametrize("t", [-1e-3, 1000.5, math.nan, math.inf, torch.tensor([5.0, 1001.0])])
def test_timesteps_outside_the_range_are_refused(t):
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 1000\]"):
        NoiseSchedule().alpha(t)


def test_unknown_schedule_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'cosin'.*'cosine'"):
        NoiseSchedule("cosin")


# ---- the inverse of lambda ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_inverse_lambda_round_trips(name):
    schedule = NoiseSchedule(name)
    t = torch.cat([float64(1e-3, 0.5, 1, T), torch.linspace(2, 999.9, 997, dtype=torch.float64)])
    torch.testing.assert_close(schedule.inverse_lambda(schedule.lambda_(t)), t, rtol=0, atol=1e-8)
    lam = torch.linspace(-2.6, 5, 500, dtype=torch.float64).reshape(2, 250)
    torch.testing.assert_close(schedule.lambda_(schedule.inverse_lambda(lam)), lam)
    back = schedule.inverse_lambda(schedule.lambda_(t.float()))
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, t.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_inverse_lambda_stops_at_the_ends(name):
    inverse = NoiseSchedule(name).inverse_lambda
    assert inverse(float64(math.inf, 1e3, -1e3, -math.inf)).tolist() == [0, 0, T, T]


# ---- perturb -----------------------------------------------------------------------------------


def test_perturb_mixes_signal_and_noise_with_each_samples_own_timestep():
    schedule = NoiseSchedule()
    x0, noise = torch.full((3, 2, 4), 2.0), torch.full((3, 2, 4), -1.0)
    t = torch.tensor([0.0, 500.0, 1000.0])
    x = schedule.perturb(x0, t, noise)
    for i in range(3):
        expected = float(2 * schedule.alpha(t[i]) - schedule.sigma(t[i]))
        torch.testing.assert_close(x[i], torch.full((2, 4), expected))
    torch.testing.assert_close(schedule.perturb(x0, 500, noise)[0], x[1])
    assert torch.equal(x[0], x0[0])


def test_perturb_has_the_moments_of_the_forward_process():
    # 6 z-values: one beyond 5 comes about once in 300,000 runs.
    schedule, n = NoiseSchedule(), 100_000
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((n, 1), 1.5)
    for t in (20, 500, 1000):
        x = schedule.perturb(x0, t, torch.randn(n, 1, generator=generator)).double()
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        assert abs(float(x.mean()) - 1.5 * alpha) < 5 * sigma / math.sqrt(n)
        assert abs(float(x.var()) - sigma**2) < 5 * sigma**2 * math.sqrt(2 / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_data_keeps_its_dtype(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    assert NoiseSchedule().perturb(x, torch.tensor([3.0, 4.0]), x).dtype == dtype
    assert NoiseSchedule().convert(x, "eps", "x0", x, 3.0).dtype == dtype


@pytest.mark.parametrize("x0, t, noise, message", [
    (torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 4), r"\(2, 4\).*\(2, 3\)"),
    (torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 3), r"t \(3,\).*\(2,\)"),
    (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), r"t \(2, 3\).*\(2,\)"),
    (torch.zeros(2, 3).byte(), torch.zeros(2), torch.zeros(2, 3), "floating point.*uint8"),
])
def test_perturb_refuses_what_does_not_fit(x0, t, noise, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule().perturb(x0, t, noise)


# ---- eps, x0 and v -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("t", [float64(0.5, 980.02, 1000), 333.3, 1])
def test_conversions_between_all_pairs(source, target, t):
    schedule, generator = NoiseSchedule(), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    x = schedule.perturb(x0, t, eps)
    wide = torch.as_tensor(t, dtype=torch.float64)
    alpha, sigma = (f(wide).reshape(-1, 1) for f in (schedule.alpha, schedule.sigma))
    truth = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}
    got = schedule.convert(truth[source], source, target, x, t)
    torch.testing.assert_close(got, truth[target], rtol=0, atol=1e-11)


def test_conversions_to_data_hold_at_zero():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    other = torch.full_like(x, 7.0)
    assert torch.equal(NoiseSchedule().convert(other, "eps", "x0", x, 0), x)
    assert torch.equal(NoiseSchedule().convert(other, "v", "x0", x, 0), x)
    assert NoiseSchedule().convert(x, "x0", "eps", x, 0).isfinite().all()


def test_a_number_and_a_tensor_of_timesteps_convert_alike_in_double_precision():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    number = NoiseSchedule().convert(x, "x0", "eps", 2 * x, 980.02)
    tensor = NoiseSchedule().convert(x, "x0", "eps", 2 * x, float64(980.02, 980.02))
    torch.testing.assert_close(number, tensor, rtol=1e-14, atol=0)


@pytest.mark.parametrize("source, target", [("noise", "x0"), ("x0", "score")])
def test_unknown_predictions_are_refused(source, target):
    with pytest.raises(ValueError, match=r"unknown prediction '(noise|score)'.*eps"):
        NoiseSchedule().convert(torch.zeros(1), source, target, torch.zeros(1), 5)
