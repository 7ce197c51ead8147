"""Speed against diffusers' `UniDiffuserModel` at the same size, in one run: writes speed.json.

    python benchmarks/speed.py                 # the preset bench-45m, batch 8, two threads

A training step is forward, backward and an AdamW step, every weight trained; a guided sample is the
forward passes of one text-to-image solver step with guidance: two calls of the network, which go
through it as one batch in either library.  Both run the same inputs with the same weights
(converted), in alternation, and what is reported is the ratio of medians: the machine's own noise
hits both.  It first checks that both compute the same numbers.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minidiffuser.config import PRESETS, UViTConfig
from minidiffuser.convert import convert
from minidiffuser.uvit import UViT


class Ours(nn.Module):
    """Our network, called as diffusers' is."""

    def __init__(self, cfg: UViTConfig):
        super().__init__()
        self.net = UViT(cfg)

    def forward(self, z, clip, text, t_img, t_text):
        """The three predictions."""
        out = self.net({"z": z, "clip_img": clip, "text": text}, {"image": t_img, "text": t_text})
        return out["z"], out["clip_img"], out["text"]


def make_theirs(cfg: UViTConfig) -> nn.Module:
    """diffusers' network of the same shape."""
    from diffusers import UniDiffuserModel

    by_name = {p.name: p for p in cfg.parts}
    return UniDiffuserModel(
        text_dim=by_name["text"].shape[1], clip_img_dim=by_name["clip_img"].shape[1],
        num_text_tokens=by_name["text"].shape[0], num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads, in_channels=4, out_channels=4,
        num_layers=cfg.depth, sample_size=by_name["z"].shape[1], patch_size=by_name["z"].patch,
        activation_fn="gelu", num_embeds_ada_norm=1000, norm_type="layer_norm",
        block_type="unidiffuser", pre_layer_norm=False, use_patch_pos_embed=False,
        ff_final_dropout=True,
    )


def inputs(cfg: UViTConfig, batch: int) -> list[torch.Tensor]:
    """Random inputs for either network."""
    g = torch.Generator().manual_seed(0)
    shapes = {p.name: p.shape for p in cfg.parts}
    data = [torch.randn(batch, *shapes[n], generator=g) for n in ("z", "clip_img", "text")]
    return [*data, *(1000 * torch.rand(batch, generator=g) for _ in range(2))]


def train_step(net: nn.Module, x: list, low: bool) -> Callable[[], None]:
    """One step of training, to be called again and again."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        net.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = sum(o.float().square().mean() for o in net(*x))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def guided_step(net: nn.Module, x: list, low: bool) -> Callable[[], None]:
    """Both calls of a guided prediction, as one batch."""
    doubled = [torch.cat([y, y]) for y in x]

    def step() -> None:
        net.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            net(*doubled)

    return step


def alternate(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turns after one warm-up."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def main() -> None:
    """Check, measure, and write speed.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    cfg = PRESETS["bench-45m"].network()
    ours, theirs = Ours(cfg), make_theirs(cfg)
    theirs.load_state_dict(convert(ours.net.state_dict(), "ours", "diffusers", cfg))
    x = inputs(cfg, args.batch)
    with torch.no_grad():
        for a, b in zip(ours(*x), theirs(*x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    nets = {"minidiffuser": ours, "diffusers": theirs}
    report = {"parameters": sum(p.numel() for p in ours.parameters()), "batch": args.batch,
              "threads": args.threads, "torch": torch.__version__}
    for low in (True, False):
        for kind, make in (("training step", train_step), ("guided prediction", guided_step)):
            name = f"{kind}, {'bfloat16' if low else 'float32'}"
            timed = alternate({n: make(net, x, low) for n, net in nets.items()}, args.repeats)
            report[name] = {**timed, "ratio": timed["diffusers"] / timed["minidiffuser"]}
            print(f"{name:28s} minidiffuser {timed['minidiffuser']:.2f} s   diffusers "
                  f"{timed['diffusers']:.2f} s   ratio {report[name]['ratio']:.2f}", flush=True)
    path = Path(__file__).with_name("speed.json")
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
