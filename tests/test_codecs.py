"""Codecs: round trips as exact as they claim to be, latents of the variance they claim."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minidiffuser.codecs import PCACodec, PixelCodec, WordCodec, load_image
from minidiffuser.codecs.captions import END
from minidiffuser.images import fit_square, to_uint8


def restored(codec):
    """A codec after a trip through what a checkpoint stores, JSON included."""
    config, tensors = codec.state()
    return type(codec).from_state(json.loads(json.dumps(config)), tensors)


def noise_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- pixels ------------------------------------------------------------------------------------


def test_pixels_come_back_to_the_last_bit(tables):
    pixels, _ = tables["train"]
    codec = PixelCodec.fit(pixels)
    x = torch.from_numpy(pixels)
    assert torch.equal(codec.decode_pixels(codec.encode_pixels(x)), x)


@pytest.mark.parametrize("mean, std", [(0.5, 0.5), (0.91, 0.07), (0.02, 0.9)])
def test_every_level_comes_back_whatever_the_scale(mean, std):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    codec = PixelCodec(16, mean, std)
    assert np.array_equal(np.asarray(codec.decode(codec.encode([levels]))[0]), levels)


def test_latents_of_the_training_set_have_mean_0_and_deviation_1(tables):
    pixels, _ = tables["train"]
    codec = PixelCodec.fit(pixels)
    z = codec.encode_pixels(torch.from_numpy(pixels))
    assert z.shape == (len(pixels), *codec.shape)
    assert z.dtype == torch.float32
    assert z.double().mean().abs() < 1e-5
    assert z.double().std() == pytest.approx(1, abs=1e-5)


def test_channels_rows_and_columns_keep_their_places():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[2, 5] = (255, 128, 0)
    z = PixelCodec(16, mean=0, std=1).encode([pixels])
    assert z[0, :, 2, 5].tolist() == pytest.approx([1, 128 / 255, 0])
    assert z.count_nonzero() == 2


def test_latents_out_of_range_are_clipped_not_wrapped():
    z = torch.tensor([-9.0, 9.0]).repeat(3 * 128).reshape(1, 3, 16, 16)
    image = np.asarray(PixelCodec(16).decode(z)[0])
    assert set(image[:, ::2].flat) == {0} and set(image[:, 1::2].flat) == {255}


def test_a_pixel_codec_is_stored_whole():
    codec = PixelCodec.fit(noise_image(5, 16, 16, 3))
    again, image = restored(codec), noise_image(16, 16, 3, seed=1)
    assert again.shape == codec.shape
    assert torch.equal(again.encode([image]), codec.encode([image]))


# ---- the linear autoencoder --------------------------------------------------------------------


def smooth_images(n=300, side=16):
    """Images whose patches have a falling spectrum, all of middle brightness (none is clipped)."""
    x = np.random.default_rng(0).standard_normal((n, side, side, 3)).cumsum(1).cumsum(2)
    x -= x.mean((1, 2), keepdims=True)
    return (128 + 127 * x / np.abs(x).max()).round().astype(np.uint8)


def spectrum(pixels):
    """Variances of 8 x 8 patches along their principal axes, largest first, in levels^2."""
    n, h, w, _ = pixels.shape
    patches = [pixels[:, i:i + 8, j:j + 8].reshape(n, -1)
               for i in range(0, h, 8) for j in range(0, w, 8)]
    flat = np.concatenate(patches).astype(float)
    return np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2 / len(flat)


def squared_error(codec, pixels):
    """Mean over patches of the summed squared error of a round trip."""
    x = torch.from_numpy(pixels)
    back = codec.decode_pixels(codec.encode_pixels(x))
    return float((back.double() - x.double()).square().sum()) / (len(x) * (x.shape[1] // 8) ** 2)


def test_components_are_orthonormal():
    v = PCACodec.fit(smooth_images(), dim=20).components
    assert v.shape == (192, 20)
    assert torch.allclose(v.T @ v, torch.eye(20), atol=1e-5)


def test_the_error_is_the_variance_of_what_is_left_out():
    pixels = smooth_images()
    variances, errors = spectrum(pixels), []
    for dim in (2, 8, 32):
        errors.append(squared_error(PCACodec.fit(pixels, dim), pixels))
        rounding = 192 / 12  # to whole levels
        assert errors[-1] == pytest.approx(variances[dim:].sum() + rounding, rel=0.02)
    assert errors == sorted(errors, reverse=True)


def test_all_components_give_the_image_back():
    pixels = smooth_images()
    assert squared_error(PCACodec.fit(pixels, 192), pixels) == 0


def test_no_other_axes_do_better():
    pixels = smooth_images()
    codec = PCACodec.fit(pixels, 8)
    best = squared_error(codec, pixels)
    turned = torch.linalg.qr(codec.components + 0.02 * torch.randn(
        codec.components.shape, generator=torch.Generator().manual_seed(0))).Q
    codec.components = turned
    assert squared_error(codec, pixels) > 1.02 * best


def test_pca_latents_have_mean_0_and_mean_square_1(tables):
    pixels, _ = tables["train"]
    codec = PCACodec.fit(pixels, 24)
    z = codec.encode_pixels(torch.from_numpy(pixels)).double()
    assert z.shape == (len(pixels), 24, 2, 2) and codec.shape == (24, 2, 2)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4
    assert z.square().mean() == pytest.approx(1, abs=1e-4)


def test_patches_keep_their_places():
    pixels = smooth_images(40, side=24)
    codec = PCACodec.fit(pixels, 192)
    z = codec.encode([pixels[0]])
    z[:, :, 0, 2] = 0  # the mean patch, top right
    back = np.asarray(codec.decode(z)[0])
    changed = (back != pixels[0]).any(-1)
    assert changed[:8, 16:].any()
    changed[:8, 16:] = False
    assert not changed.any()


def test_a_pca_codec_is_stored_whole():
    pixels = smooth_images(20)
    codec = PCACodec.fit(pixels, 5)
    again = restored(codec)
    z = codec.encode(list(pixels[:3]))
    assert torch.equal(again.encode(list(pixels[:3])), z)
    assert np.array_equal(again.decode(z)[1], codec.decode(z)[1])


@pytest.mark.parametrize("dim", [0, 193])
def test_a_patch_has_192_numbers(dim):
    with pytest.raises(ValueError, match=rf"\[1, 192\], got {dim}"):
        PCACodec.fit(smooth_images(2), dim)


# ---- fitting an image into a square --------------------------------------------------------------


def test_an_image_of_the_right_size_is_left_alone():
    image = Image.fromarray(noise_image(16, 16, 3))
    assert fit_square(image, 16) is image


@pytest.mark.parametrize("size, rows, columns", [
    ((32, 8), slice(6, 10), slice(None)),  # wide: white above and below
    ((8, 32), slice(None), slice(6, 10)),  # tall: white left and right
    ((16, 16), slice(None), slice(None)),
    ((160, 40), slice(6, 10), slice(None)),
])
def test_the_whole_picture_is_kept_on_white(size, rows, columns):
    square = np.asarray(fit_square(Image.new("RGB", size, (200, 0, 40)), 16)).copy()
    assert square.shape == (16, 16, 3)
    assert (square[rows, columns] == (200, 0, 40)).all()
    square[rows, columns] = 255
    assert (square == 255).all()


def test_a_line_is_still_seen():
    square = np.asarray(fit_square(Image.new("RGB", (4000, 1)), 16))
    assert (square == 0).all(-1).sum() == 16


def test_a_list_of_images_becomes_one_array(tmp_path):
    array = noise_image(16, 16, 3)
    Image.fromarray(array).save(tmp_path / "a.png")
    stacked = to_uint8([array, Image.fromarray(array), tmp_path / "a.png",
                        str(tmp_path / "a.png")], 16)
    assert stacked.shape == (4, 16, 16, 3) and stacked.dtype == np.uint8
    assert (stacked == array).all()
    with pytest.raises(ValueError, match="no image was given"):
        to_uint8([], 16)


# ---- every kind of image -------------------------------------------------------------------------


def save_and_load(image, folder, name="a.png", **options):
    image.save(folder / name, **options)
    loaded = load_image(folder / name)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def test_alpha_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (2, 2), (100, 0, 200, 0))
    image.putpixel((1, 0), (100, 0, 200, 255))
    image.putpixel((0, 1), (100, 0, 200, 51))  # a fifth
    found = save_and_load(image, tmp_path)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == [100, 0, 200]
    assert found[1, 0].tolist() == [224, 204, 244]


def test_alpha_of_grey_and_of_a_palette(tmp_path):
    grey = Image.new("LA", (2, 1), (90, 0))
    grey.putpixel((1, 0), (90, 255))
    assert save_and_load(grey, tmp_path).tolist() == [[[255] * 3, [90] * 3]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    found = save_and_load(palette, tmp_path, transparency=0)
    assert found.tolist() == [[[255] * 3, [0, 255, 0]]]


def test_grey_and_black_and_white(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert (save_and_load(grey, tmp_path) == np.asarray(grey)[..., None]).all()
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert save_and_load(bits, tmp_path).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("off", [0, 1, -1])
def test_16_bit_grey_is_scaled_and_rounded_not_clipped(tmp_path, name, off):
    levels = np.arange(256).reshape(16, 16)
    near = (levels * 257 + 120 * off).clip(0, 65535)  # less than half a level away
    found = save_and_load(Image.fromarray(near.astype(np.uint16)), tmp_path, name)
    assert (found == levels[..., None]).all()


def test_float_grey_has_1_as_white(tmp_path):
    grey = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    found = save_and_load(Image.fromarray(grey), tmp_path, "a.tif")
    assert (found == (grey * 255).round()[..., None]).all()


def test_one_pixel_fills_the_square(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "a.png")
    z = PixelCodec(16).encode([tmp_path / "a.png"])
    assert (np.asarray(PixelCodec(16).decode(z)[0]) == (10, 20, 30)).all()


def test_print_colours_are_converted(tmp_path):
    found = save_and_load(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path, "a.jpg",
                          quality=100)
    assert found[4, 4, 0] > 200 and found[4, 4, 1:].max() < 60  # red


def test_a_photograph_is_turned_upright(tmp_path):
    image, exif = Image.new("RGB", (2, 1), "black"), Image.Exif()
    image.putpixel((0, 0), (255, 255, 255))
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees, clockwise
    found = save_and_load(image, tmp_path, exif=exif)
    assert found[:, 0, 0].tolist() == [255, 0]


@pytest.mark.parametrize("array, expected", [
    (np.full((2, 2), 7, np.uint8), [7, 7, 7]),
    (np.full((2, 2, 3), 7, np.uint8), [7, 7, 7]),
    (np.full((2, 2, 3), 0.2), [51, 51, 51]),
    (np.full((2, 2, 3), 1, np.float32), [255, 255, 255]),
    (np.stack([np.zeros((2, 2), np.uint8)] * 3 + [np.full((2, 2), 51, np.uint8)], -1),
     [204, 204, 204]),
])
def test_arrays_of_bytes_or_of_fractions(array, expected):
    assert (np.asarray(load_image(array)) == expected).all()


def test_the_image_that_was_given_is_not_changed():
    image = Image.new("RGB", (4, 4), "red")
    load_image(image).putpixel((0, 0), (0, 0, 0))
    assert image.getpixel((0, 0)) == (255, 0, 0)


# ---- captions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(codecs):
    return codecs["text"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_shipped_caption_comes_back_exactly(words, tables, split):
    _, captions = tables[split]
    assert len(captions) > 100
    assert words.decode(words.encode(captions)) == captions


def test_codes_have_mean_square_1_and_are_told_apart(words):
    z = words.encode(["red apple"])
    assert z.shape == (1, *words.shape) and z.dtype == torch.float32
    assert torch.allclose(words.codes.square().mean(1), torch.ones(len(words.codes)), atol=1e-4)
    assert torch.pdist(words.codes).min() > 1


def test_noise_up_to_half_the_distance_is_forgiven(words):
    captions = ["red apple", "woman mechanic: dark skin tone"]
    z = words.encode(captions)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    half = torch.pdist(words.codes).min() / 2
    assert words.decode(z + 0.99 * half * noise / noise.norm(dim=-1, keepdim=True)) == captions


def test_what_follows_the_end_is_not_read(words):
    z = words.encode(["red apple", "dog"])
    z[1, 2:] = z[0, :1]  # dog [end] red red red ...
    assert words.decode(z) == ["red apple", "dog"]
    z[0, 0] = z[0, 2]
    assert words.decode(z)[0] == ""


def test_a_caption_of_full_length_needs_no_end():
    codec = WordCodec.fit(["a b c"], length=3, dim=8)
    assert codec.decode(codec.encode(["c b a"])) == ["c b a"]


@pytest.mark.parametrize("typed", ["Red APPLE", "  red \t apple ", "red\napple"])
def test_case_and_spaces_do_not_matter(words, typed):
    assert torch.equal(words.encode([typed]), words.encode(["red apple"]))


def test_a_word_in_its_own_case_is_itself():
    codec = WordCodec.fit(["Turkey flag", "turkey dinner"], length=4, dim=8)
    for caption in ("Turkey", "turkey"):
        assert codec.decode(codec.encode([caption])) == [caption]


def test_marks_are_tokens_that_stand_close(words):
    assert words.split("flag: Japan") == ["flag", ":", "Japan"]
    codec = WordCodec.fit(["Japanese “here” button (new), yes!"], length=12, dim=8)
    caption = "yes, Japanese (new “button”)!"
    assert codec.decode(codec.encode([caption])) == [caption]


def test_unknown_words_are_named_with_their_nearest(words):
    with pytest.raises(ValueError, match="the model knows") as caught:
        words.encode(["red aple", "never reached"])
    message = str(caught.value)
    assert "'aple'" in message and "'apple'" in message and "'red'" not in message
    with pytest.raises(ValueError, match="the model knows") as caught:
        words.encode(["aple xqzzyx aple"])
    message = str(caught.value)
    assert message.count("'aple'") == 1 and "'xqzzyx' (nothing near it)" in message


@pytest.mark.parametrize("caption", ["", "   ", "\n\t"])
def test_an_empty_caption_is_refused(words, caption):
    with pytest.raises(ValueError, match="empty: write at least one word"):
        words.encode([caption])


def test_an_overlong_caption_is_refused_with_both_lengths(words):
    words.encode(["red " * words.length])
    with pytest.raises(ValueError, match=rf"has {words.length + 1} tokens .* {words.length} the"):
        words.encode(["red " * (words.length + 1)])


def test_a_caption_is_a_string_that_does_not_name_the_end(words):
    with pytest.raises(ValueError, match="must be a string, got int"):
        words.encode([3])
    for typed in (END, "[End]"):
        with pytest.raises(ValueError, match=r"not '\[\w+\]'"):
            words.encode([f"red {typed} apple"])


def test_a_word_codec_is_stored_whole(words, tables):
    again, some = restored(words), tables["test"][1][:20]
    assert again.shape == words.shape and again.words == words.words
    assert torch.equal(again.encode(some), words.encode(some))


@pytest.mark.parametrize("kind", ["random", "semantic"])
def test_codes_repeat_with_their_seed(kind):
    captions = ["red apple", "green apple", "red car"]
    fits = [WordCodec.fit(captions, 4, 16, kind, seed).codes for seed in (0, 0, 1)]
    assert torch.equal(fits[0], fits[1]) and not torch.equal(fits[0], fits[2])


def test_words_in_like_company_have_like_semantic_codes():
    captions = [f"{colour} {thing}" for colour in ("red", "green", "blue")
                for thing in ("apple", "car", "hat")] + ["night sky", "night train"]
    codec = WordCodec.fit(captions, 4, 8, "semantic")

    def likeness(a, b):
        a, b = (codec.encode([w])[0, 0, :4] for w in (a, b))
        return float(torch.cosine_similarity(a, b, dim=0))

    assert likeness("red", "blue") > 0.8 and likeness("apple", "hat") > 0.8
    assert likeness("red", "apple") < 0.5 and likeness("red", "sky") < 0.5


def test_bad_settings_of_a_word_codec_are_refused():
    with pytest.raises(ValueError, match="caption_length=2 is too short: 'a b c' has 3 tokens"):
        WordCodec.fit(["a", "a b c"], length=2, dim=8)
    with pytest.raises(ValueError, match="'semantic' or 'random', got 'learned'"):
        WordCodec.fit(["a"], length=2, dim=8, codes="learned")


def test_stored_codes_must_fit_their_vocabulary():
    config, tensors = WordCodec.fit(["a b c"], length=3, dim=8).state()
    with pytest.raises(ValueError, match="3 codes do not fit a vocabulary of 4 words"):
        WordCodec.from_state(config, {"codes": tensors["codes"][:3]})
    with pytest.raises(ValueError, match="tokenizer cannot be read"):
        WordCodec.from_state({**config, "tokenizer": {"model": "none"}}, tensors)
