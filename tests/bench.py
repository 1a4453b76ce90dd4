"""Time the heavy paths against what one would write first, or against a checkout of other people's code.

    python tests/bench.py                                    this project against the plain formulas in this file
    python tests/bench.py loss step --repeats 7              some of the rows only
    python tests/bench.py --release path/to/purrception      step, velocity, encode against the authors' release
    python tests/bench.py --fidelity path/to/torch-fidelity  Inception against theirs, on random weights
    python tests/bench.py --pytorch-fid                      the distance against the installed package of that name
    python tests/bench.py --scale                            how the cost grows with K, with positions, with processes
    python tests/bench.py step-both-bf16 velocity-bf16 --device cuda --model DiT-XL/2 --batch 32 --compile

The release's networks want timm, einops and torchdiffeq installed, pytorch-fid wants torchvision.

Each side of a row runs in a process of its own, the two in turn, so that neither warms a cache for the other; a figure is
the median over the repeats. Memory is how far the process's peak rises above what it holds before its first run (Linux).
Rows called -bf16 hold our bf16 against float32; the release's own bf16, weights and all, is in step-both-bf16. Run it on an
idle machine, with OMP_WAIT_POLICY=passive where other programs may interfere.

On a GPU each side has a line of its own, and the memory is the peak of all that torch holds. Utilisation is the network's FLOP,
as flop() counts them, over time and --peak-tflops; it says something of bf16 rows alone.
"""
import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
K, D, SIDE = 16384, 4, 32                                  # vq-f8's codebook and grid
SETUP = argparse.Namespace(device="cpu", model="DiT-S/2", batch=None, compile=False)     # main() reads the flags into it
IMAGES = {"step": 4, "loss": 4, "velocity": 4, "encode": 2, "inception": 32}             # in a run, unless --batch says


def images(row):
    return SETUP.batch or IMAGES.get(row.split("-")[0], 0)


def flop(row):
    """Count a run's FLOP: 2 for each weight and token, attention 4 N^2 D a block; the backward pass is twice the forward's."""
    import model
    size = model.SIZES[SETUP.model]
    N, width = (SIDE // size["patch_size"]) ** 2, size["hidden_size"]
    trunk = size["depth"] * (2 * N * 12 * width ** 2 + 4 * N ** 2 * width)
    head = 2 * SIDE ** 2 * width * K
    counts = {"step": 3 * (trunk + head), "loss": 3 * head, "velocity": 2 * trunk + head}    # cfg: the trunk runs twice
    return images(row) * counts.get(row.split("-")[0], 0)


def network():
    import model
    torch.manual_seed(0)
    net = model.DiT(**model.SIZES[SETUP.model])
    for block in net.blocks if SETUP.compile else ():
        block.compile()
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)       # zeros would make the softmax's work too easy
    return net


def plain_loss(logits, codes):                             # logits [P,K], codes [P]
    return F.cross_entropy(logits, codes) + 1e-5 * logits.logsumexp(1).square().mean()


def released(folder):
    """Build the DiT-S/2 of the authors' release; its forward(z, t, y, cfg) returns logits [B,K,h,w]."""
    sys.path.insert(0, folder)
    from models.dit import DiT
    torch.manual_seed(0)
    net = DiT(input_size=SIDE, patch_size=2, in_channels=D, hidden_size=384, depth=12, num_heads=6, mlp_ratio=4.0,
              num_classes=1000, model_type="purrception", vocabulary_size=K)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)
    return net


def step(ours, bf16=False, release=None):
    """Prepare one training step: forward, loss, backward, AdamW."""
    import flow
    net = released(release) if release else network()
    B = images("step")
    z, t, y, codes = torch.randn(B, D, SIDE, SIDE), torch.rand(B), torch.arange(B), torch.randint(K, (B, SIDE, SIDE))
    if release and bf16:                                   # as DeepSpeed has it, but for the float32 copy of the weights
        net, z, t = net.bfloat16(), z.bfloat16(), t.bfloat16()
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=ours)
    method = flow.Purrception(net, torch.randn(K, D), label_dropout=0) if ours else None

    def run():
        with torch.autocast(SETUP.device, torch.bfloat16, enabled=bf16 and not release):
            if ours:
                loss = method.loss(z, t, y, codes)[0]
            elif release:                                  # as its trainer.py, _train_step
                logits = net(z, t, y, 1.0)                 # [B,K,h,w]
                loss = F.cross_entropy(logits, codes) + 1e-5 * torch.logsumexp(logits, dim=1).pow(2).mean()
            else:
                loss = plain_loss(net(z, t, y).flatten(0, 2).float(), codes.flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
    return run


def loss(ours, positions=None, codes=K):
    """Prepare head and loss, forward and backward, for the positions of all images or, if given, for some."""
    import flow
    import model
    width, positions = model.SIZES[SETUP.model]["hidden_size"], positions or SIDE ** 2 * images("loss")
    h, W, b = (torch.randn(*s).mul_(0.05).requires_grad_() for s in ((positions, width), (codes, width), (codes,)))
    target = torch.randint(codes, (positions,))

    def run():
        value = flow.linear_cross_entropy(h, W, b, target, 1e-5)[0] if ours else plain_loss(F.linear(h, W, b), target)
        value.backward()
        h.grad = W.grad = b.grad = None
    return run


def velocity(ours, bf16=False, release=None):
    """Prepare one guided velocity (cfg 1.3)."""
    import flow
    B = images("velocity")
    z, t, y, E = torch.randn(B, D, SIDE, SIDE), torch.full((B,), 0.5), torch.arange(B), torch.randn(K, D)
    if release:
        net = released(release).eval()
        from utils.sample_utils import _ode_function_purrception as ode
        return torch.no_grad()(lambda: ode(t[0], z.flatten(1), net, y, B, SIDE, E, cfg_scale=1.3, temperature=0.9))
    method = flow.Purrception(network(), E)

    @torch.no_grad()
    def run():
        with torch.autocast(SETUP.device, torch.bfloat16, enabled=bf16):
            if ours:
                return method.velocity(z, t, y, tau=0.9, cfg=1.3)
            cond, uncond = method.model(z, t, y), method.model(z, t, torch.full_like(y, 1000))
            mu = ((uncond + 1.3 * (cond - uncond)) / 0.9).float().softmax(-1) @ E
            return (mu.movedim(-1, 1) - z) / 0.5
    return run


def encode(ours, release=None):
    """Prepare the encoding of 256x256 images by vq-f8's network; the release carries CompVis's."""
    import vq
    x = torch.rand(images("encode"), 3, 256, 256) * 2 - 1
    if ours:
        layout = torch.channels_last if SETUP.device == "cpu" else torch.contiguous_format
        net = vq.VQ().eval().to(memory_format=layout)      # as load_vq does
    elif not release:
        net = vq.VQ().eval()
    else:
        sys.path.insert(0, str(Path(release) / "latent_diffusion"))
        from ldm.modules.diffusionmodules.model import Encoder
        from taming.modules.vqvae.quantize import VectorQuantizer2
        encoder = Encoder(ch=128, out_ch=3, ch_mult=(1, 2, 2, 4), num_res_blocks=2, attn_resolutions=[32], in_channels=3,
                          resolution=256, z_channels=4, double_z=False)
        quantizer, conv = VectorQuantizer2(K, D, beta=0.25), torch.nn.Conv2d(4, D, 1)
        net = types.SimpleNamespace(encode=lambda x: quantizer(conv(encoder(x)))[2][2])
    return torch.inference_mode()(lambda: net.encode(x))


def nearest(ours):
    """Prepare the search for the nearest of 16,384 codes for 16,384 positions."""
    import vq
    z, E = torch.randn(16384, D), torch.randn(K, D)
    return lambda: vq.nearest_code(z, E) if ours else torch.cdist(z, E).argmin(1)


def frechet(ours, package=None):
    """Prepare the Fréchet distance at 2048 dimensions."""
    import numpy as np
    from scipy import linalg

    import fid
    a, b = (fid.statistics(np.random.default_rng(i).standard_normal((4096, 2048))) for i in (0, 1))
    if package:
        from pytorch_fid.fid_score import calculate_frechet_distance
        return lambda: calculate_frechet_distance(*a, *b)

    def plain():
        root = linalg.sqrtm(a[1] @ b[1])
        return np.square(a[0] - b[0]).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root.real)
    return (lambda: fid.frechet_distance(*a, *b)) if ours else plain


def inception(ours, fidelity=None):
    """Prepare Inception features of 256x256 images; the yardstick is torch-fidelity's, else ours unprepared."""
    import fid
    torch.manual_seed(0)
    x = torch.randint(0, 256, (images("inception"), 3, 256, 256), dtype=torch.uint8)
    if ours:
        with torch.device("cpu"):                          # its weights are drawn by a generator there
            net = fid.untrained_inception()
        net.to(SETUP.device)
    elif fidelity:
        package = types.ModuleType("torch_fidelity")       # without its __init__, which wants torchvision
        package.__path__ = [str(Path(fidelity) / "torch_fidelity")]
        sys.modules["torch_fidelity"] = package
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        class Extractor(FeatureExtractorInceptionV3):
            def load_state_dict(self, ours):               # their keys are the published ones
                super().load_state_dict({key: ours[fid.our_name(key)] for key in self.state_dict()})

        with tempfile.NamedTemporaryFile(suffix=".pth") as weights:
            torch.save(fid.InceptionV3().state_dict(), weights.name)
            extractor = Extractor("bench", ["2048"], feature_extractor_weights_path=weights.name)
        net = lambda x: extractor(x)[0]  # noqa: E731
    else:
        net = fid.InceptionV3().eval()                     # batch norms of their own, channels first

    @torch.inference_mode()
    def run():
        return net(x)
    return run


# knobs: what else the yardstick's side is told: whose code it is, and where.
PATHS = {"step": step, "step-bf16": lambda ours, **knobs: step(ours, bf16=ours, **knobs),
         "step-both-bf16": functools.partial(step, bf16=True), "loss": loss,
         "velocity": velocity, "velocity-bf16": lambda ours, **knobs: velocity(ours, bf16=ours, **knobs),
         "nearest": nearest, "encode": encode, "frechet": frechet, "inception": inception}
OF_RELEASE = ("step", "step-bf16", "step-both-bf16", "velocity", "velocity-bf16", "encode")
GROWTH = {f"loss, K = {k:,}": functools.partial(loss, codes=k) for k in (1024, 4096, 16384, 65536)} | {
    f"loss, {p:,} positions": functools.partial(loss, positions=p) for p in (1024, 4096, 16384)}


def peak():
    """Return the most memory this process held since the mark was last reset, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def child(path, ours, knobs):
    """Run one side of one row after a warm-up, and print seconds and MiB."""
    with torch.device(SETUP.device):
        run = (PATHS | GROWTH)[path](ours, **({} if ours else knobs))
    if SETUP.device == "cuda":
        return print(json.dumps(time_on_gpu(run)))
    Path("/proc/self/clear_refs").write_text("5")          # reset the mark to what is held now
    before = peak()
    run()
    start = time.perf_counter()
    run()
    print(json.dumps([time.perf_counter() - start, peak() - before]))


def time_on_gpu(run, runs=10):
    """Return the mean seconds of some runs after a warm-up, and the peak of all memory that torch held, in MiB."""
    for _ in range(3):                                     # blocks are compiled, kernels chosen
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(runs):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / runs, torch.cuda.max_memory_allocated() / 2 ** 20


def compare(path, repeats, knobs, setup, peak_tflops):
    """Run both sides of a row in turn and print its line of the table; on a GPU, a line for each side."""
    results = {"ours": [], "yardstick": []}
    for _ in range(repeats):
        for side in results:
            command = [sys.executable, __file__, path, "--child", side, "--knobs", json.dumps(knobs), *setup]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[side].append(json.loads(printed.splitlines()[-1]))   # other people's code prints, too
    (t1, m1), (t2, m2) = ([statistics.median(column) for column in zip(*results[side])] for side in results)
    name = path + "".join(f", against {Path(value).resolve().name}" for value in knobs.values())
    if SETUP.device == "cuda":
        for side, seconds, memory in (("ours", t1, m1), ("yardstick", t2, m2)):
            rate = flop(path) / seconds / 1e12
            print(f"| {name}, {side} | {seconds * 1e3:.1f} ms | {images(path) / seconds:.0f} images/s | {memory:.0f} MiB | "
                  f"{rate:.0f} TFLOP/s | {rate / peak_tflops:.0%} |", flush=True)
        return
    print(f"| {name} | {t1:.2f} s | {t2:.2f} s | {t2 / t1:.1f}x | {m1:.0f} MiB | {m2:.0f} MiB | {m2 / max(m1, 1):.1f}x |",
          flush=True)


def processes(repeats, steps=60):
    """Train the demo with one process of two threads and with two of one: images a second, all together."""
    for count in (1, 2):
        speeds = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", str(ROOT / "train.py"),
                           "--steps", str(steps), "--log-every", str(steps // 2), "--sample-every", "0", "--name", "x"]
                subprocess.run(command, cwd=folder, check=True, capture_output=True,
                               env=os.environ | {"OMP_NUM_THREADS": str(2 // count)})
                log = Path(folder, "runs/x/log.jsonl").read_text().splitlines()
                speeds.append(json.loads(log[-1])["images_per_second"])
        print(f"demo training, {count} gloo process{'es' * (count > 1)} with {2 // count} threads each: "
              f"{statistics.median(speeds):.0f} images/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Time the heavy paths against plain formulas, or other people's code.")
    parser.add_argument("paths", nargs="*", help=f"rows of the table, of: {' '.join(PATHS)}; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--release", help="folder of a checkout of the authors' release, razvanmatisan/purrception")
    parser.add_argument("--fidelity", help="folder of a checkout of torch-fidelity")
    parser.add_argument("--pytorch-fid", action="store_true", help="the installed pytorch-fid")
    parser.add_argument("--scale", action="store_true", help="growth with K, positions and processes instead")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the rows run")
    parser.add_argument("--model", default="DiT-S/2", help="size of the network, as train.py's")
    parser.add_argument("--batch", type=int, help=f"images in a run; default: {IMAGES}")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, on both sides")
    parser.add_argument("--peak-tflops", type=float, default=989, help="of the GPU; default: H100, dense bf16")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--knobs", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(namespace=SETUP)
    setup = ["--device", args.device, "--model", args.model, *(["--batch", str(args.batch)] if args.batch else ())]
    setup += ["--compile"] if args.compile else []
    if args.child:
        return child(args.paths[0], args.child == "ours", args.knobs)
    rows = []
    if args.release:
        rows += [(path, {"release": args.release}) for path in OF_RELEASE]
    if args.fidelity:
        rows += [("inception", {"fidelity": args.fidelity})]
    if args.pytorch_fid:
        rows += [("frechet", {"package": "pytorch-fid"})]
    rows = rows or [(path, {}) for path in (GROWTH if args.scale else PATHS)]
    if unknown := set(args.paths).difference(path for path, _ in rows):
        parser.error(f"{' '.join(unknown)}: no such row with these flags; there are {', '.join(path for path, _ in rows)}")
    print("| path | time | rate | memory | FLOP | utilisation |\n|---|---|---|---|---|---|" if args.device == "cuda" else
          "| path | ours | yardstick | faster | memory, ours | yardstick | smaller |\n|---|---|---|---|---|---|---|")
    for path, knobs in rows:
        if not args.paths or path in args.paths:
            compare(path, args.repeats, knobs, setup, args.peak_tflops)
    if args.scale:
        processes(args.repeats)


if __name__ == "__main__":
    main()
