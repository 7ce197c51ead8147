"""What tests import from each other: the toy preset, and a network of random weights."""

import torch

from minidiffuser.config import PRESETS
from minidiffuser.uvit import UViT

TOY = PRESETS["toy"]


def random_net(cfg, seed=0):
    """A network whose output depends on all it is fed, as a trained one's does.

    (As initialised for training it is almost blind: its matrices are near 0.)
    """
    net, generator = UViT(cfg.network()), torch.Generator().manual_seed(seed)
    net.init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.25)
    return net
