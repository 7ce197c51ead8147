"""Why training on the CPU does not use PyTorch's fused attention: writes attention.json.

    python benchmarks/attention.py

Times forward, and forward and backward, of `scaled_dot_product_attention` and of the three matrix
products in ``uvit.attend``, in bfloat16, at the lengths of the shipped model and of bench-45m.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from minidiffuser.uvit import attend

SIZES = {"emoji": (64, 5, 34, 64), "bench-45m": (8, 8, 336, 64)}  # (B, heads, L, d)


def seconds(call: Callable[[], object], repeats: int = 15) -> float:
    """Median time of a call, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure(shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Milliseconds of each way and direction."""
    q, k, v = torch.randn(3, *shape, dtype=torch.bfloat16).requires_grad_()
    gradient = torch.randn(shape, dtype=torch.bfloat16)
    ways = {"fused": lambda: F.scaled_dot_product_attention(q, k, v),
            "products": lambda: attend(q, k, v)}
    return {name: {"forward": 1e3 * seconds(way),
                   "forward and backward": 1e3 * seconds(lambda way=way: way().backward(gradient))}
            for name, way in ways.items()}


def main() -> None:
    """Measure all sizes, print and store them."""
    torch.set_num_threads(2)
    report = {name: measure(shape) for name, shape in SIZES.items()}
    text = json.dumps(report, indent=1)
    Path(__file__).with_name("attention.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
