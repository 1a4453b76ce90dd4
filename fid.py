"""Turn images into a number: the Fréchet Inception distance between two sets of images.

An image becomes 2048 features, the last pooling of an Inception network; a set becomes the mean and the covariance
of its features; the distance is the one between two Gaussians:

    FID = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

    python fid.py samples/                                             against the reference recorded with the samples
    python fid.py samples/ --ref imagenet/val --json fid.json          against a folder, the paper's protocol
    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz    against ADM's reference batch
    python fid.py imagenet/val --ref imagenet/val --save-stats val.npz           statistics to use as --ref later on

Either side is a folder of images (searched recursively), an .npz of uint8 images (arr_0, [N,H,W,3]) or an .npz of
statistics (mu, sigma). In a file that has both, the statistics count: ADM's are those of the whole training set. One
process on one device computes it all; the number is torch-fidelity's on the same images and weights.

Without --ref, the sidecar that sample.py wrote (samples/ -> samples.json) names the data directory, and meta.json there
the reference and the features. Drawn cats are no photographs, so the demo asks for "untrained" features: the same
network with seeded random weights. That distance puts results in order; it is not FID and is not called so.

References: FID (Heusel et al. 2017, arXiv 1706.08500); Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) as frozen
by TensorFlow on 2015-12-05 and ported by mseitzer/pytorch-fid and toshas/torch-fidelity; ADM's evaluator (Dhariwal and
Nichol 2021, openai/guided-diffusion); why the resize matters (Parmar et al. 2021, arXiv 2104.11222).

Shapes: B batch, N images, C channels, H W pixels, D features (2048).
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")    # one and the same file
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LABELS = {"inception": "FID on Inception features", "untrained": "Fréchet distance on untrained features (not FID)"}


class InputError(ValueError):
    """Say in one sentence which file or flag is wrong, what was found, and what to do."""


# ---------------------------------------------------------------------------------------------- the network

class Conv(nn.Module):
    """Convolve, normalise, rectify."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))

    def fold(self):
        """Move the batch norm, once frozen only a scale and a shift of each channel, into the convolution."""
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)                         # [C]
        self.conv.weight = nn.Parameter(self.conv.weight * scale[:, None, None, None])
        self.conv.bias = nn.Parameter(self.bn.bias - self.bn.running_mean * scale)
        self.bn = nn.Identity()


mean3 = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)    # as TensorFlow
max3 = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = functools.partial(F.max_pool2d, kernel_size=3, stride=2)

# The five kinds of blocks: branch by branch its convolutions, each (width, kernel), with DOWN where the grid is halved.
# A branch named after a pool starts with the block's pool; FORK is two convolutions of one input.
DOWN, FORK = (2, "valid"), [(384, (1, 3)), (384, (3, 1))]


def block_a(c_pool):
    """Describe Mixed_5b, 5c and 5d, whose pooling branch is c_pool wide."""
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(c_pool, 1)]}


def block_c(c):
    """Describe Mixed_6b to 6e, whose convolutions of 7x1 are c wide inside."""
    return {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
            "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
            "branch_pool": [(192, 1)]}


BLOCK_B = {"branch3x3": [(384, 3, *DOWN)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, *DOWN)], "pool": []}
BLOCK_D = {"branch3x3": [(192, 1), (320, 3, *DOWN)],
           "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, *DOWN)], "pool": []}
BLOCK_E = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), FORK],
           "branch3x3dbl": [(448, 1), (384, 3), FORK], "branch_pool": [(192, 1)]}


class Block(nn.Module):
    """Run branches side by side and stack what they return on the channel axis.

    Where a branch has several convolutions they are called branch_1, branch_2, ..., in a fork branch_2a and branch_2b:
    the published keys.
    """

    def __init__(self, c_in, pool, branches):
        super().__init__()
        self.pool, self.branches = pool, {}
        for branch, rows in branches.items():
            c, self.branches[branch] = c_in, []
            for i, row in enumerate(rows, 1):
                name = branch if len(rows) == 1 else f"{branch}_{i}"
                step = {name + "a": row[0], name + "b": row[1]} if row is FORK else {name: row}
                for key, conv in step.items():
                    self.add_module(key, Conv(c, *conv))
                self.branches[branch].append(list(step))
                c = sum(conv[0] for conv in step.values())

    def forward(self, x):
        out = []
        for branch, steps in self.branches.items():
            h = [self.pool(x) if "pool" in branch else x]
            for names in steps:
                h = [self.get_submodule(name)(torch.cat(h, 1) if len(h) > 1 else h[0]) for name in names]
            out += h
        return torch.cat(out, 1)


class InceptionV3(nn.Module):
    """Compute FID's features: uint8 images [B,3,H,W], any H and W -> float32 [B,2048].

    Not torchvision's network: average pools skip their padding, Mixed_7c pools by maximum (an oddity of the graph of
    2015, which FID has kept), and fc, which the features do not use, has 1008 classes.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, *DOWN)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b = Block(192, mean3, block_a(32))
        self.Mixed_5c = Block(256, mean3, block_a(64))
        self.Mixed_5d = Block(288, mean3, block_a(64))
        self.Mixed_6a = Block(288, halve, BLOCK_B)
        self.Mixed_6b = Block(768, mean3, block_c(128))
        self.Mixed_6c = Block(768, mean3, block_c(160))
        self.Mixed_6d = Block(768, mean3, block_c(160))
        self.Mixed_6e = Block(768, mean3, block_c(192))
        self.Mixed_7a = Block(768, halve, BLOCK_D)
        self.Mixed_7b = Block(1280, mean3, BLOCK_E)
        self.Mixed_7c = Block(2048, max3, BLOCK_E)
        self.fc = nn.Linear(2048, 1008)

    @torch.inference_mode()
    def forward(self, x):
        if x.dtype != torch.uint8:
            raise TypeError(f"InceptionV3 takes uint8 pixels from 0 to 255, not {x.dtype}")
        x = (resize(x.float()) - 128) / 128                                                            # [B,3,299,299]
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):    # TF32's 10 bits would show in the features
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))                          # [B,64,147,147]
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))                                       # [B,192,71,71]
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))                                  # [B,288,35,35]
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))           # [B,768,17,17]
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                                         # [B,2048,8,8]
        return x.mean((2, 3))                                                                          # [B,2048]

    def freeze(self):
        """Prepare for inference, for good. On a CPU core folded batch norms buy 1.4x and channels-last 1.6x."""
        for conv in [module for module in self.modules() if isinstance(module, Conv)]:
            conv.fold()
        return self.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def resize(x, size=299):
    """Interpolate [B,C,H,W] linearly as TensorFlow 1 did: output row i samples input row i * H / size, without the shift
    by half a pixel and without antialiasing."""
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, device=x.device) * torch.tensor(n / size, device=x.device)             # [size]
        low = at.long()
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * (at - low).view((-1,) + (1,) * (3 - dim))
    return x


# ---------------------------------------------------------------------------------------------- its weights

def load_inception(path=None):
    """Load the published weights into a frozen InceptionV3.

    path: the file; without it, the file is taken from torch's hub cache, under either of its names, or downloaded
    there. Raises InputError for any file that is not exactly this network.
    """
    path = Path(path) if path else published_file()
    if not path.is_file():
        raise InputError(f"{path} is no file: get the Inception weights from {URL}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key: value.float() for key, value in state.items() if not key.endswith("num_batches_tracked")}
    except Exception as error:    # a damaged file fails in a dozen ways, from the zip reader to the unpickler
        raise InputError(f"{path} cannot be read as weights ({type(error).__name__}): get them again from {URL}") from error
    net = InceptionV3()
    want, have = ({key: tuple(value.shape) for key, value in side.items() if not key.endswith("num_batches_tracked")}
                  for side in (net.state_dict(), state))
    for key in sorted(want.keys() | have.keys()):
        if want.get(key) != have.get(key):
            raise InputError(f"{path} is not FID's Inception (nor is torchvision's): {key} is {have.get(key, 'missing')} in "
                             f"the file and {want.get(key, 'missing')} in the network; get the weights from {URL}")
    net.load_state_dict(state)
    return net.freeze()


def published_file():
    """Find the published weights in torch's hub cache, or download them there."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in NAMES:
        if (cache / name).exists():
            return cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(cache / NAMES[0]), hash_prefix=SHA256)
    except (OSError, RuntimeError) as error:    # no network; another hash
        raise InputError(f"the Inception weights could not be downloaded ({error}): get {URL} and put it into {cache}, "
                         "or name the file with --weights") from error
    return cache / NAMES[0]


def untrained_inception(seed=0):
    """Build a frozen InceptionV3 of Kaiming-normal convolutions drawn from seed alone and untouched batch norms."""
    generator = torch.Generator().manual_seed(seed)
    net = InceptionV3()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    return net.freeze()


# ---------------------------------------------------------------------------------------------- the distance

def statistics(features):
    """Compute the mean [D] and the covariance [D,D] (divided by N - 1) of features [N,D] in float64."""
    x = np.array(features, dtype=np.float64)
    mu = x.mean(0)
    x -= mu
    return mu, x.T @ x / (len(x) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Compute |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) in float64. Raises ValueError for shapes amiss.

    With any R for which R R^T = S1, S1 S2 has the eigenvalues of R^T S2 R and zeros: symmetric, so real, and negative
    by rounding only. R is the pivoted Cholesky factor, which stops at the rank (fewer images than features) and
    costs a tenth of an eigendecomposition: at D = 2048 the distance takes 1/7 of the time it takes with scipy's sqrtm.
    """
    from scipy import linalg    # here, because importing it takes 0.3 s
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not (mu1.ndim == 1 and mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2):
        raise ValueError(f"want mu [D], sigma [D,D], got {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    factor, pivots, rank, _ = linalg.lapack.dpstrf(sigma1, lower=1)
    R = np.empty((len(mu1), rank))
    R[pivots - 1] = np.tril(factor)[:, :rank]
    tr_sqrt = np.sqrt(linalg.eigvalsh(R.T @ sigma2 @ R).clip(min=0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * tr_sqrt
    return max(float(distance), 0.0)    # a set against itself may round to -1e-12


# ---------------------------------------------------------------------------------------------- sets of images

class Folder(Dataset):
    """The images below a folder, sorted, as uint8 [H,W,3]. One that cannot be used is returned as a sentence: raised in a
    worker process, an exception would arrive as a page of traceback."""

    def __init__(self, path):
        self.files = sorted(Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names
                            if name.lower().endswith(SUFFIXES))

    def __len__(self):
        return len(self.files)

    @functools.cached_property
    def size(self):
        with Image.open(self.files[0]) as image:
            return image.size

    def __getitem__(self, i):
        try:
            with Image.open(self.files[i]) as image:
                if image.size != self.size:
                    return f"{self.files[i]} is {image.size} and {self.files[0]} {self.size}: resize them to one size"
                return torch.from_numpy(np.array(image.convert("RGB")))
        except Exception as error:    # Pillow raises half a dozen kinds
            return f"{self.files[i]} cannot be read as an image ({error}): replace it or take it away"


def stack(items):
    """Make a batch [B,H,W,3] of images, or the first sentence among them."""
    sentences = [item for item in items if isinstance(item, str)]
    return sentences[0] if sentences else torch.stack(items)


def measure(images, net, args):
    """Run what open_set returned through the network net() builds: -> mu, sigma, N. No last batch is dropped."""
    if isinstance(images, tuple):
        return images
    if isinstance(images, Folder):
        batches = DataLoader(images, args.batch_size, num_workers=args.num_workers, collate_fn=stack)
    else:
        batches = torch.from_numpy(images).split(args.batch_size)
    features = []
    with tqdm(total=len(images), unit=" images", disable=None) as bar:
        for x in batches:                                                                              # [B,H,W,3]
            if isinstance(x, str):
                raise InputError(x)
            features.append(net()(x.to(args.device).permute(0, 3, 1, 2)).cpu())                          # [B,D]
            bar.update(len(x))
    return *statistics(torch.cat(features).numpy()), len(images)


def read(path, *keys):
    """Read these arrays of an .npz, so far as it has them, and leave the rest (gigabytes of images) on the disk."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys if key in file}
    except Exception as error:    # no zip, a cut zip, pickled objects
        raise InputError(f"{path} cannot be read as an .npz of plain arrays ({error}): write it again") from error


def open_set(path, features):
    """Open one side of the comparison: -> a Folder, images [N,H,W,3], or statistics (mu, sigma, N or None)."""
    if path.is_dir():
        images = Folder(path)
        if len(images) < 2:
            raise InputError(f"{path} holds {len(images)} images ({' '.join(SUFFIXES)}) and a covariance takes two")
        return images
    if path.suffix != ".npz" or not path.exists():
        raise InputError(f"{path} is neither a folder of images nor an .npz file")
    stats = read(path, "mu", "sigma", "count", "features")
    kind = str(stats.get("features", "inception"))    # files from elsewhere do not say
    if "mu" in stats and "sigma" in stats and kind == features:
        mu, sigma = stats["mu"], stats["sigma"]
        if not (mu.ndim == 1 and sigma.shape == mu.shape * 2 and {mu.dtype.kind, sigma.dtype.kind} <= set("fiu")
                and np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise InputError(f"{path}: mu {mu.shape} and sigma {sigma.shape} should be finite, [D] and [D,D]: measure "
                             "the images again, with --save-stats")
        return mu, sigma, int(stats["count"]) if "count" in stats else None
    images = read(path, "arr_0").get("arr_0")
    if images is None:
        raise InputError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma) of {features} features"
                         + (f", but of {kind} ones: see --features" if kind != features else ": name another"))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) < 2:
        raise InputError(f"{path}: arr_0 is {images.dtype} {images.shape} and should be uint8 (N, H, W, 3), N > 1")
    return images


def measure_once(path, images, net, args):
    """Measure an .npz of images on untrained features, or take the statistics an earlier run left beside it.

    A hash of the images and of this program tells whether they still hold.
    """
    kept = path.with_name(path.stem + ".untrained-stats.npz")
    source = hashlib.sha256(Path(__file__).read_bytes() + path.read_bytes() + b"%d" % len(images)).hexdigest()
    with contextlib.suppress(InputError):                  # damaged, they are measured again
        if kept.exists() and str(read(kept, "source").get("source")) == source:
            return open_set(kept, "untrained")
    stats = measure(images, net, args)
    try:
        save_statistics(kept, stats, features="untrained", source=source)
    except OSError as error:
        print(f"The reference's statistics cannot be kept for the next run: {error}", file=sys.stderr)
    return stats


def save_statistics(path, stats, **about):
    """Write mu, sigma and their number of images as an .npz, with what else is to be known about them."""
    arrays = {key: value for key, value in zip(("mu", "sigma", "count"), stats) if value is not None}
    with replacing(path) as file:
        np.savez(file, **arrays, **about)


@contextlib.contextmanager
def replacing(path):
    """Open a file for writing that takes path's place when all went well."""
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- the command

def recorded(samples):
    """Follow the samples' sidecar to the data directory's meta.json: -> the sidecar's path, both files' contents.

    A file that does not exist, or is no sidecar of sample.py, counts as empty. The reference comes out as a path.
    """
    path = samples.absolute()
    path = path.with_name((path.stem if path.suffix == ".npz" else path.name) + ".json")
    sidecar = {}
    with contextlib.suppress(InputError):                  # another program's file
        sidecar = read_json(path)
    if not (isinstance(sidecar.get("data"), str) and isinstance(sidecar.get("num_samples"), int)):
        return path, {}, {}
    meta = read_json(Path(sidecar["data"]) / "meta.json")
    if meta.get("reference"):
        meta["reference"] = Path(sidecar["data"]) / meta["reference"]
    return path, sidecar, meta


def read_json(path):
    """Read a dictionary from a JSON file; a file that does not exist counts as empty."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no JSON dictionary ({error}): write it again") from error


def compare(args):
    """Measure both sides: -> a dictionary of everything worth knowing about the result."""
    sidecar_path, sidecar, meta = recorded(args.samples)
    if sidecar and args.json and args.json.absolute() == sidecar_path:
        raise InputError(f"--json {args.json} would replace sample.py's record of these samples: choose another name")
    features = args.features or meta.get("features", "inception")
    if features not in LABELS:
        raise InputError(f"meta.json asks for {features!r} features, there are {' and '.join(LABELS)}: see --features")
    reference = args.ref or meta.get("reference")
    if reference is None:
        raise InputError(f"no reference for {args.samples}: {sidecar_path} leads to no data directory whose meta.json "
                         "names one, so name one with --ref")
    if features == "untrained" and args.weights:
        raise InputError("--weights has no part in untrained features: leave it out, or say --features inception")
    samples, references = open_set(args.samples, features), open_set(reference, features)
    if args.ref is None and isinstance(references, np.ndarray):
        references = references[:meta.get("reference_count")]    # the demo takes fewer than it has: a laptop is slow
    if isinstance(samples, Folder) and len(samples) < sidecar.get("num_samples", 0):
        raise InputError(f"{args.samples} holds {len(samples)} of the {sidecar['num_samples']} images {sidecar_path} "
                         "announces: run the sample.py command again to finish them")

    @functools.cache
    def net():
        return (untrained_inception() if features == "untrained" else load_inception(args.weights)).to(args.device)

    stats = measure(samples, net, args)
    if args.save_stats:
        save_statistics(args.save_stats, stats, features=features)
    if features == "untrained" and isinstance(references, np.ndarray):
        references = measure_once(reference, references, net, args)
    (mu1, sigma1, n1), (mu2, sigma2, n2) = stats, measure(references, net, args)
    if len(mu1) != len(mu2):
        raise InputError(f"{args.samples} has {len(mu1)} features, {reference} {len(mu2)}: measure both on one network")
    for path, n in ((args.samples, n1), (reference, n2)):
        if n is not None and n < len(mu1):
            print(f"Warning: {n} images ({path}) are fewer than the {len(mu1)} features: the covariance is singular "
                  "and the number biased, so compare it with numbers at the same counts only.", file=sys.stderr)
    return {"distance": LABELS[features], "features": features, "samples": str(args.samples), "num_samples": n1,
            "reference": str(reference), "num_reference": n2, "value": frechet_distance(mu1, sigma1, mu2, sigma2)}


def main(argv=None):
    """Read the flags, compare, print the number."""
    parser = argparse.ArgumentParser(description="Fréchet distance between two sets of images.")
    parser.add_argument("samples", type=Path, help="folder of images, or .npz of images or of statistics")
    parser.add_argument("--ref", type=Path, help="the same, to compare with; default: as recorded with samples")
    parser.add_argument("--features", choices=LABELS, help="default: what meta.json says, else inception")
    parser.add_argument("--weights", type=Path, help="Inception weights; default: torch's hub cache, else download")
    parser.add_argument("--batch-size", type=int, default=32, help="images per pass through the network")
    parser.add_argument("--num-workers", type=int, default=min(8, os.cpu_count()), help="processes reading images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--save-stats", type=Path, metavar="FILE.npz", help="keep the samples' statistics for --ref")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result and its conditions there, too")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.num_workers < 0:
        parser.error("--batch-size is at least 1 and --num-workers at least 0")
    if args.save_stats and args.save_stats.suffix != ".npz":
        parser.error(f"--save-stats {args.save_stats} should end in .npz, by which --ref will know it")
    for path in (args.save_stats, args.json):
        if path and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"{path} is a folder, or lies in no folder there is: name a file to write")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("one process does it all: start fid.py with python, not with torchrun")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:    # no such device; no CUDA in this torch
        parser.error(f"--device {args.device}: {error}")
    try:
        result = compare(args)
    except InputError as error:
        sys.exit(f"fid.py: {error}")
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps(result, indent=2, ensure_ascii=False).encode())
    n1, n2 = (result[key] or "an unknown number of" for key in ("num_samples", "num_reference"))
    print(f"{LABELS[result['features']]} of {n1} images ({result['samples']}) against {n2} ({result['reference']}): "
          f"{result['value']:.4f}")


if __name__ == "__main__":
    main()
