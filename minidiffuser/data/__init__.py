"""Tables of images and captions, all in LAION's schema, read with Hugging Face `datasets`.

    table = load_table("emoji", "train")      # datasets.Dataset; row["image"] is a PIL image
    clean, report = filters.apply(table, [filters.readable(), filters.near_duplicates()])
"""

from . import filters
from .tables import (
    EXTRA_COLUMNS,
    LAION_COLUMNS,
    load_table,
    save_table,
    shipped_tables,
    table_folder,
)

__all__ = ["EXTRA_COLUMNS", "LAION_COLUMNS", "filters", "load_table", "save_table",
           "shipped_tables", "table_folder"]
