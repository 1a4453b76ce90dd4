"""Compute the Fréchet Inception distance (FID) between two sets of images.

The distance is that of two Gaussians, of mean mu and covariance S of 2048 Inception features:

    FID = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)    (arXiv 1706.08500)

    python fid.py samples/                                      sample.py's own reference
    python fid.py samples/ --ref imagenet/val --size 256        the paper's protocol
    python fid.py imagenet/val --size 256 --save-stats val.npz  statistics, for --ref

A set is a folder of images, or an .npz of uint8 images (arr_0, [N,H,W,3]) or statistics (mu,
sigma). The number is torch-fidelity's on the same images and weights. For the demo's cats, a small
network that reads cats takes Inception's place: reference.npz holds its weights.

Shapes: B batch, N images, C channels, H W pixels, D features.
"""
import functools
import json
import re
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vq import (InputError, crop, find_images, make_parser, read_ahead, read_image,
                setup_process, write_whole)

URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
       "weights-inception-2015-12-05-6726825d.pth")
BATCH = 32

# Mean and covariance of the features of a set, their number (0: unknown), features of other real
# images, and weights if these are CatFeatures.
Statistics = namedtuple("Statistics", "mu sigma count others weights", defaults=(None, None))


# ----- the network

class Conv(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


class Branches(nn.ModuleDict):
    def forward(self, x):
        return torch.cat([branch(x) for branch in self.values()], 1)


def convs(c, *layers):
    """Chain convolutions on c channels; layers: (channels, kernel, what else Conv takes)."""
    net = nn.Sequential()
    for width, *how in layers:
        net.append(Conv(c, width, *how))
        c = width
    return net


DOWN = 2, "valid"  # stride and padding
HALVE = nn.MaxPool2d(3, 2)
MAX = nn.MaxPool2d(3, 1, 1)
MEAN = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # as TensorFlow, unlike torchvision


def block_a(c, c_pool):  # Mixed_5b, 5c, 5d
    return Branches(dict(
        branch1x1=Conv(c, 64, 1),
        branch5x5=convs(c, (48, 1), (64, 5)),
        branch3x3dbl=convs(c, (64, 1), (96, 3), (96, 3)),
        branch_pool=nn.Sequential(MEAN, Conv(c, c_pool, 1))))


def block_b(c):  # Mixed_6a
    return Branches(dict(
        branch3x3=Conv(c, 384, 3, *DOWN),
        branch3x3dbl=convs(c, (64, 1), (96, 3), (96, 3, *DOWN)),
        pool=HALVE))


def block_c(c, m):  # Mixed_6b to 6e
    return Branches(dict(
        branch1x1=Conv(c, 192, 1),
        branch7x7=convs(c, (m, 1), (m, (1, 7)), (192, (7, 1))),
        branch7x7dbl=convs(c, (m, 1), (m, (7, 1)), (m, (1, 7)), (m, (7, 1)), (192, (1, 7))),
        branch_pool=nn.Sequential(MEAN, Conv(c, 192, 1))))


def block_d(c):  # Mixed_7a
    return Branches(dict(
        branch3x3=convs(c, (192, 1), (320, 3, *DOWN)),
        branch7x7x3=convs(c, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, *DOWN)),
        pool=HALVE))


def block_e(c, pool):  # Mixed_7b with MEAN, Mixed_7c with MAX
    def fork():
        return Branches(dict(a=Conv(384, 384, (1, 3)), b=Conv(384, 384, (3, 1))))

    return Branches(dict(
        branch1x1=Conv(c, 320, 1),
        branch3x3=convs(c, (384, 1)).append(fork()),
        branch3x3dbl=convs(c, (448, 1), (384, 3)).append(fork()),
        branch_pool=nn.Sequential(pool, Conv(c, 192, 1))))


class InceptionV3(nn.Sequential):
    """Map uint8 images [B,3,H,W] to FID's features [B,2048] (Inception, arXiv 1512.00567)."""

    def __init__(self):
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=Conv(3, 32, 3, *DOWN),
            Conv2d_2a_3x3=Conv(32, 32, 3, padding="valid"),
            Conv2d_2b_3x3=Conv(32, 64, 3),
            maxpool1=HALVE,
            Conv2d_3b_1x1=Conv(64, 80, 1),
            Conv2d_4a_3x3=Conv(80, 192, 3, padding="valid"),
            maxpool2=HALVE,
            Mixed_5b=block_a(192, 32),
            Mixed_5c=block_a(256, 64),
            Mixed_5d=block_a(288, 64),
            Mixed_6a=block_b(288),
            Mixed_6b=block_c(768, 128),
            Mixed_6c=block_c(768, 160),
            Mixed_6d=block_c(768, 160),
            Mixed_6e=block_c(768, 192),
            Mixed_7a=block_d(768),
            Mixed_7b=block_e(1280, MEAN),
            Mixed_7c=block_e(2048, MAX),
            fc=nn.Linear(2048, 1008)))  # published, not used

    @torch.inference_mode()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # TF32 is too coarse
    def forward(self, x):
        if x.dtype != torch.uint8:
            raise TypeError(f"pixels must be uint8, not {x.dtype}")
        x = resize(x.float())  # [B,3,299,299]
        x = (x - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in list(self)[:-1]:
            x = layer(x)
        return x.mean((2, 3))  # [B,2048]

    def freeze(self):
        """Fold batch norms into convolutions, use channels-last: 2.2x faster on a CPU."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Conv):
                module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


def resize(x, size=299):
    """Interpolate [B,C,H,W] as TensorFlow 1 did: output row i lies at input row i * H / size."""
    for dim in (3, 2):
        n = x.shape[dim]
        scale = x.new_tensor(n / size)
        at = torch.arange(size, device=x.device) * scale
        low = at.long()
        high = (low + 1).clamp(max=n - 1)
        a = x.index_select(dim, low)
        b = x.index_select(dim, high)
        weight = (at - low).view(-1, *[1] * (3 - dim))
        x = a + (b - a) * weight
    return x


class CatFeatures(nn.Sequential):
    """Map cats [B,3,64,64] in [-1,1] to features [B,64]: study/judge.py trains it."""

    def __init__(self):
        def conv(c_in, c_out, side, stride):
            layer = nn.Conv2d(c_in, c_out, side, stride, padding=side // 2, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.SiLU())

        super().__init__(
            conv(3, 32, 5, stride=2),   # [B,32,32,32]
            conv(32, 48, 3, stride=2),  # [B,48,16,16]
            conv(48, 64, 3, stride=2),  # [B,64,8,8]
            conv(64, 64, 3, stride=1),
            nn.Conv2d(64, 16, 1),
            nn.Flatten(),               # [B,1024]: where things are matters
            nn.Linear(1024, 64))


# ----- Inception's weights

def our_name(key):
    """Rename a published key: there, steps of a branch count from 1, and pools do not count."""
    key = key.replace(".branch_pool.", ".branch_pool.1.")
    key = re.sub(r"(branch\w+_\d)([ab])", r"\1.\2", key)  # of a fork
    return re.sub(r"_(\d)\.", lambda step: f".{int(step[1]) - 1}.", key)


def load_inception(path=None):
    """Load a frozen InceptionV3 from path, torch's hub cache, or a download."""
    net = InceptionV3()
    with InputError.explain(f"--weights {path}: unusable; give the file {URL}"):
        if path:
            state = torch.load(path, "cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(
                URL, map_location="cpu", check_hash=True, weights_only=True)
        state = {our_name(key): x.float() for key, x in state.items()}
        net.load_state_dict(state)
    return net.freeze()


# ----- the distance

def statistics(features):
    """Compute mean [D] and covariance [D,D] of features [N,D], in float64."""
    x = np.array(features, dtype=np.float64)
    mu = x.mean(0)
    x -= mu
    return mu, x.T @ x / (len(x) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Compute FID from means [D] and covariances [D,D], in float64.

    For R R^T = S1, the eigenvalues of S1 S2 are those of R^T S2 R, which is symmetric: they are
    real, and negative only by rounding. Raises ValueError for unusable numbers.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = np.linalg.eigh(sigma1)
    R = vectors * np.sqrt(values.clip(min=0))
    values = np.linalg.eigvalsh(R.T @ sigma2 @ R)
    tr_sqrt = np.sqrt(values.clip(min=0)).sum()
    difference = mu1 - mu2
    traces = np.trace(sigma1) + np.trace(sigma2)
    distance = difference @ difference + traces - 2 * tr_sqrt
    if not np.isfinite(distance):
        raise ValueError("the statistics are not finite")
    return max(float(distance), 0.0)  # equal sets may give -1e-12


# ----- sets of images

@functools.cache
def inception(path, device):
    return load_inception(path).to(device)


def read_npz(path):
    """Return an .npz's Statistics or else its images."""
    other = InputError.explain(f"{path}: not images (arr_0, uint8 NHWC) or statistics (mu, sigma)")
    with other, open(path, "rb") as f, np.load(f) as file:  # lazily: ADM's take 2 GB
        if "mu" in file:
            weights = {key: file[key] for key in CatFeatures().state_dict() if key in file}
            return Statistics(
                file["mu"], file["sigma"], int(file.get("count", 0)), file.get("others"), weights)
        images = file["arr_0"]
        if images.dtype != np.uint8 or images.shape[3:] != (3,) or not images.size:
            raise ValueError(f"arr_0 is {images.dtype} {images.shape}")
        return images


def measure(path, weights, args, device):
    """Return the Statistics of a folder or an .npz; weights: of CatFeatures, or empty."""
    images = find_images(path) if path.is_dir() else read_npz(path)
    if isinstance(images, Statistics):
        return images
    if len(images) < 2:
        raise InputError(f"{path}: holds {len(images)} images; give two or more")

    def read(image):
        if path.is_file():
            return image
        image = read_image(image)
        return crop(image, args.size) if args.size else np.asarray(image)

    if weights:
        net = CatFeatures().eval().requires_grad_(False).to(device)
        net.load_state_dict({key: torch.from_numpy(x) for key, x in weights.items()})
    else:
        net = inception(args.weights, device)
    rows = []
    shape = (64, 64, 3) if weights else read(images[0]).shape
    for names, pixels in read_ahead(read, images, BATCH, desc=str(path), disable=None):
        for name, image in zip(names, pixels):
            if image.shape != shape:
                raise InputError(f"{name}: is {image.shape}, not {shape}; use --size")
        x = torch.from_numpy(np.stack(pixels)).to(device).movedim(3, 1)
        x = x / 127.5 - 1 if weights else x
        rows.append(net(x).cpu().numpy())  # [B,D]
    return Statistics(*statistics(np.concatenate(rows)), len(images))


def recorded(samples):
    """Return the reference and image count that sample.py recorded, or None and 0."""
    try:
        record = json.loads(Path(f"{samples.absolute()}.json").read_text())
        reference = record["reference"]
        return reference and Path(reference), int(record["num_samples"])
    except Exception:  # no file, or another program's
        return None, 0


def main(argv=None):
    parser = make_parser(
        "Fréchet distance between two sets of images.",
        ("--ref", Path, "reference; None: what sample.py recorded"),
        ("--weights", Path, "of Inception; None: torch's cache, or a download"),
        ("--size", 0, "crop pictures of folders as vq.py does; 0: no"),
        ("--save-stats", Path, "file to write, for --ref"))
    parser.add_argument("samples", type=Path, help="folder or .npz")
    args = parser.parse_args(argv)
    if args.size < 0:
        parser.error("--size: negative")
    _, _, device = setup_process(args.device)
    reference, count = recorded(args.samples)
    reference = args.ref or reference
    if not (reference or args.save_stats):
        raise InputError(f"{args.samples}: no reference is recorded; give --ref")
    if not args.samples.is_file() and len(find_images(args.samples)) < count:
        raise InputError(f"{args.samples}: images are missing; repeat sample.py")

    theirs = reference and measure(reference, {}, args, device)
    weights = (theirs and theirs.weights) or {}
    mu, sigma, n, _, own = measure(args.samples, weights, args, device)
    weights = weights or own or {}
    if args.save_stats:
        with write_whole(args.save_stats) as file:
            np.savez(file, mu=mu, sigma=sigma, count=n, **weights)
        print(f"{args.save_stats}: statistics of {n} images")
    if not theirs:
        return
    name = "distance (not FID)" if weights else "FID"
    with InputError.explain(f"{args.samples}, {reference}: cannot be compared"):
        distance = frechet_distance(mu, sigma, theirs.mu, theirs.sigma)
    if theirs.others is not None:
        others = theirs.others[:n or None]
        floor = frechet_distance(*statistics(others), theirs.mu, theirs.sigma)
        print(f"{name} of {len(others)} other real images: {floor:.4f}")
    few = 0 < n < len(mu) or 0 < theirs.count < len(mu)
    note = " (few images: biased)" if few else ""
    print(f"{name}{note} of {n or 'unknown'} images ({args.samples}) to "
          f"{theirs.count or 'unknown'} ({reference}): {distance:.4f}")


if __name__ == "__main__":
    main()
