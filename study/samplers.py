"""Compare samplers on one checkpoint of the demo: network calls, order, temperature, guidance and its interval.

    python demo/samplers.py                                the newest run; ten minutes on 2 CPU cores
    python demo/samplers.py --ckpt runs/001/ckpt.pt --num-samples 128 --seeds 0

A set of samples has two distances to real cats: "judge", in the 64 features of demo/judge.py, which see poses, coats and
lost diversity; and "patch", of 2x2 neighbouring code vectors, which sees local damage. Share of the right coat, precision
and recall are the judge's, too. Figures are means over the seeds of the noise, in brackets the range. samplers.csv receives
a line for each set; what is in it is not measured again. The tables are printed, samplers.png has the curves.
"""
import argparse
import csv
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import judge
from make import HERE

sys.path.insert(0, str(HERE.parent))
from fid import frechet_distance, statistics  # noqa: E402
from sample import load_run, noise_source  # noqa: E402
from train import newest_run, number  # noqa: E402
from vq import decode_pixels, start_process  # noqa: E402

FIGURES = "judge", "patch", "coat", "precision", "recall"
TAUS = 0.3, 0.5, 0.7, 0.9, 1.0
CALLS = {1: (5, 10, 20, 50), 2: (4, 5, 10, 20)}            # order: calls
SCALES = 1.5, 2.0, 3.0
INTERVAL = 0.3, 0.8


class Sampler(NamedTuple):
    """The arguments of flow.sample."""
    steps: int
    order: int
    tau: float
    cfg: float = 1.0
    interval: tuple = (0.0, 1.0)


def draw_codes(flow, count, seed, device, **settings):
    """Sample codes [count,h,w], each from its own noise, classes in turn. Return codes and classes, an array."""
    codes, classes = [], []
    for some in torch.arange(count).split(64):
        y = (some % flow.model.num_classes).to(device)
        noise = noise_source(flow, some.tolist(), seed, device)()
        codes.append(flow.sample(y, noise=noise, **settings))
        classes.append(y.cpu())
    return torch.cat(codes), torch.cat(classes).numpy()


class Samplers:
    """A checkpoint, the judge, and the table of what was measured, which is written as it grows."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.ckpt = args.ckpt or newest_run() / "ckpt.pt"
        self.flow, self.vq, data, *_ = load_run(self.ckpt, device)
        codes = torch.from_numpy(data.codes[:4000].astype(np.int64)).to(device)
        self.patches = self.patches_of(codes)
        self.judge = judge.load_judge(device)
        self.real = judge.reference(self.judge, self.vq, device)
        self.file, self.table = Path("samplers.csv"), {}
        if self.file.exists():
            with open(self.file, newline="") as f:
                n = len(FIGURES)
                self.table = {tuple(row[:-n]): [float(x) for x in row[-n:]] for row in csv.reader(f)}

    def patches_of(self, codes):
        """Return mean and covariance of 2x2 code vectors, of codes [N,h,w]."""
        patches = F.unfold(self.flow.embed(codes), 2)      # [N,4d,places]
        return statistics(patches.movedim(1, 2).flatten(0, 1).cpu().numpy())

    def judged(self, sampler, seed):
        """Return the FIGURES of samples from the noise of a seed, from the table or measured now."""
        key = tuple(map(str, (self.ckpt, self.args.num_samples, seed, *sampler)))
        if key not in self.table:
            codes, coats = draw_codes(self.flow, self.args.num_samples, seed, self.device, **sampler._asdict())
            seen = judge.look(self.judge, decode_pixels(self.vq, codes))
            found = judge.figures(seen, coats, self.real)
            found["judge"], found["patch"] = found["distance"], frechet_distance(*self.patches_of(codes), *self.patches)
            self.table[key] = [float(found[name]) for name in FIGURES]
            with open(self.file, "a", newline="") as f:
                csv.writer(f).writerow([*key, *self.table[key]])
        return self.table[key]

    def row(self, *settings):
        """Print a line of a Markdown table and return the FIGURES of all seeds, [seeds,5]."""
        sampler = Sampler(*settings)
        found = np.array([self.judged(sampler, seed) for seed in self.args.seeds])
        cells = [f"{x:.3f} ({low:.3f} to {high:.3f})" for x, low, high in zip(found.mean(0), found.min(0), found.max(0))]
        guidance = f"{sampler.cfg:g}" + (f" on {list(sampler.interval)}" if sampler.interval != (0.0, 1.0) else "")
        print(f"| {sampler.steps} calls, order {sampler.order} | {sampler.tau} | {guidance} | {' | '.join(cells)} |", flush=True)
        return found


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description="Compare samplers on one checkpoint of the demo.")
    parser.add_argument("--ckpt", type=Path, help="checkpoint; default: that of the newest run")
    parser.add_argument("--num-samples", type=number(int, 20), default=256, help="samples in a set")
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="seeds of the noise")
    args = parser.parse_args()
    try:
        from matplotlib import pyplot
    except ImportError:
        parser.error("matplotlib is missing: pip install -r demo/requirements.txt")
    _, _, device = start_process()
    samplers = Samplers(args, device)
    print(f"| sampler | tau | guidance | {' | '.join(FIGURES)} |\n|---|---|---|{'---|' * len(FIGURES)}")
    found = {tau: samplers.row(10, 2, tau)[:, 0].mean() for tau in TAUS}
    best = min(found, key=found.get)
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True, sharey="row")
    for column, tau in zip(panels.T, (0.9, best)):
        for cfg, order in itertools.product((1.0, 1.5), CALLS):
            curves = np.stack([samplers.row(n, order, tau, cfg) for n in CALLS[order]])    # [calls,seeds,5]
            for axes, curve, name in zip(column, curves.transpose(2, 0, 1), FIGURES):
                line, = axes.plot(CALLS[order], curve.mean(1), ".-" if cfg == 1 else ".:", color=f"C{order - 1}",
                                  label=f"order {order}" + ", guided" * (cfg > 1))
                axes.fill_between(CALLS[order], curve.min(1), curve.max(1), alpha=0.2, color=line.get_color())
                axes.set(title=f"tau {tau}", ylabel=f"Fréchet distance, {name}", xscale="log")
                axes.set_xticks((4, 5, 10, 20, 50), (4, 5, 10, 20, 50))
                axes.set_yscale("log" if name == "patch" else "linear")
                axes.minorticks_off()
    for axes in panels[1]:
        axes.set_xlabel("network calls")
    panels[0, 0].legend()
    figure.savefig("samplers.png", dpi=110)
    for cfg in SCALES:
        samplers.row(10, 2, 0.9, cfg)
        samplers.row(10, 2, 0.9, cfg, INTERVAL)


if __name__ == "__main__":
    main()
