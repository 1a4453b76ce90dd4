"""Sample images from a checkpoint: noise -> Purrception -> codes -> tokenizer -> PNG files.

    python sample.py --tau 0.9                      the newest run's averaged weights, into samples/
    python sample.py --tau 0.3 0.6 0.9 1.2          one sheet, a row for each temperature (Figure 5)
    python sample.py --cfg-scale 2 --classes siamese calico 0 --out cats
    torchrun --nproc_per_node=8 sample.py --ckpt runs/xl2/ckpt.pt --num-samples 50000 --cfg-scale 1.3 --npz

Beyond the paper:

    python sample.py --steps 10 --order 2                              ten network calls for a hundred
    python sample.py --from cat.png --start 0.5                        variations of a picture
    python sample.py --from cat.png --keep 0 0 64 32 --resample 4      a new lower half for it

Image i depends only on the checkpoint, the flags and (seed, i), in bf16 up to rounding: it has its own noise,
and classes are used in turn. So one process or eight make the same images, and an interrupted run goes on.
samples.json records the flags; samples.png is a contact sheet.
"""
import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from train import (bf16_is_fast, build, compile_blocks, flags, load_weights, newest_run, number, open_data,
                   open_tokenizer, read_run, seeded)
from vq import (InputError, claim_folder, decode_pixels, from_pixels, open_image, replacing, save_image,
                start_process)

SHOWN = 100  # images on the sheet
TAU = {"purrception": 0.9, "dfm": 1.0}  # defaults; others have none
BEYOND = "order", "interval", "picture", "start", "keep", "resample"  # not the paper's


def load_run(path, device, data=None):
    """Load a checkpoint: the method with averaged weights, the tokenizer, Data, args and step."""
    ckpt = read_run(path)
    args = argparse.Namespace(**vars(flags().parse_args([])) | ckpt["args"])
    data = open_data(data or args.data)
    vq = open_tokenizer(data, device)
    with torch.device("meta"):  # the checkpoint has the weights
        flow = build(args, data.meta, vq.codebook, data.codes.shape[1])
    flow.model.to_empty(device=device)
    load_weights(path, (flow.model, ckpt["ema"]))
    return flow.eval().requires_grad_(False), vq, data, args, ckpt["step"]


def pick_classes(wanted, names):
    """Convert class names or numbers to numbers; None means all."""
    numbers = {str(i): i for i in range(len(names))}
    numbers |= {name: i for i, name in enumerate(names)}
    for name in wanted or ():
        if name not in numbers:
            raise InputError(f"--classes {name}: no such class; give numbers from 0 to {len(names) - 1} or "
                             f"names such as {', '.join(map(repr, names[:3]))}")
    return [numbers[name] for name in wanted or names]


def noise_source(flow, indices, seed, device):
    """Make a function that draws noise [B,d,h,w] from (seed, i), new at each call."""
    generators = [seeded("cpu", seed, i) for i in indices]
    return lambda: torch.cat([flow.prior(1, generator) for generator in generators]).to(device)


def encode_picture(args, vq, size, device):
    """Encode the picture --from: its codes [1,h,w], and those inside the box --keep, -1 outside."""
    codes = vq.encode(from_pixels(open_image(args.picture, size)[None]).to(device))
    known = torch.full_like(codes, -1)
    if args.keep:
        x0, y0, x1, y1 = args.keep
        if not (0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size):
            raise InputError(f"--keep {x0} {y0} {x1} {y1}: not left, top, right and bottom of a box in "
                             f"{size}x{size} pixels")
        f = vq.factor
        rows = slice(y0 // f, -(-y1 // f))
        columns = slice(x0 // f, -(-x1 // f))
        known[:, rows, columns] = codes[:, rows, columns]
    return codes, known


def save_temperatures(draw, taus, args):
    """Save a sheet of the first images, a row for each temperature."""
    shown = range(min(args.num_samples, 10))
    rows = [draw(shown, tau) for tau in tqdm(taus, "temperatures")]
    save_image(f"{args.out}-temperatures.png", torch.cat(rows), len(shown))
    print(f"{args.out}-temperatures.png")


def fill_folder(draw, args, rank, world):
    """Make this process's share of the images missing in args.out."""
    paths = [args.out / f"{i:06d}.png" for i in range(args.num_samples)]
    todo = [i for i in range(rank, args.num_samples, world) if not paths[i].exists()]
    saved = []
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(todo), unit=" images", disable=rank > 0) as bar:
        for at in range(0, len(todo), args.per_proc_batch_size):
            batch = todo[at:at + args.per_proc_batch_size]
            pixels = draw(batch)
            list(saved)  # await the last batch, or raise its error
            saved = pool.map(save_image, [paths[i] for i in batch], pixels)
            bar.update(len(batch))
        list(saved)
    return paths


def finish_folder(paths, args, columns):
    """Wait for all images; write the sheet and, if asked for, the .npz file."""
    while not all(path.exists() for path in paths):
        time.sleep(0.5)
    def read(paths):
        return np.stack([np.asarray(Image.open(path)) for path in paths])

    save_image(f"{args.out}.png", read(paths[:SHOWN]), columns)
    if args.npz:
        with replacing(f"{args.out}.npz") as file:
            np.savez(file, arr_0=read(paths))
    print(f"{len(paths)} images in {args.out}/, a sheet in {args.out}.png; next: python fid.py {args.out}/")


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Sample images from a checkpoint.", usage="%(prog)s [flags]",
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=30))
    add = parser.add_argument_group("what to sample").add_argument
    add("--ckpt", type=Path, help="checkpoint; None: that of the newest run")
    add("--data", help="data directory, if it has moved since training")
    add("--num-samples", type=number(int, 1), default=256, metavar="N", help="images to make")
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names, used in turn; None: all")
    add("--seed", type=number(int, 0), default=0, help="seed of the noise")
    add("--out", type=Path, default="samples", help="folder for the PNG files")
    add("--npz", action="store_true", help="also write them to OUT.npz, for ADM's evaluator")
    add = parser.add_argument_group("the paper's sampler").add_argument
    add("--tau", type=number(float, 1e-30), nargs="+",
        help="temperature; None: 0.9 (dfm: 1); several: one sheet, a row each")
    add("--cfg-scale", type=number(float, -1e9), default=1.0, metavar="W", help="guidance scale; 1: off")
    add("--steps", type=number(int, 1), default=100, metavar="T", help="steps, one network call each")
    add = parser.add_argument_group("beyond the paper").add_argument
    add("--order", type=int, choices=(1, 2), default=1, help="1: Euler steps; 2: ten are enough")
    add("--cfg-interval", dest="interval", type=number(float, 0, 1.01), nargs=2, metavar=("LO", "HI"),
        default=[0, 1], help="guide only at times t from LO to HI")
    add("--from", dest="picture", help="start from this picture, cropped as vq.py does")
    add("--start", type=number(float, 0, 1), default=0.0, metavar="t", help="time to start at; 0: noise")
    add("--keep", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"),
        help="box of its pixels to keep, rounded outwards to whole codes")
    add("--resample", type=number(int, 0), default=0, metavar="R", help="repeats, to fit the box")
    add = parser.add_argument_group("speed").add_argument
    add("--per-proc-batch-size", type=number(int, 1), default=64, metavar="N", help="images in a batch")
    add("--compile", action="store_true", help="torch.compile the transformer's blocks")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="bf16 autocast; None: on a GPU that has it; off: images do not depend on the batch")
    args = parser.parse_args(argv)
    if args.npz and args.tau and len(args.tau) > 1:
        parser.error("--npz: give only one --tau")
    if bool(args.picture) != bool(args.start or args.keep):
        parser.error("--from needs --start above 0 or --keep, and they need --from")
    if args.resample and not args.keep:
        parser.error("--resample: needs --keep")
    if args.interval[0] > args.interval[1]:
        parser.error("--cfg-interval: LO must not be above HI")
    return parser, args


def check(parser, args, ckpt, settings, beyond):
    """Exit with code 2 if the run cannot do what the flags ask for."""
    if settings.objective == "dfm" and beyond:
        parser.error(f"{ckpt}: was trained with --objective dfm; only use the paper's flags")
    if settings.objective not in TAU and args.tau:
        parser.error(f"--tau: {ckpt} was trained with --objective {settings.objective}, without a "
                     "posterior; leave it out")
    if settings.label_dropout == 0 and args.cfg_scale != 1:
        parser.error(f"--cfg-scale: {ckpt} was trained with --label-dropout 0; leave it at 1")


def speed_up(model, args, device):
    """Apply --bf16 and --compile. Return whether bf16 is on."""
    bf16 = device.type == "cuda" and bf16_is_fast(device) if args.bf16 is None else args.bf16
    if bf16:
        model.blocks.bfloat16()  # else autocast casts weights in every call
    if args.compile:
        compile_blocks(model)
    return bf16


@torch.inference_mode()
def main(argv=None):
    parser, args = parse(argv)
    beyond = {name: x for name, x in vars(args).items() if name in BEYOND and x != parser.get_default(name)}
    rank, world, device = start_process()
    ckpt = args.ckpt or newest_run() / "ckpt.pt"
    flow, vq, data, settings, step = load_run(ckpt, device, args.data)
    check(parser, args, ckpt, settings, beyond)
    classes = pick_classes(args.classes, data.meta["classes"])
    taus = args.tau or [TAU.get(settings.objective)]
    bf16 = speed_up(flow.model, args, device)
    if args.picture:
        picture, known = encode_picture(args, vq, data.meta["image_size"], device)
        kept = (known >= 0).cpu().repeat_interleave(vq.factor, 1).repeat_interleave(vq.factor, 2)
        decoded = decode_pixels(vq, picture)

    def draw(indices, tau=taus[0]):
        y = torch.tensor([classes[i % len(classes)] for i in indices], device=device)
        knobs = dict(steps=args.steps, cfg=args.cfg_scale)
        if tau is not None:
            knobs["tau"] = tau
        if beyond:
            knobs |= dict(order=args.order, interval=args.interval)
        noise = noise_source(flow, indices, args.seed, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if not args.picture:
                return decode_pixels(vq, flow.sample(y, noise=noise(), **knobs))
            codes = picture
            *starts, _ = np.linspace(args.start, 1, args.resample + 2).tolist()
            for t in starts:
                z = flow.path(noise(), codes, torch.full_like(y, t, dtype=torch.float))
                codes = flow.sample(y, noise=z, start=t, known=known, **knobs)
        return torch.where(kept[..., None], decoded, decode_pixels(vq, codes))

    if len(taus) > 1:
        return save_temperatures(draw, taus, args) if rank == 0 else None
    reference = data.meta.get("reference")
    record = dict(
        ckpt=str(ckpt.resolve()), step=step, started=settings.started, data=str(data.path), tau=taus[0],
        cfg_scale=args.cfg_scale, steps=args.steps, seed=args.seed, classes=classes, bf16=bf16,
        num_samples=args.num_samples, reference=reference and str(data.path / reference),
        features=data.meta.get("features", "inception"), **beyond)
    claim_folder(args.out, Path(f"{args.out}.json"), record, rank)
    paths = fill_folder(draw, args, rank, world)
    if rank == 0:
        finish_folder(paths, args, min(10, len(classes)))


if __name__ == "__main__":
    main()
