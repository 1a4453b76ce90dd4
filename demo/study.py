"""Show the paper's claims at small scale: Purrception against its two baselines, on the demo's cats.

    pip install -r demo/requirements.txt       # matplotlib, for the figures
    python demo/study.py --quick               # six minutes on 2 CPU cores: one seed, one learning rate, short runs
    python demo/study.py                       # two hours, 6 GB in study/; interrupted, the same command goes on

One network but for its ends, one batch, one number of steps for the three objectives; the learning rate of each is the
best of one small grid at seed 0. Distances are fid.py's, between EMA samples (always from the same noise) and the data's
reference images; on the demo the features are untrained. The folder OUT receives

    scores.csv         every distance measured, one a line; what is in it is not measured again
    convergence.png    distance against training steps for the three objectives: mean over seeds, band from lowest to highest
    temperature.png    distance against tau, CFM's beside it;  temperatures.png: the same noise at each tau
    logsumexp.png      root mean square of log sum_k exp logit_k during training, with and without the z-loss
    embedding.png      cross-entropy during training where the network embeds t, and where it embeds 1000 t
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
from sample import load_run, noise_source  # noqa: E402
from vq import InputError, decode_pixels, read_checkpoint, read_json, replacing, save_image, start_process  # noqa: E402

FULL = dict(steps=960, checkpoints=12, seeds=(0, 1, 2), rates=(5e-4, 1e-3, 2e-3, 4e-3), images=128, euler=50,
            taus=(0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5), few=(5, 10, 20, 50, 100), powers=(0.7, 1.0, 1.5))
QUICK = dict(steps=240, checkpoints=3, seeds=(0,), rates=(2e-3,), images=64, euler=25,
             taus=(0.1, 0.5, 0.9, 1.5), few=(5, 25), powers=(0.7, 1.0))
TAU = {"purrception": 0.9, "dfm": 1.0, "cfm": None}        # sample.py's defaults
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
    """Let every network embed scale * t instead of t meanwhile. No checkpoint tells of it: sample.py would embed t."""
    forward = TimestepEmbedder.forward
    TimestepEmbedder.forward = lambda self, t: forward(self, scale * t)
    try:
        yield
    finally:
        TimestepEmbedder.forward = forward


class Study:
    """The settings, the data, and the table of scores, which is written as it grows."""

    def __init__(self, settings, data=HERE):
        self.set, self.data = SimpleNamespace(**settings), train.open_data(data)
        _, _, self.device = start_process()
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=train.bf16_is_fast(self.device))
        every = self.set.steps // self.set.checkpoints
        self.marks = range(every, self.set.steps + 1, every)
        self.best = {}                                     # objective: learning rate
        kept, settings = Path("settings.json"), json.loads(json.dumps(settings | {"data": str(self.data.path)}))
        if kept.exists() and read_json(kept) != settings:
            raise InputError(f"{kept.absolute()}: this folder holds a study with other settings; give another --out")
        kept.write_text(json.dumps(settings))
        self.file, self.scores = Path("scores.csv"), {}
        if self.file.exists():
            with open(self.file, newline="") as f:
                self.scores = {tuple(row[:-1]): float(row[-1]) for row in itertools.islice(csv.reader(f), 1, None)}
        else:
            self.file.write_text("run,step,tau,euler_steps,time_power,distance\n")

    def tuned(self, objective="purrception", seed=None, **other):
        """Return the run of an objective at its best learning rate, trained."""
        return self.trained(Run(objective, self.best[objective], self.set.seeds[0] if seed is None else seed, **other))

    def trained(self, run):
        """Train a run, or finish it, as train.py does, and leave numbered checkpoints without their optimizer: a quarter."""
        last = run.checkpoint(self.marks[-1])
        if last.exists():
            return run
        begun, every = run.folder.exists(), str(self.marks.step)
        with embedding_of(run.time_scale):
            train.main(["--data", str(self.data.path), "--name", run.folder.name, "--objective", run.objective,
                        "--lr", str(run.lr), "--seed", str(run.seed), "--steps", str(self.marks[-1]),
                        "--ckpt-every", every, "--keep-every", every, "--sample-every", "0", "--log-every", "20",
                        "--z-loss", str(run.z_loss), *["--resume"] * begun])
        start_process()                                    # train() only noted Ctrl-C; from here on it ends the study
        if not last.exists():
            sys.exit("stopped; the same command goes on")
        for step in self.marks:
            ckpt = read_checkpoint(run.checkpoint(step))
            with replacing(run.checkpoint(step)) as file:
                torch.save({key: ckpt[key] for key in ("ema", "args", "step")}, file)
        return run

    def log(self, run, key):
        """Read steps and values of one column of a run's log."""
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        return np.array([(line["step"], line[key]) for line in lines]).T

    @torch.inference_mode()
    def samples(self, run, step, tau, euler, power=1.0, images=None):
        """Sample pictures uint8 [N,H,W,3] from a checkpoint; time runs through (s / euler) ** power."""
        flow, vq, *_ = load_run(run.checkpoint(step), self.device)
        pictures = []
        for some in torch.arange(images or self.set.images).split(64):
            y = (some % flow.model.num_classes).to(self.device)
            z = noise_source(flow, some.tolist(), 0, self.device)()
            with embedding_of(run.time_scale), self.autocast:
                if power == 1:
                    codes = flow.sample(y, euler, noise=z, **({} if tau is None else {"tau": tau}))
                else:
                    codes = follow(flow, z, y, (np.arange(euler + 1) / euler) ** power, tau)
            pictures.append(decode_pixels(vq, codes))
        return torch.cat(pictures).numpy()

    def score(self, run, step=None, tau=None, euler=None, power=1.0):
        """Return fid.py's distance of a checkpoint's samples, from the table or measured now."""
        step, euler, tau = step or self.marks[-1], euler or self.set.euler, tau or TAU[run.objective]
        key = (run.folder.name, *map(str, (step, tau, euler, power)))
        if key not in self.scores:
            np.savez("samples.npz", arr_0=self.samples(run, step, tau, euler, power))
            mu, sigma, _ = self.measure("samples.npz")
            self.scores[key] = fid.frechet_distance(mu, sigma, *self.reference[:2])
            with open(self.file, "a", newline="") as f:
                csv.writer(f).writerow([*key, self.scores[key]])
            print(*key, f"{self.scores[key]:.4f}", flush=True)
        return self.scores[key]

    @functools.cached_property
    def net(self):
        """The network whose features the data directory asks for."""
        untrained = self.data.meta.get("features") == "untrained"
        return (fid.untrained_inception() if untrained else fid.load_inception()).to(self.device)

    def measure(self, path):
        """Return mu, sigma and number of a set of images, as fid.py measures them."""
        args = SimpleNamespace(device=self.device, batch_size=32, num_workers=2)
        return fid.measure(Path(path), self.data.meta.get("features", "inception"), lambda: self.net, args)

    @functools.cached_property
    def reference(self):
        """Measure the data's reference images."""
        return self.measure(self.data.path / self.data.meta["reference"])

    def curve(self, axes, label, runs):
        """Score all checkpoints of runs that differ in their seed, and draw them: distances [seeds,checkpoints]."""
        scores = np.array([[self.score(run, step) for step in self.marks] for run in runs])
        line, = axes.plot(self.marks, scores.mean(0), marker=".", label=label)
        axes.fill_between(self.marks, scores.min(0), scores.max(0), alpha=0.2, color=line.get_color())
        axes.set(xlabel="training steps", ylabel="Fréchet distance", yscale="log")
        return scores


def follow(flow, z, y, times, tau):
    """Sample codes as flow.sample() does, through any times from 0 to 1."""
    for t, after in itertools.pairwise(times):
        v = flow.velocity(z, torch.full((len(y),), t, device=z.device), y, tau)
        z = z + (after - t) * v
    return flow.nearest(z)


def crossing(steps, distances, goal):
    """Tell in words after how many training steps a curve first falls to the goal; linear between checkpoints."""
    i = next((i for i, distance in enumerate(distances) if distance <= goal), None)
    if i is None:
        return f"not within {steps[-1]} steps"
    at = np.interp(goal, [distances[i], distances[i - 1]], [steps[i], steps[i - 1]]) if i else steps[0]
    return f"{'after' if i else 'before'} {at:.0f} of {steps[-1]} steps, {'' if i else 'at least '}{steps[-1] / at:.1f}x sooner"


# ------------------------------------------------------------------------------------------------ the questions

def compare_objectives(study, axes):
    """Tune each objective's learning rate, train it on all seeds, draw the curves. Return sentences."""
    seeds, curves, lines = study.set.seeds, {}, []
    for objective in train.OBJECTIVES:
        tried = [study.trained(Run(objective, lr, seeds[0])) for lr in study.set.rates]
        study.best[objective] = best = min(tried, key=study.score).lr
        curves[objective] = study.curve(axes, f"{objective}, lr {best:g}", [study.tuned(objective, seed) for seed in seeds])
        final = curves[objective][:, -1]
        lines.append(f"{objective}: {final.mean():.3f} after {study.marks[-1]} steps ({final.min():.3f} to {final.max():.3f} "
                     f"over seeds {', '.join(map(str, seeds))}); by learning rate, at seed {seeds[0]}: "
                     + ", ".join(f"{run.lr:g}: {study.score(run):.3f}" for run in tried)
                     + "; the best lies at the edge of the grid" * (len(tried) > 1 and best in study.set.rates[::len(tried) - 1])
                     + ".")
    for one, other in (("purrception", "cfm"), ("purrception", "dfm"), ("cfm", "purrception"), ("dfm", "purrception")):
        lines.append(f"{one} reaches {other}'s final distance "
                     f"{crossing(study.marks, curves[one].mean(0), curves[other][:, -1].mean())}.")
    return lines


def sweep_temperature(study, axes):
    """Score the first seed's posteriors at every temperature; make the sheet of one noise at each. Return sentences."""
    taus, lines, cfm = study.set.taus, [], study.score(study.tuned("cfm"))
    for objective in ("purrception", "dfm"):
        run = study.tuned(objective)
        scores = [study.score(run, tau=tau) for tau in taus]
        axes.plot(taus, scores, marker=".", label=objective)
        best = taus[int(np.argmin(scores))]
        sooner = crossing(study.marks, [study.score(run, step, best) for step in study.marks], cfm)
        lines.append(f"{objective}: distance by temperature {', '.join(f'{t}: {d:.3f}' for t, d in zip(taus, scores))}; at "
                     f"{best}, the best, it reaches cfm's final distance {sooner}.")
    axes.axhline(cfm, linestyle="--", color="grey", label="cfm, which has no tau")
    axes.set(xlabel="temperature tau", ylabel="Fréchet distance", yscale="log")
    rows = [study.samples(study.tuned(), study.marks[-1], tau, study.set.euler, images=10) for tau in taus]
    save_image("temperatures.png", np.concatenate(rows), 10)
    return lines


def weigh_z_loss(study, axes):
    """Train once without the z-loss and draw the size of logsumexp with and without. Return sentences."""
    lines = []
    for label, weight in (("with", 1e-5), ("without", UNWEIGHTED)):
        run = study.tuned(z_loss=weight)
        steps, z = study.log(run, "z")
        lse = np.sqrt(z / weight)
        axes.plot(steps, lse, label=f"{label} z-loss")
        lines.append(f"{label} z-loss: logsumexp {lse[-1]:.2f} (root mean square, last step), distance {study.score(run):.3f}.")
    axes.set(xlabel="training steps", ylabel="root mean square of logsumexp")
    return lines


def embed_time(study, axes):
    """Train with 1000 t in the place of t, at the learning rate found for t. Return sentences."""
    lines = []
    for scale in (1, 1000):
        runs = [study.tuned(seed=seed, time_scale=scale) for seed in study.set.seeds]
        losses = np.mean([study.log(run, "ce") for run in runs], 0)      # [2,lines]
        axes.plot(*losses, label=f"embedding of {scale} t")
        half, final = study.marks[len(study.marks) // 2 - 1], study.marks[-1]
        means = [np.mean([study.score(run, step) for run in runs]) for step in (half, final)]
        lines.append(f"embedding {scale} t: distance {means[0]:.3f} after {half} steps, {means[1]:.3f} after {final}; mean "
                     f"cross-entropy of the last quarter {losses[1, -len(losses[1]) // 4:].mean():.3f}.")
    axes.set(xlabel="training steps", ylabel="cross-entropy, nats")
    return lines


def count_steps(study, axes):
    """Score few Euler steps at times (s / T) ** power. Return sentences."""
    run, few, lines = study.tuned(), study.set.few, []
    goal = 1.05 * study.score(run, euler=max(few))
    for power in study.set.powers:
        scores = [study.score(run, euler=T, power=power) for T in few]
        axes.plot(few, scores, marker=".", label=f"t = (s/T)^{power:g}")
        enough = [T for T, score in zip(few, scores) if score <= goal]
        lines.append(f"times (s/T)^{power:g}: {', '.join(f'{T}: {d:.3f}' for T, d in zip(few, scores))}; within 5 % of "
                     f"{max(few)} uniform steps: {f'{enough[0]} steps' if enough else 'none'}.")
    axes.axhline(goal, linestyle=":", color="grey")
    axes.set(xlabel="Euler steps", ylabel="Fréchet distance", xscale="log", yscale="log")
    return lines


QUESTIONS = {"convergence": compare_objectives, "temperature": sweep_temperature, "logsumexp": weigh_z_loss,
             "embedding": embed_time, "steps": count_steps}


def main():
    """Read the flags, answer the questions one by one, write the figures."""
    parser = argparse.ArgumentParser(description="Purrception against its baselines on the demo's cats.")
    parser.add_argument("--quick", action="store_true", help="one seed, short runs: six minutes on 2 CPU cores")
    parser.add_argument("--data", type=Path, default=HERE, help="data directory; its recipe.txt sets network and batch")
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
    (recipe, _, _), chosen = train.parse(["--data", str(data)]), study.set
    lines = [f"{recipe.model}, batch {recipe.global_batch_size}, {study.marks[-1]} steps, seeds {chosen.seeds}; "
             f"{chosen.images} samples of {chosen.euler} Euler steps, without guidance, at tau {TAU}; {study.device.type}, "
             f"torch {torch.__version__}."]
    for name, answer in QUESTIONS.items():
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        lines += answer(study, axes)
        axes.legend()
        figure.savefig(f"{name}.png", dpi=120)
    Path("summary.md").write_text("".join(f"- {line}\n" for line in lines))
    print(Path("summary.md").read_text(), end="")


if __name__ == "__main__":
    main()
