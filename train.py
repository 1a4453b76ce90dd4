"""Train Purrception, or one of its baselines, on the codes of a data directory.

    python train.py                                                the demo's cats, on a laptop
    torchrun --nproc_per_node=8 train.py --data data/imagenet      the paper's run
    torchrun --nproc_per_node=8 train.py --resume                  continue where it stopped

The defaults are the paper's; the data directory's recipe.txt overrides them, and the command line overrides
both. A run writes runs/NAME/: ckpt.pt, the newest checkpoint; log.jsonl; and samples/, pictures by the
averaged weights from fixed noise.

The data order depends on (seed, epoch), the noise on (seed, step), and each process takes its slice of both.
So processes and interruptions affect training by rounding only. On a CPU, resuming is exact.

Shapes: B global batch, b micro-batch of a process, N images, h w grid of codes.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flow import CFM, OBJECTIVES, compile_loss
from model import SIZES, DiT
from vq import (InputError, decode_pixels, load_vq, read_checkpoint, read_json, replacing, save_image,
                start_process)


# ---------- data

class Data(NamedTuple):
    """A data directory: codes and mirrored twins uint16 [N,h,w], on disk; labels [N]."""

    path: Path
    meta: dict
    codes: np.ndarray
    twins: np.ndarray
    labels: np.ndarray
    rows: np.ndarray  # indices of readable images


def open_data(path):
    """Open a data directory. Raises InputError for anything else."""
    path = Path(path).resolve()
    if not (path / "meta.json").exists():
        raise InputError(f"--data {path}: not a data directory; make one from images with: "
                         f"python vq.py {path} --vq TOKENIZER --out data/{path.name}")
    meta = read_json(path / "meta.json")
    try:
        codes = np.load(path / "codes.npy", mmap_mode="r")
        flipped = path / "codes_flip.npy"
        twins = np.load(flipped, mmap_mode="r") if flipped.exists() else codes
        labels = np.load(path / "labels.npy")
        N, side, _ = codes.shape
        whole = codes.shape == twins.shape == (N, side, side) and labels.shape == (N,) and side > 0
        typed = codes.dtype == twins.dtype == np.uint16 and labels.dtype.kind in "iu"
        named = all(isinstance(name, str) for name in (meta["tokenizer"], *meta["classes"]))
        known = 0 <= labels.max() < len(meta["classes"])
    except Exception as error:  # damaged headers fail in many ways
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"--data {path}: cannot be read ({why}); encode the images again") from None
    if not (whole and typed and named and known):
        raise InputError(f"--data {path}: codes.npy, {codes.dtype} {codes.shape}, labels.npy, {labels.dtype} "
                         f"{labels.shape}, meta.json do not fit together; encode the images again")
    return Data(path, meta, codes, twins, labels, np.flatnonzero(labels >= 0))


def check_codes(data, K, patch_size):
    """Raise InputError if patches do not fill the grid, or if the tokenizer lacks a code."""
    side = data.codes.shape[1]
    if side % patch_size:
        raise InputError(f"--model: patches of {patch_size} do not fill the grid of {side}x{side} codes; "
                         "choose another size")
    top = max(data.codes.max(), data.twins.max())
    if top >= K:  # 65535: not encoded yet
        raise InputError(f"--data {data.path}: holds code {top}, but its tokenizer has {K} codes; repeat an "
                         "interrupted vq.py command, or encode the images again")


def open_tokenizer(data, device):
    return load_vq(data.path / data.meta["tokenizer"], device)


@functools.lru_cache(2)
def epoch_order(N, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(N)


def batch_rows(N, B, seed, step):
    """Return the indices [B] of a step's images: consecutive epochs, cut into batches."""
    epochs, places = np.divmod(np.arange(step * B, (step + 1) * B), N)
    return np.array([epoch_order(N, seed, epoch)[i] for epoch, i in zip(epochs, places)])


def fetch(data, args, step, mine, device):
    """Load a process's slice of a batch: codes [b,h,w], mirrored at random, and labels [b], int64."""
    B = args.global_batch_size
    rows = data.rows[batch_rows(len(data.rows), B, args.seed, step)[mine]]
    mirror = np.random.default_rng((args.seed, step, 1)).random(B)[mine] < 0.5
    codes = np.where(mirror[:, None, None], data.twins[rows], data.codes[rows])
    batch = [torch.from_numpy(x.astype(np.int64)) for x in (codes, data.labels[rows])]
    if device.type == "cuda":  # from pinned memory, copies do not wait for the GPU
        batch = [x.pin_memory() for x in batch]
    return [x.to(device, non_blocking=True) for x in batch]


def seeded(device, *key):
    """Make a torch.Generator on the device, seeded by the integers in key."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


# ---------- networks

def build(args, meta, codebook, side):
    """Build the method and its network from args, for a codebook [K,d] and side x side codes."""
    K, d = codebook.shape
    size = SIZES[args.model]
    method = OBJECTIVES[args.objective]
    regression = issubclass(method, CFM)
    model = DiT(
        input_size=side,
        in_channels=size["hidden_size"] if args.objective == "dfm" else d,  # dfm embeds its codes
        out_channels=d if regression else K,
        num_classes=len(meta["classes"]),
        **size)
    settings = [args.label_dropout] if regression else [args.z_loss, args.label_dropout]
    return method(model, codebook, *settings)


def bf16_is_fast(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def compile_blocks(model):
    """Compile the loss, and blocks one by one: one graph serves all, and DDP need not wait."""
    torch._dynamo.config.optimize_ddp = False  # it would cut the graph
    for block in model.blocks:
        block.compile()
    compile_loss()


def make_optimizer(flow, lr):
    params = [p for p in flow.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr, eps=1e-6, fused=True)  # the authors' release: eps 1e-8


def learning_rate(args, step):
    """Let the rate rise over the warm-up and fall to 0 over the cooldown; both are linear."""
    rise = (step + 1) / max(1, args.warmup)
    fall = (args.steps - step) / max(1, args.cooldown * args.steps)
    return args.lr * min(1, rise, fall)


@torch.no_grad()
def update_ema(ema, model, decay):
    """Update the averaged weights: ema <- decay ema + (1 - decay) model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---------- runs and checkpoints

def newest_run(runs=Path("runs")):
    found = sorted(runs.glob("*/ckpt.pt"), key=os.path.getmtime)
    if not found:
        raise InputError(f"{runs}/: holds no checkpoint; run python train.py first")
    return found[-1].parent


def new_run(name):
    """Make the folder of a new run: runs/NAME, or runs/NUMBER with the first free number."""
    for i in itertools.count(1):
        run = Path("runs", name or f"{i:03d}")
        try:
            run.mkdir(parents=True)
            return run
        except OSError as error:
            if name or not run.exists():
                raise InputError(f"--name {run.name}: {run} cannot be made ({error}); continue it with "
                                 "--resume, or choose another name") from None


def read_run(path):
    ckpt = read_checkpoint(path)
    kinds = dict(ema=dict, args=dict, step=int)
    if not isinstance(ckpt, dict) or not all(isinstance(ckpt.get(key), kinds[key]) for key in kinds):
        raise InputError(f"{path}: not a checkpoint of train.py; give a runs/NAME/ckpt.pt")
    return ckpt


def load_weights(path, *pairs):
    """Load pairs (module or optimizer, state dict). Raises InputError if they do not fit."""
    try:
        for target, state in pairs:
            target.load_state_dict(state)
    except Exception as error:  # other shapes, other types
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not fit these flags or data ({why}); use its own") from None


def save_checkpoint(path, flow, ema, opt, step, args):
    """Write a checkpoint, whole or not at all, that torch.load reads with weights_only=True."""
    with replacing(path) as file:
        torch.save({"model": flow.model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(),
                    "step": step, "args": vars(args)}, file)
        file.flush()
        os.fsync(file.fileno())  # on disk before it takes the name


def trim_log(path, wanted):
    """Drop what a killed process may have left in a file of JSON lines: half a line, and records not wanted."""
    lines = path.read_text().splitlines(True) if path.exists() else []
    with replacing(path) as file:
        for line in lines:
            if line.endswith("\n") and wanted(json.loads(line)):
                file.write(line.encode())


def append_line(path, line):
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None


# ---------- the loop

def backward(ddp, codes, y, noise, args, world):
    """Compute the gradients of a process's images, in micro-batches, and average them over processes.

    Returns the names of the loss and its parts, and their means over the process's images, a tensor.
    """
    b = len(codes) // args.accumulate
    means = 0
    for i in range(0, len(codes), b):
        some = slice(i, i + b)
        accumulating = world > 1 and i + b < len(codes)  # synchronise processes once a step
        with ddp.no_sync() if accumulating else contextlib.nullcontext():
            with torch.autocast(codes.device.type, torch.bfloat16, enabled=args.bf16):
                loss, parts = ddp(codes[some], y[some], noise=[x[some] for x in noise])
            (loss / args.accumulate).backward()
        means = means + torch.stack([loss.detach(), *parts.values()]).float() / args.accumulate
    return ("loss", *parts), means


def train(args, data, vq, ckpt, run, rank, world, device, bar):
    """Train from the checkpoint ckpt, or None, until args.steps or a signal. Returns the steps done."""
    B = args.global_batch_size
    share = B // world  # images per process
    mine = slice(rank * share, (rank + 1) * share)
    torch.manual_seed(args.seed)
    flow = build(args, data.meta, vq.codebook, data.codes.shape[1]).to(device)
    if args.geometric_head and not isinstance(flow, CFM):
        flow.shape_head()
    average = copy.deepcopy(flow).requires_grad_(False)  # the same method on averaged weights
    opt = make_optimizer(flow, args.lr)
    start = ckpt["step"] if ckpt else 0
    if ckpt:
        pairs = (flow.model, ckpt["model"]), (average.model, ckpt["ema"]), (opt, ckpt["opt"])
        load_weights(run / "ckpt.pt", *pairs)
    if args.compile:
        compile_blocks(flow.model)
    ddp = flow if world == 1 else DistributedDataParallel(
        flow, gradient_as_bucket_view=True, broadcast_buffers=False)
    if rank == 0:
        trim_log(run / "log.jsonl", lambda record: record["step"] <= start)
    stop = []  # Ctrl-C or SIGTERM fill it: finish the step, save
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.append(True))
    seen = seconds = 0  # images and time since the last line of the log
    codes, y = fetch(data, args, start, mine, device)

    for step in range(start, args.steps):
        done = step + 1
        tick = time.perf_counter()
        noise = [x[mine] for x in flow.noise(B, seeded(device, args.seed, step), args.logit_normal)]
        names, means = backward(ddp, codes, y, noise, args, world)
        stats = torch.cat([means, torch.full_like(means[:1], bool(stop))]) / world
        if world > 1:
            dist.all_reduce(stats)
        grad_norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), args.grad_clip)
        codes, y = fetch(data, args, done, mine, device)  # the next batch, while a GPU is at work
        *means, stopping = stats.tolist()
        if not math.isfinite(means[0] + grad_norm):
            raise InputError(f"step {done}: loss {means[0]}, gradient norm {grad_norm:.3g}; go on from "
                             "the last checkpoint with --resume and a smaller --lr")
        lr = learning_rate(args, step)
        for group in opt.param_groups:  # the flags override the checkpoint
            group.update(lr=lr, weight_decay=args.weight_decay)
        opt.step()
        opt.zero_grad()
        ramp = (1 + step) / (10 + step) if args.ema_ramp else 1.0  # 1: no limit
        update_ema(average.model, flow.model, min(args.ema_decay, ramp))
        bar.update()
        seen += B
        seconds += time.perf_counter() - tick  # without pictures and checkpoints
        if rank == 0 and (done == 1 or done % args.log_every == 0):
            record = dict(zip(names, means), grad_norm=grad_norm.item(), lr=lr)
            record = {"step": done, **record, "images_per_second": seen / seconds}
            append_line(run / "log.jsonl", json.dumps(record))
            bar.set_postfix(loss=f"{means[0]:.3f}", images=f"{seen / seconds:.0f}/s", refresh=False)
            seen = seconds = 0
        if rank == 0:
            save_due(run, done, stopping, flow, average, opt, vq, args)
        if stopping:
            break
    return done


def save_due(run, done, stopping, flow, average, opt, vq, args):
    def due(every):
        return every and (done % every == 0 or done == args.steps)

    if due(args.keep_every):
        save_checkpoint(run / f"ckpt-{done:07d}.pt", flow, average.model, opt, done, args)
    if due(args.ckpt_every) or stopping:  # after the above, which a resumed run would skip
        save_checkpoint(run / "ckpt.pt", flow, average.model, opt, done, args)
    if due(args.sample_every) and not stopping:
        paint(average, vq, args, run / "samples" / f"{done:07d}.png")


@torch.inference_mode()
def paint(flow, vq, args, path):
    """Save a picture of samples from fixed noise: up to ten classes across, three of each."""
    columns, device = min(10, flow.model.num_classes), flow.codebook.device
    y = torch.arange(columns, device=device).repeat(3)
    noise = flow.prior(len(y), seeded(device, args.seed))
    cfg = 1.3 if args.label_dropout else 1.0  # else "no class" is untrained
    few = dict(steps=50) if args.objective == "dfm" else dict(steps=10, order=2)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        codes = flow.sample(y, cfg=cfg, noise=noise, **few)
    save_image(path, decode_pixels(vq, codes), columns)


# ---------- command line

def number(kind, low, high=math.inf):
    """Make an argparse type: a number in [low, high). kind: int or float."""
    def number(text):  # argparse prints this name
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
        return kind(text)
    return number


def flags():
    parser = argparse.ArgumentParser(
        description="Train Purrception or a baseline. The data's recipe.txt overrides the defaults.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = str.split
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    count, whole = number(int, 1), number(int, 0)
    positive, real, share = number(float, 1e-12), number(float, 0), number(float, 0, 1)
    add("--data", default=str(Path(__file__).with_name("demo")), help="data directory")
    add("--name", help="name of the run, in runs/NAME; None: the first free number")
    add("--resume", action="store_true", help="continue the run --name, or the newest run")
    add("--objective", default="purrception", choices=OBJECTIVES, help="the paper's method or a baseline")
    add("--model", default="DiT-XL/2", choices=SIZES, metavar="SIZE", help=", ".join(SIZES))
    add("--steps", type=count, default=3_500_000, help="training steps")
    add("--global-batch-size", type=count, default=256, help="images per step, over all processes")
    add("--accumulate", type=count, default=1, help="micro-batches per process and step")
    add("--lr", type=positive, default=1e-4, help="learning rate of AdamW")
    add("--warmup", type=whole, default=0, help="steps over which the learning rate rises")
    add("--cooldown", type=share, default=0.0,
        help="share of the steps, the last ones, over which it falls to 0: beyond the paper")
    add("--weight-decay", type=real, default=0.01, help="weight decay of AdamW")
    add("--grad-clip", type=positive, default=1.0, help="norm to which gradients are clipped")
    add("--ema-decay", type=share, default=0.9999, help="decay of the averaged weights")
    add("--ema-ramp", action=switch, default=False, help="limit the decay to (1 + step) / (10 + step)")
    add("--z-loss", type=real, default=1e-5, help="weight of the z-loss; regressions have none")
    add("--geometric-head", action=switch, default=False,
        help="start the head from the codebook: beyond the paper; regressions have none")
    add("--logit-normal", action=switch, default=False,
        help="draw t with logit(t) ~ N(0, 1), not uniformly: beyond the paper")
    add("--label-dropout", type=share, default=0.1, help="share of labels dropped, for guidance")
    add("--seed", type=number(int, 0, 2 ** 63), default=0, help="seed of weights, data order and noise")
    add("--bf16", action=switch, help="bf16 autocast; None: if the hardware has it")
    add("--compile", action=switch, default=False, help="torch.compile the blocks and the loss")
    add("--log-every", type=count, default=100, help="steps between lines of log.jsonl")
    add("--ckpt-every", type=count, default=25_000, help="steps between checkpoints")
    add("--keep-every", type=whole, default=0, help="steps between numbered checkpoints; 0: none")
    add("--sample-every", type=whole, default=5000, help="steps between sample pictures; 0: none")
    return parser


def parse(argv=None):
    """Parse the flags. They override recipe.txt or, with --resume, the flags of the checkpoint."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser, run, ckpt = flags(), None, None
    first, _ = parser.parse_known_args(words)
    recipe = Path(first.data, "recipe.txt")
    if first.resume:
        run = Path("runs", first.name) if first.name else newest_run()
        if not run.is_dir():
            raise InputError(f"--name {first.name}: there is no {run} to resume; check the name")
    if run and (run / "ckpt.pt").exists():  # else stopped before its first checkpoint
        ckpt = read_run(run / "ckpt.pt")
        parser.set_defaults(**{name: x for name, x in ckpt["args"].items() if x is not None})
    elif recipe.exists():
        words = [f"@{recipe}", *words]
    try:
        args = parser.parse_args(words)
    except (ValueError, RecursionError) as error:
        parser.error(f"{recipe}: not a text file of flags ({error})")
    return args, run, ckpt


def main(argv=None):
    args, run, ckpt = parse(argv)
    rank, world, device = start_process()
    if args.global_batch_size % (world * args.accumulate):
        raise InputError(f"--global-batch-size {args.global_batch_size}: must be a multiple of {world} "
                         f"processes times --accumulate {args.accumulate}")
    if ckpt and ckpt["step"] >= args.steps:
        raise InputError(f"--steps {args.steps}: {run} has done {ckpt['step']} already; give a larger number")
    data = open_data(args.data)
    vq = open_tokenizer(data, device)
    check_codes(data, len(vq.codebook), SIZES[args.model]["patch_size"])
    if rank == 0 and not run:
        run = new_run(args.name)
    if args.bf16 is None:
        args.bf16 = bf16_is_fast(device)
    settings = {"started": time.strftime("%Y-%m-%d %H:%M:%S")} | vars(args) | {"data": str(data.path)}
    del settings["name"], settings["resume"]
    if world > 1:  # an hour: process 0 may be saving or sampling
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=gpu, timeout=timedelta(hours=1))
    start = ckpt["step"] if ckpt else 0
    with tqdm(total=args.steps, initial=start, disable=rank > 0, unit=" steps", smoothing=0.02) as bar:
        done = train(argparse.Namespace(**settings), data, vq, ckpt, run, rank, world, device, bar)
    if rank == 0:
        advice = "sample.py" if done == args.steps else f"train.py --name {run.name} --resume"
        print(f"{run}/ckpt.pt: {done} of {args.steps} steps; next: python {advice}")
    if world > 1:
        dist.barrier()  # NCCL's groups must be destroyed together
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
