"""Compare samplers on one checkpoint of the demo: network calls, order, temperature, guidance and its interval.

    python demo/samplers.py                                the newest run; half an hour on 2 CPU cores
    python demo/samplers.py --ckpt runs/001/ckpt.pt --num-samples 128 --seeds 0

Every set of samples is judged by demo/judge.py: Fréchet distance in its 64 features, share of the right coat,
precision and recall, means over the seeds of the noise and the lowest and highest distance. samplers.csv receives one
line for each set; what is in it is not measured again. The tables are printed, and samplers.png has the curves.
"""
import argparse
import csv
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import judge
from make import HERE

sys.path.insert(0, str(HERE.parent))
from sample import load_run, noise_source  # noqa: E402
from train import newest_run  # noqa: E402
from vq import decode_pixels, start_process  # noqa: E402

FIGURES = "distance", "coat", "precision", "recall"
TAUS = 0.1, 0.3, 0.5, 0.7, 0.9, 1.0
CALLS = {1: (4, 5, 7, 10, 20, 50), 2: (4, 5, 7, 10, 20)}   # order: calls
SCALES = 1.5, 2.0, 3.0
INTERVAL = 0.3, 0.8


class Sampler(NamedTuple):
    """The arguments of flow.sample."""
    steps: int
    order: int
    tau: float
    cfg: float = 1.0
    interval: tuple = (0.0, 1.0)


class Samplers:
    """A checkpoint, the judge, and the table of what was measured, which is written as it grows."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.ckpt = args.ckpt or newest_run() / "ckpt.pt"
        self.flow, self.vq, *_ = load_run(self.ckpt, device)
        self.judge = judge.load_judge(device)
        self.real = judge.reference(self.judge, self.vq, device)
        self.file, self.table = Path("samplers.csv"), {}
        if self.file.exists():
            with open(self.file, newline="") as f:
                self.table = {tuple(row[:-4]): [float(x) for x in row[-4:]] for row in csv.reader(f)}

    def judged(self, sampler, seed):
        """Return the FIGURES of samples from the noise of a seed, from the table or measured now."""
        key = tuple(map(str, (self.ckpt, self.args.num_samples, seed, *sampler)))
        if key not in self.table:
            pixels, coats = [], []
            for some in torch.arange(self.args.num_samples).split(64):
                y = (some % self.flow.model.num_classes).to(self.device)
                noise = noise_source(self.flow, some.tolist(), seed, self.device)()
                pixels.append(decode_pixels(self.vq, self.flow.sample(y, noise=noise, **sampler._asdict())))
                coats.append(y.cpu())
            seen = judge.look(self.judge, torch.cat(pixels))
            found = judge.figures(seen, torch.cat(coats).numpy(), self.real)
            self.table[key] = [float(found[name]) for name in FIGURES]
            with open(self.file, "a", newline="") as f:
                csv.writer(f).writerow([*key, *self.table[key]])
        return self.table[key]

    def row(self, *settings):
        """Print a line of a Markdown table: means over seeds, range of the distance. Return the distances [seeds]."""
        found = np.array([self.judged(Sampler(*settings), seed) for seed in self.args.seeds])
        distance, *others = found.mean(0)
        steps, order, tau, cfg, *interval = Sampler(*settings)
        spread = f"{found[:, 0].min():.2f} to {found[:, 0].max():.2f}"
        interval = "" if interval == [(0.0, 1.0)] else " on [{}, {}]".format(*interval[0])
        print(f"| {steps} calls, order {order} | {tau} | {cfg}{interval} | {distance:.2f} ({spread}) | "
              + " | ".join(f"{x:.3f}" for x in others) + " |", flush=True)
        return found[:, 0]


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description="Compare samplers on one checkpoint of the demo.")
    parser.add_argument("--ckpt", type=Path, help="checkpoint; default: that of the newest run")
    parser.add_argument("--num-samples", type=int, default=256, help="samples in a set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the noise")
    args = parser.parse_args()
    try:
        from matplotlib import pyplot
    except ImportError:
        parser.error("matplotlib is missing: pip install -r demo/requirements.txt")
    _, _, device = start_process()
    samplers = Samplers(args, device)
    print(f"| sampler | tau | guidance | {' | '.join(FIGURES)} |\n|---|---|---|{'---|' * len(FIGURES)}")
    found = {tau: samplers.row(10, 2, tau).mean() for tau in TAUS}
    best = min(found, key=found.get)
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 7), layout="constrained", sharex=True, sharey=True)
    for axes, (cfg, tau) in zip(panels.flat, itertools.product((1.0, 1.5), (0.9, best))):
        for order, calls in CALLS.items():
            curve = np.array([samplers.row(n, order, tau, cfg) for n in calls])        # [calls,seeds]
            axes.plot(calls, curve.mean(1), marker=".", label=f"order {order}")
            axes.fill_between(calls, curve.min(1), curve.max(1), alpha=0.2)
        axes.set(title=f"tau {tau}, guidance {cfg:g}", xlabel="network calls", ylabel="Fréchet distance by the judge",
                 xscale="log", yscale="log", xticks=CALLS[1], xticklabels=CALLS[1])
        axes.minorticks_off()
    panels[0, 0].legend()
    figure.savefig("samplers.png", dpi=110)
    for cfg in SCALES:
        samplers.row(10, 2, 0.9, cfg)
        samplers.row(10, 2, 0.9, cfg, INTERVAL)


if __name__ == "__main__":
    main()
