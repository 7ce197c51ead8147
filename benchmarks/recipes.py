"""What each choice of the training recipe buys at equal time: writes recipes.json and recipes.md.

    python benchmarks/recipes.py --seconds 80            # all rows; two at a time, one core each
    python benchmarks/recipes.py --seconds 80 --only base adamw

"Time" is processor time of one thread, so that rows can share a machine and be compared all the
same.  Every row is the shipped recipe on a smaller network with one thing changed, trained until
the time is up (the rate falls to 0 over its last half).  Short runs do not sample well, so they
are scored by one call of the network on the held-out split, at t = 900, the other modality given:

    image_rmse   root mean square error of the image predicted from its caption, in [0, 1] units
    text_acc     share of the caption's tokens predicted right from its image

Both are measured on decoded data, so that rows with other codecs and predictions compare.  Rows in
recipes.json under the same number of seconds are not run again.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RECIPES: dict[str, tuple[str, dict]] = {
    "base": ("the shipped recipe", {}),
    "adamw": ("AdamW at 1e-3 instead of Muon", {"optimizer": "adamw", "lr": 1e-3}),
    "square": ("timesteps over the whole square, as in the paper",
               {"square": 1, "given": 0, "ignored": 0, "diagonal": 0}),
    "v": ("v-prediction, v loss", {"prediction": "v", "weighting": "v"}),
    "eps": ("noise prediction, eps loss", {"prediction": "eps", "weighting": "eps"}),
    "x0-flat": ("x0 loss without weights", {"weighting": "x0"}),
    "min-snr": ("x0 loss with min-SNR weights", {"weighting": "min-snr"}),
    "scaled-linear": ("Stable Diffusion's schedule", {"schedule": "scaled-linear"}),
    "patch8": ("patches of 8 x 8: 64 image tokens", {"patch": 8}),
    "pca": ("linear autoencoder: 64 tokens of 64 numbers", {"image_codec": "pca", "patch": 1}),
    "random-codes": ("caption codes all random", {"caption_codes": "random"}),
    "post-ln": ("LayerNorm after each addition, as in the paper", {"norm": "post"}),
    "qk-norm": ("normalised queries and keys", {"qk_norm": True}),
    "official": ("the paper's choices together", {
        "optimizer": "adamw", "lr": 2e-4, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.03,
        "schedule": "scaled-linear", "prediction": "eps", "weighting": "eps", "norm": "post",
        "square": 1, "given": 0, "ignored": 0, "diagonal": 0, "clip": 0}),
}


# The timestep shares are those of the shipped model's second stage (see its card).
SMALL = {"dim": 192, "depth": 4, "heads": 3, "batch_size": 64, "warmup": 20,
         "square": 0.1, "given": 0.75, "ignored": 0.1, "diagonal": 0.05, "favour_image": 0.65}
T_SCORED = 900


def train_one(name: str, seconds: float) -> dict:
    """Train one recipe for ``seconds`` of processor time on one thread, and score it."""
    import torch

    from minidiffuser import train
    from minidiffuser.config import PRESETS

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    never = 10**9
    cfg = PRESETS["emoji"].replace(steps=never, save_every=never, sample_every=never,
                                   **{**SMALL, **RECIPES[name][1]})
    spent = 0.0

    def rate_factor(step: int, cfg) -> float:
        return min(1.0, (step + 1) / cfg.warmup, max(0.0, (1 - spent) / 0.5))

    train.rate_factor = rate_factor  # by time instead of by steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = train.Trainer(cfg, folder, cpu=True)
        start = time.process_time()
        for _ in trainer:
            spent = (time.process_time() - start) / seconds
            if spent >= 1:
                break
        pipe = trainer.pipeline()
    return {"seconds": seconds, "steps": trainer.step,
            "parameters": sum(p.numel() for p in pipe.net.parameters()), **score(pipe)}


def score(pipe) -> dict:
    """One-call errors on the held-out split, and their standard errors over its rows."""
    import torch

    from minidiffuser.pipeline import training_arrays

    pixels, captions = training_arrays(pipe.cfg, "test")
    image, text = pipe.codecs["image"], pipe.codecs["text"]
    x0 = {"image": image.encode_pixels(torch.from_numpy(pixels)), "text": text.encode(captions)}
    predicted = {name: one_call(pipe, x0, name) for name in x0}
    drawn = image.decode_pixels(predicted["image"]).float() / 255
    rmse = (drawn - torch.from_numpy(pixels) / 255).square().flatten(1).mean(1).sqrt()
    ids = text.encode_ids(captions)
    nearest = torch.cdist(predicted["text"].flatten(0, 1), text.codes).argmin(1).view_as(ids)
    told = (torch.arange(ids.shape[1]) <= (ids > 0).sum(1, keepdim=True)).float()  # and one end
    accuracy = ((nearest == ids) * told).sum(1) / told.sum(1)
    return {name: {"value": float(v.mean()), "error": float(v.std() / len(v) ** 0.5)}
            for name, v in (("image_rmse", rmse), ("text_acc", accuracy))}


def one_call(pipe, x0: dict, name: str):
    """x_0 of one modality, predicted at T_SCORED from its noisy state and the other one clean."""
    import torch

    generator = torch.Generator().manual_seed(0)
    batch = len(x0[name])
    noise = torch.randn(x0[name].shape, generator=generator)
    x = {**x0, name: pipe.schedule.perturb(x0[name], T_SCORED, noise)}
    t = {n: torch.full((batch,), float(T_SCORED if n == name else 0)) for n in x0}
    with torch.no_grad():
        out = pipe.net(x, t)[name]
    return pipe.schedule.convert(out, pipe.cfg.prediction, "x0", x[name], T_SCORED)


def table(results: dict[str, dict]) -> str:
    """The results as Markdown, with standard errors."""
    lines = ["| recipe | what differs | steps | image_rmse | text_acc |", "|---|---|---|---|---|"]
    for name, (about, _) in RECIPES.items():
        if name in results:
            r = results[name]
            cells = [f"{r[k]['value']:.3f} ± {r[k]['error']:.3f}"
                     for k in ("image_rmse", "text_acc")]
            lines.append(f"| {name} | {about} | {r['steps']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(results: dict[str, dict]) -> None:
    """recipes.json and recipes.md."""
    (HERE / "recipes.json").write_text(json.dumps(results, indent=1) + "\n")
    seconds = max(r["seconds"] for r in results.values())
    parameters = statistics.median(r["parameters"] for r in results.values())
    (HERE / "recipes.md").write_text(
        "# What each part of the recipe buys\n\n"
        f"Made by `python benchmarks/recipes.py --seconds {seconds:g}`: each row is a network of "
        f"about {parameters / 1e6:.1f}M parameters, trained for {seconds:g} s of one CPU core and "
        "scored on the 188 held-out rows by one call at t = 900 with the other modality given. "
        "`image_rmse`: error of the image predicted from its caption (lower is better); "
        "`text_acc`: tokens predicted right from the image (higher is better); ± is the standard "
        "error over rows. One seed, short runs: "
        "they say what learns faster at the start, and no more.\n\n"
        + table(results) + "\n"
    )


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--one", choices=list(RECIPES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train_one(args.one, args.seconds)))
        return
    path = HERE / "recipes.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results = {k: r for k, r in results.items() if r["seconds"] == args.seconds}

    def run(name: str) -> None:
        command = [sys.executable, __file__, "--one", name, "--seconds", str(args.seconds)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        write_report(results)
        print(name, results[name], flush=True)

    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(run, [n for n in args.only if n not in results]))
    print(table(results))


if __name__ == "__main__":
    main()
