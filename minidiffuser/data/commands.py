"""The command line of data: ``python -m minidiffuser data filter | score | fetch | encode``."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True,
                  help="Tables of images and captions: filter, score, fetch, encode.")

Table = Annotated[str, typer.Argument(help="A shipped table, or a folder of parquet files.")]
Split = Annotated[str, typer.Option(help="The split, where a table has several.")]
Out = Annotated[Path | None, typer.Option(help="The folder to write; nothing is by default.")]


@app.command("filter")
def filter_table(
    table: Table,
    subset: Annotated[str, typer.Option(help="A subset of LAION-5B: its filters.")] = "all",
    step: Annotated[list[str] | None, typer.Option(
        help="A further filter, in this order, such as min_size=32; can be repeated.")] = None,
    without: Annotated[list[str] | None, typer.Option(
        help="A filter to leave out; punsafe is on unless named here.")] = None,
    split: Split = "train",
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Keep the rows that pass all filters, and say how many went at each, and why."""
    from . import filters, load_table, save_table

    steps = filters.subset_steps(subset, without or ()) + [filters.parse(s) for s in step or ()]
    kept, report = filters.apply(load_table(table, split), steps)
    typer.echo(json.dumps(report.to_dict(), indent=1) if as_json else str(report))
    if out:
        typer.echo(f"{save_table(kept, out, split)}: {len(kept):,} rows")


@app.command("score")
def score_table(
    table: Table,
    model: Annotated[str, typer.Option(
        help="tiny, a folder, a CLIP of the Hugging Face hub, or open_clip:MODEL/WEIGHTS.")
    ] = "tiny",
    split: Annotated[list[str] | None, typer.Option(help="Only this one; can be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; the table itself if not given.")
                   ] = None,
) -> None:
    """Fill the column similarity: the cosine of each image and its caption."""
    from ..clip import add_similarity, load_scorer
    from . import load_table, save_table, table_folder

    scorer, folder = load_scorer(model), table_folder(table)
    for name in split or sorted(f.stem for f in folder.glob("*.parquet")):
        scored = add_similarity(load_table(table, name), scorer)
        values = [s for s in scored["similarity"] if s is not None]
        mean = f"mean {sum(values) / len(values):.3f}" if values else "no row has image and caption"
        typer.echo(f"{save_table(scored, out or folder, name)}: {len(values):,} of {len(scored):,} "
                   f"rows scored by {scorer.name}, {mean}")


@app.command("info")
def info(table: Table, split: Split = "train") -> None:
    """Rows and columns of a table, and which of LAION's columns they are."""
    from . import filters, load_table

    read = load_table(table, split)
    typer.echo(f"{len(read):,} rows")
    own = {name: canonical for canonical, name in filters.columns_of(read).items()}
    for name in read.column_names:
        nulls = read.data.column(name).null_count
        known = own.get(name, "")
        typer.echo(f"{name:14s} {known if known != name else '':12s} "
                   f"{f'{nulls:,} null' if nulls else ''}".rstrip())


@app.command("fetch")
def fetch_images(
    source: Annotated[str, typer.Argument(
        help="A parquet file in LAION's schema, a folder of them, or a dataset of the hub.")],
    out: Annotated[Path, typer.Option(help="The folder to write; run again to continue.")],
    limit: Annotated[int | None, typer.Option(help="Rows to ask for; all by default.")] = None,
    subset: Annotated[str, typer.Option(help="A subset of LAION-5B: its filters.")] = "all",
    without: Annotated[list[str] | None, typer.Option(
        help="A filter to leave out; punsafe is on unless named here.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(
        help="A host that may have a private address; can be repeated.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second at most.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds of silence that end a download.")] = 10,
    deadline: Annotated[float, typer.Option(help="Seconds that a download may take.")] = 30,
    max_bytes: Annotated[int, typer.Option(help="Largest file.")] = 20_000_000,
    image_size: Annotated[int, typer.Option(help="Length of the shorter side.")] = 256,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard.")] = 1000,
    processes: Annotated[int, typer.Option(help="Processes.")] = 1,
    threads: Annotated[int, typer.Option(help="Downloads at once in each.")] = 32,
    retries: Annotated[int, typer.Option(help="Further tries of what failed.")] = 0,
    distributor: Annotated[str, typer.Option(
        help="multiprocessing, pyspark or ray.")] = "multiprocessing",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Download the images of a table of URLs, safely, and say what failed and why."""
    from .fetch import fetch

    report = fetch(
        source, out, limit=limit, subset=subset, without=without or (),
        allow_hosts=allow_host or (), rate=rate, timeout=timeout, deadline=deadline,
        max_bytes=max_bytes, image_size=image_size, shard_rows=shard_rows, processes=processes,
        threads=threads, retries=retries, distributor=distributor, progress=True)
    typer.echo(json.dumps(report.to_dict(), indent=1) if as_json else str(report))


@app.command("encode", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def encode_table(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A table, or a folder of `data fetch`.")],
    out: Annotated[Path, typer.Option(help="The folder to write; run again to continue.")],
    preset: Annotated[str, typer.Option(help="Whose codecs; settings can follow as --key value.")
                      ] = "emoji",
    model: Annotated[str | None, typer.Option(help="Use the codecs of this model.")] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard.")] = 1000,
) -> None:
    """Turn images and captions into latents on disk, for `train PRESET --data OUT`.

    Several processes divide the work: accelerate launch -m minidiffuser data encode ...
    """
    from ..config import overrides
    from ..config import preset as find
    from ..pipeline import UniDiffuser
    from .features import encode

    cfg, codecs = find(preset).replace(**overrides(context.args)), None
    if model:
        pipe = UniDiffuser.from_pretrained(model)
        cfg, codecs = pipe.cfg, pipe.codecs
    typer.echo(encode(source, out, cfg, codecs=codecs, shard_rows=shard_rows, progress=True))
