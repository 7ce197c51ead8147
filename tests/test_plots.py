"""What figures are made of: PNG bytes, descriptions, sheets of pictures, clouds of points."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from minidiffuser.plots import cloud, contact_sheet, show, to_png

NOISE = Image.fromarray(torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8,
                                      generator=torch.Generator().manual_seed(0)).numpy())


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("colours", [2, 16, 128])
def test_a_palette_has_so_many_colours(colours):
    assert len(opened(to_png(NOISE, colours)).convert("RGB").getcolors(10_000)) == colours


def test_without_a_palette_nothing_is_lost():
    assert np.array_equal(opened(to_png(NOISE, None)), NOISE)


def test_a_figure_has_the_size_it_was_given():
    assert opened(to_png(Figure(figsize=(3, 2)))).size == (300, 200)


def test_what_is_shown_has_its_description(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    show(NOISE, "grey noise")
    data, metadata = shown[0]._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == "grey noise"
    assert data["image/png"]


def test_a_contact_sheet_reads_like_a_page():
    colours = ["#ff0000", "#00ff00", "#0000ff"]
    sheet = contact_sheet([*(Image.new("RGB", (9, 9), c) for c in colours), None], columns=3,
                          side=10, gap=2)
    assert sheet.size == (38, 26)
    centres = [(7, 7), (19, 7), (31, 7), (7, 19), (19, 19)]
    assert [sheet.getpixel(c) for c in centres] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (0x99,) * 3, (0xCC,) * 3]


def test_a_cloud_has_its_points_in_a_frame_that_is_always_the_same():
    ax = Figure().subplots()
    points = torch.tensor([[0.0, 1.0], [-1.0, 2.0]])
    cloud(ax, points, "data")
    assert np.array_equal(ax.collections[0].get_offsets(), points)
    assert ax.get_xlim() == ax.get_ylim() == (-2.5, 2.5)
    assert ax.get_title() == "data"
