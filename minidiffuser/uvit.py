"""U-ViT over any list of modalities: everything is a token, and long skips join both halves.

    tokens = [ t of each clock | data type | every part, embedded ] + positions
    h      = in_blocks, keeping each output   ->   mid_block   ->   out_blocks, each joined with the
             output of its mirror image        ->   LayerNorm  ->   one linear head per part

A *part* is one tensor that the network reads and predicts; a *clock* is a timestep.  Parts that are
noised together share a clock: in UniDiffuser the latent ``z`` and the CLIP embedding of an image
are two parts on the clock ``image``, and the text embedding is the one part on the clock ``text``.

Sources: U-ViT (Bao et al., arXiv:2209.12152, fig. 1), UniDiffuser (Bao et al., arXiv:2303.06555,
sec. 3.2 and app. E); post-LN as described there for stability in half precision.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import UViTConfig


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Sinusoids of a timestep, cosines first: (B,) -> (B, dim) float32.

    ``f_i = max_period^(-i / (dim / 2))``; the embedding is ``[cos(t f) | sin(t f)]``.  Attention is
    All You Need (arXiv:1706.03762, sec. 3.5), for a real-valued position.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * i / half)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                      # (B, dim)


class Attention(nn.Module):
    """Self-attention of every token to every token."""

    def __init__(self, cfg: UViTConfig):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim, bias=cfg.qkv_bias)
        self.proj = nn.Linear(cfg.dim, cfg.dim)
        self.qk_norm = nn.ModuleList(
            nn.RMSNorm(cfg.dim // cfg.heads) for _ in range(2 * cfg.qk_norm)
        )

    def forward(self, x: Tensor) -> Tensor:                                    # (B, L, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.qk_norm:                                                       # (B, heads, L, d)
            # The norms' weights are float32: under autocast q and k must come back to v's dtype.
            q, k = (norm(y).to(v.dtype) for norm, y in zip(self.qk_norm, (q, k), strict=True))
        x = attend(q, k, v)                                                    # (B, heads, L, d)
        return self.proj(x.transpose(1, 2).flatten(2))                         # (B, L, D)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, L, d) each; no mask."""
    trains = torch.is_grad_enabled() and q.requires_grad
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not trains:
        return F.scaled_dot_product_attention(q, k, v)
    # Backwards, the CPU's fused bfloat16 kernel takes several times as long as these products do
    # (benchmarks/attention.py), and sequences here are short enough to hold their scores.
    b, heads, length, d = q.shape
    q, k, v = (y.reshape(b * heads, length, d) for y in (q, k, v))
    with torch.autocast("cpu", enabled=False):  # which would take the softmax to float32 and back
        scores = torch.bmm(q * d**-0.5, k.transpose(1, 2))                     # (B heads, L, L)
        return torch.bmm(scores.softmax(-1), v).view(b, heads, length, d)


class MLP(nn.Module):
    """Two linear layers with a GELU between, for each token on its own."""

    def __init__(self, cfg: UViTConfig):
        super().__init__()
        hidden = int(cfg.dim * cfg.mlp_ratio)
        self.fc1 = nn.Linear(cfg.dim, hidden)
        self.fc2 = nn.Linear(hidden, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:                                    # (B, L, D)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One transformer block; with ``skip``, one that is joined with its mirror image first."""

    def __init__(self, cfg: UViTConfig, skip: bool = False):
        super().__init__()
        self.post = cfg.norm == "post"
        self.skip_linear = nn.Linear(2 * cfg.dim, cfg.dim) if skip else None
        self.norm_skip = nn.LayerNorm(cfg.dim) if skip and self.post else None
        self.norm_attn = nn.LayerNorm(cfg.dim)
        self.norm_mlp = nn.LayerNorm(cfg.dim)
        self.attn = Attention(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:        # (B, L, D) each
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        if self.post:
            # The residual stream itself is normalised, so it cannot grow with depth and overflow
            # half precision, as the pre-LN stream does.
            x = x if self.norm_skip is None else self.norm_skip(x)
            x = self.norm_attn(x + self.attn(x))
            return self.norm_mlp(x + self.mlp(x))
        x = x + self.attn(self.norm_attn(x))
        return x + self.mlp(self.norm_mlp(x))


class UViT(nn.Module):
    """The joint noise network: noisy parts and one timestep per clock in, one prediction per part.

    Args:
        cfg: the network's shape.

    The parameters are named after their parts: ``embed.text.weight``, ``head.z.bias``.
    """

    def __init__(self, cfg: UViTConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.ModuleDict({p.name: nn.Linear(p.token_dim, cfg.dim) for p in cfg.parts})
        self.head = nn.ModuleDict({p.name: nn.Linear(cfg.dim, p.token_dim) for p in cfg.parts})
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.tokens - (cfg.data_types > 0), cfg.dim))
        if cfg.data_types:
            self.data_type_embed = nn.Embedding(cfg.data_types, cfg.dim)
            self.data_type_pos = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.in_blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth // 2))
        self.mid_block = Block(cfg)
        self.out_blocks = nn.ModuleList(Block(cfg, skip=True) for _ in range(cfg.depth // 2))
        self.norm = nn.LayerNorm(cfg.dim)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """N(0, 0.02) for matrices and positions, zero biases, as in the official model.

        Its patch embedding is a convolution left at PyTorch's default, which is reproduced here.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                image = name in {f"embed.{p.name}" for p in self.cfg.parts if p.is_image}
                if image:
                    bound = 1 / math.sqrt(module.in_features)
                    nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)
                    continue
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_embed, std=0.02, generator=generator)
        if self.cfg.data_types:
            nn.init.normal_(self.data_type_embed.weight, generator=generator)

    def forward(
        self,
        x: Mapping[str, Tensor],
        t: Mapping[str, Tensor],
        data_type: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Predict for every part.

        Args:
            x: part name -> noisy data (B, *shape), float.
            t: clock -> timesteps (B,), real numbers in [0, 1000].
            data_type: (B,) integers below ``cfg.data_types``; by default the last kind, which in
                UniDiffuser v1 is the curated data.

        Returns:
            Part name -> prediction of that part's shape.

        Raises:
            ValueError: missing or unknown names, shapes that do not fit, or a bad ``data_type``.
        """
        self._check(x, t, data_type)
        parts = self.cfg.parts
        tokens = [self.embed[p.name](p.to_tokens(x[p.name])) for p in parts]   # (B, tokens, D)
        clocks = [timestep_embedding(t[c], self.cfg.dim)[:, None] for c in self.cfg.clocks]
        pos = self.pos_embed
        if self.cfg.data_types:
            clocks.append(self._data_type_token(data_type, clocks[0]))
            n = len(self.cfg.clocks)
            pos = torch.cat([pos[:, :n], self.data_type_pos, pos[:, n:]], dim=1)
        h = torch.cat([c.to(tokens[0].dtype) for c in clocks] + tokens, dim=1) + pos  # (B, L, D)
        if self.cfg.norm == "post":
            # Normalised after every addition, this stream may stay in autocast's half precision; a
            # pre-LN stream grows with depth, and adding the float32 positions has made it float32.
            h = h.to(tokens[0].dtype)

        skips = []
        for block in self.in_blocks:
            h = self._run(block, h)
            skips.append(h)
        h = self._run(self.mid_block, h)
        for block in self.out_blocks:
            h = self._run(block, h, skips.pop())
        h = self.norm(h)

        outs = h[:, len(clocks):].split([p.tokens for p in parts], dim=1)
        return {p.name: p.from_tokens(self.head[p.name](out))
                for p, out in zip(parts, outs, strict=True)}

    def _run(self, block: Block, *h: Tensor) -> Tensor:
        if self.cfg.checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(block, *h, use_reentrant=False)
        return block(*h)

    def _data_type_token(self, data_type: Tensor | None, like: Tensor) -> Tensor:
        kinds = self.cfg.data_types
        if data_type is None:
            data_type = torch.full((len(like),), kinds - 1, device=like.device)
        elif data_type.numel() and not 0 <= data_type.min() <= data_type.max() < kinds:
            raise ValueError(f"data_type must lie in [0, {kinds}), got {data_type.tolist()}")
        return self.data_type_embed(data_type)[:, None]                        # (B, 1, D)

    def _check(
        self, x: Mapping[str, Tensor], t: Mapping[str, Tensor], data_type: Tensor | None
    ) -> None:
        names = [p.name for p in self.cfg.parts]
        if set(x) != set(names) or set(t) != set(self.cfg.clocks):
            raise ValueError(f"the network reads parts {names} with clocks "
                             f"{list(self.cfg.clocks)}, got parts {list(x)} with clocks {list(t)}")
        batch = len(x[names[0]])
        for part in self.cfg.parts:
            if x[part.name].shape != (batch, *part.shape):
                raise ValueError(f"part {part.name!r} must be {(batch, *part.shape)}, got "
                                 f"{tuple(x[part.name].shape)}")
        for clock, value in t.items():
            if value.shape != (batch,):
                raise ValueError(f"clock {clock!r} must be ({batch},), got {tuple(value.shape)}")
        if data_type is None:
            return
        if not self.cfg.data_types:
            raise ValueError("data_type was given to a network that has no data types")
        if data_type.shape != (batch,) or data_type.is_floating_point():
            raise ValueError(f"data_type must be ({batch},) integers, got "
                             f"{tuple(data_type.shape)} {data_type.dtype}")
