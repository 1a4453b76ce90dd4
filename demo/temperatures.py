"""Show what temperature does (Figure 5 of the paper): the same noise at several temperatures.

    python -m demo.temperatures                            the newest run, into temperatures.png
    python -m demo.temperatures --tau 0.5 1 --steps 50 --out two.png

A row is a temperature; a column is a class and its noise, that of sample.py's image of this number.
"""
import argparse

import torch
from tqdm import tqdm

from sample import draw_noise
from train import load_run
from vq import save_image, setup_process


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description="Show the same noise at several temperatures.")
    add = parser.add_argument
    add("--ckpt", help="checkpoint; default: that of the newest run")
    add("--data", help="data directory, if it has moved since training")
    add("--tau", type=float, nargs="+", default=[0.3, 0.6, 0.9, 1.2], help="temperatures")
    add("--steps", type=int, default=100, help="Euler steps")
    add("--seed", type=int, default=0, help="seed of the noise, as in sample.py")
    add("--out", default="temperatures.png", help="picture to write")
    args = parser.parse_args(argv)
    _, _, device = setup_process()
    run = load_run(args.ckpt, args.data, device)
    if run.args.objective not in ("purrception", "dfm"):
        parser.error(f"--ckpt: {run.ckpt} is a regression, which has no temperature")

    columns = min(10, run.flow.model.num_classes)
    y = torch.arange(columns, device=device)
    noise = draw_noise(run.flow, range(columns), args.seed)
    rows = []
    for tau in tqdm(args.tau, "temperatures"):
        codes = run.flow.sample(y, args.steps, tau, noise=noise)
        rows.append(run.vq.decode_pixels(codes))
    save_image(args.out, torch.cat(rows), columns)
    print(args.out)


if __name__ == "__main__":
    main()
