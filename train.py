"""Train Purrception, or one of its baselines, on a data directory of codes: one readable loop, on a laptop or on many GPUs.

    python train.py                                            the embedded cats, about 5 minutes on 2 CPU cores
    torchrun --nproc_per_node=8 train.py --data data/imagenet --name xl2         the paper's run
    torchrun --nproc_per_node=8 train.py --name xl2 --resume       goes on where it stopped; on a CPU bit for bit
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT train.py ...   on each machine

Defaults are the paper's; recipe.json in the data directory overrides them, and the command line overrides both. A run
writes runs/NAME/: ckpt.pt (newest), log.jsonl, and samples/ of the EMA weights from one fixed noise.

There is no hidden state: the order of the data is a function of (seed, epoch), the noise of (seed, step), and each process
takes its slice of both. So one process or eight, interrupted or not, see the same training, up to rounding.

Shapes: B global batch, b micro-batch of one process, h w grid of codes.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from flow import OBJECTIVES, seeded
from model import SIZES, DiT
from vq import (SUFFIXES, InputError, decode_pixels, first_process_only, join_processes, load_vq, new_or_old_folder,
                read_checkpoint, read_json, replacing, run_script, save_image, sheet, unwrapped)

HERE = Path(__file__).resolve().parent
PRECISIONS = ("auto", "bf16", "float32")


# ------------------------------------------------------------------------------------------------ data

class Data(NamedTuple):
    """A data directory, opened: codes [N,h,w] uint16 (memory-mapped), their mirrored twins or None, labels [N], meta."""
    path: Path
    codes: np.ndarray
    twins: np.ndarray | None
    labels: np.ndarray
    meta: dict


def read_npy(path, mmap_mode=None):
    """Open an .npy array. Raises InputError, naming the file, where it is damaged."""
    try:
        return np.load(path, mmap_mode)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: is no whole .npy array ({error}); encode the images again") from None


def open_data(path):
    """Open a data directory (what vq.py writes; demo/ is one). Raises InputError naming the file that is wrong."""
    path = Path(path).resolve()
    if not path.is_dir():
        raise InputError(f"--data {path}: no such folder; give one that vq.py wrote")
    if (path / "partial.json").exists():
        raise InputError(f"--data {path}: its encoding is not finished; repeat the vq.py command")
    for name in ("meta.json", "codes.npy", "labels.npy"):
        if not (path / name).exists():
            if any(p.suffix.lower() in SUFFIXES for p in path.rglob("*")):
                raise InputError(f"--data {path}: a folder of images, not of codes; prepare it with: "
                                 f"python vq.py {path} --vq TOKENIZER --out data/{path.name}")
            raise InputError(f"--data {path}: {name} is missing; give a folder that vq.py wrote")
    meta = read_json(path / "meta.json")
    if not isinstance(meta.get("classes"), list) or not isinstance(meta.get("tokenizer"), str):
        raise InputError(f"{path}/meta.json: has no list of \"classes\" or no \"tokenizer\" file; encode the images again")
    codes, labels = read_npy(path / "codes.npy", mmap_mode="r"), read_npy(path / "labels.npy")
    twins = read_npy(path / "codes_flip.npy", mmap_mode="r") if (path / "codes_flip.npy").exists() else None
    if codes.dtype.kind != "u" or labels.dtype.kind not in "iu":
        raise InputError(f"--data {path}: codes.npy is of type {codes.dtype} and labels.npy {labels.dtype}, not uint16 and "
                         "int64; encode the images again")
    if codes.ndim != 3 or labels.shape != codes.shape[:1] or len(codes) == 0 or codes.shape[1] != codes.shape[2]:
        raise InputError(f"--data {path}: codes.npy is {codes.shape} and labels.npy {labels.shape}, not [N,h,h] and [N]; "
                         "encode the images again")
    if twins is not None and (twins.shape, twins.dtype) != (codes.shape, codes.dtype):
        raise InputError(f"--data {path}: codes_flip.npy is {twins.dtype} {twins.shape} and codes.npy {codes.dtype} "
                         f"{codes.shape}; encode the images again")
    if labels.min() < 0 or labels.max() >= len(meta["classes"]):
        raise InputError(f"--data {path}: labels.npy names class {labels.max()} of {len(meta['classes'])} in meta.json; "
                         "encode the images again")
    return Data(path, codes, twins, labels, meta)


def check_codes(data, K, size):
    """Raise InputError where codes are not among the tokenizer's K, or their grid does not split into the network's patches."""
    side, p = data.codes.shape[1], SIZES[size]["patch_size"]
    if side % p:
        raise InputError(f"--model {size}: its patches of {p} do not fill the {side}x{side} grid of {data.path}; choose another")
    for name, codes in (("codes.npy", data.codes), ("codes_flip.npy", data.twins)):
        if codes is not None and codes.max() >= K:
            raise InputError(f"{data.path / name}: holds code {codes.max()}, and {data.meta['tokenizer']} has only {K}; encode "
                             "the images again")


def open_tokenizer(data, device):
    """Load the tokenizer a data directory was encoded with; its path in meta.json may be relative to the directory."""
    path = data.path / data.meta["tokenizer"]
    if not path.is_file():
        raise InputError(f"{data.path}/meta.json: its \"tokenizer\", {path}, is not there; put it back, or correct meta.json")
    return load_vq(path).to(device)


@functools.lru_cache(2)
def epoch_order(N, seed, epoch):
    """Return the order of N rows in an epoch: a permutation, a pure function of (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(N)


def batch_rows(N, B, seed, step):
    """Return the B rows of a step: the epochs' permutations, one behind the other, cut into batches."""
    epochs, places = np.divmod(np.arange(step * B, (step + 1) * B), N)
    return np.array([epoch_order(N, seed, e)[i] for e, i in zip(epochs, places)])


def load_batch(data, rows, mirror, device):
    """Read codes [B,h,w] int64 and labels [B] int64 of rows [B], the mirrored twin where mirror [B] says so."""
    codes = data.codes[rows]
    if data.twins is not None:
        codes = np.where(mirror[:, None, None], data.twins[rows], codes)
    return [torch.from_numpy(a.astype(np.int64)).to(device) for a in (codes, data.labels[rows])]


# ------------------------------------------------------------------------------------------------ networks

def build(args, meta, codebook, side):
    """Build the method and its network as args say, for this data: grid side, codebook [K,d] and number of classes."""
    method, size = OBJECTIVES[args["objective"]], SIZES[args["model"]]
    inputs = size["hidden_size"] if args["objective"] == "dfm" else codebook.shape[1]  # dfm embeds its codes
    model = DiT(input_size=side, in_channels=inputs, out_channels=method.outputs(codebook),
                num_classes=len(meta["classes"]), **size)
    knobs = {} if args["objective"] == "cfm" else {"z_loss": args["z_loss"]}
    return method(model, codebook, label_dropout=args["label_dropout"], **knobs)


def bf16_is_fast(device):
    """Tell whether the hardware itself multiplies bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def half_precision(device, precision):
    """Return the autocast that `precision` asks for; auto is bf16 where that is fast."""
    enabled = precision == "bf16" or precision == "auto" and bf16_is_fast(device)
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def update_ema(ema, model, decay):
    """Move the average towards the weights: ema <- decay ema + (1 - decay) model, all tensors in one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ------------------------------------------------------------------------------------------------ runs and checkpoints

def newest_run(runs=Path("runs")):
    """Return the folder of the run whose checkpoint is newest."""
    found = sorted(runs.glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError(f"{runs}/: holds no checkpoint yet; run python train.py first")
    return found[-1].parent


def new_run(name):
    """Make the folder of a new run: runs/NAME, or the first free number. Raises InputError where NAME holds a run."""
    if name and any(file.stat().st_size for kind in ("log.jsonl", "ckpt*.pt") for file in Path("runs", name).glob(kind)):
        raise InputError(f"--name {name}: runs/{name} already holds a run; add --resume to go on with its ckpt.pt, choose "
                         "another name, or remove it")
    for run in [Path("runs") / name] if name else (Path("runs") / f"{i:03d}" for i in itertools.count(1)):
        with contextlib.suppress(FileExistsError):         # whoever makes a numbered folder has it
            (run / "samples").mkdir(parents=True, exist_ok=bool(name))
            return run


def read_run(path):
    """Read a checkpoint that save_checkpoint wrote; its tensors stay on the disk until used. Raises InputError for others."""
    ckpt = read_checkpoint(path, mmap=True)
    if not isinstance(ckpt, dict) or not {"ema", "args", "step"} <= set(ckpt):
        raise InputError(f"{path}: not a checkpoint of train.py; give a runs/NAME/ckpt.pt")
    return ckpt


def save_checkpoint(path, flow, ema, opt, step, args):
    """Write a checkpoint that torch.load reads with weights_only=True, whole or not at all."""
    with replacing(path) as partial, open(partial, "wb") as file:
        torch.save({"model": flow.model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(), "step": step,
                    "args": args}, file)
        file.flush()
        os.fsync(file.fileno())                            # on the disk before it takes the name, should the machine crash


def restore(ckpt, path, flow, ema, opt):
    """Put a checkpoint's tensors into the networks and the optimizer."""
    try:
        flow.model.load_state_dict(unwrapped(ckpt["model"]))
        ema.load_state_dict(unwrapped(ckpt["ema"]))
        opt.load_state_dict(ckpt["opt"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: does not fit the network the flags describe; resume with the flags it was trained with "
                         f"({str(error).splitlines()[-1].strip()})") from None


class Log:
    """Append records to log.jsonl, one line each; a resumed run first drops the lines it will not have, or have again."""

    def __init__(self, path, step, every):
        if path.exists():
            lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]  # not one cut by a crash
            numbers = [json.loads(line)["step"] for line in lines]
            due = step % every == 0 or step == 1           # else the line of the last step, which is none of 2N steps
            with replacing(path) as partial:
                partial.write_text("".join(line for line, number in zip(lines, numbers) if number < step + due))
        self.file, self.clock, self.seen = open(path, "a", buffering=1), time.perf_counter(), 0

    def speed(self):
        """Return images per second since the last call; pauses do not count."""
        seen, seconds = self.seen, time.perf_counter() - self.clock
        self.clock, self.seen = time.perf_counter(), 0
        return seen / seconds

    @contextlib.contextmanager
    def pause(self):
        """Stop the clock meanwhile."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def write(self, **record):
        """Append a line."""
        self.file.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def deferred_signals():
    """Yield a list that Ctrl-C or a scheduler's SIGTERM fills meanwhile, instead of ending the program."""
    stop = []
    handlers = {name: signal.signal(name, lambda *_: stop.append(name)) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def peak_memory(device):
    """Return the most memory used so far in GiB: of the GPU, or without one of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


# ------------------------------------------------------------------------------------------------ the loop

def train(args, data, vq, ckpt, run, stop, rank, world, device):
    """Train as args (a plain dict) say, from ckpt where one is given, until args["steps"] are done or stop holds something."""
    N, side = data.codes.shape[:2]
    B = args["global_batch_size"]
    share, b = B // world, B // (world * args["accumulate"])             # of a process, of a micro-batch
    torch.manual_seed(args["seed"])
    flow = build(args, data.meta, vq.codebook, side).to(device)
    average = copy.deepcopy(flow).requires_grad_(False)    # the same method on the averaged weights
    ema = average.model
    params = [p for p in flow.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=args["lr"], betas=(0.9, 0.999), eps=1e-6, weight_decay=args["weight_decay"], fused=True)
    start = ckpt["step"] if ckpt else 0
    if ckpt:
        restore(ckpt, run / "ckpt.pt", flow, ema, opt)
    autocast = half_precision(device, args["precision"])
    if args["compile"]:
        flow.model.hidden = torch.compile(flow.model.hidden)
    ddp = torch.nn.parallel.DistributedDataParallel(flow, gradient_as_bucket_view=True) if world > 1 else flow

    log = Log(run / "log.jsonl", start, args["log_every"]) if rank == 0 else None
    bar = tqdm(total=args["steps"], initial=start, disable=rank > 0, desc=run.name, unit=" steps", smoothing=0.02)

    for step in range(start, args["steps"]):
        mine = slice(rank * share, (rank + 1) * share)
        rows = batch_rows(N, B, args["seed"], step)[mine]
        mirror = np.random.default_rng((args["seed"], step, 1)).random(B)[mine] < 0.5
        codes, y = load_batch(data, rows, mirror, device)
        noise = [x[mine] for x in flow.noise(B, seeded(device, args["seed"], step))]

        stats = 0                                          # means over the batch: the loss, its parts, whether to stop
        for i in range(0, share, b):
            some, last = slice(i, i + b), i + b == share
            with contextlib.nullcontext() if last or world == 1 else ddp.no_sync():  # processes add up once, at the last
                with autocast():
                    loss, parts = ddp(codes[some], y[some], noise=[x[some] for x in noise])
                (loss / args["accumulate"]).backward()
            means = torch.stack([loss.detach(), *parts.values(), torch.full_like(loss, bool(stop))]).float()
            stats = stats + means / (args["accumulate"] * world)
        if world > 1:
            dist.all_reduce(stats)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args["grad_clip"])
        *means, stopping = stats.tolist()
        if not math.isfinite(means[0]) or not math.isfinite(grad_norm):
            left = f"{run}/ckpt.pt stays as it was: resume" if (run / "ckpt.pt").exists() else "no checkpoint was due: start anew"
            raise InputError(f"step {step + 1}: the loss is {means[0]} and the gradient norm {grad_norm:.3g}; training stopped; "
                             f"{left} with a smaller --lr")
        lr = args["lr"] * min(1, (step + 1) / max(1, args["warmup"]))
        for group in opt.param_groups:
            group.update(lr=lr, weight_decay=args["weight_decay"])       # resuming, the flags win over the checkpoint
        opt.step()
        opt.zero_grad()
        ramp = (1 + step) / (10 + step) if args["ema_ramp"] else 1.0
        update_ema(ema, flow.model, min(args["ema_decay"], ramp))

        done = step + 1
        bar.update()
        if rank == 0:
            log.seen += B
            if done in (1, args["steps"]) or done % args["log_every"] == 0:
                speed = log.speed()
                log.write(step=done, **dict(zip(("loss", *parts), means)), grad_norm=grad_norm.item(), lr=lr,
                          images_per_second=round(speed, 2), peak_memory_gib=round(peak_memory(device), 3))
                bar.set_postfix(loss=f"{means[0]:.3f}", images=f"{speed:.0f}/s", refresh=False)
            with log.pause(), autocast():
                save_due(run, done, stopping > 0, flow, average, opt, vq, args)
        if stopping > 0:
            break
    bar.close()
    if rank == 0:
        stopped = f"stopped by a signal, go on with --name {run.name} --resume"
        print(f"{run}/ckpt.pt: {done} of {args['steps']} steps; "
              f"{'next: python sample.py' if done == args['steps'] else stopped}")


def save_due(run, done, stopping, flow, average, opt, vq, args):
    """Write the checkpoints and the picture that are due after `done` steps."""
    def due(every):
        return args[every] and (done % args[every] == 0 or done == args["steps"])

    if due("keep_every"):
        save_checkpoint(run / f"ckpt-{done:07d}.pt", flow, average.model, opt, done, args)
    if due("ckpt_every") or stopping:                      # after the numbered one, which a resumed run would not write
        save_checkpoint(run / "ckpt.pt", flow, average.model, opt, done, args)
    if due("sample_every") and not stopping:
        paint(average, vq, args, run / "samples" / f"{done:07d}.png")


def paint(flow, vq, args, path):
    """Save a picture of EMA samples from one fixed noise: up to ten classes across, three samples of each."""
    columns, device = min(10, flow.model.num_classes), flow.codebook.device
    y = torch.arange(columns, device=device).repeat(3)
    noise = flow.start(len(y), seeded(device, args["seed"]))
    with torch.inference_mode():
        cfg = args["sample_cfg"] if args["label_dropout"] else 1.0       # without dropout "no class" was never trained
        codes = flow.sample(y, steps=50, cfg=cfg, noise=noise)
        save_image(path, sheet(decode_pixels(vq, codes), columns))


# ------------------------------------------------------------------------------------------------ command line

class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of a flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def run_name(text):
    """Read --name, under which a folder can be made in runs/."""
    new_or_old_folder(f"runs/{text}")
    return text


def flags(prog=None):
    """Make the parser of train.py's flags; the defaults are the paper's."""
    parser = argparse.ArgumentParser(prog, formatter_class=Formatter, description="Train Purrception, or a baseline. The "
                                     "defaults shown are the paper's; recipe.json in the data directory overrides them.")
    add = parser.add_argument
    add("--data", default=str(HERE / "demo"), help="data directory: what vq.py wrote")
    add("--name", type=run_name, help="the run's folder is runs/NAME; default: the next free number")
    add("--resume", action="store_true", help="go on with --name, or with the newest run")
    add("--objective", default="purrception", choices=OBJECTIVES, help="the paper's method, or one of its two baselines")
    add("--model", default="DiT-XL/2", choices=SIZES, metavar="SIZE", help=", ".join(SIZES))
    add("--steps", type=int, default=3_500_000, help="training steps")
    add("--global-batch-size", type=int, default=256, help="images per step, all processes together")
    add("--accumulate", type=int, default=1, help="micro-batches a process splits its share into")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW")
    add("--warmup", type=int, default=0, help="steps over which the learning rate rises")
    add("--weight-decay", type=float, default=0.01, help="weight decay of AdamW")
    add("--grad-clip", type=float, default=1.0, help="gradients longer than this are shortened to it")
    add("--ema-decay", type=float, default=0.9999, help="decay of the averaged weights")
    add("--ema-ramp", action=argparse.BooleanOptionalAction, default=False,
        help="start with a short average: decay at most (1 + step) / (10 + step)")
    add("--z-loss", type=float, help="weight of the z-loss; default: 1e-5, and none for cfm")
    add("--label-dropout", type=float, default=0.1, help="share of labels dropped, which guidance needs")
    add("--seed", type=int, default=0, help="seed of weights, data order and noise")
    add("--precision", choices=PRECISIONS, default="auto", help="bf16 autocast where the hardware has it")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the transformer")
    add("--log-every", type=int, default=100, help="steps between lines of log.jsonl")
    add("--ckpt-every", type=int, default=5000, help="steps between checkpoints")
    add("--keep-every", type=int, default=0, help="steps between numbered checkpoints that stay; 0: none")
    add("--sample-every", type=int, default=5000, help="steps between pictures of samples; 0: none")
    add("--sample-cfg", type=float, default=1.3, help="guidance of those pictures")
    return parser


def read_recipe(path):
    """Read recipe.json as the flags it stands for: a dictionary of their values. Exits as a wrong flag does, naming the file."""
    recipe, parser = read_json(path), flags(prog=str(path))
    known = set(vars(parser.parse_args([]))) - {"data", "name", "resume"}
    if unknown := sorted(set(recipe) - known):
        raise InputError(f"{path}: {', '.join(unknown)} is no setting of train.py; correct or remove it")
    words = [f"--{'no-' * (value is False)}{key.replace('_', '-')}" + f"={value}" * (not isinstance(value, bool))
             for key, value in recipe.items()]             # ema_ramp: true is --ema-ramp, steps: 2000 is --steps=2000
    values = vars(parser.parse_args(words))
    return {key: values[key] for key in recipe}


def parse(argv=None):
    """Read the flags. Defaults: the paper's, then recipe.json, then, resuming, the checkpoint's; the command line wins."""
    parser = flags()
    first, _ = parser.parse_known_args(argv)
    run, ckpt = None, None
    if first.resume:
        run = Path("runs") / first.name if first.name else newest_run()
        ckpt = read_run(run / "ckpt.pt")
        parser.set_defaults(**ckpt["args"])
    elif (recipe := Path(first.data) / "recipe.json").exists():
        parser.set_defaults(**read_recipe(recipe))
    args = parser.parse_args(argv)
    for holds, wanted, names in (
            (lambda x: x > 0, "a number above 0",
             ("steps", "global_batch_size", "accumulate", "lr", "grad_clip", "log_every", "ckpt_every")),
            (lambda x: x >= 0, "0 or a number above it", ("warmup", "weight_decay", "keep_every", "sample_every")),
            (lambda x: x is None or x >= 0, "0 or a number above it", ("z_loss",)),
            (lambda x: 0 <= x < 2 ** 63, "a number from 0 to below 2^63", ("seed",)),
            (lambda x: 0 <= x < 1, "a number from 0 to below 1", ("ema_decay", "label_dropout"))):
        for name in names:
            if not holds(getattr(args, name)):
                parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give {wanted}")
    if args.objective == "cfm" and args.z_loss is not None:
        parser.error("--z-loss: cfm has no logits for it to act on; leave it out")
    if args.objective != "cfm" and args.z_loss is None:
        args.z_loss = 1e-5
    return args, run, ckpt


def main(argv=None):
    """Read the flags, open or make the run, and train."""
    args, run, ckpt = parse(argv)
    rank, world, device = join_processes()
    if args.global_batch_size % (world * args.accumulate):
        raise InputError(f"--global-batch-size {args.global_batch_size}: not a multiple of {world} processes times "
                         f"--accumulate {args.accumulate}; change one of them")
    if ckpt and ckpt["step"] >= args.steps:
        raise InputError(f"--steps {args.steps}: {run} has done {ckpt['step']} already; give a larger number")
    settings = {k: v for k, v in vars(args).items() if k not in ("name", "resume")}
    settings["data"] = str(Path(args.data).resolve())
    settings.setdefault("started", time.strftime("%Y-%m-%d %H:%M:%S"))
    data = open_data(args.data)
    vq = open_tokenizer(data, device)
    first_process_only(lambda: check_codes(data, len(vq.codebook), args.model), rank, world)
    run = run or first_process_only(lambda: new_run(args.name), rank, world)
    with deferred_signals() as stop:
        train(settings, data, vq, ckpt, run, stop, rank, world, device)


if __name__ == "__main__":
    run_script(main)
