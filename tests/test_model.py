"""Check model.py: published sizes, names and layouts, plain formulas, its zero-initialisation.

Shapes: B batch, d code dimension, h w grid, p patch side, N tokens, D width, K codes.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from fakes import tiny_dit

from model import SIZES, DiT


def point(net, B=3):
    """Draw a batch of inputs x, t, y; the first label is "no class"."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, net.in_channels, net.input_size, net.input_size, generator=g)
    t = torch.rand(B, generator=g)
    y = net.num_classes - torch.arange(B)
    return x, t, y


# ----- sizes, names and layouts

def count(net):
    """Count parameters: those that are trained, and the frozen positions."""
    trained = sum(x.numel() for x in net.parameters() if x.requires_grad)
    return trained, sum(x.numel() for x in net.parameters()) - trained


def test_xl_2_has_the_published_count_and_with_16384_codes_750_million():
    size = SIZES["DiT-XL/2"]
    with torch.device("meta"):              # facebookresearch/DiT counts the positions, too
        assert sum(count(DiT(out_channels=8, **size))) == 675_129_632
        assert count(DiT()) == count(DiT(**size)) == (750_360_832, 294_912)
        assert DiT().input_size == 32


@pytest.mark.parametrize("name, heads, millions", [
    ("S", 6, 33), ("B", 12, 130), ("L", 16, 458), ("XL", 16, 675)])
def test_published_sizes_have_their_published_heads_and_millions(name, heads, millions):
    sizes = [SIZES[f"DiT-{name}/{p}"] for p in (1, 2, 4, 8)]
    assert [size["patch_size"] for size in sizes] == [1, 2, 4, 8]
    assert all(size | {"patch_size": 2} == sizes[1] for size in sizes)
    with torch.device("meta"):
        trained, _ = count(DiT(out_channels=8, **sizes[1]))
    assert sizes[1]["num_heads"] == heads and round(trained / 1e6) == millions


def test_state_dict_has_the_names_and_shapes_of_facebookresearch_dit():
    D, K, p, d, classes = 16, 5, 2, 3, 4
    linear = {
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        "x_embedder.proj": (D, d, p, p),
        "final_layer.linear": (p * p * K, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    for i in range(2):
        linear |= {
            f"blocks.{i}.attn.qkv": (3 * D, D),
            f"blocks.{i}.attn.proj": (D, D),
            f"blocks.{i}.mlp.fc1": (4 * D, D),
            f"blocks.{i}.mlp.fc2": (D, 4 * D),
            f"blocks.{i}.adaLN_modulation.1": (6 * D, D),
        }
    expected = {"pos_embed": (1, 16, D), "y_embedder.embedding_table.weight": (classes + 1, D)}
    for name, shape in linear.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(x.shape) for name, x in tiny_dit().state_dict().items()} == expected


@pytest.mark.parametrize("p", [1, 2, 4])
def test_positions_are_sines_and_cosines_of_the_column_then_of_the_row(p):
    net = tiny_dit(patch_size=p)
    side, quarter = 8 // p, 16 // 4
    for row in range(side):
        for column in range(side):
            expected = []
            for place in column, row:
                angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
                expected += [*map(math.sin, angles), *map(math.cos, angles)]
            found = net.pos_embed[0, row * side + column].tolist()
            assert found == pytest.approx(expected, abs=1e-6)
    assert not net.pos_embed.requires_grad


# ----- formulas

def plain(w, x, t, y, p, heads):
    """Compute DiT's logits [B,h,w,K] from a state dict by the paper's formulas, nothing fused."""
    def linear(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    B, d, H, _ = x.shape
    side = H // p
    D = w["pos_embed"].shape[2]
    patches = x.view(B, d, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(B, side * side, -1)
    x = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"]
    x = x + w["pos_embed"]
    angles = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=t.dtype)
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])[:, None]
    for i in range(sum(name.endswith("attn.qkv.bias") for name in w)):
        name = f"blocks.{i}."
        parts = linear(name + "adaLN_modulation.1", c).split(D, 2)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        q, k, v = linear(name + "attn.qkv", norm(x) * (1 + scale1) + shift1).split(D, 2)
        out = []
        for start in range(0, D, D // heads):
            head = slice(start, start + D // heads)
            scores = q[..., head] @ k[..., head].mT / math.sqrt(D // heads)
            out.append(scores.softmax(2) @ v[..., head])
        x = x + gate1 * linear(name + "attn.proj", torch.cat(out, 2))
        a = linear(name + "mlp.fc1", norm(x) * (1 + scale2) + shift2)
        a = a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3)))
        x = x + gate2 * linear(name + "mlp.fc2", a)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).split(D, 2)
    x = linear("final_layer.linear", norm(x) * (1 + scale) + shift)
    # DiT: [n,(h w),(p q c)] -> [n,c,(h p),(w q)]; here c is last.
    return torch.einsum("nhwpqc->nhpwqc", x.view(B, side, side, p, p, -1)).reshape(B, H, H, -1)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_forward_equals_the_plain_formulas(p):
    net = tiny_dit(patch_size=p)
    x, t, y = point(net, B=5)               # all classes, and none
    w = {name: v.double() for name, v in net.state_dict().items()}
    expected = plain(w, x.double(), t.double(), y, p, heads=2).float()
    logits = net(x, t, y)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert logits.is_contiguous()


def test_autocast_is_close_and_keeps_the_stream_and_the_time_embedding_in_float32():
    net = tiny_dit()
    x, t, y = point(net)
    full = net.hidden(x, t, y)
    embedded = net.t_embedder(t)
    with torch.autocast("cpu", torch.bfloat16):
        h = net.hidden(x, t, y)
        assert net.t_embedder(t).equal(embedded)
    assert h.dtype == torch.float32 and 0 < (h - full).norm() / full.norm() < 0.03


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_residual_stream_is_contiguous_whatever_the_layout_of_the_latent(layout):
    net = tiny_dit()
    x, t, y = point(net)
    streams = []
    for module in [*net.blocks, net.final_layer]:
        module.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    streams.append(net.hidden(x.contiguous(memory_format=layout), t, y))
    assert len(streams) == 4 and all(x.is_contiguous() for x in streams)


# ----- initialisation

def test_at_first_all_blocks_are_the_identity_and_all_logits_are_zero():
    net = tiny_dit(random=False)
    x, t, y = point(net)
    patches = net.x_embedder.proj(x).flatten(2).mT
    expected = F.layer_norm(patches + net.pos_embed, (16,), eps=1e-6)
    torch.testing.assert_close(net.hidden(x, t, y), expected)
    assert net.hidden(x, t, y).equal(net.hidden(x, 1 - t, y.flip(0)))
    assert not net(x, t, y).any()


def test_initial_spreads_are_those_of_dit():
    net = tiny_dit(random=False, hidden_size=64, num_classes=99)
    for layer in net.y_embedder.embedding_table, net.t_embedder.mlp[0], net.t_embedder.mlp[2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for layer in net.blocks[0].attn.qkv, net.blocks[0].mlp.fc1, net.x_embedder.proj:
        weight = layer.weight.flatten(1)
        bound = math.sqrt(6 / sum(weight.shape))            # Xavier's
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)
    assert not any(x.any() for name, x in net.named_parameters() if name.endswith("bias"))
