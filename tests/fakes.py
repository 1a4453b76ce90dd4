"""Small networks, and the plain formulas that the tests compare flow.py with.

Shapes: B batch, h w grid, N tokens of G positions, D width, K codes, d code dimension.
"""
import torch
from torch import nn

import flow
from model import DiT

K = 11         # codes
d = 3          # their dimension
SIDE = 4       # of the grid
CLASSES = 5


class Fake(nn.Module):
    """All that flow.py asks of a network; it remembers what it was called with."""

    def __init__(self, outputs=K, side=SIDE, patch=2, D=8, in_channels=d, classes=CLASSES):
        super().__init__()
        self.input_size = side
        self.patch_size = patch
        self.num_classes = classes
        self.in_channels = in_channels
        self.calls = []
        self.x_embedder = nn.Conv2d(in_channels, D, patch, patch)
        self.y_embedder = nn.Embedding(classes + 1, D)
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(D, patch ** 2 * outputs)

    def hidden(self, z, t, y):
        self.calls.append((z.detach().clone(), t, y))
        x = self.x_embedder(z).flatten(2).transpose(1, 2)       # [B,N,D]
        return torch.tanh(x + self.y_embedder(y)[:, None] + t[:, None, None])

    def forward(self, z, t, y):
        """Arrange the outputs on the grid, position by position: [B,h,w,outputs]."""
        p = self.patch_size
        tokens = self.final_layer.linear(self.hidden(z, t, y)).unflatten(2, (p * p, -1))
        grid = []
        for i in range(self.input_size):
            for j in range(self.input_size):
                token = i // p * (self.input_size // p) + j // p
                grid.append(tokens[:, token, i % p * p + j % p])
        return torch.stack(grid, 1).unflatten(1, (self.input_size, -1))


def outputs_of(name, codes=K, dimension=d):
    """Return how many numbers per position a method's network returns."""
    return dimension if name in ("cfm", "endpoint") else codes


def method(name="purrception", patch=2, scale=3.0, z_loss=1e-5, label_dropout=0.1):
    """Build a method around a fake network of random weights and a random codebook."""
    torch.manual_seed(0)
    net = Fake(outputs_of(name), patch=patch)
    with torch.no_grad():
        net.final_layer.linear.weight.mul_(scale)
    settings = [label_dropout] if name in ("cfm", "endpoint") else [z_loss, label_dropout]
    return flow.OBJECTIVES[name](net, torch.randn(K, d), *settings)


def tiny_dit(random=True, **changes):
    """Build a small DiT; random: every weight is drawn, so that no zero hides a mistake."""
    torch.manual_seed(0)
    sizes = dict(input_size=8, patch_size=2, in_channels=3, out_channels=5, hidden_size=16,
                 depth=2, num_heads=2, num_classes=4)
    net = DiT(**{**sizes, **changes})
    for x in net.parameters():
        if random and x.requires_grad:
            nn.init.normal_(x, std=0.3)
    return net


def point(f):
    """Draw a point z of the path, t, y, and the codes at the path's end; the same every time."""
    g = torch.Generator().manual_seed(1)
    side = f.model.input_size
    codes = torch.randint(len(f.codebook), (3, side, side), generator=g)
    t = torch.rand(3, generator=g)
    y = torch.randint(f.model.num_classes, (3,), generator=g)
    return f.path(f.prior(3, g), codes, t), t, y, codes


def plain_outputs(f, z, t, y, cfg=1.0):
    """Compute the guided outputs u + cfg (c - u), [B,h,w,K] or [B,h,w,d]."""
    c = f.model(z, t, y)
    u = f.model(z, t, torch.full_like(y, f.model.num_classes))
    return u + cfg * (c - u)


def plain_posterior(f, z, t, y, tau=1.0, cfg=1.0):
    return (plain_outputs(f, z, t, y, cfg) / tau).softmax(3)


def plain_mean(f, *args):
    return torch.einsum("bhwk,kd->bdhw", plain_posterior(f, *args), f.codebook)


def plain_loss(logits, codes, z_weight):
    """Compute cross-entropy plus z-loss of logits [...,K], all at once, and its two parts."""
    logits = logits.flatten(0, -2)
    ce = nn.functional.cross_entropy(logits, codes.flatten())
    z_part = z_weight * logits.logsumexp(1).square().mean()
    return ce + z_part, ce, z_part


def landing(sample, f, *args, **knobs):
    """Return where z ends, [B,d,h,w], when `sample`, f.sample or flow.sample_beyond, is run."""
    ends = []
    f.nearest = lambda z: ends.append(z) or type(f).nearest(f, z)
    sample(*args, **knobs)
    del f.nearest
    return ends[0]
