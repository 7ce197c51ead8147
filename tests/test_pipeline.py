"""The public face: tasks, seeds, solvers, what chains them, and models on disk."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import TOY, random_net
from torch import nn

from minidiffuser import UniDiffuser, checkpoints, pipeline, solvers
from minidiffuser.codecs import Codec, PCACodec
from minidiffuser.pipeline import find_model, make_codecs, slerp
from minidiffuser.schedule import NoiseSchedule
from minidiffuser.tasks import Role, make_roles, roles_of

FAST = {"steps": 4}
PROMPT = "red apple"


@pytest.fixture(scope="module")
def apple(tables):
    images, captions = tables["train"]
    return Image.fromarray(images[captions.index(PROMPT)])


def flat(images):
    return np.stack([np.asarray(i) for i in images])


def same(a, b):
    """Whether two results, of any task, are the same."""
    if isinstance(a, Image.Image):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ---- the five tasks ------------------------------------------------------------------------------


def is_image(x):
    return isinstance(x, Image.Image) and x.mode == "RGB" and x.size == (16, 16)


def test_each_task_returns_n_of_what_it_says(pipe, apple):
    for n in (1, 3):
        images = pipe.text_to_image(PROMPT, n=n, **FAST)
        assert isinstance(images, list) and len(images) == n and all(map(is_image, images))
        texts = pipe.image_to_text(apple, n=n, **FAST)
        assert isinstance(texts, list) and len(texts) == n
        assert all(isinstance(t, str) for t in texts)
        pairs = pipe.joint(n=n, **FAST)
        assert len(pairs) == n and all(is_image(i) and isinstance(t, str) for i, t in pairs)
        assert len(pipe.image(n=n, **FAST)) == len(pipe.text(n=n, **FAST)) == n
        assert is_image(pipe.image(n=n, **FAST)[-1]) and isinstance(pipe.text(**FAST)[0], str)


def test_defaults_are_one_sample_and_seed_0(pipe):
    assert same(pipe.text(), pipe.text(n=1, seed=0))
    assert len(pipe.text_to_image(PROMPT)) == 1


def test_samples_of_one_call_differ(pipe):
    a, b = pipe.text_to_image(PROMPT, n=2, **FAST)
    assert not same(a, b)


def test_an_image_may_be_a_picture_a_path_or_an_array(pipe, apple, tmp_path):
    apple.save(tmp_path / "apple.png")
    forms = [apple, tmp_path / "apple.png", str(tmp_path / "apple.png"), np.asarray(apple),
             np.asarray(apple) / 255, apple.convert("RGBA")]
    found = [pipe.image_to_text(form, n=2, **FAST) for form in forms]
    assert all(f == found[0] for f in found)


def test_what_is_given_matters(pipe, apple):
    images = [pipe.text_to_image(p, guidance_scale=0.0, **FAST) for p in (PROMPT, "blue book")]
    assert not same(*images)
    blank = Image.new("RGB", (16, 16))
    texts = [pipe.image_to_text(i, n=4, guidance_scale=0.0, **FAST) for i in (apple, blank)]
    assert not same(*texts)


def test_guidance_and_steps_matter(pipe):
    plain = pipe.text_to_image(PROMPT, guidance_scale=0.0, steps=4)
    assert not same(plain, pipe.text_to_image(PROMPT, guidance_scale=3.0, steps=4))
    assert not same(plain, pipe.text_to_image(PROMPT, guidance_scale=0.0, steps=9))


@pytest.mark.parametrize("task, sampled, given", [
    ("text_to_image", "image", "text"), ("image_to_text", "text", "image"),
    ("joint", ("image", "text"), None), ("image", ["image"], None), ("text", ["text"], None),
])
def test_all_tasks_are_the_general_form(pipe, apple, task, sampled, given):
    data = {"text": PROMPT, "image": apple, None: None}[given]
    arguments = [] if given is None else [data]
    made = pipe.sample(sampled, {given: data} if given else None, n=2, seed=5, **FAST)
    direct = getattr(pipe, task)(*arguments, n=2, seed=5, **FAST)
    if task == "joint":
        assert same(direct, list(zip(made["image"], made["text"], strict=True)))
    else:
        assert set(made) == {sampled if isinstance(sampled, str) else sampled[0]}
        assert same(direct, *made.values())


def test_n_prompts_give_n_images_in_order(pipe):
    prompts = [PROMPT, "blue book", "dog"]
    given = pipe.encode({"text": prompts}, 3)
    noise = torch.randn(3, *pipe.codecs["image"].shape, generator=torch.Generator().manual_seed(1))
    how = {"guidance_scale": 0.0, **FAST}
    roles = roles_of("text-to-image")
    together = pipe.sample_latents(roles, given, 3, noise={"image": noise}, **how)["image"]
    for i, prompt in enumerate(prompts):
        alone = pipe.sample_latents(roles, pipe.encode({"text": prompt}, 1), 1,
                                    noise={"image": noise[i:i + 1]}, **how)["image"]
        assert torch.allclose(together[i], alone[0], atol=1e-4)
    assert len(pipe.sample("image", {"text": prompts}, 3, **FAST)["image"]) == 3
    assert same(pipe.text_to_image([PROMPT] * 2, n=2, **FAST),
                pipe.text_to_image(PROMPT, n=2, **FAST))


# ---- seeds ---------------------------------------------------------------------------------------

EVERY = {
    "text_to_image": lambda pipe, image, **how: pipe.text_to_image(PROMPT, n=2, **how),
    "image_to_text": lambda pipe, image, **how: pipe.image_to_text(image, n=4, **how),
    "joint": lambda pipe, image, **how: pipe.joint(n=2, **how),
    "image": lambda pipe, image, **how: pipe.image(n=2, **how),
    "text": lambda pipe, image, **how: pipe.text(n=4, **how),
    "vary_image": lambda pipe, image, **how: pipe.vary_image(image, n=2, **how),
    "vary_text": lambda pipe, image, **how: pipe.vary_text(PROMPT, n=4, **how),
    "gibbs": lambda pipe, image, **how: pipe.gibbs(rounds=2, **how),
    "gibbs from": lambda pipe, image, **how: pipe.gibbs(image, rounds=2, **how),
    "ddpm": lambda pipe, image, **how: pipe.text_to_image(PROMPT, solver="ddpm", **how),
    "eta": lambda pipe, image, **how: pipe.image(solver="ddim", eta=0.7, **how),
}


@pytest.mark.parametrize("task", EVERY)
def test_a_seed_repeats_exactly_and_another_differs(pipe, apple, task):
    def made(seed):
        return EVERY[task](pipe, apple, seed=seed, **FAST)

    first = made(3)
    torch.manual_seed(99)  # PyTorch's own generator has no say
    state = torch.get_rng_state()
    assert same(made(3), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(made(4), first)
    assert not same(made(None), made(None))


def test_interpolation_repeats_with_its_seed(pipe, apple):
    ends = apple, Image.new("RGB", (16, 16), "navy")
    first = pipe.interpolate(*ends, n=4, steps=5, seed=3)
    assert len(first) == 4 and all(map(is_image, first))
    assert same(pipe.interpolate(*ends, n=4, steps=5, seed=3), first)


# ---- solvers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [
    {"solver": "ddpm"}, {"solver": "ddim"}, {"solver": "ddim", "eta": 0.5},
    {"solver": "dpm++2m"}, {"solver": "dpm++fast"},
], ids=str)
def test_every_solver_makes_finite_latents(pipe, how):
    for steps in (1, 2, 7):
        z = pipe.sample_latents(roles_of("joint"), n=2, steps=steps, **how)
        assert z["image"].shape == (2, 3, 16, 16) and z["text"].shape == (2, 16, 32)
        assert all(v.isfinite().all() for v in z.values())


def test_all_solvers_are_listed_above():
    assert set(solvers.SOLVERS) == {"ddpm", "ddim", "dpm++2m", "dpm++fast"}


def test_deterministic_solvers_agree_and_noise_makes_others_differ(pipe):
    given = pipe.encode({"text": PROMPT}, 1)

    def end(**how):
        how = {"guidance_scale": 0.0, "steps": 120, "seed": 2, **how}
        return pipe.sample_latents(roles_of("text-to-image"), given, 1, **how)["image"]

    reference = end(solver="ddim", steps=240)
    for solver in ("ddim", "dpm++2m", "dpm++fast"):
        assert (end(solver=solver) - reference).square().mean() < 0.03 * reference.var()
    for how in ({"solver": "ddpm"}, {"solver": "ddim", "eta": 1.0}):
        assert (end(**how) - reference).square().mean() > 0.2 * reference.var()
    assert torch.equal(end(solver="ddpm"), end(solver="ddim", eta=1.0))


@pytest.mark.parametrize("solver, steps, calls", [
    ("ddpm", 6, 6), ("ddim", 6, 6), ("dpm++2m", 6, 6), ("dpm++fast", 6, 6),
])
def test_steps_are_network_calls(pipe, monkeypatch, solver, steps, calls):
    seen, forward = [], pipe.net.forward
    monkeypatch.setattr(pipe.net, "forward", lambda *a: seen.append(a) or forward(*a))
    pipe.text_to_image(PROMPT, steps=steps, solver=solver)
    assert len(seen) == calls


def test_where_it_starts_can_be_given(pipe):
    roles, n = roles_of("text"), 2
    noise = {"text": torch.randn(n, 16, 32, generator=torch.Generator().manual_seed(0))}
    how = {"solver": "ddim", "guidance_scale": 0.0, "redraw": False, **FAST}
    a, b = (pipe.sample_latents(roles, n=n, noise=noise, seed=0, **how)["text"] for _ in range(2))
    moved = {"text": noise["text"] + 1}
    assert torch.equal(a, b)
    assert not torch.equal(a, pipe.sample_latents(roles, n=n, noise=moved, seed=0, **how)["text"])


# ---- chains of tasks -----------------------------------------------------------------------------


class Spy(Codec):
    """A codec that counts, around another."""

    def __init__(self, codec):
        self.codec, self.encoded, self.decoded = codec, 0, 0
        self.shape = codec.shape

    def encode(self, items):
        self.encoded += 1
        return self.codec.encode(items)

    def decode(self, z):
        self.decoded += 1
        return self.codec.decode(z)


@pytest.fixture
def watched(pipe):
    """A pipeline whose codecs count, and that notes what each task was given and made."""
    spied = UniDiffuser(pipe.cfg, pipe.net, {n: Spy(c) for n, c in pipe.codecs.items()})
    spied.calls, sample = [], spied.sample_latents

    def noted(roles, given=None, n=1, **how):
        made = sample(roles, given, n, **how)
        spied.calls.append((roles, given, made, how))
        return made

    spied.sample_latents = noted
    return spied


def sampled(roles):
    return {name for name, role in roles.items() if role is Role.SAMPLED}


def counts(pipe):
    return {name: (c.encoded, c.decoded) for name, c in pipe.codecs.items()}


@pytest.mark.parametrize("name, other", [("image", "text"), ("text", "image")])
def test_variation_stays_in_latents(watched, apple, name, other):
    data = {"image": apple, "text": PROMPT}[name]
    made = getattr(watched, f"vary_{name}")(data, n=3, **FAST)
    assert len(made) == 3
    assert counts(watched) == {name: (1, 1), other: (0, 0)}
    (there, given, between, how), (back, given_back, _, how_back) = watched.calls
    assert sampled(there) == {other} and sampled(back) == {name}
    assert torch.equal(given[name], watched.codecs[name].encode([data] * 3))
    assert torch.equal(given_back[other], between[other])  # not decoded and encoded again
    assert how["seed"] != how_back["seed"]


def test_gibbs_stays_in_latents(watched):
    chain = watched.gibbs(rounds=3, n=2, **FAST)
    assert [len(pairs) for pairs in chain] == [2, 2, 2]
    assert counts(watched) == {"image": (0, 3), "text": (0, 3)}
    assert [sampled(roles) for roles, *_ in watched.calls] == [
        {"image"}, {"text"}, {"image"}, {"text"}, {"image"}, {"text"}, {"image"}]
    for (_, _, made, _), (_, given, _, _) in zip(watched.calls, watched.calls[1:], strict=False):
        assert made.keys() == given.keys()
        assert all(torch.equal(made[k], given[k]) for k in made)
    seeds = [how["seed"] for *_, how in watched.calls]
    assert len(set(seeds)) == len(seeds)
    # The pairs are what was sampled, each image with the caption it was drawn from.
    for i, pairs in enumerate(chain):
        text, image = watched.calls[2 * i + 1][2]["text"], watched.calls[2 * i + 2][2]["image"]
        assert [t for _, t in pairs] == watched.codecs["text"].decode(text)
        assert same([p for p, _ in pairs], watched.codecs["image"].decode(image))


def test_gibbs_starts_from_an_image(watched, apple):
    chain = watched.gibbs(apple, rounds=1, n=2, **FAST)
    assert len(chain) == 1 and len(chain[0]) == 2
    assert counts(watched)["image"] == (1, 1)
    given = watched.calls[0][1]["image"]
    assert torch.equal(given, watched.codecs["image"].encode([apple] * 2))


# ---- interpolation -------------------------------------------------------------------------------


class Linear(nn.Module):
    """A network that predicts ``eps = gain(t_image) x``: its ODE is known in closed form."""

    def __init__(self, gain):
        super().__init__()
        self.cfg, self.gain = TOY.network(), gain

    def forward(self, x, t, data_type=None):
        gain = self.gain(t["image"])
        return {name: gain.view(-1, *[1] * (v.ndim - 1)) * v for name, v in x.items()}


CERTAIN = Linear(torch.zeros_like)            # all is signal: x_t = alpha x_0, exactly
GAUSSIAN = Linear(NoiseSchedule("cosine").sigma)  # data is N(0, I): the ODE leaves every x as it is


@pytest.mark.parametrize("net, steps, off", [(CERTAIN, 50, 1), (GAUSSIAN, 400, 2)])
def test_the_ends_of_an_interpolation_are_the_images(codecs, tables, net, steps, off):
    exact = UniDiffuser(TOY.replace(prediction="eps"), net, codecs)
    a, b = tables["train"][0][[10, 900]]
    path = flat(exact.interpolate(a, b, n=3, steps=steps)).astype(int)
    assert np.abs(path[0] - a).max() <= off and np.abs(path[2] - b).max() <= off
    assert np.abs(path[1] - a).max() > 50 and np.abs(path[1] - b).max() > 50


def test_the_way_between_is_a_slerp_of_the_noises(codecs, tables):
    exact = UniDiffuser(TOY.replace(prediction="eps"), GAUSSIAN, codecs)
    ends = list(tables["train"][0][[10, 900]])
    z = codecs["image"].encode(ends)  # under this network also the noise they come from
    path = flat(exact.interpolate(*ends, n=5, steps=400)).astype(int)
    for i, weight in enumerate((0, 0.25, 0.5, 0.75, 1)):
        between = slerp(z[0].flatten(), z[1].flatten(), weight).view(1, 3, 16, 16)
        expected = flat(codecs["image"].decode(between))[0].astype(int)
        assert np.abs(path[i] - expected).max() <= 3


def test_captions_are_mixed_along_the_way(pipe, apple, monkeypatch):
    given, predictor = [], pipe._predictor
    monkeypatch.setattr(pipe, "_predictor",
                        lambda roles, data: given.append(data["text"]) or predictor(roles, data))
    pipe.interpolate(apple, Image.new("RGB", (16, 16), "navy"), n=3, steps=3)
    ends, mixed = given
    assert not torch.equal(ends[0], ends[1])
    assert torch.allclose(mixed, torch.stack([ends[0], ends.mean(0), ends[1]]), atol=1e-4)


def test_slerp_keeps_the_length_and_turns_evenly():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, generator=generator)
    a, b = a / a.norm(), b / b.norm()
    points = torch.stack([slerp(a, b, w / 8) for w in range(9)])
    assert torch.allclose(points[0], a, atol=1e-6) and torch.allclose(points[-1], b, atol=1e-6)
    assert torch.allclose(points.norm(dim=1), torch.ones(9), atol=1e-5)
    turns = (points[1:] * points[:-1]).sum(1)
    assert torch.allclose(turns, turns[0].expand(8), atol=1e-5)
    # Gaussian noise stays about as long as Gaussian noise is; a straight line would fall short.
    a, b = torch.randn(2, 5000, generator=generator)
    assert slerp(a, b, 0.5).square().mean() == pytest.approx(1, abs=0.06)
    assert torch.lerp(a, b, 0.5).square().mean() < 0.6


def test_slerp_of_a_noise_with_itself_is_itself():
    a = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(a, a, 0.3), a)


# ---- models on disk ------------------------------------------------------------------------------


def test_a_stored_model_gives_the_same_results(pipe, model_folder, apple):
    again = UniDiffuser.from_pretrained(model_folder)
    assert again.cfg == pipe.cfg
    for task in EVERY:
        assert same(EVERY[task](pipe, apple, seed=1, **FAST),
                    EVERY[task](again, apple, seed=1, **FAST)), task


def test_half_precision_is_the_default_on_disk_only(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float16}
    again = UniDiffuser.from_pretrained(tmp_path)
    assert {p.dtype for p in again.net.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in again.net.parameters()) and not again.net.training
    z = [p.sample_latents(roles_of("joint"), n=1, **FAST)["image"] for p in (pipe, again)]
    assert (z[0] - z[1]).abs().mean() < 0.05 * z[0].std()


def test_a_pca_model_is_stored_too(tables, tmp_path):
    cfg = TOY.replace(image_codec="pca", pca_dim=6, patch=1)
    made = make_codecs(cfg, *tables["train"])
    assert isinstance(made["image"], PCACodec)
    pca = UniDiffuser(cfg, random_net(cfg), made)
    pca.save_pretrained(tmp_path, dtype=torch.float32)
    again = UniDiffuser.from_pretrained(tmp_path)
    assert same(pca.text_to_image(PROMPT, **FAST), again.text_to_image(PROMPT, **FAST))
    assert is_image(pca.image(**FAST)[0])


def test_captions_of_the_config_are_stored_as_utf_8(model_folder):
    stored = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    assert "São" in json.dumps(stored["codecs"]["text"], ensure_ascii=False)


def test_models_are_found_by_name_folder_and_training_run(model_folder, monkeypatch, tmp_path):
    assert find_model(model_folder) == find_model(str(model_folder)) == model_folder
    (tmp_path / "model").symlink_to(model_folder)
    assert find_model(tmp_path) == tmp_path / "model"
    monkeypatch.setattr(checkpoints, "shipped_folders", lambda: [model_folder.parent])
    assert find_model("toy") == model_folder
    with pytest.raises(ValueError, match="no model 'tyo'.* Did you mean 'toy'"):
        find_model("tyo")


def test_writing_a_model_again_is_all_or_nothing(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert set(before) == {"config.json", "model.safetensors", "codecs.safetensors"}

    def half(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "save_file", half)
    other = UniDiffuser(TOY, random_net(TOY, seed=1), pipe.codecs)
    with pytest.raises(ValueError, match="no space left"):
        other.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    monkeypatch.undo()
    other.save_pretrained(tmp_path)
    after = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after["model.safetensors"] != before["model.safetensors"]


def test_gibbs_and_variation_need_two_modalities(pipe):
    assert make_roles(pipe.clocks, ["image"], ["text"]) == roles_of("text-to-image")
    lonely = UniDiffuser(TOY, pipe.net, pipe.codecs)
    lonely.clocks = ("image", "text", "sound")
    with pytest.raises(ValueError, match="two modalities, not .*'sound'"):
        lonely.vary_text(PROMPT)
