"""Training: it learns, it logs, and a run killed at any moment continues bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minidiffuser import checkpoints
from minidiffuser.config import PRESETS
from minidiffuser.data.stream import Order
from minidiffuser.train import EMA, Meter, Trainer, make_optimizers, rate_factor
from minidiffuser.uvit import UViT

TOY = PRESETS["toy"].replace(steps=30, save_every=10, sample_every=1000, log_every=5)


def run(cfg, folder, until=None):
    """Train, stopping after step ``until`` as if the caller had lost interest."""
    for step in Trainer(cfg, folder, cpu=True):
        if step.index == until:
            break


def weights(folder, name="model"):
    saved = checkpoints.newest(folder)
    return saved.tensors(name)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(TOY, folder)
    return folder


# ---- the loop ----------------------------------------------------------------------------------


def test_the_loss_falls(tmp_path):
    cfg = TOY.replace(steps=120, lr=3e-3, warmup=5, save_every=1000)
    losses = [step.loss for step in Trainer(cfg, tmp_path, cpu=True)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_it_yields_after_the_optimiser_step(tmp_path):
    trainer = Trainer(TOY.replace(warmup=1), tmp_path, cpu=True)
    before = [p.detach().clone() for p in trainer.net.parameters()]
    step = next(iter(trainer))
    assert step.index == 1
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.net.parameters(), strict=True))


def test_the_log_has_each_part_and_region(whole):
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [5, 10, 15, 20, 25, 30]
    for r in records:
        assert r["loss"] == pytest.approx(sum(r["per_part"].values()))
        for table in r["regions"].values():
            assert len(table) == 5 and all(len(row) == 5 for row in table)
            assert table[0][0] is None  # both clean: never drawn


def test_regions_are_where_the_timesteps_were():
    from minidiffuser.objective import Loss

    meter = Meter(UViT(TOY.network()).cfg.parts, ("image", "text"))
    t = {"image": torch.tensor([0.0, 1.0, 250.0, 251.0, 1000.0]),
         "text": torch.tensor([1000.0, 500.0, 0.0, 501.0, 751.0])}
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    meter.add(Loss(values.sum(), {"image": values, "text": values}, t))
    table = meter.flush()["regions"]["image"]
    seen = {(i, j): v for i, row in enumerate(table) for j, v in enumerate(row) if v is not None}
    assert seen == {(0, 4): 0.0, (1, 2): 1.0, (1, 0): 2.0, (2, 3): 3.0, (4, 4): 4.0}


def test_the_end_leaves_a_model_that_samples(whole):
    from minidiffuser import UniDiffuser

    pipe = UniDiffuser.from_pretrained(whole)
    assert pipe.text_to_image("red apple", steps=2)[0].size == (16, 16)
    averaged = weights(whole, "ema")
    for key, value in pipe.net.state_dict().items():
        assert torch.equal(value, averaged[key].half().float()), key


def test_sample_grids_are_written(tmp_path):
    run(TOY.replace(steps=2, sample_every=1), tmp_path)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2


def test_sample_grids_are_drawn_where_the_run_is(tmp_path, monkeypatch):
    """On its GPU: a network of full size would take hours on the CPU."""
    trainer = Trainer(TOY.replace(steps=1), tmp_path, cpu=True)
    asked = []
    monkeypatch.setattr(trainer, "pipeline", lambda device: asked.append(device))
    trainer.write_samples()
    assert asked == [trainer.accelerator.device]


# ---- optimiser, average, rate, order -------------------------------------------------------------


def test_muon_gets_the_blocks_matrices_and_adamw_the_rest():
    net = UViT(TOY.network())
    muon, adam = make_optimizers(net, TOY)
    names = {id(p): n for n, p in net.named_parameters()}
    in_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    in_adam = {names[id(p)] for g in adam.param_groups for p in g["params"]}
    assert "mid_block.attn.qkv.weight" in in_muon and "out_blocks.0.skip_linear.weight" in in_muon
    assert {"pos_embed", "embed.image.weight", "head.text.weight", "norm.bias"} <= in_adam
    assert in_muon | in_adam == set(names.values()) and not in_muon & in_adam


def test_ema_is_the_weighted_mean_of_what_it_saw():
    p = torch.nn.Parameter(torch.zeros(3))
    ema = EMA([p], decay=0.5)
    expected = torch.zeros(3)
    for i in range(1, 30):
        p.data.fill_(float(i))
        ema.update()
        decay = min(0.5, i / (i + 9))
        expected = decay * expected + (1 - decay) * i
    torch.testing.assert_close(ema.average[0], expected)
    ema.swap()
    torch.testing.assert_close(p.data, expected)
    ema.swap()
    assert torch.equal(p.data, torch.full((3,), 29.0))


def test_rate_warms_up_stays_and_falls_to_zero():
    cfg = TOY.replace(steps=100, warmup=10, cooldown=0.2)
    factors = [rate_factor(i, cfg) for i in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1
    assert set(factors[10:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5) and factors[99] == pytest.approx(0.05)


def test_every_epoch_sees_every_row_once_whatever_the_number_of_processes():
    order = Order(rows=10, batch=4, seed=3)
    rows = torch.cat([order(step) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    for step in range(5):
        shares = [Order(10, 4, 3)(step, rank, 2) for rank in range(2)]
        assert torch.equal(torch.stack(shares, 1).flatten(), order(step))


# ---- resuming ------------------------------------------------------------------------------------


def test_a_stopped_run_continues_bit_for_bit(whole, tmp_path):
    run(TOY, tmp_path, until=17)
    run(TOY, tmp_path)
    for name in ("model", "ema", "random"):
        assert_same(weights(tmp_path, name), weights(whole, name))


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(whole, tmp_path):
    """The real thing: a process killed without warning, at five random moments."""
    overrides = [f"--{k}={getattr(TOY, k)}" for k in ("steps", "save_every", "sample_every")]
    command = [sys.executable, "-m", "minidiffuser", "train", "toy", "--cpu", "--out",
               str(tmp_path), *overrides, "--save_every=2", "--log_every=5"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # rounding depends on it
    draw = random.Random(time.time_ns())
    killed = 0
    for _ in range(5):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        deadline, start = time.monotonic() + 300, len(checkpoints.all_steps(tmp_path))
        newest = max(checkpoints.all_steps(tmp_path), default=None)
        while process.poll() is None and time.monotonic() < deadline:
            if max(checkpoints.all_steps(tmp_path), default=None) != newest:
                break  # it has begun to write: kill it somewhere in the next moments
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.15))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert start <= TOY.keep + 1  # killed between writing one and dropping the oldest
    run(TOY.replace(save_every=2), tmp_path)
    assert killed >= 2
    for name in ("model", "ema", "random"):
        assert_same(weights(tmp_path, name), weights(whole, name))


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "state.pt", "info.json"])
def test_a_truncated_checkpoint_is_refused_and_the_one_before_it_used(
    whole, tmp_path, file, caplog
):
    run(TOY, tmp_path, until=25)  # leaves steps 10 and 20
    damaged = tmp_path / "step_0000020" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(ValueError, match="step_0000020 is (truncated|incomplete)"):
        checkpoints.read(damaged.parent)
    trainer = Trainer(TOY, tmp_path, cpu=True)
    assert trainer.step == 10
    assert "step_0000020" in caplog.text and "the one before it" in caplog.text
    for _ in trainer:
        pass
    assert_same(weights(tmp_path), weights(whole))


def test_a_changed_byte_is_noticed(tmp_path):
    run(TOY.replace(steps=10), tmp_path)
    path = tmp_path / "step_0000010" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"all 1 checkpoints .* are damaged"):
        Trainer(TOY, tmp_path, cpu=True)


def test_half_written_leftovers_are_cleared(tmp_path):
    (tmp_path / ".writing_0000010").mkdir()
    (tmp_path / ".writing_0000010" / "model.safetensors").write_bytes(b"half")
    run(TOY.replace(steps=1), tmp_path)
    assert not list(tmp_path.glob(".writing_*"))


def test_only_the_last_checkpoints_are_kept(whole):
    assert [p.name for p in checkpoints.all_steps(whole)] == ["step_0000020", "step_0000030"]


def test_a_folder_of_another_run_is_refused(whole):
    with pytest.raises(ValueError, match="dim was 32 and is 64.*--out"):
        Trainer(TOY.replace(dim=64), whole, cpu=True)


@pytest.mark.parametrize("change", [
    {"steps": 40}, {"cooldown": 0.5}, {"log_every": 2}, {"save_every": 3}, {"sample_every": 7},
    {"keep": 4}, {"square": 0.2}, {"given": 0.3}, {"ignored": 0.3}, {"diagonal": 0.3},
    {"noise_bias": 2.0}, {"favour_image": 0.9},
])
def test_how_long_how_told_and_where_in_the_square_may_change(whole, change):
    assert Trainer(TOY.replace(**change), whole, cpu=True).step == 30


def test_the_share_of_the_image_is_the_images(tmp_path):
    trainer = Trainer(TOY.replace(favour_image=0.9), tmp_path, cpu=True)
    share = dict(zip(trainer.clocks, trainer.mix.favour, strict=True))
    assert share == pytest.approx({"image": 0.9, "text": 0.1})


def test_a_process_that_is_not_the_first_leaves_the_folder_alone(tmp_path, monkeypatch):
    """Two that clear leftovers at once would trip over each other's files."""
    from accelerate import Accelerator

    run(TOY.replace(steps=2), tmp_path)
    prepared = []
    monkeypatch.setattr(checkpoints, "prepare_folder", prepared.append)
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    Trainer(TOY, tmp_path, cpu=True)
    assert prepared == []
    monkeypatch.setattr(Accelerator, "is_main_process", True)
    Trainer(TOY, tmp_path, cpu=True)
    assert prepared == [tmp_path]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    trainer = Trainer(TOY, tmp_path, cpu=True)
    steps = iter(trainer)
    for _ in range(15):
        next(steps)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(ValueError, match="no space left"):
        trainer.save()
    assert [p.name for p in checkpoints.all_steps(tmp_path)] == ["step_0000010"]
    assert not list(tmp_path.glob(".writing_*"))
    assert checkpoints.newest(tmp_path).info["step"] == 10


def test_checkpoints_hold_no_code(whole):
    saved = checkpoints.newest(whole)
    torch.load(saved.path / "state.pt", weights_only=True)
    assert {f.suffix for f in saved.path.iterdir()} == {".safetensors", ".pt", ".json"}


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_on_the_same_rows_and_agree(tmp_path):
    """The same loop under `accelerate launch`: DDP over gloo, two processes on the CPU."""
    script = Path(__file__).parent / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(script), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [load_file(tmp_path / f"rank{i}.safetensors") for i in range(2)]
    assert_same(*states)
    assert checkpoints.newest(tmp_path / "run").info["processes"] == 2
    assert len(weights(tmp_path / "run", "random")) == 2
