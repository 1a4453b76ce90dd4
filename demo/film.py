"""Picture how samples come about: a film strip of z_t, of mu_t, and of the posterior's entropy.

    python demo/film.py --tau 0.9                          three samples of the newest run, in film.png
    python demo/film.py --ckpt runs/xl2/ckpt.pt --classes 207 360 --steps 100 --out dogs.png

Columns are times from 0 to 1. Each sample has three rows: the decoded nearest codes of z_t; those of mu_t, where the
model believes the path to end; and the entropy of the posterior at every position, in bits. In the last column z has
landed on mu, and the entropy is that of the last step's posterior.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import load_run, noise_source, pick_classes  # noqa: E402
from train import newest_run  # noqa: E402
from vq import decode_pixels, save_image, sheet, start_process  # noqa: E402

COLOURS = np.array([(10, 7, 40), (105, 20, 110), (215, 60, 75), (250, 155, 30), (252, 250, 180)])


def heat(values, top, zoom):
    """Colour values [B,h,w] from 0, dark, to top, light: uint8 [B,h*zoom,w*zoom,3]."""
    anchors = np.linspace(0, top, len(COLOURS))
    channels = [np.interp(values, anchors, channel) for channel in COLOURS.T]
    return np.stack(channels, -1).round().astype(np.uint8).repeat(zoom, 1).repeat(zoom, 2)


def caption(pixels, words, height=14):
    """Write words, evenly spread, on a white strip above the picture uint8 [H,W,3]."""
    page = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + height), "white")
    page.paste(Image.fromarray(pixels), (0, height))
    for i, word in enumerate(words):
        ImageDraw.Draw(page).text((i * page.width / len(words) + 3, 1), word, fill="black")
    return np.asarray(page)


@torch.inference_mode()
def film_strip(flow, vq, y, z, steps, tau, cfg, columns=9):
    """Follow noise z [B,d,h,w] of classes y [B] as sample() does, and return the film strip, uint8 [H,W,3]."""
    shown = sorted({round(s) for s in np.linspace(0, steps, columns)})
    top = math.log2(len(flow.codebook))
    frames = []
    for s in range(steps + 1):
        if s < steps:                                      # at s = T there is no step left to take
            t = torch.full((len(y),), s / steps, device=z.device)
            pi = flow.posterior(z, t, y, tau, cfg)         # [B,h,w,K]
            mu = (pi @ flow.codebook).movedim(-1, 1)       # [B,d,h,w]
        if s in shown:
            bits = torch.special.entr(pi).sum(-1) / math.log(2)
            pictures = [decode_pixels(vq, flow.nearest(x)).numpy() for x in (z, mu)]
            frames.append([*pictures, heat(bits.cpu().numpy(), top, vq.factor)])
        z = z + (mu - z) / max(1, steps - s)               # dt / (1 - t) = 1 / (T - s)
    pixels = np.stack([np.stack(frame, 1) for frame in frames], 2)                   # [B,3,columns,H,W,3]
    page = sheet(pixels.reshape(-1, *pixels.shape[3:]), len(shown))
    page = caption(page, [f"t={s / steps:.2f}" for s in shown])
    scale = heat(np.linspace(0, top, page.shape[1])[None, None], top, 1)[0].repeat(8, 0)
    return np.concatenate([page, caption(scale, ["0 bits", f"{top / 2:.1f}", f"{top:.1f} bits of entropy"])])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Picture how samples come about.")
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint; default: that of the newest run")
    add("--data", help="data directory, if it has moved since training")
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names; default: the first three")
    add("--tau", type=float, default=0.9, help="temperature")
    add("--cfg-scale", type=float, default=1.0, help="guidance; 1: off")
    add("--steps", type=int, default=100, help="Euler steps")
    add("--seed", type=int, default=0, help="seed of the noise, as in sample.py")
    add("--out", type=Path, default="film.png", help="picture to write")
    args = parser.parse_args(argv)
    if args.steps < 1 or not args.tau > 0:
        parser.error("--steps and --tau must be above 0")
    _, _, device = start_process()
    ckpt = args.ckpt or newest_run() / "ckpt.pt"
    flow, vq, data, settings, _ = load_run(ckpt, device, args.data)
    if settings.objective != "purrception":
        parser.error(f"--ckpt: {ckpt} was trained with --objective {settings.objective}, which has no mean to show")
    classes = pick_classes(args.classes, data.meta["classes"])
    y = torch.tensor(classes if args.classes else classes[:3], device=device)
    noise = noise_source(flow, range(len(y)), args.seed, device)()
    save_image(args.out, film_strip(flow, vq, y, noise, args.steps, args.tau, args.cfg_scale))
    print(args.out)


if __name__ == "__main__":
    main()
