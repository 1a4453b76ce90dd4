"""Sample images from a checkpoint: noise -> Purrception -> codes -> tokenizer -> PNG files.

    python sample.py --tau 0.9                                         the newest run's EMA weights, into samples/
    python sample.py --tau 0.3 0.6 0.9 1.2                             one sheet, a row for each temperature (Figure 5)
    python sample.py --trajectory                                      a film strip: z_t, mu_t and the posterior's entropy
    python sample.py --tau 0.9 --cfg-scale 2 --classes siamese calico 0 --num-samples 30 --out cats
    torchrun --nproc_per_node=8 sample.py --ckpt runs/xl2/ckpt.pt --num-samples 50000 --cfg-scale 1.3 --npz

For one checkpoint and one set of flags image i depends on (seed, i) alone, in bf16 up to rounding: its noise is drawn for it
alone, its class is the i-th of the classes in turn. So one process or eight make the same images, and an interrupted run goes
on. Beside the folder samples/ lie samples.json, which tells how to repeat it, and samples.png, a contact sheet.
"""
import argparse
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from flow import seeded
from train import PRECISIONS, Formatter, bf16_is_fast, build, half_precision, newest_run, open_data, open_tokenizer, read_run
from vq import (InputError, decode_pixels, first_process_only, join_processes, new_or_old_folder, read_json, replacing,
                run_script, save_image, save_json, sheet, unwrapped, wait)

SHOWN = 100    # images on the contact sheet


def load_run(path, device, data=None):
    """Build what a checkpoint describes, on its EMA weights: method, tokenizer, Data, the checkpoint's args and step."""
    ckpt = read_run(path)
    data = open_data(data or ckpt["args"]["data"])
    vq = open_tokenizer(data, device)
    with torch.device("meta"):                             # no use initialising what is overwritten
        flow = build(ckpt["args"], data.meta, vq.codebook, data.codes.shape[1])
    try:
        flow.model.load_state_dict(unwrapped(ckpt["ema"]), assign=True)
    except RuntimeError as error:
        raise InputError(f"--ckpt {path}: its weights do not fit {data.path} ({str(error).splitlines()[-1].strip()}); name the "
                         "data it was trained on with --data") from None
    return flow.to(device).eval().requires_grad_(False), vq, data, ckpt["args"], ckpt["step"]


def pick_classes(wanted, names):
    """Translate class numbers or names into numbers; without any, all classes in turn."""
    if not wanted:
        return list(range(len(names)))
    unknown = [w for w in wanted if w not in names and not (w.isdecimal() and int(w) < len(names))]
    if unknown:
        raise InputError(f"--classes {unknown[0]}: no such class; give numbers from 0 to {len(names) - 1} or names such as "
                         f"{', '.join(map(repr, names[:3]))}")
    return [names.index(w) if w in names else int(w) for w in wanted]


def initial_noise(flow, indices, seed, device):
    """Draw the noise z0 [B,d,h,w] the images `indices` begin with, each from a generator of its own: (seed, i), on the CPU."""
    return torch.cat([flow.start(1, seeded("cpu", seed, i)) for i in indices]).to(device)


def beside(out, ending):
    """Name a file beside the folder out: samples/ -> samples.png."""
    return out.with_name(out.name + ending)


def claim_folder(out, record):
    """Write the folder's sidecar, or check that the one there describes these same images, so that the run can go on."""
    sidecar = beside(out, ".json")
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
    save_json(sidecar, record)


def write_npz(out, count):
    """Pack the images into OUT.npz (arr_0 uint8 [N,H,W,3]) for ADM's evaluator, one at a time: 50,000 take 10 GB."""
    first = np.asarray(Image.open(out / "000000.png"))
    header = dict(descr="|u1", fortran_order=False, shape=(count, *first.shape))
    with replacing(beside(out, ".npz")) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, header)
            for i in range(count):
                f.write(np.asarray(Image.open(out / f"{i:06d}.png")).tobytes())


def fill_folder(draw, args, rank, world, columns):
    """Make the images that are missing in args.out, processes taking turns; then the contact sheet and the npz."""
    todo = [i for i in range(rank, args.num_samples, world) if not (args.out / f"{i:06d}.png").exists()]
    with tqdm(total=len(todo) * world, unit=" images", desc="sample", disable=rank > 0) as bar:
        for at in range(0, len(todo), args.per_proc_batch_size):
            batch = todo[at:at + args.per_proc_batch_size]
            for i, pixels in zip(batch, draw(batch)):
                save_image(args.out / f"{i:06d}.png", pixels)
            bar.update(len(batch) * world)                 # the others are about as far
    wait(world)
    if rank == 0:
        shown = [np.asarray(Image.open(args.out / f"{i:06d}.png")) for i in range(min(args.num_samples, SHOWN))]
        save_image(beside(args.out, ".png"), sheet(np.stack(shown), columns))
        if args.npz:
            write_npz(args.out, args.num_samples)
        print(f"{args.num_samples} images in {args.out}/, a contact sheet in {args.out}.png; next: python fid.py {args.out}/")


# ------------------------------------------------------------------------------------------------ pictures of the process

def caption(pixels, words, height=14):
    """Write words [n], evenly spread, on a white strip above the picture uint8 [H,W,3]."""
    page = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + height), "white")
    page.paste(Image.fromarray(pixels), (0, height))
    for i, word in enumerate(words):
        ImageDraw.Draw(page).text((i * page.width / len(words) + 3, 1), word, fill="black")
    return np.asarray(page)


def heat(values, top, zoom):
    """Colour values [B,h,w] from 0 (dark) to top (light): uint8 [B,h*zoom,w*zoom,3]."""
    anchors = np.array([(10, 7, 40), (105, 20, 110), (215, 60, 75), (250, 155, 30), (252, 250, 180)])
    place = np.linspace(0, top, len(anchors))
    colours = np.stack([np.interp(values, place, channel) for channel in anchors.T], -1).round().astype(np.uint8)
    return colours.repeat(zoom, 1).repeat(zoom, 2)


def film_strip(flow, vq, y, noise, steps, tau, cfg, columns=9):
    """Picture how samples come about: columns are times from 0 to 1; three rows for each of B samples.

    The decoded nearest codes of z_t; those of mu_t, what the model believes now; the posterior's entropy per position in
    bits. In the last column z has landed on mu, and the entropy is that of the last step's posterior.
    """
    shown, top = sorted({round(s) for s in np.linspace(0, steps, columns)}), np.log2(len(flow.codebook))
    look = lambda z: decode_pixels(vq, flow.nearest(z)).numpy()  # noqa: E731
    z, frames = noise, []
    for s in range(steps + 1):
        if s < steps:                                      # at s = T there is no step left to take
            t = torch.full((len(y),), s / steps, device=z.device)
            mu = flow.mean(z, t, y, tau, cfg)
            bits = flow.entropy(z, t, y, tau, cfg).cpu().numpy() if {s, s + 1} & set(shown) else None
        if s in shown:
            frames.append([look(z), look(mu), heat(bits, top, vq.factor)])  # [B,H,W,3] each
        z = z + (mu - z) / max(1, steps - s)               # dt / (1 - t) = 1 / (T - s)
    pixels = np.stack([np.stack(frame, 1) for frame in frames], 2)       # [B,3,columns,H,W,3]
    page = caption(sheet(pixels.reshape(-1, *pixels.shape[3:]), len(shown)), [f"t={s / steps:.2f}" for s in shown])
    scale = heat(np.linspace(0, top, page.shape[1])[None, None], top, 1)[0].repeat(8, 0)  # [8,W',3]
    return np.concatenate([page, caption(scale, ["0 bits", f"{top / 2:.1f}", f"{top:.1f} bits of entropy"])])


# ------------------------------------------------------------------------------------------------ command line

def parse(argv):
    """Read the flags: the parser and what it read."""
    parser = argparse.ArgumentParser(description="Sample images from a checkpoint.",
                                     formatter_class=Formatter)
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint; default: the newest run's ckpt.pt")
    add("--data", help="data directory, if it has moved since training")
    add("--tau", type=float, nargs="+",
        help="temperature of the posterior, by default 0.9 (dfm: 1); several: one sheet, a row each")
    add("--cfg-scale", type=float, default=1.0, help="guidance; 1: off")
    add("--steps", type=int, default=100, help="Euler steps, one network call each")
    add("--num-samples", type=int, default=256, help="images to make")
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names, taken in turn; default: all")
    add("--seed", type=int, default=0, help="image i's noise is a function of (seed, i)")
    add("--out", type=new_or_old_folder, default=Path("samples"), help="folder for the PNG files")
    add("--per-proc-batch-size", type=int, default=64, help="images a process makes at once")
    add("--npz", action="store_true", help="also pack them into OUT.npz, for ADM's evaluator")
    add("--trajectory", action="store_true", help="instead of samples, a film strip of how the first three come about")
    add("--precision", choices=PRECISIONS, default="auto",
        help="auto: bf16 on a GPU that multiplies it, else float32; on a CPU images then repeat whatever the batch")
    args = parser.parse_args(argv)
    for name in ("steps", "num_samples", "per_proc_batch_size"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number above 0")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: give 0 or a number above it")
    if not math.isfinite(args.cfg_scale):
        parser.error(f"--cfg-scale {args.cfg_scale}: give a finite number")
    several = len(args.tau or []) > 1
    if args.trajectory and several:
        parser.error("--trajectory: takes one --tau")
    if args.npz and (args.trajectory or several):
        parser.error("--npz: packs samples; leave it out for a picture of several --tau or of a --trajectory")
    for tau in args.tau or []:
        if not tau >= 1e-30:                               # float32 ends at 1e38
            parser.error(f"--tau {tau}: give a number above 0; 1e-6 is the arg max")
    return parser, args


def check_knobs(parser, args, ckpt, settings):
    """Refuse what means nothing for the checkpoint's objective, and fill in the temperature where there is one."""
    objective = settings["objective"]
    if objective == "cfm" and args.tau:
        parser.error(f"--tau: {ckpt} was trained with --objective cfm, which has no posterior; leave it out")
    if objective != "purrception" and args.trajectory:
        parser.error(f"--trajectory: {ckpt} was trained with --objective {objective}, which has no mean to show; leave it out")
    if args.cfg_scale != 1 and settings["label_dropout"] == 0:
        parser.error(f"--cfg-scale {args.cfg_scale}: {ckpt} was trained with --label-dropout 0 and knows no \"no class\"; "
                     "leave it at 1")
    return args.tau or {"purrception": [0.9], "dfm": [1.0], "cfm": [None]}[objective]


def main(argv=None):
    """Read the flags and make the images, or a picture of how they come about."""
    parser, args = parse(argv)
    rank, world, device = join_processes()
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" and bf16_is_fast(device) else "float32"
    ckpt = args.ckpt or newest_run() / "ckpt.pt"
    flow, vq, data, settings, step = load_run(ckpt, device, args.data)
    taus = check_knobs(parser, args, ckpt, settings)
    classes = pick_classes(args.classes, data.meta["classes"])
    autocast = half_precision(device, args.precision)

    def begin(indices):                                    # labels [B] and noise [B,d,h,w]
        y = torch.tensor([classes[i % len(classes)] for i in indices], device=device)
        return y, initial_noise(flow, indices, args.seed, device)

    @torch.inference_mode()
    def draw(indices, tau=taus[0]):                        # pixels uint8 [B,H,W,3]
        y, noise = begin(indices)
        with autocast():
            codes = flow.sample(y, args.steps, cfg=args.cfg_scale, noise=noise, **({} if tau is None else {"tau": tau}))
        return decode_pixels(vq, codes)

    if args.trajectory or len(taus) > 1:
        if rank > 0:
            return
        shown = range(min(args.num_samples, 3 if args.trajectory else 10))
        if args.trajectory:
            with torch.inference_mode(), autocast():
                page = film_strip(flow, vq, *begin(shown), args.steps, taus[0], args.cfg_scale)
            path = beside(args.out, "-trajectory.png")
        else:
            page = sheet(torch.cat([draw(shown, tau) for tau in tqdm(taus, desc="temperatures")]), len(shown))
            path = beside(args.out, "-temperatures.png")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_image(path, page)
        print(path)
        return

    record = dict(
        ckpt=str(Path(ckpt).resolve()), step=step, started=settings["started"], data=str(data.path), tau=taus[0],
        cfg_scale=args.cfg_scale, steps=args.steps, seed=args.seed, classes=classes, precision=args.precision,
        num_samples=args.num_samples)
    first_process_only(lambda: claim_folder(args.out, record), rank, world)
    fill_folder(draw, args, rank, world, min(10, len(classes)))


if __name__ == "__main__":
    run_script(main)
