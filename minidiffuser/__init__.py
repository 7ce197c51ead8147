"""minidiffuser: learn how multi-modal diffusion works, and train a UniDiffuser of your own.

    from minidiffuser import UniDiffuser
    pipe = UniDiffuser.from_pretrained("emoji")
    pipe.text_to_image("red apple", n=4, seed=0)
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["UniDiffuser"]

if TYPE_CHECKING:
    from .pipeline import UniDiffuser


def __getattr__(name: str):
    # PyTorch takes seconds to import: only what is used is loaded.
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
