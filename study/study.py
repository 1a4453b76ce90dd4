"""Measure the paper's claims at small scale: Purrception, its baselines and variants, on the demo's cats.

    pip install -r demo/requirements.txt       # matplotlib, for the figures
    python demo/study.py                       # about 50 minutes on 2 CPU cores, 2 GB in study/
    python demo/study.py --quick               # five minutes: one seed, one learning rate, short runs

The arms share the network but for its ends, the batch and the number of steps. Each has the best of four learning
rates, by the judge's distance at its default temperature: the two best at seed 0 are compared over all seeds. The
shuffled codebook takes Purrception's. There are two measures:

    denoising    rmse(mu - z1) and cross-entropy on held-out code grids at fixed t: no sampler, no tau, no features
    samples      the figures of judge.py for EMA samples without guidance, from the same noise for all arms

The folder OUT receives the figures, summary.md, and results.jsonl. What is in it is not measured again: the same
command goes on after an interruption.

Shapes: B batch, h w grid, K codes, d code dimension.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.integrate import trapezoid
from torch.utils._python_dispatch import TorchDispatchMode

import judge
from make import HERE
from samplers import draw_codes

sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402
from flow import CFM, DFM, OBJECTIVES, Purrception, at_least_float32  # noqa: E402
from sample import TAU, load_run  # noqa: E402
from vq import (InputError, decode_pixels, from_pixels, load_vq, read_checkpoint, read_json, replacing,  # noqa: E402
                save_image, start_process)

aten = torch.ops.aten

FULL = dict(steps=640, checkpoints=4, batch=32, seeds=(0, 1, 2), rates=(2e-3, 4e-3, 8e-3, 16e-3),
            images=256, grids=500)
QUICK = dict(steps=160, checkpoints=2, batch=32, seeds=(0,), rates=(4e-3,), images=128, grids=100)
ARMS = ("cfm", "cfm-logit-normal", "endpoint", "purrception", "geometric", "geometric-logit-normal", "muon",
        "likelihood", "dfm")
TAUS = 0.3, 0.5, 0.7, 0.9, 1.0, 1.2
RESCALINGS = 0.8, 1.0, 1.2, 1.5, 2.0                       # k of rescaled()
VARIANCE = 1.47, 1.34, 0.34, 0.04                          # of the cats' code vectors, by channel
TIMES = 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99
SAME_PATH = tuple(arm for arm in ARMS if arm != "dfm")     # z_t means the same: rmse and ce can be compared
RIVALS = {                                                 # arm: those whose final distance and rmse it may reach
    "purrception": ("cfm", "endpoint", "dfm", "likelihood", "shuffled"),
    "cfm": ("purrception", "geometric"),
    "endpoint": ("purrception", "cfm"),
    "dfm": ("purrception",),
    "likelihood": ("purrception",),
    "geometric": ("purrception", "cfm"),
    "geometric-logit-normal": ("purrception", "geometric", "cfm", "cfm-logit-normal"),
    "cfm-logit-normal": ("cfm", "geometric-logit-normal"),
    "muon": ("purrception",),
}
DRIFT = {4: 1, 16: 3}                                      # times the best rate, where logits can drift: seeds
UNWEIGHTED = 1e-12     # a z-loss too light to move a weight, by which the log still tells the size of logsumexp
TINT = dict(zip((*ARMS, "shuffled"), ("C0", "C7", "C4", "C1", "C8", "C9", "C6", "C3", "C2", "C5")))


# ---------- arms that train.py does not have

class Likelihood(Purrception):
    """Purrception whose logits are the network's plus what Bayes' rule knows without it.

        p(c | z_t)  proportional to  p(c | the other positions) N(z_t; t e_c, (1 - t)^2 I)

    The network supplies the first factor; the temperature acts on it alone. With a head of zeros, pi is the exact
    posterior of independent, equally likely codes.
    """

    def evidence(self, z, t):
        """Return log N(z; t e_k, s^2 I) up to a constant, s = max(1 - t, 0.02): [B,h,w,K] for z [B,d,h,w]."""
        E = self.codebook
        t = t.view(-1, 1, 1, 1)
        rows = z.movedim(1, -1)
        with torch.autocast(z.device.type, enabled=False):  # float32 island: distances are divided by 2 s^2
            distances = rows.square().sum(3, keepdim=True) - 2 * t * (rows @ E.T) + t * t * E.square().sum(1)
        return -distances / (2 * (1 - t).clamp(min=0.02).square())

    def loss(self, z, t, y, codes):
        logits = at_least_float32(self.model(z, t, y)) + self.evidence(z, t)               # [B,h,w,K]
        ce = F.cross_entropy(logits.flatten(0, 2), codes.flatten())
        z_part = self.z_loss * logits.logsumexp(3).square().mean()
        return ce + z_part, {"ce": ce.detach(), "z": z_part.detach()}

    def posterior(self, z, t, y, tau=1.0, cfg=1.0):
        assert cfg == 1, "guidance is not part of the study"
        return torch.softmax(self.model(z, t, y) / tau + self.evidence(z, t), 3)

    def mean(self, z, t, y, tau=1.0, cfg=1.0):
        mu = self.posterior(z, t, y, tau, cfg) @ self.codebook
        return mu.movedim(-1, 1)


class Shuffled(Purrception):
    """Purrception where each code has the vector of another, so that neighbours in the codebook do not look alike."""

    def __init__(self, model, codebook, *settings):
        order = np.random.default_rng(0).permutation(len(codebook))
        super().__init__(model, codebook[order], *settings)


OBJECTIVES |= {
    "likelihood": Likelihood,
    "shuffled": Shuffled,
    "geometric": Purrception,                              # this and the next three are trained otherwise
    "geometric-logit-normal": Purrception,
    "cfm-logit-normal": CFM,
    "muon": Purrception,
}
FLAGS = {
    "geometric": ["--geometric-head"],
    "geometric-logit-normal": ["--geometric-head", "--logit-normal"],
    "cfm-logit-normal": ["--logit-normal"],
}
ADAMW = train.make_optimizer


def orthogonal(X):
    """Replace the singular values of a matrix by numbers about 1: five steps of Newton and Schulz, in float32."""
    if len(X) > len(X.T):
        return orthogonal(X.T).T
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        G = X @ X.T
        X = 3.4445 * X + (-4.7750 * G + 2.0315 * G @ G) @ X
    return X


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), its steps as large as AdamW's (arXiv 2502.16982), so that one rate serves both.

    torch.optim.Muon multiplies in bf16. A CPU without it is twenty times slower then.
    """

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, weight_decay=0.01))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                ahead = p.grad.lerp(momentum, 0.95)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(orthogonal(ahead), alpha=0.2 * max(p.shape) ** 0.5 * group["lr"])


class MuonAndAdamW:
    """Muon for the matrices of attention and MLP, train.py's optimizer for all else."""

    def __init__(self, flow, lr):
        matrices = [p for name, p in flow.model.blocks.named_parameters() if p.ndim == 2 and "adaLN" not in name]
        for p in matrices:
            p.requires_grad = False                        # so that the others are train.py's
        self.parts = [ADAMW(flow, lr), Muon(matrices, lr)]
        for p in matrices:
            p.requires_grad = True

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state):
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


class Bf16Products(TorchDispatchMode):
    """Within it, bf16 matrices are multiplied in float32 and the result rounded, which is what hardware does.

    So every machine computes alike, and a CPU without bf16 is not six times slower.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        low = any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args)
        if not low or func.overloadpacket not in (aten.mm, aten.addmm):
            return func(*args, **kwargs)
        out = kwargs.pop("out", None)
        args = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
        product = func.overloadpacket(*args, **kwargs).bfloat16()
        return product if out is None else out.copy_(product)


def rescaled(velocity, k):
    """Return a velocity that samples 1/k of the variance: temporal score rescaling (arXiv 2510.01184).

    v <- r v + (1 - r) z / t,  r = (t^2 s^2 + (1 - t)^2) / (t^2 s^2 / k + (1 - t)^2),  s^2 the variance of z1
    """
    def cooler(z, t, y, tau=None, cfg=1.0):
        time = t.view(-1, 1, 1, 1)
        variance = torch.tensor(VARIANCE, device=z.device).view(1, -1, 1, 1)
        noise = (1 - time) ** 2
        data = variance * time ** 2
        total = data / k + noise
        r = (data + noise) / total
        over_t = variance * time * (1 / k - 1) / total     # (1 - r) / t
        return r * velocity(z, t, y, tau, cfg) + over_t * z

    return cooler


# ---------- runs

class Run(NamedTuple):
    """A training: what tells it from the others."""
    objective: str
    lr: float
    seed: int
    z_loss: float = 1e-5
    bf16: bool = False

    @property
    def folder(self):
        extra = "-no-z" * (self.z_loss == UNWEIGHTED) + "-bf16" * self.bf16
        return Path("runs", f"{self.objective}-lr{self.lr:g}-seed{self.seed}{extra}")

    @property
    def failed(self):
        """Return the file that says so where the loss became infinite."""
        return self.folder / "failed.txt"

    def checkpoint(self, step):
        return self.folder / f"ckpt-{step:07d}.pt"

    def log(self, key):
        """Return steps and values of one column of log.jsonl, [2,lines]."""
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return np.array([(line["step"], line[key]) for line in lines]).T


def flags_of(run, steps, every, batch):
    """Return train.py's flags for a run.

    They override what the demo's recipe has beyond the paper, but for warm-up and the ramp of the average: runs are
    short.
    """
    words = dict(data=HERE, name=run.folder.name, objective=run.objective, lr=run.lr, seed=run.seed, z_loss=run.z_loss,
                 steps=steps, global_batch_size=batch, warmup=100, cooldown=0, ckpt_every=every, keep_every=every,
                 sample_every=0, log_every=20)
    words = [word for name, x in words.items() for word in (f"--{name.replace('_', '-')}", str(x))]
    words += ["--ema-ramp", "--no-geometric-head", "--no-logit-normal", *FLAGS.get(run.objective, [])]
    return words + ["--bf16" if run.bf16 else "--no-bf16"]


def train_run(task):
    """Train a run, or go on with it, as train.py does; then drop the optimizer from its checkpoints."""
    run, steps, every, batch = task
    words = flags_of(run, steps, every, batch) + ["--resume"] * run.folder.exists()
    train.make_optimizer = MuonAndAdamW if run.objective == "muon" else ADAMW
    try:
        with contextlib.ExitStack() as stack:
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
            stack.enter_context(contextlib.redirect_stderr(quiet))
            if run.bf16:
                stack.enter_context(Bf16Products())
            train.main(words)
    except InputError as error:
        if "gradient norm" not in str(error):
            raise
        run.failed.write_text(str(error))
        return
    finally:                                               # train() only noted signals; from here on they end the study
        start_process()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not run.checkpoint(steps).exists():                 # a signal stopped it
        os._exit(1)                                        # SystemExit would leave this process to its next task
    for step in range(every, steps + 1, every):
        ckpt = read_checkpoint(run.checkpoint(step))
        with replacing(run.checkpoint(step)) as file:
            torch.save({key: ckpt[key] for key in ("ema", "args", "step")}, file)
    (run.folder / "ckpt.pt").unlink()


# ---------- what is measured

@functools.cache
def references(device):
    """Load the judge and what it sees in real cats, the tokenizer, and the codes [500,h,w] of the held-out cats."""
    eye, vq = judge.load_judge(device), load_vq(HERE / "tokenizer.pt", device)
    pixels = np.load(HERE / "reference.npz")["arr_0"]
    codes = torch.cat([vq.encode(from_pixels(some).to(device)) for some in np.split(pixels, 10)])
    return eye, judge.reference(eye, vq, device), vq, codes


@torch.inference_mode()
def measure(task):
    """Measure a run at a step: its samples at a temperature `knob` or, if that is None, its denoising."""
    _, _, device = start_process()
    run, step, knob, images, grids = task
    if run.failed.exists():
        return None
    flow = load_run(run.checkpoint(step), device)[0]
    if knob is None:
        return measure_denoising(flow, device, grids)
    return measure_samples(flow, device, images, knob, run.seed)


def measure_samples(flow, device, images, knob, seed):
    """Judge samples at a tau or, of a regression, with its velocity rescaled by k: 10 calls of order 2, for DFM 50."""
    eye, real, vq, _ = references(device)
    settings = dict(steps=50) if isinstance(flow, DFM) else dict(steps=10, order=2)
    if isinstance(flow, CFM):
        flow.velocity = rescaled(flow.velocity, knob)
    else:
        settings["tau"] = knob
    codes, coats = draw_codes(flow, images, seed, device, **settings)
    return judge.figures(judge.look(eye, decode_pixels(vq, codes)), coats, real)


def measure_denoising(flow, device, grids):
    """Compare mu and pi with the truth on held-out code grids, by TIMES.

    Return lists over TIMES: rmse; ce, nats per position; tenths, the mean confidence max_k pi_k and the share of hits in
    each tenth of the positions, the least confident first. What DFM sees unmasked, it knows.
    """
    _, _, _, codes = references(device)
    codes = codes[:grids]
    coats = torch.arange(len(codes), device=device) % flow.model.num_classes
    found = dict(rmse=[], ce=[], tenths=[])
    for t in TIMES:
        generator = train.seeded("cpu", 0, round(1000 * t))
        squared, ce, guesses = 0.0, 0.0, []
        for c, y in zip(codes.split(50), coats.split(50)):
            time = torch.full((len(c),), t, device=device)
            z = flow.path(flow.prior(len(c), generator).to(device), c, time)
            z1 = flow.embed(c)
            if isinstance(flow, CFM):
                mu = z + (1 - t) * flow.velocity(z, time, y)
            else:
                pi = flow.posterior(z, time, y)                                            # [B,h,w,K]
                mu = (pi @ flow.codebook).movedim(-1, 1)
                p = pi.gather(3, c[..., None]).squeeze(3)
                confidence, guess = pi.max(3)
                if isinstance(flow, DFM):
                    known = z < len(flow.codebook)
                    mu = torch.where(known[:, None], z1, mu)
                    p = p.masked_fill(known, 1.0)
                ce -= p.clamp(min=1e-30).log().sum().item()
                guesses.append(torch.stack([confidence, guess == c]).flatten(1))           # [2,positions]
            squared += (mu - z1).square().sum().item()
        positions = codes.numel()
        found["rmse"].append((squared / positions / flow.codebook.shape[1]) ** 0.5)
        found["ce"].append(ce / positions)
        if guesses:
            found["tenths"].append(tenths(torch.cat(guesses, 1)))
    return found


def tenths(guesses):
    """Average confidences and hits [2,positions] over each tenth of the positions, by confidence: [2,10] lists."""
    order = guesses[0].argsort(stable=True)
    return torch.stack([some.mean(1) for some in guesses[:, order].tensor_split(10, 1)], 1).tolist()


def start_worker():
    """Compute with one thread, and end with the study, even if that is killed."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=follow, daemon=True).start()


class Study:
    """The settings and the table of results, which is written as it grows."""

    def __init__(self, settings, workers):
        self.set = SimpleNamespace(**settings)
        self.workers = workers
        _, _, self.device = start_process()
        every = self.set.steps // self.set.checkpoints
        self.marks = range(every, self.set.steps + 1, every)
        kept = Path("settings.json")
        sources = "recipe.txt", "codes.npy", "reference.npz", "tokenizer.pt", "judge.pt"
        sums = {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in sources}
        text = json.dumps(settings | train.SIZES["DiT-demo/2"] | sums)
        if kept.exists() and read_json(kept) != json.loads(text):
            raise InputError(f"{kept.absolute()}: this folder holds a study with other settings; give another --out")
        with replacing(kept) as file:
            file.write(text.encode())
        self.file = Path("results.jsonl")
        train.trim_log(self.file, lambda pair: True)
        pairs = map(json.loads, self.file.read_text().splitlines())
        self.results = {json.dumps(key): result for key, result in pairs}

    def spread(self, function, tasks):
        """Yield function(task) for all tasks, by processes of one thread each: faster than one of many threads."""
        alone = self.workers < 2 or len(tasks) < 2
        return map(function, tasks) if alone else self.pool.map(function, tasks)

    @functools.cached_property
    def pool(self):
        return ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), start_worker)

    def train(self, runs):
        """Train the runs that are missing."""
        wanted = [run for run in dict.fromkeys(runs)
                  if not run.checkpoint(self.set.steps).exists() and not run.failed.exists()]
        tasks = [(run, self.set.steps, self.marks.step, self.set.batch) for run in wanted]
        for run, _ in zip(wanted, self.spread(train_run, tasks)):
            print("trained", run.folder.name, flush=True)

    def measured(self, tasks):
        """Return what measure() returns for tasks (run, step, knob), from the table or measured now."""
        keys = [json.dumps(task) for task in tasks]
        missing = [task for task, key in zip(tasks, keys) if key not in self.results]
        whole = [(*task, self.set.images, self.set.grids) for task in missing]
        for task, result in zip(missing, self.spread(measure, whole)):
            self.results[json.dumps(task)] = result
            train.append_line(self.file, json.dumps([task, result], default=float))
            print("measured", task[0].folder.name, *task[1:], flush=True)
        return [self.results[key] for key in keys]

    def figures(self, name, runs, knobs, steps=None):
        """Return a figure of judge.py, [runs,knobs,steps]; of a failed run inf."""
        steps = steps or [self.set.steps]
        found = self.measured([(run, step, knob) for run in runs for knob in knobs for step in steps])
        return np.reshape([one[name] if one else np.inf for one in found], (len(runs), len(knobs), len(steps)))

    def denoising(self, name, runs, step=None):
        """Return rmse, ce or tenths of runs: [runs,times,...]."""
        found = self.measured([(run, step or self.set.steps, None) for run in runs])
        whole = [one[name] for one in found if one]
        return np.array([one[name] if one else np.full_like(whole[0], np.nan) for one in found])

    def floor(self):
        """Return the distance of other real cats to real cats: no method can be expected below."""
        eye, real, vq, _ = references(self.device)
        coats = np.arange(self.set.images) % len(judge.COATS)
        return judge.figures(judge.yardstick(eye, vq, coats, self.device), coats, real)["distance"]


# ---------- the questions

def knobs_of(arm):
    """Return an arm's default temperature, which is sample.py's, and all temperatures tried."""
    if issubclass(OBJECTIVES[arm], CFM):
        return 1.0, RESCALINGS
    return TAU.get(arm, TAU["purrception"]), TAUS


def shown(values, digits=2):
    """Write the mean of values and their range."""
    values = np.ravel(values)
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def table(head, rows):
    """Write a Markdown table."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def crossing(steps, values, goal):
    """Return the share of the steps after which a curve first falls to the goal, linear between checkpoints.

    It is inf if the curve never does, and an upper bound if it has done so at the first checkpoint.
    """
    below = np.flatnonzero(np.asarray(values) <= goal)
    if not len(below):
        return np.inf
    i = below[0]
    at = np.interp(goal, values[i - 1:i + 1][::-1], steps[i - 1:i + 1][::-1]) if i else steps[0]
    return float(at / steps[-1])


def shares(steps, curves, goal):
    """Write when curves [seeds,steps] reach a goal, as shares of the steps."""
    found = [crossing(steps, curve, goal) for curve in curves]
    reached = [x for x in found if x < np.inf]
    if not reached:
        return "never"
    if len(reached) < len(found):
        return f"{len(reached)} of {len(found)} seeds"
    if min(found) == steps[0] / steps[-1]:                 # before the first checkpoint
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
    axes.set_yscale("log")
    axes.set_yticks((2, 3, 5, 7, 10, 15, 20, 30, 40), (2, 3, 5, 7, 10, 15, 20, 30, 40))
    axes.minorticks_off()


def distances(study, arm, rates, seeds):
    """Return an arm's mean distance over seeds at its default temperature, by rate."""
    own, _ = knobs_of(arm)
    found = study.figures("distance", [Run(arm, lr, seed) for lr in rates for seed in seeds], [own])
    return dict(zip(rates, found.reshape(len(rates), len(seeds)).mean(1)))


def tune(study):
    """Find each arm's best learning rate: of the two best at seed 0, the better over all seeds.

    Return {arm: its runs}, a run for each seed, and lines of the summary.
    """
    rates, seeds = study.set.rates, study.set.seeds
    study.train(Run(arm, lr, seeds[0]) for arm in ARMS for lr in rates)
    first = {arm: distances(study, arm, rates, seeds[:1]) for arm in ARMS}
    finalists = {arm: sorted(rates, key=first[arm].get)[:2] for arm in ARMS}
    study.train(Run(arm, lr, seed) for arm in ARMS for lr in finalists[arm] for seed in seeds)
    runs, rows = {}, []
    for arm in ARMS:
        means = distances(study, arm, finalists[arm], seeds)
        best = min(means, key=means.get)
        if means[best] == np.inf:
            raise InputError(f"{arm}: training failed at the two best rates; see failed.txt in {Path('runs').absolute()}")
        runs[arm] = [Run(arm, best, seed) for seed in seeds]
        cells = {lr: f"{x:.2f}" for lr, x in first[arm].items()}
        for lr, mean in means.items():
            cells[lr] += f" ({mean:.2f})"
        rows.append([arm, *cells.values()])
        if arm in SAME_PATH:
            rmse = over_time(study.denoising("rmse", [Run(arm, lr, seeds[0]) for lr in rates]))
            rows.append([f"{arm}, rmse", *(f"{x:.3f}" for x in rmse)])
    runs["shuffled"] = [run._replace(objective="shuffled") for run in runs["purrception"]]  # at Purrception's rate
    study.train(runs["shuffled"])
    head = "distance at seed 0 (mean over seeds) by learning rate", *(f"{lr:g}" for lr in rates)
    return runs, table(head, rows)


def converge(study, runs, pyplot):
    """Draw distance and rmse against training steps, at each arm's default temperature and at its best."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    rows, curves = [], {}
    marks = list(study.marks)
    for arm in (*ARMS, "shuffled"):
        own, knobs = knobs_of(arm)
        final = study.figures("distance", runs[arm], knobs).mean((0, 2))
        best = knobs[int(final.argmin())]
        curves[arm] = [study.figures("distance", runs[arm], [knob], marks)[:, 0] for knob in (own, best)]
        if arm in SAME_PATH:
            curves[arm].append(np.stack([over_time(study.denoising("rmse", runs[arm], step)) for step in marks], 1))
        for axes, curve in zip(panels, curves[arm]):
            draw_curve(axes, marks, curve, label=arm, color=TINT[arm])
        others = [study.figures(name, runs[arm], [best]) for name in ("precision", "recall")]
        ends = [shown(curve[:, -1], digits) for curve, digits in zip(curves[arm], (2, 2, 3))] + ["-"]
        rows.append([arm, f"{runs[arm][0].lr:g}", ends[0], best, ends[1], *map(shown, others), ends[2]])
    floor = study.floor()
    for axes, title in zip(panels, ("distance, default temperature", "distance, best temperature", "rmse(mu - z1)")):
        axes.set(title=title, xlabel="training steps")
    for axes in panels[:2]:
        axes.axhline(floor, ls=":", color="grey", label="real cats")
        log_scale(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig("convergence.png", dpi=100)
    head = "arm", "rate", "distance", "best tau or k", "distance there", "precision", "recall", "rmse"
    rows.append(["other real cats", "-", f"{floor:.2f}", *["-"] * 5])
    return table(head, rows) + race(curves, marks)


def race(curves, marks):
    """Tell after which share of its steps an arm reaches the other's mean end, by each of three measures."""
    rows = []
    for one, others in RIVALS.items():
        for other in others:
            found = [shares(marks, curve, end[:, -1].mean()) for curve, end in zip(curves[one], curves[other])]
            rows.append([f"{one} reaches {other}'s end", *found, *["-"] * (3 - len(found))])
    return table(["share of the steps after which", "distance, default", "distance, best", "rmse"], rows)


def heat(study, runs, pyplot):
    """Draw distance, and recall against precision, by temperature; make a sheet of one noise at each tau."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    rows = []
    names = "distance", "precision", "recall", "spread"
    for arm in ARMS:
        _, knobs = knobs_of(arm)
        found = [study.figures(name, runs[arm], knobs)[..., 0] for name in names]          # [seeds,knobs] each
        heats = 1 / np.array(knobs) if issubclass(OBJECTIVES[arm], CFM) else knobs
        draw_curve(panels[0], heats, found[0], label=arm, color=TINT[arm])
        panels[1].plot(found[1].mean(0), found[2].mean(0), ".-", label=arm, color=TINT[arm])
        rows += [[arm, knob, *(shown(x[:, i]) for x in found)] for i, knob in enumerate(knobs)]
    panels[0].set(xlabel="tau; regressions: 1/k", ylabel="Fréchet distance, judge")
    log_scale(panels[0])
    panels[1].set(xlabel="precision", ylabel="recall")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig("temperature.png", dpi=100)
    flow, vq, *_ = load_run(runs["purrception"][0].checkpoint(study.set.steps), study.device)
    with torch.inference_mode():
        drawn = [draw_codes(flow, 10, 0, study.device, steps=10, order=2, tau=tau)[0] for tau in TAUS]
        pictures = [decode_pixels(vq, codes) for codes in drawn]
    save_image("temperatures.png", torch.cat(pictures), 10)
    return table(["arm", "tau or k", *names], rows)


def denoise(study, runs, pyplot):
    """Draw rmse and cross-entropy on held-out grids by t."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    lines = []
    for axes, name in zip(panels, ("rmse", "ce")):
        rows = []
        for arm in ARMS:                                   # DFM's z_t is another one
            if name == "ce" and issubclass(OBJECTIVES[arm], CFM):
                continue
            found = study.denoising(name, runs[arm])       # [seeds,times]
            draw_curve(axes, TIMES, found, label=arm, color=TINT[arm], ls="-" if arm in SAME_PATH else ":")
            rows.append([arm, *(shown(found[:, i], 3) for i in range(len(TIMES)))])
        axes.set(xlabel="t", ylabel={"rmse": "rmse(mu - z1)", "ce": "cross-entropy, nats"}[name])
        lines += table([f"{name} at t =", *TIMES], rows)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig("denoising.png", dpi=100)
    return lines


def calibrate(study, runs, pyplot):
    """Draw how often the most likely code is right, by its probability."""
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharex=True, sharey=True)
    rows = []
    for axes, arm in zip(panels, ("purrception", "likelihood")):
        confidence, hits = np.moveaxis(study.denoising("tenths", runs[arm]), 2, 0)          # [seeds,times,10] each
        for name, values in dict(probability=confidence, right=hits, error=np.abs(confidence - hits)).items():
            rows.append([f"{arm}, {name}", *(shown(x, 3) for x in values.mean(2).T)])
        for i in (1, 3, 4, 5, 6):
            axes.loglog(confidence[:, i].mean(0), hits[:, i].mean(0), ".-", label=f"t = {TIMES[i]}")
        axes.plot([0.005, 1], [0.005, 1], ":", color="grey")
        axes.set(title=arm, xlabel="probability of the most likely code")
    panels[0].set_ylabel("share where it is right")
    panels[0].legend()
    figure.savefig("calibration.png", dpi=100)
    return table(["the most likely code at t =", *TIMES], rows)


def weigh_z_loss(study, runs, pyplot):
    """Draw the size of logsumexp at large learning rates, with the z-loss and without: a line for each seed."""
    first = runs["purrception"][0]
    groups = {(scale, bf16, weight): [first._replace(lr=scale * first.lr, seed=seed, z_loss=weight, bf16=bf16)
                                      for seed in study.set.seeds[:seeds]]
              for scale, seeds in DRIFT.items() for bf16 in (False, True) for weight in (1e-5, UNWEIGHTED)}
    study.train(run for group in groups.values() for run in group)
    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    panels = dict(zip(DRIFT, both))
    rows = []
    for (scale, bf16, weight), group in groups.items():
        kind = "bf16" if bf16 else "float32"
        style = dict(ls=":" if weight == UNWEIGHTED else "-", color="C1" if bf16 else "C0")
        logs = [run.log("z") for run in group]             # steps and z-loss
        sizes = [np.sqrt(z / weight) for _, z in logs]
        for i, (steps, _) in enumerate(logs):
            panels[scale].plot(steps, sizes[i], label=None if i else f"{kind}, {weight:g}", **style)
        ends = [size[-1] for size in sizes]
        tops = [size.max() for size in sizes]
        ce = [run.log("ce")[1][-5:].mean() for run in group]
        distances = study.figures("distance", group, [0.9])  # inf for a run that failed
        rows.append([f"{group[0].lr:g}", kind, f"{weight:g}", len(group), shown(ends, 1), shown(tops, 1), shown(ce),
                     shown(distances)])
    for scale, axes in panels.items():
        axes.set(title=f"{scale} times the best rate", xlabel="training steps")
    both[0].set_ylabel("root mean square of logsumexp")
    both[0].legend()
    figure.savefig("logsumexp.png", dpi=100)
    head = "rate", "type", "z-loss", "seeds", "logsumexp, end", "largest", "ce, end", "distance, tau 0.9"
    return table(head, rows)


def main():
    """Read the flags, answer the questions one by one, write the figures."""
    parser = argparse.ArgumentParser(description="The paper's claims, measured on the demo's cats.")
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate, short runs")
    parser.add_argument("--out", type=Path, help="folder to write; default: study, or study-quick")
    args = parser.parse_args()
    try:
        from matplotlib import pyplot
    except ImportError:
        parser.error("matplotlib is missing: pip install -r demo/requirements.txt")
    out = args.out or Path("study-quick" if args.quick else "study")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made ({error}); give another folder") from None
    os.chdir(out)                                          # train.py writes runs/ where it is started
    settings = QUICK if args.quick else FULL
    study = Study(settings, 1 if torch.cuda.is_available() else torch.get_num_threads())
    lines = [f"{json.dumps(settings)}; {study.device.type}, torch {torch.__version__}.", ""]
    runs, found = tune(study)
    lines += found
    for answer in (converge, heat, denoise, calibrate, weigh_z_loss):
        lines += answer(study, runs, pyplot)
        Path("summary.md").write_text("\n".join(lines))
    print(Path("summary.md").read_text())


if __name__ == "__main__":
    main()
