"""Make the demo's data directory from nothing: draw cats, train their tokenizer, encode them.

    python demo/make.py                        # under two hours on 2 CPU cores

It writes beside itself what train.py, sample.py and fid.py read: tokenizer.pt (a VQ of vq.py: 64x64 pixels become
8x8 codes, K = 1024, d = 4), codes.npy and labels.npy (the training cats), reference.npz (held-out cats), meta.json, and
recipe.txt, train.py's flags for them.

The tokenizer learns as VQ-VAE-2 does (Razavi et al. 2019, arXiv 1906.00446): the gradient passes straight through the
nearest code, the codebook follows the encoder as a moving average of the vectors assigned to each code, and unused codes
are moved onto vectors of the batch. No discriminator and no borrowed perceptual network: an L1 loss on the picture's edges
keeps eyes, whiskers and stripes sharp.
"""
import argparse
import json
import math
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from cats import COATS, cats

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from vq import VQ, from_pixels, nearest_code, replacing  # noqa: E402

CONFIG = dict(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=64, n_embed=1024, embed_dim=4, num_groups=8)
RECIPE = """\
--model DiT-demo/2
--steps 1300
--global-batch-size 64
--lr 0.004
--warmup 100
--cooldown 0.9
--geometric-head
--logit-normal
--ema-ramp
--log-every 50
--ckpt-every 650
--sample-every 650
"""
TRAIN_SEED, HELD_OUT_SEED = 0, 1


def edges(x):
    """Return the differences of neighbouring pixels, across and down, of images [B,3,H,W]."""
    return x.diff(dim=3), x.diff(dim=2)


def reconstruction_loss(y, x):
    """Compare pictures y with x, both [B,3,H,W]: squares for areas, pixels and edges in absolute value for detail."""
    colour = F.mse_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))          # the mean of each code's cell
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x)))
    return 20 * F.mse_loss(y, x) + 20 * colour + F.l1_loss(y, x) + 0.3 * edge


class MovingCodebook:
    """Keep each code at the moving average of the encoder's vectors assigned to it."""

    def __init__(self, E, decay=0.98):
        self.E, self.decay = E, decay                      # [K,D], updated in place
        self.count, self.total = torch.ones(len(E), device=E.device), E.clone()

    def update(self, h, codes):
        """Move the codes towards the vectors h [N,D] assigned to them by codes [N]."""
        self.count.lerp_(torch.bincount(codes, minlength=len(self.E)).float(), 1 - self.decay)
        self.total.lerp_(torch.zeros_like(self.total).index_add_(0, codes, h), 1 - self.decay)
        self.E.copy_(self.total / (self.count[:, None] + 1e-5))

    def replant(self, h, fewest=0.1):
        """Move codes used less than `fewest` times a step onto vectors of the batch, and count how many."""
        dead = (self.count < fewest).nonzero()[:, 0]
        self.E[dead] = h[torch.randint(len(h), (len(dead),), device=h.device)]
        self.count[dead], self.total[dead] = 1.0, self.E[dead]
        return len(dead)


class MuonAndAdamW:
    """Train the convolutions by Muon (Jordan et al. 2024), a kernel as a matrix [c_out,c_in*9], and all else by AdamW.

    Muon gives all singular values of a step the same size. Here 400 of its steps do what 2,000 of AdamW alone do.
    """

    def __init__(self, vq, lr, steps):
        def rate(step):
            return min(1, (step + 1) / 100) * (0.01 + 0.99 * math.cos(math.pi / 2 * step / steps) ** 2)

        self.kernels = [m.weight for m in vq.modules() if isinstance(m, nn.Conv2d) and min(m.in_channels, m.out_channels) > 4]
        self.matrices = [kernel.detach().flatten(1) for kernel in self.kernels]     # views: torch's Muon takes matrices
        others = [p for p in vq.parameters() if p.requires_grad and not any(p is kernel for kernel in self.kernels)]
        self.parts = [torch.optim.Muon(self.matrices, lr, weight_decay=0, momentum=0.9),
                      torch.optim.AdamW(others, 0.15 * lr, betas=(0.9, 0.95), weight_decay=1e-4)]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(part, rate) for part in self.parts]

    def step(self):
        """Take a step along the gradients, and forget them."""
        for kernel, matrix in zip(self.kernels, self.matrices):
            matrix.grad, kernel.grad = kernel.grad.flatten(1), None
        for part, schedule in zip(self.parts, self.schedules):
            part.step()
            schedule.step()
            part.zero_grad()


def train_tokenizer(images, steps, batch_size, lr, seed, device):
    """Train a VQ on images uint8 [N,H,W,3] and return it, its codebook at zero mean and unit variance."""
    torch.manual_seed(seed)
    vq = VQ(**CONFIG).to(device)
    E = vq.quantize.embedding.weight.requires_grad_(False)
    opt = MuonAndAdamW(vq, lr, steps)
    codebook, bar = None, trange(steps, desc="tokenizer")
    for step in bar:
        rows = torch.randint(len(images), (batch_size,))
        x = from_pixels(images[rows]).to(device)
        x = torch.where(torch.rand(batch_size, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        with torch.autocast(device.type, torch.bfloat16):
            h = vq.quant_conv(vq.encoder(x)).float()                     # [B,D,h,w]
        flat = h.detach().movedim(1, -1).flatten(0, -2)                  # [Bhw,D]
        if codebook is None:
            E.copy_(flat[torch.randint(len(flat), (len(E),), device=device)])
            codebook = MovingCodebook(E)
        codes = nearest_code(flat, E)
        z = F.embedding(codes, E).view(len(x), *h.shape[2:], -1).movedim(-1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            straight = h + (z - h).detach()                              # dz/dh = 1
            y = vq.decoder(vq.post_quant_conv(straight))
        loss = reconstruction_loss(y.float(), x) + 0.25 * F.mse_loss(h, z)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        opt.step()
        codebook.update(flat, codes)
        if step % 20 == 0 and step < 0.7 * steps:
            codebook.replant(flat)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr(y.float().clamp(-1, 1), x):.2f}", refresh=False)
    return standardise(vq.eval())


@torch.no_grad()
def standardise(vq):
    """Shift and scale the latent space so that codes have zero mean and unit variance, as N(0, I) noise expects.

    The same shift and the same scale for all codes change no nearest neighbour; the layers on both sides absorb them.
    """
    E = vq.quantize.embedding.weight
    mean, std = E.mean(0), (E - E.mean(0)).square().mean().sqrt()
    E.sub_(mean).div_(std)
    vq.quant_conv.bias.sub_(mean).div_(std)
    vq.quant_conv.weight.div_(std)
    after = vq.post_quant_conv
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.mul_(std)
    return vq


def psnr(y, x):
    """Return the peak signal-to-noise ratio in dB of images in [-1,1] (peak to peak 2)."""
    return 10 * math.log10(4 / F.mse_loss(y, x).item())


@torch.no_grad()
def encode(vq, images, device):
    """Encode images uint8 [N,H,W,3]: codes int64 [N,h,w]."""
    return torch.cat([vq.encode(from_pixels(x).to(device)).cpu() for x in images.split(250)])


def save_images(file, images):
    """Write images as arr_0 of an .npz compressed by LZMA: a fifth smaller than savez_compressed; numpy reads it as any other."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array(member, images)


def main():
    """Read the flags and make the files."""
    parser = argparse.ArgumentParser(description="Draw the demo's cats, train their tokenizer, encode them.")
    parser.add_argument("--out", type=Path, default=HERE, help="data directory to write")
    parser.add_argument("--num-images", type=int, default=10000, help="training cats")
    parser.add_argument("--num-reference", type=int, default=2000, help="held-out cats, of which 500 are the reference")
    parser.add_argument("--steps", type=int, default=22000, help="training steps of the tokenizer")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step")
    parser.add_argument("--lr", type=float, default=2e-2, help="peak learning rate of Muon")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tokenizer's training")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    drawn, labels, _ = cats(4 * args.num_images, TRAIN_SEED)             # the tokenizer sees more, or it learns them by heart
    drawn, held_out = torch.from_numpy(drawn), torch.from_numpy(cats(args.num_reference, HELD_OUT_SEED)[0])
    images, labels = drawn[:args.num_images], labels[:args.num_images]
    start = time.time()
    vq = train_tokenizer(drawn, args.steps, args.batch_size, args.lr, args.seed, device).half().float()  # as it is stored
    codes, held_codes = encode(vq, images, device), encode(vq, held_out, device)
    with torch.no_grad():
        y = torch.cat([vq.decode(c.to(device)).cpu() for c in held_codes.split(250)])
    print(f"{time.time() - start:.0f} s; held-out PSNR {psnr(y, from_pixels(held_out)):.2f} dB; "
          f"{len(codes.unique())} of {CONFIG['n_embed']} codes in use")

    state = {name: tensor.half().cpu() for name, tensor in vq.state_dict().items()}
    meta = dict(tokenizer="tokenizer.pt", image_size=64, classes=list(COATS), reference="reference.npz",
                features="untrained")
    files = {"tokenizer.pt": lambda f: torch.save({"config": CONFIG, "state_dict": state}, f),
             "codes.npy": lambda f: np.save(f, codes.numpy().astype(np.uint16)),
             "labels.npy": lambda f: np.save(f, labels),
             "reference.npz": lambda f: save_images(f, held_out[:500].numpy()),
             "recipe.txt": lambda f: f.write(RECIPE.encode()),
             "meta.json": lambda f: f.write(json.dumps(meta, indent=1).encode())}
    for name, write in files.items():
        with replacing(args.out / name) as file:
            write(file)


if __name__ == "__main__":
    main()
