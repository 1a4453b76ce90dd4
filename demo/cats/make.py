"""Make the demo's data directory from nothing: draw cats, train their tokenizer, encode them.

    python -m demo.cats.make                                             two hours on 2 CPU cores
    python -m demo.cats.make --images PHOTOS --out data/mine --steps 2000    of one's own pictures

It writes beside itself what train.py, sample.py and fid.py read: tokenizer.pt (a VQ of vq.py: 64x64
pixels become 8x8 codes, K = 1024, d = 4), codes.npy and labels.npy (the training cats),
reference.npz (held-out cats), meta.json, and recipe.txt, train.py's flags for them. Of a folder of
pictures, one sub-folder for each class, every tenth is held out.

The tokenizer learns as VQ-VAE-2 does (Razavi et al. 2019, arXiv 1906.00446): the gradient passes
straight through the nearest code, the codebook follows the encoder as a moving average of the
vectors assigned to each code, and unused codes are moved onto vectors of the batch. There is no
discriminator and no borrowed perceptual network: an L1 loss on the picture's edges keeps eyes,
whiskers and stripes sharp.

Shapes: B batch, N vectors or images, H W pixels, h w grid of codes, K codes, d code dimension.
"""
import argparse
import contextlib
import math
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange

from demo.cats.cats import COATS, HERE, cats
from flow import nearest_code
from vq import (VQ, InputError, crop, from_pixels, list_images, load_vq, read_image, write_json,
                write_whole)

CONFIG = dict(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=64, n_embed=1024,
              embed_dim=4, num_groups=8)
RECIPE = """\
--model DiT-demo/2
--steps 1300
--global-batch-size 64
--lr 0.0055
--warmup 100
--cooldown 0.9
--geometric-head
--logit-normal
--ema-ramp
--log-every 50
--ckpt-every 650
--sample-every 650
"""
TRAIN_SEED = 0
HELD_OUT_SEED = 1


# ----- the loss

def edges(x):
    """Return the differences of neighbouring pixels, across and down, of images [B,3,H,W]."""
    return x.diff(dim=3), x.diff(dim=2)


def reconstruction_loss(y, x):
    """Compare pictures y with x, both [B,3,H,W].

    Squares are for areas; pixels and edges in absolute value are for detail.
    """
    colour = F.mse_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))  # the mean of each code's cell
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x)))
    return 20 * F.mse_loss(y, x) + 20 * colour + F.l1_loss(y, x) + 0.3 * edge


def psnr(y, x):
    """Return the peak signal-to-noise ratio in dB of images in [-1,1] (peak to peak 2)."""
    return 10 * math.log10(4 / F.mse_loss(y, x).item())


# ----- codebook and optimizer

class MovingCodebook:
    """Keep each code at the moving average of the encoder's vectors assigned to it."""

    def __init__(self, E, decay=0.98):
        self.E = E                              # [K,d], updated in place
        self.decay = decay
        self.count = torch.ones(len(E), device=E.device)
        self.total = E.clone()

    def update(self, h, codes):
        """Move the codes towards the vectors h [N,d] assigned to them by codes [N]."""
        count = torch.bincount(codes, minlength=len(self.E)).float()
        total = torch.zeros_like(self.total).index_add_(0, codes, h)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        self.E.copy_(self.total / (self.count[:, None] + 1e-5))

    def replant(self, h, fewest=0.1):
        """Move codes used less than `fewest` times a step onto vectors h; return how many."""
        dead = (self.count < fewest).nonzero()[:, 0]
        self.E[dead] = h[torch.randint(len(h), (len(dead),), device=h.device)]
        self.count[dead] = 1.0
        self.total[dead] = self.E[dead]
        return len(dead)


class MuonAndAdamW:
    """Train convolutions by Muon (Jordan et al. 2024), all else by AdamW; the judge learns so, too.

    A kernel counts as a matrix [c_out,c_in*9], and all singular values of its step get the same
    size. Here 400 of these steps do what 2,000 of AdamW alone do.
    """

    def __init__(self, net, lr, steps):
        def rate(step):
            rise = (step + 1) / 100
            fall = math.cos(math.pi / 2 * step / steps) ** 2
            return min(1, rise) * (0.01 + 0.99 * fall)

        self.kernels = [
            m.weight for m in net.modules()
            if isinstance(m, nn.Conv2d) and min(m.in_channels, m.out_channels) > 4]
        self.matrices = [kernel.detach().flatten(1) for kernel in self.kernels]  # views
        taken = {id(kernel) for kernel in self.kernels}
        others = [p for p in net.parameters() if p.requires_grad and id(p) not in taken]
        muon = torch.optim.Muon(self.matrices, lr, weight_decay=0, momentum=0.9)
        adamw = torch.optim.AdamW(others, 0.15 * lr, betas=(0.9, 0.95), weight_decay=1e-4)
        self.parts = [muon, adamw]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(part, rate) for part in self.parts]

    def step(self):
        """Take a step along the gradients, and forget them."""
        for kernel, matrix in zip(self.kernels, self.matrices):
            matrix.grad = kernel.grad.flatten(1)
            kernel.grad = None
        for part, schedule in zip(self.parts, self.schedules):
            part.step()
            schedule.step()
            part.zero_grad()


# ----- the tokenizer

def train_tokenizer(images, steps, batch_size, lr, seed, device):
    """Train a VQ on images uint8 [N,H,W,3]; return it with standardised codes, in eval mode."""
    torch.manual_seed(seed)
    vq = VQ(**CONFIG).to(device)
    E = vq.quantize.embedding.weight.requires_grad_(False)
    opt = MuonAndAdamW(vq, lr, steps)
    codebook = None
    bar = trange(steps, desc="tokenizer")
    for step in bar:
        rows = torch.randint(len(images), (batch_size,))
        x = from_pixels(images[rows]).to(device)
        mirror = torch.rand(batch_size, 1, 1, 1, device=device) < 0.5
        x = torch.where(mirror, x.flip(3), x)
        with torch.autocast(device.type, torch.bfloat16):
            h = vq.quant_conv(vq.encoder(x)).float()            # [B,d,h,w]
        flat = h.detach().movedim(1, -1).flatten(0, -2)         # [Bhw,d]
        if codebook is None:                                    # the first batch gives the codes
            E.copy_(flat[torch.randint(len(flat), (len(E),), device=device)])
            codebook = MovingCodebook(E)
        codes = nearest_code(flat, E)
        z = F.embedding(codes, E).view(len(x), *h.shape[2:], -1).movedim(-1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            straight = h + (z - h).detach()                     # dz/dh = 1
            y = vq.decoder(vq.post_quant_conv(straight))
        loss = reconstruction_loss(y.float(), x) + 0.25 * F.mse_loss(h, z)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        opt.step()
        codebook.update(flat, codes)
        if step % 20 == 0:
            if step < 0.7 * steps:
                codebook.replant(flat)
            quality = psnr(y.float().clamp(-1, 1), x)
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{quality:.2f}", refresh=False)
    return standardise(vq.eval())


@torch.no_grad()
def standardise(vq):
    """Shift and scale the codes to zero mean and unit variance, as noise N(0, I) expects.

    One shift and one scale for all codes change no nearest neighbour; the layers on both sides
    absorb them.
    """
    E = vq.quantize.embedding.weight
    mean = E.mean(0)
    std = (E - mean).square().mean().sqrt()
    E.sub_(mean).div_(std)
    vq.quant_conv.bias.sub_(mean).div_(std)
    vq.quant_conv.weight.div_(std)
    after = vq.post_quant_conv
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.mul_(std)
    return vq


@torch.no_grad()
def encode(vq, images, device):
    """Encode images uint8 [N,H,W,3]: codes int64 [N,h,w]."""
    return torch.cat([vq.encode(from_pixels(x).to(device)).cpu() for x in images.split(250)])


@torch.no_grad()
def decode(vq, codes, device):
    """Decode codes [N,h,w]: images [N,3,H,W] in [-1,1]."""
    return torch.cat([vq.decode(c.to(device)).cpu() for c in codes.split(250)])


# ----- the files

def save_images(file, images, **more):
    """Write images as arr_0 of an .npz. LZMA makes it a fifth smaller than savez_compressed."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in {"arr_0": images, **more}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array))


def read_pictures(root, size):
    """Read the pictures in class folders: uint8 [N,size,size,3], labels [N], class names."""
    paths, labels, classes = list_images(root)
    pictures = []
    known = []
    for path, label in zip(tqdm(paths, "read"), labels):
        with contextlib.suppress(InputError):       # unreadable ones are left out
            pictures.append(crop(read_image(path), size))
            known.append(label)
    print(f"{len(known)} pictures of {len(classes)} classes, {len(paths) - len(known)} left out")
    return np.stack(pictures), np.array(known), classes


def save_codes(folder, codes, labels, meta):
    """Write what train.py needs of a data directory."""
    with write_whole(folder / "codes.npy") as file:
        np.save(file, codes.numpy().astype(np.uint16))
    with write_whole(folder / "labels.npy") as file:
        np.save(file, labels)
    write_json(folder / "meta.json", meta)


def save(folder, vq, codes, labels, classes, held_out, held_codes, held_labels):
    """Write the data directory, and another of held-out codes, val/, in it."""
    state = {name: tensor.half().cpu() for name, tensor in vq.state_dict().items()}
    with write_whole(folder / "tokenizer.pt") as file:
        torch.save({"config": CONFIG, "state_dict": state}, file)
    sha256 = load_vq(folder / "tokenizer.pt").sha256
    meta = dict(tokenizer_sha256=sha256, image_size=held_out.shape[1], classes=list(classes))
    val = folder / "val"
    save_codes(val, held_codes, held_labels, dict(tokenizer="../tokenizer.pt", **meta))
    with write_whole(folder / "reference.npz") as file:
        save_images(file, held_out)
    with write_whole(folder / "recipe.txt") as file:
        file.write(RECIPE.encode())
    meta = dict(tokenizer="tokenizer.pt", **meta, reference="reference.npz")
    save_codes(folder, codes, labels, meta)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Draw the demo's cats or read pictures, train their tokenizer, encode them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, help="folder of class folders to read; None: draw cats")
    add("--size", type=int, default=64, help="side of the pictures' centre crop, in pixels")
    add("--out", type=Path, default=HERE, help="data directory to write")
    add("--num-images", type=int, default=10000, help="training cats")
    add("--num-reference", type=int, default=2000, help="held-out cats; 500 are the reference")
    add("--steps", type=int, default=22000, help="training steps of the tokenizer")
    add("--batch-size", type=int, default=16, help="images a step")
    add("--lr", type=float, default=2e-2, help="peak learning rate of Muon")
    add("--seed", type=int, default=0, help="seed of the tokenizer's training")
    args = parser.parse_args(argv)
    if args.images and (args.out == HERE or args.size < 16 or args.size % 16):
        parser.error("--images: give --out, and a --size that is a multiple of 16")
    if args.images and (args.out / "meta.json").exists():
        raise InputError(f"--out {args.out}: taken, give another")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    if args.images:
        pictures, labels, classes = read_pictures(args.images, args.size)
        held = np.arange(len(pictures)) % 10 == 9
        drawn, held_out = pictures[~held], pictures[held]
        labels, held_labels = labels[~held], labels[held]
        if len(held_out) < 2:
            raise InputError(f"{args.images}: holds {len(pictures)} pictures; twenty are the least")
        args.num_images = len(drawn)
    else:
        # The tokenizer sees four times the cats of the data set, or it would learn them by heart.
        drawn, labels, _ = cats(4 * args.num_images, TRAIN_SEED)
        held_out, held_labels, _ = cats(args.num_reference, HELD_OUT_SEED)
        classes = COATS
    drawn = torch.from_numpy(drawn)
    held_out = torch.from_numpy(held_out)
    start = time.time()
    vq = train_tokenizer(drawn, args.steps, args.batch_size, args.lr, args.seed, device)
    vq = vq.half().float()  # as it is stored
    codes = encode(vq, drawn[:args.num_images], device)
    held_codes = encode(vq, held_out, device)
    again = decode(vq, held_codes, device)
    quality = psnr(again, from_pixels(held_out))
    print(f"{time.time() - start:.0f} s; held-out PSNR {quality:.2f} dB; "
          f"{len(codes.unique())} of {CONFIG['n_embed']} codes in use")
    save(args.out, vq, codes, labels[:args.num_images], classes,
         held_out[:500].numpy(), held_codes[:500], held_labels[:500])
    print(f"next: python train.py --data {args.out}")


if __name__ == "__main__":
    main()
