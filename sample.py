"""Sample images from a checkpoint: noise -> Purrception -> codes -> tokenizer -> PNG files.

    python sample.py --tau 0.9                                         the newest run's EMA weights, into samples/
    python sample.py --tau 0.9 --cfg-scale 2 --classes siamese calico 0 --num-samples 30 --out cats
    torchrun --nproc_per_node=8 sample.py --ckpt runs/xl2/ckpt.pt --num-samples 50000 --cfg-scale 1.3 --npz

Image i is a function of (seed, i) alone, up to rounding: its noise is drawn for it alone, its class is the i-th of the classes
in turn. So one process or eight make the same images, and an interrupted run goes on. Beside the folder samples/ lie
samples.json, all that is needed to repeat it, and samples.png, a contact sheet. python fid.py samples/ scores it.
"""
import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from flow import seeded
from train import build, half_precision, newest_run, open_data, open_tokenizer, read_json
from vq import InputError, join_processes, read_checkpoint, replacing, save_image, sheet, to_pixels

SHOWN = 100    # images on the contact sheet


def load_run(path, device, data=None):
    """Build what a checkpoint describes, on its EMA weights: method, tokenizer, Data, the checkpoint's args and step."""
    ckpt = read_checkpoint(path)
    if not isinstance(ckpt, dict) or not {"ema", "args", "step"} <= set(ckpt):
        raise InputError(f"--ckpt {path}: not a checkpoint of train.py; give a runs/NAME/ckpt.pt")
    data = open_data(data or ckpt["args"]["data"])
    vq = open_tokenizer(data, device)
    flow = build(ckpt["args"], data.meta, vq.codebook, data.codes.shape[1])
    try:
        flow.model.load_state_dict(ckpt["ema"])
    except RuntimeError as error:
        raise InputError(f"--ckpt {path}: its weights do not fit {data.path} ({str(error).splitlines()[1].strip()}); name the "
                         "data it was trained on with --data") from None
    return flow.to(device).eval().requires_grad_(False), vq, data, ckpt["args"], ckpt["step"]


def pick_classes(wanted, names):
    """Translate class numbers or names into numbers; without any, all classes in turn."""
    if not wanted:
        return list(range(len(names)))
    unknown = [w for w in wanted if w not in names and not (w.isdigit() and int(w) < len(names))]
    if unknown:
        raise InputError(f"--classes {unknown[0]}: no such class; give numbers from 0 to {len(names) - 1} or names such as "
                         f"{', '.join(map(repr, names[:3]))}")
    return [names.index(w) if w in names else int(w) for w in wanted]


def initial_noise(indices, shape, seed, device):
    """Draw the noise z0 [B,d,h,w] of images `indices`, each from a generator of its own: (seed, i), on the CPU."""
    return torch.stack([torch.randn(shape, generator=seeded("cpu", seed, int(i))) for i in indices]).to(device)


def claim_folder(out, record):
    """Start the folder's sidecar, or find that it tells of these very images, which then goes on."""
    sidecar = out.with_name(out.name + ".json")
    if sidecar.exists() and out.exists():
        before = read_json(sidecar)
        other = [k for k in record if k != "num_samples" and before.get(k) != record[k]]
        if other:
            raise InputError(f"--out {out}: holds images of another {', '.join(other)} (see {sidecar}); remove both, or give "
                             "another --out")
        record = dict(record, num_samples=max(record["num_samples"], before.get("num_samples", 0)))
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: is not empty and has no {sidecar.name} beside it; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(sidecar) as partial:
        partial.write_text(json.dumps(record, indent=1))


def write_npz(out, count):
    """Pack the images into OUT.npz (arr_0 uint8 [N,H,W,3]) for ADM's evaluator, one at a time: 50,000 take 10 GB."""
    first = np.asarray(Image.open(out / "000000.png"))
    header = dict(descr="|u1", fortran_order=False, shape=(count, *first.shape))
    with replacing(out.with_name(out.name + ".npz")) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, header)
            for i in range(count):
                f.write(np.asarray(Image.open(out / f"{i:06d}.png")).tobytes())


def main(argv=None):
    parser = argparse.ArgumentParser(description="Sample images from a checkpoint.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", type=Path, help="checkpoint; default: the newest run's ckpt.pt")
    parser.add_argument("--data", help="data directory, where it has moved since training")
    parser.add_argument("--tau", type=float, default=0.9, help="temperature of the posterior")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance; 1: off")
    parser.add_argument("--steps", type=int, default=100, help="Euler steps, one network call each")
    parser.add_argument("--num-samples", type=int, default=256, help="images to make")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="numbers or names, taken in turn; default: all")
    parser.add_argument("--seed", type=int, default=0, help="image i's noise is a function of (seed, i)")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the PNG files")
    parser.add_argument("--per-proc-batch-size", type=int, default=64, help="images a process makes at once")
    parser.add_argument("--npz", action="store_true", help="also pack them into OUT.npz, for ADM's evaluator")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto",
                        help="auto: bf16 on a GPU, float32 on a CPU, where images then repeat exactly whatever the batch")
    args = parser.parse_args(argv)
    for name in ("tau", "steps", "num_samples", "per_proc_batch_size"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number above 0")
    rank, world, device = join_processes()
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" else "float32"
    ckpt = args.ckpt or newest_run() / "ckpt.pt"
    flow, vq, data, settings, step = load_run(ckpt, device, args.data)
    if args.cfg_scale != 1 and settings["label_dropout"] == 0:
        raise InputError(f"--cfg-scale {args.cfg_scale}: {ckpt} was trained with --label-dropout 0 and knows no \"no class\"; "
                         "leave it at 1")
    classes = pick_classes(args.classes, data.meta["classes"])
    if rank == 0:
        claim_folder(args.out, dict(
            ckpt=str(Path(ckpt).resolve()), step=step, started=settings["started"], data=str(data.path), tau=args.tau,
            cfg_scale=args.cfg_scale, steps=args.steps, seed=args.seed, classes=classes, precision=args.precision,
            num_samples=args.num_samples))
    if world > 1:
        dist.barrier()

    todo = [i for i in range(args.num_samples) if not (args.out / f"{i:06d}.png").exists()][rank::world]
    shape = flow.codebook.shape[1], *data.codes.shape[1:]
    autocast = half_precision(device, args.precision)
    if world > 1:
        dist.barrier()                                     # every process must have looked before one writes
    with tqdm(total=len(todo), unit=" images", desc="sample", disable=rank > 0) as bar, torch.inference_mode():
        for at in range(0, len(todo), args.per_proc_batch_size):
            batch = todo[at:at + args.per_proc_batch_size]
            y = torch.tensor([classes[i % len(classes)] for i in batch], device=device)
            with autocast():
                codes = flow.sample(y, args.steps, args.tau, args.cfg_scale, initial_noise(batch, shape, args.seed, device))
            for i, pixels in zip(batch, to_pixels(vq.decode(codes)).cpu()):
                save_image(args.out / f"{i:06d}.png", pixels)
            bar.update(len(batch))
    if world > 1:
        dist.barrier()
    if rank == 0:
        shown = [np.asarray(Image.open(args.out / f"{i:06d}.png")) for i in range(min(args.num_samples, SHOWN))]
        save_image(args.out.with_name(args.out.name + ".png"), sheet(np.stack(shown), min(10, len(classes))))
        if args.npz:
            write_npz(args.out, args.num_samples)
        print(f"{args.num_samples} images in {args.out}/, a contact sheet in {args.out}.png; next: python fid.py {args.out}/")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"sample.py: {error}")
