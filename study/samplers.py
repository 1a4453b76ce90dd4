"""Compare samplers on one checkpoint of the demo: calls, order, temperature, guidance, interval.

    pip install -r study/requirements.txt      matplotlib, for the figure
    python -m study.samplers                   the newest run; ten minutes on 2 CPU cores
    python -m study.samplers --ckpt runs/001/ckpt.pt --num-samples 128 --seeds 0

A set of samples has two distances to real cats. "judge" is in the 64 features of judge.py, which
see poses, coats and lost diversity; "patch" is of 2x2 neighbouring code vectors, which see local
damage. Share of the right coat, precision and recall are the judge's, too. Figures are means over
the seeds of the noise, in brackets the range.

The tables are printed. The folder OUT receives samplers.png, the curves, and results.jsonl, a line
for each set; what is in it is not measured again.

Shapes: B batch, N grids, h w grid of codes, d code dimension.
"""
import argparse
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fid import frechet_distance, statistics
from flow import DFM, sample_beyond
from sample import draw_noise
from study import judge
from train import load_run
from vq import InputError, setup_process, write_whole

FIGURES = "judge", "patch", "coat", "precision", "recall"
TAUS = 0.3, 0.5, 0.7, 0.9, 1.0
CALLS = {1: (5, 10, 20, 50), 2: (4, 5, 10, 20)}     # by order
SCALES = 1.5, 2.0, 3.0
ALWAYS = 0.0, 1.0                                   # times to guide at
MIDDLE = 0.3, 0.8


class Sampler(NamedTuple):
    """The arguments of sample_beyond."""

    steps: int
    order: int
    tau: float
    cfg: float = 1.0
    interval: tuple = ALWAYS


# ----- what study.py needs, too

def load_pyplot():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise InputError("matplotlib is missing: pip install -r study/requirements.txt") from None
    return pyplot


class Results:
    """A table of results by task, in a file of JSON lines that grows as they are measured."""

    def __init__(self, path):
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[:text.rfind("\n") + 1]         # a killed program may leave half a line
        with write_whole(path) as file:
            file.write(whole.encode())
        pairs = [json.loads(line) for line in whole.splitlines()]
        self.table = {json.dumps(task): result for task, result in pairs}

    def __contains__(self, task):
        return json.dumps(task) in self.table

    def __getitem__(self, task):
        return self.table[json.dumps(task)]

    def __setitem__(self, task, result):
        with open(self.path, "a") as file:
            file.write(json.dumps([task, result], default=float) + "\n")
        self.table[json.dumps(task)] = result


def fingerprint(run):
    """Tell a run's weights from those of another."""
    return run.flow.model.final_layer.linear.weight.double().norm().item()


def draw_codes(flow, count, seed, **settings):
    """Sample codes [count,h,w], each from its own noise, classes in turn. Return both."""
    codes = []
    classes = torch.arange(count) % flow.model.num_classes
    for indices in torch.arange(count).split(64):
        y = classes[indices].to(flow.codebook.device)
        noise = draw_noise(flow, indices.tolist(), seed)
        if isinstance(flow, DFM):                   # it has no mean, hence no order
            codes.append(flow.sample(y, noise=noise, **settings))
        else:
            codes.append(sample_beyond(flow, y, noise=noise, **settings))
    return torch.cat(codes), classes.numpy()


# ----- samplers

class Samplers:
    """A checkpoint, what real cats look like, and the table of what was measured."""

    def __init__(self, args, device):
        self.args = args
        self.run = load_run(args.ckpt, device=device)
        self.weights = fingerprint(self.run)
        codes = self.run.data.codes[:4000].astype(np.int64)
        self.patches = self.patches_of(torch.from_numpy(codes).to(device))
        self.judge = judge.load_judge(device)
        self.real = judge.reference(self.judge, self.run.vq, device)
        self.results = Results(args.out / "results.jsonl")

    def patches_of(self, codes):
        """Return mean and covariance of 2x2 code vectors, of codes [N,h,w]."""
        patches = F.unfold(self.run.flow.embed(codes), 2)   # [N,4d,places]
        return statistics(patches.movedim(1, 2).flatten(0, 1).cpu().numpy())

    def measured(self, sampler, seed):
        """Return the FIGURES of samples from the noise of a seed, from the table or anew."""
        run = self.run
        task = [str(run.ckpt), self.weights, self.args.num_samples, seed, *sampler]
        if task not in self.results:
            codes, coats = draw_codes(run.flow, self.args.num_samples, seed, **sampler._asdict())
            seen = judge.look(self.judge, run.vq.decode_pixels(codes))
            found = judge.figures(seen, coats, self.real)
            found["judge"] = found["distance"]
            found["patch"] = frechet_distance(*self.patches_of(codes), *self.patches)
            self.results[task] = [float(found[name]) for name in FIGURES]
        return self.results[task]

    def row(self, *settings):
        """Print a line of a Markdown table and return the FIGURES of all seeds, [seeds,5]."""
        sampler = Sampler(*settings)
        found = np.array([self.measured(sampler, seed) for seed in self.args.seeds])
        cells = [f"{sampler.steps} calls, order {sampler.order}", sampler.tau, f"{sampler.cfg:g}"]
        if sampler.interval != ALWAYS:
            cells[-1] += f" on {list(sampler.interval)}"
        for x in found.T:
            cells.append(f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        return found


def compare_calls(samplers, axes, tau):
    """Draw distance against calls into two axes, judge and patch, with and without guidance."""
    for cfg, order in itertools.product((1.0, 1.5), CALLS):
        calls = CALLS[order]
        found = np.stack([samplers.row(n, order, tau, cfg) for n in calls])  # [calls,seeds,5]
        label = f"order {order}" if cfg == 1 else f"order {order}, guided"
        for panel, curves in zip(axes, found.transpose(2, 0, 1)):
            line, = panel.plot(calls, curves.mean(1), ".-" if cfg == 1 else ".:",
                               color=f"C{order - 1}", label=label)
            panel.fill_between(calls, curves.min(1), curves.max(1), alpha=0.2,
                               color=line.get_color())


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Compare samplers on one checkpoint of the demo.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint; None: that of the newest run")
    add("--num-samples", type=int, default=256, help="samples in a set")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the noise")
    add("--out", type=Path, default="runs/samplers", help="folder to write")
    args = parser.parse_args(argv)
    pyplot = load_pyplot()
    _, _, device = setup_process()
    samplers = Samplers(args, device)

    print("| sampler | tau | guidance | " + " | ".join(FIGURES) + " |")
    print("|---" * (3 + len(FIGURES)) + "|")
    found = {tau: samplers.row(10, 2, tau)[:, 0].mean() for tau in TAUS}
    best = min(found, key=found.get)
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True,
                                     sharey="row")
    for axes, tau in zip(panels.T, (0.9, best)):
        compare_calls(samplers, axes, tau)
        axes[0].set(title=f"tau {tau}", ylabel="the judge's distance", xscale="log")
        axes[1].set(xlabel="network calls", ylabel="the patch distance", yscale="log")
        axes[1].set_xticks((4, 5, 10, 20, 50), (4, 5, 10, 20, 50))
        axes[1].minorticks_off()
    panels[0, 0].legend()
    figure.savefig(args.out / "samplers.png", dpi=110)
    for cfg in SCALES:
        samplers.row(10, 2, 0.9, cfg)
        samplers.row(10, 2, 0.9, cfg, MIDDLE)


if __name__ == "__main__":
    main()
