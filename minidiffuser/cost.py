"""What a preset costs: parameters, tokens, floating-point operations and memory of a training step.

Counted, not guessed: the parameters from the network built without storage (PyTorch's meta device),
the operations by `torch.utils.flop_counter` over a forward and backward pass on that device.
Memory is the sum of what must be held: weights, gradients, optimiser state and average in float32,
and the activations the backward pass keeps, which are counted by hooking autograd's saved tensors,
in the run's low precision throughout (autocast keeps some in float32, so a run needs more).
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from .config import Config
from .uvit import UViT


@dataclass(frozen=True)
class Cost:
    """Of one training step: forward and backward over a batch, then the update.

    ``flops`` counts a multiply-add as 2; ``activations`` and ``states`` are bytes.
    """

    parameters: int
    tokens: int
    batch: int
    flops: int
    states: int
    activations: int

    def describe(self, name: str) -> str:
        return "\n".join([
            name,
            f"  parameters   {self.parameters:,}",
            f"  tokens       {self.tokens:,} per sample",
            f"  a step       {self.flops / 1e12:,.3g} TFLOP at batch {self.batch:,} "
            f"({self.flops / self.batch / 1e9:,.3g} GFLOP per sample)",
            f"  memory       {_gib(self.states)} for weights, gradients, optimiser and average; "
            f"{_gib(self.activations)} for activations of the whole batch",
        ])


def cost(cfg: Config) -> Cost:
    """Count a configuration's training step, without using the memory it would take."""
    shape = cfg.network()
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.precision, torch.float32)
    with torch.device("meta"):
        net = UViT(shape).train().to(low)
        # FLOPs and activations are proportional to the batch: one sample is counted.
        x = {p.name: torch.zeros(1, *p.shape, dtype=low) for p in shape.parts}
        t = {clock: torch.zeros(1) for clock in shape.clocks}
    kept: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in net.parameters()}

    def pack(tensor):
        # A tensor saved twice, or a view of one, is held once; weights are counted elsewhere.
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = max(kept.get(key, 0), tensor.untyped_storage().nbytes())
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(x, t)
        sum(o.sum() for o in out.values()).backward()
    parameters = sum(p.numel() for p in net.parameters())
    # float32: weights, gradients, EMA, and one (Muon) or two (AdamW) moments
    moments = 2 if cfg.optimizer == "adamw" else 1
    return Cost(
        parameters=parameters, tokens=shape.tokens, batch=cfg.batch_size,
        flops=counter.get_total_flops() * cfg.batch_size,
        states=4 * parameters * (3 + moments),
        activations=sum(kept.values()) * cfg.batch_size,
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3g} GiB" if count >= 2**28 else f"{count / 2**20:,.3g} MiB"
