"""Time the heavy paths against what one would write first, or against a checkout of other people's code.

    python tests/bench.py                                    this project against the plain formulas in this file
    python tests/bench.py loss step --repeats 7              some of the rows only
    python tests/bench.py --fidelity path/to/torch-fidelity  also its Inception, on the same random weights

Each side of a row runs in a process of its own, the two in turn, so that neither warms a cache for the other; a figure is
the median over the repeats. Memory is the growth of the process's peak over what it holds before its first run. Run it
on an idle machine, with OMP_WAIT_POLICY=passive where other programs may interfere.
"""
import argparse
import json
import resource
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


def network():
    import model
    torch.manual_seed(0)
    net = model.DiT(**model.SIZES["DiT-S/2"])
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)       # at zero all logits are equal
    return net


def plain_loss(logits, codes):                             # logits [P,K], codes [P]
    return F.cross_entropy(logits, codes) + 1e-5 * logits.logsumexp(1).square().mean()


def step(ours, bf16=False):
    """Prepare one training step of DiT-S/2 on four images: forward, loss, backward, AdamW."""
    import flow
    net = network()
    method = flow.Purrception(net, torch.randn(K, D), label_dropout=0)
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=ours)
    z, t, y, codes = torch.randn(4, D, SIDE, SIDE), torch.rand(4), torch.arange(4), torch.randint(K, (4, SIDE, SIDE))

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if ours:
                loss = method.loss(z, t, y, codes)[0]
            else:
                logits = net(z, t, y).movedim(-1, 1)       # [B,K,h,w], as images are kept elsewhere
                loss = plain_loss(logits.movedim(1, -1).flatten(0, 2).float(), codes.flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
    return run


def loss(ours):
    """Prepare head and loss, forward and backward: 4096 positions of width 384."""
    import flow
    h, W, b = (torch.randn(*s).mul_(0.05).requires_grad_() for s in ((4096, 384), (K, 384), (K,)))
    codes = torch.randint(K, (4096,))

    def run():
        value = flow.linear_cross_entropy(h, W, b, codes, 1e-5)[0] if ours else plain_loss(F.linear(h, W, b), codes)
        value.backward()
        h.grad = W.grad = b.grad = None
    return run


def velocity(ours, bf16=False):
    """Prepare one guided velocity (cfg 1.3) of DiT-S/2 on four images."""
    import flow
    net = network()
    method = flow.Purrception(net, torch.randn(K, D))
    z, t, y = torch.randn(4, D, SIDE, SIDE), torch.full((4,), 0.5), torch.arange(4)

    @torch.no_grad()
    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if ours:
                return method.velocity(z, t, y, tau=0.9, cfg=1.3)
            cond, uncond = net(z, t, y).movedim(-1, 1), net(z, t, torch.full_like(y, 1000)).movedim(-1, 1)
            pi = ((uncond + 1.3 * (cond - uncond)) / 0.9).float().softmax(1)
            return (torch.einsum("bkhw,kd->bdhw", pi, method.codebook) - z) / 0.5
    return run


def nearest(ours):
    """Prepare the search for the nearest of 16,384 codes for 16,384 positions."""
    import vq
    z, E = torch.randn(16384, D), torch.randn(K, D)
    return lambda: vq.nearest_code(z, E) if ours else torch.cdist(z, E).argmin(1)


def frechet(ours):
    """Prepare the Fréchet distance at 2048 dimensions."""
    import numpy as np
    from scipy import linalg

    import fid
    a, b = (fid.statistics(np.random.default_rng(i).standard_normal((4096, 2048))) for i in (0, 1))

    def plain():
        root = linalg.sqrtm(a[1] @ b[1])
        return np.square(a[0] - b[0]).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root.real)
    return (lambda: fid.frechet_distance(*a, *b)) if ours else plain


def inception(ours, fidelity=None):
    """Prepare Inception features of 32 images of 256x256; the yardstick is torch-fidelity's, else ours unprepared."""
    import fid
    x = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if ours:
        net = fid.untrained_inception()
    elif fidelity:
        package = types.ModuleType("torch_fidelity")       # without its __init__, which wants torchvision
        package.__path__ = [str(Path(fidelity) / "torch_fidelity")]
        sys.modules["torch_fidelity"] = package
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        with tempfile.NamedTemporaryFile(suffix=".pth") as weights:
            torch.save(fid.InceptionV3().state_dict(), weights.name)
            extractor = FeatureExtractorInceptionV3("bench", ["2048"], feature_extractor_weights_path=weights.name)
        net = lambda x: extractor(x)[0]  # noqa: E731
    else:
        net = fid.InceptionV3().eval()                     # batch norms of their own, channels first

    @torch.inference_mode()
    def run():
        return net(x)
    return run


# The bf16 rows are held against the same float32 yardstick.
PATHS = {"step": step, "step-bf16": lambda ours: step(ours, bf16=ours), "loss": loss, "velocity": velocity,
         "velocity-bf16": lambda ours: velocity(ours, bf16=ours), "nearest": nearest, "frechet": frechet, "inception": inception}


def child(path, ours, fidelity):
    """Run one side of one row once after a warm-up, and print seconds and MiB."""
    run = PATHS[path](ours, fidelity) if path == "inception" else PATHS[path](ours)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731
    before = peak()
    run()
    start = time.perf_counter()
    run()
    print(json.dumps([time.perf_counter() - start, peak() - before]))


def main():
    parser = argparse.ArgumentParser(description="Time the heavy paths against plain formulas.")
    parser.add_argument("paths", nargs="*", help=f"rows of the table, of: {' '.join(PATHS)}; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--fidelity", help="folder of a torch-fidelity checkout, the yardstick for inception")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.paths[0], args.child == "ours", args.fidelity)
    print("| path | ours | plain | faster | memory, ours | plain | smaller |\n|---|---|---|---|---|---|---|")
    for path in args.paths or PATHS:
        results = {"ours": [], "plain": []}
        for _ in range(args.repeats):
            for side in results:
                command = [sys.executable, __file__, path, "--child", side, *(["--fidelity", args.fidelity] if args.fidelity else [])]
                results[side].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        (t1, m1), (t2, m2) = ([statistics.median(column) for column in zip(*results[side])] for side in results)
        print(f"| {path} | {t1:.2f} s | {t2:.2f} s | {t2 / t1:.1f}x | {m1:.0f} MiB | {m2:.0f} MiB | {m2 / max(m1, 1):.1f}x |", flush=True)


if __name__ == "__main__":
    main()
