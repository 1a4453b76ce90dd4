"""Measure a trained run: its denoising on held-out code grids, and its samples.

Shapes: B batch, n grids, h w grid, K codes, d code dimension.
"""
import functools

import numpy as np
import torch

from demo.cats.cats import HERE
from flow import CFM, DFM
from study import judge
from study.arms import rescaled
from study.samplers import draw_codes
from train import load_run, seeded
from vq import from_pixels, load_vq, setup_process

TIMES = 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99


@functools.cache
def references(device):
    """Load the judge, what it sees in real cats, the tokenizer, and held-out codes [500,h,w]."""
    eye = judge.load_judge(device)
    vq = load_vq(HERE / "tokenizer.pt", device)
    pixels = np.load(HERE / "reference.npz")["arr_0"]
    codes = [vq.encode(from_pixels(part).to(device)) for part in np.split(pixels, 10)]
    return eye, judge.reference(eye, vq, device), vq, torch.cat(codes)


@torch.inference_mode()
def measure(task):
    """Measure a run at a step: its samples at a temperature `knob` or, if None, its denoising."""
    _, _, device = setup_process()
    run, step, knob, images, grids = task
    flow = load_run(run.checkpoint(step), device=device).flow
    if knob is None:
        _, _, _, codes = references(device)
        return measure_denoising(flow, codes[:grids])
    return measure_samples(flow, device, images, knob, run.seed)


def measure_samples(flow, device, images, knob, seed):
    """Judge samples at a tau or, of a regression, with its mean rescaled by k.

    They take 10 calls of order 2, DFM's 50 steps. A tau may be a pair, at t = 0 and at t = 1.
    """
    eye, real, vq, _ = references(device)
    torch.manual_seed(seed)     # the release's sampler draws in each step
    if isinstance(flow, DFM):
        settings = dict(steps=50, tau=knob)
    elif isinstance(flow, CFM):
        flow.mean = rescaled(flow.mean, knob)
        settings = dict(steps=10, order=2, tau=None)
    elif isinstance(knob, tuple):
        start, end = knob
        settings = dict(steps=10, order=2, tau=start, tau_end=end)
    else:
        settings = dict(steps=10, order=2, tau=knob)
    codes, coats = draw_codes(flow, images, seed, **settings)
    return judge.figures(judge.look(eye, vq.decode_pixels(codes)), coats, real)


def measure_denoising(flow, codes):
    """Compare mu and pi with the truth on code grids [n,h,w], by TIMES.

    Return lists over TIMES: rmse and, where there is a posterior, ce in nats a position, and over
    tenths of the positions pi's probability of its best code and the share where it is right
    (hits), and pi's own variance, sum_k pi_k |e_k - mu|^2, and the error |mu - z1|^2 (errors).
    """
    found = dict(rmse=[], ce=[], hits=[], errors=[])
    for t in TIMES:
        for name, value in denoise_at(flow, codes, t).items():
            found[name].append(value)
    return found


def denoise_at(flow, codes, t):
    """Return rmse, ce, hits and errors at a time t. In the first two, DFM knows what it sees."""
    generator = seeded("cpu", 0, round(1000 * t))
    coats = torch.arange(len(codes), device=codes.device) % flow.model.num_classes
    squares = []
    nats = []
    guesses = []
    errors = []
    for c, y in zip(codes.split(50), coats.split(50)):
        z0 = flow.prior(len(c), generator).to(c.device)
        time = torch.full((len(c),), t, device=c.device)
        z = flow.path(z0, c, time)
        z1 = flow.embed(c)
        if isinstance(flow, CFM):
            mu = flow.mean(z, time, y)
        else:
            pi = flow.posterior(z, time, y)                     # [B,h,w,K]
            E = flow.codebook
            mean = pi @ E                                       # [B,h,w,d]
            variance = pi @ E.square().sum(1) - mean.square().sum(3)
            mu = mean.movedim(-1, 1)
            error = (mu - z1).square().sum(1)
            errors.append(torch.stack([variance, error]).flatten(1))
            p = pi.gather(3, c.unsqueeze(3)).squeeze(3)         # [B,h,w]
            if isinstance(flow, DFM):
                known = z < len(flow.codebook)
                mu = torch.where(known.unsqueeze(1), z1, mu)
                p = p.masked_fill(known, 1.0)
            confidence, guess = pi.max(3)
            nats.append(-p.clamp(min=1e-30).log())
            guesses.append(torch.stack([confidence, guess == c]).flatten(1))
        squares.append((mu - z1).square())
    found = dict(rmse=torch.cat(squares).mean().sqrt().item())
    if nats:
        found["ce"] = torch.cat(nats).mean().item()
        found["hits"] = tenths(torch.cat(guesses, 1))
        found["errors"] = tenths(torch.cat(errors, 1))
    return found


def tenths(pairs):
    """Average what was expected and found [2,positions] over tenths of the positions: [2,10] lists.

    The tenth where the least was expected comes first.
    """
    order = pairs[0].argsort(stable=True)
    parts = pairs[:, order].tensor_split(10, 1)
    return torch.stack([part.mean(1) for part in parts], 1).tolist()
