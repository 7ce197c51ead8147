"""minidiffuser: learn how multi-modal diffusion works, and train a UniDiffuser of your own."""

__version__ = "0.1.0"
