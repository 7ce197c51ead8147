"""The oracles must be right before anything is measured with them."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from minidiffuser.config import Config, Part
from minidiffuser.oracles import GaussianMixture, OracleNet, smiley
from minidiffuser.pipeline import UniDiffuser
from minidiffuser.schedule import PREDICTIONS, NoiseSchedule, T
from minidiffuser.tasks import roles_of

PARTS = (Part("image", (1, 2), clock="image"), Part("text", (1, 1), clock="text"))
WEIGHTS = [0.5, 0.3, 0.2]
MEANS = [[-1.5, 0.0, 1.0], [1.5, 1.0, -1.0], [0.0, -2.0, 0.5]]
COVS = [
    [[0.30, 0.10, 0.05], [0.10, 0.20, 0.00], [0.05, 0.00, 0.10]],
    [[0.20, 0.00, -0.10], [0.00, 0.20, 0.10], [-0.10, 0.10, 0.40]],
    [[0.10, 0.00, 0.00], [0.00, 0.10, 0.00], [0.00, 0.00, 0.10]],
]


@pytest.fixture
def mixture() -> GaussianMixture:
    return GaussianMixture(WEIGHTS, MEANS, covs=COVS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the mixture -------------------------------------------------------------------------------


def test_log_prob_is_the_mixtures(mixture):
    reference = MixtureSameFamily(
        Categorical(torch.tensor(WEIGHTS).double()),
        MultivariateNormal(torch.tensor(MEANS).double(), torch.tensor(COVS).double()),
    )
    x = torch.randn(50, 3, generator=generator()).double()
    torch.testing.assert_close(mixture.log_prob(x), reference.log_prob(x), rtol=1e-6, atol=1e-6)


def test_stds_are_a_diagonal_covariance():
    stds = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    a = GaussianMixture([1, 3], [[0, 0], [1, 1]], stds=stds)
    b = GaussianMixture([1, 3], [[0, 0], [1, 1]], covs=torch.diag_embed(stds**2))
    assert torch.equal(a.covs, b.covs)
    assert a.weights.tolist() == [0.25, 0.75]
    one_for_all = GaussianMixture([1, 3], [[0, 0], [1, 1]], stds=0.5)
    assert torch.equal(one_for_all.covs, 0.25 * torch.eye(2).double().expand(2, 2, 2))


def test_score_is_the_gradient_of_log_prob(mixture):
    x = torch.randn(20, 3, generator=generator()).double().requires_grad_()
    gradient, = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    torch.testing.assert_close(mixture.score(x.detach()), gradient)


def test_samples_have_the_mean_and_covariance(mixture):
    # 12 z-values, from the samples' own standard errors: one beyond 5 about once in 150,000 runs.
    n = 100_000
    x = mixture.sample(n, generator())
    off = x - mixture.mean()
    assert ((off.mean(0)).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    products = off[:, :, None] * off[:, None, :]                               # (n, 3, 3)
    error = products.mean(0) - mixture.cov()
    assert (error.abs() < 5 * products.std(0) / math.sqrt(n)).all()


def test_samples_have_the_components_in_proportion(mixture):
    """E[p(k | x)] = w_k; 3 z-values: one beyond 5 about once in 600,000 runs."""
    n = 50_000
    share = mixture.responsibilities(mixture.sample(n, generator()))           # (n, 3)
    error = share.mean(0) - mixture.weights
    assert (error.abs() < 5 * share.std(0) / math.sqrt(n)).all()


def test_sampling_repeats_with_the_seed(mixture):
    assert torch.equal(mixture.sample(5, generator(3)), mixture.sample(5, generator(3)))
    assert not torch.equal(mixture.sample(5, generator(3)), mixture.sample(5, generator(4)))


@pytest.mark.parametrize("known", [[2], [0, 1], [1]])
def test_joint_is_marginal_times_conditional(mixture, known):
    x = mixture.sample(30, generator())
    rest = [i for i in range(3) if i not in known]
    product = (mixture.marginal(known).log_prob(x[:, known])
               + mixture.conditional(known, x[:, known]).log_prob(x[:, rest]))
    torch.testing.assert_close(product, mixture.log_prob(x))


def test_marginal_keeps_the_order_asked_for(mixture):
    assert mixture.marginal([2, 0]).mean().tolist() == mixture.mean()[[2, 0]].tolist()
    assert float(mixture.marginal([2, 0]).cov()[0, 1]) == float(mixture.cov()[2, 0])


def test_a_batch_of_conditionals_draws_for_each_value(mixture):
    """Each of 2 x 2 means and variances within 5 standard errors; see above for the odds."""
    n, values = 50_000, torch.tensor([[1.2], [-0.8]]).double()
    conditional = mixture.conditional([2], values)
    x = conditional.sample(n, generator())
    assert x.shape == (n, 2, 2)
    one_by_one = [mixture.conditional([2], v) for v in values]
    torch.testing.assert_close(conditional.mean(), torch.stack([c.mean() for c in one_by_one]))
    off = x - conditional.mean()
    assert (off.mean(0).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    error = off.square().mean(0) - conditional.cov().diagonal(dim1=-2, dim2=-1)
    assert (error.abs() < 5 * off.square().std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("arguments, message", [
    ({"weights": [1.0], "means": [[0.0]]}, "either stds or covs"),
    ({"weights": [1.0], "means": [[0.0]], "stds": 1.0, "covs": [[[1.0]]]}, "either stds or covs"),
    ({"weights": [1.0, 1.0], "means": [[0.0]], "stds": 1.0}, r"\(2,\) and \(1, 1\)"),
    ({"weights": [1.0, -0.5], "means": [[0.0], [1.0]], "stds": 1.0}, "at least 0"),
    ({"weights": [0.0], "means": [[0.0]], "stds": 1.0}, "at least 0"),
    ({"weights": [1.0], "means": [[0.0, 0.0]], "covs": [[[1.0]]]}, r"\(1, 2, 2\), got \(1, 1, 1\)"),
    ({"weights": [1.0], "means": [[0.0]], "stds": 0.0}, "positive definite"),
    ({"weights": [1.0], "means": [[0.0]], "stds": [1.0, 2.0]}, r"\(1, 1\), got \(2,\)"),
    ({"weights": [1.0], "means": [[0.0, 0.0]], "covs": [[[1.0, 2.0], [2.0, 1.0]]]}, "definite"),
    ({"weights": [1.0], "means": [[0.0, 0.0]], "covs": [[[1.0, 0.5], [0.0, 1.0]]]}, "symmetric"),
])
def test_what_is_no_mixture_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**arguments)


def test_data_of_another_dimension_is_refused(mixture):
    with pytest.raises(ValueError, match=r"\(\*, 3\), got \(4, 2\)"):
        mixture.log_prob(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"\(\*, 2\), got \(4, 1\)"):
        mixture.conditional([0, 1], torch.zeros(4, 1))


# ---- under noise -------------------------------------------------------------------------------


def test_noised_is_the_distribution_of_noised_data(mixture):
    """Means and variances, two clocks; 6 z-values: one beyond 5 about once in 300,000 runs."""
    schedule, n = NoiseSchedule(), 100_000
    x0 = mixture.sample(n, generator())
    image = schedule.perturb(x0[:, :2], 300, torch.randn(n, 2, generator=generator(1)))
    text = schedule.perturb(x0[:, 2:], 50, torch.randn(n, 1, generator=generator(2)))
    x = torch.cat([image, text], 1)
    noised = mixture.noised(torch.tensor([[300.0, 300.0, 50.0]]), schedule)
    off = x - noised.mean()
    assert (off.mean(0).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    error = off.square().mean(0) - noised.cov()[0].diagonal()
    assert (error.abs() < 5 * off.square().std(0) / math.sqrt(n)).all()


def test_timesteps_per_batch_sample_and_coordinate_agree(mixture):
    schedule, x = NoiseSchedule(), torch.randn(4, 3, generator=generator()).double()
    one = mixture.eps(x, 321.5, schedule)
    torch.testing.assert_close(mixture.eps(x, torch.full((4,), 321.5), schedule), one)
    torch.testing.assert_close(mixture.eps(x, torch.full((4, 3), 321.5), schedule), one)
    own = mixture.eps(x, torch.tensor([1.0, 10.0, 100.0, 1000.0]), schedule)
    for i, t in enumerate((1.0, 10.0, 100.0, 1000.0)):
        torch.testing.assert_close(own[i], mixture.eps(x[i], t, schedule))


@pytest.mark.parametrize("t_image, t_text", [(400.0, 100.0), (100.0, 400.0), (1000.0, 30.0)])
def test_eps_is_the_mean_of_the_noise_given_the_noisy_pair(mixture, t_image, t_text):
    """E[eps | x_t, y_s] by its definition: an average over x_0, weighted by p(x_t, y_s | x_0).

    The self-normalised average's standard error is estimated from the same draws; each of three
    values within 5 of them (about once in 600,000 runs not, were the estimate normal).
    """
    schedule, t = NoiseSchedule(), torch.tensor([[t_image, t_image, t_text]]).double()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = torch.tensor([0.3, -0.2, 0.4]).double()
    eps = (x - alpha * mixture.sample(400_000, generator())) / sigma           # (n, 3)
    weight = (-0.5 * eps.square().sum(1, keepdim=True)).softmax(0)             # (n, 1)
    mean = (weight * eps).sum(0)
    error = (weight * (eps - mean)).square().sum(0).sqrt()
    assert (error < 0.05).all()  # so that the comparison says something
    assert ((mixture.eps(x, t, schedule)[0] - mean).abs() < 5 * error).all()


# ---- the network -------------------------------------------------------------------------------


def two_clock_inputs(mixture, n: int = 64):
    x = mixture.sample(n, generator())
    return {"image": x[:, None, :2], "text": x[:, None, 2:]}, torch.linspace(5, 995, n).double()


def test_network_at_zero_is_the_conditional_and_at_the_end_the_marginal(mixture):
    schedule = NoiseSchedule("cosine")
    net = OracleNet(mixture, PARTS, schedule)
    x, t = two_clock_inputs(mixture)
    flat = x["image"].flatten(1)

    given = net(x, {"image": t, "text": torch.zeros_like(t)})
    conditional = mixture.conditional([2], x["text"].flatten(1))
    torch.testing.assert_close(given["image"].flatten(1), conditional.eps(flat, t, schedule))
    assert (given["text"] == 0).all()

    noise = {**x, "text": torch.randn(x["text"].shape, generator=generator(1)).double()}
    ignored = net(noise, {"image": t, "text": torch.full_like(t, T)})["image"].flatten(1)
    exact = mixture.marginal([0, 1]).eps(flat, t, schedule)
    torch.testing.assert_close(ignored, exact, rtol=0, atol=1e-3)
    # and neither is the other
    assert (given["image"].flatten(1) - ignored).abs().mean() > 0.05


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_are_of_the_same_answer_in_the_datas_dtype(mixture, prediction):
    schedule = NoiseSchedule()
    x, t = two_clock_inputs(mixture)
    clocks = {"image": t, "text": t.flip(0)}
    eps = OracleNet(mixture, PARTS, schedule)(x, clocks)
    out = OracleNet(mixture, PARTS, schedule, prediction)(x, clocks)
    for name in ("image", "text"):
        back = schedule.convert(out[name], prediction, "eps", x[name], clocks[name])
        torch.testing.assert_close(back, eps[name])
    narrow = OracleNet(mixture, PARTS, schedule, prediction)(
        {k: v.float() for k, v in x.items()}, clocks)
    assert narrow["image"].dtype == torch.float32
    assert narrow["image"].shape == (64, 1, 2)


def test_a_mixture_that_does_not_fit_the_parts_is_refused(mixture):
    with pytest.raises(ValueError, match="the parts have 2 numbers together, the mixture 3"):
        OracleNet(mixture, PARTS[:1], NoiseSchedule())


def test_the_pipeline_samples_from_it(mixture):
    """Means and variances of p(image | text = 1.2) within 5 standard errors, and the solver's own
    error, which is far below."""
    net = OracleNet(mixture, PARTS, NoiseSchedule("cosine"))
    pipe = UniDiffuser(Config(schedule="cosine", prediction="eps"), net, codecs={})
    n, text = 4000, torch.tensor(1.2)
    made = pipe.sample_latents(roles_of("text-to-image"), {"text": text.expand(n, 1, 1)}, n,
                               steps=100, guidance_scale=0.0)
    exact = mixture.conditional([2], text[None])
    off = made["image"].flatten(1) - exact.mean()
    assert (off.mean(0).abs() < 5 * off.std(0) / math.sqrt(n)).all()
    error = off.square().mean(0) - exact.cov().diagonal()
    assert (error.abs() < 5 * off.square().std(0) / math.sqrt(n)).all()


# ---- the face ----------------------------------------------------------------------------------


def test_the_face_is_standardised():
    face = smiley()
    torch.testing.assert_close(face.mean(), torch.zeros(2).double(), atol=1e-12, rtol=0)
    assert float(face.cov().trace()) == pytest.approx(2)
    assert (face.cov() - torch.eye(2)).abs().max() < 0.05  # nearly round, as its noise is


def test_the_face_has_two_eyes_and_smiles():
    face = smiley()
    eyes = face.means[-2:]
    assert eyes[0, 0] < 0 < eyes[1, 0] and (eyes[:, 1] > 0).all()
    mouth = face.means[40:49]
    assert (mouth[:, 1] < 0).all()
    assert mouth[4, 1] < mouth[0, 1] and mouth[4, 1] < mouth[8, 1]  # its corners turn up
    between = torch.stack([eyes.mean(0), torch.zeros(2)])
    assert face.log_prob(eyes).min() > face.log_prob(between).max() + 5
