"""Measure the paper's claims at small scale: Purrception, its baselines and variants, on the cats.

    pip install -r study/requirements.txt      matplotlib, for the figures
    python -m study.study                      45 minutes on 2 CPU cores, 2 GB in runs/study/
    python -m study.study --quick              four minutes: one seed, one learning rate, short runs

The arms (arms.py) share the network but for its ends, the batch and the number of steps. Each has
the best of four learning rates, by the judge's distance at its default temperature: the two best at
seed 0 are compared over all seeds. The shuffled codebook takes Purrception's, the release's sampler
DFM's. There are two measures:

    denoising    rmse(mu - z1) and cross-entropy on held-out code grids at fixed t, which need no
                 sampler, no temperature and no features
    samples      the figures of judge.py for EMA samples without guidance, from the same noise for
                 all arms

The folder OUT receives the figures, summary.md, and results.jsonl. What is in it is not measured
again: the same command goes on after an interruption.

Shapes: B batch, h w grid, K codes, d code dimension.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy.integrate import trapezoid

import train
from demo.cats.cats import COATS, HERE
from study import judge
from study.arms import ARMS, BORROWED, FALLING, TAUS, TUNED, Run, flags_of
from study.judge import FIGURES
from study.measure import TIMES, measure, references
from study.samplers import Results, draw_codes, load_pyplot
from train import load_run
from vq import claim_folder, read_checkpoint, save_image, setup_process, write_whole

FULL = dict(steps=640, checkpoints=4, batch=32, seeds=(0, 1, 2), rates=(1e-3, 2e-3, 4e-3, 8e-3),
            images=256, grids=500)
QUICK = dict(steps=160, checkpoints=2, batch=32, seeds=(0,), rates=(4e-3,), images=128, grids=100)
RACES = (                                       # which arm reaches whose end, and when
    ("purrception", "dfm"),
    ("purrception", "cfm"),
    ("cfm", "purrception"),
    ("endpoint", "purrception"),
    ("geometric", "purrception"),
    ("geometric", "cfm"),
    ("logit-normal", "purrception"),
    ("geometric-logit-normal", "purrception"),
    ("geometric-logit-normal", "cfm"),
    ("geometric-logit-normal", "cfm-logit-normal"),
    ("purrception", "released"),
)


# ----- training

def train_run(task):
    """Train a run, or go on with it, as train.py does; then drop the optimizer's state."""
    run, steps, every, batch = task
    words = flags_of(run, steps, every, batch)
    if (run.folder / "args.json").exists():
        words.append("--resume")
    else:                                       # it may have been killed at its very start
        shutil.rmtree(run.folder, ignore_errors=True)
    with open(os.devnull, "w") as quiet:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            train.main(words)
    if not run.checkpoint(steps).exists():      # a signal stopped it
        os._exit(1)                             # SystemExit would leave a worker to its next task
    for step in range(every, steps + 1, every):
        ckpt = read_checkpoint(run.checkpoint(step))
        with write_whole(run.checkpoint(step)) as file:
            torch.save({key: ckpt[key] for key in ("ema", "args", "step")}, file)
    (run.folder / "ckpt.pt").unlink()


# ----- the study

def start_worker():
    """Compute with one thread, and end with the study, even if that is killed."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=follow, daemon=True).start()


class Study:
    """The settings and the table of results, which is written as it grows.

    It works in its folder, where train.py then writes runs/.
    """

    def __init__(self, folder, settings, workers):
        self.set = SimpleNamespace(**settings)
        self.workers = workers
        _, _, self.device = setup_process()
        every = self.set.steps // self.set.checkpoints
        self.marks = range(every, self.set.steps + 1, every)
        names = "recipe.txt", "codes.npy", "reference.npz", "tokenizer.pt"
        record = settings | train.SIZES["DiT-demo/2"]
        for file in (*(HERE / name for name in names), judge.WEIGHTS):
            record[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        record = json.loads(json.dumps(record))  # tuples become lists
        claim_folder(folder, folder / "settings.json", record, rank=0)
        os.chdir(folder)
        self.results = Results(Path("results.jsonl"))

    def spread(self, function, tasks):
        """Yield function(task) for all tasks, by processes of one thread each.

        They are faster than one process of many threads.
        """
        if self.workers < 2 or len(tasks) < 2:
            return map(function, tasks)
        return self.pool.map(function, tasks)

    @functools.cached_property
    def pool(self):
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.workers, spawn, start_worker)

    def train(self, runs):
        """Train the runs that are missing."""
        wanted = [run for run in dict.fromkeys(runs) if not run.checkpoint(self.set.steps).exists()]
        tasks = [(run, self.set.steps, self.marks.step, self.set.batch) for run in wanted]
        for run, _ in zip(wanted, self.spread(train_run, tasks)):
            print("trained", run.folder.name, flush=True)

    def measured(self, tasks):
        """Return what measure() returns for tasks (run, step, knob), from the table or anew."""
        missing = [task for task in tasks if task not in self.results]
        whole = [(*task, self.set.images, self.set.grids) for task in missing]
        for task, result in zip(missing, self.spread(measure, whole)):
            self.results[task] = result
            print("measured", task[0].folder.name, *task[1:], flush=True)
        return [self.results[task] for task in tasks]

    def figures(self, name, runs, knobs, steps=None):
        """Return a figure of judge.py, [runs,knobs,steps]."""
        steps = steps or [self.set.steps]
        tasks = [(run, step, knob) for run in runs for knob in knobs for step in steps]
        found = [one[name] for one in self.measured(tasks)]
        return np.reshape(found, (len(runs), len(knobs), len(steps)))

    def denoising(self, name, runs, step=None):
        """Return rmse, ce, hits or errors of runs: [runs,times,...]."""
        tasks = [(run, step or self.set.steps, None) for run in runs]
        return np.array([one[name] for one in self.measured(tasks)])

    def floor(self):
        """Return the distance of other real cats to real cats: nothing is expected below it."""
        eye, real, vq, _ = references(self.device)
        coats = np.arange(self.set.images) % len(COATS)
        others = judge.yardstick(eye, vq, coats, self.device)
        return judge.figures(others, coats, real)["distance"]


# ----- arithmetic and drawing

def shown(values, digits=2):
    """Write the mean of values and their range."""
    values = np.ravel(values)
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def table(head, rows):
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def crossing(steps, values, goal):
    """Return the share of the steps after which a curve first falls to the goal, else inf.

    It is linear between checkpoints. At the first checkpoint, it is an upper bound.
    """
    below = np.flatnonzero(np.asarray(values) <= goal)
    if not len(below):
        return np.inf
    i = below[0]
    if i == 0:
        return steps[0] / steps[-1]
    at = np.interp(goal, [values[i], values[i - 1]], [steps[i], steps[i - 1]])
    return float(at / steps[-1])


def shares(steps, curves, goal):
    """Write when curves [seeds,steps] reach a goal, as shares of the steps."""
    found = [crossing(steps, curve, goal) for curve in curves]
    reached = [x for x in found if x < np.inf]
    if not reached:
        return "never"
    if len(reached) < len(found):
        return f"{len(reached)} of {len(found)} seeds"
    if min(found) == steps[0] / steps[-1]:      # before the first checkpoint
        return f"at most {max(found):.2f}"
    return shown(found)


def over_time(rmse):
    """Average rmse [seeds,times] over t from the first of TIMES to the last: [seeds]."""
    squared = trapezoid(np.square(rmse), TIMES, axis=1)
    return np.sqrt(squared / (TIMES[-1] - TIMES[0]))


def draw_curve(axes, x, curves, **style):
    """Draw the mean of curves [seeds,points], and their range as a band."""
    line, = axes.plot(x, curves.mean(0), marker=".", **style)
    axes.fill_between(x, curves.min(0), curves.max(0), alpha=0.2, color=line.get_color())


def log_scale(axes):
    """Make the axis of distances logarithmic, with plain numbers."""
    ticks = 2, 3, 5, 7, 10, 15, 20, 30, 40
    axes.set_yscale("log")
    axes.set_yticks(ticks, ticks)
    axes.minorticks_off()


# ----- the questions

def tune(study):
    """Find each arm's best learning rate: of the two best at seed 0, the better over all seeds.

    Return {arm: its runs}, a run for each seed, and lines of the summary.
    """
    def distances(arm, rates, seeds):
        """Return mean distances over seeds at the default temperature, by rate."""
        own, _ = ARMS[arm].knobs
        found = study.figures("distance", [Run(arm, lr, s) for lr in rates for s in seeds], [own])
        return dict(zip(rates, found.reshape(len(rates), len(seeds)).mean(1)))

    rates, seeds = study.set.rates, study.set.seeds
    study.train(Run(arm, lr, seeds[0]) for arm in TUNED for lr in rates)
    first = {arm: distances(arm, rates, seeds[:1]) for arm in TUNED}
    finalists = {arm: sorted(rates, key=first[arm].get)[:2] for arm in TUNED}
    study.train(Run(arm, lr, s) for arm in TUNED for lr in finalists[arm] for s in seeds)
    runs = {}
    rows = []
    for arm in TUNED:
        means = distances(arm, finalists[arm], seeds)
        best = min(means, key=means.get)
        runs[arm] = [Run(arm, best, s) for s in seeds]
        cells = {lr: f"{x:.2f}" for lr, x in first[arm].items()}
        for lr, mean in means.items():
            cells[lr] += f" ({mean:.2f})"
        rows.append([arm, *cells.values()])
        if ARMS[arm].same_path:
            rmse = over_time(study.denoising("rmse", [Run(arm, lr, seeds[0]) for lr in rates]))
            rows.append([f"{arm}, rmse", *(f"{x:.3f}" for x in rmse)])
    for arm, other in BORROWED.items():
        runs[arm] = [run._replace(arm=arm) for run in runs[other]]
        study.train(runs[arm])
    head = "distance at seed 0 (mean over seeds) by rate", *(f"{lr:g}" for lr in rates)
    return runs, table(head, rows)


def converge(study, runs, pyplot):
    """Draw distance and rmse against training steps, at the default temperature and the best."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    marks = list(study.marks)
    curves = {}
    rows = []
    for name, arm in ARMS.items():
        own, knobs = arm.knobs
        final = study.figures("distance", runs[name], knobs).mean((0, 2))
        best = knobs[int(final.argmin())]
        found = [study.figures("distance", runs[name], [x], marks)[:, 0] for x in (own, best)]
        if arm.same_path:
            rmse = [over_time(study.denoising("rmse", runs[name], step)) for step in marks]
            found.append(np.stack(rmse, 1))
        curves[name] = found                    # [seeds,steps] each
        for axes, curve in zip(panels, found):
            draw_curve(axes, marks, curve, label=name, color=arm.colour)
        ends = [shown(curve[:, -1], digits) for curve, digits in zip(found, (2, 2, 3))] + ["-"]
        others = [shown(study.figures(x, runs[name], [best])) for x in FIGURES[1:]]
        falling = ["-"] * 3
        if arm.falls:
            falling = [shown(study.figures(x, runs[name], [FALLING])) for x in FIGURES]
        rate = f"{runs[name][0].lr:g}"
        rows.append([name, rate, ends[0], best, ends[1], *others, *falling, ends[2]])
    floor = study.floor()
    rows.append(["other real cats", "-", f"{floor:.2f}", *["-"] * 8])
    titles = "distance, default temperature", "distance, best temperature", "rmse(mu - z1)"
    for axes, title in zip(panels, titles):
        axes.set(title=title, xlabel="training steps")
    for axes in panels[:2]:
        axes.axhline(floor, ls=":", color="grey", label="real cats")
        log_scale(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig("convergence.png", dpi=100)
    head = ("arm", "rate", "distance", "best tau or k", "distance there", "precision", "recall",
            "distance, tau 1.1 to 0.3", "precision", "recall", "rmse")
    return table(head, rows) + race(curves, marks)


def race(curves, marks):
    """Tell after which share of its steps an arm reaches another's mean end, by each measure."""
    rows = []
    for one, other in RACES:
        pairs = zip(curves[one], curves[other])
        found = [shares(marks, curve, end[:, -1].mean()) for curve, end in pairs]
        rows.append([f"{one} reaches {other}'s end", *found, *["-"] * (3 - len(found))])
    head = "share of the steps after which", "distance, default", "distance, best", "rmse"
    return table(head, rows)


def vary_temperature(study, runs, pyplot):
    """Draw distance, and recall against precision, by temperature; make a sheet, a row for each."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    names = *FIGURES, "spread"
    rows = []
    for name in ARMS:
        arm = ARMS[name]
        _, knobs = arm.knobs
        found = [study.figures(x, runs[name], knobs)[..., 0] for x in names]  # [seeds,knobs] each
        heats = 1 / np.array(knobs) if arm.regresses else knobs
        draw_curve(panels[0], heats, found[0], label=name, color=arm.colour)
        panels[1].plot(found[1].mean(0), found[2].mean(0), ".-", color=arm.colour)
        rows += [[name, knob, *(shown(x[:, i]) for x in found)] for i, knob in enumerate(knobs)]
    panels[0].set(xlabel="tau; regressions: 1/k", ylabel="the judge's distance")
    log_scale(panels[0])
    panels[1].set(xlabel="precision", ylabel="recall")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig("temperature.png", dpi=100)
    one = load_run(runs["purrception"][0].checkpoint(study.set.steps), device=study.device)
    with torch.inference_mode():
        drawn = [draw_codes(one.flow, 10, 0, steps=10, order=2, tau=tau)[0] for tau in TAUS]
        save_image("temperatures.png", one.vq.decode_pixels(torch.cat(drawn)), 10)
    return table(["arm", "tau or k", *names], rows)


def denoise(study, runs, pyplot):
    """Draw rmse and cross-entropy on held-out grids by t."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    titles = {"rmse": "rmse(mu - z1)", "ce": "cross-entropy, nats"}
    lines = []
    for axes, error in zip(panels, titles):
        rows = []
        for name in TUNED:
            arm = ARMS[name]
            if error == "ce" and arm.regresses:
                continue
            found = study.denoising(error, runs[name])          # [seeds,times]
            style = "-" if arm.same_path else ":"
            draw_curve(axes, TIMES, found, label=name, color=arm.colour, ls=style)
            rows.append([name, *(shown(x, 3) for x in found.T)])
        axes.set(xlabel="t", ylabel=titles[error])
        lines += table([f"{error} at t =", *TIMES], rows)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig("denoising.png", dpi=100)
    return lines


def calibrate(study, runs, pyplot):
    """Draw what pi expects against what is found, by tenths of the positions."""
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    words = {
        "hits": ("probability of the most likely code", "share where it is right"),
        "errors": ("pi's own squared error of mu", "measured squared error")
    }
    cases = [(name, arm) for name in words for arm in ("purrception", "geometric-logit-normal")]
    rows = []
    for axes, (name, arm) in zip(panels, cases):
        found = study.denoising(name, runs[arm])                # [seeds,times,2,10]
        for word, values in zip(words[name], np.moveaxis(found, 2, 0)):
            rows.append([f"{arm}: {word}", *(shown(x, 3) for x in values.mean(2).T)])
        for i in (1, 3, 4, 5, 6):
            expected, measured = found[:, i].mean(0)
            axes.loglog(expected, measured, ".-", label=f"t = {TIMES[i]}")
        ends = found.min(), found.max()
        axes.plot(ends, ends, ":", color="grey")
        axes.set(title=arm, xlabel=words[name][0], ylabel=words[name][1])
    panels[0].legend()
    figure.savefig("calibration.png", dpi=100)
    return table(["at t =", *TIMES], rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the paper's claims on the demo's cats.")
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, one learning rate, short runs")
    add("--out", type=Path, help="folder to write; default: runs/study, or runs/study-quick")
    args = parser.parse_args(argv)
    pyplot = load_pyplot()
    settings = QUICK if args.quick else FULL
    folder = args.out or Path("runs", "study-quick" if args.quick else "study")
    study = Study(folder, settings, 1 if torch.cuda.is_available() else torch.get_num_threads())
    lines = [f"{json.dumps(settings)}; {study.device.type}, torch {torch.__version__}.", ""]
    runs, found = tune(study)
    lines += found
    for answer in (converge, vary_temperature, denoise, calibrate):
        lines += answer(study, runs, pyplot)
        Path("summary.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
