"""The command line: every command does what it says, and an error is one line."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import TOY

import minidiffuser
from minidiffuser import UniDiffuser, checkpoints
from minidiffuser.config import overrides
from minidiffuser.demo import PROMPTS

FAST = ["--steps", "3"]


def pixels(path):
    return np.asarray(Image.open(path))


def fails(ran, *parts):
    """The command ended with 1 and one line on stderr, which holds all of ``parts``."""
    assert ran.code == 1
    assert re.fullmatch(r"error: [^\n]+\n", ran.err), ran.err
    for part in parts:
        assert part in ran.err, ran.err


@pytest.fixture
def sample(cli, model_folder, tmp_path, monkeypatch):
    """``sample(task, ...)`` with the toy model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda task, *words: cli("sample", task, "--model", model_folder, *FAST, *words)


@pytest.fixture
def picture(tables, tmp_path):
    path = tmp_path / "given.png"
    Image.fromarray(tables["train"][0][0]).save(path)
    return path


# ---- sample --------------------------------------------------------------------------------------


def test_text_to_image_writes_what_the_pipeline_makes(sample, pipe, tmp_path):
    ran = sample("text-to-image", "--prompt", "red apple", "--out", "new/apple.png", "--seed", 4,
                 "--guidance-scale", 1.5, "--solver", "ddim")
    assert (ran.code, ran.out.strip(), ran.err) == (0, str(Path("new/apple.png")), "")
    made = pipe.text_to_image("red apple", seed=4, guidance_scale=1.5, solver="ddim", steps=3)[0]
    assert np.array_equal(pixels(tmp_path / "new/apple.png"), np.asarray(made))


def test_several_images_are_numbered(sample, pipe, tmp_path):
    ran = sample("text-to-image", "--prompt", "red apple", "--n", 3, "--out", "apple.png")
    assert ran.code == 0 and ran.out.split() == ["apple_0.png", "apple_1.png", "apple_2.png"]
    for i, image in enumerate(pipe.text_to_image("red apple", n=3, steps=3)):
        assert np.array_equal(pixels(tmp_path / f"apple_{i}.png"), np.asarray(image))
    assert not (tmp_path / "apple.png").exists()


def test_image_to_text_prints_captions(sample, pipe, picture):
    ran = sample("image-to-text", "--image", picture, "--n", 2)
    assert ran.code == 0
    assert ran.out.splitlines() == pipe.image_to_text(picture, n=2, steps=3)


def test_joint_writes_images_and_prints_their_captions(sample, pipe, tmp_path):
    ran = sample("joint", "--n", 2)
    assert ran.code == 0
    lines = ran.out.splitlines()
    for i, (image, caption) in enumerate(pipe.joint(n=2, steps=3)):
        assert lines[i] == f"joint_{i}.png: {caption}"
        assert np.array_equal(pixels(tmp_path / f"joint_{i}.png"), np.asarray(image))


def test_marginals(sample, pipe, tmp_path):
    assert sample("image").out.strip() == "image.png"
    assert np.array_equal(pixels(tmp_path / "image.png"), np.asarray(pipe.image(steps=3)[0]))
    assert sample("text", "--n", 3).out.splitlines() == pipe.text(n=3, steps=3)


@pytest.mark.parametrize("words, parts", [
    (["text2image"], ["unknown task 'text2image'", "'text-to-image'"]),
    (["text-to-image"], ["text-to-image needs --prompt"]),
    (["image-to-text"], ["image-to-text needs --image"]),
    (["joint", "--prompt", "dog"], ["joint does not take --prompt"]),
    (["text", "--image", "a.png"], ["text does not take --image"]),
    (["text-to-image", "--prompt", ""], ["empty"]),
    (["text-to-image", "--prompt", "red " * 20], ["20 tokens", "16"]),
    (["text-to-image", "--prompt", "red aple"], ["'aple'", "'apple'"]),
    (["image-to-text", "--image", "none.png"], ["no file 'none.png'"]),
    (["image", "--steps", "0"], ["steps=0"]),
    (["image", "--n", "0"], ["n=0"]),
    (["image", "--guidance-scale", "-1"], ["guidance_scale", "-1"]),
    (["image", "--guidance-scale", "nan"], ["guidance_scale", "nan"]),
    (["image", "--seed", str(2**70)], ["seed", "64 bits"]),
    (["image", "--solver", "euler"], ["unknown solver 'euler'"]),
    (["image", "--model", "emojy"], ["no model 'emojy'"]),
    (["image", "--out", "apple.xyz"], ["'apple.xyz'", ".png"]),
    (["image", "--out", "apple"], ["'apple'", ".png"]),
], ids=lambda x: " ".join(x)[:40])
def test_mistakes_are_answered_in_one_line(sample, tmp_path, words, parts):
    fails(sample(*words), *parts)
    assert list(tmp_path.glob("*")) == []


def test_pictures_that_cannot_be_read(sample, picture, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    fails(sample("image-to-text", "--image", "page.png"), "page.png", "not an image")
    picture.write_bytes(picture.read_bytes()[:-40])
    fails(sample("image-to-text", "--image", picture), "given.png", "truncated")


def test_places_that_cannot_be_written(sample, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    fails(sample("image", "--out", "file/a.png"), "cannot write to file")
    (tmp_path / "folder.png").mkdir()
    fails(sample("image", "--out", "folder.png"), "cannot write")
    for number, part in ((errno.EROFS, "read-only"), (errno.EACCES, "read-only"),
                         (errno.ENOSPC, "no space left")):
        def refuse(*args, number=number, **kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Image.Image, "save", refuse)
        fails(sample("image"), "cannot write to", part, "choose another folder")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device always full")
def test_a_device_that_is_really_full(sample, tmp_path):
    (tmp_path / "full.png").symlink_to("/dev/full")
    fails(sample("image", "--out", "full.png"), "no space left")


# ---- train ---------------------------------------------------------------------------------------

TRAIN = ["--cpu", "--steps", "3", "--save-every=2", "--sample_every=1000", "--dim=16"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "toy"


@pytest.fixture
def trained(cli, run_folder):
    """A toy trained for three steps from the command line; continued from the second use on."""
    return cli("train", "toy", "--out", run_folder, *TRAIN)


def test_train_then_sample(trained, cli, run_folder):
    assert trained.code == 0 and trained.out.splitlines()[-1] == f"model: {run_folder / 'model'}"
    info = checkpoints.newest(run_folder).info
    assert info["step"] == 3
    changed = {"steps": 3, "save_every": 2, "sample_every": 1000, "dim": 16}
    assert info["config"] == {**TOY.to_dict(), **changed}
    model = UniDiffuser.from_pretrained(run_folder)  # the run's folder will do
    averaged = checkpoints.newest(run_folder).tensors("ema")
    for name, value in model.net.state_dict().items():
        assert torch.allclose(value, averaged[name], atol=1e-3)  # stored in half precision
    ran = cli("sample", "text", "--model", run_folder, *FAST)
    assert ran.code == 0 and ran.out.splitlines() == model.text(steps=3)


def test_a_finished_run_says_so(trained, cli, run_folder):
    before = checkpoints.newest(run_folder).info
    again = cli("train", "toy", "--out", run_folder, *TRAIN)
    assert again.code == 0 and "has already taken its 3 steps; --steps takes more" in again.out
    assert checkpoints.newest(run_folder).info == before


def test_a_run_is_not_continued_as_another(trained, cli, run_folder):
    fails(cli("train", "toy", "--out", run_folder, *TRAIN, "--dim", "32"),
          "another configuration", "dim was 16 and is 32", "--out")


@pytest.mark.parametrize("words, parts", [
    (["toi"], ["unknown preset 'toi'", "'toy'"]),
    (["toy", "--dmi", "64"], ["unknown setting 'dmi'", "'dim'"]),
    (["toy", "--dim", "wide"], ["dim must be int, got 'wide'"]),
    (["toy", "--dim=2.5"], ["dim must be int, got '2.5'"]),
    (["toy", "--qk-norm", "perhaps"], ["qk_norm must be bool, got 'perhaps'"]),
    (["toy", "--dim", "30", "--heads", "4"], ["dim=30", "2 x heads = 8"]),
    (["toy", "--lr", "-1"], ["lr must be above 0"]),
    (["toy", "--steps", "0"], ["steps must be above 0"]),
    (["toy", "--schedule", "cosin"], ["schedule", "'cosine'"]),
    (["toy", "--data", "emojy"], ["no table 'emojy'", "'emoji'"]),
    (["toy", "--dim"], ["--key value", "'--dim'"]),
    (["toy", "dim=64"], ["--key value", "'dim'"]),
    (["toy", "--caption-codec", "clip+gpt2"], ["pretrained", "data encode emoji"]),
], ids=lambda x: " ".join(x)[:40])
def test_bad_settings_are_answered_in_one_line(cli, tmp_path, words, parts):
    fails(cli("train", *words, "--out", tmp_path / "run", "--cpu"), *parts)


def test_both_spellings_of_a_setting():
    assert overrides(["--dim", "256", "--lr=1e-3", "--batch-size", "8", "--data=a=b"]) == {
        "dim": "256", "lr": "1e-3", "batch_size": "8", "data": "a=b"}
    assert overrides([]) == {}


def test_a_run_with_nowhere_to_go(cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    fails(cli("train", "toy", *TRAIN, "--out", tmp_path / "file" / "run"), "cannot write to")


def test_a_disk_that_fills_up_while_training(cli, tmp_path, monkeypatch):
    def refuse(tensors, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "save_file", refuse)
    ran = cli("train", "toy", *TRAIN, "--out", tmp_path)
    assert ran.code == 1 and "no space left" in ran.err.splitlines()[-1]
    assert ran.err.splitlines()[-1].startswith("error: ") and "Traceback" not in ran.err
    assert checkpoints.all_steps(tmp_path) == []


def test_what_no_one_foresaw_of_the_disk_is_one_line_too(cli, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("minidiffuser.metrics.evaluate", refuse)
    ran = cli("evaluate", "emoji", "--n", 2, "--steps", 1)
    assert ran.code == 1 and ran.err.splitlines()[-1] == "error: [Errno 5] Input/output error"
    assert "Traceback" not in ran.err


# ---- evaluate ------------------------------------------------------------------------------------


def test_evaluate_as_json(cli, model_folder):
    ran = cli("evaluate", model_folder, "--n", 2, "--steps", 2, "--seed", 5,
              "--guidance-scale", 1.5, "--json")
    assert ran.code == 0
    result = json.loads(ran.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert set(result) == {"test", "train", "joint_top1", "settings"}
    assert result["settings"] == {"steps": 2, "guidance_scale": 1.5, "seed": 5,
                                  "spacing": "time"}
    entries = [result["joint_top1"]]
    for split in ("test", "train"):
        assert set(result[split]) == {"t2i_top1", "i2t_exact", "i2t_token_f1"}
        entries += result[split].values()
    for entry in entries:
        low, high = entry["interval"]
        assert entry["n"] == 2 and 0 <= low <= entry["value"] <= high <= 1
        assert math.isfinite(entry["value"])


def test_evaluate_as_a_table(cli, model_folder):
    ran = cli("evaluate", model_folder, "--n", 2, "--steps", 2)
    lines = ran.out.splitlines()
    assert ran.code == 0 and len(lines) == 7
    assert [line.split("  ")[0].strip() for line in lines] == [
        *(f"{s}: {k}" for s in ("test", "train")
          for k in ("t2i_top1", "i2t_exact", "i2t_token_f1")), "joint_top1"]
    assert all(re.search(r"  \d\.\d{3}   95% \[\d\.\d{3}, \d\.\d{3}\]   n=2$", x) for x in lines)


def test_evaluate_with_the_tiny_clip_says_whose_scale_it_is(cli, model_folder):
    ran = cli("evaluate", model_folder, "--n", 2, "--steps", 2, "--clip", "tiny")
    assert ran.code == 0, ran.err
    names = [line.split("  ")[0].strip() for line in ran.out.splitlines()]
    kinds = ("t2i", "i2t", "own", "other")
    assert {f"{s}: {k}_similarity" for s in ("test", "train") for k in kinds} < set(names)
    assert names[-3:-1] == ["joint_top1", "joint_similarity"]
    assert "comparable with no other model's" in names[-1] and "tiny" in names[-1]
    fails(cli("evaluate", model_folder, "--n", 2, "--clip", "tinny"), "cannot load 'tinny'")


def test_evaluate_of_too_little_or_nothing(cli, model_folder):
    fails(cli("evaluate", model_folder, "--n", 1), "n=1")
    fails(cli("evaluate", "emojy"), "no model 'emojy'")


# ---- the rest ------------------------------------------------------------------------------------


def test_info_of_the_official_model(cli):
    ran = cli("info", "unidiffuser-v1")
    assert ran.code == 0 and ran.out.startswith("unidiffuser-v1\n") and "952,509,520" in ran.out


def test_info_of_an_unknown_preset(cli):
    fails(cli("info", "unidiffuser-v2"), "unknown preset", "'unidiffuser-v1'")


def test_demo_writes_a_picture(cli, model_folder, tmp_path):
    ran = cli("demo", "--model", model_folder, "--out", tmp_path / "new" / "demo.png")
    assert ran.code == 0 and str(tmp_path / "new" / "demo.png") in ran.out
    assert all(f"  {prompt}  ->  " in ran.out for prompt in PROMPTS)
    found = pixels(tmp_path / "new" / "demo.png")
    assert min(found.shape[:2]) > 500 and found[..., :3].std() > 10


def test_demo_with_nowhere_to_go(cli, model_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    fails(cli("demo", "--model", model_folder, "--out", tmp_path / "file" / "demo.png"),
          "cannot write to")


def test_version(cli):
    assert cli("version").out.strip() == minidiffuser.__version__


@pytest.mark.parametrize("words", [["--help"], ["sample", "--help"], ["train", "--help"]])
def test_help(cli, words):
    ran = cli(*words)
    assert ran.code == 0 and "Usage: python -m minidiffuser" in ran.out


def test_a_missing_argument_is_a_usage_error(cli):
    for words in (["sample"], ["sample", "image", "--steps", "many"], ["smaple"]):
        ran = cli(*words)
        assert ran.code == 2 and "Usage:" in ran.err and "Traceback" not in ran.err


def test_a_traceback_can_be_asked_for(monkeypatch):
    from minidiffuser.__main__ import main

    monkeypatch.setenv("MINIDIFFUSER_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["minidiffuser", "info", "nothing"])
    with pytest.raises(ValueError, match="unknown preset"):
        main()


def test_in_a_process_of_its_own(model_folder, tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "minidiffuser", "sample", *words,
                   "--model", str(model_folder), *FAST]
        root = Path(minidiffuser.__file__).parents[1]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300,
                              encoding="utf-8", env={**os.environ, "PYTHONPATH": str(root)})

    good = run("text-to-image", "--prompt", "red apple", "--out", "apple.png")
    assert (good.returncode, good.stdout, good.stderr) == (0, "apple.png\n", "")
    assert pixels(tmp_path / "apple.png").shape == (16, 16, 3)
    bad = run("text-to-image", "--prompt", "red aple")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert re.fullmatch(r"error: .*'aple' \(nearest: .*'apple'.*\)\n", bad.stderr)


def test_the_command_line_starts_without_loading_torch():
    code = "import sys, minidiffuser.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
