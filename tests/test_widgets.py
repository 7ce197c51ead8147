"""Widgets, without a browser: what they do is in methods, and what is wrong is said in place."""

import base64
import io
import re

import pytest
from PIL import Image

from minidiffuser.widgets import Flipbook, Playground, png


class StandIn:
    """Draws a colour that depends on how it is asked; reads the colour back."""

    def __init__(self):
        self.asked = []

    def text_to_image(self, prompt, **how):
        self.asked.append((prompt, how))
        if "zebra" in prompt:
            raise ValueError("not 'zebra' <nearest: cobra>")
        return [Image.new("RGB", (8, 8), (len(prompt), how["seed"], int(how["guidance_scale"])))]

    def image_to_text(self, image, **how):
        return [f"<{image.getpixel((0, 0))[0]}>"]


def content(widget) -> bytes:
    return base64.b64decode(re.search(r'src="data:image/png;base64,([^"]*)"', widget.value)[1])


def pixel(widget):
    return Image.open(io.BytesIO(content(widget))).convert("RGB").getpixel((0, 0))


@pytest.fixture
def playground():
    drawings = {name: Image.new("RGB", (8, 8), (i, 0, 0)) for i, name in enumerate("ab")}
    return Playground(StandIn(), drawings, steps=5)


def test_png_enlarges_without_blurring():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 0, 0))
    big = Image.open(io.BytesIO(png(image, 64)))
    assert big.size == (64, 64)
    assert sorted(count for count, _ in big.getcolors()) == [32 * 64, 32 * 64]


def test_the_flipbook_has_a_page_for_each_stop_of_its_slider():
    """That moving the slider turns the page is seen in tests/test_browser.py: no kernel does it."""
    book = Flipbook([b"one", b"two", b"three"], ["1", "2", "3"], "stop", alt="numbers")
    assert [content(page) for page in book.pages.children] == [b"one", b"two", b"three"]
    assert [label for label, _ in book.slider.options] == ["1", "2", "3"]
    assert book.slider.index == book.pages.selected_index == 0
    assert book.link.source == (book.slider, "index")
    assert book.link.target == (book.pages, "selected_index")
    assert 'alt="numbers"' in book.pages.children[2].value


def test_each_page_says_which_it_is_however_long_that_takes():
    """The slider's own readout would cut it off."""
    label = "caption_repeats=4: 2,650 rows & more"
    book = Flipbook([b"one", b"two"], ["raw", label], "after", alt="rows")
    assert not book.slider.readout
    assert "<div>caption_repeats=4: 2,650 rows &amp; more</div>" in book.pages.children[1].value


@pytest.mark.parametrize("pictures, labels", [([], []), ([b"one"], ["1", "2"])])
def test_the_flipbook_needs_a_label_for_each_picture(pictures, labels):
    with pytest.raises(ValueError, match=f"got {len(pictures)} pictures and {len(labels)} labels"):
        Flipbook(pictures, labels, "stop", alt="")


def test_the_playground_draws_a_new_caption(playground):
    playground.prompt.value = "flag: Japan"
    assert playground.pipe.asked[-1] == (
        "flag: Japan", {"steps": 5, "seed": 0, "guidance_scale": 1.0})
    assert pixel(playground.drawn) == (len("flag: Japan"), 0, 1)


def test_its_guidance_and_its_button_draw_again(playground):
    playground.scale.value = 4
    assert pixel(playground.drawn)[2] == 4
    playground.draw_button.click()
    playground.draw_button.click()
    assert pixel(playground.drawn)[1] == 2
    assert playground.message.value == "seed 2"


def test_an_unknown_word_is_named_and_the_last_image_kept(playground):
    before = playground.drawn.value
    playground.prompt.value = "zebra"
    assert playground.drawn.value == before
    assert "not 'zebra' &lt;nearest: cobra&gt;" in playground.message.value
    playground.prompt.value = "red heart"
    assert "zebra" not in playground.message.value


def test_it_reads_the_emoji_picked(playground):
    assert "&lt;0&gt;" in playground.caption.value
    playground.choice.value = "b"
    assert "&lt;1&gt;" in playground.caption.value and pixel(playground.shown) == (1, 0, 0)
