"""Run by test_train under torch.distributed.run: train a toy, stop, resume, and store each rank."""

import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from minidiffuser.config import PRESETS
from minidiffuser.train import Trainer

folder = Path(sys.argv[1])
cfg = PRESETS["toy"].replace(steps=8, save_every=4, sample_every=100, precision="no")
for step in Trainer(cfg, folder / "run", cpu=True):
    if step.index == 6:
        break
trainer = Trainer(cfg, folder / "run", cpu=True)
assert trainer.step == 4, trainer.step
for _ in trainer:
    pass
state = {k: v.detach().clone() for k, v in trainer.net.state_dict().items()}
save_file(state, folder / f"rank{os.environ['RANK']}.safetensors")
