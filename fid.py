"""Compute the Fréchet Inception distance (FID) between two sets of images.

An image gives 2048 features, the last pooling of an Inception network. A set gives their mean mu and
covariance S. The distance is that of the two Gaussians:

    FID = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

    python fid.py samples/                                             the reference that sample.py recorded
    python fid.py samples/ --ref imagenet/val                          a folder, the paper's protocol
    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz    ADM's reference batch
    python fid.py imagenet/val --ref imagenet/val --save-stats val.npz      statistics, for --ref

A set is a folder of images, searched recursively, or an .npz of uint8 images (arr_0, [N,H,W,3]) or of
statistics (mu, sigma), which take precedence if they fit --features. The number is torch-fidelity's on the
same images and weights. "Untrained" features are those of the same network with seeded random weights: they
rank the demo's results, but their distance is not FID.

References: FID (arXiv 1706.08500); Inception v3 (arXiv 1512.00567), as frozen by TensorFlow in 2015 and
ported by mseitzer/pytorch-fid and toshas/torch-fidelity; resizing (arXiv 2104.11222).

Shapes: B batch, N images, C channels, H W pixels, D features (2048).
"""
import argparse
import functools
import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import linalg
from torch import nn
from tqdm import tqdm

URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
       "weights-inception-2015-12-05-6726825d.pth")
SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp"
LABELS = {"inception": "FID on Inception features",
          "untrained": "Fréchet distance on untrained features (not FID)"}


class InputError(SystemExit):
    """Name a wrong file or flag, and end the script with exit code 1."""


# ---------- the network

class Conv(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


class Branches(nn.ModuleDict):
    """Concatenate the branches' outputs on the channel axis."""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.values()], 1)


Chain = nn.Sequential
MEAN = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # as TensorFlow: without the padding
MAX = nn.MaxPool2d(3, 1, 1)
HALVE = nn.MaxPool2d(3, 2)
DOWN = dict(stride=2, padding="valid")


def block_a(c, c_pool):  # Mixed_5b, 5c, 5d
    return Branches({
        "branch1x1": Conv(c, 64, 1),
        "branch5x5": Chain(Conv(c, 48, 1), Conv(48, 64, 5)),
        "branch3x3dbl": Chain(Conv(c, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)),
        "branch_pool": Chain(MEAN, Conv(c, c_pool, 1))})


def block_b(c):  # Mixed_6a
    return Branches({
        "branch3x3": Conv(c, 384, 3, **DOWN),
        "branch3x3dbl": Chain(Conv(c, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3, **DOWN)),
        "pool": HALVE})


def block_c(c, m):  # Mixed_6b to 6e
    return Branches({
        "branch1x1": Conv(c, 192, 1),
        "branch7x7": Chain(Conv(c, m, 1), Conv(m, m, (1, 7)), Conv(m, 192, (7, 1))),
        "branch7x7dbl": Chain(
            Conv(c, m, 1), Conv(m, m, (7, 1)), Conv(m, m, (1, 7)), Conv(m, m, (7, 1)), Conv(m, 192, (1, 7))),
        "branch_pool": Chain(MEAN, Conv(c, 192, 1))})


def block_d(c):  # Mixed_7a
    return Branches({
        "branch3x3": Chain(Conv(c, 192, 1), Conv(192, 320, 3, **DOWN)),
        "branch7x7x3": Chain(
            Conv(c, 192, 1), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)), Conv(192, 192, 3, **DOWN)),
        "pool": HALVE})


def block_e(c, pool):  # Mixed_7b with MEAN, Mixed_7c with MAX
    def fork():
        return Branches({"a": Conv(384, 384, (1, 3)), "b": Conv(384, 384, (3, 1))})

    return Branches({
        "branch1x1": Conv(c, 320, 1),
        "branch3x3": Chain(Conv(c, 384, 1), fork()),
        "branch3x3dbl": Chain(Conv(c, 448, 1), Conv(448, 384, 3), fork()),
        "branch_pool": Chain(pool, Conv(c, 192, 1))})


class InceptionV3(nn.Module):
    """Compute FID's features: uint8 images [B,3,H,W] of any size to float32 [B,2048].

    This is not torchvision's network: average pools exclude the padding, the last block has a max pool, and
    fc, unused, has 1008 classes.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, **DOWN)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, MEAN)
        self.Mixed_7c = block_e(2048, MAX)
        self.fc = nn.Linear(2048, 1008)

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.uint8:
            raise TypeError(f"InceptionV3 takes uint8 pixels from 0 to 255, not {x.dtype}")
        x = (resize(x.float()) - 128) / 128  # [B,3,299,299]
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 changes features
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B,64,147,147]
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(HALVE(x)))  # [B,192,71,71]
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(HALVE(x))))  # [B,288,35,35]
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
            x = self.Mixed_6e(self.Mixed_6d(x))  # [B,768,17,17]
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B,2048,8,8]
        return x.mean((2, 3))  # [B,2048]

    def freeze(self):
        """Fold batch norms into convolutions, use channels-last: 2.2x faster on a CPU core."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Conv):
                module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


def resize(x, size=299):
    """Interpolate [B,C,H,W] linearly as TensorFlow 1: output row i is at input row i * H / size.

    There is no half-pixel shift and no antialiasing.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, device=x.device) * torch.tensor(n / size, device=x.device)  # [size]
        low = at.long()
        a = x.index_select(dim, low)
        b = x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * (at - low).view((-1,) + (1,) * (3 - dim))
    return x


# ---------- its weights

def our_name(key):
    """Rename a published key. There, branch steps count from 1, forks are a and b, pools do not count."""
    key = key.replace(".branch_pool.", ".branch_pool.1.")
    step = re.search(r"(\.branch\w+)_(\d)([ab]?)\.", key)
    if not step:
        return key
    fork = f"{step[3]}." if step[3] else ""
    return key.replace(step[0], f"{step[1]}.{int(step[2]) - 1}.{fork}")


def load_inception(path: str | Path | None = None) -> InceptionV3:
    """Load a frozen InceptionV3 with the published weights of path, torch's hub cache or a download.

    Raises InputError if the file does not fit exactly.
    """
    twin = Path(torch.hub.get_dir(), "checkpoints", "pt_inception-2015-12-05-6726825d.pth")
    path = path or (twin if twin.exists() else None)  # pytorch-fid's name
    net = InceptionV3()
    safely = dict(map_location="cpu", weights_only=True)
    try:
        if path:
            state = torch.load(path, **safely)
        else:
            state = torch.hub.load_state_dict_from_url(URL, check_hash=True, **safely)
        net.load_state_dict({our_name(key): value.float() for key, value in state.items()})
    except Exception as error:  # offline, damaged, or another network's
        why = " ".join(f"{type(error).__name__}: {error}".split("WeightsUnpickler")[0].split())[:200]
        raise InputError(f"{path or URL}: cannot be loaded ({why}); get {URL} and use --weights") from None
    return net.freeze()


def untrained_inception(seed=0):
    """Build a frozen InceptionV3 with Kaiming-normal weights drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    net = InceptionV3()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    return net.freeze()


# ---------- the distance

def statistics(features):
    """Compute mean [D] and covariance [D,D] (divided by N - 1) of features [N,D], in float64."""
    x = np.array(features, dtype=np.float64)
    mu = x.mean(0)
    x -= mu
    return mu, x.T @ x / (len(x) - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Compute FID from means [D] and covariances [D,D], in float64.

    For any R with R R^T = S1, the eigenvalues of S1 S2 are those of R^T S2 R, and zeros. They are real, as
    that matrix is symmetric, and negative only by rounding. R is the pivoted Cholesky factor, which stops at
    the rank and costs a tenth of an eigendecomposition. Raises ValueError for unusable input.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not (mu1.ndim == 1 and mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2):
        shapes = [a.shape for a in (mu1, sigma1, mu2, sigma2)]
        raise ValueError(f"expected mu [D], sigma [D,D] twice, got {shapes}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics are not finite")
    factor, pivots, rank, _ = linalg.lapack.dpstrf(sigma1, lower=1)
    R = np.empty((len(mu1), rank))
    R[pivots - 1] = np.tril(factor)[:, :rank]
    tr_sqrt = np.sqrt(linalg.eigvalsh(R.T @ sigma2 @ R).clip(min=0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * tr_sqrt
    return max(float(distance), 0.0)  # a set against itself may round to -1e-12


# ---------- sets of images

def read_image(path):
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None


def read_folder(files, args):
    """Yield batches [B,H,W,3] of images of one size, while threads read ahead."""
    batches = [files[i:i + args.batch_size] for i in range(0, len(files), args.batch_size)]
    shape = None
    with ThreadPoolExecutor(args.num_workers) as pool:
        ahead = [pool.map(read_image, batch) for batch in batches[:2]]
        for i, batch in enumerate(batches):
            images = list(ahead.pop(0))
            for path, image in zip(batch, images):
                shape = shape or image.shape
                if image.shape != shape:
                    raise InputError(f"{path}: is {image.shape}, {files[0]} is {shape}; use one size")
            yield np.stack(images)
            ahead += [pool.map(read_image, batch) for batch in batches[i + 2:i + 3]]


def measure(path, features, net, args):
    """Return mu, sigma and N (None if unknown) of a folder or an .npz. net() is for images only."""
    if path.is_dir():
        images = sorted(Path(folder, name) for folder, _, names in os.walk(path, followlinks=True)
                        for name in names if name.lower().endswith(SUFFIXES))
        batches = read_folder(images, args)
    else:
        try:
            with open(path, "rb") as f, np.load(f) as file:  # lazily: ADM's images stay on the disk
                kind = str(file.get("features", "inception"))  # foreign files do not say
                if "mu" in file and kind == features:
                    return file["mu"], file["sigma"], int(file.get("count", 0)) or None
                images = file["arr_0"]
        except Exception as error:
            raise InputError(f"{path}: not a folder or .npz of images (arr_0) or statistics (mu, sigma) "
                             f"of {features} features ({type(error).__name__}: {error})") from None
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise InputError(f"{path}: arr_0 is {images.dtype} {images.shape}; it must be uint8 [N,H,W,3]")
        batches = (images[i:i + args.batch_size] for i in range(0, len(images), args.batch_size))
    if len(images) < 2:
        raise InputError(f"{path}: holds {len(images)} images; a covariance needs two")
    found, network = [], net()
    with tqdm(total=len(images), desc=str(path), unit=" images", disable=None) as bar:
        for pixels in batches:
            x = torch.from_numpy(pixels).to(args.device).permute(0, 3, 1, 2)
            found.append(network(x).cpu().numpy())  # [B,D]
            bar.update(len(pixels))
    return *statistics(np.concatenate(found)), len(images)


def save_statistics(path, **arrays):
    """Write an .npz file, whole or not at all."""
    partial = path.with_name(f".{path.stem}.partial.npz")
    try:
        np.savez(partial, **arrays)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"--save-stats {path}: cannot be written ({error})") from None


def recorded(samples):
    """Return what sample.py recorded beside the samples, a dictionary; {} if nothing."""
    path = samples.absolute()
    path = path.with_name((path.stem if path.suffix == ".npz" else path.name) + ".json")
    try:
        record = json.loads(path.read_text())
        ours = record["features"] in LABELS and "reference" in record and record["num_samples"] > 0
        return record if ours else {}
    except Exception:  # no file, or another program's
        return {}


def compare(args):
    """Measure both sets: distance, kind of features, reference, both counts."""
    record = recorded(args.samples)
    features = args.features or record.get("features", "inception")
    reference = args.ref or record.get("reference")
    if not reference:
        raise InputError(f"{args.samples}: has no recorded reference; give one with --ref")
    if features == "untrained" and args.weights:
        raise InputError("--weights: cannot be used with untrained features; add --features inception")
    wanted = record.get("num_samples", 0)
    if args.samples.is_dir() and len(list(args.samples.glob("*.png"))) < wanted:
        raise InputError(f"{args.samples}: has fewer than {wanted} images; repeat the sample.py command")
    for path in (args.samples, Path(reference)):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")

    @functools.cache
    def net():  # not needed for statistics alone
        network = untrained_inception() if features == "untrained" else load_inception(args.weights)
        return network.to(args.device)

    mu1, sigma1, n1 = measure(args.samples, features, net, args)
    if args.save_stats:
        save_statistics(args.save_stats, mu=mu1, sigma=sigma1, count=n1 or 0, features=features)
    mu2, sigma2, n2 = measure(Path(reference), features, net, args)
    try:
        value = frechet_distance(mu1, sigma1, mu2, sigma2)
    except ValueError as error:
        raise InputError(f"{args.samples}, {reference}: unusable ({error}); measure both again") from None
    for path, n in ((args.samples, n1), (reference, n2)):
        if n and n < len(mu1):
            print(f"Warning: {n} images ({path}) are fewer than {len(mu1)} features; the covariance is "
                  "singular and the number biased. Compare equal counts only.", file=sys.stderr)
    return value, features, reference, n1, n2


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fréchet distance between two sets of images.")
    add = parser.add_argument
    add("samples", type=Path, help="folder of images, or .npz of images or of statistics")
    add("--ref", type=Path, help="the reference, likewise; default: what sample.py recorded")
    add("--features", choices=LABELS, help="default: what sample.py recorded, else inception")
    add("--weights", type=Path, help="Inception weights; default: torch's hub cache, else a download")
    add("--save-stats", type=Path, metavar="FILE.npz", help="write the samples' statistics, for --ref")
    add("--batch-size", type=int, default=32, help="images per batch")
    add("--num-workers", type=int, default=min(8, os.cpu_count()), help="threads that read images")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.num_workers < 1:
        parser.error("--batch-size and --num-workers must be at least 1")
    if args.save_stats and not (args.save_stats.suffix == ".npz" and args.save_stats.parent.is_dir()):
        parser.error(f"--save-stats {args.save_stats}: must end in .npz and lie in a folder that exists")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("fid.py runs in one process: use python, not torchrun")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    value, features, reference, n1, n2 = compare(args)
    print(f"{LABELS[features]} of {n1 or 'an unknown number of'} images ({args.samples}) against "
          f"{n2 or 'an unknown number'} ({reference}): {value:.4f}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
