"""Roles, the table of network calls they lead to, and guidance."""

import math

import pytest
import torch
from torch import Tensor

from minidiffuser import solvers
from minidiffuser.config import Part
from minidiffuser.oracles import GaussianMixture, OracleNet
from minidiffuser.schedule import PREDICTIONS, NoiseSchedule, T
from minidiffuser.tasks import (
    TASKS,
    NoisePredictor,
    Role,
    make_roles,
    network_calls,
    roles_of,
)

S, G, I = Role.SAMPLED, Role.GIVEN, Role.IGNORED  # noqa: E741
SCHEDULE = NoiseSchedule("scaled-linear")
B = 4
NOW = 543.25  # a timestep between integers

# As in the official model: two parts share the image's clock, and text stands first.
PARTS = (
    Part("text", (8, 16), clock="text"),
    Part("clip_img", (1, 24), clock="image"),
    Part("z", (4, 6, 6), clock="image", patch=2),
)
THREE = (
    Part("image", (3, 8, 8), clock="image", patch=4),
    Part("en", (8, 16), clock="en"),
    Part("zh", (6, 16), clock="zh"),
)


class RecordingNet:
    """Remembers what it is fed.  Every output depends on every part and every timestep."""

    def __init__(self):
        self.fed = []

    def __call__(self, x, t, data_type):
        self.fed.append((x, t, data_type))
        size = sum(v.flatten(1).mean(1) for v in x.values())                   # (B,)
        size = size + sum((i + 1) * v / T for i, v in enumerate(t.values()))
        if data_type is not None:
            size = size + data_type
        return {name: 0.5 * v + size.reshape(-1, *[1] * (v.ndim - 1)) for name, v in x.items()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data_for(parts, seed: int = 1, batch: int = B) -> dict[str, Tensor]:
    own = generator(seed)
    return {p.name: torch.randn(batch, *p.shape, generator=own, dtype=torch.float64) for p in parts}


def evaluate(parts, roles, scale, t=NOW, **options):
    """One evaluation: (network, predictor, state by part, given by part, eps (B, n))."""
    net, given, x = RecordingNet(), data_for(parts, 2), data_for(parts, 3)
    options = {"generator": generator(4), **options}
    predict = NoisePredictor(net, parts, SCHEDULE, roles, given, scale, **options)
    eps = predict(predict.pack(x), torch.tensor(t, dtype=torch.float64))
    return net, predict, x, given, eps


# ---- the table of calls ------------------------------------------------------------------------

# What is fed, call by call.  (state, t), (given, 0) and (noise, T) per modality.
STATE, GIVEN, NOISE = ("state", NOW), ("given", 0), ("noise", 1000)
OFFICIAL = {
    "text-to-image": [{"image": STATE, "text": GIVEN}, {"image": STATE, "text": NOISE}],
    "image-to-text": [{"image": GIVEN, "text": STATE}, {"image": NOISE, "text": STATE}],
    "joint": [{"image": STATE, "text": STATE}, {"image": STATE, "text": NOISE},
              {"image": NOISE, "text": STATE}],
    "image": [{"image": STATE, "text": NOISE}],
    "text": [{"image": NOISE, "text": STATE}],
}
THREE_MODALITIES = [
    # roles of (image, en, zh), and the calls of a guided evaluation
    ((S, S, S), [(STATE, STATE, STATE), (STATE, NOISE, NOISE), (NOISE, STATE, NOISE),
                 (NOISE, NOISE, STATE)]),
    ((S, G, I), [(STATE, GIVEN, NOISE), (STATE, NOISE, NOISE)]),
    ((S, S, G), [(STATE, STATE, GIVEN), (STATE, NOISE, NOISE), (NOISE, STATE, NOISE)]),
    ((S, S, I), [(STATE, STATE, NOISE), (STATE, NOISE, NOISE), (NOISE, STATE, NOISE)]),
    ((G, S, G), [(GIVEN, STATE, GIVEN), (NOISE, STATE, NOISE)]),
    ((I, I, S), [(NOISE, NOISE, STATE)]),
]


def check_calls(parts, evaluation, table) -> None:
    net, _, x, given, _ = evaluation
    (fed, times, _), = net.fed  # one batched network call, whatever the number of estimates
    assert set(fed) == {p.name for p in parts}
    assert set(times) == {p.clock for p in parts}
    noises = []
    for i, call in enumerate(table):
        for p in parts:
            source, t = call[p.clock]
            got = fed[p.name].chunk(len(table))[i]
            assert got.shape == (B, *p.shape)
            assert times[p.clock].chunk(len(table))[i].tolist() == [t] * B
            if source == "noise":
                noises.append(got.flatten())
            else:
                assert torch.equal(got, {"state": x, "given": given}[source][p.name])
    assert sum(len(v) for v in fed.values()) == len(parts) * len(table) * B
    for i, noise in enumerate(noises):  # N(0, I): both tests fail about 2e-5 of right seeds
        n = len(noise)
        assert abs(float(noise.mean())) < 4.5 / math.sqrt(n)
        assert abs(float(noise.var()) - 1) < 4.5 * math.sqrt(2 / (n - 1)) + 9 / n
        assert not any(len(noise) == len(other) and torch.equal(noise, other)
                       for other in noises[:i])


@pytest.mark.parametrize("task", sorted(OFFICIAL))
def test_guided_calls_are_the_official_ones(task):
    check_calls(PARTS, evaluate(PARTS, roles_of(task), 7.0), OFFICIAL[task])


@pytest.mark.parametrize("task", sorted(OFFICIAL))
def test_without_guidance_only_the_conditional_call_is_made(task):
    check_calls(PARTS, evaluate(PARTS, roles_of(task), 0.0), OFFICIAL[task][:1])


@pytest.mark.parametrize("roles, table", THREE_MODALITIES)
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_calls_of_three_modalities(roles, table, scale):
    names = ("image", "en", "zh")
    table = [dict(zip(names, call, strict=True)) for call in table[: None if scale else 1]]
    check_calls(THREE, evaluate(THREE, dict(zip(names, roles, strict=True)), scale), table)


def test_the_table_has_all_tasks():
    assert TASKS.keys() == OFFICIAL.keys()


def test_network_calls_says_the_same_as_roles():
    assert network_calls(roles_of("joint"), guided=True) == [
        {"image": S, "text": S}, {"image": S, "text": I}, {"image": I, "text": S}]
    assert network_calls(roles_of("image"), guided=True) == [{"image": S, "text": I}]
    assert network_calls(roles_of("text-to-image"), guided=False) == [{"image": S, "text": G}]


def test_roles_may_be_plain_strings():
    plain = {"image": "sampled", "text": "given"}
    check_calls(PARTS, evaluate(PARTS, plain, 7.0), OFFICIAL["text-to-image"])


# ---- the state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task, names", [
    ("joint", ["text", "clip_img", "z"]), ("image", ["clip_img", "z"]), ("text", ["text"])])
def test_pack_lays_the_sampled_parts_side_by_side_in_order(task, names):
    x = data_for(PARTS)
    predict = NoisePredictor(RecordingNet(), PARTS, SCHEDULE, roles_of(task), {})
    state = predict.pack(x)
    assert torch.equal(state, torch.cat([x[name].reshape(B, -1) for name in names], 1))
    assert state.shape == (B, predict.numel)
    back = predict.unpack(state)
    assert list(back) == names
    assert all(torch.equal(back[name], x[name]) for name in names)


def test_eps_has_the_states_layout_and_dtype():
    net, predict, x, _, eps = evaluate(PARTS, roles_of("joint"), 0.0)
    (fed, times, _), = net.fed
    out = RecordingNet()(fed, times, None)
    assert torch.equal(eps, predict.pack(out))
    narrow = predict(predict.pack(x).float(), torch.tensor(NOW))
    assert narrow.dtype == torch.float32


# ---- noise of ignored modalities ---------------------------------------------------------------


def ignored_noise(redraw: bool, seed: int = 4) -> list[list[Tensor]]:
    """The text's noise in 3 evaluations of a task with one, and of the two of joint guidance."""
    seen = []
    for task, scale, index in (("image", 0.0, 0), ("joint", 2.0, 1)):
        net = RecordingNet()
        predict = NoisePredictor(net, PARTS, SCHEDULE, roles_of(task), {}, scale,
                                 generator=generator(seed), redraw=redraw)
        for t in (900, 500, 100):
            predict(predict.pack(data_for(PARTS, t)), torch.tensor(float(t)))
        calls = len(predict.calls)
        seen.append([fed["text"].chunk(calls)[index] for fed, _, _ in net.fed])
    return seen


def test_noise_is_fresh_at_each_evaluation():
    for a, b, c in ignored_noise(redraw=True):
        assert not torch.equal(a, b)
        assert not torch.equal(b, c)
        # and independent: correlations of n pairs, |r| sqrt(n) < 4.5 but once in 150,000 seeds
        assert abs(float((a * b).mean())) * math.sqrt(a.numel()) < 4.5


def test_noise_is_kept_where_a_fixed_function_is_asked_for():
    for a, b, c in ignored_noise(redraw=False):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


@pytest.mark.parametrize("redraw", [True, False])
def test_calls_that_ignore_the_same_modality_have_noise_of_their_own(redraw):
    net = RecordingNet()
    joint = NoisePredictor(net, THREE, SCHEDULE, {"image": S, "en": S, "zh": I}, {}, 2.0,
                           generator=generator(4), redraw=redraw)
    for t in (900.0, 500.0):
        joint(joint.pack(data_for(THREE)), torch.tensor(t))
    first, second = (fed["zh"].chunk(3) for fed, _, _ in net.fed)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    assert torch.equal(first[1], second[1]) is not redraw


@pytest.mark.parametrize("redraw", [True, False])
def test_noise_repeats_with_the_seed(redraw):
    first, again, other = (ignored_noise(redraw, seed)[0][0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- guidance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("task", ["joint", "text-to-image", "image-to-text"])
def test_guidance_is_one_plus_s_cond_minus_s_uncond_of_eps(task, prediction):
    scale = 2.5
    net, predict, x, _, eps = evaluate(PARTS, roles_of(task), scale, prediction=prediction)
    (fed, times, _), = net.fed
    calls = len(OFFICIAL[task])
    for p in predict.sampled:
        estimates = []
        for i in range(calls):  # each estimate from a call of its own, as eps
            out = RecordingNet()({k: v.chunk(calls)[i] for k, v in fed.items()},
                                 {k: v.chunk(calls)[i] for k, v in times.items()}, None)
            estimates.append(SCHEDULE.convert(out[p.name], prediction, "eps", x[p.name], NOW))
        alone = next(i for i, call in enumerate(OFFICIAL[task])
                     if i and call[p.clock] == STATE)
        expected = (1 + scale) * estimates[0] - scale * estimates[alone]
        torch.testing.assert_close(predict.unpack(eps)[p.name], expected)
        assert (estimates[0] - estimates[alone]).abs().max() > 0.01


def test_guided_eps_is_the_exact_combination_of_scores():
    """On an oracle: (1 + s) grad log p(x_t | y) - s grad log p(x_t), from the mixture's own blocks.

    Not to the last digit: an ignored modality still has alpha(T) = 5e-5 of its signal.
    """
    mixture, schedule, scale = correlated(), NoiseSchedule("cosine"), 3.0
    parts = (Part("image", (1, 1), clock="image"), Part("text", (1, 1), clock="text"))
    y, x = torch.tensor([[0.8], [-0.4]]).double(), torch.tensor([[0.1], [0.6]]).double()
    predict = NoisePredictor(
        OracleNet(mixture, parts, schedule), parts, schedule, roles_of("text-to-image"),
        {"text": y[:, None]}, scale, generator=generator())
    cond = mixture.conditional([1], y).eps(x, NOW, schedule)
    alone = mixture.marginal([0]).eps(x, NOW, schedule)
    guided = predict(x, torch.tensor(NOW).double())
    torch.testing.assert_close(guided, (1 + scale) * cond - scale * alone, rtol=0, atol=2e-3)
    assert (cond - alone).abs().min() > 0.05


def correlated() -> GaussianMixture:
    return GaussianMixture([0.6, 0.4], [[-1.0, 1.0], [1.0, -0.5]],
                           covs=[[[0.2, 0.1], [0.1, 0.2]], [[0.3, -0.1], [-0.1, 0.2]]])


def independent() -> GaussianMixture:
    """Every pair of two components of each: p(x, y) = p(x) p(y)."""
    return GaussianMixture([0.42, 0.28, 0.18, 0.12], [[-1, 1], [-1, -1], [1, 1], [1, -1]], stds=0.4)


def final_samples(mixture: GaussianMixture, task: str, scale: float) -> Tensor:
    schedule = NoiseSchedule("cosine")
    parts = (Part("image", (1, 1), clock="image"), Part("text", (1, 1), clock="text"))
    predict = NoisePredictor(
        OracleNet(mixture, parts, schedule), parts, schedule, roles_of(task),
        data_for(parts, batch=16), scale, generator=generator())
    state = torch.randn(16, predict.numel, generator=generator(1), dtype=torch.float64)
    times = solvers.time_grid(schedule, 15)
    return solvers.last(solvers.dpm_multistep(predict, state, schedule, times))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_guidance_changes_what_it_should_and_nothing_else(task):
    plain, guided = (final_samples(correlated(), task, scale) for scale in (0.0, 2.0))
    if task in ("image", "text"):  # there is nothing to be guided by
        assert torch.equal(plain, guided)
    else:
        assert (plain - guided).abs().mean() > 0.05


@pytest.mark.parametrize("task", sorted(TASKS))
def test_guidance_towards_what_says_nothing_changes_nothing(task):
    """With independent modalities the conditional estimate is the unconditional one."""
    plain, guided = (final_samples(independent(), task, scale) for scale in (0.0, 2.0))
    torch.testing.assert_close(plain, guided, rtol=0, atol=1e-6)


# ---- data types --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_call_has_each_samples_data_type(task):
    kinds = torch.tensor([0, 1, 1, 0])
    net, *_ = evaluate(PARTS, roles_of(task), 7.0, data_type=kinds)
    assert net.fed[0][2].tolist() == kinds.tolist() * len(OFFICIAL[task])
    net, *_ = evaluate(PARTS, roles_of(task), 7.0)
    assert net.fed[0][2] is None


# ---- making roles ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled, given, roles", [
    (["image"], [], (S, I, I)),
    (["image"], ["en"], (S, G, I)),
    (["en", "image"], ["zh"], (S, S, G)),
    (["image", "en", "zh"], (), (S, S, S)),
])
def test_what_is_neither_sampled_nor_given_is_ignored(sampled, given, roles):
    made = make_roles(("image", "en", "zh"), sampled, given)
    assert made == dict(zip(("image", "en", "zh"), roles, strict=True))


def test_named_tasks_are_copies():
    roles_of("joint")["image"] = I
    assert roles_of("joint") == {"image": S, "text": S}


@pytest.mark.parametrize("sampled, given, message", [
    (["imag"], [], "unknown modality 'imag'. Did you mean 'image'"),
    (["image"], ["txet"], "unknown modality 'txet'. Did you mean 'text'"),
    (["image"], ["image"], r"\['image'\] cannot be both sampled and given"),
    ([], ["text"], r"nothing to sample: name at least one of \['image', 'text'\]"),
])
def test_roles_that_make_no_sense_are_refused(sampled, given, message):
    with pytest.raises(ValueError, match=message):
        make_roles(["image", "text"], sampled, given)


def test_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown task 'text2image'.*'text-to-image'"):
        roles_of("text2image")


# ---- refusals of the predictor -----------------------------------------------------------------


@pytest.mark.parametrize("scale", [-0.5, math.nan, math.inf])
def test_bad_guidance_scales_are_refused(scale):
    with pytest.raises(ValueError, match=f"guidance_scale must be finite.*{scale}"):
        NoisePredictor(RecordingNet(), PARTS, SCHEDULE, roles_of("joint"), {}, scale)


@pytest.mark.parametrize("given, message", [
    ({}, r"'text' is given.*\(B, 8, 16\), got None"),
    ({"text": torch.zeros(B, 16, 8)}, r"\(B, 8, 16\), got \(4, 16, 8\)"),
    ({"text": torch.zeros(8, 16)}, r"\(B, 8, 16\), got \(8, 16\)"),
])
def test_given_data_must_be_there_and_fit(given, message):
    with pytest.raises(ValueError, match=message):
        NoisePredictor(RecordingNet(), PARTS, SCHEDULE, roles_of("text-to-image"), given)


def test_every_part_of_a_given_modality_is_needed():
    with pytest.raises(ValueError, match="'clip_img' is given"):
        NoisePredictor(RecordingNet(), PARTS, SCHEDULE, roles_of("image-to-text"),
                       {"z": torch.zeros(B, 4, 6, 6)})


def test_given_data_must_be_as_many_as_the_samples():
    predict = NoisePredictor(RecordingNet(), PARTS, SCHEDULE, roles_of("text-to-image"),
                             data_for(PARTS, batch=3))
    with pytest.raises(ValueError, match="'text': 3 given for 4 samples"):
        predict(predict.pack(data_for(PARTS)), torch.tensor(5.0))


@pytest.mark.parametrize("roles, message", [
    ({"image": S}, r"\['text', 'image'\] must have a role"),
    ({"image": S, "text": G, "audio": I}, "audio"),
    ({"image": G, "text": I}, "at least one be sampled"),
    ({"image": "sampled", "text": "shown"}, "shown"),
])
def test_roles_must_fit_the_parts(roles, message):
    with pytest.raises(ValueError, match=message):
        NoisePredictor(RecordingNet(), PARTS, SCHEDULE, roles, data_for(PARTS))
