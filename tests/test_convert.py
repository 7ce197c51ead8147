"""Weights: to the official names and diffusers' and back bit for bit, and the same function in all.

The parity tests compare with diffusers' port, whose outputs are those of the official code.
"""

import dataclasses
import itertools
import logging
import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minidiffuser import convert as module
from minidiffuser.config import PRESETS, Part, UViTConfig
from minidiffuser.convert import DIALECTS, convert, convert_file, load_weights
from minidiffuser.uvit import UViT, timestep_embedding

PARTS = (
    Part("text", (5, 6), clock="text"),
    Part("clip_img", (1, 10), clock="image"),
    Part("z", (3, 8, 8), clock="image", patch=2),
)
V0 = UViTConfig(PARTS, dim=24, depth=4, heads=3)
V1 = dataclasses.replace(V0, data_types=2)
TIMES = torch.tensor([0.0, 3.5, 980.02, 1000.0])

# Two programs that do the same sums in another order differ by some roundings of float32, each
# 2^-24 of its number; over five blocks and up to 80 terms a sum, the norm of a result is off by a
# few of them.
FLOAT32 = 16 * 2**-24

both_versions = pytest.mark.parametrize("cfg", [V0, V1], ids=["v0", "v1"])


@torch.no_grad()
def redraw(net: nn.Module, seed: int = 0) -> None:
    """Every parameter anew: a mistake among zeros and ones would not be seen.

    From N(0, 0.1), but for the gain of norms, which is around 1: the signal is to arrive.
    """
    own = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        gain = "norm" in name and name.endswith("weight")
        parameter.normal_(1.0 * gain, 0.1, generator=own)


def network(cfg: UViTConfig, seed: int = 0) -> UViT:
    net = UViT(cfg)
    redraw(net, seed)
    return net


def weights(cfg: UViTConfig, dialect: str, seed: int = 0) -> dict[str, Tensor]:
    return convert(network(cfg, seed).state_dict(), "ours", dialect, cfg)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the larger of the two."""
    return ((a - b).norm() / torch.maximum(a.norm(), b.norm())).item()


# ---- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [
    V0, V1,
    dataclasses.replace(V1, qkv_bias=True),
    dataclasses.replace(V0, dim=32, depth=2, heads=4, mlp_ratio=2.0),
    dataclasses.replace(V0, parts=(*PARTS[:2], Part("z", (3, 8, 8), clock="image", patch=4))),
], ids=["v0", "v1", "qkv bias", "other size", "larger patches"])
def test_round_trips_are_exact(cfg):
    official = weights(cfg, "official")
    state, route = official, ["official", "ours", "diffusers", "ours", "diffusers", "official"]
    for source, target in itertools.pairwise(route):
        state = convert(state, source, target, cfg)
    assert same(state, official)
    assert list(state) == list(official)
    assert all(tensor.is_contiguous() for tensor in official.values())
    network(cfg, seed=1).load_state_dict(convert(state, "official", "ours", cfg), strict=True)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_to_the_same_dialect_nothing_changes(dialect):
    state = weights(V1, dialect)
    assert same(convert(state, dialect, dialect, V1), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(dtype):
    ours = {name: tensor.to(dtype) for name, tensor in network(V1).state_dict().items()}
    there = convert(ours, "ours", "diffusers", V1)
    assert {tensor.dtype for tensor in there.values()} == {dtype}
    assert same(convert(there, "diffusers", "ours", V1), ours)


def test_converting_leaves_the_source_as_it_was():
    state = weights(V1, "official")
    before = {name: tensor.clone() for name, tensor in state.items()}
    convert(state, "official", "diffusers", V1)
    assert same(state, before)


# ---- each rearrangement, by hand ---------------------------------------------------------------


@torch.no_grad()
def test_the_patch_embedding_is_the_official_convolution():
    net = network(V1)
    official = convert(net.state_dict(), "ours", "official", V1)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = torch.conv2d(z, official["patch_embed.proj.weight"],
                            official["patch_embed.proj.bias"], stride=2)
    found = net.embed["z"](PARTS[2].to_tokens(z))
    torch.testing.assert_close(found, expected.flatten(2).mT)


def test_rows_of_qkv_are_query_key_and_value():
    official, diffusers = weights(V1, "official"), weights(V1, "diffusers")
    qkv = official["out_blocks.1.attn.qkv.weight"]
    prefix = "transformer.transformer_out_blocks.1.block.attn1"
    for i, name in enumerate("qkv"):
        assert torch.equal(diffusers[f"{prefix}.to_{name}.weight"], qkv[24 * i:24 * (i + 1)])


def test_the_copy_that_is_never_read_is_filled_and_dropped():
    state = weights(V1, "diffusers")
    for kind in ("weight", "bias"):
        live, dead = f"vae_img_in.proj.{kind}", f"transformer.pos_embed.proj.{kind}"
        assert torch.equal(state[live], state[dead])
        assert state[live].data_ptr() != state[dead].data_ptr()  # or neither could be trained
        ours = convert({**state, dead: state[dead] + 1}, "diffusers", "ours", V1)
        assert same(ours, network(V1).state_dict())


def test_norms_are_not_exchanged():
    """All have one shape: only names tell them apart."""
    official, ours = weights(V1, "official"), network(V1).state_dict()
    for there, here in (("norm1", "norm_skip"), ("norm2", "norm_attn"), ("norm3", "norm_mlp")):
        assert torch.equal(official[f"out_blocks.0.{there}.weight"],
                           ours[f"out_blocks.0.{here}.weight"])


# ---- parity with diffusers ---------------------------------------------------------------------


def diffusers_network(cfg: UViTConfig) -> nn.Module:
    """diffusers' UniDiffuserModel of the same shape."""
    pytest.importorskip("diffusers", reason="parity needs the extra dev")
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity(logging.ERROR)
    try:
        from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel
    except ImportError:  # before 0.34
        from diffusers.pipelines.unidiffuser.modeling_uvit import UniDiffuserModel
    text, clip_img, z = cfg.parts
    return UniDiffuserModel(
        text_dim=text.shape[1], num_text_tokens=text.shape[0], clip_img_dim=clip_img.shape[1],
        in_channels=z.shape[0], out_channels=z.shape[0], sample_size=z.shape[1],
        patch_size=z.patch, num_layers=cfg.depth, num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads, activation_fn="gelu", num_embeds_ada_norm=1000,
        use_data_type_embedding=cfg.data_types > 0,
    ).eval()


def inputs(batch: int = 8, seed: int = 2):
    """Data that need gradients, fractional timesteps in all pairs, and mixed data types."""
    own = torch.Generator().manual_seed(seed)
    x = {p.name: torch.randn(batch, *p.shape, generator=own, requires_grad=True) for p in PARTS}
    t = {"image": TIMES.repeat(2), "text": TIMES.flip(0).repeat_interleave(2)}
    return x, t, torch.arange(batch) % 2


def run_ours(net: UViT, x, t, kinds) -> tuple[Tensor, ...]:
    out = net(x, t, kinds if net.cfg.data_types else None)
    return out["z"], out["clip_img"], out["text"]


def run_theirs(net: nn.Module, x, t, kinds) -> tuple[Tensor, ...]:
    return net(x["z"], x["clip_img"], x["text"], t["image"], t["text"], kinds)


def weighted_sum(outputs: tuple[Tensor, ...]) -> Tensor:
    """A loss that reads every output with a weight of its own."""
    own = torch.Generator().manual_seed(3)
    return sum((o * torch.randn(o.shape, generator=own)).sum() for o in outputs)


def pair(cfg: UViTConfig, change: str | None = None) -> tuple[UViT, nn.Module]:
    """Two networks with the same weights, but for one that may be changed after converting."""
    theirs = diffusers_network(cfg)
    redraw(theirs)
    state = convert(theirs.state_dict(), "diffusers", "ours", cfg)
    if change is not None:
        state[change] = state[change].roll(1, dims=0) if len(state[change]) > 1 else (
            state[change].roll(1, dims=1) if state[change].shape[1] > 1 else state[change].roll(1))
    ours = UViT(cfg)
    ours.load_state_dict(state, strict=True)
    return ours, theirs


@torch.no_grad()
def furthest(ours: UViT, theirs: nn.Module) -> float:
    """The largest distance between outputs, over parts."""
    batch = inputs()
    return max(distance(a, b) for a, b in zip(run_ours(ours, *batch), run_theirs(theirs, *batch),
                                              strict=True))


@both_versions
def test_outputs_are_those_of_diffusers(cfg):
    ours, theirs = pair(cfg)
    assert furthest(ours, theirs) < FLOAT32


@both_versions
def test_ours_to_diffusers_loads_strictly_and_agrees(cfg):
    ours, theirs = network(cfg), diffusers_network(cfg)
    assert furthest(ours, theirs) > 0.1  # not yet
    theirs.load_state_dict(convert(ours.state_dict(), "ours", "diffusers", cfg), strict=True)
    assert furthest(ours, theirs) < FLOAT32


@both_versions
def test_gradients_are_those_of_diffusers(cfg):
    """With respect to every input and every parameter; the weights' own map takes them across."""
    ours, theirs = pair(cfg)
    x, t, kinds = inputs()
    found, expected = [], []
    for net, run, into in ((ours, run_ours, found), (theirs, run_theirs, expected)):
        data = {name: value.detach().clone().requires_grad_() for name, value in x.items()}
        weighted_sum(run(net, data, t, kinds)).backward()
        into.extend([{name: value.grad for name, value in data.items()},
                     {name: p.grad for name, p in net.named_parameters()}])
    dead = [name for name, grad in expected[1].items() if grad is None]
    assert dead == ["transformer.pos_embed.proj.weight", "transformer.pos_embed.proj.bias"]
    for name in dead:
        expected[1][name] = torch.zeros_like(theirs.get_parameter(name))
    across = convert(expected[1], "diffusers", "ours", cfg)
    assert across.keys() == found[1].keys()
    for mine, other in ((found[0], expected[0]), (found[1], across)):
        for name in mine:
            assert other[name].any(), name
            # Backwards there are as many sums again, and some take in the whole batch.
            assert distance(mine[name], other[name]) < 4 * FLOAT32, name


def test_the_data_type_of_diffusers_is_ours():
    """diffusers too takes type 1 when none is named."""
    ours, theirs = pair(V1)
    x, t, _ = inputs()
    with torch.no_grad():
        found = run_ours(ours, x, t, None)
        expected = theirs(x["z"], x["clip_img"], x["text"], t["image"], t["text"])
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < FLOAT32


@pytest.mark.parametrize("name", UViT(V1).state_dict())
def test_parity_is_lost_when_any_tensor_is_changed(name):
    """Rolling one tensor by one place is seen: so the parity above says something of each."""
    ours, theirs = pair(V1, change=name)
    assert furthest(ours, theirs) > 10 * FLOAT32


def test_timestep_embeddings_are_those_of_diffusers():
    pytest.importorskip("diffusers", reason="parity needs the extra dev")
    from diffusers.models.embeddings import Timesteps

    theirs = Timesteps(1536, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(TIMES, 1536), theirs(TIMES))


# ---- strictness --------------------------------------------------------------------------------


def damaged_states():
    state = weights(V1, "official")
    name = "mid_block.mlp.fc1.bias"
    without = {k: v for k, v in state.items() if k != name}
    return {
        "missing": (without, rf"1 missing \({name}\): check the preset"),
        "unexpected": ({**state, "extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
        "renamed": ({**without, "fc1": state[name]}, rf"1 missing \({name}\); 1 unexpected"),
        "shape": ({**state, name: torch.zeros(5)},
                  rf"1 of another shape \({name} \(5,\) instead of \(96,\)\)"),
        "turned": ({**state, "text_embed.weight": state["text_embed.weight"].T.contiguous()},
                   r"text_embed.weight \(6, 24\) instead of \(24, 6\)"),
        "flattened": ({**state, "patch_embed.proj.weight": torch.zeros(24, 12)},
                      r"patch_embed.proj.weight \(24, 12\) instead of \(24, 3, 2, 2\)"),
        "v0": (weights(V0, "official"), r"2 missing \(pos_embed_token, token_embedding.weight\)"),
        "wrapped": ({f"module.{k}": v for k, v in state.items()}, "unexpected .module.pos_embed"),
        "other dialect": (weights(V1, "diffusers"), "it is 'diffusers' by its names"),
        "empty": ({}, r"not this network's 80 tensors .* 80 missing \(pos_embed.*\.\.\.\)"),
    }


@pytest.mark.parametrize("what", damaged_states())
def test_damaged_states_are_explained(what):
    state, message = damaged_states()[what]
    with pytest.raises(ValueError, match=message):
        convert(state, "official", "ours", V1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_checked(dialect):
    state = weights(V0, dialect)
    for name in state:
        with pytest.raises(ValueError, match=rf"1 missing \({name}\)"):
            convert({k: v for k, v in state.items() if k != name}, dialect, dialect, V0)


def test_another_depth_is_refused():
    deeper = dataclasses.replace(V0, depth=6)
    with pytest.raises(ValueError, match="missing .*in_blocks.2"):
        convert(weights(V0, "official"), "official", "ours", deeper)
    with pytest.raises(ValueError, match="unexpected .*in_blocks.2"):
        convert(weights(deeper, "official"), "official", "ours", V0)


@pytest.mark.parametrize("source, target", [("oficial", "ours"), ("ours", "oficial")])
def test_unknown_dialects_are_explained(source, target):
    with pytest.raises(ValueError, match="unknown dialect 'oficial'. Did you mean 'official'"):
        convert({}, source, target, V1)


@pytest.mark.parametrize("cfg, message", [
    (PRESETS["toy"].network(), r"parts text, clip_img and z .*got \['text', 'image'\]"),
    (dataclasses.replace(V1, parts=PARTS[::-1]), r"got \['z', 'clip_img', 'text'\]"),
    (dataclasses.replace(V1, norm="pre"), "norm='pre' and qk_norm=False"),
    (dataclasses.replace(V1, qk_norm=True), "norm='post' and qk_norm=True"),
])
def test_networks_without_official_names_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        convert(UViT(cfg).state_dict(), "ours", "official", cfg)


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture
def small_preset(monkeypatch) -> str:
    """A name for V1, so that no file need hold 952M numbers."""
    class Small:
        network = staticmethod(lambda: V1)

    monkeypatch.setattr(module, "preset", lambda name: {"unidiffuser-v1": Small}[name])
    return "unidiffuser-v1"


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "bin"])
def test_weights_are_read_as_they_were_written(tmp_path, suffix):
    state, path = weights(V1, "official"), tmp_path / f"uvit.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    assert same(load_weights(path), state)


def test_parameters_are_read_as_tensors(tmp_path):
    torch.save(dict(network(V0).named_parameters()), tmp_path / "uvit.pt")
    found = load_weights(str(tmp_path / "uvit.pt"))
    assert same(found, network(V0).state_dict())
    assert not any(tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("source", ["official", "diffusers"])
def test_a_file_goes_there_and_back(tmp_path, small_preset, source):
    state = weights(V1, source)
    torch.save(state, tmp_path / "in.pth")
    ours, back = tmp_path / "new folder" / "ours.safetensors", tmp_path / "back.safetensors"
    convert_file(tmp_path / "in.pth", ours, source, "ours", small_preset)
    assert same(load_file(ours), network(V1).state_dict())
    convert_file(ours, back, "ours", source, small_preset)
    assert same(load_file(back), state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.safetensors", "in.pth",
                                                          "new folder"]
    assert [p.name for p in ours.parent.iterdir()] == ["ours.safetensors"]


def test_a_failure_leaves_what_was_there(tmp_path, small_preset, monkeypatch):
    torch.save(weights(V1, "official"), tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there")

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(ValueError, match=f"cannot write to {tmp_path}: there is no space left"):
        convert_file(tmp_path / "in.pth", out, "official", "ours", small_preset)
    assert out.read_bytes() == b"what was there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]


@pytest.mark.parametrize("preset_name, message", [
    ("unidiffuser-v2", "unknown preset 'unidiffuser-v2'. Did you mean 'unidiffuser-v"),
    ("toy", "only networks of the parts text, clip_img and z"),
])
def test_other_presets_are_refused(tmp_path, preset_name, message):
    torch.save({}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=message):
        convert_file(tmp_path / "in.pth", tmp_path / "out.safetensors", "official", "ours",
                     preset_name)
    assert not (tmp_path / "out.safetensors").exists()


def test_only_safetensors_are_written(tmp_path, small_preset):
    torch.save(weights(V1, "official"), tmp_path / "in.pth")
    with pytest.raises(ValueError, match="out.pth: call it out.safetensors"):
        convert_file(tmp_path / "in.pth", tmp_path / "out.pth", "official", "ours", small_preset)
    assert not (tmp_path / "out.pth").exists()


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_run(tmp_path, legacy):
    path, trace = tmp_path / "uvit.pth", tmp_path / "trace"
    torch.save({"a": torch.zeros(1), "b": Harmful(trace)}, path,
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="uvit.pth is damaged, or holds more than tensors"):
        load_weights(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [
    {"state_dict": {"a": torch.zeros(1)}}, [torch.zeros(1)], torch.zeros(1), {0: torch.zeros(1)},
    {"a": torch.zeros(1), "step": 3},
], ids=["nested", "list", "tensor", "numbered", "step"])
def test_only_flat_dictionaries_of_tensors_are_read(tmp_path, content):
    torch.save(content, tmp_path / "uvit.pth")
    with pytest.raises(ValueError, match="uvit.pth is not a flat dictionary of tensors"):
        load_weights(tmp_path / "uvit.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    path = tmp_path / f"uvit.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(weights(V1, "official"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(ValueError, match=f"uvit.{suffix} is damaged"):
        load_weights(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_damaged_bytes_make_no_other_error(tmp_path, suffix):
    """The header overwritten in many ways: either a ValueError that names the file, or tensors."""
    path = tmp_path / f"uvit.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)({"a": torch.ones(9)}, path)
    whole, own, errors = path.read_bytes(), torch.Generator().manual_seed(0), []
    for _ in range(100):
        found = bytearray(whole)
        for place in torch.randint(0, min(600, len(whole)), (8,), generator=own).tolist():
            found[place] = int(torch.randint(0, 256, (), generator=own))
        path.write_bytes(found)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch wonders at what it reads
                load_weights(path)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > 50
    assert all(str(path) in error for error in errors)


@pytest.mark.parametrize("name", ["uvit.pkl", "uvit", "uvit.ckpt", "uvit.npz"])
def test_other_kinds_of_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=f"{name} is: weights end in .safetensors, .pth, .pt or"):
        load_weights(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*uvit.pth"):
        load_weights(tmp_path / "uvit.pth")
