"""Judge pictures of the demo's cats by a small network that has learnt to read them.

    python -m study.judge samples             judge a folder that sample.py has made
    python -m study.judge coats.png           or a sheet of its or demo/edit.py's, ten coats across
    python -m study.judge                     train: two to four minutes on 2 CPU cores; judge.pt

cats.py knows the coat of a cat and the numbers it was drawn with, so a network can learn to read
them off the picture. It learns from cats as the tokenizer reconstructs them, because samples come
from its decoder, too. The figures of a set of samples:

    coat        share of pictures whose coat is the class asked for
    distance    Fréchet distance to real cats in the network's 64 features (formula: fid.py)
    precision   share of samples within the reach of a real cat: fidelity
    recall      share of real cats within the reach of a sample: diversity
    spread      variance of a predicted number within a coat, divided by that of real cats;
                mean over the numbers

The reach of a picture is the distance to its third nearest neighbour of the same set. Distance,
precision and recall depend on the number of pictures: compare equal counts only. As many real cats
are the yardstick.

The judge sees what it was taught, coat, pose and colours, and overlooks damage that leaves these
readable: 256 real cats are at a distance of 2.0 and a precision of 0.87, and with a tenth of their
codes drawn at random still at 2.9 and 0.84.

References: Fréchet distance (arXiv 1706.08500); precision and recall (Kynkäänniemi et al., arXiv
1904.06991). Shapes: B batch, N n pictures, H W pixels, D features (64), M numbers (cats.NUMBERS).
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import nn
from tqdm import trange

from demo.cats.cats import COATS, HERE, NUMBERS, cats, draw
from demo.cats.make import HELD_OUT_SEED, TRAIN_SEED, MuonAndAdamW, encode, save_images
from fid import CatFeatures, frechet_distance, statistics
from vq import (InputError, from_pixels, load_vq, read_checkpoint, read_image, setup_process,
                write_whole)

WEIGHTS = Path(__file__).with_name("judge.pt")
NEIGHBOURS = 3                                      # k of precision and recall
FIGURES = "distance", "precision", "recall"         # those of figures() that tables compare


# ----- the network

class Judge(nn.Module):
    """Read 64x64 pictures: 64 features, and from these the coat and the numbers."""

    def __init__(self):
        super().__init__()
        self.body = CatFeatures()
        self.coat = nn.Linear(64, len(COATS))
        self.numbers = nn.Linear(64, len(NUMBERS))
        self.register_buffer("mean", torch.zeros(len(NUMBERS)))  # of the training cats' numbers
        self.register_buffer("std", torch.ones(len(NUMBERS)))

    def forward(self, x):
        """Map pictures [B,3,64,64] in [-1,1] to features [B,64], logits [B,10], numbers [B,M].

        The numbers are standardised.
        """
        features = self.body(x)
        h = F.silu(features)
        return features, self.coat(h), self.numbers(h)


def load_judge(device):
    """Load judge.pt, frozen, in eval mode."""
    judge = Judge()
    judge.load_state_dict(read_checkpoint(WEIGHTS))  # float16 in the file
    return judge.eval().requires_grad_(False).to(device)


@torch.no_grad()
def look(judge, pixels):
    """Read pictures uint8 [N,64,64,3]: features [N,64], coat logits [N,10], numbers [N,M]."""
    device = judge.mean.device
    seen = [judge(from_pixels(x).to(device)) for x in torch.as_tensor(pixels).split(250)]
    features, logits, numbers = (torch.cat(parts) for parts in zip(*seen))
    numbers = judge.mean + judge.std * numbers
    return features.cpu().numpy(), logits.cpu().numpy(), numbers.cpu().numpy()


# ----- training

def reconstruct(vq, pixels, device):
    """Encode and decode pictures uint8 [N,H,W,3]; return the like."""
    codes = encode(vq, torch.as_tensor(pixels), device)
    return vq.decode_pixels(codes.to(device))


def mirror(numbers):
    """Return the numbers [N,M] of the same cats in a mirror."""
    odd = np.isin(NUMBERS, ("x", "yaw", "tilt", "light x"))
    return np.where(odd, -numbers, numbers) + (np.array(NUMBERS) == "x")  # x becomes 1 - x


def train_judge(pixels, coats, numbers, epochs, batch_size, lr, device):
    """Train a judge on pictures uint8 [N,64,64,3] and their mirror images; return it frozen."""
    torch.manual_seed(0)
    judge = Judge().to(device)
    x = torch.cat([pixels, pixels.flip(2)])         # [2N,64,64,3]
    coats = torch.from_numpy(coats).long().repeat(2)
    numbers = torch.from_numpy(np.concatenate([numbers, mirror(numbers)])).float()
    judge.mean.copy_(numbers.mean(0))
    judge.std.copy_(numbers.std(0))
    target = (numbers - numbers.mean(0)) / numbers.std(0)
    steps = max(1, len(x) // batch_size)
    opt = MuonAndAdamW(judge, lr, epochs * steps)
    bar = trange(epochs, desc="judge", unit=" epochs", disable=None)
    for epoch in bar:
        # In the last third, batch norms keep their statistics: those of a batch are noisy.
        judge.train(epoch < 2 / 3 * epochs)
        for rows in torch.randperm(len(x))[:steps * batch_size].split(batch_size):
            picture = from_pixels(x[rows])
            # Channels-last convolutions are faster on a CPU.
            picture = picture.to(device, memory_format=torch.channels_last)
            _, logits, guess = judge(picture)
            wrong = F.cross_entropy(logits, coats[rows].to(device))
            error = F.mse_loss(guess, target[rows].to(device))
            (wrong + error).backward()
            opt.step()
        bar.set_postfix(coat=f"{wrong.item():.4f}", numbers=f"{error.item():.4f}")
    return judge.eval().requires_grad_(False)


def save_judge(judge, vq):
    """Write the weights as float16, and into reference.npz what fid.py compares samples with.

    There, each feature is in units of its standard deviation over real cats.
    """
    with write_whole(WEIGHTS) as file:
        torch.save({name: x.half().cpu() for name, x in judge.state_dict().items()}, file)
    device = judge.mean.device
    judge = load_judge(device)                      # as it is stored
    pixels = np.load(HERE / "reference.npz")["arr_0"]
    real, coats, _ = reference(judge, vq, device)
    others, _, _ = yardstick(judge, vq, coats, device)
    unit = real.std(0)
    mu, sigma = statistics(real / unit)
    last = judge.body[-1]
    last.weight /= torch.from_numpy(unit).to(device)[:, None]
    last.bias /= torch.from_numpy(unit).to(device)
    weights = {name: x.cpu().numpy() for name, x in judge.body.state_dict().items()}
    with write_whole(HERE / "reference.npz") as file:
        save_images(file, pixels, mu=mu, sigma=sigma, count=len(real), others=others / unit,
                    **weights)


# ----- the figures

def variance(numbers, coats):
    """Return the variance [M] of numbers [N,M] within a coat, as coats differ in mean colours."""
    groups = [numbers[coats == coat] for coat in np.unique(coats)]
    squares = sum(np.square(group - group.mean(0)).sum(0) for group in groups)
    return squares / (len(numbers) - len(groups))


def covered(x, y):
    """Return the share of points x [N,D] within the reach of any point of y [n,D].

    A point of y reaches to its k-th nearest neighbour in y.
    """
    reach = np.sort(cdist(y, y), 1)[:, NEIGHBOURS]  # [n]; column 0 is the point itself
    return (cdist(x, y) <= reach).any(1).mean()


def figures(seen, coats, reference):
    """Compare pictures with real cats of the same coats.

    seen: look() at N pictures; coats: int [N], asked for; reference: what reference() returns.
    Return a dictionary of floats, coat, distance, precision, recall and spread, and of spreads by
    number. The features are divided by their standard deviations on the real cats.
    """
    features, logits, numbers = seen
    same = np.isin(reference[1], coats)
    real_features, real_coats, real_numbers = (array[same] for array in reference)
    unit = real_features.std(0)
    x = features / unit
    y = real_features / unit
    spreads = variance(numbers, coats) / variance(real_numbers, real_coats)
    return dict(
        coat=(logits.argmax(1) == coats).mean(),
        distance=frechet_distance(*statistics(x), *statistics(y)),
        precision=covered(x, y),
        recall=covered(y, x),
        spread=spreads.mean(),
        spreads=dict(zip(NUMBERS, spreads.tolist())))


def reference(judge, vq, device):
    """Look at the held-out cats of reference.npz: features [500,64], coats, predicted numbers.

    The tokenizer reconstructs them first. No sample can be sharper than its decoder makes it:
    compared with cats as drawn, all methods would pay for the same blur. The floor is thus what
    other real cats score.
    """
    pixels = np.load(HERE / "reference.npz")["arr_0"]
    features, _, numbers = look(judge, reconstruct(vq, pixels, device))
    return features, np.arange(len(pixels)) % len(COATS), numbers


def yardstick(judge, vq, coats, device, first=500):
    """Look at reconstructed held-out cats of the coats [N]; reference.npz has the first 500."""
    generators = [np.random.default_rng((HELD_OUT_SEED, first + i)) for i in range(len(coats))]
    drawn = [draw(rng, coat)[0] for rng, coat in zip(generators, coats)]
    return look(judge, reconstruct(vq, np.stack(drawn), device))


# ----- the two commands

def read_folder(folder):
    """Read pictures uint8 [N,64,64,3] that sample.py has made, and the coats [N] asked for."""
    note = folder.absolute().with_name(f"{folder.absolute().name}.json")
    if not note.exists():
        raise InputError(f"{folder}: has no {note.name} beside it; give a folder of sample.py's")
    record = json.loads(note.read_text())
    classes = record["classes"]
    count = record["num_samples"]
    if not 0 <= min(classes) <= max(classes) < len(COATS):
        raise InputError(f"{note}: has classes {classes}; the judge knows {len(COATS)} coats only")
    if count < max(2 * len(classes), NEIGHBOURS + 1):
        raise InputError(f"{note}: has {count} pictures of {len(classes)} classes; make more")
    pictures = [np.asarray(read_image(folder / f"{i:06d}.png")) for i in range(count)]
    if any(picture.shape != (64, 64, 3) for picture in pictures):
        raise InputError(f"{folder}: the judge reads pictures of 64x64 pixels only")
    return np.stack(pictures), np.resize(classes, count)


def read_sheet(path):
    """Cut a sheet of full rows, a column for each coat, into pictures [N,64,64,3] and coats [N]."""
    page = np.asarray(read_image(path))
    columns = len(COATS)
    rows = len(page) // 66                          # a picture has a border of a pixel
    if rows < 2 or page.shape != (66 * rows, 66 * columns, 3):
        raise InputError(f"{path}: not two or more rows of {columns} cats of 64x64 pixels")
    cells = page.reshape(rows, 66, columns, 66, 3).swapaxes(1, 2)
    pixels = cells[:, :, 1:-1, 1:-1].reshape(-1, 64, 64, 3)
    return pixels, np.arange(len(pixels)) % columns


def show(name, found):
    """Print figures() of a set of pictures on a line."""
    names = "distance", "precision", "recall", "spread"
    others = ", ".join(f"{key} {found[key]:.3f}" for key in names)
    print(f"{name}: coat {found['coat']:.1%}, {others}", flush=True)


def score(path, device):
    """Judge samples, and beside them as many real cats."""
    pixels, coats = read_folder(path) if path.is_dir() else read_sheet(path)
    judge = load_judge(device)
    vq = load_vq(HERE / "tokenizer.pt", device)
    real = reference(judge, vq, device)
    found = figures(look(judge, pixels), coats, real)
    show(f"{len(coats)} samples ({path})", found)
    others = yardstick(judge, vq, coats, device)
    show(f"{len(coats)} real cats in their place", figures(others, coats, real))
    spreads = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["spreads"].items())
    print(f"spread of the samples by number: {spreads}")


def train_and_test(args, device):
    """Train a judge on the cats of codes.npy, write it, and print how well it reads others."""
    start = time.time()
    vq = load_vq(HERE / "tokenizer.pt", device)
    codes = np.load(HERE / "codes.npy")[:args.num_images].astype(np.int64)
    _, coats, numbers = cats(len(codes), TRAIN_SEED)
    batches = torch.from_numpy(codes).split(250)
    pixels = torch.cat([vq.decode_pixels(batch.to(device)) for batch in batches])
    print(f"{time.time() - start:.0f} s to draw and to decode {len(pixels)} cats", flush=True)
    judge = train_judge(pixels, coats, numbers, args.epochs, args.batch_size, args.lr, device)
    save_judge(judge, vq)
    size = WEIGHTS.stat().st_size
    print(f"{time.time() - start:.0f} s in all; {WEIGHTS} has {size:,} bytes")

    judge = load_judge(device)                      # as it is stored
    drawn, coats, numbers = cats(args.num_held_out, HELD_OUT_SEED)
    _, logits, guess = look(judge, reconstruct(vq, drawn, device))
    right = (logits.argmax(1) == coats).mean()
    print(f"held-out cats: coat {right:.2%}; R^2 within a coat:")
    errors = np.square(guess - numbers).mean(0)
    for name, error, total in zip(NUMBERS, errors, variance(numbers, coats)):
        print(f"  {name:14}  {1 - error / total:.3f}")
    coats = np.arange(256) % len(COATS)
    other = yardstick(judge, vq, coats, device)
    show("256 other held-out cats", figures(other, coats, reference(judge, vq, device)))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Judge samples of the demo, or train the judge.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("samples", nargs="?", type=Path, help="sample.py's folder, or a sheet; without: train")
    add("--num-images", type=int, default=6000, help="cats to train on, of codes.npy")
    add("--epochs", type=int, default=8, help="passes over them and their mirror images")
    add("--batch-size", type=int, default=64, help="images a step")
    add("--lr", type=float, default=2e-2, help="peak learning rate of Muon")
    add("--num-held-out", type=int, default=2000, help="cats to test the judge on")
    args = parser.parse_args(argv)
    _, _, device = setup_process()
    if args.samples:
        score(args.samples, device)
    else:
        train_and_test(args, device)


if __name__ == "__main__":
    main()
