"""What `info` says a training step costs, against a count by hand."""

import pytest

from minidiffuser.config import PRESETS
from minidiffuser.cost import cost


def flops_by_hand(cfg) -> int:
    """Multiply-adds times 2 of one sample: forward once, backward twice (once for the inputs)."""
    net = cfg.network()
    d, length, blocks = net.dim, net.tokens, net.depth + 1
    per_block = length * (3 * d * d + d * d + 2 * d * int(d * net.mlp_ratio)) + 2 * length**2 * d
    skips = net.depth // 2 * length * 2 * d * d
    heads = embeds = sum(p.tokens * p.token_dim * d for p in net.parts)
    return 2 * (3 * (blocks * per_block + skips + heads) + 2 * embeds)


@pytest.mark.parametrize("name", ["toy", "emoji", "bench-45m"])
def test_flops_are_those_of_the_matrix_products(name):
    cfg = PRESETS[name]
    found = cost(cfg)
    assert found.flops == flops_by_hand(cfg) * cfg.batch_size
    assert found.tokens == cfg.network().tokens


def test_parameters_of_the_official_model():
    assert cost(PRESETS["unidiffuser-v1"]).parameters == 952_509_520
    assert "952,509,520" in cost(PRESETS["unidiffuser-v1"]).describe("unidiffuser-v1")


def test_recomputing_activations_trades_operations_for_memory():
    cfg = PRESETS["bench-45m"]
    kept, again = cost(cfg), cost(cfg.replace(checkpoint=True))
    assert again.activations < kept.activations / 5
    assert kept.flops < again.flops < 1.4 * kept.flops


def test_states_count_the_optimiser_and_the_average():
    cfg = PRESETS["toy"]
    muon, adamw = cost(cfg), cost(cfg.replace(optimizer="adamw"))
    assert muon.states == 16 * muon.parameters and adamw.states == 20 * adamw.parameters


def test_activations_grow_with_the_batch():
    cfg = PRESETS["toy"]
    double = cost(cfg.replace(batch_size=2 * cfg.batch_size))
    assert double.activations == 2 * cost(cfg).activations
