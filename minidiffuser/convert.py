"""Weights of the official UniDiffuser and of its diffusers port, to ours and back, bit for bit.

Three dialects store the same network: ``official`` (``uvit_v0.pth``, ``uvit_v1.pth``),
``diffusers`` (``UniDiffuserModel``) and ``ours`` (``uvit.UViT``).  Names aside, they differ in:

    official   patch embedding is a convolution (D, C, p, p); ours a linear map of (p1, p2, C)
    diffusers  that convolution, with a second copy that its forward pass never reads,
               and the rows of one qkv matrix as three: to_q, to_k, to_v

Sources: state dicts of thu-ml/unidiffuser and of diffusers' ``pipelines/deprecated/unidiffuser``.
"""

import os
import pickle
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Config, UViTConfig, preset
from .errors import explained, suggest
from .uvit import UViT

DIALECTS = ("official", "diffusers", "ours")

# Modules, or parameters that stand alone. Where a dialect keeps several tensors for one of ours,
# their names stand side by side.
# ours             official          diffusers
_OUTER = """
pos_embed          pos_embed         pos_embed
data_type_pos      pos_embed_token   data_type_pos_embed_token
data_type_embed    token_embedding   data_type_token_embedding
embed.text         text_embed        text_in
embed.clip_img     clip_img_embed    clip_img_in
embed.z            patch_embed.proj  vae_img_in.proj transformer.pos_embed.proj
head.text          text_out          text_out
head.clip_img      clip_img_out      clip_img_out
head.z             decoder_pred      vae_img_out
norm               norm              transformer.norm_out
"""
_BLOCK = """
skip_linear        skip_linear       skip.skip_linear
norm_skip          norm1             skip.norm
norm_attn          norm2             norm1
norm_mlp           norm3             norm3
attn.qkv           attn.qkv          attn1.to_q attn1.to_k attn1.to_v
attn.proj          attn.proj         attn1.to_out.0
mlp.fc1            mlp.fc1           ff.net.0.proj
mlp.fc2            mlp.fc2           ff.net.2
"""


def _table(text: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """Our name -> dialect -> names there."""
    rows = [line.split() for line in text.strip().splitlines()]
    return {ours: {"official": (official,), "diffusers": tuple(diffusers)}
            for ours, official, *diffusers in rows}


OUTER, BLOCK = _table(_OUTER), _table(_BLOCK)


def config_of_diffusers(unet: Mapping[str, Any], source: str) -> Config:
    """The configuration of a network that diffusers stored.

    Args:
        unet: the values of ``unet/config.json``.
        source: where the weights of the codecs beside it are.

    Raises:
        ValueError: values are missing, as in the file of another kind of network.
    """
    needed = ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size",
              "sample_size", "num_text_tokens", "text_dim")
    if missing := [key for key in needed if key not in unet]:
        raise ValueError(f"the configuration of a UniDiffuser has {', '.join(missing)}: this one "
                         "does not")
    kinds = 2 if unet.get("use_data_type_embedding") else 0
    return preset("unidiffuser-v1").replace(
        pretrained=source, data_types=kinds, checkpoint=False,
        dim=unet["num_attention_heads"] * unet["attention_head_dim"], depth=unet["num_layers"],
        heads=unet["num_attention_heads"], patch=unet["patch_size"],
        image_size=8 * unet["sample_size"], caption_length=unet["num_text_tokens"],
        caption_dim=unet["text_dim"],
    )


def convert(
    state: Mapping[str, Tensor], source: str, target: str, cfg: UViTConfig
) -> dict[str, Tensor]:
    """Rename and rearrange a state dict; every tensor keeps its values and its dtype.

    Args:
        state: a flat state dict in the dialect ``source``.
        source, target: of ``DIALECTS``.
        cfg: the network's shape: ``PRESETS["unidiffuser-v1"].network()``, or any other size of it.

    Returns:
        A state dict for ``target``.  Tensors that need no rearranging share memory with ``state``.

    Raises:
        ValueError: an unknown dialect, a network that the official code has no names for, or
            tensors that are missing, unexpected or of another shape, which are named.
    """
    for dialect in (source, target):
        if dialect not in DIALECTS:
            raise ValueError(f"unknown dialect {dialect!r}.{suggest(dialect, DIALECTS)}")
    _check_network(cfg)
    with torch.device("meta"):  # shapes without memory
        expected = UViT(cfg).state_dict()
    _check_state(state, {d: _from_ours(expected, d, cfg) for d in DIALECTS}, source)
    return _from_ours(_to_ours(state, source, expected), target, cfg)


def _to_ours(state: Mapping[str, Tensor], source: str, names: Collection[str]) -> dict[str, Tensor]:
    if source == "ours":
        return dict(state)
    return {ours: _join(ours, [state[name] for name in _names(ours, source)]) for ours in names}


def _from_ours(state: Mapping[str, Tensor], target: str, cfg: UViTConfig) -> dict[str, Tensor]:
    if target == "ours":
        return dict(state)
    found = {}
    for ours, tensor in state.items():
        names = _names(ours, target)
        found.update(zip(names, _divide(ours, tensor, len(names), cfg), strict=True))
    return found


def _names(ours: str, dialect: str) -> tuple[str, ...]:
    """What ``dialect`` calls the tensor or tensors that are one of ours."""
    module, dot, kind = ours.rpartition(".")
    if kind not in ("weight", "bias"):  # a parameter that stands alone
        module, dot, kind = ours, "", ""
    if module in OUTER:
        return tuple(f"{name}{dot}{kind}" for name in OUTER[module][dialect])
    block, _, inner = module.partition(".")  # mid_block.attn.qkv, in_blocks.3.attn.qkv
    if block != "mid_block":
        number, _, inner = inner.partition(".")
        block = f"{block}.{number}"
    if dialect == "diffusers":
        joined = inner in ("skip_linear", "norm_skip")  # these stand beside the block, not in it
        nested = block.startswith("out_blocks") and not joined
        block = f"transformer.transformer_{block}" + ".block" * nested
    return tuple(f"{block}.{name}.{kind}" for name in BLOCK[inner][dialect])


def _join(ours: str, tensors: Sequence[Tensor]) -> Tensor:
    """Our one tensor from those of another dialect."""
    if ours == "embed.z.weight":
        return tensors[0].permute(0, 2, 3, 1).flatten(1)   # (D, C, p, p) -> (D, p p C)
    if ".qkv." in ours and len(tensors) > 1:
        return torch.cat(list(tensors))                    # 3 x (D, D) -> (3 D, D)
    return tensors[0]  # a second one is the copy that is never read


def _divide(ours: str, tensor: Tensor, n: int, cfg: UViTConfig) -> list[Tensor]:
    """The inverse of :func:`_join`, to ``n`` tensors."""
    if ".qkv." in ours:
        return list(tensor.chunk(n))                       # (3 D, D) -> n x (3 D / n, D)
    if ours == "embed.z.weight":
        p = next(part.patch for part in cfg.parts if part.name == "z")
        tensor = tensor.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2).contiguous()
    return [tensor] + [tensor.clone() for _ in range(n - 1)]


def _check_network(cfg: UViTConfig) -> None:
    parts = [(p.name, p.clock, p.is_image) for p in cfg.parts]
    if parts != [("text", "text", False), ("clip_img", "image", False), ("z", "image", True)]:
        raise ValueError("only networks of the parts text, clip_img and z can be converted, got "
                         f"{[p.name for p in cfg.parts]}: choose the preset unidiffuser-v0 or "
                         "unidiffuser-v1, or a smaller copy of them")
    if cfg.norm != "post" or cfg.qk_norm:
        raise ValueError("the official network has norm='post' and no qk_norm, got "
                         f"norm={cfg.norm!r} and qk_norm={cfg.qk_norm}")


def _check_state(
    state: Mapping[str, Tensor], expected: Mapping[str, Mapping[str, Tensor]], dialect: str
) -> None:
    """Compare names and shapes with those ``expected`` of each dialect."""
    wanted = expected[dialect]
    wrong = [f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
             for name, tensor in wanted.items()
             if name in state and state[name].shape != tensor.shape]
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": wrong,
    }
    found = [f"{len(names)} {what} ({_few(names)})" for what, names in problems.items() if names]
    if not found:
        return
    others = [d for d in DIALECTS if d != dialect and state.keys() == expected[d].keys()]
    advice = f"it is {others[0]!r} by its names" if others else "check the preset and the dialect"
    raise ValueError(f"the source is not this network's {len(wanted)} tensors under {dialect!r} "
                     f"names, but {'; '.join(found)}: {advice}")


def _few(names: Sequence[str], n: int = 8) -> str:
    return ", ".join(names[:n]) + ", ..." * (len(names) > n)


# ---- files -------------------------------------------------------------------------------------


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a flat state dict, on the CPU; no code in the file is ever run.

    Args:
        path: ``.safetensors``, or what ``torch.save`` made of tensors alone (``.pth``, ``.pt``,
            ``.bin``).

    Raises:
        ValueError: no such file, another kind of file, a damaged one, or one that holds more than
            a flat dictionary of tensors.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(f"cannot tell what {path} is: weights end in .safetensors, .pth, .pt or "
                         ".bin")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its own words advise to load the file regardless
        raise ValueError(f"{path} is damaged, or holds more than tensors: that could run code, and "
                         "is not loaded. Save the network's state_dict() alone") from None
    except Exception as error:  # damaged bytes make the readers fail in a dozen ways
        raise ValueError(f"{path} is damaged or cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise ValueError(f"{path} is not a flat dictionary of tensors: save the network's "
                         "state_dict() alone")
    return {name: tensor.detach() for name, tensor in state.items()}


def convert_file(
    src: str | os.PathLike, dst: str | os.PathLike, source: str, target: str, preset_name: str
) -> None:
    """Convert a file of weights to another dialect.

    Args:
        src: what :func:`load_weights` reads.
        dst: a ``.safetensors`` file; it is written whole or not at all.
        source, target: of ``DIALECTS``.
        preset_name: whose network it is, ``unidiffuser-v0`` or ``unidiffuser-v1``.

    Raises:
        ValueError: what :func:`convert` and :func:`load_weights` refuse, an unknown preset, or a
            file that cannot be written.
    """
    dst = Path(dst)
    if dst.suffix != ".safetensors":
        raise ValueError(f"weights are written as .safetensors, got {dst}: call it "
                         f"{dst.with_suffix('.safetensors').name}")
    state = convert(load_weights(src), source, target, preset(preset_name).network())
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    with explained(dst.parent):
        dst.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting_", dir=dst.parent) as draft:
            written = Path(draft) / dst.name
            save_file(contiguous, written, metadata={"format": "pt"})
            with written.open("rb") as file:
                os.fsync(file.fileno())
            written.replace(dst)
