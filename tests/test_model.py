"""Check model.py: published sizes, names and layouts, the network's plain formulas, its zero-initialisation.

Shapes: B batch, d code dimension, h w grid, p patch side, N tokens, D width, K codes.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import SIZES, DiT

TINY = dict(input_size=8, patch_size=2, in_channels=3, out_channels=5, hidden_size=16, depth=2, num_heads=2,
            num_classes=4)


def tiny(random=True, **changes):
    """Build a small network; random: every weight drawn, so that no zero hides a mistake."""
    torch.manual_seed(0)
    net = DiT(**{**TINY, **changes})
    if random:
        for p in net.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
    return net


def point(net, B=3):
    """Draw a batch of inputs x, t, y; the first label is "no class"."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, net.in_channels, net.input_size, net.input_size, generator=g)
    t = torch.rand(B, generator=g)
    y = net.num_classes - torch.arange(B)
    return x, t, y


# ------------------------------------------------------------------------ sizes

def count(D, depth, p, K, d=4, side=32, classes=1000, **_):
    """Count parameters in closed form: those that are trained, and the frozen positions."""
    embeddings = (p * p * d + 1) * D + (256 + 1) * D + (D + 1) * D + (classes + 1) * D
    attention = (3 * D + D) * (D + 1)                      # qkv, proj
    mlp = 4 * D * (D + 1) + D * (4 * D + 1)                # fc1, fc2
    block = attention + mlp + 6 * D * (D + 1)              # adaLN
    final = 2 * D * (D + 1) + p * p * K * (D + 1)          # adaLN, head
    return embeddings + depth * block + final, (side // p) ** 2 * D


def counted(net):
    trained = sum(x.numel() for x in net.parameters() if x.requires_grad)
    return trained, sum(x.numel() for x in net.parameters()) - trained


def test_xl_2_with_16384_codes_has_750_million_parameters():
    with torch.device("meta"):
        assert counted(DiT()) == (750_360_832, 294_912)
        assert counted(DiT(**SIZES["DiT-XL/2"])) == (750_360_832, 294_912)


def test_xl_2_with_8_outputs_has_the_published_count():
    with torch.device("meta"):                             # what facebookresearch/DiT prints, with positions
        assert sum(counted(DiT(out_channels=8, **SIZES["DiT-XL/2"]))) == 675_129_632


@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_published_sizes_have_their_published_millions(size, millions):
    with torch.device("meta"):
        assert round(counted(DiT(out_channels=8, **SIZES[f"DiT-{size}/2"]))[0] / 1e6) == millions


def test_every_size_builds_on_meta_and_has_its_closed_form_count():
    assert set(SIZES) >= {f"DiT-{name}/{p}" for name in ("S", "B", "L", "XL") for p in (1, 2, 4, 8)}
    with torch.device("meta"):
        for name, size in SIZES.items():
            assert name.endswith(f"/{size['patch_size']}")
            expected = count(size["hidden_size"], size["depth"], size["patch_size"], 512)
            assert counted(DiT(out_channels=512, **size)) == expected


# ------------------------------------------------------------------------ names and layouts

def test_state_dict_has_the_names_and_shapes_of_facebookresearch_dit():
    D, K, p, d, classes = 16, 5, 2, 3, 4
    linear = {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D), "x_embedder.proj": (D, d, p, p),
              "final_layer.linear": (p * p * K, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    block = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D),
             "adaLN_modulation.1": (6 * D, D)}
    for i in range(TINY["depth"]):
        linear |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    expected = {"pos_embed": (1, 16, D), "y_embedder.embedding_table.weight": (classes + 1, D)}
    for name, shape in linear.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(x.shape) for name, x in tiny().state_dict().items()} == expected


def test_label_table_has_a_last_row_for_no_class():
    for classes in (1, 10):
        net = tiny(num_classes=classes)
        assert net.y_embedder.embedding_table.weight.shape == (classes + 1, 16)
        x, t, _ = point(net, B=1)
        answers = [net(x, t, torch.tensor([y])) for y in range(classes + 1)]
        assert all(not a.equal(b) for i, a in enumerate(answers) for b in answers[:i])


@pytest.mark.parametrize("p", [1, 2, 4])
def test_positions_are_sines_and_cosines_of_the_column_then_of_the_row(p):
    net = tiny(patch_size=p)
    side, quarter = 8 // p, 16 // 4
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
                expected += [*map(math.sin, angles), *map(math.cos, angles)]
            assert net.pos_embed[0, row * side + column].tolist() == pytest.approx(expected, abs=1e-6)
    assert not net.pos_embed.requires_grad


@pytest.mark.parametrize("p, K", [(1, 4), (2, 3), (4, 2)])
def test_forward_lays_tokens_out_as_dit_unpatchifies_them_class_axis_last(p, K):
    side = 8 // p
    net = tiny(patch_size=p, out_channels=K, hidden_size=p * p * K, num_heads=1)
    with torch.no_grad():                                  # the head copies: logits are hidden, rearranged
        net.final_layer.linear.weight.copy_(torch.eye(p * p * K))
        net.final_layer.linear.bias.zero_()
    h = torch.arange(2 * side * side * p * p * K).float().view(2, side * side, p * p * K)
    net.hidden = lambda x, t, y: h
    out = net(*point(net, B=2))
    assert out.shape == (2, 8, 8, K) and out.is_contiguous()
    # DiT: [n,(h w),(p q c)] -> [n,c,(h p),(w q)]; here c is last
    assert out.equal(torch.einsum("nhwpqc->nhpwqc", h.view(2, side, side, p, p, K)).reshape(2, 8, 8, K))
    row, column, k = 5, 6, K - 1
    token = row // p * side + column // p
    place = row % p * p + column % p
    assert out[1, row, column, k] == h[1, token, place * K + k]


@pytest.mark.parametrize("p", [1, 2, 4])
def test_without_blocks_logits_depend_on_their_own_patch_alone(p):
    net = tiny(patch_size=p, depth=0)
    x, t, y = point(net, B=1)
    before = net(x, t, y)
    x[:, :, p:2 * p, :p] += 1                              # the second patch of the first column
    changed = (net(x, t, y) != before).any(3)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[p:2 * p, :p] = True
    assert changed.equal(expected)


# ------------------------------------------------------------------------ formulas

def plain(w, x, t, y, p, heads):
    """Compute DiT's logits [B,h,w,K] from a state dict by the plain formulas of the paper, nothing fused."""
    def linear(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    B, d, H, _ = x.shape
    side = H // p
    D = w["pos_embed"].shape[2]
    patches = x.view(B, d, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(B, side * side, -1)
    x = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=t.dtype)
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])[:, None]
    for i in range(sum(name.endswith("attn.qkv.bias") for name in w)):
        name = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(name + "adaLN_modulation.1", c).split(D, 2)
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
    return x.view(B, side, side, p, p, -1).transpose(2, 3).reshape(B, H, H, -1)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_forward_equals_the_plain_formulas(p):
    net = tiny(patch_size=p)
    x, t, y = point(net)
    w = {name: v.double() for name, v in net.state_dict().items()}
    expected = plain(w, x.double(), t.double(), y, p, heads=2).float()
    torch.testing.assert_close(net(x, t, y), expected, atol=1e-4, rtol=1e-4)


def test_forward_is_the_head_of_hidden():
    net = tiny()
    x, t, y = point(net)
    h = net.hidden(x, t, y)
    assert h.shape == (3, 16, 16)
    assert net.final_layer.linear(h).numel() == net(x, t, y).numel()
    assert net.final_layer.linear(h)[0, 0, :5].equal(net(x, t, y)[0, 0, 0])


@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
def test_the_network_runs_in_other_precisions(dtype, off):
    net = tiny()
    x, t, y = point(net)
    full = net.hidden(x, t, y)
    h = tiny().to(dtype).hidden(x.to(dtype), t, y)
    assert h.dtype == dtype and (h.float() - full).norm() / full.norm() < off


def test_time_embedding_stays_float32_under_autocast():
    net, t = tiny(), torch.tensor([0.5, 0.5001])           # one and the same number in bf16
    with torch.autocast("cpu", torch.bfloat16):
        half = net.t_embedder(t)
    assert half.dtype == torch.float32 and half.equal(net.t_embedder(t))
    assert not half[0].equal(half[1])


def test_a_bf16_forward_is_close_to_float32_and_keeps_a_float32_stream():
    net = tiny()
    x, t, y = point(net)
    with torch.autocast("cpu", torch.bfloat16):
        h = net.hidden(x, t, y)
    full = net.hidden(x, t, y)
    assert h.dtype == torch.float32 and (h - full).norm() / full.norm() < 0.03


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_residual_stream_is_contiguous_whatever_the_layout_of_the_latent(layout):
    net = tiny()
    x, t, y = point(net)
    streams = []
    for module in [*net.blocks, net.final_layer]:
        module.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    h = net.hidden(x.contiguous(memory_format=layout), t, y)
    assert len(streams) == 3 and all(s.is_contiguous() for s in [*streams, h])


def test_every_weight_but_the_positions_is_trained():
    net = tiny()
    net(*point(net)).square().sum().backward()
    without = [name for name, x in net.named_parameters() if x.grad is None or not x.grad.any()]
    assert without == ["pos_embed"]


# ------------------------------------------------------------------------ initialisation

def test_first_logits_are_exactly_zero():
    net = tiny(random=False)
    assert not net(*point(net)).any() and net.hidden(*point(net)).std() > 0.1


def test_first_blocks_are_the_identity_whatever_the_time_and_class():
    net = tiny(random=False)
    x, t, y = point(net)
    expected = F.layer_norm(net.x_embedder(x) + net.pos_embed, (16,), eps=1e-6)
    torch.testing.assert_close(net.hidden(x, t, y), expected)
    assert net.hidden(x, t, y).equal(net.hidden(x, 1 - t, y.flip(0)))


def test_initial_spreads_are_dit_s():
    net = tiny(random=False, hidden_size=64, num_classes=99)
    normal = net.y_embedder.embedding_table, net.t_embedder.mlp[0], net.t_embedder.mlp[2]
    for layer in normal:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    uniform = net.blocks[0].attn.qkv, net.blocks[0].mlp.fc1, net.x_embedder.proj
    for layer in uniform:
        weight = layer.weight.flatten(1)
        bound = math.sqrt(6 / sum(weight.shape))           # Xavier's
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)
    assert not any(x.any() for name, x in net.named_parameters() if name.endswith("bias"))


def test_network_and_hidden_are_deterministic():
    a, b = tiny(random=False), tiny(random=False)
    assert all(p.equal(q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    net = tiny().train()
    inputs = point(net)
    h = net.hidden(*inputs)
    assert h.equal(net.hidden(*inputs)) and h.equal(net.eval().hidden(*inputs))
