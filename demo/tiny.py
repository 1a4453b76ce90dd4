"""Purrception on one page (arXiv 2510.01478): learn to draw cats in three minutes on two CPU cores.

    python -m demo.tiny    trains a network, then draws three cats of each coat into tiny.png

A tokenizer has turned each picture into a grid of codes c; code k has the vector e_k. This file is
the whole method, with the paper's equation numbers. Left out here, and where it is:

    guidance and label dropout, the baselines       flow.py
    the head in chunks, never all logits at once    flow.py
    t and y steer every layer, not just the first   model.py
    averaged weights, bf16, many GPUs               train.py
    checkpoints and resuming                        train.py
    training the tokenizer                          demo/cats/make.py

Shapes: B batch, N = 64 tokens, one a code; D width; K = 1024 codes of d = 4 numbers each.
"""
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vq import load_vq, save_image

# ----- the data: ten thousand cats as codes

cats = Path(__file__).with_name("cats")
vq = load_vq(cats / "tokenizer.pt")
E = vq.codebook                                                    # [K,d], row k is e_k
K, d = E.shape
codes = torch.from_numpy(np.load(cats / "codes.npy")).long()       # [10000,8,8]
codes = codes.flatten(1)                                           # [10000,N]
N = codes.shape[1]
labels = torch.from_numpy(np.load(cats / "labels.npy")).long()     # [10000], the coat: 0 to 9
labels = labels.unsqueeze(1)                                       # [10000,1], one for all tokens


# ----- the network: a plain transformer

class Network(nn.Module):
    """Map noisy vectors z [B,N,d], times t [B,1,1] and classes y [B,1] to logits [B,N,K]."""

    def __init__(self, D=128, depth=4, heads=4):
        super().__init__()
        self.z_in = nn.Linear(d, D)
        self.t_in = nn.Sequential(nn.Linear(1, D), nn.SiLU(), nn.Linear(D, D))
        self.y_in = nn.Embedding(10, D)
        self.place = nn.Parameter(2 * torch.randn(N, D))           # far apart from the start
        layers = [nn.TransformerEncoderLayer(D, heads, 4 * D, dropout=0, activation="gelu",
                                             batch_first=True, norm_first=True)
                  for _ in range(depth)]
        self.body = nn.Sequential(*layers, nn.LayerNorm(D))
        self.head = nn.Linear(D, K)
        # At first all codes are equally likely, and the loss is ln K = 6.9.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, z, t, y):
        x = self.z_in(z) + self.t_in(t) + self.y_in(y) + self.place  # [B,N,D]
        return self.head(self.body(x))                               # [B,N,K]


# ----- the loss

def loss(network, c, y, t, z0):
    """Compute Eq. 14 and the z-loss (Sec. 3.3) for codes c [B,N] of classes y [B,1]."""
    z1 = E[c]                                              # [B,N,d]
    z = t * z1 + (1 - t) * z0                              # a point of the path from noise to data
    logits = network(z, t, y)                              # [B,N,K]
    L = logits.logsumexp(2)                                # [B,N]
    logit_c = logits.gather(2, c.unsqueeze(2)).squeeze(2)  # [B,N]
    # pi_c = exp(logit_c) / exp(L), so this is -log pi_c.    (Eq. 14)
    ce = L - logit_c
    return (ce + 1e-5 * L ** 2).mean()                     # the z-loss keeps the logits small


# ----- the sampler

@torch.no_grad()
def sample(network, y, z0, T=50, tau=0.9):
    """Follow the velocity from noise z0 [B,N,d] to codes [B,N] of classes y [B,1] (Appendix B)."""
    z = z0
    for s in range(T):
        t = torch.full((len(z), 1, 1), s / T)
        logits = network(z, t, y)                    # [B,N,K]
        pi = torch.softmax(logits / tau, 2)          # Eq. 12, 15: how likely each code is
        mu = pi @ E                                  # [B,N,d], where the path should end
        v = (mu - z) / (1 - t)                       # Eq. 13
        z = z + v / T                                # the last step lands on mu
    return torch.cdist(z, E).argmin(2)               # the nearest code


# ----- train, then draw

def main(steps=2000, B=16, lr=3e-3):
    torch.manual_seed(0)
    network = Network()
    opt = torch.optim.AdamW(network.parameters(), lr)
    # The rate rises for a hundred steps, then falls to zero.
    rate = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min((s + 1) / 100, 1 - s / steps))
    for step in range(steps):
        rows = torch.randint(len(codes), (B,))
        t = torch.rand(B, 1, 1)                      # t ~ U(0, 1)
        z0 = torch.randn(B, N, d)                    # z0 ~ N(0, I)
        value = loss(network, codes[rows], labels[rows], t, z0)
        value.backward()
        opt.step()
        opt.zero_grad()
        rate.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {value:.2f}", flush=True)

    y = torch.arange(10).repeat(3).unsqueeze(1)      # [30,1], three rows of ten coats
    z0 = torch.randn(len(y), N, d)
    c = sample(network, y, z0)                       # [30,N]
    save_image("tiny.png", vq.decode_pixels(c.view(-1, 8, 8)), columns=10)


if __name__ == "__main__":
    main()
