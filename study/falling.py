"""Does a temperature that falls with t pay, and does calibration tell how it should fall?

    for seed in 0 1 2; do python train.py --name falling-$seed --seed $seed; done
    pip install -r study/requirements.txt      matplotlib, for the figure
    python -m study.falling runs/falling-*/ckpt.pt     an hour and a half on 2 CPU cores

tau(t) = start + (end - start) t. Each schedule samples 256 cats from each training and each of
three seeds of the noise. A figure is their mean, and a bracket the difference to the best constant
tau on the same trainings and noise, with the standard error over the three trainings.

The calibrated tau(t) has the lowest cross-entropy on held-out codes at each t. It is sampled, too.

The tables are printed. The folder OUT receives falling.png and results.jsonl, a line for each set;
what is in it is not measured again.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from study import judge
from study.judge import FIGURES
from study.measure import references
from study.samplers import Results, draw_codes, fingerprint, load_pyplot
from train import load_run, seeded
from vq import setup_process

STARTS = 0.5, 0.7, 0.9, 1.1
ENDS = 0.3, 0.5, 0.7, 0.9
CONSTANT = [(tau, tau) for tau in (0.5, 0.7, 0.9, 1.1)]
GRID = [(a, b) for a in STARTS for b in ENDS]
CALIBRATED = "calibrated", ""
ALL = [*dict.fromkeys(GRID + CONSTANT), CALIBRATED]
FEW = [*CONSTANT, (0.9, 0.3), (0.9, 0.5), (1.1, 0.3), (1.1, 0.5), CALIBRATED]
SETUPS = {  # calls, order, guidance; schedules
    "ten calls of order 2": ((10, 2, 1.0), ALL),
    "ten calls of order 2, guidance 1.5": ((10, 2, 1.5), ALL),
    "50 Euler steps": ((50, 1, 1.0), ALL),
    "50 Euler steps, guidance 1.5": ((50, 1, 1.5), FEW)
}
SEEDS = 0, 1, 2
TAUS = np.arange(0.3, 1.61, 0.05)
TIMES = np.linspace(0, 0.95, 20)


class Calibrated:
    """A method at the temperatures tau, given at TIMES, whatever temperature is asked for."""

    def __init__(self, flow, tau):
        self.flow = flow
        self.tau = tau

    def mean(self, z, t, y, _, cfg):
        tau = float(np.interp(t[0].item(), TIMES, self.tau))
        return self.flow.mean(z, t, y, tau, cfg)

    def __getattr__(self, name):
        return getattr(self.flow, name)


def calibrate(flow, codes):
    """Return the tau of lowest cross-entropy on codes [n,h,w] at each of TIMES."""
    found = []
    for t in TIMES:
        generator = seeded("cpu", 7, round(1000 * t))
        nats = np.zeros(len(TAUS))
        for c in codes.split(50):
            y = torch.arange(len(c), device=c.device) % flow.model.num_classes
            time = torch.full_like(y, t, dtype=torch.float)
            z = flow.path(flow.prior(len(c), generator).to(c.device), c, time)
            logits = flow.posterior(z, time, y).clamp(min=1e-30).log().flatten(0, 2)
            nats += [F.cross_entropy(logits / tau, c.flatten()).item() for tau in TAUS]
        found.append(TAUS[nats.argmin()])
    return np.array(found)


def measured(runs, taus, results, device, start, end, calls, order, cfg):
    """Return the FIGURES of a schedule, mean over seeds, [runs,3], from the table or anew."""
    eye, real, vq, _ = references(device)
    found = []
    for (path, run), tau in zip(runs.items(), taus):
        flow = run.flow
        settings = dict(steps=calls, order=order, cfg=cfg)
        if start == "calibrated":
            flow = Calibrated(flow, tau)
        else:
            settings |= dict(tau=start, tau_end=end)
        weights = fingerprint(run)
        for seed in SEEDS:
            task = [path, weights, seed, start, end, calls, order, cfg]
            if task not in results:
                codes, coats = draw_codes(flow, 256, seed, **settings)
                figures = judge.figures(judge.look(eye, vq.decode_pixels(codes)), coats, real)
                results[task] = [float(figures[name]) for name in FIGURES]
            found.append(results[task])
    return np.reshape(found, (len(runs), len(SEEDS), -1)).mean(1)


def compare(found):
    """Print a table of schedules by their figures [runs,3], the best distance first."""
    constant = min(CONSTANT, key=lambda s: found[s][:, 0].mean())
    print("| tau at t = 0, 1 | " + " | ".join(FIGURES) + " |\n" + "|---" * 4 + "|")
    for schedule in sorted(found, key=lambda s: found[s][:, 0].mean()):
        cells = []
        for values, others in zip(found[schedule].T, found[constant].T):
            gain = values - others
            error = gain.std(ddof=1) / len(gain) ** 0.5
            cells.append(f"{values.mean():.2f} ({gain.mean():+.3f} +- {error:.3f})")
        print("|", *schedule, "|", " | ".join(cells), "|", flush=True)


def draw(found, tau, path, pyplot):
    """Draw distance and recall against the end, a line for each start, and tau by t [runs,20]."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axes, name in zip(panels, ("distance", "recall")):
        i = FIGURES.index(name)
        for start in STARTS:
            axes.plot(ENDS, [found[start, end][:, i].mean() for end in ENDS], ".-",
                      label=f"tau {start} at t = 0")
        axes.set(xlabel="tau at t = 1", ylabel=f"{name}, ten calls of order 2")
    panels[0].legend(fontsize="small")
    panels[2].plot(TIMES, tau.T, ".-", color="C0")
    panels[2].set(xlabel="t", ylabel="tau of the lowest held-out cross-entropy", ylim=(0, None))
    figure.savefig(path, dpi=100)


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure temperatures that fall with t.")
    add = parser.add_argument
    add("ckpts", nargs="+", help="checkpoints of the demo")
    add("--out", type=Path, default="runs/falling", help="folder to write")
    args = parser.parse_args(argv)
    pyplot = load_pyplot()
    _, _, device = setup_process()
    runs = {path: load_run(path, device=device) for path in args.ckpts}
    results = Results(args.out / "results.jsonl")
    _, _, _, codes = references(device)
    taus = np.array([calibrate(run.flow, codes[:200]) for run in runs.values()])
    print("calibrated tau at t =", *TIMES.round(2), "\n", taus.round(2).tolist())
    for name, (setup, schedules) in SETUPS.items():
        print(f"\n{name}\n")
        found = {s: measured(runs, taus, results, device, *s, *setup) for s in schedules}
        compare(found)
        if setup == (10, 2, 1.0):
            draw(found, taus, args.out / "falling.png", pyplot)


if __name__ == "__main__":
    main()
