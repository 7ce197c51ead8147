"""The command line: ``python -m minidiffuser demo | train | sample | evaluate | ...``."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import __version__, classroom
from .data import commands as data

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Learn and train multi-modal diffusion.")
app.add_typer(classroom.app, name="classroom")
app.add_typer(data.app, name="data")

# Shown when something is written over by default.
Out = Annotated[Path | None, typer.Option(help="Where to write; a name is made up by default.")]
Model = Annotated[str, typer.Option(help="A shipped model, a folder, or thu-ml/unidiffuser-v1.")]
Steps = Annotated[int, typer.Option(help="Solver steps.")]
Scale = Annotated[float, typer.Option(help="s of (1 + s) cond - s uncond; 0 for none.")]
Spacing = Annotated[str, typer.Option(help="The solver's times are even in: time or logsnr.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Number = Annotated[int, typer.Option("--n", help="How many samples.")]


@app.callback()
def _main(verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    preset: Annotated[str, typer.Argument(help="A preset: see `info`.")],
    out: Out = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")] = False,
) -> None:
    """Train a preset; any setting can follow as --key value. Run again to continue."""
    from .config import overrides
    from .config import preset as find
    from .train import Trainer

    cfg = find(preset).replace(**overrides(context.args))
    folder = out or Path("runs") / preset
    logging.getLogger("minidiffuser").setLevel(logging.INFO)
    trainer = Trainer(cfg, folder, cpu=cpu, progress=True)
    if trainer.step >= cfg.steps:
        typer.echo(f"{folder} has already taken its {cfg.steps} steps; --steps takes more")
    for _ in trainer:
        pass
    typer.echo(f"model: {folder / 'model'}")


@app.command()
def sample(
    task: Annotated[str, typer.Argument(help="text-to-image, image-to-text, joint, image, text.")],
    prompt: Annotated[str | None, typer.Option(help="The caption, for text-to-image.")] = None,
    image: Annotated[Path | None, typer.Option(help="The image, for image-to-text.")] = None,
    model: Model = "emoji",
    n: Number = 1,
    steps: Steps = 25,
    guidance_scale: Scale = 1.0,
    seed: Seed = 0,
    solver: Annotated[str, typer.Option(help="dpm++2m, dpm++fast, ddim or ddpm.")] = "dpm++2m",
    out: Out = None,
) -> None:
    """Sample a task: images are written, captions are printed."""
    from .pipeline import UniDiffuser
    from .tasks import Role, roles_of

    roles = roles_of(task)
    given = {"text": prompt, "image": image}
    for name, value in given.items():
        if (roles[name] is Role.GIVEN) != (value is not None):
            option = {"text": "--prompt", "image": "--image"}[name]
            raise ValueError(f"{task} {'needs' if value is None else 'does not take'} {option}")
    made = UniDiffuser.from_pretrained(model).sample(
        [m for m, role in roles.items() if role is Role.SAMPLED],
        {m: given[m] for m, role in roles.items() if role is Role.GIVEN},
        n, steps=steps, guidance_scale=guidance_scale, seed=seed, solver=solver,
    )
    captions = made.get("text", [])
    for i, picture in enumerate(made.get("image", [])):
        path = _numbered(out or Path(f"{task}.png"), i, n)
        _save_image(picture, path)
        typer.echo(f"{path}: {captions[i]}" if captions else path)
    if "image" not in made:
        typer.echo("\n".join(captions))


def _numbered(path: Path, i: int, n: int) -> Path:
    return path if n == 1 else path.with_stem(f"{path.stem}_{i}")


def _save_image(picture, path: Path) -> None:
    from .errors import explained

    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(path)
        except ValueError:
            raise ValueError(f"cannot tell the image format from {path.name!r}: end it in .png"
                             ) from None


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A shipped model, or a folder.")] = "emoji",
    n: Annotated[int, typer.Option("--n", help="Rows of each split.")] = 188,
    steps: Steps = 25,
    guidance_scale: Scale = 1.0,
    spacing: Spacing = "time",
    seed: Seed = 0,
    clip: Annotated[str | None, typer.Option(
        help="Add similarity by a CLIP: tiny, a folder, a hub name, open_clip:MODEL/WEIGHTS.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on held-out captions and images, and on as many of the training set."""
    from .metrics import evaluate as score
    from .pipeline import UniDiffuser

    pipe = UniDiffuser.from_pretrained(model)
    result = score(pipe, n=n, seed=seed, steps=steps, guidance_scale=guidance_scale,
                   spacing=spacing, clip=clip)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for split in ("test", "train"):
        for name, entry in result[split].items():
            typer.echo(_score_line(f"{split}: {name}", entry))
    typer.echo(_score_line("joint_top1", result["joint_top1"]))
    if clip:
        typer.echo(_score_line("joint_similarity", result["joint_similarity"]))
        typer.echo(f"similarity is on the scale of {result['settings']['clip']}, and comparable "
                   "with no other model's")


def _score_line(name: str, entry: dict) -> str:
    low, high = entry["interval"]
    return f"{name:25s} {entry['value']:.3f}   95% [{low:.3f}, {high:.3f}]   n={entry['n']}"


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="Weights: .safetensors, .pth, .pt or .bin.")],
    dst: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    source: Annotated[str, typer.Option(help="Names in SRC: official, diffusers or ours.")],
    target: Annotated[str, typer.Option(help="Names in DST, likewise.")],
    preset: Annotated[str, typer.Option(help="The network's shape.")] = "unidiffuser-v1",
) -> None:
    """Rename the weights of a U-ViT between the official code, diffusers and this package."""
    from .convert import convert_file

    convert_file(src, dst, source, target, preset)
    typer.echo(f"{dst}: {source} -> {target}")


@app.command()
def info(
    preset: Annotated[str | None, typer.Argument(help="A preset; all of them by default.")] = None,
) -> None:
    """Parameters, tokens, FLOPs and memory of a training step of a preset."""
    from .config import PRESETS
    from .config import preset as find
    from .cost import cost

    for name in [preset] if preset else PRESETS:
        typer.echo(cost(find(name)).describe(name))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("demo.png"),
    model: Model = "emoji",
    seed: Seed = 0,
) -> None:
    """Run every task of the shipped model: print captions, write a labelled picture."""
    from .demo import run

    run(model, out, seed, echo=typer.echo)


def main() -> None:
    """Run the command line; an error the user can mend is one line, without a traceback."""
    try:
        app(prog_name="python -m minidiffuser")
    except ValueError as error:
        if os.environ.get("MINIDIFFUSER_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk or a lost folder, somewhere between
        sys.exit(f"error: {error}")


@app.command()
def version() -> None:
    """The version of this package."""
    typer.echo(__version__)


if __name__ == "__main__":
    main()
