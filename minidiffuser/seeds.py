"""Random numbers: every function that draws takes a seed or a generator made here."""

from numbers import Integral

import torch


def generator(seed: int | None = 0) -> torch.Generator:
    """A CPU generator that gives the same numbers each time; None for others each time.

    Raises:
        ValueError: not an integer of 64 bits.
    """
    made = torch.Generator()
    if seed is None:
        made.seed()
    else:
        made.manual_seed(checked(seed))
    return made


def checked(seed: int) -> int:
    """The seed, or ValueError where it is no integer of 64 bits."""
    if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be None or an integer of 64 bits, got {seed!r}")
    return int(seed)


def nth(seed: int | None, i: int) -> int | None:
    """A seed of its own for the i-th draw of a chain; None for None."""
    return None if seed is None else (checked(seed) * 1_000 + i) % 2**63
