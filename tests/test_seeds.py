"""Seeds: the same gives the same, draws of a chain have their own, and a bad one is named."""

import pytest
import torch

from minidiffuser.seeds import checked, generator, nth


def draw(seed):
    return torch.randn(4, generator=generator(seed)).tolist()


def test_a_seed_gives_the_same_numbers_and_none_gives_others():
    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_draws_of_a_chain_have_seeds_of_their_own():
    """Of two chains with neighbouring seeds too."""
    drawn = [nth(seed, i) for seed in range(20) for i in range(1000)]
    assert len(set(drawn)) == 20_000
    assert nth(None, 5) is None
    assert 0 <= nth(2**62, 7) < 2**63


@pytest.mark.parametrize("seed", [1.0, "1", 2**63, -(2**63) - 1])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be None or an integer of 64 bits, got"):
        checked(seed)
