"""Sample images from a checkpoint: noise -> Purrception -> codes -> tokenizer -> PNG files.

    python sample.py --tau 0.9                      the newest run's averaged weights, into samples/
    python sample.py --tau 0.3 0.6 0.9 1.2          one sheet, a row for each temperature (Figure 5)
    python sample.py --cfg-scale 2 --classes siamese calico 0 --out cats
    python sample.py --steps 10 --order 2           ten network calls for a hundred: beyond the paper
    torchrun --nproc_per_node=8 sample.py --ckpt runs/xl2/ckpt.pt --num-samples 50000 --npz

Image i depends only on the checkpoint, the flags and (seed, i), in bf16 up to rounding: it has its
own noise, and classes are used in turn. So one process or eight make the same images, and an
interrupted command goes on when it is repeated. OUT.json records the flags; OUT.png is a sheet.
"""
import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from flow import sample_beyond
from train import bf16_is_fast, compile_blocks, load_run, number, seeded
from vq import InputError, claim_folder, save_image, setup_process, wait_for, write_whole

SHOWN = 100                             # images on the sheet
TAU = {"purrception": 0.9, "dfm": 1.0}  # defaults; regressions have no temperature


def pick_classes(wanted, names):
    """Convert class names or numbers to numbers; None means all."""
    numbers = {str(i): i for i in range(len(names))}
    numbers |= {name: i for i, name in enumerate(names)}
    for name in wanted or ():
        if name not in numbers:
            raise InputError(f"--classes {name}: no such class; give numbers from 0 to "
                             f"{len(names) - 1} or names such as {', '.join(names[:3])}")
    return [numbers[name] for name in wanted or names]


def draw_noise(flow, indices, seed):
    """Draw the noise of the images of some indices, each from (seed, i): [n,d,h,w]."""
    noise = [flow.prior(1, seeded("cpu", seed, i)) for i in indices]
    return torch.cat(noise).to(flow.codebook.device)


def draw(run, args, tau, indices):
    """Sample the images of some indices: uint8 [n,H,W,3]."""
    device = run.flow.codebook.device
    noise = draw_noise(run.flow, indices, args.seed)
    y = torch.tensor([args.classes[i % len(args.classes)] for i in indices], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        if beyond(args):
            codes = sample_beyond(run.flow, y, args.steps, tau, args.cfg_scale, noise, **beyond(args))
        else:
            codes = run.flow.sample(y, args.steps, tau, args.cfg_scale, noise)
    return run.vq.decode_pixels(codes)


def beyond(args):
    """Return the settings that are not the paper's, by name; empty if there are none."""
    settings = {"order": args.order, "interval": args.cfg_interval}
    return {} if settings == {"order": 1, "interval": [0, 1]} else settings


def fill_folder(run, args, tau, rank, world):
    """Make this process's share of the images that are missing in args.out."""
    paths = [args.out / f"{i:06d}.png" for i in range(args.num_samples)]
    todo = [i for i in range(rank, args.num_samples, world) if not paths[i].exists()]
    n = args.per_proc_batch_size
    saving = []
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(todo), unit=" images", disable=rank > 0) as bar:
        for batch in (todo[i:i + n] for i in range(0, len(todo), n)):
            pixels = draw(run, args, tau, batch)
            list(saving)  # wait for the last batch, or raise its error
            saving = pool.map(save_image, [paths[i] for i in batch], pixels)
            bar.update(len(batch))
        list(saving)
    return paths


def finish_folder(paths, args):
    """Wait for all images; write the sheet and, if asked for, the .npz file."""
    wait_for(lambda: all(path.exists() for path in paths))

    def read(paths):
        return np.stack([np.asarray(Image.open(path)) for path in paths])

    save_image(f"{args.out}.png", read(paths[:SHOWN]), min(10, len(args.classes)))
    if args.npz:
        with write_whole(f"{args.out}.npz") as file:
            np.savez(file, arr_0=read(paths))
    print(f"{len(paths)} images in {args.out}/, a sheet in {args.out}.png; next: "
          f"python fid.py {args.out}/")


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Sample images from a checkpoint.", usage="%(prog)s [flags]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what to sample").add_argument
    add("--ckpt", type=Path, help="checkpoint; None: that of the newest run")
    add("--data", help="data directory, if it has moved since training")
    add("--num-samples", type=number(1), default=256, metavar="N", help="images to make")
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names, in turn; None: all")
    add("--seed", type=number(0), default=0, help="seed of the noise")
    add("--out", type=Path, default="samples", help="folder for the PNG files")
    add("--npz", action="store_true", help="also write them to OUT.npz, for ADM's evaluator")
    add = parser.add_argument_group("the paper's sampler").add_argument
    add("--tau", type=number(1e-30), nargs="+",
        help="temperature; None: 0.9 (dfm: 1); several: one sheet, a row each")
    add("--cfg-scale", type=float, default=1.0, metavar="W", help="guidance scale; 1: off")
    add("--steps", type=number(1), default=100, metavar="T", help="steps, one network call each")
    add = parser.add_argument_group("beyond the paper").add_argument
    add("--order", type=int, choices=(1, 2), default=1, help="1: Euler steps; 2: ten are enough")
    add("--cfg-interval", type=float, nargs=2, metavar=("LO", "HI"), default=[0, 1],
        help="guide only at times t from LO to HI")
    add = parser.add_argument_group("speed").add_argument
    add("--per-proc-batch-size", type=number(1), default=64, metavar="N", help="images in a batch")
    add("--compile", action="store_true", help="torch.compile the transformer's blocks")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="bf16 autocast; None: on a GPU that has it. Without, images do not depend on the batch")
    args = parser.parse_args(argv)
    if args.npz and args.tau and len(args.tau) > 1:
        parser.error("--npz: give only one --tau")
    return args


def check(args, run):
    """Raise InputError if a flag has no meaning for the checkpoint."""
    objective = run.args.objective
    if objective == "dfm" and beyond(args):
        raise InputError(f"--order, --cfg-interval: {run.ckpt} is of --objective dfm, which has no "
                         "mean to follow; leave them out")
    if objective not in TAU and args.tau:
        raise InputError(f"--tau: {run.ckpt} is of --objective {objective}, without a posterior; "
                         "leave it out")
    if run.args.label_dropout == 0 and args.cfg_scale != 1:
        raise InputError(f"--cfg-scale: {run.ckpt} was trained with --label-dropout 0; leave it at 1")


@torch.inference_mode()
def main(argv=None):
    args = parse(argv)
    rank, world, device = setup_process()
    run = load_run(args.ckpt, args.data, device)
    check(args, run)
    meta = run.data.meta
    args.classes = pick_classes(args.classes, meta["classes"])
    taus = args.tau or [TAU.get(run.args.objective)]
    if args.bf16 is None:
        args.bf16 = device.type == "cuda" and bf16_is_fast(device)
    if args.bf16:
        run.flow.model.blocks.bfloat16()  # else autocast casts the weights in every call
    if args.compile:
        compile_blocks(run.flow.model)

    if len(taus) > 1:
        if rank == 0:
            shown = range(min(args.num_samples, 10))
            rows = [draw(run, args, tau, shown) for tau in tqdm(taus, "temperatures")]
            save_image(f"{args.out}-temperatures.png", torch.cat(rows), len(shown))
            print(f"{args.out}-temperatures.png")
        return

    reference = meta.get("reference")
    record = dict(
        ckpt=str(run.ckpt.resolve()), step=run.step, started=run.args.started,
        data=str(run.data.path), tau=taus[0], cfg_scale=args.cfg_scale, steps=args.steps,
        seed=args.seed, classes=args.classes, bf16=args.bf16, num_samples=args.num_samples,
        reference=reference and str(run.data.path / reference),
        features=meta.get("features", "inception"), **beyond(args))
    claim_folder(args.out, Path(f"{args.out}.json"), record, rank)
    paths = fill_folder(run, args, taus[0], rank, world)
    if rank == 0:
        finish_folder(paths, args)


if __name__ == "__main__":
    main()
