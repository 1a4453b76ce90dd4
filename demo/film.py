"""Picture how samples come about: a film strip of z_t, of mu_t, and of the posterior's entropy.

    python -m demo.film                     three samples of the newest run, film.png
    python -m demo.film --ckpt runs/xl2/ckpt.pt --classes 207 360 --out dogs.png

Columns are times from 0 to 1. Each sample has three rows: the decoded nearest codes of z_t; those
of mu_t, where the model believes the path to end; and the entropy of the posterior at every
position, in bits. In the last column z has landed on mu, and the entropy is that of the last step's
posterior.

Shapes: B samples, d code dimension, h w grid, K codes, H W pixels of a picture.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from sample import draw_noise, pick_classes
from train import load_run
from vq import InputError, save_image, setup_process, sheet

COLOURS = np.array([(10, 7, 40), (105, 20, 110), (215, 60, 75), (250, 155, 30), (252, 250, 180)])


def states(flow, y, z, steps, tau, cfg):
    """Follow noise z [B,d,h,w] of classes y [B] as flow.sample does.

    Yield (z, mu, bits) before each step, and once more at the end, when no step is left to take: mu
    and the entropy bits [B,h,w] are then those of the last one.
    """
    for s in range(steps):
        t = torch.full((len(y),), s / steps, device=z.device)
        pi = flow.posterior(z, t, y, tau, cfg)                  # [B,h,w,K]
        mu = (pi @ flow.codebook).movedim(-1, 1)                # [B,d,h,w]
        bits = torch.special.entr(pi).sum(-1) / math.log(2)     # [B,h,w]
        yield z, mu, bits
        z = z + (mu - z) / (steps - s)                          # dt / (1 - t) = 1 / (T - s)
    yield z, mu, bits


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


@torch.inference_mode()
def film_strip(flow, vq, y, noise, steps, tau, cfg, columns=9):
    """Make the film strip of noise [B,d,h,w] and classes y [B]: uint8 [H',W',3]."""
    shown = sorted({round(s) for s in np.linspace(0, steps, columns)})
    top = math.log2(len(flow.codebook))
    frames = []
    for s, (z, mu, bits) in enumerate(states(flow, y, noise, steps, tau, cfg)):
        if s in shown:
            now = vq.decode_pixels(flow.nearest(z)).numpy()     # [B,H,W,3]
            end = vq.decode_pixels(flow.nearest(mu)).numpy()
            entropy = heat(bits.cpu().numpy(), top, vq.factor)
            frames.append(np.stack([now, end, entropy], 1))     # [B,3,H,W,3]
    tiles = np.stack(frames, 2).reshape(-1, *frames[0].shape[2:])
    page = caption(sheet(tiles, len(shown)), [f"t={s / steps:.2f}" for s in shown])
    scale = heat(np.linspace(0, top, page.shape[1])[None, None], top, 1)[0].repeat(8, 0)
    scale = caption(scale, ["0 bits", f"{top / 2:.1f}", f"{top:.1f} bits of entropy"])
    return np.concatenate([page, scale])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Picture how samples come about.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint; None: that of the newest run")
    add("--data", help="data directory, if it has moved since training")
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names; None: the first three")
    add("--tau", type=float, default=0.9, help="temperature")
    add("--cfg-scale", type=float, default=1.0, help="guidance scale; 1: off")
    add("--steps", type=int, default=100, help="Euler steps")
    add("--seed", type=int, default=0, help="seed of the noise, as in sample.py")
    add("--out", type=Path, default="film.png", help="picture to write")
    args = parser.parse_args(argv)
    _, _, device = setup_process()
    run = load_run(args.ckpt, args.data, device)
    if run.args.objective != "purrception":
        raise InputError(f"--ckpt {run.ckpt}: of --objective {run.args.objective}, which has no "
                         "posterior mean to show; give one of purrception")
    names = run.data.meta["classes"]
    y = torch.tensor(pick_classes(args.classes or names[:3], names), device=device)
    noise = draw_noise(run.flow, range(len(y)), args.seed)
    strip = film_strip(run.flow, run.vq, y, noise, args.steps, args.tau, args.cfg_scale)
    save_image(args.out, strip)
    print(args.out)


if __name__ == "__main__":
    main()
