"""What each choice of the training recipe buys at equal time: writes recipes.json and recipes.md.

    python benchmarks/recipes.py --seconds 600            # all rows; two at a time, one core each
    python benchmarks/recipes.py --seconds 600 --only base adamw

"Time" is processor time of one thread, so that rows can share a machine and be told apart all the
same.  Every row is the shipped recipe with one thing changed, trained until the time is up (the
learning rate falls to 0 over its last 30%), then scored on the held-out split.  Rows already in
recipes.json under the same number of seconds are not run again.
"""

import argparse
import json
import logging
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


def train_one(name: str, seconds: float) -> dict:
    """Train one recipe for ``seconds`` of processor time on one thread, and score it."""
    import torch

    from minidiffuser import train
    from minidiffuser.config import PRESETS
    from minidiffuser.metrics import evaluate

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    never = 10**9
    cfg = PRESETS["emoji"].replace(steps=never, save_every=never, sample_every=never,
                                   **RECIPES[name][1])
    start, spent = time.process_time(), 0.0

    def rate_factor(step: int, cfg) -> float:
        return min(1.0, (step + 1) / cfg.warmup, max(0.0, (1 - spent) / 0.3))

    train.rate_factor = rate_factor  # by time instead of by steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = train.Trainer(cfg, folder, cpu=True)
        for _ in trainer:
            spent = (time.process_time() - start) / seconds
            if spent >= 1:
                break
        pipe = trainer.pipeline()
    scores = evaluate(pipe, n=188, steps=8, guidance_scale=1.0)
    return {"seconds": seconds, "steps": trainer.step,
            "parameters": sum(p.numel() for p in pipe.net.parameters()),
            **{k: scores["test"][k] for k in ("t2i_top1", "i2t_exact", "i2t_token_f1")}}


def table(results: dict[str, dict]) -> str:
    """The results as Markdown."""
    lines = ["| recipe | what differs | steps | t2i_top1 | i2t_exact | i2t_token_f1 |",
             "|---|---|---|---|---|---|"]
    for name, (about, _) in RECIPES.items():
        if name in results:
            r = results[name]
            cells = [f"{r[k]['value']:.2f} [{r[k]['interval'][0]:.2f}, {r[k]['interval'][1]:.2f}]"
                     for k in ("t2i_top1", "i2t_exact", "i2t_token_f1")]
            lines.append(f"| {name} | {about} | {r['steps']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(results: dict[str, dict]) -> None:
    """recipes.json and recipes.md."""
    (HERE / "recipes.json").write_text(json.dumps(results, indent=1) + "\n")
    seconds = {r["seconds"] for r in results.values()}
    (HERE / "recipes.md").write_text(
        "# What each part of the recipe buys\n\n"
        f"Made by `python benchmarks/recipes.py --seconds {max(seconds):g}`: each row is trained "
        f"for {max(seconds):g} s of one CPU core and scored on the 188 held-out rows (8 solver "
        "steps, guidance 1, 95% intervals). The runs are short, so they say which choice is "
        "faster at the start; the shipped model is trained for far longer.\n\n"
        + table(results) + "\n"
    )


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
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
