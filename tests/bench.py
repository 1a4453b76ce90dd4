"""Time the heavy paths against what one would write first, or against other people's code.

    python -m tests.bench                                against the plain formulas in this file
    python -m tests.bench loss step --repeats 7          some of the rows only
    python -m tests.bench step velocity encode --against path/to/purrception    the release
    python -m tests.bench inception --against path/to/torch-fidelity
    python -m tests.bench frechet --against pytorch-fid                         if installed
    python -m tests.bench --scale                        growth with K and with positions
    python -m tests.bench step-both-bf16 velocity-bf16 --device cuda --model DiT-XL/2 --compile

The release wants timm, einops and torchdiffeq installed, pytorch-fid wants torchvision. Rows called
-bf16 hold our bf16 against float32, step-both-bf16 against the release's own. Each side of a row
runs in a process of its own, the two in turn; a figure is the median over the repeats. Memory is
how far the process's peak rises above what it holds before its first run; on a GPU, the peak of all
that torch holds. Utilisation is flop() over time and --peak-tflops.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fid
import flow
import model
import train
import vq

K, D, SIDE = 16384, 4, 32  # vq-f8's codebook and grid
IMAGES = {"step": 4, "loss": 4, "velocity": 4, "encode": 2, "inception": 32}  # unless --batch says
SETUP = argparse.Namespace()  # main() reads the flags into it


def images(row):
    return SETUP.batch or IMAGES.get(row.split("-")[0], 0)


def flop(row):
    """Count a run's FLOP: 2 for each weight and token, attention 4 N^2 D a block.

    The backward pass is twice the forward's; guidance runs the blocks twice.
    """
    size = model.SIZES[SETUP.model]
    N = (SIDE // size["patch_size"]) ** 2
    width = size["hidden_size"]
    trunk = size["depth"] * (2 * N * 12 * width ** 2 + 4 * N ** 2 * width)
    head = 2 * SIDE ** 2 * width * K
    counts = {"step": 3 * (trunk + head), "loss": 3 * head, "velocity": 2 * trunk + head}
    return images(row) * counts.get(row.split("-")[0], 0)


def network():
    torch.manual_seed(0)
    net = model.DiT(**model.SIZES[SETUP.model])
    # Zeros would make the softmax's work too easy.
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)
    if SETUP.compile:  # the loss, too; the plain side has its blocks compiled
        train.compile_blocks(net)
    return net


def inputs(B):
    """Draw z [B,d,h,w], t and y [B], codes [B,h,w] and the codebook E [K,d]."""
    codes = torch.randint(K, (B, SIDE, SIDE))
    E = torch.randn(K, D)
    return torch.randn(B, D, SIDE, SIDE), torch.full((B,), 0.5), torch.arange(B), codes, E


def plain_loss(logits, codes):  # logits [P,K], codes [P]
    return F.cross_entropy(logits, codes) + 1e-5 * logits.logsumexp(1).square().mean()


def released():
    """Build the release's DiT-S/2; its forward(z, t, y, cfg) returns logits [B,K,h,w]."""
    sys.path.insert(0, SETUP.against)
    from models.dit import DiT
    torch.manual_seed(0)
    net = DiT(input_size=SIDE, patch_size=2, in_channels=D, hidden_size=384, depth=12, num_heads=6,
              mlp_ratio=4.0, num_classes=1000, model_type="purrception", vocabulary_size=K)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)
    return net


def step(ours, bf16=False):
    """Prepare one training step: forward, loss, backward, AdamW."""
    release = not ours and SETUP.against
    net = released() if release else network()
    z, t, y, codes, E = inputs(images("step"))
    if release and bf16:  # as DeepSpeed has it, but for the float32 copy of the weights
        net, z, t = net.bfloat16(), z.bfloat16(), t.bfloat16()
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=ours)
    method = flow.Purrception(net, E, label_dropout=0) if ours else None

    def run():
        with torch.autocast(SETUP.device, torch.bfloat16, enabled=bf16 and not release):
            if ours:
                loss = method.loss(z, t, y, codes)[0]
            elif release:  # as its trainer.py, _train_step
                logits = net(z, t, y, 1.0)  # [B,K,h,w]
                z_loss = 1e-5 * torch.logsumexp(logits, dim=1).pow(2).mean()
                loss = F.cross_entropy(logits, codes) + z_loss
            else:
                loss = plain_loss(net(z, t, y).flatten(0, 2).float(), codes.flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
    return run


def loss(ours, positions=None, codes=K):
    """Prepare head and loss, forward and backward, for the positions of all images or for some."""
    width = model.SIZES[SETUP.model]["hidden_size"]
    positions = positions or SIDE ** 2 * images("loss")
    shapes = (positions, width), (codes, width), (codes,)
    h, W, b = (torch.randn(*shape).mul_(0.05).requires_grad_() for shape in shapes)
    target = torch.randint(codes, (positions,))
    if SETUP.compile:
        train.compile_blocks(types.SimpleNamespace(blocks=()))

    def run():
        if ours:
            value = flow.linear_cross_entropy(h, W, b, target, 1e-5)[0]
        else:
            value = plain_loss(F.linear(h, W, b), target)
        value.backward()
        h.grad = W.grad = b.grad = None
    return run


def velocity(ours, bf16=False):
    """Prepare one guided velocity (cfg 1.3)."""
    z, t, y, _, E = inputs(images("velocity"))
    if SETUP.against and not ours:
        net = released().eval()
        from utils.sample_utils import _ode_function_purrception as ode
        return torch.no_grad()(lambda: ode(
            t[0], z.flatten(1), net, y, len(y), SIDE, E, cfg_scale=1.3, temperature=0.9))
    method = flow.Purrception(network(), E)
    if ours and bf16:  # as sample.py does
        method.model.blocks.bfloat16()
        method.model.final_layer.linear.bfloat16()

    @torch.no_grad()
    def run():
        with torch.autocast(SETUP.device, torch.bfloat16, enabled=bf16):
            if ours:
                return method.velocity(z, t, y, tau=0.9, cfg=1.3)
            c = method.model(z, t, y)
            u = method.model(z, t, torch.full_like(y, 1000))
            mu = ((u + 1.3 * (c - u)) / 0.9).float().softmax(-1) @ E
            return (mu.movedim(-1, 1) - z) / 0.5
    return run


def encode(ours):
    """Prepare the encoding of 256x256 images by vq-f8's network; the release has CompVis's."""
    x = torch.rand(images("encode"), 3, 256, 256) * 2 - 1
    if SETUP.against and not ours:
        sys.path.insert(0, f"{SETUP.against}/latent_diffusion")
        from ldm.modules.diffusionmodules.model import Encoder
        from taming.modules.vqvae.quantize import VectorQuantizer2
        encoder = Encoder(ch=128, out_ch=3, ch_mult=(1, 2, 2, 4), num_res_blocks=2,
                          attn_resolutions=[32], in_channels=3, resolution=256, z_channels=4,
                          double_z=False)
        quantizer = VectorQuantizer2(K, D, beta=0.25)
        conv = torch.nn.Conv2d(4, D, 1)
        return torch.inference_mode()(lambda: quantizer(conv(encoder(x)))[2][2])
    net = vq.VQ().eval()
    if ours and SETUP.device == "cpu":  # as load_vq does
        net = net.to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: net.encode(x))


def nearest(ours):
    """Prepare the search for the nearest of 16,384 codes for 16,384 positions."""
    z = torch.randn(16384, D)
    E = torch.randn(K, D)
    return lambda: flow.nearest_code(z, E) if ours else torch.cdist(z, E).argmin(1)


def frechet(ours):
    """Prepare the Fréchet distance at 2048 dimensions."""
    features = [np.random.default_rng(i).standard_normal((4096, 2048)) for i in (0, 1)]
    a, b = map(fid.statistics, features)
    if SETUP.against and not ours:
        from pytorch_fid.fid_score import calculate_frechet_distance
        return lambda: calculate_frechet_distance(*a, *b)

    def plain():
        from scipy import linalg
        root = linalg.sqrtm(a[1] @ b[1])
        return np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1] - 2 * root.real)
    return (lambda: fid.frechet_distance(*a, *b)) if ours else plain


def inception(ours):
    """Prepare Inception features of 256x256 images: torch-fidelity's, or ours, frozen or not."""
    x = torch.randint(0, 256, (images("inception"), 3, 256, 256), dtype=torch.uint8)
    if ours:
        net = fid.InceptionV3().freeze()
    elif SETUP.against:
        package = types.ModuleType("torch_fidelity")  # without its __init__, for torchvision
        package.__path__ = [f"{SETUP.against}/torch_fidelity"]
        sys.modules["torch_fidelity"] = package
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        class Extractor(FeatureExtractorInceptionV3):
            def load_state_dict(self, ours):  # their keys are the published ones
                super().load_state_dict({key: ours[fid.our_name(key)] for key in self.state_dict()})

        with tempfile.NamedTemporaryFile(suffix=".pth") as weights:
            torch.save(fid.InceptionV3().state_dict(), weights.name)
            extractor = Extractor("bench", ["2048"], feature_extractor_weights_path=weights.name)
        return torch.inference_mode()(lambda: extractor(x)[0])
    else:
        net = fid.InceptionV3().eval()  # batch norms of their own, channels first
    return torch.inference_mode()(lambda: net(x))


PATHS = {row.__name__: row for row in (step, loss, velocity, nearest, encode, frechet, inception)}
PATHS["step-bf16"] = lambda ours: step(ours, bf16=ours)
PATHS["step-both-bf16"] = lambda ours: step(ours, bf16=True)
PATHS["velocity-bf16"] = lambda ours: velocity(ours, bf16=ours)
GROWTH = {f"loss, K = {k:,}": partial(loss, codes=k) for k in (1024, 4096, 16384, 65536)}
GROWTH |= {f"loss, {p:,} positions": partial(loss, positions=p) for p in (1024, 4096, 16384)}


def peak():
    """Return the most memory this process held since the mark was last reset, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def child(path, side):
    """Run one side of one row after a warm-up, and return seconds and MiB."""
    with torch.device(SETUP.device):
        run = (PATHS | GROWTH)[path](side == "ours")
    if SETUP.device == "cuda":
        return time_on_gpu(run)
    Path("/proc/self/clear_refs").write_text("5")  # reset the mark to what is held now
    before = peak()
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, peak() - before


def time_on_gpu(run, runs=10):
    """Return the mean seconds of some runs after a warm-up, and the peak of torch's memory."""
    for _ in range(3):  # code is compiled, kernels are chosen
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(runs):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / runs, torch.cuda.max_memory_allocated() / 2 ** 20


def compare(path):
    """Run both sides of a row in turn and print its line of the table; on a GPU, one each."""
    results = {"ours": [], "yardstick": []}
    for _ in range(SETUP.repeats):
        for side in results:
            command = [sys.executable, "-m", "tests.bench", *sys.argv[1:], "--child", path, side]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[side].append(json.loads(printed.splitlines()[-1]))  # others' code prints, too
    (t1, m1), (t2, m2) = (map(statistics.median, zip(*results[side])) for side in results)
    if SETUP.device == "cuda":
        for side, seconds, memory in (("ours", t1, m1), ("yardstick", t2, m2)):
            rate = flop(path) / seconds / 1e12
            print(f"| {path}, {side} | {seconds * 1e3:.1f} ms | {images(path) / seconds:.0f} "
                  f"images/s | {memory:.0f} MiB | {rate:.0f} TFLOP/s | "
                  f"{rate / SETUP.peak_tflops:.0%} |", flush=True)
    else:
        print(f"| {path} | {t1:.2f} s | {t2:.2f} s | {t2 / t1:.1f}x | {m1:.0f} MiB | {m2:.0f} MiB "
              f"| {m2 / max(m1, 1):.1f}x |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Time the heavy paths against other code.")
    add = parser.add_argument
    add("paths", nargs="*", help=f"rows of the table, of: {' '.join(PATHS)}; default: all")
    add("--against", help="a checkout of the release or of torch-fidelity; or pytorch-fid")
    add("--repeats", type=int, default=5, help="runs of each side")
    add("--scale", action="store_true", help="growth with K and positions instead")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where the rows run")
    add("--model", default="DiT-S/2", help="size of the network, as train.py's")
    add("--batch", type=int, help=f"images in a run; default: {IMAGES}")
    add("--compile", action="store_true", help="compile blocks and loss, as train.py does")
    add("--peak-tflops", type=float, default=989, help="of the GPU; default: H100, dense bf16")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(namespace=SETUP)
    if args.child:
        print(json.dumps(child(*args.child)))
        return
    if args.device == "cuda":
        print("| path | time | rate | memory | FLOP | utilisation |\n|---|---|---|---|---|---|")
    else:
        print("| path | ours | yardstick | faster | memory, ours | yardstick | smaller |\n"
              "|---|---|---|---|---|---|---|")
    for path in args.paths or (GROWTH if args.scale else PATHS):
        compare(path)


if __name__ == "__main__":
    main()
