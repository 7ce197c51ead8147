"""Codecs of full size: the pretrained networks between which the official UniDiffuser works.

    image   z          0.18215 (mean + std eps) of Stable Diffusion's autoencoder  (4, S/8, S/8)
            clip_img   CLIP ViT-B/32's embedding, not normalised                   (1, 512)
    text    text       CLIP ViT-L/14's last hidden state, through a linear map     (77, 64)
                       back: another linear map, and GPT-2, which continues those 77 vectors

Their weights are looked for where ``Config.pretrained`` says: a folder or a name on the Hugging
Face hub, in the layout of diffusers' ``UniDiffuserPipeline`` (vae, image_encoder, text_encoder,
...).  They are read when they are first needed, and never stored with a model: in their place
stands a hash, so that latents are not taken for those of other weights.

Sources: UniDiffuser (arXiv:2303.06555, sec. 5.1 and appendix E); Rombach et al. (arXiv:2112.10752).
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoints import fingerprint
from ..convert import load_weights
from ..errors import first_line
from ..images import ImageLike, crop_square, load_image
from .base import Codec
from .captions import words_of

DECODE_AT_ONCE = 8  # images: a decoder needs gigabytes for each at 512 x 512
BEAMS, MOST_TOKENS = 5, 67  # of GPT-2's search, and of a caption
EXTRA = "pip install 'minidiffuser[full-size]'"


class Pretrained(Codec):
    """What codecs of pretrained networks share: where weights are, and that they are the same ones.

    Args:
        source: a folder, or a name on the Hugging Face hub.
        digest: a hash of the weights that latents were made with; None where there are none yet.
        device: where the networks run; latents come back to the CPU.
    """

    components: tuple[str, ...]  # sub-folders that this codec reads

    def __init__(self, source: str | os.PathLike, digest: str | None = None, device: str = "cpu"):
        self.source, self.digest, self.device = str(source), digest, torch.device(device)
        self._networks: list[nn.Module] = []  # those that have been read

    def to(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        for network in self._networks:
            network.to(self.device)

    @cached_property
    def folder(self) -> Path:
        """The folder with the components, which are those that the digest is of.

        Raises:
            ValueError: they are not there, cannot be downloaded, or are others.
        """
        folder = find_components(self.source, self.components)
        found = digest_of(folder / name for name in self.components)
        if self.digest not in (None, found):
            raise ValueError(f"the weights for {self.kind!r} in {self.source} are not those that "
                             "the latents were made with: give theirs with --pretrained")
        self.digest = found
        return folder

    def _network(self, name: str, library: str, kind: str) -> nn.Module:
        """A component that is a network, ready to be called."""
        network = self._read(name, library, kind).eval().requires_grad_(False).to(self.device)
        self._networks.append(network)
        return network

    def _read(self, name: str, library: str, kind: str) -> Any:
        """A component, by a class of diffusers or transformers; they run no code of its files."""
        try:
            reader = getattr(import_module(library), kind)
        except ImportError:
            raise ValueError(f"{self.kind!r} needs `{library}`: {EXTRA}") from None
        try:
            return reader.from_pretrained(self.folder / name)
        except Exception as error:  # a damaged file makes the libraries fail in a dozen ways
            raise ValueError(f"{self.folder / name} cannot be loaded: {first_line(error)}"
                             ) from error

    def _check(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise ValueError(f"{self.source}: {what} is {found}, and this model needs {expected}")


class StableDiffusionCodec(Pretrained):
    """Images <-> the latents of Stable Diffusion's autoencoder, with a CLIP embedding beside them.

    An image is cropped to its middle square; both networks see the same ``size`` x ``size``.
    Decoding reads ``z`` alone.
    """

    kind = "sd-vae+clip"
    components = ("vae", "image_encoder", "clip_image_processor")
    random = True

    def __init__(self, source: str | os.PathLike, size: int, digest: str | None = None,
                 device: str = "cpu"):
        super().__init__(source, digest, device)
        self.size = size

    def shapes(self, name: str = "image") -> dict[str, tuple[int, ...]]:
        return {"clip_img": (1, 512), "z": (4, self.size // 8, self.size // 8)}

    @cached_property
    def vae(self) -> nn.Module:
        vae = self._network("vae", "diffusers", "AutoencoderKL")
        shrinks = 2 ** (len(vae.config.block_out_channels) - 1)
        self._check("the autoencoder's (channels, reduction)",
                    (vae.config.latent_channels, shrinks), (4, 8))
        return vae

    @cached_property
    def clip(self) -> tuple[nn.Module, Any]:
        """The CLIP image encoder, and what prepares images for it."""
        network = self._network("image_encoder", "transformers", "CLIPVisionModelWithProjection")
        self._check("the size of CLIP's embedding", network.config.projection_dim, 512)
        # Resized by Pillow, as OpenAI's own code does, whether torchvision is there or not.
        pillow = hasattr(import_module("transformers"), "CLIPImageProcessorPil")  # from version 5
        kind = "CLIPImageProcessor" + "Pil" * pillow
        return network, self._read("clip_image_processor", "transformers", kind)

    def load(self) -> None:
        _ = self.vae, self.clip

    def encode(
        self, images: Sequence[ImageLike], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Images -> ``z`` (B, 4, S/8, S/8) and ``clip_img`` (B, 1, 512), float32.

        Args:
            generator: draws z from its distribution, as training and the official sampler do; None
                for the mean.
        """
        return self.encode_parts("image", images, generator)

    def encode_parts(
        self, name: str, items: Sequence[ImageLike], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return self.from_disk(name, self.to_disk(items), generator and [generator] * len(items))

    def decode_parts(self, name: str, latents: dict[str, Tensor]) -> list[Image.Image]:
        return self.decode(latents)

    def decode(self, latents: dict[str, Tensor]) -> list[Image.Image]:
        """``z`` (B, 4, S/8, S/8) -> RGB images; values outside the range are clipped."""
        made = []
        with torch.no_grad():
            for z in latents["z"].float().split(DECODE_AT_ONCE):
                x = self.vae.decode(z.to(self.device) / self.vae.config.scaling_factor).sample
                pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
                made += [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        return made

    @torch.no_grad()
    def to_disk(self, images: Sequence[ImageLike]) -> dict[str, Tensor]:
        """What features keep: ``moments`` (B, 8, S/8, S/8), mean and deviation, and ``clip_img``.

        So the bytes depend on the images alone, and each epoch can still draw anew.
        """
        squares = [crop_square(load_image(image), self.size) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(s) for s in squares]))
        x = pixels.permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1
        latent = self.vae.encode(x).latent_dist
        moments = torch.cat([latent.mean, latent.std], dim=1) * self.vae.config.scaling_factor
        network, processor = self.clip
        inputs = processor(images=squares, return_tensors="pt")["pixel_values"]
        embedding = network(inputs.to(self.device)).image_embeds[:, None]
        return {"moments": moments.cpu(), "clip_img": embedding.cpu()}

    def from_disk(
        self, name: str, stored: dict[str, Tensor],
        generators: Sequence[torch.Generator] | None = None,
    ) -> dict[str, Tensor]:
        """Latents of what :meth:`to_disk` made: drawn, or without generators the mean."""
        z, std = stored["moments"].float().chunk(2, dim=1)
        if generators:
            z = z + std * torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])
        return {"clip_img": stored["clip_img"].float(), "z": z}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint stores: JSON values, and no tensors."""
        _ = self.digest or self.folder
        return {"size": self.size, "digest": self.digest}, {}

    @classmethod
    def from_state(
        cls, config: dict[str, Any], tensors: dict[str, Tensor], source: str
    ) -> "StableDiffusionCodec":
        return cls(source, config["size"], config["digest"])


class CaptionDecoderCodec(Pretrained):
    """Captions <-> (B, length, dim): CLIP's text encoder one way, GPT-2 the other.

    Longer captions are cut, and shorter ones filled up, at ``length`` tokens, as CLIP's own are.
    """

    kind = "clip+gpt2"
    components = ("text_encoder", "clip_tokenizer", "text_decoder", "text_tokenizer")

    def __init__(self, source: str | os.PathLike, length: int = 77, dim: int = 64,
                 digest: str | None = None, device: str = "cpu"):
        super().__init__(source, digest, device)
        self.length, self.dim = length, dim

    @property
    def shape(self) -> tuple[int, int]:
        return (self.length, self.dim)

    @cached_property
    def encoder(self) -> tuple[nn.Module, Any]:
        """CLIP's text encoder and its tokenizer."""
        network = self._network("text_encoder", "transformers", "CLIPTextModel")
        self._check("CLIP's longest text", network.config.max_position_embeddings, self.length)
        return network, self._read("clip_tokenizer", "transformers", "AutoTokenizer")

    @cached_property
    def decoder(self) -> tuple["CaptionDecoder", Any]:
        """GPT-2 with its two linear maps, and its tokenizer."""
        network = self._network("text_decoder", __name__, "CaptionDecoder")
        self._check("the text decoder's (tokens, numbers per token)",
                    (network.prefix_length, network.encode_prefix.out_features), self.shape)
        return network, self._read("text_tokenizer", "transformers", "AutoTokenizer")

    def load(self) -> None:
        _ = self.encoder, self.decoder

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, length, dim) float32.

        Raises:
            ValueError: not a string.
        """
        for caption in captions:
            if not isinstance(caption, str):
                raise ValueError(f"a caption must be a string, got {type(caption).__name__}")
        network, tokenizer = self.encoder
        ids = tokenizer(list(captions), padding="max_length", max_length=self.length,
                        truncation=True, return_tensors="pt")["input_ids"]
        # No mask: the official encoder reads what fills a text up too.
        hidden = network(ids.to(self.device)).last_hidden_state                # (B, L, 768)
        return self.decoder[0].encode_prefix(hidden).cpu()

    def decode(self, z: Tensor) -> list[str]:
        """(B, length, dim) -> captions, by beam search."""
        network, tokenizer = self.decoder
        ids = network.captions(z.float().to(self.device), tokenizer.eos_token_id)
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    def split(self, caption: str) -> list[str]:
        """A caption's words and marks, by which captions are compared."""
        return words_of(caption)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint stores: JSON values, and no tensors."""
        _ = self.digest or self.folder
        return {"length": self.length, "dim": self.dim, "digest": self.digest}, {}

    @classmethod
    def from_state(
        cls, config: dict[str, Any], tensors: dict[str, Tensor], source: str
    ) -> "CaptionDecoderCodec":
        return cls(source, **config)


class CaptionDecoder(nn.Module):
    """GPT-2 that continues a caption's vectors with its words.

    Args:
        gpt: `transformers.GPT2LMHeadModel`. prefix_length: vectors of a caption. inner: size of
            CLIP's hidden state. hidden: numbers per vector.
    """

    def __init__(self, gpt: nn.Module, prefix_length: int, inner: int, hidden: int):
        super().__init__()
        self.prefix_length, self.transformer = prefix_length, gpt
        self.encode_prefix = nn.Linear(inner, hidden)
        self.decode_prefix = nn.Linear(hidden, gpt.config.n_embd)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "CaptionDecoder":
        """Read config.json and weights, as diffusers' ``UniDiffuserTextDecoder`` writes them."""
        import json

        from transformers import GPT2Config, GPT2LMHeadModel

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        prefix = (config["prefix_length"], config["prefix_inner_dim"], config["prefix_hidden_dim"])
        known = GPT2Config().to_dict()
        made = cls(GPT2LMHeadModel(GPT2Config(**{k: v for k, v in config.items() if k in known})),
                   *prefix)
        # Older versions of transformers stored the causal mask with the weights.
        state = {k: v for k, v in load_weights(weights_file(folder)).items()
                 if not k.endswith((".attn.bias", ".attn.masked_bias"))}
        # What the head shares with the embedding may be stored once.
        state.setdefault("transformer.lm_head.weight", state["transformer.transformer.wte.weight"])
        made.load_state_dict(state)
        return made

    def captions(self, z: Tensor, end: int) -> list[list[int]]:
        """(B, length, hidden) -> for each the best beam's token ids, its ``end`` included."""
        tokens, lengths, mean = self.beams(z, end)
        chosen = mean.argmax(1).tolist()
        return [tokens[i, k, : lengths[i, k]].tolist() for i, k in enumerate(chosen)]

    @torch.no_grad()
    def beams(self, z: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """The official beam search: tokens (B, K, at most 67), how many count, and their mean logp.

        Beams compete by their mean log-probability per token.  One that has ended keeps its place
        as long as it is among the best.  (`generate` of transformers sets it aside and lets another
        beam go on, which writes other captions.)
        """
        prefix = self.decode_prefix(z)                                         # (B, L, n_embd)
        out = self.transformer(inputs_embeds=prefix, use_cache=True)
        cache, b = out.past_key_values, len(z)
        cache.batch_repeat_interleave(BEAMS)
        total, word = out.logits[:, -1].log_softmax(-1).topk(BEAMS)            # (B, K) each
        tokens, ended = word[..., None], word == end                           # (B, K, 1), (B, K)
        lengths = torch.ones_like(word)
        first = BEAMS * torch.arange(b, device=z.device)[:, None]              # of each caption
        while tokens.shape[-1] < MOST_TOKENS and not ended.all():
            out = self.transformer(tokens[..., -1].reshape(-1, 1), past_key_values=cache,
                                   use_cache=True)
            logp = out.logits[:, -1].log_softmax(-1).unflatten(0, (b, BEAMS))  # (B, K, V)
            logp[ended] = -torch.inf
            logp[..., 0][ended] = 0  # goes on in one way, which costs nothing
            lengths = lengths + ~ended
            mean = (total[..., None] + logp) / lengths[..., None]
            best, where = mean.flatten(1).topk(BEAMS)                          # (B, K) each
            beam, word = where // logp.shape[-1], where % logp.shape[-1]
            lengths, ended = lengths.gather(1, beam), ended.gather(1, beam) | (word == end)
            tokens = torch.stack([own[k] for own, k in zip(tokens, beam, strict=True)])
            tokens = torch.cat([tokens, word[..., None]], dim=-1)
            total = best * lengths
            cache.reorder_cache((first + beam).flatten())
        return tokens, lengths, total / lengths


# ---- files ---------------------------------------------------------------------------------------


def find_components(source: str, components: Sequence[str]) -> Path:
    """The folder that holds ``components``, downloaded where ``source`` is a hub name.

    Raises:
        ValueError: one is missing, or the hub cannot be reached.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = _download(source, components)
        except Exception as error:  # of the hub's library, of HTTP, of the network, of the name
            raise ValueError(f"{source!r} is neither a folder here nor a name that can be "
                             f"downloaded now: {first_line(error)}. It needs "
                             f"{', '.join(components)}: give a folder with them instead"
                             ) from None
    missing = [name for name in components if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}: it must be laid out as diffusers "
                         "lays out a UniDiffuserPipeline")
    return folder


def _download(source: str, components: Sequence[str]) -> Path:
    """The folder that the hub's library keeps; weights as .bin only where there are no others."""
    from huggingface_hub import snapshot_download

    other = ["*.fp16.*", "*.msgpack", "*.h5"]
    folder = Path(snapshot_download(source, allow_patterns=[f"{name}/*" for name in components],
                                    ignore_patterns=[*other, "*.bin"]))
    bare = [f"{name}/*.bin" for name in components
            if not any((folder / name).glob("*.safetensors"))]
    return Path(snapshot_download(source, allow_patterns=bare, ignore_patterns=other))


def digest_of(folders: Iterable[Path]) -> str:
    """A hash of all files in folders: of their names, sizes and contents."""
    digest = hashlib.sha256()
    for file in _files(folders):
        digest.update(f"{file.parent.name}/{file.name} {fingerprint(file)}".encode())
    return digest.hexdigest()


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(f for f in folder.iterdir() if f.is_file() and f.name[0] != ".")


def weights_file(folder: Path) -> Path:
    """A component's weights: safetensors where there are both kinds."""
    found = [folder / f"diffusion_pytorch_model.{end}" for end in ("safetensors", "bin")]
    return next((file for file in found if file.is_file()), found[0])
