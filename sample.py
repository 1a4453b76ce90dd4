"""Sample images from a checkpoint: noise -> Purrception -> codes -> tokenizer -> PNG files.

    python sample.py --tau 0.9                  the newest run's averaged weights, into samples/
    python sample.py --steps 10 --order 2       ten calls, as good as fifty: beyond the paper
    torchrun --nproc_per_node=8 sample.py --ckpt runs/xl2/ckpt.pt --num-samples 50000 --out xl2

Image i depends on checkpoint, flags and (seed, i) alone, in bf16 or on a GPU up to rounding. So any
number of processes makes the same images, and the same command resumes.
"""
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from flow import sample_beyond
from train import autocast, bf16_is_fast, compile_blocks, load_run, seeded
from vq import InputError, claim_folder, make_parser, save_image, setup_process, wait_for

TAU = {"purrception": 0.9, "dfm": 1.0}  # defaults; regressions have no temperature


def pick_classes(wanted, names):
    """Convert class names to numbers. Where no name is a number, numbers may be given, too."""
    known = {name: i for i, name in enumerate(names) if names.count(name) == 1}
    if not any(name.isdigit() for name in names):
        known |= {str(i): i for i in range(len(names))}
    try:
        return [known[x] for x in wanted] if wanted else list(range(len(names)))
    except KeyError as error:
        raise InputError(f"--classes: {error} is not one of {list(known)}")


def draw_noise(flow, indices, seed):
    """Draw the noise of each image i from (seed, i): [n,...]."""
    noise = [flow.prior(1, seeded("cpu", seed, i)) for i in indices]
    return torch.cat(noise).to(flow.codebook.device)


def beyond(args):
    """Return the settings that go beyond the paper, or {}."""
    settings = dict(order=args.order, interval=args.cfg_interval, tau_end=args.tau_end)
    return {} if settings == dict(order=1, interval=[0, 1], tau_end=None) else settings


def draw(run, args, indices):
    """Sample images, uint8 [n,H,W,3]."""
    device = run.flow.codebook.device
    noise = draw_noise(run.flow, indices, args.seed)
    y = [args.classes[i % len(args.classes)] for i in indices]
    y = torch.tensor(y, device=device)
    settings = y, args.steps, args.tau, args.cfg_scale, noise
    with autocast(device, args):
        if beyond(args):
            codes = sample_beyond(run.flow, *settings, **beyond(args))
        else:
            codes = run.flow.sample(*settings)
    return run.vq.decode_pixels(codes)


def fill_folder(run, args, paths, rank, world, check):
    """Make this process's share of the missing images until check() objects."""
    todo = [i for i in range(rank, args.num_samples, world) if not paths[i].exists()]
    n = args.per_proc_batch_size
    saving = []
    with ThreadPoolExecutor(4) as pool:
        for at in tqdm(range(0, len(todo), n), "sample", unit=" batches", disable=rank > 0):
            batch = todo[at:at + n]
            pixels = draw(run, args, batch)
            list(saving)  # wait for the last batch; raise its error
            check()
            saving = pool.map(save_image, [paths[i] for i in batch], pixels)
        list(saving)


def parse(argv):
    parser = make_parser(
        "Sample images from a checkpoint. (*) goes beyond the paper.",
        ("--ckpt", Path, "checkpoint; None: the newest"),
        ("--data", str, "data directory, if moved"),
        ("--num-samples", 256, "images to make"),
        ("--tau", float, "temperature; None: 0.9 (dfm: 1)"),
        ("--tau-end", float, "temperature at t = 1, linear from --tau; None: constant (*)"),
        ("--cfg-scale", 1.0, "guidance scale; 1: off"),
        ("--steps", 100, "steps, a network call each"),
        ("--seed", 0, "seed of the noise"),
        ("--out", Path, "PNG folder; None: samples/, remade if need be"),
        ("--per-proc-batch-size", 64, "images at a time"),
        ("--compile", False, "torch.compile the blocks"),
        ("--bf16", bool, "bf16 autocast; None: on GPUs"))
    add = parser.add_argument
    add("--classes", nargs="+", metavar="CLASS",
        help="names or, if no name is a number, numbers; None: all")
    add("--cfg-interval", type=float, nargs=2, metavar=("LO", "HI"), default=[0, 1],
        help="times at which to guide (*)")
    add("--order", type=int, choices=(1, 2), default=1, help="2: ten steps are enough (*)")
    args = parser.parse_args(argv)
    counts = args.steps, args.num_samples, args.per_proc_batch_size, args.seed + 1
    low, high = args.cfg_interval
    wrong = {
        "--steps, --num-samples, --per-proc-batch-size, --seed: too small": min(counts) < 1,
        "--tau, --tau-end: give positive numbers":
            not all(tau is None or 0 < tau < np.inf for tau in (args.tau, args.tau_end)),
        "--cfg-scale: give a finite number": not np.isfinite(args.cfg_scale),
        "--cfg-interval: give LO <= HI": not low <= high,
        "--cfg-interval: needs --cfg-scale": [low, high] != [0, 1] and args.cfg_scale == 1,
        "--out: give a folder's name": args.out and args.out.name in ("", "..")
    }
    for message, found in wrong.items():
        if found:
            parser.error(message)
    return args


def check_flags(args, run):
    """Refuse flags without meaning for the checkpoint."""
    wrong = ""
    if run.args.objective == "dfm" and beyond(args):
        wrong = "--order, --cfg-interval, --tau-end: DFM has no mean"
    if run.args.objective not in TAU and (args.tau or args.tau_end):
        wrong = "--tau, --tau-end: a regression has no posterior"
    if run.args.label_dropout == 0 and args.cfg_scale != 1:
        wrong = "--cfg-scale: trained with --label-dropout 0"
    if wrong:
        raise InputError(f"{wrong}; leave it out for {run.ckpt}")


def describe(run, args):
    """Return what OUT.json records: all that decides the images."""
    reference = run.data.path / run.data.meta["reference"]
    record = dict(
        ckpt=str(run.ckpt.resolve()),
        step=run.step,
        weights=f"{run.flow.model.final_layer.linear.weight.cpu().double().norm():.8g}",
        reference=str(reference) if reference.is_file() else None)
    names = "num_samples", "classes", "seed", "tau", "cfg_scale", "steps", "bf16"
    return record | {name: vars(args)[name] for name in names} | beyond(args)


@torch.inference_mode()
def main(argv=None):
    args = parse(argv)
    rank, world, device = setup_process(args.device)
    run = load_run(args.ckpt, args.data, device)
    if rank == 0:
        print(f"checkpoint: {run.ckpt}, step {run.step} of {run.args.steps}")
    check_flags(args, run)
    args.classes = pick_classes(args.classes, run.args.classes)
    args.tau = args.tau or TAU.get(run.args.objective)
    if args.bf16 is None:
        args.bf16 = device.type == "cuda" and bf16_is_fast(device)
    if args.bf16:
        run.flow.model.blocks.bfloat16()  # else every call casts the weights
        run.flow.model.final_layer.linear.bfloat16()
    if args.compile:
        compile_blocks(run.flow.model)

    record = describe(run, args)
    remake = args.out is None
    args.out = args.out or Path("samples")
    sheet = Path(f"{args.out}.png")
    check = claim_folder(args.out, Path(f"{args.out}.json"), record, rank, remake)
    paths = [args.out / f"{i:06d}.png" for i in range(args.num_samples)]
    if rank == 0:
        sheet.unlink(missing_ok=True)
        for path in {*args.out.glob("[0-9]*.png")} - {*paths}:  # fid.py would count them
            if not remake:
                raise InputError(f"--out {args.out}: holds more images; give another")
            path.unlink()
    fill_folder(run, args, paths, rank, world, check)
    if rank == 0:
        wait_for(lambda: all(path.exists() for path in paths))
        shown = np.stack([Image.open(path) for path in paths[:100]])
        columns = 10 - 10 % len(args.classes) or 10  # whole rounds of classes
        save_image(sheet, shown, columns)
        print(f"{len(paths)} images in {args.out}/, a sheet in {sheet}")
        if record["reference"]:
            print(f"next: python fid.py {shlex.quote(str(args.out))}/")


if __name__ == "__main__":
    main()
