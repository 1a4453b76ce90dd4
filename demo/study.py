"""Show the paper's claims at small scale: Purrception against its two baselines, on the demo's cats.

    pip install -r demo/requirements.txt       # matplotlib, for the figures
    python demo/study.py --quick               # ten minutes on 2 CPU cores: one seed, short runs
    python demo/study.py                       # an hour and a half; interrupted, the same command goes on

One network, one batch, one number of steps for the three objectives; the learning rate of each is the best of one small
grid at seed 0. Distances are fid.py's, on the demo on untrained features, of EMA samples from one fixed noise, against the
data's reference images. OUT (study/) receives

    scores.csv         every distance measured, one a line; what is in it is not measured again
    convergence.png    distance against training steps for the three objectives: mean over seeds, band from lowest to highest
    temperature.png    distance against tau, CFM's beside it;  temperatures.png: the same noise at each tau
    logsumexp.png      size of log sum_k exp logit_k during training, with and without the z-loss
    steps.png          distance against Euler steps, for uniform times and others
    summary.md         what came out, in sentences
"""
import argparse
import contextlib
import csv
import functools
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fid  # noqa: E402
import train  # noqa: E402
from model import TimestepEmbedder  # noqa: E402
from sample import initial_noise, load_run  # noqa: E402
from vq import (InputError, decode_pixels, read_checkpoint, read_json, replacing, run_script, save_image,  # noqa: E402
                save_json, sheet)

FULL = dict(steps=960, checkpoints=12, seeds=(0, 1, 2), rates=(5e-4, 1e-3, 2e-3), images=128, euler=50,
            taus=(0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3, 1.5), few=(4, 6, 8, 12, 25, 50, 100), powers=(0.7, 1.0, 1.5, 2.0))
QUICK = dict(steps=240, checkpoints=4, seeds=(0,), rates=(1e-3,), images=64, euler=25,
             taus=(0.1, 0.5, 0.9, 1.2, 1.5), few=(4, 8, 25), powers=(1.0, 1.5))
TAU = 0.9                                                  # the paper's, where nothing else is said
UNWEIGHTED = 1e-12     # a z-loss too light to move a weight, by which the log still tells the size of logsumexp


class Run(NamedTuple):
    """One training: what tells it from the others."""
    objective: str
    lr: float
    seed: int
    z_loss: float = 1e-5
    time_scale: int = 1                                    # the network embeds time_scale * t

    @property
    def folder(self):
        """Return runs/NAME."""
        extra = ("-no-z" if self.z_loss == UNWEIGHTED else "") + (f"-{self.time_scale}t" if self.time_scale != 1 else "")
        return Path("runs") / f"{self.objective}-lr{self.lr:g}-seed{self.seed}{extra}"

    def checkpoint(self, step):
        """Return the path of the numbered checkpoint."""
        return self.folder / f"ckpt-{step:07d}.pt"


@contextlib.contextmanager
def embedding_of(scale):
    """Let every network embed scale * t instead of t meanwhile."""
    forward = TimestepEmbedder.forward
    TimestepEmbedder.forward = lambda self, t: forward(self, scale * t)
    try:
        yield
    finally:
        TimestepEmbedder.forward = forward


class Study:
    """The settings, the data, and the table of scores, which is written as it grows."""

    def __init__(self, settings, data=HERE):
        self.__dict__.update(settings)
        self.data = train.open_data(data)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.autocast = train.half_precision(self.device, "auto")
        self.marks = [self.steps * (i + 1) // self.checkpoints for i in range(self.checkpoints)]
        kept = Path("settings.json")
        settings = json.loads(json.dumps(settings | {"data": str(self.data.path)}))
        if kept.exists() and read_json(kept) != settings:
            raise InputError(f"{kept.absolute()}: this folder holds a study with other settings; give another --out")
        save_json(kept, settings)
        self.file, self.scores = Path("scores.csv"), {}
        if self.file.exists():
            with open(self.file, newline="") as f:
                self.scores = {tuple(row[:-1]): float(row[-1]) for row in itertools.islice(csv.reader(f), 1, None)}
        else:
            self.file.write_text("run,step,tau,euler_steps,time_power,distance\n")

    # ---- training

    def train(self, run):
        """Train one run, or finish it, as train.py does."""
        every, newest = str(self.steps // self.checkpoints), run.folder / "ckpt.pt"
        done = read_checkpoint(newest)["step"] if newest.exists() else 0
        argv = ["--data", str(self.data.path), "--name", run.folder.name, "--objective", run.objective, "--lr", str(run.lr), "--seed",
                str(run.seed), "--steps", str(self.steps), "--ckpt-every", every, "--keep-every", every, "--sample-every", "0",
                "--log-every", "20"]
        argv += ["--resume"] if done else []
        argv += ["--z-loss", str(run.z_loss)] if run.objective != "cfm" else []
        if done < self.steps:
            with embedding_of(run.time_scale):
                train.main(argv)
            if read_checkpoint(newest)["step"] < self.steps:
                sys.exit("stopped; the same command goes on")
        for step in self.marks:                            # to sample from, without the optimizer: a quarter of the size
            ckpt = read_checkpoint(run.checkpoint(step))
            if "opt" in ckpt:
                with replacing(run.checkpoint(step)) as partial:
                    torch.save({key: ckpt[key] for key in ("ema", "args", "step")}, partial)
        return run

    def log(self, run, key):
        """Read steps and values of one column of a run's log."""
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        return np.array([(line["step"], line[key]) for line in lines]).T

    # ---- scoring

    @functools.cached_property
    def inception(self):
        """Build the network whose features the data's meta.json asks for."""
        build = fid.untrained_inception if self.data.meta["features"] == "untrained" else fid.load_inception
        return build().to(self.device)

    def measure(self, pixels):
        """Compute mean and covariance of the features of a set of pictures, as fid.py opens one."""
        return fid.measure(pixels, lambda: self.inception, SimpleNamespace(batch_size=32, device=self.device))[:2]

    @functools.cached_property
    def reference(self):
        """Measure the data's reference images, as many as its meta.json says."""
        meta = self.data.meta
        images = fid.open_set(self.data.path / meta["reference"], meta["features"])
        return self.measure(images[:meta["reference_count"]] if "reference_count" in meta else images)

    @torch.inference_mode()
    def samples(self, run, step, tau, euler, power=1.0, images=None):
        """Sample pictures uint8 [N,H,W,3] from a checkpoint; time runs through (s / euler) ** power."""
        with embedding_of(run.time_scale), self.autocast():
            flow, vq, data, *_ = load_run(run.checkpoint(step), self.device)
            pictures = []
            for some in torch.arange(images or self.images).split(64):
                y = (some % flow.model.num_classes).to(self.device)
                z = initial_noise(flow, some.tolist(), data.codes.shape[1:], 0, self.device)
                if power == 1:
                    codes = flow.sample(y, euler, noise=z, **({} if tau is None else {"tau": tau}))
                else:
                    codes = follow_times(flow, y, z, (torch.arange(euler + 1) / euler) ** power, tau)
                pictures.append(decode_pixels(vq, codes))
        return torch.cat(pictures).numpy()

    def score(self, run, step=None, tau=TAU, euler=None, power=1.0):
        """Return the distance of a checkpoint's samples, from the table or measured now."""
        step, euler, tau = step or self.steps, euler or self.euler, None if run.objective == "cfm" else tau
        key = (run.folder.name, *map(str, (step, tau, euler, power)))
        if key not in self.scores:
            pixels = self.samples(run, step, tau, euler, power)
            self.scores[key] = fid.frechet_distance(*self.measure(pixels), *self.reference)
            with open(self.file, "a", newline="") as f:
                csv.writer(f).writerow([*key, self.scores[key]])
            print(*key, f"{self.scores[key]:.4f}", flush=True)
        return self.scores[key]

    def curve(self, runs):
        """Score all checkpoints of runs that differ in seed only: distances [seeds,checkpoints]."""
        return np.array([[self.score(run, step) for step in self.marks] for run in runs])


def follow_times(flow, y, z, times, tau):
    """Follow Purrception's velocity by Euler steps through any times [T+1] from 0 to 1: codes [B,h,w]."""
    for t, u in itertools.pairwise(times.tolist()):
        z = z + (u - t) * flow.velocity(z, torch.full((len(y),), t, device=z.device), y, tau=tau)
    return flow.nearest(z)


def crossing(steps, distances, goal):
    """Return the training step at which a curve first falls to the goal, or None; linear between checkpoints."""
    for (s0, d0), (s1, d1) in itertools.pairwise(zip(steps, distances)):
        if d1 <= goal:
            return s0 if d0 <= goal else s0 + (s1 - s0) * (d0 - goal) / (d0 - d1)
    return None


# ------------------------------------------------------------------------------------------------ the questions

def compare_objectives(study, axes):
    """Tune each objective's learning rate, train it on all seeds, draw the curves: best rates and sentences."""
    best, finals, curves, lines = {}, {}, {}, []
    for objective in train.OBJECTIVES:
        trained = [study.train(Run(objective, lr, study.seeds[0])) for lr in study.rates]
        best[objective] = min(trained, key=study.score).lr
        lines.append(f"{objective}: final distance at seed {study.seeds[0]} by learning rate: "
                     + ", ".join(f"{run.lr:g}: {study.score(run):.3f}" for run in trained) + ".")
    for objective, lr in best.items():
        curves[objective] = study.curve([study.train(Run(objective, lr, seed)) for seed in study.seeds])
        mean, finals[objective] = curves[objective].mean(0), curves[objective][:, -1]
        axes.plot(study.marks, mean, marker=".", label=f"{objective}, lr {lr:g}")
        axes.fill_between(study.marks, curves[objective].min(0), curves[objective].max(0), alpha=0.2)
        lines.append(f"{objective}: after {study.steps} steps {finals[objective].mean():.3f} "
                     f"({finals[objective].min():.3f} to {finals[objective].max():.3f} over {len(study.seeds)} seeds).")
    for other in ("cfm", "dfm"):
        at = crossing(study.marks, curves["purrception"].mean(0), finals[other].mean())
        lines.append(f"purrception reaches {other}'s final distance " + (
            f"after {at:.0f} of {study.steps} steps, {study.steps / at:.1f}x sooner." if at else "not within these steps."))
    axes.set(xlabel="training steps", ylabel="Fréchet distance", yscale="log")
    axes.legend()
    return best, lines


def sweep_temperature(study, axes, best):
    """Score the trained posteriors at every temperature: sentences, and the contact sheet of one noise at each."""
    first, lines = study.seeds[0], []
    for objective in ("purrception", "dfm"):
        scores = [study.score(Run(objective, best[objective], first), tau=tau) for tau in study.taus]
        axes.plot(study.taus, scores, marker=".", label=objective)
        lines.append(f"{objective}: best temperature {study.taus[int(np.argmin(scores))]}, distance {min(scores):.3f}; at 1.0 "
                     f"{study.score(Run(objective, best[objective], first), tau=1.0):.3f}.")
    axes.axhline(study.score(Run("cfm", best["cfm"], first)), linestyle="--", color="grey", label="cfm, which has no tau")
    axes.set(xlabel="temperature tau", ylabel="Fréchet distance", yscale="log")
    axes.legend()
    run = Run("purrception", best["purrception"], first)
    rows = [study.samples(run, study.steps, tau, study.euler, images=10) for tau in study.taus]
    save_image("temperatures.png", sheet(np.concatenate(rows), 10))
    return lines


def weigh_z_loss(study, axes, best):
    """Train once without the z-loss and draw the size of logsumexp with and without: sentences."""
    lr, lines = best["purrception"], []
    for label, weight in (("with", 1e-5), ("without", UNWEIGHTED)):
        run = study.train(Run("purrception", lr, study.seeds[0], weight))
        steps, z = study.log(run, "z")
        lse = np.sqrt(z / weight)
        axes.plot(steps, lse, label=f"{label} z-loss")
        lines.append(f"{label} z-loss: logsumexp {lse[-1]:.2f} (root mean square, last step), distance {study.score(run):.3f}.")
    axes.set(xlabel="training steps", ylabel="root mean square of logsumexp")
    axes.legend()
    return lines


def embed_time(study, best):
    """Train with 1000 t in the place of t: sentences."""
    lr, lines = best["purrception"], []
    for scale in (1, 1000):
        runs = [study.train(Run("purrception", lr, seed, time_scale=scale)) for seed in study.seeds]
        half, final = study.marks[len(study.marks) // 2 - 1], study.steps
        means = [np.mean([study.score(run, step) for run in runs]) for step in (half, final)]
        lines.append(f"embedding {scale} t: distance {means[0]:.3f} after {half} steps, {means[1]:.3f} after {final} "
                     f"(mean of {len(runs)} seeds).")
    return lines


def count_steps(study, axes, best):
    """Score few Euler steps at times (s / T) ** power: sentences."""
    run, lines = Run("purrception", best["purrception"], study.seeds[0]), []
    goal = 1.05 * study.score(run, euler=max(study.few))
    for power in study.powers:
        scores = [study.score(run, euler=T, power=power) for T in study.few]
        axes.plot(study.few, scores, marker=".", label=f"t = (s/T)^{power:g}")
        enough = [T for T, score in zip(study.few, scores) if score <= goal]
        lines.append(f"times (s/T)^{power:g}: " + ", ".join(f"{T}: {d:.3f}" for T, d in zip(study.few, scores)) + " ("
                     + (f"{enough[0]} steps are within 5 % of {max(study.few)} uniform ones)." if enough else "none within 5 %)."))
    axes.axhline(goal, linestyle=":", color="grey")
    axes.set(xlabel="Euler steps", ylabel="Fréchet distance", xscale="log", yscale="log")
    axes.legend()
    return lines


def main():
    """Read the flags, answer the questions one by one, write the figures."""
    parser = argparse.ArgumentParser(description="Purrception against its baselines on the demo's cats.")
    parser.add_argument("--quick", action="store_true", help="one seed, short runs: ten minutes on 2 CPU cores")
    parser.add_argument("--data", type=Path, default=HERE, help="data directory; its recipe.json sets network and batch")
    parser.add_argument("--out", type=Path, help="folder to write; default: study, or study-quick")
    args = parser.parse_args()
    try:
        from matplotlib import pyplot
    except ImportError:
        parser.error("matplotlib is missing: pip install -r demo/requirements.txt")
    data, out = args.data.resolve(), args.out or Path("study-quick" if args.quick else "study")
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)                                          # train.py writes runs/ where it is started
    study = Study(QUICK if args.quick else FULL, data)
    names = ("convergence", "temperature", "logsumexp", "steps")
    figures, axes = zip(*(pyplot.subplots(figsize=(6, 4), layout="constrained") for _ in names))
    best, lines = compare_objectives(study, axes[0])
    lines += sweep_temperature(study, axes[1], best)
    lines += weigh_z_loss(study, axes[2], best)
    lines += embed_time(study, best)
    lines += count_steps(study, axes[3], best)
    for name, figure in zip(names, figures):
        figure.savefig(f"{name}.png", dpi=120)
    Path("summary.md").write_text("".join(f"- {line}\n" for line in lines))
    print(Path("summary.md").read_text(), end="")


if __name__ == "__main__":
    run_script(main)
