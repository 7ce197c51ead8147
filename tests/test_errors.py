"""Errors a user will meet: each says what was wrong, where, and what to do; never a stack trace."""

import errno
import json
import re
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minidiffuser import UniDiffuser, checkpoints, pipeline
from minidiffuser.codecs import load_image
from minidiffuser.config import PRESETS, preset
from minidiffuser.data import load_table
from minidiffuser.errors import choose, explained, suggest
from minidiffuser.tasks import Role, roles_of

PROMPT = "red apple"
BLANK = Image.new("RGB", (16, 16))


def fails(call, *parts):
    """The message of the ValueError that ``call`` raises, one line that holds all of ``parts``."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
            call()
    message = str(caught.value)
    assert "\n" not in message and not seen  # a warning would be in the way
    for part in parts:
        assert part in message, message
    return message


# ---- names ---------------------------------------------------------------------------------------


def test_the_nearest_names_are_suggested():
    assert suggest("tyo", ["toy", "emoji"]) == " Did you mean 'toy'?"
    assert suggest("qqqq", ["toy", "emoji"]) == " Known: 'toy', 'emoji'."
    assert suggest("qqqq", []) == " Known: none."
    assert suggest("qqqq", map(str, range(50))).endswith("'11', ....")
    assert choose("fruit", "pear", {"pear": 3}) == 3
    fails(lambda: choose("fruit", "paer", {"pear": 3}), "unknown fruit 'paer'", "'pear'")


def test_unknown_names(pipe):
    fails(lambda: preset("emojis"), "unknown preset 'emojis'", "Did you mean 'emoji'")
    fails(lambda: preset("qqqq"), *map(repr, PRESETS))
    fails(lambda: roles_of("text2image"), "unknown task 'text2image'", "'text-to-image'")
    fails(lambda: load_table("emojy"), "no table 'emojy'", "'emoji'")
    fails(lambda: load_table("emoji", "trian"), "no split 'trian'", "'train'")
    fails(lambda: load_table("emoji", "test", ["TXET"]), "no column 'TXET'", "'TEXT'")
    fails(lambda: pipe.text(solver="dpm+2m"), "unknown solver 'dpm+2m'", "'dpm++2m'")
    fails(lambda: pipe.sample("imgae"), "unknown modality 'imgae'", "'image'")
    fails(lambda: pipe.sample("image", {"txt": PROMPT}), "unknown modality 'txt'", "'text'")


def test_an_unknown_checkpoint(model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "shipped_folders", lambda: [model_folder.parent])
    fails(lambda: UniDiffuser.from_pretrained("tooy"), "no model 'tooy'", "Did you mean 'toy'")
    fails(lambda: UniDiffuser.from_pretrained(tmp_path), str(tmp_path), "config.json")


def test_modalities_that_make_no_task(pipe):
    fails(lambda: pipe.sample("image", {"image": BLANK}), "'image'", "both sampled and given")
    fails(lambda: pipe.sample(()), "nothing to sample", "'image'")


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, parts", [
    ("", ["empty", "at least one word"]),
    ("  \n", ["empty"]),
    ("red " * 17, ["17 tokens", "16"]),
    ("red aple", ["'aple'", "'apple'"]),
    ("rouge pomme", ["'rouge'", "'pomme'"]),
    (None, ["must be a string", "NoneType"]),
    (7, ["must be a string", "int"]),
])
def test_prompts_that_cannot_be_read(pipe, prompt, parts):
    fails(lambda: pipe.text_to_image(prompt), *parts)
    fails(lambda: pipe.vary_text(prompt), *parts)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how, parts", [
    ({"steps": 0}, ["steps=0", "at least 1"]),
    ({"steps": -3}, ["steps=-3"]),
    ({"steps": 2.5}, ["steps=2.5", "integer"]),
    ({"n": 0}, ["n=0", "at least 1"]),
    ({"n": -1}, ["n=-1"]),
    ({"n": 1.5}, ["n=1.5", "integer"]),
    ({"n": "3"}, ["n='3'", "integer"]),
    ({"guidance_scale": -0.5}, ["guidance_scale", "at least 0", "-0.5"]),
    ({"guidance_scale": float("nan")}, ["guidance_scale", "nan"]),
    ({"guidance_scale": float("inf")}, ["guidance_scale", "inf"]),
    ({"solver": "ddim", "eta": 1.5}, ["eta=1.5", "[0, 1]"]),
    ({"solver": "ddim", "eta": float("nan")}, ["eta=nan"]),
    ({"eta": 0.5}, ["eta=0.5", "'ddim'", "'dpm++2m'"]),
    ({"seed": 1.5}, ["seed", "1.5"]),
    ({"seed": "lucky"}, ["seed", "'lucky'"]),
    ({"seed": 2**70}, ["seed", "64 bits"]),
])
def test_numbers_that_make_no_sense(pipe, how, parts):
    for call in (lambda: pipe.text_to_image(PROMPT, **how), lambda: pipe.joint(**how),
                 lambda: pipe.image_to_text(BLANK, **how), lambda: pipe.vary_image(BLANK, **how),
                 lambda: pipe.gibbs(BLANK, rounds=1, **how)):
        fails(call, *parts)


def test_numbers_of_chains(pipe):
    fails(lambda: pipe.gibbs(rounds=0), "rounds=0", "at least 1")
    fails(lambda: pipe.interpolate(BLANK, BLANK, n=1), "n=1", "at least 2")
    for steps in (0, 1):
        fails(lambda s=steps: pipe.interpolate(BLANK, BLANK, steps=s), f"steps={steps}", "least 2")


def test_numpy_integers_are_integers(pipe):
    assert len(pipe.text(n=np.int64(2), steps=np.int64(2), seed=np.int64(3))) == 2


def test_a_list_must_have_one_item_or_n(pipe):
    fails(lambda: pipe.text_to_image([PROMPT] * 3, n=2), "text: got 3 items for n=2", "give one")
    fails(lambda: pipe.text_to_image([], n=2), "got 0 items")
    fails(lambda: pipe.image_to_text([BLANK] * 2), "image: got 2 items for n=1")


# ---- tensors of the wrong size -------------------------------------------------------------------


def test_latents_of_the_wrong_size(pipe):
    roles = roles_of("text-to-image")
    fails(lambda: pipe.sample_latents(roles, {"text": torch.zeros(1, 16, 31)}),
          "'text'", "(B, 16, 32)", "(1, 16, 31)")
    fails(lambda: pipe.sample_latents(roles), "'text'", "(B, 16, 32)", "None")
    fails(lambda: pipe.sample_latents(roles, {"text": torch.zeros(2, 16, 32)}, n=3),
          "'text'", "2 given for 3")
    fails(lambda: pipe.sample_latents({"image": Role.SAMPLED}), "role")


@pytest.mark.parametrize("noise", [{"image": torch.zeros(1, 3, 16, 15)}, {},
                                   {"image": torch.zeros(2, 3, 16, 16)}])
def test_noise_of_the_wrong_size(pipe, noise):
    got = tuple(noise["image"].shape) if noise else None
    fails(lambda: pipe.sample_latents(roles_of("image"), noise=noise),
          "noise['image'] must be (1, 3, 16, 16)", f"got {got}")


@pytest.mark.parametrize("array, parts", [
    (np.zeros((4, 4, 2), np.uint8), ["(4, 4, 2)", "(H, W, 3)"]),
    (np.zeros((1, 4, 4, 3), np.uint8), ["(1, 4, 4, 3)"]),
    (np.zeros(7, np.uint8), ["(7,)"]),
    (np.zeros((0, 4, 3), np.uint8), ["(0, 4, 3)"]),
    (np.zeros((4, 4), np.int64), ["uint8", "int64"]),
    (np.full((4, 4), 255.0), ["float in [0, 1]", "255"]),
    (np.full((4, 4), -0.1), ["-0.1"]),
    (np.full((4, 4), np.nan), ["nan"]),
])
def test_arrays_that_are_no_image(pipe, array, parts):
    fails(lambda: pipe.image_to_text(array), *parts)


# ---- files that are no image ---------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, 7, b"PNG", torch.zeros(3, 16, 16), {"image": 1}],
                         ids=lambda x: type(x).__name__)
def test_things_that_are_no_image(pipe, thing):
    fails(lambda: pipe.image_to_text(thing), "a PIL image, a path or a NumPy array",
          f"got {type(thing).__name__}")


def test_paths_that_are_no_image(pipe, tmp_path):
    fails(lambda: pipe.image_to_text(tmp_path / "none.png"), "there is no file", "none.png")
    fails(lambda: pipe.image_to_text(tmp_path), "there is no file")
    for name, content in (("empty.png", b""), ("page.png", b"<html>not found</html>"),
                          ("zeros.jpg", bytes(1000))):
        (tmp_path / name).write_bytes(content)
        fails(lambda n=name: pipe.image_to_text(tmp_path / n), name, "not an image")


def test_a_file_that_may_not_be_read(pipe, tmp_path, monkeypatch):
    BLANK.save(tmp_path / "a.png")

    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    fails(lambda: pipe.image_to_text(tmp_path / "a.png"), "may not read", "a.png")


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "ico", "jp2"])
def test_a_file_cut_off_anywhere(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    whole = tmp_path / f"whole.{kind}"
    Image.fromarray(pixels).save(whole)
    data, cut, refused = whole.read_bytes(), tmp_path / f"cut.{kind}", []
    for length in sorted({*range(min(40, len(data))), *range(40, len(data), 23)}):
        cut.write_bytes(data[:length])
        try:
            assert load_image(cut).size == (7, 9)  # where only what follows the image is missing
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) >= 20
    for message in refused:
        assert re.fullmatch(rf".*'{cut.name}' is (truncated or corrupt|not an image).*", message)


def bomb(path: Path, side: int) -> Path:
    """A black-and-white PNG of side x side pixels in a few hundred kilobytes at most."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    row = bytes(1 + (side + 7) // 8)
    press = zlib.compressobj(9)
    packed = b"".join(press.compress(row) for _ in range(side)) + press.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed)
                     + chunk(b"IEND", b""))
    return path


def test_the_bomb_is_an_image(tmp_path):
    assert load_image(bomb(tmp_path / "small.png", 64)).size == (64, 64)


# Above our own limit; above Pillow's, which warns; above twice Pillow's, which refuses.
@pytest.mark.parametrize("side", [7_500, 10_500, 14_000])
def test_a_decompression_bomb_is_refused_unopened(pipe, tmp_path, monkeypatch, side):
    path = bomb(tmp_path / "bomb.png", side)
    assert path.stat().st_size < side**2 / 1000

    def decode(*args):
        pytest.fail("the image was decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    fails(lambda: pipe.image_to_text(path), "bomb.png", "50,000,000", "make it smaller")


def test_an_image_in_memory_may_be_too_large_too(pipe):
    huge = Image.new("1", (10_000, 5_001))
    fails(lambda: pipe.image_to_text(huge), "10000 x 5001", "50,000,000")


# ---- models that are damaged ---------------------------------------------------------------------


@pytest.fixture
def model(model_folder, tmp_path):
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def edit(model, change):
    path = model / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    change(stored)
    path.write_text(json.dumps(stored), encoding="utf-8")


@pytest.mark.parametrize("file", ["model.safetensors", "codecs.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["cut", "empty", "noise"])
def test_damaged_files(model, file, how):
    path = model / file
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": b"\xff" * 99}[how])
    fails(lambda: UniDiffuser.from_pretrained(model), str(model), "damaged or incomplete")


@pytest.mark.parametrize("file", ["model.safetensors", "codecs.safetensors"])
def test_missing_files(model, file):
    (model / file).unlink()
    fails(lambda: UniDiffuser.from_pretrained(model), "damaged or incomplete", file)


@pytest.mark.parametrize("change, part", [
    (lambda s: s.pop("config"), "'config'"),
    (lambda s: s.pop("codecs"), "'codecs'"),
    (lambda s: s["config"].update(dmi=64), "Did you mean 'dim'"),
    (lambda s: s["config"].update(dim="wide"), "dim must be int"),
    (lambda s: s["config"].update(dim=64), "size mismatch"),
    (lambda s: s["config"].update(depth=4), "Missing key"),
    (lambda s: s["codecs"].pop("text"), "'text'"),
    (lambda s: s["codecs"]["image"].update(kind="pixel"), "Did you mean 'pixels'"),
    (lambda s: s["codecs"]["image"].update(size=32), "(3, 32, 32)"),
    (lambda s: s["codecs"]["image"].pop("size"), "size"),
    (lambda s: s["codecs"]["text"].pop("kind"), "'kind'"),
    (lambda s: s["codecs"]["text"].update(tokenizer={}), "tokenizer"),
    (lambda s: s["codecs"]["text"].update(length=15), "(15, 32)"),
    (lambda s: s.update(codecs=[]), "list"),
])
def test_a_config_that_does_not_fit(model, change, part):
    edit(model, change)
    message = fails(lambda: UniDiffuser.from_pretrained(model), "damaged or incomplete", part)
    assert len(message) < 500  # PyTorch's own lists every weight


def test_a_config_that_is_no_table(model):
    (model / "config.json").write_text("[1, 2]")
    fails(lambda: UniDiffuser.from_pretrained(model), "damaged or incomplete")


def test_codecs_without_their_tensors(model):
    tensors = load_file(model / "codecs.safetensors")
    save_file({"text.codes": tensors["text.codes"][:-1].clone()}, model / "codecs.safetensors")
    fails(lambda: UniDiffuser.from_pretrained(model), "codes do not fit a vocabulary")
    save_file({}, model / "codecs.safetensors")
    fails(lambda: UniDiffuser.from_pretrained(model), "'codes'")


# ---- nowhere to write ----------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")
FORBIDDEN = PermissionError(errno.EACCES, "Permission denied")
# How the `safetensors` library reports the first.
FULL_IN_RUST = SafetensorError("Error while serializing: I/O error: No space left on device "
                               "(os error 28)")


@pytest.mark.parametrize("error, part", [
    (FULL, "no space left"), (FULL_IN_RUST, "no space left"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
    (READ_ONLY, "read-only for you"), (FORBIDDEN, "read-only for you"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
], ids=lambda x: str(x)[:24])
def test_a_model_that_cannot_be_written(pipe, tmp_path, monkeypatch, error, part):
    def refuse(tensors, path):
        raise error

    monkeypatch.setattr(pipeline, "save_file", refuse)
    folder = tmp_path / "m"
    fails(lambda: pipe.save_pretrained(folder), f"cannot write to {folder}", part)
    assert list(folder.iterdir()) == []  # nothing half-written stays


def test_a_folder_that_cannot_be_made(pipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "model"):
        fails(lambda f=folder: pipe.save_pretrained(f), f"cannot write to {folder}")
        fails(lambda f=folder: checkpoints.prepare_folder(f), f"cannot write to {folder}")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("error, part", [(READ_ONLY, "read-only"), (FORBIDDEN, "read-only"),
                                         (FULL, "no space left")], ids=str)
def test_a_run_that_cannot_be_written_says_so_before_it_begins(tmp_path, monkeypatch, error, part):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(Path, "write_bytes", refuse)
    fails(lambda: checkpoints.prepare_folder(tmp_path), f"cannot write to {tmp_path}", part)


def test_other_failures_are_not_dressed_up(tmp_path):
    with pytest.raises(ZeroDivisionError), explained(tmp_path):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="shapes"), explained(tmp_path):
        raise RuntimeError("shapes differ")
