"""``make demo``: every task of the shipped model, captions printed and one labelled picture."""

from collections.abc import Callable
from pathlib import Path

from .errors import explained
from .pipeline import UniDiffuser
from .plots import task_figure

PROMPTS = (
    "woman mechanic: dark skin tone",
    "man biking",
    "person rowing boat: light skin tone",
    "red heart",
    "flag: Japan",
    "man health worker: medium-light skin tone",
)


def run(model: str, out: Path, seed: int, echo: Callable[[str], None]) -> None:
    """Sample all tasks, print the captions and write the figure to ``out``.

    Raises:
        ValueError: an unknown model, or a place that cannot be written.
    """
    pipe = UniDiffuser.from_pretrained(model)
    echo("text to image, and the captions read off those images:")
    images = pipe.sample(("image",), {"text": list(PROMPTS)}, len(PROMPTS), seed=seed)["image"]
    read = pipe.sample(("text",), {"image": images}, len(PROMPTS), seed=seed)["text"]
    for prompt, caption in zip(PROMPTS, read, strict=True):
        echo(f"  {prompt}  ->  {caption}")
    echo("captions from nothing:")
    for caption in pipe.text(n=4, seed=seed):
        echo(f"  {caption}")
    with explained(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        task_figure(pipe, PROMPTS, seed=seed).savefig(out, dpi=110)
    echo(f"all five tasks: {out}")
