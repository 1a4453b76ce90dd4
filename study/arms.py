"""The arms of the study: methods, variants and baselines, and how each is trained.

Shapes: B batch, d code dimension, h w grid.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from demo.cats.cats import HERE
from flow import CFM, DFM, OBJECTIVES, Purrception
from sample import TAU

VARIANCE = 1.47, 1.34, 0.34, 0.04               # of the cats' code vectors, by channel
TAUS = 0.3, 0.5, 0.7, 0.9, 1.0, 1.2
FALLING = 1.1, 0.3                              # tau at t = 0 and at t = 1
RESCALINGS = 0.6, 0.8, 1.0, 1.2, 1.5, 2.0       # k of rescaled(), a regression's temperatures


class Shuffled(Purrception):
    """Purrception where each code has the vector of another.

    Neighbours in its codebook do not look alike. Samples are decoded with the true vectors.
    """

    def __init__(self, model, codebook, *settings):
        order = np.random.default_rng(0).permutation(len(codebook))
        super().__init__(model, codebook[order], *settings)


class Released(DFM):
    """DFM with the sampler of the authors' release (sample_dfm there).

    A step draws each position anew with probability 1 / (T (1 - t)), unmasked ones, too. There are
    T - 1 steps, from t = 1e-4 on, and the last also draws what is still masked. The release's code
    masks codes again and takes an arg max, but overwrites the results of both.
    """

    @torch.no_grad()
    def sample(self, y, steps=100, tau=1.0, cfg=1.0, noise=None):
        noise = self.prior(len(y)) if noise is None else noise
        masked = len(self.codebook)
        z = torch.full_like(noise[:, 0], masked, dtype=torch.long)
        for s in range(steps - 1):
            t = 1e-4 + s / steps
            pi = self.posterior(z, torch.full_like(y, t, dtype=torch.float), y, tau, cfg)
            drawn = torch.multinomial(pi.flatten(0, 2), 1).view_as(z)
            due = torch.rand_like(noise[:, 0]) < 1 / (steps * (1 - t))
            if s == steps - 2:
                due |= z == masked
            z = torch.where(due, drawn, z)
        return z


OBJECTIVES |= dict(shuffled=Shuffled, released=Released)


class Arm(NamedTuple):
    """What is compared: an objective of train.py, its flags beyond the paper, a colour."""

    objective: str
    colour: str
    flags: tuple = ()

    @property
    def regresses(self):
        return issubclass(OBJECTIVES[self.objective], CFM)

    @property
    def same_path(self):
        """Whether z_t means the same as Purrception's, so that rmse and ce can be compared."""
        return not issubclass(OBJECTIVES[self.objective], DFM)

    @property
    def knobs(self):
        """The default temperature, which is sample.py's, and all temperatures tried."""
        if self.regresses:
            return 1.0, RESCALINGS
        if self.objective == "released":        # it has no temperature
            return 1.0, (1.0,)
        return TAU["purrception" if self.same_path else "dfm"], TAUS

    @property
    def falls(self):
        """Whether its temperature can fall with t."""
        return self.same_path and not self.regresses


ARMS = {
    "cfm": Arm("cfm", "C0"),
    "cfm-logit-normal": Arm("cfm", "C7", ("--logit-normal",)),
    "endpoint": Arm("endpoint", "C4"),
    "purrception": Arm("purrception", "C1"),
    "logit-normal": Arm("purrception", "C6", ("--logit-normal",)),
    "geometric": Arm("purrception", "C8", ("--geometric-head",)),
    "geometric-logit-normal": Arm("purrception", "C9", ("--geometric-head", "--logit-normal")),
    "dfm": Arm("dfm", "C2"),
    "released": Arm("released", "C3"),
    "shuffled": Arm("shuffled", "C5"),
}
BORROWED = {"released": "dfm", "shuffled": "purrception"}   # whose learning rate they take
TUNED = tuple(name for name in ARMS if name not in BORROWED)


def rescaled(mean, k):
    """Return a mean whose velocity samples 1/k of the variance of z1, s^2 (arXiv 2510.01184).

    v <- r v + (1 - r) z / t,    r = (t^2 s^2 + (1 - t)^2) / (t^2 s^2 / k + (1 - t)^2)

    As mu = z + (1 - t) v, this is mu <- r mu + (1 - r) z / t.
    """
    def cooler(z, t, y, tau=None, cfg=1.0):
        t_ = t.view(-1, 1, 1, 1)
        variance = torch.tensor(VARIANCE, device=z.device).view(1, -1, 1, 1)
        total = t_ ** 2 * variance / k + (1 - t_) ** 2
        r = (t_ ** 2 * variance + (1 - t_) ** 2) / total
        over_t = t_ * variance * (1 / k - 1) / total    # (1 - r) / t
        return r * mean(z, t, y, tau, cfg) + over_t * z

    return cooler


class Run(NamedTuple):
    """A training: what tells it from the others."""

    arm: str
    lr: float
    seed: int

    @property
    def folder(self):
        return Path("runs", f"{self.arm}-lr{self.lr:g}-seed{self.seed}")

    def checkpoint(self, step):
        return self.folder / f"ckpt-{step:07d}.pt"


def flags_of(run, steps, every, batch):
    """Return train.py's flags for a run: the paper's, in float32, but for rate and length.

    Runs are short, so that the rate warms up and the ramp limits the average. Of the demo's recipe,
    what goes beyond the paper is turned off unless the arm is about it.
    """
    settings = dict(
        data=HERE, name=run.folder.name, objective=ARMS[run.arm].objective, lr=run.lr,
        seed=run.seed, steps=steps, global_batch_size=batch, warmup=100, cooldown=0,
        ckpt_every=every, keep_every=every, sample_every=0, log_every=20)
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    plain = ["--ema-ramp", "--no-geometric-head", "--no-logit-normal", "--no-bf16"]
    return words + plain + list(ARMS[run.arm].flags)
