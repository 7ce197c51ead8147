"""The codecs of full size, with small networks of random weights in the layout of the real ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minidiffuser import UniDiffuser
from minidiffuser.codecs import CaptionDecoderCodec, StableDiffusionCodec
from minidiffuser.codecs.pretrained import CaptionDecoder, digest_of
from minidiffuser.config import PRESETS
from minidiffuser.convert import config_of_diffusers
from minidiffuser.data import features, load_table
from minidiffuser.data.stream import FeatureSource, open_source
from minidiffuser.train import Trainer

ROOT = Path(__file__).parents[1]
LENGTH, DIM, SIZE = 9, 6, 32


def make_weights(folder, seed=0):
    """All components of a UniDiffuserPipeline but its network."""
    from diffusers import AutoencoderKL
    from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserTextDecoder
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, norm_num_groups=4,
        latent_channels=4, scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    CLIPVisionModelWithProjection(CLIPVisionConfig(
        **shape, image_size=16, patch_size=8, projection_dim=512,
    )).save_pretrained(folder / "image_encoder")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16},
                       ).save_pretrained(folder / "clip_image_processor")
    words = ["<pad>", "<start>", "<end>", "red", "blue", "apple", "face", "of"]
    CLIPTextModel(CLIPTextConfig(
        **shape, vocab_size=len(words), max_position_embeddings=LENGTH, eos_token_id=2,
        bos_token_id=1, pad_token_id=0)).save_pretrained(folder / "text_encoder")
    for name in ("clip_tokenizer", "text_tokenizer"):
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)},
                                               unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<start>",
            model_max_length=LENGTH).save_pretrained(folder / name)
    decoder = UniDiffuserTextDecoder(
        prefix_length=LENGTH, prefix_inner_dim=16, prefix_hidden_dim=DIM, vocab_size=len(words),
        n_positions=128, n_embd=16, n_layer=2, n_head=2, activation_function="gelu")
    # As initialised, all words would be about as likely, and no caption would ever end.
    std = {"transformer.transformer.wpe.weight": 1.5, "transformer.transformer.wte.weight": 0.4}
    for name, p in decoder.named_parameters():
        torch.nn.init.normal_(p, std=std.get(name, 0.3))
    decoder.save_pretrained(folder / "text_decoder", safe_serialization=False)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def images(weights):
    return StableDiffusionCodec(weights, SIZE)


@pytest.fixture(scope="module")
def texts(weights):
    return CaptionDecoderCodec(weights, LENGTH, DIM)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
            for h, w in ((40, 70), (32, 32), (90, 50))]


# ---- images --------------------------------------------------------------------------------------


def test_latents_are_those_of_the_networks(images, pictures, weights):
    """From the middle square of each image: see section 2 of what is known of the official code."""
    from diffusers import AutoencoderKL
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    vae = AutoencoderKL.from_pretrained(weights / "vae")
    clip = CLIPVisionModelWithProjection.from_pretrained(weights / "image_encoder")
    processor = CLIPImageProcessor.from_pretrained(weights / "clip_image_processor")
    made, moments = images.encode(pictures), images.to_disk(pictures)["moments"]
    assert {k: v.shape[1:] for k, v in made.items()} == images.shapes()
    assert images.shapes() == {"clip_img": (1, 512), "z": (4, 4, 4)}
    boxes = [(15, 0, 55, 40), (0, 0, 32, 32), (0, 20, 50, 70)]
    for i, (picture, box) in enumerate(zip(pictures, boxes, strict=True)):
        square = picture.crop(box).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        x = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latent = vae.encode(x).latent_dist
            z, std = latent.mode() * 0.18215, latent.std * 0.18215
            c = clip(processor(images=square, return_tensors="pt")["pixel_values"]).image_embeds
        torch.testing.assert_close(made["z"][i], z[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moments[i], torch.cat([z, std], 1)[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(made["clip_img"][i], c, atol=1e-5, rtol=1e-4)
        assert abs(float(c.norm()) - 1) > 0.01  # not normalised, so neither may ours be


def test_z_is_drawn_from_its_distribution(images, pictures):
    mean = images.encode(pictures[:1])["z"]
    std = images.to_disk(pictures[:1])["moments"].chunk(2, 1)[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([images.encode(pictures[:1], generator)["z"] for _ in range(100)])
    scaled = (drawn - mean) / std
    assert abs(float(scaled.mean())) < 0.05 and abs(float(scaled.std()) - 1) < 0.05
    assert (std > 0.01).any()  # there is something to draw


def test_decoding_is_the_autoencoders(images, pictures, weights):
    from diffusers import AutoencoderKL

    made = images.encode(pictures * 4)  # more than are decoded at once
    back = images.decode(made)
    vae = AutoencoderKL.from_pretrained(weights / "vae")
    with torch.no_grad():
        x = vae.decode(made["z"][-1:] / 0.18215).sample[0].permute(1, 2, 0)
    expected = ((x + 1) * 127.5).clamp(0, 255).numpy()
    assert len(back) == 12 and back[-1].size == (SIZE, SIZE)
    np.testing.assert_allclose(np.asarray(back[-1], dtype=float), expected, atol=0.51)


# ---- captions ------------------------------------------------------------------------------------


def port(weights):
    from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserTextDecoder

    return UniDiffuserTextDecoder.from_pretrained(weights / "text_decoder").eval()


def test_captions_become_what_the_port_makes_of_them(texts, weights):
    """Padded to the length, cut at it, and what fills them up is read too."""
    from transformers import CLIPTextModel

    captions = ["red apple", "face of blue apple", "red " * 40, ""]
    z = texts.encode(captions)
    assert z.shape == (4, *texts.shape) == (4, LENGTH, DIM) and z.dtype == torch.float32
    ids = torch.zeros(4, LENGTH, dtype=torch.long)
    ids[0, :2], ids[1, :4], ids[2] = torch.tensor([3, 5]), torch.tensor([6, 7, 4, 5]), 3
    with torch.no_grad():
        hidden = CLIPTextModel.from_pretrained(weights / "text_encoder")(ids).last_hidden_state
        torch.testing.assert_close(z, port(weights).encode(hidden), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_captions_come_back_as_the_port_writes_them(texts, weights, seed):
    """The official beam search, in one batch; the port takes captions one by one."""
    z = 2 * torch.randn(20, LENGTH, DIM, generator=torch.Generator().manual_seed(seed))
    ours, decoder, tokenizer = texts.decode(z), port(weights), texts.decoder[1]
    theirs, lengths, end = [], [], tokenizer.eos_token_id
    for row in z[:, None]:
        ids, (length,) = decoder.generate_captions(row, end, "cpu")
        assert texts.decoder[0].captions(row, end) == [ids[0, :length].tolist()]
        theirs.append(tokenizer.decode(ids[0, :length], skip_special_tokens=True).strip())
        lengths.append(int(length))
    assert ours == theirs
    # They differ, and end, at different places.
    assert len(set(theirs)) > 5 and len(set(lengths)) >= 3 and max(lengths) < 67
    assert texts.decode(z[:1]) == ours[:1]  # whatever else is in the batch


@pytest.mark.parametrize("sure", [0.5, 1, 2, 4])
def test_all_beams_are_the_ports(weights, sure):
    """Of decoders that are more or less sure of the next word."""
    ours = CaptionDecoder.from_pretrained(weights / "text_decoder").eval()
    theirs = port(weights)
    z = 2 * torch.randn(10, LENGTH, DIM, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for decoder in (ours, theirs):  # the head shares these weights
            decoder.transformer.transformer.wte.weight *= sure
        tokens, count, mean = ours.beams(z, 2)
        prefix = theirs.decode_prefix(z)
    for i in range(len(z)):
        beams = theirs.generate_beam(input_embeds=prefix[i, None], device="cpu", eos_token_id=2)
        own = [tokens[i, k, : count[i, k]].tolist() for k in mean[i].argsort(descending=True)]
        assert own == [ids[:n].tolist() for ids, n in zip(*beams, strict=True)]


def test_captions_without_an_end_are_cut_as_the_port_cuts_them(texts, weights):
    z = 2 * torch.randn(4, LENGTH, DIM, generator=torch.Generator().manual_seed(1))
    never = 10_000  # no token of this vocabulary
    ids, lengths = port(weights).generate_captions(z, never, "cpu")
    assert lengths.tolist() == [67] * 4
    assert texts.decoder[0].captions(z, never) == ids.tolist()


def test_old_and_new_files_of_the_decoder(weights, tmp_path):
    """Masks that old versions of transformers stored, and an embedding that is stored once."""
    folder = shutil.copytree(weights / "text_decoder", tmp_path / "text_decoder")
    state = torch.load(folder / "diffusion_pytorch_model.bin", weights_only=True)
    expected = CaptionDecoder.from_pretrained(folder).state_dict()
    old = {**state, "transformer.transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
           "transformer.transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    new = {k: v for k, v in state.items() if k != "transformer.lm_head.weight"}
    for name, tensors in (("bin", old), ("safetensors", new)):
        file = folder / f"diffusion_pytorch_model.{name}"
        (torch.save if name == "bin" else save_file)(tensors, file)
        found = CaptionDecoder.from_pretrained(folder).state_dict()
        assert all(torch.equal(found[k], v) for k, v in expected.items())
        (folder / "diffusion_pytorch_model.bin").write_bytes(b"")  # safetensors is preferred


# ---- where weights come from ---------------------------------------------------------------------


def test_from_the_hub_come_only_the_files_that_are_needed(weights, tmp_path, monkeypatch):
    """A stand-in for the hub, which gives what its own filter lets through."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = [f.relative_to(weights) for f in weights.rglob("*") if f.is_file()]
    more = ["unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors",
            "vae/flax_model.msgpack", "text_encoder/tf_model.h5", "vae/diffusion_pytorch_model.bin",
            "text_decoder/diffusion_pytorch_model.fp16.bin"]

    def snapshot_download(name, allow_patterns, ignore_patterns):
        assert name == "someone/unidiffuser"
        for file in filter_repo_objects([str(f) for f in files] + more,
                                        allow_patterns=allow_patterns,
                                        ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            shutil.copy(weights / file, tmp_path / file)  # fails for what should not be asked for
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    codec = StableDiffusionCodec("someone/unidiffuser", SIZE)
    codec.load()
    assert codec.digest == StableDiffusionCodec(weights, SIZE).state()[0]["digest"]
    assert {f.name for f in tmp_path.iterdir()} == set(codec.components)
    CaptionDecoderCodec("someone/unidiffuser", LENGTH, DIM).load()  # its decoder is a .bin only


# ---- what goes wrong -----------------------------------------------------------------------------


def test_what_is_not_there_is_explained(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="neither a folder here nor .* give a folder"):
        StableDiffusionCodec("thu-ml/unidiffuser-v1", SIZE).encode([Image.new("RGB", (9, 9))])
    (tmp_path / "image_encoder").mkdir()
    with pytest.raises(ValueError, match="lacks vae, clip_image_processor"):
        StableDiffusionCodec(tmp_path, SIZE).load()
    damaged = shutil.copytree(weights, tmp_path / "damaged")
    for file in (damaged / "vae").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="vae cannot be loaded"):
        StableDiffusionCodec(damaged, SIZE).load()
    with pytest.raises(ValueError, match="must be a string, got int"):
        CaptionDecoderCodec(weights, LENGTH, DIM).encode([3])


@pytest.mark.parametrize("length, dim, message", [
    (77, DIM, "longest text is 9, and this model needs 77"),
    (LENGTH, 64, r"is \(9, 6\), and this model needs \(9, 64\)"),
])
def test_weights_of_another_shape_are_refused(weights, length, dim, message):
    with pytest.raises(ValueError, match=message):
        CaptionDecoderCodec(weights, length, dim).load()


@pytest.mark.parametrize("library, codec", [
    ("diffusers", StableDiffusionCodec), ("transformers", CaptionDecoderCodec)])
def test_a_library_that_is_missing_is_named_with_its_extra(weights, monkeypatch, library, codec):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ValueError, match=rf"needs `{library}`: pip install .*full-size"):
        codec(weights, SIZE).load()


class Runs:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", [
    "vae/diffusion_pytorch_model.bin", "image_encoder/pytorch_model.bin",
    "text_encoder/pytorch_model.bin", "text_decoder/diffusion_pytorch_model.bin",
])
def test_a_file_that_would_run_code_is_not_loaded(weights, tmp_path, file):
    folder = shutil.copytree(weights, tmp_path / "w")
    for safe in (folder / file).parent.glob("*.safetensors"):
        safe.unlink()
    torch.save({"run": Runs(tmp_path / "ran")}, folder / file)
    codecs = StableDiffusionCodec(folder, SIZE), CaptionDecoderCodec(folder, LENGTH, DIM)
    codec = next(c for c in codecs if file.split("/")[0] in c.components)
    with pytest.raises(ValueError, match=f"{file.split('/')[0]} cannot be loaded"):
        codec.load()
    assert not (tmp_path / "ran").exists()
    torch.load(folder / file, weights_only=False)  # it would have
    assert (tmp_path / "ran").exists()


def test_other_weights_are_not_taken_for_those_of_the_latents(weights, images, tmp_path):
    state, tensors = images.state()
    assert tensors == {} and state["digest"] == digest_of(
        weights / name for name in images.components)
    moved = shutil.copytree(weights, tmp_path / "moved")
    StableDiffusionCodec.from_state(state, {}, str(moved)).load()
    other = make_weights(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="not those that the latents were made with"):
        StableDiffusionCodec.from_state(state, {}, str(other)).load()


# ---- features, training and a model --------------------------------------------------------------


@pytest.fixture(scope="module")
def cfg(weights):
    """The official preset, but small."""
    return PRESETS["unidiffuser-v1"].replace(
        pretrained=str(weights), image_size=SIZE, caption_length=LENGTH, caption_dim=DIM, dim=32,
        depth=2, heads=2, batch_size=8, steps=4, warmup=1, log_every=2, save_every=2,
        sample_every=4, precision="no", checkpoint=False)


@pytest.fixture(scope="module")
def encoded(cfg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    table = folder / "table"
    table.mkdir()
    load_table("emoji").select(range(40)).to_parquet(table / "train.parquet")
    report = features.encode(table, folder / "out", cfg, shard_rows=15)
    assert (report.read, report.written, report.shards) == (40, 40, 3)
    return folder / "out"


def test_features_hold_what_the_codecs_make(cfg, encoded, images, texts):
    source = open_source(cfg.replace(data=str(encoded)))
    assert isinstance(source, FeatureSource)
    row = load_table("emoji").select([17])[0]
    stored = source.row(1, 2)
    assert {k: v.dtype for k, v in stored.items()} == dict.fromkeys(
        ("image.clip_img", "image.moments", "text.latents"), torch.float16)
    expected = images.to_disk([row["image"]])
    for name in ("moments", "clip_img"):
        torch.testing.assert_close(stored[f"image.{name}"].float(), expected[name][0],
                                   atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(stored["text.latents"].float(), texts.encode([row["TEXT"]])[0],
                               atol=2e-3, rtol=2e-3)
    assert source.prompts(4) == [load_table("emoji")[i]["TEXT"] for i in (0, 15, 30, 1)]


def test_nothing_is_read_to_fit_what_is_not_fitted(cfg):
    def never():
        raise AssertionError

    codecs = features.fit_codecs(cfg, [never])
    assert [codec.kind for codec in codecs.values()] == ["sd-vae+clip", "clip+gpt2"]


def test_encoding_runs_on_the_processs_own_device(cfg, tmp_path, monkeypatch):
    state, seen, real = features.processes(), [], StableDiffusionCodec.to_disk
    monkeypatch.setattr(state, "device", torch.device("cpu", 0))
    monkeypatch.setattr(features, "processes", lambda: state)
    monkeypatch.setattr(StableDiffusionCodec, "to_disk",
                        lambda self, items: seen.append(self.device) or real(self, items))
    load_table("emoji").select(range(3)).to_parquet(tmp_path / "train.parquet")
    features.encode(tmp_path, tmp_path / "out", cfg)
    assert seen == [torch.device("cpu", 0)]


def test_z_is_drawn_anew_each_epoch_whoever_reads_it(cfg, encoded):
    source = open_source(cfg.replace(data=str(encoded)))
    whole = source.batch(0)
    assert {k: v.shape[1:] for k, v in whole.items()} == {
        p.name: p.shape for p in cfg.parts()}
    again = FeatureSource(cfg.replace(data=str(encoded)))
    for rank in range(2):
        share = again.batch(0, rank, 2)
        assert all(torch.equal(share[k], whole[k][rank::2]) for k in whole)
    rows = [source.row(s, r) for s, n in enumerate(source.sizes) for r in range(n)]
    clip_img = torch.stack([row["image.clip_img"].float().flatten() for row in rows])
    mean, std = torch.stack([row["image.moments"].float() for row in rows]).chunk(2, dim=1)
    eps = []
    for epoch in range(2):
        batches = [source.batch(step) for step in range(5 * epoch, 5 * epoch + 5)]
        seen = torch.cat([b["clip_img"].flatten(1) for b in batches])
        which = torch.cdist(seen, clip_img).argmin(1)
        assert sorted(which.tolist()) == list(range(40))
        z = torch.cat([b["z"] for b in batches])
        eps.append(((z - mean[which]) / std[which])[which.argsort()])
    for drawn in eps:
        assert abs(float(drawn.mean())) < 0.1 and abs(float(drawn.std()) - 1) < 0.1
    assert not torch.isclose(*eps).flatten(1).all(1).any()


def test_training_sampling_and_storing(cfg, encoded, weights, tmp_path, caplog):
    run = cfg.replace(data=str(encoded))
    for step in Trainer(run, tmp_path / "run", cpu=True):
        if step.index == 3:
            break
    trainer = Trainer(run, tmp_path / "run", cpu=True)
    assert trainer.step == 2
    for _ in trainer:
        pass
    for _ in (whole := Trainer(run, tmp_path / "whole", cpu=True)):
        pass
    a, b = trainer.net.state_dict(), whole.net.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [f.name for f in (tmp_path / "run" / "samples").iterdir()] == ["step_0000004.png"]
    assert not caplog.text.count("no samples")
    pipe = UniDiffuser.from_pretrained(tmp_path / "run")
    how = {"steps": 2, "seed": 3}
    [image] = pipe.text_to_image("red apple", **how)
    assert image.size == (SIZE, SIZE)
    assert isinstance(pipe.image_to_text(image, **how)[0], str)
    [(picture, caption)] = pipe.joint(**how)
    assert picture.size == (SIZE, SIZE) and isinstance(caption, str)
    assert len(pipe.vary_image(image, n=2, **how)) == 2
    assert len(pipe.interpolate(image, picture, n=3, steps=3)) == 3


def test_given_images_are_drawn_as_the_official_sampler_does(cfg, encoded, tmp_path, pictures):
    trainer = Trainer(cfg.replace(data=str(encoded)), tmp_path / "run", cpu=True)
    pipe = trainer.pipeline()
    mean, one, same, other = (pipe.encode({"image": pictures[0]}, 2, seed)["z"]
                              for seed in (None, 1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, mean)
    assert torch.equal(one[0], one[1])  # n samples of one image
    assert torch.equal(mean[:1], pipe.codecs["image"].encode(pictures[:1])["z"])


def test_tasks_draw_what_they_are_given(cfg, encoded, tmp_path, pictures, monkeypatch):
    """By their own seed, and other numbers than the noise they start from."""
    pipe = Trainer(cfg.replace(data=str(encoded)), tmp_path / "run", cpu=True).pipeline()
    mean, given = pipe.encode({"image": pictures[0]})["z"], []
    monkeypatch.setattr(pipe, "sample_latents", lambda roles, x, n, **how: given.append(x) or {})
    monkeypatch.setattr(pipe, "decode", lambda x: {"text": [], "image": []})
    for seed in (0, 0, 1):
        pipe.image_to_text(pictures[0], seed=seed)
    pipe.vary_image(pictures[0], seed=0)
    pipe.gibbs(pictures[0], rounds=1, seed=0)
    drawn = [x["z"] for x in given if "z" in x]
    assert len(drawn) == 5
    assert all(torch.equal(z, drawn[0]) for z in (drawn[1], drawn[3], drawn[4]))
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], mean)
    std = pipe.codecs["image"].to_disk(pictures[:1])["moments"].chunk(2, 1)[1]
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose((drawn[0] - mean) / std, noise, atol=1e-3)


def test_a_model_and_its_codecs_run_on_one_device(cfg, encoded, tmp_path):
    trainer = Trainer(cfg.replace(data=str(encoded)), tmp_path / "run", cpu=True)
    pipe = UniDiffuser(cfg, trainer.net, trainer.codecs, torch.device("cpu", 0))
    assert all(codec.device == torch.device("cpu", 0) for codec in pipe.codecs.values())
    for codec in pipe.codecs.values():
        codec.load()
        codec.to("meta")  # what has been read comes along
    image, text = pipe.codecs["image"], pipe.codecs["text"]
    networks = (image.vae, image.clip[0], text.encoder[0], text.decoder[0])
    assert all(p.device.type == "meta" for network in networks for p in network.parameters())


def test_training_goes_on_without_the_weights(cfg, encoded, tmp_path, caplog):
    """Latents are all it reads; only pictures need decoding."""
    run = cfg.replace(data=str(encoded), pretrained=str(tmp_path / "nothing"))
    for _ in Trainer(run, tmp_path / "run", cpu=True):
        pass
    assert "no samples are drawn" in caplog.text
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "samples").exists()
    moved = Trainer(run.replace(pretrained=cfg.pretrained), tmp_path / "run", cpu=True)
    assert moved.step == 4  # the weights may lie elsewhere when a run goes on


def test_a_table_is_encoded_before_training(cfg, tmp_path):
    with pytest.raises(ValueError, match="data encode emoji --out FEATURES"):
        Trainer(cfg.replace(data="emoji"), tmp_path / "run", cpu=True)


def test_the_command_encodes_with_pretrained_codecs(cli, weights, tmp_path):
    table = tmp_path / "table"
    table.mkdir()
    load_table("emoji").select(range(6)).to_parquet(table / "train.parquet")
    words = ["--preset", "unidiffuser-v1", "--pretrained", weights, "--image_size", SIZE,
             "--caption_length", LENGTH, "--caption_dim", DIM]
    done = cli("data", "encode", table, "--out", tmp_path / "out", *words)
    assert done.code == 0, done.err
    assert "6 written to 1 shards" in done.out
    stored = load_file(tmp_path / "out" / "shard_00000.safetensors")
    assert stored["image.moments"].shape == (6, 8, 4, 4)
    kinds = json.loads((tmp_path / "out" / "codecs.json").read_text())
    assert {k: v["kind"] for k, v in kinds.items()} == {"image": "sd-vae+clip",
                                                       "text": "clip+gpt2"}


# ---- the official model, as diffusers stores it --------------------------------------------------


@pytest.fixture(scope="module", params=["v0", "v1"])
def official(request, cfg, weights, tmp_path_factory):
    """A folder like the hub's, with a small network, and that network as diffusers builds it."""
    from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel

    folder = shutil.copytree(weights, tmp_path_factory.mktemp("official") / "model")
    torch.manual_seed(2)
    theirs = UniDiffuserModel(
        text_dim=DIM, num_text_tokens=LENGTH, clip_img_dim=512, in_channels=4, out_channels=4,
        sample_size=4, patch_size=2, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        activation_fn="gelu", num_embeds_ada_norm=1000,
        use_data_type_embedding=request.param == "v1")
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs.eval().save_pretrained(folder / "unet")
    return folder, theirs


def test_the_hubs_configuration_is_the_presets():
    """Of `unet/config.json`, the values that the network's shape depends on."""
    values = {"sample_size": 64, "patch_size": 2, "num_layers": 30, "num_attention_heads": 24,
              "attention_head_dim": 64, "text_dim": 64, "num_text_tokens": 77}
    for name, kinds in (("unidiffuser-v0", False), ("unidiffuser-v1", True)):
        cfg = config_of_diffusers({**values, "use_data_type_embedding": kinds}, f"thu-ml/{name}")
        assert cfg == PRESETS[name].replace(pretrained=f"thu-ml/{name}", checkpoint=False)


def test_the_network_is_the_ports(official):
    folder, theirs = official
    pipe = UniDiffuser.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    x = {p.name: torch.randn(3, *p.shape, generator=generator) for p in pipe.parts}
    t = {"image": torch.tensor([0.0, 20.98, 1000.0]), "text": torch.tensor([500.5, 0.0, 999.0])}
    made = pipe.net(x, t)
    with torch.no_grad():
        z, clip_img, text = theirs(x["z"], x["clip_img"], x["text"], t["image"], t["text"])
    for name, expected in {"z": z, "clip_img": clip_img, "text": text}.items():
        torch.testing.assert_close(made[name], expected, atol=1e-5, rtol=1e-5)


def test_the_official_model_is_asked_like_any_other(official, cli, tmp_path):
    folder, _ = official
    pipe = UniDiffuser.from_pretrained(folder)
    how = {"steps": 3, "solver": "dpm++fast", "guidance_scale": 7.0}
    image, again = (pipe.text_to_image("red apple", seed=0, **how)[0] for _ in range(2))
    assert np.array_equal(image, again) and image.size == (SIZE, SIZE)
    assert all(isinstance(c, str) for c in pipe.image_to_text(image, n=2, **how))
    pipe.save_pretrained(tmp_path / "ours", torch.float32)
    stored = UniDiffuser.from_pretrained(tmp_path / "ours")
    assert np.array_equal(stored.text_to_image("red apple", seed=0, **how)[0], image)
    done = cli("sample", "text-to-image", "--prompt", "red apple", "--model", folder, "--steps", 3,
               "--solver", "dpm++fast", "--guidance-scale", 7, "--out", tmp_path / "a.png")
    assert done.code == 0, done.err
    assert np.array_equal(Image.open(tmp_path / "a.png"), image)


def test_an_official_model_that_is_not_there_or_not_one(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="'thu-ml/unidiffuser-v1' is neither a folder here nor"):
        UniDiffuser.from_pretrained("thu-ml/unidiffuser-v1")
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text('{"sample_size": 64}')
    with pytest.raises(ValueError, match="does not hold a UniDiffuser: .* has num_attention_heads"):
        UniDiffuser.from_pretrained(tmp_path)


def test_the_numbers_of_full_size_are_those_measured():
    """What the pages say of a run at the real size (benchmarks/full_size.py)."""
    measured = json.loads((ROOT / "benchmarks" / "full_size.json").read_text())
    assert (ROOT / "README.md").read_text().count(
        f"{measured['parameters']:,} parameters and the encoders around them, in "
        f"{measured['gib_at_most']} GiB") == 1
    assert f"are {measured['bytes_per_row']:,} bytes" in (ROOT / "docs" / "laion.md").read_text()
    shapes = PRESETS["unidiffuser-v1"].parts()
    assert measured["parameters"] == 952_509_520
    assert measured["features"] == {
        "image.clip_img": list(shapes[1].shape), "text.latents": list(shapes[0].shape),
        "image.moments": [2 * shapes[2].shape[0], *shapes[2].shape[1:]]}
