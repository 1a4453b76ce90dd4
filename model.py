"""The network: a Diffusion Transformer (DiT) from a noisy latent to K logits per position.

    x [B,d,h,w] --patches--> tokens [B,N,D]         N = (h/p)(w/p) patches of p x p positions
    cond = embed(t) + embed(y)                      the condition: time and class
    x <- x + gate * attention(modulate(norm(x)))    adaLN-Zero block, repeated `depth` times;
    x <- x + gate * mlp(modulate(norm(x)))          shift, scale, gate: linear in silu(cond)
    logits = linear(modulate(norm(x)))              p*p*K numbers per token, K per position

Key names and layouts are facebookresearch/DiT's (arXiv 2212.09748), whose weights load.

Shapes: B batch, d code dimension, h w grid, p patch side, N tokens, D width, K codes.
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTHS = {
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16)
}
SIZES = {f"DiT-{name}/{p}": dict(width, patch_size=p)
         for name, width in WIDTHS.items() for p in (1, 2, 4, 8)}
SIZES["DiT-demo/2"] = dict(depth=4, hidden_size=128, num_heads=2, patch_size=2)


def chain(**layers):
    return nn.Sequential(OrderedDict(layers))


def modulate(x, shift, scale):
    """Scale and shift x [B,N,D] by shift and scale [B,1,D]."""
    return x * (1 + scale) + shift


def sincos_2d(width, side):
    """Encode the columns, then the rows of a grid by sines and cosines: [1,side*side,width]."""
    i = torch.arange(width // 4, dtype=torch.float64)
    omega = 10000 ** -(i / (width / 4))
    angles = torch.arange(side).unsqueeze(1) * omega
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [side,width/2]
    columns = waves.repeat(side, 1)
    rows = waves.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float().unsqueeze(0)


class TimestepEmbedder(nn.Module):
    """Embed times t [B] in [0,1) (DiT: 0..999) by cosines, sines and an MLP: [B,D]."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, width),
            nn.SiLU(),
            nn.Linear(width, width))

    def forward(self, t):
        # float32 island: bf16, as in the authors' release, keeps two digits of t.
        with torch.autocast(t.device.type, enabled=False):
            steps = torch.arange(128, device=t.device)
            frequencies = torch.exp(-math.log(10000) / 128 * steps)
            angles = t.float()[:, None] * frequencies
            waves = torch.cat([angles.cos(), angles.sin()], 1)
            return self.mlp(waves.to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3 * self.num_heads, -1))
        q, k, v = qkv.transpose(1, 2).chunk(3, 1)  # [B,heads,N,D/heads] each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


def adaln(width, parts):
    """Map a condition [B,D] to `parts` shifts, scales or gates: [B,parts*D]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def layer_norm(width):
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    def __init__(self, width, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = layer_norm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = chain(
            fc1=nn.Linear(width, hidden),
            act=nn.GELU("tanh"),
            fc2=nn.Linear(hidden, width))
        self.adaLN_modulation = adaln(width, 6)

    def forward(self, x, cond):  # x [B,N,D], cond [B,D]
        parts = self.adaLN_modulation(cond).unsqueeze(1).chunk(6, 2)  # [B,1,D] each
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Normalise and modulate the tokens. The caller applies the head, `linear`."""

    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = layer_norm(width)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = adaln(width, 2)

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation(cond).unsqueeze(1).chunk(2, 2)
        return modulate(self.norm_final(x), shift, scale)


class DiT(nn.Module):
    """Map a noisy latent, a time and a class to logits. Defaults: DiT-XL/2 on vq-f8's codes."""

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=16384,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        num_classes=1000
    ):
        super().__init__()
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.recompute = False  # True: compute blocks again in the backward pass
        patches = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.x_embedder = chain(proj=patches, flatten=nn.Flatten(2))  # [B,D,N]
        self.t_embedder = TimestepEmbedder(hidden_size)
        labels = nn.Embedding(num_classes + 1, hidden_size)  # the last means "no class"
        self.y_embedder = chain(embedding_table=labels)
        positions = sincos_2d(hidden_size, input_size // patch_size)  # [1,N,D]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * out_channels)
        self.initialize()

    def initialize(self):
        """Initialise as DiT does: every block is the identity and all logits are zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as for a linear layer
        nn.init.zeros_(self.x_embedder.proj.bias)
        mlp = self.t_embedder.mlp
        for layer in (self.y_embedder.embedding_table, mlp[0], mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        modulated = [*self.blocks, self.final_layer]
        zeroed = [module.adaLN_modulation[1] for module in modulated]
        for layer in (*zeroed, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden(self, x, t, y):
        """Compute the features [B,N,D] that the head reads.

        x [B,d,h,w] float; t [B] in [0,1); y [B] int64 in 0..num_classes.
        """
        # pos_embed first: a sum takes the layout of its first operand, here contiguous.
        x = self.pos_embed + self.x_embedder(x).mT      # [B,N,D]
        cond = self.t_embedder(t) + self.y_embedder(y)  # [B,D]
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, cond, use_reentrant=False)
            else:
                x = block(x, cond)
        return self.final_layer(x, cond)

    def forward(self, x, t, y):
        """Compute the logits, contiguous [B,h,w,K], of x [B,d,h,w]."""
        p = self.patch_size
        side = self.input_size // p
        x = self.final_layer.linear(self.hidden(x, t, y))  # [B,N,p*p*K]
        x = x.unflatten(2, (p, p, -1))
        x = x.unflatten(1, (side, side))                   # [B,h/p,w/p,p,p,K]
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
