"""Judge pictures of the demo's cats by a small network that has learnt to read them.

cats.py knows the coat of a cat and the numbers it was drawn with, so a network can learn to read them off the
picture. It learns from cats as the tokenizer reconstructs them, because samples come from its decoder too.
The figures of a set of samples:

    coat        share of pictures whose coat is the class asked for
    distance    Fréchet distance to real cats in the network's 64 features (formula: fid.py)
    precision   share of samples within the reach of a real cat: fidelity
    recall      share of real cats within the reach of a sample: diversity
    spread      variance of a predicted number within a coat, divided by that of real cats; mean over numbers

The reach of a picture is the distance to its third nearest neighbour of the same set. Distance, precision and
recall depend on the number of pictures: compare equal counts only. As many real cats are the yardstick.

Of 2,000 held-out cats the network names every coat; R^2 of the numbers within a coat is at least 0.92, but for fur
(0.77), pitch (0.83) and the green of the eyes (0.85).
It sees what it was taught, coat, pose and colours, and overlooks damage that leaves these readable: 256 real cats
are at a distance of 2.0 and a precision of 0.87, and with a tenth of their codes drawn at random still at 2.9 and 0.84.

    python demo/judge.py                  # train: two to four minutes on 2 CPU cores; writes demo/judge.pt
    python demo/judge.py samples          # judge a folder that sample.py has made

References: Fréchet distance (arXiv 1706.08500); precision and recall (Kynkäänniemi et al., arXiv 1904.06991).
Shapes: B batch, N n pictures, H W pixels, D features (64), M numbers (cats.NUMBERS).
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import nn
from tqdm import trange

from cats import COATS, NUMBERS, cats, draw
from make import HELD_OUT_SEED, HERE, TRAIN_SEED, MuonAndAdamW, encode

sys.path.insert(0, str(HERE.parent))
from fid import frechet_distance, read_image, statistics  # noqa: E402
from train import number  # noqa: E402
from vq import InputError, decode_pixels, from_pixels, load_vq, read_checkpoint, read_json, replacing, start_process  # noqa: E402

WEIGHTS = HERE / "judge.pt"
NEIGHBOURS = 3                                   # k of precision and recall


# ---------- the network

def conv(c_in, c_out, side, stride):
    layer = nn.Conv2d(c_in, c_out, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.SiLU())


class Judge(nn.Module):
    """Read 64x64 pictures: 64 features, and from these the coat and the numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(                                       # [B,3,64,64]
            conv(3, 32, 5, stride=2),                                    # [B,32,32,32]
            conv(32, 48, 3, stride=2),                                   # [B,48,16,16]
            conv(48, 64, 3, stride=2),                                   # [B,64,8,8]
            conv(64, 64, 3, stride=1),
            nn.Conv2d(64, 16, 1), nn.Flatten(),                          # [B,1024]: where things are matters
            nn.Linear(1024, 64))                                         # [B,64]
        self.coat, self.numbers = nn.Linear(64, len(COATS)), nn.Linear(64, len(NUMBERS))
        self.register_buffer("mean", torch.zeros(len(NUMBERS)))          # of the training cats' numbers
        self.register_buffer("std", torch.ones(len(NUMBERS)))

    def forward(self, x):
        """Map pictures [B,3,64,64] in [-1,1] to features [B,64], logits [B,10], standardised numbers [B,M]."""
        features = self.body(x)
        h = F.silu(features)
        return features, self.coat(h), self.numbers(h)


def load_judge(device):
    """Load demo/judge.pt, frozen, in eval mode."""
    judge = Judge()
    judge.load_state_dict(read_checkpoint(WEIGHTS))                      # float16 in the file
    return judge.eval().requires_grad_(False).to(device)


@torch.no_grad()
def look(judge, pixels, batch_size=250):
    """Read pictures uint8 [N,64,64,3]: features [N,64], coat logits [N,10], numbers [N,M], float32 arrays."""
    batches = torch.as_tensor(pixels).split(batch_size)
    seen = [judge(from_pixels(some).to(judge.mean.device)) for some in batches]
    features, logits, numbers = (torch.cat(parts) for parts in zip(*seen))
    return features.cpu().numpy(), logits.cpu().numpy(), (judge.mean + judge.std * numbers).cpu().numpy()


# ---------- training

def reconstruct(vq, pixels, device):
    """Encode and decode pictures uint8 [N,H,W,3]; return the like."""
    return decode_pixels(vq, encode(vq, torch.as_tensor(pixels), device).to(device))


def mirror(numbers):
    """Return the numbers [N,M] of the same cats in a mirror."""
    odd = np.isin(NUMBERS, ("x", "yaw", "tilt", "light x"))
    return np.where(odd, -numbers, numbers) + (np.array(NUMBERS) == "x")  # x becomes 1 - x


def train_judge(pixels, coats, numbers, epochs, batch_size, lr, device):
    """Train a judge on pictures uint8 [N,64,64,3] and their mirror images; return it in eval mode."""
    torch.manual_seed(0)
    judge = Judge().to(device)
    x = torch.cat([pixels, pixels.flip(2)])                              # [2N,64,64,3]
    coats = torch.from_numpy(coats).long().repeat(2)
    numbers = torch.from_numpy(np.concatenate([numbers, mirror(numbers)])).float()
    judge.mean.copy_(numbers.mean(0))
    judge.std.copy_(numbers.std(0))
    target = (numbers - numbers.mean(0)) / numbers.std(0)
    steps = max(1, len(x) // batch_size)
    opt = MuonAndAdamW(judge, lr, epochs * steps)
    bar = trange(epochs, desc="judge", unit=" epochs", disable=None)
    for epoch in bar:
        judge.train(epoch < 2 / 3 * epochs)          # then statistics stay as they are: a batch's are noisy
        for rows in torch.randperm(len(x))[:steps * batch_size].split(batch_size):
            picture = from_pixels(x[rows]).to(device, memory_format=torch.channels_last)   # faster on a CPU
            _, logits, guess = judge(picture)
            wrong = F.cross_entropy(logits, coats[rows].to(device))
            error = F.mse_loss(guess, target[rows].to(device))
            (wrong + error).backward()
            opt.step()
        bar.set_postfix(coat=f"{wrong.item():.4f}", numbers=f"{error.item():.4f}")
    return judge.eval().requires_grad_(False)


def save_judge(judge, path=WEIGHTS):
    """Write the weights as float16."""
    with replacing(path) as file:
        torch.save({name: tensor.half().cpu() for name, tensor in judge.state_dict().items()}, file)


# ---------- the figures

def variance(numbers, coats):
    """Return the variance [M] of numbers [N,M] within a coat, as coats differ in their mean colours."""
    groups = [numbers[coats == coat] for coat in np.unique(coats)]
    return sum(np.square(group - group.mean(0)).sum(0) for group in groups) / (len(numbers) - len(groups))


def covered(x, y):
    """Return the share of points x [N,D] within the reach of any point of y [n,D].

    A point of y reaches to its k-th nearest neighbour in y.
    """
    reach = np.sort(cdist(y, y), 1)[:, NEIGHBOURS]                      # [n]; column 0 is the point itself
    return (cdist(x, y) <= reach).any(1).mean()


def figures(seen, coats, reference):
    """Compare pictures with real cats of the same coats.

    seen: look() at N pictures; coats: int [N], asked for; reference: what reference() returns.
    Return a dictionary of floats, coat, distance, precision, recall and spread, and of spreads by number.
    The 64 features are divided by their standard deviations on the real cats.
    """
    features, logits, numbers = seen
    same = np.isin(reference[1], coats)
    real_features, real_coats, real_numbers = (array[same] for array in reference)
    unit = real_features.std(0)
    spreads = variance(numbers, coats) / variance(real_numbers, real_coats)
    return dict(coat=(logits.argmax(1) == coats).mean(),
                distance=frechet_distance(*statistics(features / unit), *statistics(real_features / unit)),
                precision=covered(features / unit, real_features / unit),
                recall=covered(real_features / unit, features / unit),
                spread=spreads.mean(),
                spreads=dict(zip(NUMBERS, spreads.tolist())))


def reference(judge, vq, device):
    """Look at the held-out cats of reference.npz: features [500,64], coats [500], predicted numbers [500,M].

    The tokenizer reconstructs them first. No sample can be sharper than its decoder makes it: compared with
    cats as drawn, all methods would pay for the same blur. The floor is thus what other real cats score.
    """
    pixels = np.load(HERE / "reference.npz")["arr_0"]
    features, _, numbers = look(judge, reconstruct(vq, pixels, device))
    return features, np.arange(len(pixels)) % len(COATS), numbers


def yardstick(judge, vq, coats, device, first=500):
    """Look at reconstructed held-out cats of the coats [N]; reference.npz holds those before `first`."""
    drawn = [draw(np.random.default_rng((HELD_OUT_SEED, first + i)), coat)[0] for i, coat in enumerate(coats)]
    return look(judge, reconstruct(vq, np.stack(drawn), device))


# ---------- the two commands

def read_samples(folder):
    """Read pictures uint8 [N,64,64,3] that sample.py has made, and the coats [N] it was asked for."""
    note = folder.absolute().with_name(f"{folder.absolute().name}.json")
    if not note.exists():
        raise InputError(f"{folder}: no {note.name} beside it; give a folder that sample.py has made")
    record = read_json(note)
    classes, count = record.get("classes"), record.get("num_samples")
    if not isinstance(classes, list) or not classes or not all(isinstance(x, int) for x in (*classes, count)):
        raise InputError(f"{note}: has no classes and num_samples; give a folder that sample.py has made")
    unknown = [label for label in classes if not 0 <= label < len(COATS)]
    if unknown:
        raise InputError(f"{note}: has class {unknown[0]}; the judge knows {len(COATS)} coats only")
    if count < max(2 * len(classes), NEIGHBOURS + 1):
        raise InputError(f"{note}: has {count} pictures of {len(classes)} classes; make two of each")
    pictures = [read_image(folder / f"{i:06d}.png") for i in range(count)]
    for i, picture in enumerate(pictures):
        if picture.shape != (64, 64, 3):
            raise InputError(f"{folder}/{i:06d}.png: is {picture.shape}; the judge reads (64, 64, 3) only")
    return np.stack(pictures), np.resize(classes, count)


def show(name, found):
    """Print figures() of a set of pictures on a line."""
    others = ", ".join(f"{key} {found[key]:.3f}" for key in ("distance", "precision", "recall", "spread"))
    print(f"{name}: coat {found['coat']:.1%}, {others}", flush=True)


def score(folder, device):
    """Judge a folder of samples, and beside it as many real cats."""
    pixels, coats = read_samples(folder)
    judge, vq = load_judge(device), load_vq(HERE / "tokenizer.pt", device)
    real = reference(judge, vq, device)
    found = figures(look(judge, pixels), coats, real)
    show(f"{len(coats)} samples ({folder})", found)
    show(f"{len(coats)} real cats in their place", figures(yardstick(judge, vq, coats, device), coats, real))
    spreads = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["spreads"].items())
    print(f"spread of the samples by number: {spreads}")


def train_and_test(args, device):
    """Train a judge on the cats of codes.npy, write it, and print how well it reads held-out cats."""
    start = time.time()
    vq = load_vq(HERE / "tokenizer.pt", device)
    codes = torch.from_numpy(np.load(HERE / "codes.npy")[:args.num_images].astype(np.int64))
    _, coats, numbers = cats(len(codes), TRAIN_SEED)
    pixels = torch.cat([decode_pixels(vq, some.to(device)) for some in codes.split(250)])
    print(f"{time.time() - start:.0f} s to draw and to decode {len(pixels)} cats", flush=True)
    save_judge(train_judge(pixels, coats, numbers, args.epochs, args.batch_size, args.lr, device))
    print(f"{time.time() - start:.0f} s in all; {WEIGHTS} has {WEIGHTS.stat().st_size:,} bytes")

    judge = load_judge(device)                                           # as it is stored
    drawn, coats, numbers = cats(args.num_held_out, HELD_OUT_SEED)
    _, logits, guess = look(judge, reconstruct(vq, drawn, device))
    print(f"held-out cats: coat {(logits.argmax(1) == coats).mean():.2%}; R^2 within a coat:")
    for name, error, total in zip(NUMBERS, np.square(guess - numbers).mean(0), variance(numbers, coats)):
        print(f"  {name:14}  {1 - error / total:.3f}")
    coats = np.arange(256) % len(COATS)
    other = yardstick(judge, vq, coats, device)
    show("256 other held-out cats, the floor", figures(other, coats, reference(judge, vq, device)))


def main():
    parser = argparse.ArgumentParser(description="Judge samples of the demo, or train the judge.")
    add = parser.add_argument
    add("samples", nargs="?", type=Path, help="folder made by sample.py; without: train")
    add("--num-images", type=number(int, 20), default=6000, help="cats to train on, of codes.npy")
    add("--epochs", type=number(int, 1), default=8, help="passes over the cats and their mirror images")
    add("--batch-size", type=number(int, 2), default=64, help="images a step")
    add("--lr", type=number(float, 1e-12), default=2e-2, help="peak learning rate of Muon")
    add("--num-held-out", type=number(int, 20), default=2000, help="cats to test the judge on")
    args = parser.parse_args()
    _, _, device = start_process()
    if args.samples:
        score(args.samples, device)
    else:
        train_and_test(args, device)


if __name__ == "__main__":
    main()
