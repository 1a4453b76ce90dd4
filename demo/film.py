"""Picture how samples come about: a film strip of z_t, of mu_t, and of the posterior's entropy.

    python -m demo.film                     three samples of the newest run, film.png
    python -m demo.film --gif film.gif      and ten classes as a moving picture
    python -m demo.film --order 2 --steps 10 --cfg-scale 1.5 --classes siamese calico

Columns are times from 0 to 1. Each sample has three rows: the nearest codes of z_t, decoded; those
of the last mu, where the model believes the path to end; and the entropy of the posterior at every
position, in bits. In the last column z has landed, with --order 1 on mu; its posterior is taken at
t = 1 - 1/steps.

Shapes: B samples, d code dimension, h w grid, K codes, H W pixels of a picture.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from flow import sample_beyond
from sample import draw_noise, pick_classes
from train import load_run
from vq import InputError, save_image, setup_process, sheet, write_whole

COLOURS = np.array([(10, 7, 40), (105, 20, 110), (215, 60, 75), (250, 155, 30), (252, 250, 180)])


class Recorder:
    """A method that remembers the (t, z, mu) at the start of each step, and where z ends."""

    def __init__(self, flow):
        self.flow = flow
        self.calls = []

    def mean(self, z, t, *settings):
        mu = self.flow.mean(z, t, *settings)
        self.calls.append((t[0].item(), z, mu))
        return mu

    def nearest(self, z):
        self.calls.append((1.0, z, None))
        return self.flow.nearest(z)


def follow(run, classes, args):
    """Sample an image of each class [B]; return y and (t, z, mu) at the start and after each step.

    mu is that of the step; at the start, that of the first one.
    """
    flow = run.flow
    y = torch.tensor(classes, device=flow.codebook.device)
    noise = draw_noise(flow, range(len(y)), args.seed)
    recorder = Recorder(flow)
    sample_beyond(recorder, y, args.steps, args.tau, args.cfg_scale, noise, args.order)
    times, points, means = zip(*recorder.calls)
    return y, list(zip(times, points, means[:1] + means[:-1]))


def decode(run, z):
    """Decode the nearest codes of z [B,d,h,w]: uint8 [B,H,W,3]."""
    return run.vq.decode_pixels(run.flow.nearest(z)).numpy()


def evenly(states, count):
    """Choose so many states, evenly spread, with the first and the last."""
    chosen = np.linspace(0, len(states) - 1, count).round()
    return [states[int(i)] for i in sorted(set(chosen))]


def heat(values, top, zoom):
    """Colour values [B,h,w] from 0, dark, to top, light: uint8 [B,h*zoom,w*zoom,3]."""
    anchors = np.linspace(0, top, len(COLOURS))
    channels = [np.interp(values, anchors, channel) for channel in COLOURS.T]
    pixels = np.stack(channels, -1).round().astype(np.uint8)
    return pixels.repeat(zoom, 1).repeat(zoom, 2)


def caption(pixels, words, height=14):
    """Write words, evenly spread, on a white strip above the picture uint8 [H,W,3]."""
    page = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + height), "white")
    page.paste(Image.fromarray(pixels), (0, height))
    pen = ImageDraw.Draw(page)
    for i, word in enumerate(words):
        pen.text((i * page.width / len(words) + 3, 1), word, fill="black")
    return np.asarray(page)


def film_strip(run, y, states, args):
    """Draw a column for each of the states: uint8 [H',W',3]."""
    top = math.log2(len(run.flow.codebook))
    columns = []
    for t, z, mu in states:
        time = torch.full((len(y),), min(t, 1 - 1 / args.steps), device=z.device)
        pi = run.flow.posterior(z, time, y, args.tau, args.cfg_scale)  # [B,h,w,K]
        bits = torch.special.entr(pi).sum(-1) / math.log(2)         # [B,h,w]
        entropy = heat(bits.cpu().numpy(), top, run.vq.factor)
        columns.append(np.stack([decode(run, z), decode(run, mu), entropy], 1))  # [B,3,H,W,3]
    tiles = np.stack(columns, 2).reshape(-1, *columns[0].shape[2:])
    page = caption(sheet(tiles, len(states)), [f"t={t:.2f}" for t, _, _ in states])
    scale = heat(np.linspace(0, top, page.shape[1])[None, None], top, 1)[0].repeat(8, 0)
    scale = caption(scale, ["0 bits", f"{top / 2:.1f}", f"{top:.1f} bits"])
    return np.concatenate([page, scale])


def save_movie(path, run, states):
    """Write a GIF of the decoded nearest codes of z_t, which stays on its last picture."""
    frames = []
    for t, z, _ in states:
        page = sheet(decode(run, z), min(5, len(z)))
        page = caption(page, [f"t = {t:.2f}: the nearest codes, decoded"])
        frames.append(Image.fromarray(page).quantize(128))
    first, *others = frames
    times = [110] * len(others) + [2500]             # milliseconds
    with write_whole(path) as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=times, loop=0)


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Picture how samples come about.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint; None: the newest")
    add("--data", help="data directory, if it has moved since training")
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names; None: the first three")
    add("--tau", type=float, default=0.9, help="temperature")
    add("--cfg-scale", type=float, default=1.0, help="guidance scale; 1: off")
    add("--steps", type=int, default=100, help="steps, one network call each")
    add("--order", type=int, choices=(1, 2), default=1, help="1: Euler steps; 2: ten are enough")
    add("--seed", type=int, default=0, help="seed of the noise, as in sample.py")
    add("--out", type=Path, default="film.png", help="picture to write")
    add("--gif", type=Path, help="moving picture to write, of the first ten classes")
    args = parser.parse_args(argv)
    _, _, device = setup_process()
    run = load_run(args.ckpt, args.data, device)
    if run.args.objective != "purrception":
        raise InputError(f"--ckpt {run.ckpt}: of --objective {run.args.objective}, which has no "
                         "posterior mean to show; give one of purrception")
    names = run.data.meta["classes"]
    y, states = follow(run, pick_classes(args.classes or names[:3], names), args)
    save_image(args.out, film_strip(run, y, evenly(states, 9), args))
    print(args.out)
    if args.gif:
        _, states = follow(run, range(min(10, len(names))), args)
        save_movie(args.gif, run, evenly(states, 34))
        print(args.gif)


if __name__ == "__main__":
    main()
