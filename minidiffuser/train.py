"""The training loop, from a toy on a laptop to full size on a cluster.

    for step in Trainer(config, "runs/emoji"):     # yields after each optimiser step
        print(step.index, step.loss)

One loop for all sizes: `accelerate` underneath gives one process, several GPUs (``accelerate
launch``) and sharded training (its FSDP settings) without a line changed here.  A run may be killed
at any moment: the next one continues from the last whole checkpoint, and on the CPU, with as many
threads, its weights are bit for bit those of a run that was never stopped.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp
from tqdm.auto import tqdm

from . import checkpoints
from .config import Config
from .data.stream import open_source
from .objective import Loss, TimestepMix, joint_loss
from .pipeline import UniDiffuser
from .schedule import NoiseSchedule, T
from .uvit import UViT

log = logging.getLogger(__name__)


@dataclass
class Step:
    """What one optimiser step did. ``loss`` is the weighted sum over parts, as a number."""

    index: int  # steps taken so far, from 1
    loss: float
    rate: float  # learning rate
    batch: Loss


class EMA:
    """An exponential moving average of parameters, in float32 beside the model.

    Args:
        params: what to average; decay: how much of the average is kept at each step (less in the
            first steps, when the average is still of almost nothing).
    """

    def __init__(self, params: list[Tensor], decay: float):
        self.params, self.decay, self.updates = params, decay, 0
        self.average = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with their average; a second call restores them."""
        for p, average in zip(self.params, self.average, strict=True):
            kept = p.detach().clone()
            p.copy_(average)
            average.copy_(kept)


def rate_factor(step: int, cfg: Config) -> float:
    """The learning rate's factor: linear warm-up, constant, linear fall to 0 at the end."""
    falling = cfg.cooldown * cfg.steps
    warm = (step + 1) / cfg.warmup if step < cfg.warmup else 1.0
    return min(warm, (cfg.steps - step) / falling if falling else 1.0, 1.0)


def make_optimizers(net: UViT, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    Muon (Jordan et al., 2024; here `torch.optim.Muon`) orthogonalises the momentum of a matrix; its
    rate is scaled to AdamW's update size, so that one ``lr`` serves both (arXiv:2502.16982, eq. 4).
    """
    adam = {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay,
            "fused": True}
    if cfg.optimizer == "adamw":
        return [torch.optim.AdamW(net.parameters(), **adam)]
    matrices = [p for n, p in net.named_parameters() if "blocks" in n or "mid_block" in n
                if p.ndim == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in ids]
    muon = torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay,
                            adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, **adam)]


class Trainer:
    """A training run in a folder; iterate over it to train.

    Args:
        cfg: what to train. folder: where checkpoints, the log and sample grids go.
        cpu: stay on the CPU even where there is a GPU.
        progress: show a bar with the time left.

    A folder that holds checkpoints is continued.  How long it is, what it reports, and where in the
    timestep square it trains may differ from before; everything else must be as it was.

    Raises:
        ValueError: a folder that belongs to another configuration, or cannot be written.
    """

    def __init__(
        self, cfg: Config, folder: str | Path, *, cpu: bool = False, progress: bool = False
    ):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # several runs in one process, a notebook's, may differ
        self.accelerator = Accelerator(mixed_precision=cfg.precision, cpu=cpu)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if cfg.batch_size % self.world:
            raise ValueError(f"batch_size={cfg.batch_size} does not divide over the {self.world} "
                             "processes")
        self.cfg, self.folder, self.progress = cfg, Path(folder), progress
        if self.accelerator.is_main_process:  # two at once would trip over each other's files
            checkpoints.prepare_folder(self.folder)
        self.accelerator.wait_for_everyone()
        self.schedule = NoiseSchedule(cfg.schedule)
        favour = {"image": cfg.favour_image, "text": 1 - cfg.favour_image}
        clocks = cfg.network().clocks
        self.mix = TimestepMix(cfg.square, cfg.given, cfg.ignored, cfg.diagonal, cfg.noise_bias,
                               favour=tuple(favour[c] for c in clocks))
        self.source = open_source(cfg)
        self.codecs = self.source.codecs
        self._build_model()
        self.step = 0
        self._restore()

    def _build_model(self) -> None:
        cfg = self.cfg
        net = UViT(cfg.network())
        net.init_weights(torch.Generator().manual_seed(cfg.seed))
        self.parts, self.clocks = net.cfg.parts, net.cfg.clocks
        optimizers = make_optimizers(net, cfg)
        self.net, *self.optimizers = self.accelerator.prepare(net, *optimizers)
        self.rates = [group["lr"] for opt in self.optimizers for group in opt.param_groups]
        self.ema = EMA(list(self.net.parameters()), cfg.ema)
        # Timesteps and noise come from one generator per process, whose state the checkpoint holds.
        self.generator = torch.Generator().manual_seed(cfg.seed * 7919 + 1 + self.rank)

    # ---- the loop ---------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Step]:
        """Train to ``cfg.steps``, yielding after each optimiser step; saves and logs as it goes."""
        cfg, meter = self.cfg, Meter(self.parts, self.clocks)
        bar = tqdm(total=cfg.steps, initial=self.step, unit="step", dynamic_ncols=True,
                   disable=not (self.progress and self.accelerator.is_main_process))
        with bar:
            while self.step < cfg.steps:
                step = self._take_step()
                meter.add(step.batch)
                bar.update()
                if self.step % cfg.log_every == 0 or self.step == cfg.steps:
                    bar.set_postfix(loss=f"{meter.mean():.4f}")
                    self._write_log(meter.flush(), step)
                if self.step % cfg.save_every == 0 or self.step == cfg.steps:
                    self.save()
                    self.export()
                if self.step % cfg.sample_every == 0 or self.step == cfg.steps:
                    self.write_samples()
                yield step

    def _take_step(self) -> Step:
        cfg = self.cfg
        self.net.train()
        factor = rate_factor(self.step, cfg)
        groups = [g for opt in self.optimizers for g in opt.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * factor
        batch = self._batch()
        with self.accelerator.autocast():
            loss = joint_loss(
                self.net, self.schedule, batch, parts=self.parts, clocks=self.clocks,
                generator=self.generator, prediction=cfg.prediction, weighting=cfg.weighting,
                gamma=cfg.gamma, mix=self.mix, part_weights={"text": cfg.text_weight},
            )
        self.accelerator.backward(loss.total)
        if cfg.clip:
            self.accelerator.clip_grad_norm_(self.net.parameters(), cfg.clip)
        for opt in self.optimizers:
            opt.step()
            opt.zero_grad()
        self.ema.update()
        self.step += 1
        return Step(self.step, loss.total.item(), cfg.lr * factor, loss)

    def _batch(self) -> dict[str, Tensor]:
        z = self.source.batch(self.step, self.rank, self.world)
        return {name: part.to(self.accelerator.device) for name, part in z.items()}

    # ---- what it writes ---------------------------------------------------------------------

    def pipeline(self, device: str | torch.device = "cpu") -> UniDiffuser | None:
        """The model as it stands, with averaged weights, as a pipeline on a device.

        Call it on every process of a run, as shards are gathered; None on all but the main one.
        """
        state = self._averaged_state()
        if not self.accelerator.is_main_process:
            return None
        net = UViT(self.cfg.network())
        net.load_state_dict(state)
        return UniDiffuser(self.cfg, net, self.codecs, device)

    def export(self) -> None:
        """Write the averaged model to ``model/``, for ``UniDiffuser.from_pretrained``."""
        pipe = self.pipeline()
        if pipe:
            pipe.save_pretrained(self.folder / "model")

    def write_samples(self) -> None:
        """A grid of all tasks to ``samples/``, with averaged weights and a fixed seed.

        Without the weights of pretrained codecs, which training itself never needs, there is none.
        """
        from .plots import task_figure

        try:
            for codec in self.codecs.values():
                codec.load()
        except ValueError as error:
            log.warning("no samples are drawn: %s", error)
            return
        pipe = self.pipeline(self.accelerator.device)
        if pipe:
            path = self.folder / "samples" / f"step_{self.step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            task_figure(pipe, self.source.prompts(6), steps=12).savefig(path, dpi=80)

    def _write_log(self, record: dict, step: Step) -> None:
        if self.accelerator.is_main_process:
            record = {"step": self.step, "rate": step.rate, **record}
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    # ---- checkpoints ------------------------------------------------------------------------

    def _model_state(self) -> dict[str, Tensor]:
        """All weights on the CPU, gathered from shards; on the main process only."""
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = dcp.get_model_state_dict(self.net, options=options)
        return {k: v.clone() for k, v in state.items()}  # on the CPU they are the live weights

    def _averaged_state(self) -> dict[str, Tensor]:
        self.ema.swap()
        try:
            return self._model_state()
        finally:
            self.ema.swap()

    def save(self) -> None:
        """Write a checkpoint, whole or not at all, and drop the oldest beyond ``keep``."""
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizers = [dcp.get_optimizer_state_dict(self.net, opt.optimizer, options=options)
                      for opt in self.optimizers]
        model, averaged = self._model_state(), self._averaged_state()
        states = self._all_random_states()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoints.write(
                self.folder, self.step, keep=self.cfg.keep,
                tensors={"model": model, "ema": averaged, "random": states},
                pickled={"optimizers": optimizers,
                         "scaler": scaler.state_dict() if scaler else {}},
                info={"config": self.cfg.to_dict(), "ema_updates": self.ema.updates,
                      "samples_seen": self.step * self.cfg.batch_size, "processes": self.world,
                      "features": self.source.identity},
            )
        self.accelerator.wait_for_everyone()

    def _all_random_states(self) -> dict[str, Tensor]:
        state = self.generator.get_state()
        if self.world > 1:
            state = self.accelerator.gather(state.to(self.accelerator.device)).cpu()
        return {str(i): s.clone() for i, s in enumerate(state.view(self.world, -1))}

    def _restore(self) -> None:
        """Continue from the newest whole checkpoint in the folder, if there is one."""
        saved = checkpoints.newest(self.folder)
        if saved is None:
            return
        checkpoints.check_same_run(saved.info["config"], self.cfg, saved.path)
        if saved.info.get("features") != self.source.identity:  # its step is a place in others
            raise ValueError(f"{saved.path} was trained on other features than {self.cfg.data} "
                             "holds now, so it cannot tell which rows are next: choose another "
                             "folder with --out, or encode as before")
        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_model_state_dict(self.net, saved.tensors("ema"), options=options)
        self.ema.average = [p.detach().clone() for p in self.net.parameters()]
        dcp.set_model_state_dict(self.net, saved.tensors("model"), options=options)
        pickled = saved.pickled()
        for opt, state in zip(self.optimizers, pickled["optimizers"], strict=True):
            dcp.set_optimizer_state_dict(self.net, opt.optimizer, state, options=options)
        if pickled["scaler"]:
            self.accelerator.scaler.load_state_dict(pickled["scaler"])
        states = saved.tensors("random")
        if str(self.rank) in states:
            self.generator.set_state(states[str(self.rank)])
        else:
            log.warning("this run had %d processes: process %d starts new random numbers",
                        len(states), self.rank)
        self.ema.updates, self.step = saved.info["ema_updates"], saved.info["step"]
        log.info("continuing from %s", saved.path)


class Meter:
    """Losses since the last look: per part, and per part and region of the timestep square.

    A region is the cell (row: first clock, column: second, ...) of bins 0, (0, 250], (250, 500],
    (500, 750] and (750, 1000]; bin 0 is exactly clean.
    """

    bins = 5

    def __init__(self, parts, clocks):
        self.parts, self.clocks = parts, clocks
        self.clear()

    def clear(self) -> None:
        cells = (self.bins,) * len(self.clocks)
        self.sums = {p.name: torch.zeros(cells, dtype=torch.float64) for p in self.parts}
        self.counts = torch.zeros(cells, dtype=torch.float64)

    def add(self, loss: Loss) -> None:
        width = T / (self.bins - 1)
        cell = tuple(torch.ceil(loss.t[c].cpu() / width).long() for c in self.clocks)
        self.counts.index_put_(cell, torch.ones(len(cell[0])).double(), accumulate=True)
        for name, value in loss.per_part.items():
            self.sums[name].index_put_(cell, value.double().cpu(), accumulate=True)

    def mean(self) -> float:
        return float(sum(s.sum() for s in self.sums.values()) / self.counts.sum())

    def flush(self) -> dict:
        """The record for the log; ``None`` where a region saw no sample."""
        per_part = {n: float(s.sum() / self.counts.sum()) for n, s in self.sums.items()}
        regions = {n: _listed(s / self.counts) for n, s in self.sums.items()}
        record = {"loss": self.mean(), "per_part": per_part, "regions": regions}
        self.clear()
        return record


def _listed(table: Tensor) -> list:
    """A tensor as nested lists, with None for NaN, which JSON lacks."""
    if table.ndim == 0:
        return None if table.isnan() else float(table)
    return [_listed(row) for row in table]
