"""Figures that notebooks, the demo and training runs share.

Colours are from Okabe and Ito's palette, which stays distinct for colour-blind readers.
"""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from .pipeline import UniDiffuser

# Okabe-Ito, by what we use each for.
COLOURS = {
    "image": "#0072B2", "text": "#D55E00", "joint": "#009E73", "given": "#999999",
    "accent": "#CC79A7", "light": "#56B4E9",
}


def to_png(picture: "Figure | Image.Image", colours: int | None = 128) -> bytes:
    """A figure or image as PNG; with a palette of so many colours it takes a third of the space."""
    from PIL import Image

    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, dpi=100, format="png")
        picture = Image.open(buffer)
    if colours is not None:
        picture = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def show(picture: "Figure | Image.Image", alt: str, colours: int | None = None) -> None:
    """Display a figure or image in a notebook, with a description for those who cannot see it."""
    from IPython.display import Image, display

    display(Image(to_png(picture, colours), alt=alt))


def image_row(
    axes: Sequence[Axes], images: Sequence["Image.Image"], titles: Sequence[str] = ()
) -> None:
    """Draw images into axes, each under its title."""
    for i, (ax, image) in enumerate(zip(axes, images, strict=False)):
        ax.imshow(image, interpolation="nearest")
        if i < len(titles):
            ax.set_title(textwrap.fill(titles[i], 22), fontsize=8)
    for ax in axes:
        ax.set_axis_off()


def contact_sheet(
    images: Sequence["Image.Image | None"], columns: int = 16, side: int = 40, gap: int = 2
) -> "Image.Image":
    """Many small images on one, row by row; a grey square stands for one that is missing."""
    from PIL import Image

    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), "#cccccc")
    for i, image in enumerate(images):
        place = (gap + i % columns * (side + gap), gap + i // columns * (side + gap))
        small = Image.new("RGB", (1, 1), "#999999") if image is None else image.convert("RGB")
        sheet.paste(small.resize((side, side), Image.Resampling.LANCZOS), place)
    return sheet


def cloud(ax: Axes, points: "Tensor", title: str = "", colour: str = COLOURS["image"]) -> None:
    """Points of the plane (N, 2), in a square frame from -2.5 to 2.5 without ticks."""
    x, y = points.T.tolist()
    ax.scatter(x, y, s=3, alpha=0.4, linewidths=0, color=colour)
    ax.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)


def task_figure(pipe: "UniDiffuser", prompts: Sequence[str], seed: int = 0, **how) -> Figure:
    """All five tasks of one model, a row each; prompts are the captions of the first row.

    The images of the second row are those of the first, so captions can be compared with prompts.
    """
    prompts, n = list(prompts), len(prompts)
    drawn = pipe.sample(("image",), {"text": prompts}, n, seed=seed, **how)["image"]
    read = pipe.sample(("text",), {"image": drawn}, n, seed=seed + 1, **how)["text"]
    pairs = pipe.joint(n, seed=seed + 2, **how)
    alone = pipe.image(n, seed=seed + 3, **how)
    said = pipe.text(n, seed=seed + 4, **how)
    rows = [
        ("text to image", drawn, prompts),
        ("image to text", drawn, read),
        ("joint", [image for image, _ in pairs], [text for _, text in pairs]),
        ("image", alone, []),
        ("text", [], said),
    ]
    figure = Figure(figsize=(1.6 * n + 1.1, 8.4), layout="constrained")
    grid = figure.subplots(len(rows), n, squeeze=False, height_ratios=[1, 1, 1, 0.85, 0.35])
    for (name, images, titles), axes in zip(rows, grid, strict=True):
        image_row(axes, images, titles)
        if not images:
            for ax, title in zip(axes, titles, strict=True):
                ax.text(0.5, 0.5, textwrap.fill(title, 20), ha="center", va="center", fontsize=8,
                        transform=ax.transAxes)
        axes[0].text(-0.12, 0.5, name, rotation=90, va="center", ha="right", fontsize=9,
                     transform=axes[0].transAxes)
    return figure


def timestep_square(ax: Axes) -> None:
    """The timestep square, with where each task starts and ends."""
    size = 1000
    lines = {  # task: (start, end, colour, label position, rotation)
        "joint": ((size, size), (0, 0), "joint", (470, 540), 45),
        "text-to-image": ((size, 0), (0, 0), "image", (500, -55), 0),
        "image-to-text": ((0, size), (0, 0), "text", (-55, 500), 90),
        "image": ((size, size), (0, size), "image", (500, 1050), 0),
        "text": ((size, size), (size, 0), "text", (1052, 500), 90),
    }
    for name, (start, end, colour, place, angle) in lines.items():
        ax.add_patch(FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=18, linewidth=2.5, shrinkA=2, shrinkB=2,
            color=COLOURS[colour], linestyle="--" if name in ("image", "text") else "-",
        ))
        ax.text(*place, name, rotation=angle, ha="center", va="center", color=COLOURS[colour])
    ax.plot([0], [0], "o", color="black", clip_on=False)
    ax.set(xlim=(-110, 1110), ylim=(-110, 1110), aspect="equal",
           xlabel="image timestep  (0: clean, 1000: all noise)",
           ylabel="text timestep  (0: clean, 1000: all noise)")
    ax.set_xticks([0, 500, 1000])
    ax.set_yticks([0, 500, 1000])
