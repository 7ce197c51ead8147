"""The official model at its real size, with random weights: does it load, encode, train and sample?

    python benchmarks/full_size.py            # about three minutes on two CPU cores, 6 GB of disk

Every network of a diffusers `UniDiffuserPipeline` is made at the size of the official one and
stored as the hub stores it; what is then asked of minidiffuser is what one would ask of the real
weights.  Random weights make noise, so nothing is said of quality, only of sizes and of the code.
The result goes to benchmarks/full_size.json.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from minidiffuser import UniDiffuser
from minidiffuser.config import preset
from minidiffuser.data import load_table
from minidiffuser.data.features import encode
from minidiffuser.train import Trainer

ROWS = 8


def store_networks(folder: Path) -> None:
    """Every component in diffusers' layout: the official sizes, and weights as initialised."""
    from diffusers import AutoencoderKL
    from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel, UniDiffuserTextDecoder
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4,
    ).save_pretrained(folder / "vae")
    CLIPVisionModelWithProjection(CLIPVisionConfig()).save_pretrained(folder / "image_encoder")
    CLIPImageProcessor().save_pretrained(folder / "clip_image_processor")
    CLIPTextModel(CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768,
    )).save_pretrained(folder / "text_encoder")
    UniDiffuserTextDecoder(
        prefix_length=77, prefix_inner_dim=768, prefix_hidden_dim=64, vocab_size=50258,
        activation_function="gelu",
    ).save_pretrained(folder / "text_decoder", safe_serialization=False)
    UniDiffuserModel(
        text_dim=64, num_text_tokens=77, clip_img_dim=512, in_channels=4, out_channels=4,
        sample_size=64, patch_size=2, num_layers=30, num_attention_heads=24,
        attention_head_dim=64, activation_fn="gelu", num_embeds_ada_norm=1000,
        use_data_type_embedding=True,
    ).save_pretrained(folder / "unet")


def store_tokenizers(folder: Path) -> None:
    """Of words, since the real vocabularies are downloads too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    captions = load_table("emoji", columns=["TEXT"])["TEXT"]
    words = sorted({word for caption in captions for word in caption.split()})
    for name, longest in (("clip_tokenizer", 77), ("text_tokenizer", 1024)):
        vocabulary = {w: i for i, w in enumerate(["<end>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>", bos_token="<end>",
            model_max_length=longest).save_pretrained(folder / name)


def ask(folder: Path, work: Path) -> dict:
    """Load it, encode a table, train on that, and sample."""
    result: dict = {"seconds": {}}

    def timed(what, call):
        start = time.perf_counter()
        made = call()
        result["seconds"][what] = round(time.perf_counter() - start, 1)
        print(f"{what}: {result['seconds'][what]} s", flush=True)
        return made

    table = work / "table"
    table.mkdir()
    load_table("emoji").select(range(ROWS)).to_parquet(table / "train.parquet")
    cfg = preset("unidiffuser-v1").replace(pretrained=str(folder))
    report = timed(f"encode {ROWS} rows", lambda: encode(table, work / "features", cfg))
    tensors = load_file(work / "features" / "shard_00000.safetensors")
    result["features"] = {name: list(z.shape[1:]) for name, z in tensors.items()}
    result["bytes_per_row"] = sum(z[0].nbytes for z in tensors.values())
    assert report.written == ROWS

    result |= sample(folder, timed)
    # All of it but the width: three more copies of the real network would not fit everywhere.
    run = cfg.replace(data=str(work / "features"), batch_size=2, dim=384, heads=6)
    step = timed("a step of a narrower network at batch 2", lambda: next(iter(
        Trainer(run, work / "run", cpu=True))))
    result["loss"] = {name: round(float(loss.mean()), 3)
                      for name, loss in step.batch.per_part.items()}
    result["gib_at_most"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    return result


def sample(folder: Path, timed: Callable) -> dict:
    """Text to image, and back."""
    pipe = timed("load", lambda: UniDiffuser.from_pretrained(folder))
    [image] = timed("text to image, 2 steps, guidance 7", lambda: pipe.text_to_image(
        "red apple", steps=2, solver="dpm++fast", guidance_scale=7.0))
    captions = timed("image to text, 2 steps", lambda: pipe.image_to_text(
        image, steps=2, guidance_scale=0.0))
    assert len(captions) == 1
    return {"parameters": sum(p.numel() for p in pipe.net.parameters()), "image": image.size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="a folder to keep the networks in")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = args.weights or Path(work) / "weights"
        if not (folder / "unet").is_dir():
            store_networks(folder)
            store_tokenizers(folder)
        result = ask(folder, Path(work))
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
