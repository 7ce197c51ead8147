"""The tiny CLIP: it scores what it should, trains, is stored; other CLIPs fit in its place."""

import sys
import types

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from minidiffuser.clip import (
    ClipConfig,
    TinyCLIP,
    add_similarity,
    contrastive_loss,
    fit_tokenizer,
    jitter,
    load_scorer,
    retrieval,
    similarity,
    train_clip,
)
from minidiffuser.data import load_table

SMALL = ClipConfig(side=16, widths=(8, 8), dim=12, vocabulary=60, length=6)
WORDS = ["red square", "blue square", "red disc", "blue disc", "file_name", "CamelCase 12"]


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("tiny")


@pytest.fixture(scope="module")
def held_out():
    table = load_table("clipart", "test")
    return table["image"][:], table["TEXT"][:]


@pytest.fixture
def small():
    torch.manual_seed(0)
    return TinyCLIP(SMALL, fit_tokenizer(WORDS, SMALL.vocabulary)).eval()


# ---- the shipped one -----------------------------------------------------------------------------


def test_pictures_find_their_own_held_out_texts(scorer, held_out):
    """Well above chance (0.006 and 0.03), and above an untrained network (benchmarks/clip.json)."""
    found = retrieval(scorer, *held_out)
    for way in ("image_to_text", "text_to_image"):
        assert found[way]["recall@1"] > 0.2 and found[way]["recall@5"] > 0.4
    emoji = load_table("emoji", "test")
    assert retrieval(scorer, emoji["image"][:], emoji["TEXT"][:])["image_to_text"]["recall@1"] > 0.8


def test_own_texts_are_more_similar_than_anothers(scorer, held_out):
    images, texts = held_out
    own = similarity(scorer, images, texts)
    other = similarity(scorer, images, texts[1:] + texts[:1])
    assert own.mean() > other.mean() + 0.08
    assert own.abs().max() <= 1.001


def test_it_is_small(scorer):
    from pathlib import Path

    folder = Path(__file__).parents[1] / "data/checkpoints/clip"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 5_000_000


def test_similarity_of_the_shipped_table_is_not_that_of_a_model_that_saw_it(scorer):
    """To a model its own training pairs all fit; the column is by others (data/train_clip.py)."""
    table = load_table("clipart")
    rows = [i for i, t in enumerate(table["TEXT"]) if t.startswith("Naval Semaphore")]
    rows += [i for i, k in enumerate(table["keywords"]) if "fruit" in k]
    some = table.select(rows)
    seen = similarity(scorer, some["image"][:], some["TEXT"][:])
    assert seen.mean() > np.mean(some["similarity"][:]) + 0.1


def test_collections_names_are_less_similar_than_captions_of_their_own():
    from collections import Counter

    table = load_table("clipart", columns=["TEXT", "similarity"])
    count = Counter(table["TEXT"])
    pairs = [(s, count[t]) for t, s in zip(table["TEXT"], table["similarity"], strict=True)
             if s is not None]
    own, names = (np.median([s for s, n in pairs if keep(n)])
                  for keep in (lambda n: n == 1, lambda n: n > 20))
    assert own > names + 0.05


# ---- the model -----------------------------------------------------------------------------------


def test_vectors_have_length_one_and_do_not_depend_on_the_batch(small):
    images = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue", "white")]
    for encode, data in ((small.images, images), (small.texts, WORDS)):
        z = encode(data)
        assert z.shape == (len(data), SMALL.dim) and z.dtype == torch.float32
        torch.testing.assert_close(z.norm(dim=1), torch.ones(len(data)))
        torch.testing.assert_close(encode(data[1:2]), z[1:2])


def test_case_underscores_and_padding_do_not_matter(small):
    a, b, c = small.texts(["Red  SQUARE", "red_square", "red square"])
    torch.testing.assert_close(a, c)
    torch.testing.assert_close(b, c)


def test_long_empty_and_missing_texts_are_taken(small):
    z = small.texts(["red " * 100, "", None])
    assert z.isfinite().all()


def test_the_loss_by_hand():
    """Two pairs at right angles: -log softmax([s, 0])."""
    eye, ids = torch.eye(2), torch.tensor([[1], [2]])
    expected = float(np.log(1 + np.exp(-3.0)))
    assert float(contrastive_loss(eye, eye, torch.tensor(3.0), ids)) == pytest.approx(expected)


def test_equal_texts_are_not_told_apart():
    image = F.normalize(torch.tensor([[1.0, 0.2], [1.0, -0.2]]))
    text = torch.tensor([[1.0, 0.0]] * 2)
    told = contrastive_loss(image, text, torch.tensor(10.0), torch.tensor([[1], [2]]))
    same = contrastive_loss(image, text, torch.tensor(10.0), torch.tensor([[1], [1]]))
    assert float(told) == pytest.approx(float(np.log(2)), rel=1e-4)
    swapped = contrastive_loss(image.flip(0), text, torch.tensor(10.0), torch.tensor([[1], [1]]))
    assert float(same) == pytest.approx(float(swapped))


def test_jitter_moves_on_white_and_keeps_the_size():
    x = torch.ones(8, 3, 16, 16)
    torch.testing.assert_close(jitter(x, torch.Generator().manual_seed(0)), x)  # white stays white
    x[:, :, 6:10, 6:10] = -1
    moved = jitter(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and len({float(m.sum()) for m in moved}) == 8
    again = jitter(x, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)


def test_training_learns_the_pairs_and_repeats_from_its_seed():
    colours, n = ("red", "blue"), 64
    pixels = np.stack([np.asarray(Image.new("RGB", (16, 16), colours[i % 2])) for i in range(n)])
    texts = [[f"{colours[i % 2]} square"] for i in range(n)]

    def trained():
        torch.manual_seed(0)
        model = TinyCLIP(SMALL, fit_tokenizer(WORDS, SMALL.vocabulary))
        losses = [loss for _, loss in train_clip(model, pixels, texts, epochs=10, batch=16)]
        return model, losses

    model, losses = trained()
    assert losses[-1] < losses[0] - 0.5 and len(losses) == 40
    images = [Image.new("RGB", (16, 16), c) for c in colours]
    right, wrong = (similarity(model, images, [f"{c} square" for c in order]).mean()
                    for order in (colours, colours[::-1]))
    assert right > wrong + 0.5
    assert trained()[1] == losses


def test_stored_and_read_back(small, tmp_path):
    small.save(tmp_path)
    back = load_scorer(tmp_path)
    torch.testing.assert_close(back.texts(WORDS), small.texts(WORDS), atol=5e-3, rtol=0)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is not a tiny CLIP that can be read"):
        load_scorer(tmp_path)


@pytest.mark.parametrize("call, message", [
    (lambda m: similarity(m, [Image.new("RGB", (9, 9))], ["a", "b"]), "got 1 images and 2 texts"),
    (lambda m: next(train_clip(m, np.zeros((4, 16, 16, 3), np.uint8), [["a"]] * 4, epochs=1)),
     "at least a batch of 256 images"),
])
def test_bad_calls_are_explained(small, call, message):
    with pytest.raises(ValueError, match=message):
        call(small)


# ---- tables --------------------------------------------------------------------------------------


def test_the_column_is_filled_where_there_is_something_to_score(small):
    rows = load_table("emoji").select(range(4)).cast_column("image", datasets.Image(decode=False))
    rows = rows.to_list()
    rows[1]["image"]["bytes"], rows[2]["TEXT"] = b"torn", ""
    table = datasets.Dataset.from_list(rows, features=load_table("emoji").features)
    scored = add_similarity(table, small)
    values = scored["similarity"][:]
    assert [v is None for v in values] == [False, True, True, False]
    own = similarity(small, [table[3]["image"]], [table[3]["TEXT"]])
    assert values[3] == pytest.approx(float(own), abs=1e-6)
    assert scored.column_names == table.column_names


def test_the_command_scores_a_table(cli, tmp_path, small):
    from minidiffuser.data import save_table

    small.save(tmp_path / "model")
    save_table(load_table("emoji", "test").select(range(10)), tmp_path / "t", "train")
    ran = cli("data", "score", tmp_path / "t", "--model", tmp_path / "model")
    assert ran.code == 0, ran.err
    assert "10 of 10 rows scored by tiny" in ran.out
    assert all(s is not None for s in load_table(tmp_path / "t")["similarity"])


# ---- other models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A CLIP of `transformers`, tiny and with random weights, stored as the hub stores them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("hub")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    words = ["<pad>", "<start>", "<end>", "red", "blue", "apple"]
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(
        text_config={**shape, "vocab_size": 6, "max_position_embeddings": 8, "eos_token_id": 2,
                     "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**shape, "image_size": 16, "patch_size": 8}, projection_dim=10,
    )).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
                                   bos_token="<start>", model_max_length=8)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, fast).save_pretrained(folder)
    return folder


def test_a_clip_of_transformers_takes_its_place(hub_folder):
    scorer = load_scorer(hub_folder)
    images = [Image.new("RGB", (30, 20), c) for c in ("red", "blue")]
    f, g = scorer.images(images), scorer.texts(["red apple", "blue"])
    assert f.shape == g.shape == (2, 10)
    torch.testing.assert_close(f.norm(dim=1), torch.ones(2))
    expected = F.normalize(scorer.model.get_text_features(
        **scorer.processor(text=["blue"], return_tensors="pt")).pooler_output, dim=-1)
    torch.testing.assert_close(g[1:], expected.detach())
    assert similarity(scorer, images, ["red apple", "blue"]).shape == (2,)


def test_a_clip_of_transformers_reads_the_beginning_of_a_long_text(hub_folder):
    scorer = load_scorer(hub_folder)
    long, beginning = scorer.texts(["red " * 7 + "apple " * 50, "red " * 7 + "apple"])
    torch.testing.assert_close(long, beginning)


def test_a_name_that_cannot_be_had_is_explained(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="cannot load 'openai/nothing': it is not the shipped"):
        load_scorer("openai/nothing")


def test_open_clip_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"pip install 'minidiffuser\[open-clip\]'"):
        load_scorer("open_clip:ViT-B-32/laion2b_s34b_b79k")


def test_open_clip_takes_its_place(monkeypatch):
    """Against a stand-in with open_clip's interface: the library needs torchvision."""
    model = types.SimpleNamespace(
        eval=lambda: None, encode_image=lambda x: x.flatten(1)[:, :4] + 1,
        encode_text=lambda ids: ids.float())
    fake = types.ModuleType("open_clip")
    fake.list_pretrained = lambda: [("ViT-B-32", "laion2b")]
    fake.create_model_and_transforms = lambda kind, pretrained: (
        model, None, lambda image: torch.full((3, 2, 2), float(image.getpixel((0, 0))[0])))
    fake.get_tokenizer = lambda kind: lambda texts: torch.tensor([[len(t), 1, 2, 3] for t in texts])
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    scorer = load_scorer("open_clip:ViT-B-32/laion2b")
    torch.testing.assert_close(scorer.images([Image.new("RGB", (5, 5), "red")]),
                               torch.full((1, 4), 0.5))
    assert scorer.texts(["a", "bb"]).shape == (2, 4)
    with pytest.raises(ValueError, match=r"no 'ViT-B-32/other'.*ViT-B-32/laion2b"):
        load_scorer("open_clip:ViT-B-32/other")
