"""The network: a Diffusion Transformer (DiT) that reads a noisy latent and answers with K logits at every position.

    x [B,d,h,w] --patches--> tokens [B,N,D]            N = (h/p)(w/p) patches of p x p positions
    c = embed(t) + embed(y)                            the condition: time and class
    x <- x + gate * attention(modulate(norm(x)))       adaLN-Zero block, repeated `depth` times;
    x <- x + gate * mlp(modulate(norm(x)))             shift, scale and gate are linear in silu(c)
    logits = linear(modulate(norm(x)))                 p*p*K numbers a token, K for each of its positions

Key names and tensor layouts are facebookresearch/DiT's, so published weights load strictly.

References: DiT (Peebles & Xie 2023, arXiv 2212.09748; facebookresearch/DiT).

Shapes: B batch, d code dimension, h w grid, p patch side, N tokens, D width, K codes (out_channels).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

_WIDTHS = {"S": dict(depth=12, hidden_size=384, num_heads=6), "B": dict(depth=12, hidden_size=768, num_heads=12),
           "L": dict(depth=24, hidden_size=1024, num_heads=16), "XL": dict(depth=28, hidden_size=1152, num_heads=16)}
SIZES = {f"DiT-{name}/{p}": dict(width, patch_size=p) for name, width in _WIDTHS.items() for p in (1, 2, 4, 8)}
SIZES["DiT-demo/2"] = dict(depth=6, hidden_size=192, num_heads=3, patch_size=2)


def modulate(x, shift, scale):
    """Scale and shift x [B,N,D] by the condition's shift and scale [B,1,D]."""
    return torch.addcmul(shift, x, 1 + scale)


def sincos_2d(width, side):
    """Encode the positions of a side x side grid by sines and cosines of column and row: float [1,side*side,width].

    The first half of the channels encodes the column, as in facebookresearch/DiT. float64 inside.
    """
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float().unsqueeze(0)


class TimestepEmbedder(nn.Module):
    """Embed times t [B] as vectors [B,D]: 128 cosines and 128 sines of geometric frequencies, then an MLP, in float32."""

    def __init__(self, width, channels=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.half = channels // 2

    def forward(self, t):
        with torch.autocast(t.device.type, enabled=False):  # bf16 knows t to two digits; the authors' release embeds it so
            frequencies = torch.exp(-math.log(10000) / self.half * torch.arange(self.half, device=t.device))
            angles = t.float()[:, None] * frequencies
            return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Embed classes y [B]; the last row of the table, y = num_classes, is "no class"."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """Cut x [B,d,h,w] into patches and map each linearly to a token [B,N,D]."""

    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Attend from every token to all, with num_heads heads."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B,heads,N,D/heads]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def adaln(width, parts):
    """Make the layer that turns a condition [B,D] into `parts` shifts, scales and gates [B,parts*D]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    """Attend, then think: a transformer block whose norms and residuals are steered by the condition c (adaLN-Zero)."""

    def __init__(self, width, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = adaln(width, 6)

    def forward(self, x, c):                               # x [B,N,D], c [B,D]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, 2)  # [B,1,D] each
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Norm, modulate, and the head: the linear layer to K logits for each of a patch's p*p positions."""

    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = adaln(width, 2)

    def forward(self, x, c):                               # everything but the linear layer, which flow.py applies itself
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, 2)
        return modulate(self.norm_final(x), shift, scale)


class DiT(nn.Module):
    """Map a noisy latent, a time and a class to logits over the codes; the defaults are DiT-XL/2 with vq-f8's codebook."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, out_channels=16384, hidden_size=1152, depth=28,
                 num_heads=16, mlp_ratio=4.0, num_classes=1000):
        super().__init__()
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * out_channels)
        self.initialize()

    def initialize(self):
        """Initialise as DiT does; what is zeroed makes every block the identity and every first answer uniform."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a view: as a linear layer, not a convolution
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        last = self.final_layer
        for layer in [b.adaLN_modulation[1] for b in self.blocks] + [last.adaLN_modulation[1], last.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden(self, x, t, y):
        """Compute the features [B,N,D] the head reads, from x [B,d,h,w], t [B] in [0,1), y [B] in 0..num_classes."""
        x = self.x_embedder(x) + self.pos_embed            # [B,N,D]
        c = self.t_embedder(t) + self.y_embedder(y)        # [B,D]
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)

    def forward(self, x, t, y):
        """Compute the logits [B,h,w,K], class axis last and contiguous, of the latent x [B,d,h,w] at time t [B]."""
        p, side = self.patch_size, self.input_size // self.patch_size
        logits = self.final_layer.linear(self.hidden(x, t, y))           # [B,N,p*p*K]
        logits = logits.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # [B,h/p,w/p,p,p,K]
        return logits.transpose(2, 3).flatten(3, 4).flatten(1, 2)        # [B,h,w,K]
