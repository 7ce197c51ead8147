"""Widgets of the lessons: a playground, and a slider over figures that were drawn beforehand.

What the playground does is a method that can be called without a browser; the layout only calls it.
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ipywidgets as w

if TYPE_CHECKING:
    from PIL import Image

    from .pipeline import UniDiffuser


def png(image: "Image.Image", side: int = 192) -> bytes:
    """An image as PNG, enlarged to ``side`` pixels without blurring."""
    buffer = io.BytesIO()
    image.resize((side, side), resample=0).save(buffer, "PNG")
    return buffer.getvalue()


def picture(data: bytes, alt: str) -> str:
    """PNG as HTML, with a description for those who cannot see it (``w.Image`` has none)."""
    source = base64.b64encode(data).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{html.escape(alt)}">'


class Flipbook(w.VBox):
    """A slider over pictures drawn beforehand.  It lives in the browser: it answers at once, while
    the kernel is at work too.

    Args:
        pictures: PNG bytes, one for each stop. labels: what each stop is called.
        description: what the slider changes. alt: what the pictures show, for a screen reader.

    Raises:
        ValueError: no picture, or not one label for each.
    """

    def __init__(
        self, pictures: Sequence[bytes], labels: Sequence[str], description: str, alt: str
    ):
        if not pictures or len(pictures) != len(labels):
            raise ValueError(f"a flipbook needs one label for each picture, got {len(pictures)} "
                             f"pictures and {len(labels)} labels")
        self.slider = w.SelectionSlider(
            options=[(label, i) for i, label in enumerate(labels)], description=description,
            style={"description_width": "initial"}, layout=w.Layout(width="480px"),
            readout=False,  # it cuts labels off; each page has its own above the picture
        )
        self.pages = w.Stack([w.HTML(f"<div>{html.escape(label)}</div>{picture(data, alt)}")
                              for data, label in zip(pictures, labels, strict=True)],
                             selected_index=0)
        self.link = w.jslink((self.slider, "index"), (self.pages, "selected_index"))
        super().__init__([self.slider, self.pages])


class Playground(w.HBox):
    """Type a caption and see an image of it; pick an emoji and read what the model calls it.

    Args:
        pipe: the model. drawings: caption -> image, to pick from. steps: of the solver.
    """

    def __init__(
        self, pipe: "UniDiffuser", drawings: "dict[str, Image.Image]", steps: int = 12
    ):
        self.pipe, self.drawings, self.steps, self.seed = pipe, drawings, steps, 0
        wide = w.Layout(width="300px")
        self.prompt = w.Text(value="red apple", description="caption", layout=wide,
                             continuous_update=False)
        # Not a slider: a slider should answer at once, and drawing takes a moment.
        self.scale = w.Dropdown(value=1, options=[0, 0.5, 1, 2, 4, 8], description="guidance",
                                layout=wide)
        self.draw_button = w.Button(description="draw another", icon="refresh")
        self.drawn = w.HTML()
        self.message = w.HTML(layout=wide)
        self.choice = w.Dropdown(options=list(drawings), description="emoji", layout=wide)
        self.shown = w.HTML()
        self.caption = w.HTML(layout=wide)

        self.prompt.observe(lambda _: self.draw(), names="value")
        self.scale.observe(lambda _: self.draw(), names="value")
        self.draw_button.on_click(lambda _: self.draw_another())
        self.choice.observe(lambda _: self.read(), names="value")
        self.draw()
        self.read()
        super().__init__([
            w.VBox([w.HTML("<b>text to image</b>"), self.prompt, self.scale, self.draw_button,
                    self.drawn, self.message]),
            w.VBox([w.HTML("<b>image to text</b>"), self.choice, self.shown, self.caption]),
        ])

    def draw(self) -> None:
        """Draw the caption as it stands; what is wrong with it is said below the image."""
        try:
            image = self.pipe.text_to_image(self.prompt.value, steps=self.steps, seed=self.seed,
                                            guidance_scale=self.scale.value)[0]
        except ValueError as error:
            said = html.escape(str(error), quote=False)
            self.message.value = f"<span style='color:#D55E00'>{said}</span>"
            return
        self.drawn.value = picture(png(image), f"what the model draws for: {self.prompt.value}")
        self.message.value = f"seed {self.seed}"

    def draw_another(self) -> None:
        """Draw the same caption from other noise."""
        self.seed += 1
        self.draw()

    def read(self) -> None:
        """Show the emoji that was picked, and the model's caption of it beside its own."""
        image = self.drawings[self.choice.value]
        said = self.pipe.image_to_text(image, steps=self.steps)[0]
        self.shown.value = picture(png(image), self.choice.value)
        self.caption.value = f"the model says: <b>{html.escape(said, quote=False)}</b>"
