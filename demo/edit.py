"""Edit a picture, with flow.py as a library: vary it, change its class, paint a part of it anew.

    python -m demo.edit --from demo/cat.png --start 0.5                    variations in each class
    python -m demo.edit --from demo/cat.png --keep 0 0 64 32 --resample 4  a new lower half

The picture is cropped and encoded as vq.py does. Sampling starts on the path from noise to its
codes, at time --start: the later, the more of the picture stays. Codes in the box --keep end as
they are; the others are sampled around them. Each repeat of --resample puts new noise on the
result, less each time, and samples on from there, so that the rest comes to fit (RePaint, arXiv
2201.09865, with jumps from the end). Image i has the noise of sample.py's image i. OUT.png is a
sheet of all.

Shapes: n images, h w grid of codes, H W pixels.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from flow import sample_beyond
from sample import TAU, pick_classes
from train import load_run, seeded
from vq import InputError, crop, from_pixels, read_image, save_image, setup_process


class Edited:
    """A method that starts on its path, and whose mean is e_k wherever code k is known.

    So all paths end in the known codes. Where a sampler says u, it is at t = start + (1 - start) u;
    dz/du = (mu - z) / (1 - u) then is what dz/dt = (mu - z) / (1 - t) was.
    known: codes [1,h,w], -1 where any may be chosen.
    """

    def __init__(self, flow, known, start=0.0):
        self.flow = flow
        self.known = known
        self.free = known < 0
        self.start = start

    def mean(self, z, u, *settings):
        t = self.start + (1 - self.start) * u
        z1 = self.flow.embed(self.known.clamp(0))
        mu = self.flow.mean(z, t, *settings)
        return torch.where(self.free.unsqueeze(1), mu, z1)

    def nearest(self, z):
        return torch.where(self.free, self.flow.nearest(z), self.known)


def kept_codes(codes, box, vq):
    """Return the codes [1,h,w] inside a box of pixels, rounded outwards, and -1 outside of it."""
    side = codes.shape[1] * vq.factor
    left, top, right, bottom = box
    if not (0 <= left < right <= side and 0 <= top < bottom <= side):
        raise InputError(f"--keep {left} {top} {right} {bottom}: not left, top, right and bottom "
                         f"of a box in {side}x{side} pixels")
    rows = slice(top // vq.factor, -(-bottom // vq.factor))
    columns = slice(left // vq.factor, -(-right // vq.factor))
    known = torch.full_like(codes, -1)
    known[:, rows, columns] = codes[:, rows, columns]
    return known


def edit(run, args):
    """Make the images, uint8 [n,H,W,3]."""
    flow, vq = run.flow, run.vq
    device = flow.codebook.device
    pixels = crop(read_image(args.picture), run.data.meta["image_size"])
    picture = vq.encode(from_pixels(pixels[None]).to(device))   # [1,h,w]
    known = kept_codes(picture, args.keep, vq) if args.keep else torch.full_like(picture, -1)

    y = torch.from_numpy(np.resize(args.classes, args.num_samples)).to(device)
    generators = [seeded("cpu", args.seed, i) for i in range(len(y))]
    codes = picture
    for start in np.linspace(args.start, 1, args.resample + 2)[:-1].tolist():
        z0 = torch.cat([flow.prior(1, generator) for generator in generators]).to(device)
        z = flow.path(z0, codes, torch.full((len(y),), start, device=device))
        edited = Edited(flow, known, start)
        codes = sample_beyond(edited, y, args.steps, args.tau, args.cfg_scale, z, args.order)
    # The decoder sees all codes, so that kept ones look a little different: put them back.
    kept = (known >= 0).cpu().repeat_interleave(vq.factor, 1).repeat_interleave(vq.factor, 2)
    return torch.where(kept.unsqueeze(3), vq.decode_pixels(picture), vq.decode_pixels(codes))


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Edit a picture.", usage="%(prog)s --from PICTURE [flags]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--from", dest="picture", required=True, metavar="PICTURE", help="picture to start from")
    add("--start", type=float, default=0.0, help="time to start at")
    add("--keep", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="box of pixels to keep")
    add("--resample", type=int, default=0, help="repeats, to fit the box")
    add("--ckpt", type=Path, help="checkpoint; None: that of the newest run")
    add("--data", help="data directory, if it has moved since training")
    add("--num-samples", type=int, default=10, help="images to make")
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names, in turn; None: all")
    add("--tau", type=float, help="temperature; None: sample.py's")
    add("--cfg-scale", type=float, default=1.0, help="guidance scale; 1: off")
    add("--steps", type=int, default=100, help="steps, one network call each")
    add("--order", type=int, choices=(1, 2), default=1, help="1: Euler steps; 2: ten are enough")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--out", type=Path, default="edit.png", help="sheet to write")
    args = parser.parse_args(argv)
    if not 0 <= args.start < 1 or not (args.start or args.keep):
        parser.error("give --start, a time between 0 and 1, or --keep, a box, or both")
    _, _, device = setup_process()
    run = load_run(args.ckpt, args.data, device)
    if run.args.objective == "dfm":
        raise InputError(f"--ckpt {run.ckpt}: of --objective dfm, which has no mean")
    if args.tau and run.args.objective not in TAU:
        raise InputError(f"--tau: {run.ckpt} is of a regression, which has no posterior")
    args.tau = args.tau or TAU.get(run.args.objective)
    args.classes = pick_classes(args.classes, run.data.meta["classes"])
    columns = 10 - 10 % len(args.classes) or 10  # whole rounds of classes
    save_image(args.out, edit(run, args), columns)
    print(args.out)


if __name__ == "__main__":
    main()
