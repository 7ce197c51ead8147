"""UniDiffuser, put together: codecs, network and solver behind the tasks people ask for.

    pipe = UniDiffuser.from_pretrained("emoji")
    pipe.text_to_image("red apple", n=4, seed=0)         # -> 4 PIL images
    pipe.image_to_text("apple.png")                      # -> ["red apple"]
    pipe.joint(n=4)   pipe.image(n=4)   pipe.text(n=4)   # pairs and marginals
    pipe.sample(sampled=("image",), given={"text": "red apple"})  # what all of these call

Variation, blocked Gibbs sampling and interpolation work on latents throughout: what one task makes
is given to the next as it is, never decoded and encoded again (UniDiffuser, arXiv:2303.06555,
sec. 4.2 and 4.3).
"""

import json
import logging
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import checkpoints, seeds, solvers
from .codecs import (
    CODECS,
    CaptionDecoderCodec,
    PCACodec,
    PixelCodec,
    Pretrained,
    StableDiffusionCodec,
    WordCodec,
)
from .codecs.pretrained import find_components, weights_file
from .config import Config
from .convert import config_of_diffusers, convert, load_weights
from .errors import choose, explained, suggest
from .images import ImageLike, to_uint8
from .schedule import NoiseSchedule
from .tasks import NoisePredictor, Roles, make_roles
from .uvit import UViT

log = logging.getLogger(__name__)

Codecs = dict[str, Any]      # modality -> codec
Latents = dict[str, Tensor]  # part name -> (B, *shape)


# The hub's names of the official weights, as diffusers stores them.
OFFICIAL = ("thu-ml/unidiffuser-v0", "thu-ml/unidiffuser-v1")


# ---- codecs and data of a configuration --------------------------------------------------------


def training_arrays(cfg: Config, split: str = "train") -> tuple[np.ndarray, list[str]]:
    """Images (N, size, size, 3) uint8 and captions (N) of a configuration's table.

    The configuration's filters clean the split ``train``, and no other.  Features have no images:
    they are those of the table that the features were made from, with the filters of then.
    """
    from .data import filters, load_table
    from .data.features import is_features, read_index

    name, steps = cfg.data, cfg.filters
    if is_features(cfg.data):
        index = read_index(cfg.data)
        name, steps = index["source"], index["filters"]
    if steps and split == "train":
        table, report = filters.apply(load_table(name), filters.parse_all(steps))
        log.info("%s", report)
        table = table.select_columns(["image", "TEXT"])
    else:
        table = load_table(name, split, columns=["image", "TEXT"])
    return to_uint8([row["image"] for row in table], cfg.image_size), list(table["TEXT"])


def make_codecs(
    cfg: Config, images: np.ndarray | None = None, captions: Sequence[str] | None = None
) -> Codecs:
    """The codecs that a configuration names, fitted to its training set.

    Args:
        images: (N, size, size, 3) uint8, and ``captions``: N; pretrained codecs need none.

    Raises:
        ValueError: the weights of pretrained ones are not there.
    """
    if cfg.image_codec == StableDiffusionCodec.kind:
        image = StableDiffusionCodec(cfg.pretrained, cfg.image_size)
    elif cfg.image_codec == PCACodec.kind:
        image = PCACodec.fit(images, cfg.pca_dim)
    else:
        image = PixelCodec.fit(images)
    if cfg.caption_codec == CaptionDecoderCodec.kind:
        text = CaptionDecoderCodec(cfg.pretrained, cfg.caption_length, cfg.caption_dim)
    else:
        text = WordCodec.fit(captions, cfg.caption_length, cfg.caption_dim, cfg.caption_codes,
                             cfg.seed)
    return {"image": image, "text": text}


# ---- the pipeline ------------------------------------------------------------------------------


class UniDiffuser:
    """A joint model of images and captions, and everything it can be asked for.

    Arguments that all tasks share:
        n: how many samples. steps: solver steps. seed: an integer; the same seed and arguments give
        the same result. guidance_scale: s of (1 + s) cond - s uncond, 0 for none. solver: one of
        ``solvers.SOLVERS``. eta: share of fresh noise per step, for ``ddim`` only.
    """

    def __init__(
        self, cfg: Config, net: nn.Module, codecs: Codecs, device: str | torch.device = "cpu"
    ):
        self.cfg, self.codecs, self.device = cfg, codecs, torch.device(device)
        self.net = net.to(self.device).requires_grad_(False).eval()
        self.parts, self.clocks = net.cfg.parts, net.cfg.clocks
        self.schedule = NoiseSchedule(cfg.schedule)
        for codec in codecs.values():
            codec.to(self.device)

    # ---- the five tasks ---------------------------------------------------------------------

    def text_to_image(self, prompt: str, n: int = 1, **how) -> list[Image.Image]:
        """Images of a caption.

        Raises:
            ValueError: an empty or overlong prompt, or words the model does not know.
        """
        return self.sample(("image",), {"text": prompt}, n, **how)["image"]

    def image_to_text(self, image: ImageLike, n: int = 1, **how) -> list[str]:
        """Captions of an image: a PIL image, a path or an array.

        Raises:
            ValueError: not an image, a damaged or an enormous one.
        """
        return self.sample(("text",), {"image": image}, n, **how)["text"]

    def joint(self, n: int = 1, **how) -> list[tuple[Image.Image, str]]:
        """Pairs of image and caption, from nothing."""
        made = self.sample(("image", "text"), None, n, **how)
        return list(zip(made["image"], made["text"], strict=True))

    def image(self, n: int = 1, **how) -> list[Image.Image]:
        """Images alone: the marginal, with the caption ignored."""
        return self.sample(("image",), None, n, **how)["image"]

    def text(self, n: int = 1, **how) -> list[str]:
        """Captions alone: the marginal, with the image ignored."""
        return self.sample(("text",), None, n, **how)["text"]

    # ---- the general form -------------------------------------------------------------------

    def sample(
        self,
        sampled: Sequence[str],
        given: Mapping[str, Any] | None = None,
        n: int = 1,
        **how,
    ) -> dict[str, list]:
        """Sample some modalities given others; what is named in neither is ignored.

        Args:
            sampled: modalities to sample. given: modality -> data, one for all n samples or a list
                of n.  how: ``steps, guidance_scale, seed, solver, eta, spacing, redraw``; see
                :meth:`sample_latents`.

        Returns:
            Modality -> list of n images or captions.

        Raises:
            ValueError: an unknown modality, bad data, or a bad number.
        """
        _check_count("n", n)
        sampled = (sampled,) if isinstance(sampled, str) else tuple(sampled)
        given = dict(given or {})
        roles = make_roles(self.clocks, sampled, given)  # names are checked before data is read
        latents = self.encode(given, n, _encoding_seed(how.get("seed", 0)))
        return self.decode(self.sample_latents(roles, latents, n, **how))

    @torch.no_grad()
    def sample_latents(
        self,
        roles: Roles,
        given: Latents | None = None,
        n: int = 1,
        *,
        steps: int = 25,
        guidance_scale: float = 1.0,
        seed: int | None = 0,
        solver: str = "dpm++2m",
        eta: float = 0.0,
        spacing: str = "time",
        redraw: bool = True,
        noise: Latents | None = None,
    ) -> Latents:
        """The same on latents: given parts (n, *shape) in, sampled parts out.

        Args:
            noise: where to start, part -> (n, *shape); drawn from N(0, I) by default.
            seed: None for a different result each time.
            spacing: of the solver's times, ``"time"`` (even in t, as the official sampler) or
                ``"logsnr"``; see ``solvers.time_grid``.
            redraw: fresh noise for ignored modalities at each call; see ``tasks.NoisePredictor``.
        """
        _check_count("n", n)
        _check_count("steps", steps)
        if not 0 <= eta <= 1 or (eta and solver != "ddim"):
            raise ValueError(f"eta must lie in [0, 1] and be 0 unless solver='ddim', got eta={eta} "
                             f"with {solver!r}")
        generator = seeds.generator(seed)
        predict = NoisePredictor(
            self.net, self.parts, self.schedule, roles, given, guidance_scale,
            prediction=self.cfg.prediction, generator=generator, redraw=redraw,
        )
        if noise is None:
            noise = {p.name: torch.randn((n, *p.shape), generator=generator)
                     for p in predict.sampled}
        for p in predict.sampled:
            if p.name not in noise or noise[p.name].shape != (n, *p.shape):
                got = tuple(noise[p.name].shape) if p.name in noise else None
                raise ValueError(f"noise[{p.name!r}] must be {(n, *p.shape)}, got {got}")
        state = predict.pack(noise).to(self.device)
        run = choose("solver", solver, solvers.SOLVERS)
        # The singlestep solver stops at t = 1, as the official sampler does.
        end = 1.0 if solver == "dpm++fast" else 0.0
        times = solvers.time_grid(self.schedule, steps, spacing, end=end)
        options = {"ddim": {"eta": eta, "generator": generator}, "ddpm": {"generator": generator}}
        states = run(predict, state, self.schedule, times, **options.get(solver, {}))
        return predict.unpack(solvers.last(states))

    # ---- what tasks in a row make ---------------------------------------------------------------

    def vary_image(self, image: ImageLike, n: int = 1, seed: int | None = 0, **how) -> list:
        """Other images of what an image shows: image-to-text, then text-to-image."""
        return self._there_and_back("image", image, n, seed, how)

    def vary_text(self, text: str, n: int = 1, seed: int | None = 0, **how) -> list[str]:
        """Other captions of what a caption shows: text-to-image, then image-to-text."""
        return self._there_and_back("text", text, n, seed, how)

    def _there_and_back(self, name: str, data: Any, n: int, seed: int | None, how: dict) -> list:
        _check_count("n", n)
        other = self._other(name)
        x = self.encode({name: data}, n, _encoding_seed(seed))
        for i, target in enumerate((other, name)):
            x = self._condition(target, x, n, seed=seeds.nth(seed, i), **how)
        return self.decode(x)[name]

    def gibbs(
        self, start: ImageLike | str | None = None, rounds: int = 4, n: int = 1,
        seed: int | None = 0, **how
    ) -> list[list[tuple[Image.Image, str]]]:
        """Blocked Gibbs sampling: text given image, image given text, and again.

        Args:
            start: an image, or None for one from the marginal.  (A string is a path.)
            rounds: how many pairs to draw.

        Returns:
            For each round, n pairs; image and text of a pair are drawn one from the other.
        """
        _check_count("rounds", rounds)
        if start is None:
            x = self.sample_latents(make_roles(self.clocks, ["image"]), {}, n, seed=seed, **how)
        else:
            _check_count("n", n)
            x = self.encode({"image": start}, n, _encoding_seed(seed))
        chain = []
        for i in range(rounds):
            text = self._condition("text", x, n, seed=seeds.nth(seed, 2 * i + 1), **how)
            x = self._condition("image", text, n, seed=seeds.nth(seed, 2 * i + 2), **how)
            made = self.decode({**x, **text})
            chain.append(list(zip(made["image"], made["text"], strict=True)))
        return chain

    @torch.no_grad()
    def interpolate(
        self, image_a: ImageLike, image_b: ImageLike, n: int = 7, *, steps: int = 50,
        seed: int | None = 0,
    ) -> list[Image.Image]:
        """n images on the way from one to another, the two ends included.

        Each image is captioned, and its ODE run upwards to its noise under that caption; then noise
        (by slerp) and caption latent (by lerp) are mixed, and the ODE run down again.  There is no
        guidance on the way: a guided ODE does not lead back to where it came from.
        """
        _check_count("n", n, least=2)          # its two ends
        _check_count("steps", steps, least=2)  # the inversion takes one less
        images = self.encode({"image": [image_a, image_b]}, 2)
        texts = self._condition("text", images, 2, seed=seed, guidance_scale=2.0)
        times = solvers.time_grid(self.schedule, steps)
        roles = make_roles(self.clocks, ["image"], ["text"])
        ends = self._predictor(roles, texts)
        states = solvers.ddim_invert(ends, ends.pack(images).to(self.device), self.schedule, times)
        noise = solvers.last(states)                                           # (2, n_image)

        weight = torch.linspace(0, 1, n, device=self.device)
        mixed = {k: torch.stack([torch.lerp(v[0], v[1], w) for w in weight])
                 for k, v in texts.items()}
        between = self._predictor(roles, mixed)
        state = torch.stack([slerp(noise[0], noise[1], float(w)) for w in weight])
        end = solvers.last(solvers.ddim(between, state, self.schedule, times))
        return self.decode(between.unpack(end))["image"]

    def _predictor(self, roles: Roles, given: Latents) -> NoisePredictor:
        """A predictor without guidance or ignored modalities: a fixed function, an ODE's."""
        return NoisePredictor(self.net, self.parts, self.schedule, roles, given,
                              prediction=self.cfg.prediction)

    def _condition(self, target: str, given: Latents, n: int, **how) -> Latents:
        """Sample one modality given the latents of the other."""
        roles = make_roles(self.clocks, [target], [self._other(target)])
        return self.sample_latents(roles, given, n, **how)

    def _other(self, name: str) -> str:
        others = [c for c in self.clocks if c != name]
        if len(others) != 1:
            raise ValueError(f"this needs a model of two modalities, not {list(self.clocks)}")
        return others[0]

    # ---- data <-> latents -------------------------------------------------------------------

    def encode(
        self, data: Mapping[str, Any], n: int | None = None, seed: int | None = None
    ) -> Latents:
        """Modality -> one item for all n samples, or a list of n; latents (n, *shape) by part.

        Args:
            seed: where an encoder gives a distribution, draw from it, as the official sampler does;
                None for its mean.
        """
        latents = {}
        for name, value in data.items():
            items = list(value) if isinstance(value, (list, tuple)) else [value]
            if n is not None and len(items) not in (1, n):
                raise ValueError(f"{name}: got {len(items)} items for n={n}; give one, or n")
            codec = choose("modality", name, self.codecs)
            made = codec.encode_parts(name, items, None if seed is None else seeds.generator(seed))
            repeat = n if n is not None and len(items) == 1 else 1
            for part, z in made.items():
                latents[part] = z.repeat_interleave(repeat, 0).to(self.device)
        return latents

    def decode(self, latents: Latents) -> dict[str, list]:
        """Latents by part -> data by modality."""
        made = {}
        for name, codec in self.codecs.items():
            own = {part: latents[part] for part in codec.shapes(name) if part in latents}
            if own:
                made[name] = codec.decode_parts(name, own)
        return made

    # ---- storing ----------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write config.json, model.safetensors (in ``dtype``) and codecs.safetensors."""
        folder = Path(folder)
        draft = folder / ".writing"
        with explained(folder):
            draft.mkdir(parents=True, exist_ok=True)
            kinds, codecs = codec_states(self.codecs)
            config = {"config": self.cfg.to_dict(), "codecs": kinds}
            weights = {k: v.to(dtype).contiguous() for k, v in self.net.state_dict().items()}
            try:
                save_file(weights, draft / "model.safetensors")
                save_file(codecs, draft / "codecs.safetensors")
                text = json.dumps(config, ensure_ascii=False, indent=1)
                (draft / "config.json").write_text(text, encoding="utf-8")
                for file in draft.iterdir():  # a model that was there is whole until here
                    file.replace(folder / file.name)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, device: str = "cpu") -> "UniDiffuser":
        """A shipped model by name, a folder written by :meth:`save_pretrained`, or a training run.

        Also the official model, as diffusers stores it (extra: full-size): a folder, or one of
        ``OFFICIAL`` on the Hugging Face hub.

        Raises:
            ValueError: nothing of that name (with the nearest), or damaged files.
        """
        if str(name) in OFFICIAL or (Path(name) / "unet").is_dir():
            return cls._from_diffusers(str(name), device)
        folder = find_model(name)
        try:
            stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors")
            tensors = load_file(folder / "codecs.safetensors")
            cfg = Config().replace(**stored["config"])
            net = UViT(cfg.network())
            net.load_state_dict({k: v.float() for k, v in weights.items()})
            codecs = stored_codecs(stored["codecs"], tensors, cfg.pretrained)
            made = {}
            for name, codec in codecs.items():
                made.update(codec.shapes(name))
            for p in net.cfg.parts:
                if made[p.name] != p.shape:
                    raise ValueError(f"the codec of {p.name!r} makes {made[p.name]}, the "
                                     f"network reads {p.shape}")
        except (OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError,
                SafetensorError) as error:
            # In one line: PyTorch lists every weight that does not fit.
            why = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            raise ValueError(f"the model in {folder} is damaged or incomplete: {why}") from None
        return cls(cfg, net, codecs, device)

    @classmethod
    def _from_diffusers(cls, source: str, device: str) -> "UniDiffuser":
        """A model in the layout of diffusers' ``UniDiffuserPipeline``."""
        folder = find_components(source, ["unet"]) / "unet"
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            cfg = config_of_diffusers(values, source)
            with torch.device("meta"):  # the weights are large enough to be held but once
                net = UViT(cfg.network())
            state = convert(load_weights(weights_file(folder)), "diffusers", "ours", net.cfg)
            net.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not hold a UniDiffuser: {error}") from None
        return cls(cfg, net, make_codecs(cfg), device)


def codec_states(codecs: Codecs) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is stored of codecs: JSON values by modality, and tensors as ``modality.name``."""
    states = {name: codec.state() for name, codec in codecs.items()}
    kinds = {name: {"kind": codecs[name].kind, **values} for name, (values, _) in states.items()}
    return kinds, {f"{name}.{k}": v.contiguous() for name, (_, own) in states.items()
                   for k, v in own.items()}


def stored_codecs(
    configs: dict[str, Any], tensors: dict[str, Tensor], pretrained: str
) -> Codecs:
    """Codecs by modality: the inverse of :func:`codec_states`.

    Args:
        pretrained: where the weights of those are that are not stored whole.
    """
    codecs = {}
    for name, stored in configs.items():
        config = dict(stored)
        kind = choose("codec", config.pop("kind"), CODECS)
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items()
               if k.startswith(f"{name}.")}
        elsewhere = {"source": pretrained} if issubclass(kind, Pretrained) else {}
        codecs[name] = kind.from_state(config, own, **elsewhere)
    return codecs


def find_model(name: str | os.PathLike) -> Path:
    """The folder of a model. Raises ValueError for one that is not there."""
    shipped = [folder / str(name) for folder in checkpoints.shipped_folders()]
    places = [Path(name), Path(name) / "model", *shipped]
    for folder in places:
        if (folder / "config.json").is_file():
            return folder
    known = [p.parent.name for f in checkpoints.shipped_folders() for p in f.glob("*/config.json")]
    raise ValueError(f"there is no model {str(name)!r}: neither a shipped one nor a folder with "
                     f"config.json.{suggest(str(name), known)}")


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of two flat noises: stays as long as Gaussian noise is."""
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, weight)
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)


def _encoding_seed(seed: int | None) -> int | None:
    """Of what encoding draws: other numbers than the noise that sampling starts from."""
    return seeds.nth(seed, 999)


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {name}={value!r}")
