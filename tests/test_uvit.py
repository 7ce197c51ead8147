"""The network: its size, the place of every token, its blocks against a hand-written reference."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiffuser import uvit
from minidiffuser.config import PRESETS, Part, UViTConfig
from minidiffuser.convert import convert
from minidiffuser.uvit import Block, UViT, attend, timestep_embedding

PARTS = (
    Part("text", (5, 3), clock="text"),
    Part("clip_img", (1, 6), clock="image"),
    Part("z", (3, 4, 8), clock="image", patch=2),  # 2 x 4 patches: height and width differ
)
SMALL = UViTConfig(PARTS, dim=16, depth=4, heads=2, data_types=3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(cfg: UViTConfig = SMALL, seed: int = 0, std: float = 0.1) -> UViT:
    """A network with every parameter drawn anew: zeros and ones would hide mistakes."""
    net = UViT(cfg)
    redraw(net, seed, std)
    return net


@torch.no_grad()
def redraw(module: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Draw every parameter from N(0, std), but for the gain of norms, which is around 1."""
    own = generator(seed)
    for name, parameter in module.named_parameters():
        parameter.normal_(1.0 * ("norm" in name and name.endswith("weight")), std, generator=own)


def inputs(cfg: UViTConfig = SMALL, batch: int = 3, seed: int = 1):
    """Noisy parts and fractional timesteps."""
    own = generator(seed)
    x = {p.name: torch.randn(batch, *p.shape, generator=own) for p in cfg.parts}
    t = {c: 1000 * torch.rand(batch, generator=own) for c in cfg.clocks}
    return x, t


def flat(out: dict[str, Tensor]) -> Tensor:
    return torch.cat([o.flatten(1) for o in out.values()], dim=1)


def replace(cfg: UViTConfig = SMALL, **changes) -> UViTConfig:
    return dataclasses.replace(cfg, **changes)


# ---- size and names ----------------------------------------------------------------------------


def official_shapes(data_types: bool) -> dict[str, tuple[int, ...]]:
    """The released checkpoints' tensors, written out (uvit_v0.pth, uvit_v1.pth)."""
    d = 1536
    block = {"norm2": (d,), "norm3": (d,), "attn.proj": (d, d), "mlp.fc1": (4 * d, d),
             "mlp.fc2": (d, 4 * d)}
    joined = {**block, "norm1": (d,), "skip_linear": (d, 2 * d)}
    modules = {"patch_embed.proj": (d, 4, 2, 2), "text_embed": (d, 64), "text_out": (64, d),
               "clip_img_embed": (d, 512), "clip_img_out": (512, d), "norm": (d,),
               "decoder_pred": (16, d)}
    modules |= {f"mid_block.{k}": v for k, v in block.items()}
    shapes = {"pos_embed": (1, 1104, d), "mid_block.attn.qkv.weight": (3 * d, d)}
    for i in range(15):
        modules |= {f"in_blocks.{i}.{k}": v for k, v in block.items()}
        modules |= {f"out_blocks.{i}.{k}": v for k, v in joined.items()}
        shapes |= {f"{half}_blocks.{i}.attn.qkv.weight": (3 * d, d) for half in ("in", "out")}
    for name, weight in modules.items():
        shapes |= {f"{name}.weight": weight, f"{name}.bias": weight[:1]}
    if data_types:
        shapes |= {"pos_embed_token": (1, 1, d), "token_embedding.weight": (2, d)}
    return shapes


@pytest.mark.parametrize("name, parameters, tensors, tokens", [
    ("unidiffuser-v0", 952_504_912, 416, 1104),
    ("unidiffuser-v1", 952_509_520, 418, 1105),
])
def test_official_presets_are_the_official_network(name, parameters, tensors, tokens):
    cfg = PRESETS[name].network()
    with torch.device("meta"):
        net = UViT(cfg)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert cfg.tokens == tokens
    found = convert(net.state_dict(), "ours", "official", cfg)
    assert len(found) == tensors
    assert {k: tuple(v.shape) for k, v in found.items()} == official_shapes(cfg.data_types > 0)


@torch.no_grad()
def test_fresh_weights_are_drawn_as_the_official_ones():
    net = UViT(replace(dim=64, heads=4))
    net.init_weights(generator())
    for name, parameter in net.named_parameters():
        if "norm" in name:
            assert (parameter == name.endswith("weight")).all(), name
        elif name.startswith("embed.z."):  # a convolution as PyTorch draws it: uniform
            bound = 1 / math.sqrt(3 * 2 * 2)
            assert 0.8 * bound < parameter.abs().max() <= bound, name
        elif name == "data_type_embed.weight":
            assert parameter.std().item() == pytest.approx(1, abs=0.2)
        elif name.endswith("bias") or name == "data_type_pos":
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_fresh_weights_are_repeatable():
    nets = [UViT(SMALL) for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        net.init_weights(generator(seed))
    first, second, other = (torch.cat([p.flatten() for p in n.parameters()]) for n in nets)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# ---- timesteps ---------------------------------------------------------------------------------


def test_timestep_zero_is_ones_then_zeros():
    emb = timestep_embedding(torch.zeros(2, dtype=torch.long), 1536)
    assert emb.dtype == torch.float32
    assert torch.equal(emb, torch.cat([torch.ones(2, 768), torch.zeros(2, 768)], dim=1))


@pytest.mark.parametrize("t", [1.0, 3.5, 980.02, 1000.0])
def test_timestep_embedding_is_cosines_then_sines(t):
    dim = 12
    emb = timestep_embedding(torch.tensor([t]), dim)[0]
    for i in range(dim // 2):
        angle = t * 10_000 ** (-i / (dim // 2))
        # The angle is a float32 product: off by a few of its roundings, of up to 1000 radians.
        assert emb[i].item() == pytest.approx(math.cos(angle), abs=4e-4)
        assert emb[dim // 2 + i].item() == pytest.approx(math.sin(angle), abs=4e-4)


def test_timestep_embedding_tells_fractions_apart():
    a, b = timestep_embedding(torch.tensor([980.0, 980.02]), 64)
    assert (a - b).norm() > 0.01


# ---- tokens ------------------------------------------------------------------------------------


def first_tokens(net: UViT, x, t, data_type=None) -> Tensor:
    """What enters the first block: (B, L, D)."""
    seen = []
    handle = net.in_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(x, t, data_type)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_tokens_stand_in_the_official_order():
    """t_img | t_text | data type | text | clip_img | patches, each with its own position."""
    net = network()
    (x, t), kinds = inputs(), torch.tensor([2, 0, 1])
    seen = first_tokens(net, x, t, kinds)
    clocks = [timestep_embedding(t[c], 16)[:, None] for c in ("image", "text")]
    patches = F.conv2d(x["z"], convert(net.state_dict(), "ours", "official", SMALL)
                       ["patch_embed.proj.weight"], net.embed["z"].bias, stride=2)
    tokens = torch.cat([
        *clocks,
        net.data_type_embed.weight[kinds][:, None],
        x["text"] @ net.embed["text"].weight.T + net.embed["text"].bias,
        x["clip_img"] @ net.embed["clip_img"].weight.T + net.embed["clip_img"].bias,
        patches.flatten(2).transpose(1, 2),  # rows first
    ], dim=1)
    pos = torch.cat([net.pos_embed[:, :2], net.data_type_pos, net.pos_embed[:, 2:]], dim=1)
    assert seen.shape == (3, SMALL.tokens, 16) == (3, 2 + 1 + 5 + 1 + 8, 16)
    torch.testing.assert_close(seen, tokens + pos)


@torch.no_grad()
def test_without_data_types_there_is_no_such_token():
    cfg = replace(data_types=0)
    seen = first_tokens(network(cfg), *inputs(cfg))
    assert seen.shape == (3, 2 + 5 + 1 + 8, 16)


@torch.no_grad()
@pytest.mark.parametrize("clock, place", [("image", 0), ("text", 1)])
def test_a_clock_is_one_token(clock, place):
    net, (x, t) = network(), inputs()
    before = first_tokens(net, x, t)
    after = first_tokens(net, x, {**t, clock: t[clock] + 0.5})
    changed = (before != after).any(-1)                        # (B, L)
    assert changed[:, place].all() and changed.sum() == 3


def test_patches_are_rows_first_and_channels_last_within():
    part = PARTS[2]
    x = torch.randn(2, *part.shape, generator=generator())
    tokens = part.to_tokens(x)
    assert tokens.shape == (2, 8, 12)
    for row in range(2):
        for column in range(4):
            for p1 in range(2):
                for p2 in range(2):
                    found = tokens[:, row * 4 + column, (p1 * 2 + p2) * 3:][:, :3]
                    assert torch.equal(found, x[:, :, 2 * row + p1, 2 * column + p2])
    assert torch.equal(part.from_tokens(tokens), x)


@torch.no_grad()
def test_the_head_writes_each_patch_where_it_came_from():
    """A head that gives row i of a bias puts it at its pixel and channel of every patch."""
    net = network()
    net.head["z"].weight.zero_()
    net.head["z"].bias.copy_(torch.arange(12))
    out = net(*inputs())["z"]
    for p1 in range(2):
        for p2 in range(2):
            for c in range(3):
                assert (out[:, c, p1::2, p2::2] == (p1 * 2 + p2) * 3 + c).all()


@torch.no_grad()
def test_each_head_reads_the_tokens_of_its_part():
    """With all heads the identity, what leaves the last norm is what comes out, part by part."""
    parts = (Part("a", (2, 16), clock="a"), Part("b", (3, 16), clock="b"),
             Part("c", (1, 4, 8), clock="c", patch=4))
    cfg = UViTConfig(parts, dim=16, depth=2, heads=2, data_types=2)
    net = network(cfg)
    for head in net.head.values():
        head.weight.copy_(torch.eye(16))
        head.bias.zero_()
    last = []
    net.norm.register_forward_hook(lambda module, args, out: last.append(out))
    out = net(*inputs(cfg))
    tokens = torch.cat([p.to_tokens(out[p.name]) for p in parts], dim=1)
    assert torch.equal(tokens, last[0][:, 4:])  # after three clocks (c is an image) and the type


# ---- blocks ------------------------------------------------------------------------------------


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def attention(x: Tensor, block: Block, heads: int) -> Tensor:
    """One head after another: rows of qkv are Q, K, V, and within each, head by head."""
    dim = x.shape[-1]
    d, out = dim // heads, []
    qkv = x @ block.attn.qkv.weight.T
    if block.attn.qkv.bias is not None:
        qkv = qkv + block.attn.qkv.bias
    for head in range(heads):
        q, k, v = (qkv[..., n * dim + head * d:][..., :d] for n in range(3))
        if block.attn.qk_norm:
            q, k = (y / (y.pow(2).mean(-1, keepdim=True) + torch.finfo(y.dtype).eps).sqrt()
                    * norm.weight for y, norm in zip((q, k), block.attn.qk_norm, strict=True))
        out.append((q @ k.transpose(1, 2) / math.sqrt(d)).softmax(-1) @ v)
    return torch.cat(out, dim=-1) @ block.attn.proj.weight.T + block.attn.proj.bias


def mlp(x: Tensor, block: Block) -> Tensor:
    h = x @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    h = h * (1 + torch.erf(h / math.sqrt(2))) / 2  # exact GELU
    return h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def post_block(x: Tensor, block: Block, heads: int, skip: Tensor | None) -> Tensor:
    if skip is not None:
        x = torch.cat([x, skip], -1) @ block.skip_linear.weight.T + block.skip_linear.bias
        x = layer_norm(x, block.norm_skip)
    x = layer_norm(x + attention(x, block, heads), block.norm_attn)
    return layer_norm(x + mlp(x, block), block.norm_mlp)


def pre_block(x: Tensor, block: Block, heads: int, skip: Tensor | None) -> Tensor:
    if skip is not None:
        x = torch.cat([x, skip], -1) @ block.skip_linear.weight.T + block.skip_linear.bias
    x = x + attention(layer_norm(x, block.norm_attn), block, heads)
    return x + mlp(layer_norm(x, block.norm_mlp), block)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": True}])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("norm, reference", [("post", post_block), ("pre", pre_block)])
def test_block_is_its_formula(norm, reference: Callable, joined, options):
    block = Block(replace(norm=norm, **options), skip=joined).double()
    redraw(block, std=0.5)
    assert (block.norm_skip is not None) == (joined and norm == "post")
    x, skip = torch.randn(2, 2, 7, 16, generator=generator(), dtype=torch.float64)
    args = (x, skip) if joined else (x,)
    found = block(*args)
    expected = reference(x, block, SMALL.heads, skip if joined else None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_is_its_formula_in_every_type(dtype, grad, autocast):
    """Values and gradients: some types have a path of their own on the CPU."""
    exact = torch.randn(4, 2, 3, 9, 8, generator=generator(), dtype=torch.float64)
    q, k, v, weight = exact.to(dtype).double()  # so that all start from the same numbers
    leaves = [y.to(dtype, copy=True).requires_grad_(grad) for y in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = attend(*leaves)
    reference = [y.requires_grad_() for y in (q, k, v)]
    scores = q @ k.mT / math.sqrt(8)
    expected = (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v
    pairs = [(found, expected)]
    if grad:
        (found * weight.to(found.dtype)).sum().backward()
        (expected * weight).sum().backward()
        pairs += [(a.grad, b.grad) for a, b in zip(leaves, reference, strict=True)]
    rounding = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for a, b in pairs:
        assert (a.double() - b).norm() / b.norm() < 4 * rounding


def test_queries_keys_and_values_are_of_one_type(monkeypatch):
    """The gains of their norms are float32, and would take two of the three along."""
    seen = []
    monkeypatch.setattr(uvit, "attend", lambda *qkv: seen.extend(qkv) or attend(*qkv))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Block(replace(qk_norm=True)).attn(torch.randn(2, 7, 16, generator=generator()))
    assert [y.dtype for y in seen] == 3 * [torch.bfloat16]


@torch.no_grad()
def stream(norm: str, gain: float) -> list[Tensor]:
    """What leaves each block of a fresh network whose matrices are ``gain`` times as large."""
    net = UViT(replace(norm=norm, data_types=0, depth=8))
    net.init_weights(generator())
    for block in (*net.in_blocks, net.mid_block, *net.out_blocks):
        for name, parameter in block.named_parameters():
            if "norm" not in name:
                parameter *= gain
    seen = []
    for block in (*net.in_blocks, net.mid_block, *net.out_blocks):
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    net(*inputs(net.cfg))
    return seen


def test_post_norm_holds_the_stream_and_pre_norm_lets_it_grow():
    for out in stream("post", gain=50):
        assert out.mean(-1).abs().max() < 1e-5
        assert out.var(-1, unbiased=False) == pytest.approx(1, abs=1e-3)
    sizes = [out.pow(2).mean().item() for out in stream("pre", gain=50)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 100 * sizes[0]


def test_key_and_query_norm_makes_attention_blind_to_their_scale():
    x = torch.randn(2, 7, 16, generator=generator())
    for qk_norm in (True, False):
        block = Block(replace(qk_norm=qk_norm))
        redraw(block)
        with torch.no_grad():
            before = block.attn(x)
            block.attn.qkv.weight[:32] *= 50  # Q and K
            after = block.attn(x)
        assert torch.allclose(before, after, rtol=1e-3, atol=1e-4) == qk_norm


# ---- long skips --------------------------------------------------------------------------------


def test_the_first_block_out_reads_the_last_block_in():
    net = network(replace(depth=6))
    left, read = [], []
    for block in net.in_blocks:
        block.register_forward_hook(lambda module, args, out: left.append(out))
    for block in net.out_blocks:
        block.register_forward_pre_hook(lambda module, args: read.append(args[1]))
    net(*inputs())
    assert len(left) == len(read) == 3
    assert all(a is b for a, b in zip(reversed(left), read, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("i", range(3))
def test_each_block_in_reaches_its_mirror_image(i):
    """With every other path cut, a change of one block's output is seen where it should be."""
    net = network(replace(depth=6))
    dim = SMALL.dim
    for block in net.out_blocks:
        block.skip_linear.weight[:, dim:] = 0  # no skips, but for
    mirror = net.out_blocks[2 - i]
    mirror.skip_linear.weight[:, :dim] = 0     # one that reads nothing else
    mirror.skip_linear.weight[:, dim:] = torch.eye(dim)
    left, entered = [], []
    net.in_blocks[i].register_forward_hook(lambda module, args, out: left.append(out))
    mirror.skip_linear.register_forward_hook(lambda module, args, out: entered.append(out))
    net(*inputs())
    torch.testing.assert_close(entered[0], left[0] + mirror.skip_linear.bias)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"norm": "pre", "qk_norm": True}])
def test_gradients_are_those_of_finite_differences(options):
    """With respect to every input and every parameter, in float64."""
    cfg = replace(depth=2, dim=8, **options)
    net = network(cfg, std=0.3).double()
    x, t = inputs(cfg, batch=2)
    names = list(dict(net.named_parameters()))

    def outputs(*values: Tensor) -> Tensor:
        data = dict(zip(x, values, strict=False))
        weights = dict(zip(names, values[len(x):], strict=True))
        return flat(torch.func.functional_call(net, weights, (data, t, torch.tensor([0, 2]))))

    leaves = [v.detach().double().requires_grad_() for v in (*x.values(), *net.parameters())]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


def gradients(net: UViT, x, t, data_type=None) -> dict[str, Tensor]:
    net.zero_grad()
    flat(net(x, t, data_type)).pow(2).mean().backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"norm": "pre"}, {"qk_norm": True}])
def test_every_parameter_learns(options):
    cfg = replace(**options)
    net = UViT(cfg)
    net.init_weights(generator())
    found = gradients(net, *inputs(cfg), torch.tensor([0, 1, 2]))
    assert [name for name, g in found.items() if g is None or not g.abs().max() > 0] == []


def test_a_sample_teaches_only_its_data_type():
    found = gradients(network(), *inputs(), torch.tensor([1, 1, 1]))["data_type_embed.weight"]
    assert found[1].any() and not found[[0, 2]].any()


def test_checkpointing_changes_memory_alone():
    calls = {}
    for recompute in (False, True):
        net = network(replace(checkpoint=recompute)).train()
        count = []
        net.mid_block.register_forward_pre_hook(lambda module, args, count=count: count.append(1))
        x, t = inputs()
        calls[recompute] = net(x, t), gradients(net, x, t), len(count)
    (out, grads, once), (out_again, grads_again, twice) = calls[False], calls[True]
    assert torch.equal(flat(out), flat(out_again))
    assert all(torch.equal(g, grads_again[name]) for name, g in grads.items())
    assert (once, twice) == (2, 3)  # two forward passes, one of them recomputed backwards


def test_checkpointing_is_for_training():
    net = network(replace(checkpoint=True)).eval()
    count = []
    net.mid_block.register_forward_pre_hook(lambda module, args: count.append(1))
    gradients(net, *inputs())
    assert len(count) == 1


# ---- what goes in, what comes out --------------------------------------------------------------


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet():
    net, (x, t) = network(), inputs(batch=4)
    kinds, order = torch.tensor([0, 2, 1, 2]), torch.tensor([2, 0, 3, 1])
    out = flat(net(x, t, kinds))
    x, t = ({k: v[order] for k, v in table.items()} for table in (x, t))
    torch.testing.assert_close(flat(net(x, t, kinds[order])), out[order])
    alone = flat(net({k: v[:1] for k, v in x.items()}, {k: v[:1] for k, v in t.items()},
                     kinds[order][:1]))
    torch.testing.assert_close(alone, out[order][:1])


@torch.no_grad()
def test_every_output_depends_on_every_input():
    """On both timesteps, all parts and the data type: attention is not masked."""
    net, (x, t), kinds = network(std=0.3), inputs(), torch.tensor([0, 0, 0])
    before = net(x, t, kinds)
    changed = {
        **{name: net({**x, name: x[name] + 1}, t, kinds) for name in x},
        **{clock: net(x, {**t, clock: t[clock] / 2}, kinds) for clock in t},
        "data type": net(x, t, kinds + 1),
    }
    for what, after in changed.items():
        for name, out in after.items():
            furthest = (out - before[name]).flatten(1).abs().amax(1)           # (B,)
            assert furthest.min() > 1e-2, f"{name} does not depend on {what}"


@torch.no_grad()
def test_the_data_type_is_the_last_by_default():
    net, (x, t) = network(), inputs()
    outs = [flat(net(x, t, torch.full((3,), kind))) for kind in range(3)]
    assert torch.equal(flat(net(x, t)), outs[2])
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"norm": "pre"}])
def test_half_precision_is_near_full(options, grad):
    cfg = replace(dim=64, heads=4, **options)
    net = UViT(cfg)
    net.init_weights(generator())
    x, t = inputs(cfg)
    with torch.set_grad_enabled(grad):
        full = flat(net(x, t))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = flat(net(x, t)).float()
    assert half.isfinite().all()
    error = ((half - full).norm() / full.norm()).item()
    # A rounding to bfloat16 is 2^-9 of a number; five blocks make some tens of them in a row.
    assert 2**-12 < error < 8 * 2**-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_outputs_have_the_type_of_the_weights(dtype):
    net, (x, t) = network().to(dtype), inputs()
    out = net({k: v.to(dtype) for k, v in x.items()}, t)
    assert {v.dtype for v in out.values()} == {dtype}
    assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in x.items()}


# ---- mistakes ----------------------------------------------------------------------------------


def bad_calls():
    x, t = inputs()
    kinds = torch.zeros(3, dtype=torch.long)
    short = {k: v for k, v in x.items() if k != "text"}
    return {
        "missing part": (short, t, None, r"parts \['text', 'clip_img', 'z'\].*got parts"),
        "unknown part": ({**x, "audio": x["text"]}, t, None, "audio"),
        "missing clock": (x, {"image": t["image"]}, None, r"clocks \['image', 'text'\]"),
        "unknown clock": (x, {**t, "audio": t["text"]}, None, "audio"),
        "turned image": ({**x, "z": x["z"].mT}, t, None, r"'z' must be \(3, 3, 4, 8\).*8, 4\)"),
        "another batch": ({**x, "z": x["z"][:2]}, t, None, r"'z' must be \(3, 3, 4, 8\)"),
        "one timestep": (x, {**t, "text": t["text"][:1]}, None, r"'text' must be \(3,\).*\(1,\)"),
        "timestep column": (x, {**t, "image": t["image"][:, None]}, None, r"got \(3, 1\)"),
        "high data type": (x, t, kinds + 3, r"\[0, 3\), got \[3, 3, 3\]"),
        "low data type": (x, t, kinds - 1, r"\[0, 3\), got \[-1"),
        "one data type": (x, t, kinds[:1], r"data_type must be \(3,\) integers, got \(1,\)"),
        "real data type": (x, t, kinds.float(), "integers, got .*float32"),
    }


@pytest.mark.parametrize("what", bad_calls())
def test_bad_calls_are_explained(what):
    x, t, kinds, message = bad_calls()[what]
    with pytest.raises(ValueError, match=message):
        network()(x, t, kinds)


def test_a_data_type_is_refused_by_a_network_without():
    net = network(replace(data_types=0))
    with pytest.raises(ValueError, match="has no data types"):
        net(*inputs(), torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("changes, message", [
    ({"depth": 5}, "depth must be even.*got 5"),
    ({"depth": 0}, "depth must be even and at least 2.*got 0"),
    ({"heads": 3}, "dim=16 must be a multiple of 2 x heads = 6"),
    ({"heads": 0}, "dim=16"),
    ({"dim": 18}, "dim=18"),
    ({"norm": "sandwich"}, r"\('pre', 'post'\), got 'sandwich'"),
    ({"parts": ()}, "at least one"),
    ({"parts": (PARTS[0], PARTS[0])}, r"names of their own, got \['text', 'text'\]"),
])
def test_bad_networks_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(**changes)


@pytest.mark.parametrize("shape, patch, message", [
    ((3, 4, 6), 4, "patches of 4 do not tile 4 x 6"),
    ((3, 4, 4), 0, "patches of 0"),
    ((5,), 1, r"\(L, D\) or \(C, H, W\), got \(5,\)"),
    ((0, 4), 1, r"got \(0, 4\)"),
])
def test_bad_parts_are_explained(shape, patch, message):
    with pytest.raises(ValueError, match=message):
        Part("x", shape, clock="x", patch=patch)
