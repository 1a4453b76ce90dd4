"""Train Purrception, or one of its baselines, on the codes of a data directory.

    python train.py                                              the demo's cats, on a laptop
    torchrun --nproc_per_node=8 train.py --data data/imagenet    the paper's run
    torchrun --nproc_per_node=8 train.py --resume                continue where it stopped

The defaults are the paper's. The data's recipe.txt (--resume: the run's flags) overrides them, the
command line both. A run writes runs/NAME/: args.json, its flags; ckpt.pt; log.jsonl; samples/.

The order of the data depends on (seed, epoch), the noise on (seed, step), and each process takes
its share of both. So the number of processes changes only rounding, and resuming is exact.
"""
import argparse
import contextlib
import copy
import functools
import glob
import json
import math
import os
import shlex
import signal
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import flow
from flow import CFM, OBJECTIVES, geometric_head, logit_normal
from model import SIZES, DiT
from vq import (InputError, load_vq, make_parser, read_checkpoint, save_image, setup_process,
                write_json, write_whole)


# ----- data

# codes, flipped: uint16 [N,h,w] on the disk; labels [N]: -1 if unreadable; readable: other rows.
Data = namedtuple("Data", "path meta codes flipped labels readable")


def open_data(path, device):
    """Open a data directory and its tokenizer. Raises InputError if they do not fit together."""
    path = Path(os.path.realpath(path))
    note = path / "meta.json"
    if not note.exists():
        raise InputError(f"{path}: not a data directory, or moved; to make one: "
                         f"python vq.py {shlex.quote(str(path))} --vq TOKENIZER --out DIR")
    with InputError.explain(f"{path}: unusable; mend it or encode the images again"):
        meta = {"reference": ""} | json.loads(note.read_text())
        for key, kind in dict(tokenizer=str, image_size=int, classes=list, reference=str).items():
            if not isinstance(meta.get(key), kind):
                raise ValueError(f"{key} in meta.json is {meta.get(key)!r}")
        vq = load_vq(path / meta["tokenizer"], device)
        if meta.setdefault("tokenizer_sha256", vq.sha256) != vq.sha256:
            raise ValueError(f"another tokenizer made the codes than {meta['tokenizer']}")
        codes = np.load(path / "codes.npy", mmap_mode="r")
        mirrored = path / "codes_flip.npy"
        flipped = np.load(mirrored, mmap_mode="r") if mirrored.exists() else codes
        labels = np.load(path / "labels.npy")
        side = codes.shape[1]
        names = [name for name in meta["classes"] if isinstance(name, str)]
        if not (codes.shape == flipped.shape == (*labels.shape, side, side)
                and codes.dtype == flipped.dtype == np.uint16
                and names == meta["classes"] and meta["image_size"] == side * vq.factor
                and labels.dtype.kind in "iu" and labels.max() in range(len(names))):
            raise ValueError("codes, labels, classes, image_size in meta.json do not fit")
        top = max(codes.max(), flipped.max())
        if top >= len(vq.codebook):  # 65535: not encoded yet
            raise ValueError(f"code {top} of {len(vq.codebook)}; repeat vq.py")
    return Data(path, meta, codes, flipped, labels, np.flatnonzero(labels >= 0)), vq


@functools.lru_cache(2)
def epoch_order(N, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(N)


def batch_rows(N, B, seed, step):
    """Return the indices [B] of a step's images: consecutive epochs, cut into batches."""
    places = range(step * B, (step + 1) * B)
    return np.array([epoch_order(N, seed, i // N)[i % N] for i in places])


def load_batch(data, args, step, part, device):
    """Load part of a step's batch: codes [b,h,w], mirrored at random, and labels [b]."""
    B = args.global_batch_size
    rows = batch_rows(len(data.readable), B, args.seed, step)
    coin = np.random.default_rng((args.seed, step, 1)).random(B)
    return load_rows(data, data.readable[rows[part]], coin[part] < 0.5, device)


def load_rows(data, rows, mirror, device):
    """Load codes [b,h,w], mirrored where asked, and labels [b] of data's rows."""
    mirror = np.reshape(mirror, (-1, 1, 1))
    codes = np.where(mirror, data.flipped[rows], data.codes[rows])
    labels = data.labels[rows]
    return [torch.from_numpy(x.astype(np.int64)).to(device) for x in (codes, labels)]


def seeded(device, *key):
    """Make a generator on a CUDA device, or else on the CPU."""
    [state] = np.random.SeedSequence(key).generate_state(1, np.uint64)
    device = device if "cuda" in str(device) else "cpu"
    return torch.Generator(device).manual_seed(int(state) >> 1)


# ----- networks

def build(args, data, codebook):
    """Build the method and its network, for Data and its codebook [K,d]."""
    K, d = codebook.shape
    size = SIZES[args.model]
    if data.codes.shape[1] % size["patch_size"]:
        raise InputError(f"--model {args.model}: patches do not fill the grid")
    objective = OBJECTIVES[args.objective]
    regression = issubclass(objective, CFM)
    model = DiT(
        input_size=data.codes.shape[1],
        in_channels=size["hidden_size"] if args.objective == "dfm" else d,  # dfm embeds codes
        out_channels=d if regression else K,
        num_classes=len(data.meta["classes"]),
        **size)
    settings = [args.label_dropout] if regression else [args.z_loss, args.label_dropout]
    return objective(model, codebook, *settings)


def bf16_is_fast(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device, args):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


def compile_blocks(model):
    """Compile the loss, and the blocks one by one, as one graph serves all."""
    torch._dynamo.config.optimize_ddp = False  # it would cut the graph
    for block in model.blocks:
        block.compile()
    flow.loss_and_gradient = torch.compile(flow.loss_and_gradient)


def make_optimizer(flow, lr):
    """Make the paper's AdamW; the release has torch's eps, 1e-8."""
    params = [p for p in flow.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr, betas=(0.9, 0.999), eps=1e-6, fused=True)


def learning_rate(args, step):
    """Rise linearly over the warm-up, and fall to 0 over the cooldown."""
    rise = (step + 1) / max(1, args.warmup)
    fall = (args.steps - step) / max(1, args.cooldown * args.steps)
    return args.lr * min(1, rise, fall)


@torch.no_grad()
def update_ema(ema, model, decay):
    """Let ema <- decay ema + (1 - decay) model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ----- runs and checkpoints

def newest(folder, *patterns):
    """Return the newest file that fits a pattern, in a folder or, with **/, below it."""
    files = []
    for pattern in patterns:
        found = glob.glob(f"{glob.escape(str(folder))}/{pattern}", recursive=True)
        files += filter(os.path.exists, found)
    if not files:
        raise InputError(f"{folder}/{patterns[-1]}: not found; train first")
    return Path(max(files, key=os.path.getmtime))


def new_run(name=None):
    """Make the folder runs/NAME or, without a name, the first free number."""
    i = 1
    while Path("runs", f"{i:03d}").exists():
        i += 1
    run = Path("runs", name or f"{i:03d}")
    empty = not any(run.glob("[!.]*"))  # killed at its start
    with InputError.explain(f"--name {run.name}: give --resume or another name"):
        run.mkdir(parents=True, exist_ok=empty)
    return run


def bind(args, data, run):
    """Note in args what data it is, or refuse other data."""
    ours = {name: data.meta[name] for name in ("classes", "image_size", "tokenizer_sha256")}
    theirs = {name: vars(args).setdefault(name, x) for name, x in ours.items()}
    InputError.compare(f"{data.path}: not the data of {run}, give its own", theirs, ours)


def agree(read):
    """Refuse processes that read other things."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, read)
    for other in everyone:
        InputError.compare("processes differ, start all again", other, read)


def load_checkpoint(path, **targets):
    """Load modules and optimizers by their names in the file. Return its args and step."""
    with InputError.explain(f"{path}: does not fit flags and data; use its own"):
        if path.suffix == ".json":  # the flags alone
            ckpt = {"args": json.loads(path.read_text()), "step": 0}
        else:
            ckpt = read_checkpoint(path)
        for name, target in targets.items():  # copied, to let go of the file
            target.load_state_dict(copy.deepcopy(ckpt[name]))
        settings = ckpt["args"]
        SIZES[settings["model"]], OBJECTIVES[settings["objective"]]  # or KeyError
        for name, default in vars(flags().parse_args([])).items():
            value = settings.get(name, default)
            if default is not None and type(default)(value) != value:
                raise ValueError(f"{name} is {value!r}")
        return settings, int(ckpt["step"])


def save_checkpoint(path, flow, ema, opt, step, args):
    state = dict(
        model=flow.model.state_dict(),
        ema=ema.model.state_dict(),
        opt=opt.state_dict(),
        step=step,
        args=vars(args))
    with write_whole(path) as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on disk before it takes the name


Run = namedtuple("Run", "ckpt flow vq data args step")


def load_run(ckpt=None, data=None, device="cpu"):
    """Load averaged weights from ckpt or the newest; data: its directory, if moved."""
    ckpt = Path(ckpt or newest("runs", "**/ckpt*.pt"))
    settings, _ = load_checkpoint(ckpt)
    args = flags().parse_args([], argparse.Namespace(**settings))  # newer flags: defaults
    data, vq = open_data(data or args.data, device)
    bind(args, data, ckpt)
    with torch.device("meta"):  # the checkpoint has the weights
        flow = build(args, data, vq.codebook).eval().requires_grad_(False)
    flow.model.to_empty(device=device)
    _, step = load_checkpoint(ckpt, ema=flow.model)
    return Run(ckpt, flow, vq, data, args, step)


@torch.inference_mode()
def save_samples(path, flow, vq, args):
    """Save samples from fixed noise in 50 steps: up to ten classes across, three of each."""
    device = flow.codebook.device
    columns = min(10, flow.model.num_classes)
    y = torch.arange(columns, device=device).repeat(3)
    noise = flow.prior(len(y), seeded(device, args.seed)).to(device)
    with autocast(device, args):
        codes = flow.sample(y, steps=50, noise=noise)
    save_image(path, vq.decode_pixels(codes), columns)


@torch.no_grad()
def held_out(flow, val, args):
    """Return ce or mse on 256 images of val at t = 1/16, 3/16 ... 15/16, with fixed noise."""
    device = flow.codebook.device
    rows = val.readable[np.linspace(0, len(val.readable) - 1, 256).astype(int)]
    codes, y = load_rows(val, rows, False, device)
    z0 = flow.prior(len(y), seeded(device, args.seed)).to(device)
    by_t = []
    for t in np.arange(1, 16, 2) / 16:
        times = torch.full_like(y, t, dtype=torch.float)
        with autocast(device, args):
            _, parts = flow(codes, y, (times, z0, y < 0))
        loss, *_ = parts.values()  # without the z-loss
        by_t.append(loss.item())
    return by_t


# ----- the loop

def backward(ddp, codes, y, noise, args):
    """Compute gradients, averaged over processes. Return this process's mean losses."""
    b = len(codes) // args.accumulate
    losses = {}
    for i in range(0, len(codes), b):
        micro = slice(i, i + b)
        ddp.require_backward_grad_sync = (i + b == len(codes))  # exchange gradients once a step
        with autocast(codes.device, args):
            loss, parts = ddp(codes[micro], y[micro], [x[micro] for x in noise])
        (loss / args.accumulate).backward()
        for name, x in {"loss": loss, **parts}.items():
            losses[name] = losses.get(name, 0) + x.detach() / args.accumulate
    return losses


def announce(args, data, flow, world):
    """Print what is trained, and what goes beyond the paper."""
    N, side, _ = data.codes.shape
    flips = "not " if data.flipped is data.codes else ""
    size = sum(p.numel() for p in flow.model.parameters()) / 1e6
    beyond = [name for name in ("geometric_head", "logit_normal", "cooldown") if vars(args)[name]]
    print(f"data: {args.data}, {N} images, {len(args.classes)} classes, {flips}mirrored, "
          f"{side}x{side} codes of {len(flow.codebook)}")
    print(f"network: {args.objective}, {args.model}, {size:.1f} million parameters, "
          f"{'bf16' if args.bf16 else 'float32'} on {world} {flow.codebook.device.type}")
    print(f"recipe.txt: {args.recipe or 'none'}; beyond the paper: {', '.join(beyond) or 'none'}")


@contextlib.contextmanager
def catch_signals():
    """Yield a list that signals to stop add to."""
    caught = []
    with contextlib.ExitStack() as restore:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows lacks two
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets
                old = signal.signal(number, lambda *_: caught.append(True))
                restore.callback(signal.signal, number, old)
        yield caught


def train(args, data, val, vq, run, stop, rank, world, device):
    """Train, from the newest checkpoint if any, until list `stop` fills. Return steps done."""
    torch.manual_seed(args.seed)
    flow = build(args, data, vq.codebook).to(device)
    ema = copy.deepcopy(flow).requires_grad_(False)
    opt = make_optimizer(flow, args.lr)
    params = opt.param_groups[0]["params"]
    if args.geometric_head and not isinstance(flow, CFM):
        geometric_head(flow, opt)
    start = 0
    ckpt = "none"
    if run and any(run.glob("ckpt*.pt")):
        ckpt = newest(run, "ckpt*.pt")
        _, start = load_checkpoint(ckpt, model=flow.model, ema=ema.model, opt=opt)
    if world > 1:
        agree(vars(args) | dict(checkpoint=str(ckpt), step=start))
    if rank == 0:
        print(f"checkpoint: {ckpt}, step {start} of {args.steps}, in {run}/")
        announce(args, data, flow, world)
        write_json(run / "args.json", vars(args))
    flow.model.recompute = args.recompute
    if args.compile:
        compile_blocks(flow.model)
    ddp = flow
    if world > 1:
        flow._ddp_params_and_buffers_to_ignore = ["codebook"]  # all have the same
        ddp = torch.nn.parallel.DistributedDataParallel(flow, gradient_as_bucket_view=True)
    bar = tqdm(total=args.steps, initial=start, disable=rank > 0, unit=" steps")
    B = args.global_batch_size
    part = slice(rank * B // world, (rank + 1) * B // world)  # this process's share of a batch
    done = start

    def save(name):
        save_checkpoint(run / name, flow, ema, opt, done, args)

    for step in range(start, args.steps):
        began = time.perf_counter()
        codes, y = load_batch(data, args, step, part, device)
        t, z0, drop = flow.noise(B, seeded(device, args.seed, step))
        if args.logit_normal:
            t = logit_normal(t)
        noise = [x[part].to(device) for x in (t, z0, drop)]
        losses = backward(ddp, codes, y, noise, args)

        # One message tells all processes the mean losses, and whether to stop.
        asked = torch.tensor(float(bool(stop)), device=device)
        message = torch.stack([*losses.values(), asked]) / world
        if world > 1:
            dist.all_reduce(message)
        norm = get_total_norm([p.grad for p in params])
        grad_norm = norm.item()
        if not grad_norm <= args.grad_clip:
            clip_grads_with_norm_(params, args.grad_clip, norm)
        *means, stopping = message.tolist()
        if not math.isfinite(means[0] + grad_norm):
            raise InputError(f"step {step + 1}: loss {means[0]}; --resume with less --lr")

        lr = learning_rate(args, step)
        for group in opt.param_groups:  # not the checkpoint's
            group.update(lr=lr, weight_decay=args.weight_decay)
        opt.step()
        opt.zero_grad()
        ramp = (1 + step) / (10 + step) if args.ema_ramp else 1.0
        update_ema(ema.model, flow.model, min(args.ema_decay, ramp))
        done = step + 1
        speed = B / (time.perf_counter() - began)
        bar.update()

        if rank == 0 and (done == 1 or done % args.log_every == 0):
            record = dict(zip(losses, means), grad_norm=grad_norm, lr=lr, images_per_second=speed)
            log(run, step=done, **record)
            bar.set_postfix_str(f"loss={means[0]:.3f}, {speed:.0f} images/s")
        # The numbered one first: killed after ckpt.pt alone, a run would not write it.
        if rank == 0 and due(args.keep_every, done, args):
            save(f"ckpt-{done:07d}.pt")
        if rank == 0 and (stopping or done == args.steps or due(args.ckpt_every, done, args)):
            save("ckpt.pt")
        if rank == 0 and due(args.sample_every, done, args):
            save_samples(run / "samples" / f"{done:07d}.png", ema, vq, args)
            if val:
                by_t = held_out(ema, val, args)
                mean = sum(by_t) / len(by_t)
                log(run, step=done, val=mean, val_by_t=by_t)
                bar.set_description(f"val={mean:.4f}")
        if stopping:
            break
    if rank == 0 and done == start and ckpt.name != "ckpt.pt":  # killed between the two
        save("ckpt.pt")
    bar.close()
    return done


def log(run, **record):
    path = run / "log.jsonl"
    with InputError.explain(f"{path}: cannot be written"), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def due(every, done, args):
    return every > 0 and (done % every == 0 or done == args.steps)


# ----- command line

def flags():
    parser = make_parser(
        "Train on codes. The defaults are the paper's; (*) goes beyond it.",
        ("--data", str(Path(__file__).with_name("demo") / "cats"), "data directory"),
        ("--val", str, "another, whose loss is logged with each picture"),
        ("--name", str, "folder in runs/; None: the first free number"),
        ("--resume", False, "continue --name or the newest run"),
        ("--steps", 3_500_000, "training steps"),
        ("--global-batch-size", 256, "images per step, in all"),
        ("--accumulate", 1, "micro-batches per process"),
        ("--recompute", False, "compute each block twice, for less memory"),
        ("--lr", 1e-4, "learning rate"),
        ("--warmup", 0, "steps over which it rises"),
        ("--cooldown", 0.0, "share of steps over which it falls to 0 (*)"),
        ("--weight-decay", 0.01, "AdamW's"),
        ("--grad-clip", 1.0, "largest gradient norm"),
        ("--ema-decay", 0.9999, "decay of the averaged weights"),
        ("--ema-ramp", False, "cap it at (1 + step) / (10 + step)"),
        ("--z-loss", 1e-5, "weight of the z-loss"),
        ("--geometric-head", False, "let near codes learn together (*)"),
        ("--logit-normal", False, "draw logit(t) ~ N(0, 1) (*)"),
        ("--label-dropout", 0.1, "share of labels to drop"),
        ("--seed", 0, "seed"),
        ("--bf16", bool, "bf16 autocast; None: if the hardware has it"),
        ("--compile", False, "torch.compile the blocks and the loss"),
        ("--log-every", 100, "steps between log lines"),
        ("--ckpt-every", 25_000, "steps between checkpoints"),
        ("--keep-every", 0, "steps between those kept; 0: none"),
        ("--sample-every", 5000, "steps between pictures; 0: none"))
    add = parser.add_argument
    add("--objective", default="purrception", choices=OBJECTIVES, help="the method or a baseline")
    add("--model", default="DiT-XL/2", choices=SIZES, help="size of the network")
    parser.set_defaults(recipe="")
    return parser


def parse(argv=None):
    """Return the flags, and the folder of a run to resume, or None."""
    parser = flags()
    first, _ = parser.parse_known_args(argv)
    run = None
    words = []
    recipe = Path(first.data, "recipe.txt")
    if first.resume:
        below = "" if first.name else "**/"
        last = newest(Path("runs", first.name or ""), f"{below}args.json", f"{below}ckpt*.pt")
        parser.set_defaults(**load_checkpoint(last)[0])
        run = last.parent
    elif os.path.exists(recipe):
        with InputError.explain(f"{recipe}: unreadable; mend or remove it"):
            words = shlex.split(recipe.read_text("utf-8-sig"), comments=True)
        parser.set_defaults(recipe=" ".join(words))
    args = parser.parse_args(argv, parser.parse_args(words))
    counts = args.steps, args.global_batch_size, args.accumulate, args.log_every, args.seed + 1
    if min(counts) < 1:
        parser.error("--steps, --global-batch-size, --accumulate, --log-every, --seed: too small")
    return args, run


def main(argv=None):
    args, run = parse(argv)
    rank, world, device = setup_process(args.device)
    if args.global_batch_size % (world * args.accumulate):
        raise InputError(f"--global-batch-size: give a multiple of {world * args.accumulate}")
    data, vq = open_data(args.data, device)
    bind(args, data, run)
    args.data = str(data.path)
    val = None
    if args.val:
        val, _ = open_data(args.val, device)
        bind(args, val, args.data)
        args.val = str(val.path)
    if args.bf16 is None:
        args.bf16 = bf16_is_fast(device)
    if world > 1:
        gpu = device if device.type == "cuda" else None
        pause = timedelta(minutes=15)  # process 0 may be saving or sampling
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=pause)
    if rank == 0:
        run = run or new_run(args.name)
    del args.name, args.resume, args.device  # the others are the run's
    try:
        with catch_signals() as stop:
            done = train(args, data, val, vq, run, stop, rank, world, device)
    except torch.OutOfMemoryError:
        raise InputError(f"out of memory: give --accumulate {2 * args.accumulate}, --recompute, or "
                         "a smaller --model")
    if rank == 0:
        advice = f"sample.py --ckpt {shlex.quote(f'{run}/ckpt.pt')}"
        if done < args.steps:
            advice = f"train.py --name {shlex.quote(os.path.relpath(run, 'runs'))} --resume"
        print(f"{run}/ckpt.pt: {done} of {args.steps} steps; next: python {advice}")
    if world > 1:
        dist.barrier()  # NCCL's groups must end together
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
