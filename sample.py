"""Sample images from a checkpoint: noise -> Purrception -> codes -> tokenizer -> PNG files.

    python sample.py --tau 0.9                      the newest run's averaged weights, into samples/
    python sample.py --tau 0.3 0.6 0.9 1.2          one sheet, a row for each temperature (Figure 5)
    python sample.py --tau 0.9 --cfg-scale 2 --classes siamese calico 0 --num-samples 30 --out cats
    torchrun --nproc_per_node=8 sample.py --ckpt runs/xl2/ckpt.pt --num-samples 50000 --cfg-scale 1.3 --npz

Image i depends only on the checkpoint, the flags and (seed, i), in bf16 up to rounding: it has its own noise,
and classes are used in turn. So one process or eight make the same images, and an interrupted run goes on.
samples.json records how they were made; samples.png is a contact sheet.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from train import (bf16_is_fast, build, load_weights, newest_run, number, open_data, open_tokenizer, read_run,
                   seeded)
from vq import InputError, claim_folder, decode_pixels, replacing, save_image, sheet, start_process

SHOWN = 100                                     # images on the sheet


def load_run(path, device, data=None):
    """Load a run: the method with averaged weights, the tokenizer, Data, args and step of a checkpoint.

    data: the data directory, if it has moved since training.
    """
    ckpt = read_run(path)
    args = argparse.Namespace(**ckpt["args"])
    data = open_data(data or args.data)
    vq = open_tokenizer(data, device)
    with torch.device("meta"):                  # the checkpoint has the weights
        flow = build(args, data.meta, vq.codebook, data.codes.shape[1])
    flow.model.to_empty(device=device)
    load_weights(path, (flow.model, ckpt["ema"]))
    return flow.eval().requires_grad_(False), vq, data, args, ckpt["step"]


def pick_classes(wanted, names):
    """Convert class names or numbers to numbers; None means all."""
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for name in wanted or ():
        if name not in numbers:
            raise InputError(f"--classes {name}: no such class; give numbers from 0 to {len(names) - 1} or "
                             f"names such as {', '.join(map(repr, names[:3]))}")
    return [numbers[name] for name in wanted or names]


def initial_noise(flow, indices, seed, device):
    """Draw noise [B,d,h,w] for the images `indices` from (seed, i), the same on any device."""
    return torch.cat([flow.prior(1, seeded("cpu", seed, i)) for i in indices]).to(device)


def fill_folder(draw, args, rank, world):
    """Make this process's share of the images missing in args.out."""
    paths = [args.out / f"{i:06d}.png" for i in range(args.num_samples)]
    todo = [i for i in range(rank, args.num_samples, world) if not paths[i].exists()]
    with tqdm(total=len(todo), unit=" images", desc="sample", disable=rank > 0) as bar:
        for at in range(0, len(todo), args.per_proc_batch_size):
            batch = todo[at:at + args.per_proc_batch_size]
            for i, pixels in zip(batch, draw(batch)):
                save_image(paths[i], pixels)
            bar.update(len(batch))
    return paths


def finish_folder(paths, args, columns):
    """Wait for all images; write the contact sheet and, if asked for, the .npz file."""
    while not all(path.exists() for path in paths):
        time.sleep(0.5)
    shown = np.stack([np.asarray(Image.open(path)) for path in paths[:SHOWN]])
    save_image(f"{args.out}.png", sheet(shown, columns))
    if args.npz:
        with replacing(f"{args.out}.npz") as file:
            np.savez(file, arr_0=np.stack([np.asarray(Image.open(path)) for path in paths]))
    print(f"{len(paths)} images in {args.out}/, a sheet in {args.out}.png; next: python fid.py {args.out}/")


def parse(argv):
    parser = argparse.ArgumentParser(description="Sample images from a checkpoint.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint; None: that of the newest run")
    add("--data", help="data directory, if it has moved since training")
    add("--tau", type=number(float, 1e-30), nargs="+",
        help="temperature; None: 0.9 (dfm: 1); several: one sheet, a row each")
    add("--cfg-scale", type=number(float, -1e9), default=1.0, help="guidance scale; 1: off")
    add("--steps", type=number(int, 1), default=100, help="Euler steps, one network call each")
    add("--num-samples", type=number(int, 1), default=256, help="images to make")
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names, used in turn; None: all")
    add("--seed", type=number(int, 0), default=0, help="seed of the noise")
    add("--out", type=Path, default="samples", help="folder for the PNG files")
    add("--per-proc-batch-size", type=number(int, 1), default=64, help="images per process and batch")
    add("--npz", action="store_true", help="also write them to OUT.npz, for ADM's evaluator")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="bf16 autocast; None: on a GPU that has it; off: images do not depend on the batch")
    args = parser.parse_args(argv)
    if args.npz and args.tau and len(args.tau) > 1:
        parser.error("--npz: give only one --tau")
    return parser, args


@torch.inference_mode()
def main(argv=None):
    parser, args = parse(argv)
    rank, world, device = start_process()
    ckpt = args.ckpt or newest_run() / "ckpt.pt"
    flow, vq, data, settings, step = load_run(ckpt, device, args.data)
    if settings.objective == "cfm" and args.tau:
        parser.error(f"--tau: {ckpt} was trained with --objective cfm and has no posterior; leave --tau out")
    if settings.label_dropout == 0 and args.cfg_scale != 1:
        parser.error(f"--cfg-scale: {ckpt} was trained with --label-dropout 0; leave it at 1")
    classes = pick_classes(args.classes, data.meta["classes"])
    taus = args.tau or [{"purrception": 0.9, "dfm": 1.0, "cfm": None}[settings.objective]]
    bf16 = device.type == "cuda" and bf16_is_fast(device) if args.bf16 is None else args.bf16

    def draw(indices, tau=taus[0]):
        y = torch.tensor([classes[i % len(classes)] for i in indices], device=device)
        noise = initial_noise(flow, indices, args.seed, device)
        knobs = {} if tau is None else {"tau": tau}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            codes = flow.sample(y, args.steps, cfg=args.cfg_scale, noise=noise, **knobs)
        return decode_pixels(vq, codes)

    if len(taus) > 1:
        if rank == 0:
            shown = range(min(args.num_samples, 10))
            rows = [draw(shown, tau) for tau in tqdm(taus, "temperatures")]
            save_image(f"{args.out}-temperatures.png", sheet(torch.cat(rows), len(shown)))
            print(f"{args.out}-temperatures.png")
        return
    reference = data.meta.get("reference")
    record = dict(
        ckpt=str(ckpt.resolve()), step=step, started=settings.started, data=str(data.path), tau=taus[0],
        cfg_scale=args.cfg_scale, steps=args.steps, seed=args.seed, classes=classes, bf16=bf16,
        num_samples=args.num_samples, reference=reference and str(data.path / reference),
        features=data.meta.get("features", "inception"))
    claim_folder(args.out, Path(f"{args.out}.json"), record, rank)
    paths = fill_folder(draw, args, rank, world)
    if rank == 0:
        finish_folder(paths, args, min(10, len(classes)))


if __name__ == "__main__":
    main()
