"""Tables of images and captions, all in LAION's schema, read with Hugging Face `datasets`.

    table = load_table("emoji", "train")      # datasets.Dataset; row["image"] is a PIL image
"""

from .tables import EXTRA_COLUMNS, LAION_COLUMNS, load_table, shipped_tables

__all__ = ["EXTRA_COLUMNS", "LAION_COLUMNS", "load_table", "shipped_tables"]
