"""The solvers, on data whose noise predictor is exact: what error is left is their own."""

import math

import pytest
import torch
from torch import Tensor

from minidiffuser import solvers
from minidiffuser.config import Part
from minidiffuser.oracles import GaussianMixture, OracleNet
from minidiffuser.schedule import NoiseSchedule, T
from minidiffuser.tasks import TASKS, NoisePredictor, Role, roles_of

SCALED, COSINE = NoiseSchedule("scaled-linear"), NoiseSchedule("cosine")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_mixture() -> GaussianMixture:
    """Two broad components: smooth enough that few steps show a solver's order."""
    return GaussianMixture([0.6, 0.4], [[-1.0, 0.5], [1.0, -0.5]],
                           covs=[[[0.4, 0.1], [0.1, 0.3]], [[0.3, -0.1], [-0.1, 0.5]]])


def predictor(mixture: GaussianMixture, schedule: NoiseSchedule):
    return lambda x, t: mixture.eps(x, t, schedule)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


class Recorder:
    """Predicts some fixed smooth function, and remembers what it was asked."""

    def __init__(self):
        self.times, self.states = [], []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t))
        self.states.append(x)
        return torch.sin(x + t / T)


# ---- time grids --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, second, last_fed", [
    (50, 980.02, 20.98), (20, 950.05, 50.95), (25, 960.04, 40.96), (48, 979.1875, 21.8125)])
def test_even_times_are_the_official_ones(steps, second, last_fed):
    times = solvers.time_grid(SCALED, steps, end=1)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1000, 1)
    assert (times[1], times[-2]) == pytest.approx((second, last_fed), abs=1e-9)


@pytest.mark.parametrize("schedule", [SCALED, COSINE], ids=lambda s: s.name)
@pytest.mark.parametrize("end", [0, 0.5, 1, 40])
def test_even_lambdas(schedule, end):
    times = solvers.time_grid(schedule, 12, "logsnr", end=end)
    assert len(times) == 13
    assert (times[0], times[-1]) == (T, end)
    inner = times if end else times[:-1]  # the step to infinite log-SNR is one more, from t = 1
    assert inner[-1] == (end or 1)
    gaps = schedule.lambda_(torch.tensor(inner, dtype=torch.float64)).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps))


@pytest.mark.parametrize("spacing", solvers.SPACINGS)
def test_one_step_goes_all_the_way(spacing):
    assert solvers.time_grid(SCALED, 1, spacing) == [T, 0]


@pytest.mark.parametrize("arguments, message", [
    ({"steps": 0}, "steps=0"),
    ({"steps": -3}, "steps=-3"),
    ({"steps": 5, "spacing": "karras"}, "unknown spacing 'karras'.*logsnr"),
    ({"steps": 5, "start": 1001}, "start=1001"),
    ({"steps": 5, "end": -1}, "end=-1"),
    ({"steps": 5, "start": 10, "end": 10}, "start=10 and end=10"),
    ({"steps": 5, "start": math.nan}, "start=nan"),
    ({"steps": 5, "start": 1, "spacing": "logsnr"}, "start above 1"),
])
def test_bad_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        solvers.time_grid(SCALED, **arguments)


# ---- orders of convergence ---------------------------------------------------------------------

# Singlestep order 3 with 3m + 2 steps: its one last step of order 2 has a local error of third
# order.  (With 3m steps the plan ends in 2, 1, and the step of order 1 makes the whole order 2.)
CONVERGENCE = [
    # solver, options, slope, numbers of steps
    ("ddim", {}, 1, (80, 160)),
    ("dpm++2m", {"order": 1}, 1, (80, 160)),
    ("dpm++2m", {"order": 2}, 2, (80, 160)),
    ("dpm++fast", {"order": 1}, 1, (80, 160)),
    ("dpm++fast", {"order": 2}, 2, (80, 160)),
    ("dpm++fast", {"order": 3}, 3, (80, 161)),
]


@pytest.fixture(scope="module", params=[SCALED, COSINE], ids=lambda s: s.name)
def problem(request):
    """(schedule, predictor, state at t = 900, the ODE's solution at t = 20), float64."""
    schedule, mixture = request.param, smooth_mixture()
    predict = predictor(mixture, schedule)
    x = mixture.noised(900, schedule).sample(32, generator())
    times = solvers.time_grid(schedule, 1502, "logsnr", 900, 20)
    exact = solvers.last(solvers.dpm_singlestep(predict, x, schedule, times, order=3))
    return schedule, predict, x, exact


@pytest.mark.parametrize("solver, options, slope, steps", CONVERGENCE)
def test_order_of_convergence(problem, solver, options, slope, steps):
    """The error falls as steps^-order: the slope in a log-log plot, to within .1."""
    schedule, predict, x, exact = problem
    errors = []
    for n in steps:
        times = solvers.time_grid(schedule, n, "logsnr", 900, 20)
        end = solvers.last(solvers.SOLVERS[solver](predict, x, schedule, times, **options))
        errors.append(rms(end - exact))
    found = math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])
    assert found == pytest.approx(slope, abs=0.1)


@pytest.mark.parametrize("solver, within", [
    ("ddim", 0.02), ("dpm++2m", 1e-4), ("dpm++fast", 1e-5)])
def test_one_gaussian_is_solved_as_its_closed_form_says(solver, within):
    """For N(m, c) the ODE moves a point so that its standardised value stays the same."""
    gaussian = GaussianMixture([1.0], [[0.7]], stds=0.3)
    start, end = (gaussian.noised(t, SCALED) for t in (900, 20))
    x = start.sample(16, generator())
    exact = end.mean() + (x - start.mean()) * (end.cov() / start.cov()).sqrt().squeeze()
    times = solvers.time_grid(SCALED, 200, "logsnr", 900, 20)
    got = solvers.last(solvers.SOLVERS[solver](predictor(gaussian, SCALED), x, SCALED, times))
    assert rms(got - exact) < within
    assert rms(x - exact) > 0.5  # it had some way to go


# ---- the official plan -------------------------------------------------------------------------


@pytest.mark.parametrize("steps, orders", [
    (50, [3] * 16 + [2]), (25, [3] * 8 + [1]), (20, [3] * 6 + [2]), (48, [3] * 15 + [2, 1]),
    (1, [1]), (2, [2]), (3, [2, 1]), (4, [3, 1]), (0, [])])
def test_official_orders(steps, orders):
    assert solvers.singlestep_orders(steps) == orders


@pytest.mark.parametrize("steps", [50, 25, 20, 48])
def test_official_plan_feeds_the_network_the_whole_grid(steps):
    predict, times = Recorder(), solvers.time_grid(SCALED, steps, end=1)
    x = torch.ones(1, 2, dtype=torch.float64)
    seen = [t for t, _ in solvers.dpm_singlestep(predict, x, SCALED, times)]
    assert len(predict.times) == steps
    assert predict.times == pytest.approx([1000 - i * 999 / steps for i in range(steps)])
    ends = torch.tensor(solvers.singlestep_orders(steps)).cumsum(0)
    assert seen == [times[i] for i in ends]
    assert seen[-1] == 1


@pytest.mark.parametrize("order", [1, 2, 3])
def test_singlestep_formulas(order):
    """One step of each order by the formulas of the paper, written with h, r1 and r2."""
    predict, x = Recorder(), torch.linspace(-1, 1, 4, dtype=torch.float64)
    nodes = [700.0, 500.0, 350.0, 300.0][: order + 1]
    lam, alpha, sigma = (f(torch.tensor(nodes).double()).tolist()
                         for f in (SCALED.lambda_, SCALED.alpha, SCALED.sigma))

    def data(x, i):
        return (x - sigma[i] * predict(x, torch.tensor(nodes[i]).double())) / alpha[i]

    def step(i):  # from node 0 to node i, D held
        return sigma[i] / sigma[0] * x - alpha[i] * (math.exp(lam[0] - lam[i]) - 1) * d0

    h, d0, end = lam[-1] - lam[0], data(x, 0), len(nodes) - 1
    expected = step(end)
    if order > 1:
        r1, d1 = (lam[1] - lam[0]) / h, data(step(1), 1)
    if order == 2:
        expected = expected - alpha[2] * (math.exp(-h) - 1) * (d1 - d0) / (2 * r1)
    if order == 3:
        r2 = (lam[2] - lam[0]) / h
        u = (math.exp(-r2 * h) - 1) / (r2 * h) + 1
        d2 = data(step(2) + r2 / r1 * alpha[2] * u * (d1 - d0), 2)
        expected = expected + alpha[3] / r2 * ((math.exp(-h) - 1) / h + 1) * (d2 - d0)
    run = solvers.dpm_singlestep(predict, x, SCALED, [*nodes, 100.0], order)
    t, got = next(run)  # the plan is one step of this order, and then one of order 1
    assert t == nodes[-1]
    torch.testing.assert_close(got, expected)


# ---- relations between solvers -----------------------------------------------------------------


@pytest.mark.parametrize("spacing", solvers.SPACINGS)
def test_first_order_solvers_are_ddim(spacing):
    x = torch.randn(3, 4, generator=generator()).double()
    times = solvers.time_grid(SCALED, 9, spacing, end=1)
    ddim = [s for _, s in solvers.ddim(Recorder(), x, SCALED, times)]
    multi = [s for _, s in solvers.dpm_multistep(Recorder(), x, SCALED, times, order=1)]
    single = [s for _, s in solvers.dpm_singlestep(Recorder(), x, SCALED, times, order=1)]
    torch.testing.assert_close(multi, ddim)
    torch.testing.assert_close(single, ddim)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++2m"])
def test_a_step_to_zero_gives_the_data_prediction(solver):
    predict, x = Recorder(), torch.randn(3, 4, generator=generator()).double()
    end = solvers.last(solvers.SOLVERS[solver](predict, x, SCALED, [800, 400, 150, 0]))
    before, t = predict.states[-1], predict.times[-1]
    eps = Recorder()(before, torch.tensor(t).double())
    assert t == 150  # the network is never asked at 0
    torch.testing.assert_close(end, SCALED.convert(eps, "eps", "x0", before, t))


@pytest.mark.parametrize("solver", sorted(solvers.SOLVERS))
def test_states_are_yielded_with_their_times_and_keep_their_dtype(solver):
    x, times = torch.zeros(2, 3), [1000.0, 600.0, 300.0, 100.0, 1.0]
    states = list(solvers.SOLVERS[solver](Recorder(), x, SCALED, times))
    expected = [100.0, 1.0] if solver == "dpm++fast" else times[1:]  # orders 3 and 1
    assert [t for t, _ in states] == expected
    assert all(s.dtype == torch.float32 and s.shape == (2, 3) for _, s in states)
    assert torch.equal(x, torch.zeros(2, 3))  # the caller's tensor is left alone


def test_ddim_inverts_itself():
    """Up and down again comes back, with an error of first order in the step."""
    mixture, errors = smooth_mixture(), []
    x = mixture.noised(20, COSINE).sample(32, generator())
    predict = predictor(mixture, COSINE)
    for steps in (50, 100):
        times = solvers.time_grid(COSINE, steps, "logsnr", 900, 20)
        up = list(solvers.ddim_invert(predict, x, COSINE, times))
        assert [t for t, _ in up] == times[-2::-1]
        down = solvers.last(solvers.ddim(predict, up[-1][1], COSINE, times))
        errors.append(rms(down - x))
    assert errors[1] < 0.05 < rms(up[-1][1] - x)
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)


def test_ddim_inversion_finds_the_noise():
    """For one Gaussian the noise a point came from is known: see the closed form above."""
    gaussian = GaussianMixture([1.0], [[0.7]], stds=0.3)
    low, high = gaussian.noised(20, COSINE), gaussian.noised(900, COSINE)
    x = low.sample(16, generator())
    exact = high.mean() + (x - low.mean()) * (high.cov() / low.cov()).sqrt().squeeze()
    times = solvers.time_grid(COSINE, 400, "logsnr", 900, 20)
    found = solvers.last(solvers.ddim_invert(predictor(gaussian, COSINE), x, COSINE, times))
    assert rms(found - exact) < 0.02


def test_inversion_leaves_zero_out():
    predict = Recorder()
    list(solvers.ddim_invert(predict, torch.zeros(1), SCALED, [1000, 500, 10, 0]))
    assert predict.times == [10, 500]


# ---- ancestral sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 500, 1000])
@pytest.mark.parametrize("schedule", [SCALED, COSINE], ids=lambda s: s.name)
def test_a_ddpm_step_is_the_posterior_of_ho_et_al(schedule, n):
    """Equation 7, and beta_t's smaller variance, written with beta and alpha_bar."""
    x, eps = torch.randn(2, 5, 3, generator=generator()).double()
    before, now = schedule.alpha_bar(torch.tensor([n - 1.0, n]).double()).tolist()
    beta = 1 - now / before
    x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - now)
    variance = (1 - before) / (1 - now) * beta
    z = torch.randn(x.shape, generator=generator(7), dtype=torch.float64)
    got = solvers.last(solvers.ddpm(lambda x, t: eps, x, schedule, [n, n - 1], generator(7)))
    torch.testing.assert_close(got, mean + math.sqrt(variance) * z, rtol=1e-6, atol=1e-9)


def test_a_longer_ddpm_step_is_the_posterior_too():
    """q(x_s | x_t, x_0) by Bayes' rule: prior q(x_s | x_0), likelihood q(x_t | x_s)."""
    t, s = 800, 350
    (a_t, a_s), (s_t, s_s) = (f(torch.tensor([t, s]).double()).tolist()
                              for f in (SCALED.alpha, SCALED.sigma))
    x, eps = torch.randn(2, 5, 3, generator=generator()).double()
    x0, a = (x - s_t * eps) / a_t, a_t / a_s
    precision = 1 / s_s**2 + a**2 / (s_t**2 - a**2 * s_s**2)
    mean = (a_s * x0 / s_s**2 + a * x / (s_t**2 - a**2 * s_s**2)) / precision
    z = torch.randn(x.shape, generator=generator(7), dtype=torch.float64)
    got = solvers.last(solvers.ddpm(lambda x, t: eps, x, SCALED, [t, s], generator(7)))
    torch.testing.assert_close(got, mean + z / math.sqrt(precision))


def test_eta_scales_the_noise_and_keeps_the_marginal_variance():
    """With exact eps, x_s is alpha_s x0 + N(0, sigma_s^2) whatever eta."""
    z = torch.randn(5, generator=generator(7), dtype=torch.float64)
    x0, eps = torch.randn(2, 5, generator=generator()).double()
    x = SCALED.perturb(x0, 700, eps)
    sigma = float(SCALED.sigma(torch.tensor(300.0).double()))
    ends = {}
    for eta in (0, 0.5, 1):
        end = solvers.last(solvers.ddim(lambda x, t: eps, x, SCALED, [700, 300], eta, generator(7)))
        ends[eta] = end - SCALED.perturb(x0, 300, torch.zeros_like(eps))
    torch.testing.assert_close(ends[0], sigma * eps)
    # What is left is a eps + b z: solve for both factors, whose squares must sum to sigma^2.
    factors = {eta: torch.linalg.lstsq(torch.stack([eps, z], 1), end[:, None]).solution.squeeze()
               for eta, end in ends.items()}
    for eta, factor in factors.items():
        assert float(factor.square().sum()) == pytest.approx(sigma**2)
        assert float(factor[1]) == pytest.approx(eta * float(factors[1][1]), abs=1e-9)
    assert float(factors[1][1]) > 0.1


def test_ancestral_sampling_recovers_the_mixtures_moments():
    """Mean, variance and shares of the components, each within 4 standard errors.

    A right sampler fails with about one seed in 4,000.  (Its variance is too small by about a
    quarter of a standard error, with this many steps and samples.)
    """
    mixture = GaussianMixture([0.7, 0.3], [[-1.0], [1.0]], stds=[[0.3], [0.5]])
    n, times = 2000, solvers.time_grid(COSINE, 500)
    noise = torch.randn(n, 1, generator=generator()).double()
    run = solvers.ddpm(predictor(mixture, COSINE), noise, COSINE, times, generator(1))
    x = solvers.last(run)
    off = x - mixture.mean()
    for value, exact in [
        (x, mixture.mean()),
        (off.square(), mixture.cov()[0]),
        (mixture.responsibilities(x), mixture.weights),
    ]:
        error = value.mean(0) - exact
        assert (error.abs() < 4 * value.std(0) / math.sqrt(n)).all()


def test_ancestral_sampling_repeats_with_its_generator():
    x, times = torch.zeros(4, 2), [900, 500, 100]
    ends = [solvers.last(solvers.ddpm(Recorder(), x, SCALED, times, generator(seed)))
            for seed in (1, 1, 2)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run, options, times, message", [
    (solvers.dpm_multistep, {"order": 3}, [9, 1], "orders 1 and 2, got order=3"),
    (solvers.dpm_singlestep, {"order": 4}, [9, 1], "orders 1 to 3, got order=4"),
    (solvers.dpm_singlestep, {"order": 0}, [9, 1], "orders 1 to 3, got order=0"),
    (solvers.dpm_singlestep, {}, [9, 0], "must end above t = 0"),
    (solvers.ddim, {"eta": 1.5}, [9, 1], r"eta must lie in \[0, 1\], got 1.5"),
    (solvers.ddim, {"eta": -0.1}, [9, 1], r"eta must lie in \[0, 1\]"),
    (solvers.ddim, {"eta": math.nan}, [9, 1], r"eta must lie in \[0, 1\]"),
    (solvers.ddpm, {}, [1, 9], "only with falling times"),
    (solvers.ddim, {}, [9], "took no step"),
    (solvers.ddpm, {}, [], "took no step"),
    (solvers.dpm_multistep, {}, [9], "took no step"),
    (solvers.dpm_singlestep, {}, [9], "took no step"),
    (solvers.ddim, {}, [1001, 9], r"timesteps must lie in \[0, 1000\]"),
])
def test_what_cannot_be_solved_is_refused(run, options, times, message):
    with pytest.raises(ValueError, match=message):
        solvers.last(run(Recorder(), torch.zeros(2), SCALED, times, **options))


# ---- against diffusers -------------------------------------------------------------------------

# Its index t, a whole number from 0, has the noise of our timestep t + 1.
DIFFUSERS = {"num_train_timesteps": T, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
             "beta_end": 0.0120}


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_that_of_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(**DIFFUSERS, clip_sample=False)
    theirs.set_timesteps(10)
    times = [t + 1 for t in theirs.timesteps.tolist()] + [0]
    x = start = torch.randn(2, 3, generator=generator())
    noise, predict = generator(5), Recorder()
    for t in theirs.timesteps:
        z = torch.randn(x.shape, generator=noise)
        eps = predict(x, t.float() + 1)
        x = theirs.step(eps, t, x, eta=eta, variance_noise=z if eta else None).prev_sample
    ours = solvers.ddim(Recorder(), start, SCALED, times, eta=eta, generator=generator(5))
    torch.testing.assert_close(solvers.last(ours), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2])
def test_dpm_multistep_is_that_of_diffusers(order):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        **DIFFUSERS, solver_order=order, algorithm_type="dpmsolver++", final_sigmas_type="zero")
    theirs.set_timesteps(timesteps=[999, 800, 620, 400, 250, 90, 10])
    times = [t + 1 for t in theirs.timesteps.tolist()] + [0]
    x = start = torch.randn(2, 3, generator=generator())
    predict = Recorder()
    for t in theirs.timesteps:
        x = theirs.step(predict(x, t.float() + 1), t, x).prev_sample
    ours = solvers.dpm_multistep(Recorder(), start, SCALED, times, order)
    torch.testing.assert_close(solvers.last(ours), x, rtol=1e-4, atol=1e-4)


# ---- a two-modality mixture, through tasks and solvers -----------------------------------------

PARTS = (Part("image", (1, 2), clock="image"), Part("text", (1, 1), clock="text"))
N, PERMUTATIONS = 600, 999


def pair_mixture() -> GaussianMixture:
    """Three components in which the text says much about the image, and the other way."""
    return GaussianMixture(
        [0.5, 0.3, 0.2], [[-1.5, 0.0, 1.6], [1.5, 1.0, -0.4], [0.0, -2.0, 0.6]],
        covs=[[[0.30, 0.10, 0.05], [0.10, 0.20, 0.00], [0.05, 0.00, 0.10]],
              [[0.20, 0.00, -0.10], [0.00, 0.20, 0.10], [-0.10, 0.10, 0.20]],
              [[0.10, 0.00, 0.00], [0.00, 0.10, 0.00], [0.00, 0.00, 0.10]]])


def energy_p_value(a: Tensor, b: Tensor, seed: int = 0) -> float:
    """Are two samples (n, d) from one distribution?  A permutation test of the energy distance.

    2 E|a - b| - E|a - a'| - E|b - b'| (Szekely & Rizzo, 2004) is 0 for equal distributions only.
    Under the null all relabellings are equally likely, so P(p <= q) <= q holds exactly: a test that
    refuses at p = .001 raises a false alarm once in 1,000 seeds.
    """
    both = torch.cat([a, b])
    distance = torch.cdist(both, both)                                         # (2n, 2n)
    sign = torch.cat([torch.ones(len(a)), -torch.ones(len(b))]).to(distance)
    shuffle = torch.rand(PERMUTATIONS, len(both), generator=generator(seed)).argsort(1)
    signs = torch.cat([sign[None], sign[shuffle]])                             # (1 + P, 2n)
    energy = -((signs @ distance) * signs).sum(1)
    return float((energy >= energy[0]).double().mean())


def run_task(
    task: str, net, solver: str = "dpm++2m", steps: int = 60, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(a task's samples, exact ones): pairs (N, 3) if a modality is given, else what is sampled."""
    mixture, roles, own = pair_mixture(), roles_of(task), generator(seed)
    data = mixture.sample(N, own)
    given = {"image": data[:, None, :2], "text": data[:, None, 2:]}
    predict = NoisePredictor(net, PARTS, COSINE, roles, given, generator=own)
    state = torch.randn(N, predict.numel, generator=own, dtype=torch.float64)
    times = solvers.time_grid(COSINE, steps, end=1 if solver == "dpm++fast" else 0)
    options = {"generator": own} if solver == "ddpm" else {}
    run = solvers.SOLVERS[solver](predict, state, COSINE, times, **options)
    made = {**given, **predict.unpack(solvers.last(run))}
    kept = [p.name for p in PARTS if roles[p.clock] is not Role.IGNORED]
    return torch.cat([made[name].flatten(1) for name in kept], 1), exact_samples(task, own)


def exact_samples(task: str, own: torch.Generator) -> Tensor:
    mixture = pair_mixture()
    text, image = mixture.marginal([2]).sample(N, own), mixture.marginal([0, 1]).sample(N, own)
    if task == "text-to-image":
        drawn = mixture.conditional([2], text).sample(1, own).squeeze(0)
        return torch.cat([drawn, text], 1)
    if task == "image-to-text":
        drawn = mixture.conditional([0, 1], image).sample(1, own).squeeze(0)
        return torch.cat([image, drawn], 1)
    return {"joint": mixture.sample(N, own), "image": image, "text": text}[task]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_all_tasks_recover_the_exact_distribution(task):
    made, exact = run_task(task, OracleNet(pair_mixture(), PARTS, COSINE))
    assert energy_p_value(made, exact) > 0.001


@pytest.mark.parametrize("solver, steps", [("ddim", 200), ("ddpm", 200), ("dpm++fast", 50)])
def test_all_solvers_recover_the_exact_distribution(solver, steps):
    net = OracleNet(pair_mixture(), PARTS, COSINE)
    assert energy_p_value(*run_task("text-to-image", net, solver, steps)) > 0.001


@pytest.mark.parametrize("task", ["text-to-image", "image-to-text", "image", "text"])
def test_a_swapped_timestep_would_be_noticed(task):
    """The one modality not sampled fed T for 0, or 0 for T: given is ignored, ignored is given."""
    oracle = OracleNet(pair_mixture(), PARTS, COSINE)
    other, = (name for name, role in roles_of(task).items() if role is not Role.SAMPLED)

    def swapped(x, t, data_type):
        return oracle(x, {**t, other: T - t[other]}, data_type)

    assert energy_p_value(*run_task(task, swapped)) == 1 / (PERMUTATIONS + 1)


def test_separate_marginals_are_not_the_joint():
    """What the test above cannot say of the joint task: that its two halves belong together."""
    net = OracleNet(pair_mixture(), PARTS, COSINE)
    apart = torch.cat([run_task("image", net)[0], run_task("text", net, seed=1)[0]], 1)
    assert energy_p_value(apart, exact_samples("joint", generator(2))) == 1 / (PERMUTATIONS + 1)


def test_the_energy_test_has_the_false_alarms_it_states():
    """Equal distributions: of 60 p-values more than 13 below .1 come about once in 500 runs."""
    mixture = pair_mixture()
    draws = [mixture.sample(120, generator(i)).chunk(2) for i in range(60)]
    p = [energy_p_value(a, b, seed=i) for i, (a, b) in enumerate(draws)]
    assert sum(v <= 0.1 for v in p) <= 13
