"""Numbers at the edge of what float32 holds: no NaN, and the answers of the plain formulas in float64.

The fake network's logits are whole numbers, exact in float32; so what differs from float64 is flow.py's own rounding.
Shapes: B batch, N tokens of one position, D width, K codes, d code dimension, s side of the grid.
"""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flow
import train
import vq

B, D, d, s = 3, 4, 3, 4
TAUS = [1e-6, 1e-3, 1.0, 1e3, 1e6]
CPU = torch.device("cpu")


class Fake(nn.Module):
    """Features of whole numbers that depend on class and place alone; logits up to about 20 times `scale`."""

    input_size, patch_size, in_channels = s, 1, 8

    def __init__(self, outputs, classes, scale):
        super().__init__()
        self.num_classes = classes
        self.x_embedder = nn.Identity()
        self.y = nn.Parameter(torch.randint(-2, 3, (classes + 1, D)).float())
        self.place = torch.randint(-1, 2, (s * s, D)).float()
        self.final_layer = nn.Module()
        self.final_layer.linear = linear = nn.Linear(D, outputs)
        linear.weight.data = torch.randint(-3, 4, (outputs, D)).float() * scale
        linear.bias.data = torch.randint(-2, 3, (outputs,)).float() * scale

    def hidden(self, z, t, y):
        return self.y[y][:, None] + self.place             # [B,N,D]


def method(name="purrception", K=50, classes=5, scale=1.0, **knobs):
    torch.manual_seed(0)
    net = Fake(d if name == "cfm" else K, classes, scale)
    return flow.OBJECTIVES[name](net, torch.randn(K, d), **knobs)


def point(f):
    """Draw z, classes, among them the last, and codes, among them the last."""
    z, y = torch.randn(B, d, s, s), torch.randint(f.model.num_classes, (B,))
    codes = torch.randint(len(f.codebook), (B, s, s))
    y[-1] = f.model.num_classes - 1
    codes[0, 0, 0] = len(f.codebook) - 1
    return z, y, codes


def exact_logits(f, y, cfg=1.0):
    """Compute the guided logits [B,s,s,K] in float64, and the leaves they come from."""
    leaves = [x.detach().double().requires_grad_() for x in (f.model.y, *f.model.final_layer.linear.parameters())]
    table, weight, bias = leaves
    null = torch.full_like(y, f.model.num_classes)
    c, u = (F.linear(table[x][:, None] + f.model.place, weight, bias) for x in (y, null))
    return (u + cfg * (c - u)).unflatten(1, (s, s)), leaves


def exact_nearest(z, E):
    return (z.double().movedim(1, -1)[..., None, :] - E.double()).square().sum(-1).argmin(-1)


def assert_finite(*tensors):
    assert all(x.isfinite().all() for x in tensors)


def assert_close(ours, exact, atol=0.0):
    """Compare relative to the largest entry. atol: for sums of terms of size 1 that cancel."""
    assert_finite(ours)
    error = (ours.double() - exact).abs().max().item()
    assert error <= 1e-4 * exact.abs().max().item() + atol


EXTREMES = {"plain": {}, "logits of ten thousand": {"scale": 500.0}, "as many codes as there may be": {"K": vq.EMPTY},
            "one class": {"classes": 1}, "ten thousand classes": {"classes": 10_000}, "one code": {"K": 1}}
EXTREME = pytest.mark.parametrize("extreme", EXTREMES)


@EXTREME
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_posterior_mean_velocity_and_one_step_are_the_plain_formulas(extreme, tau, cfg):
    f = method(**EXTREMES[extreme])
    z, y, _ = point(f)
    logits, _ = exact_logits(f, y, cfg)
    if extreme == "logits of ten thousand":
        assert 5e3 < logits.abs().max() < 1e5
    pi = (logits.detach() / tau).softmax(-1)
    mu = (pi @ f.codebook.double()).movedim(-1, 1)         # [B,d,s,s]
    zero = torch.zeros(B)
    with torch.no_grad():
        assert_close(f.posterior(z, zero, y, tau, cfg), pi)
        assert_close(f.mean(z, zero, y, tau, cfg), mu, 1e-6)
        assert_close(f.velocity(z, zero, y, tau, cfg), mu - z)           # t = 0
        late = zero + 0.75
        assert_close(f.velocity(z, late, y, tau, cfg), (mu - z) / 0.25)
        codes = f.sample(y, steps=1, tau=tau, cfg=cfg, noise=z)          # T = 1: the mean at t = 0
    chosen = f.codebook[codes].double()
    best = f.codebook[exact_nearest(mu, f.codebook)].double()
    mu = mu.movedim(1, -1)
    assert ((chosen - mu).norm(dim=-1) - (best - mu).norm(dim=-1)).max() < 1e-4
    assert 0 <= codes.min() and codes.max() < len(f.codebook)


@EXTREME
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-5])
def test_loss_and_gradients_are_the_plain_formulas(extreme, t, z_loss):
    f = method(**EXTREMES[extreme], z_loss=z_loss)
    z, y, codes = point(f)
    time = torch.full((B,), t)
    loss, parts = f.loss(f.path(z, codes, time), time, y, codes)
    logits, leaves = exact_logits(f, y)
    ce = F.cross_entropy(logits.flatten(0, 2), codes.flatten())
    z_part = z_loss * logits.logsumexp(-1).square().mean()
    for ours, exact in (parts["ce"], ce), (parts["z"], z_part), (loss.detach(), ce + z_part):
        assert_close(ours, exact.detach())
    ours = torch.autograd.grad(loss, [f.model.y, *f.model.final_layer.linear.parameters()])
    for one, two in zip(ours, torch.autograd.grad(ce + z_part, leaves)):
        assert_close(one, two, 1e-7)                       # pi (1 + 2 z_loss lse) - onehot(c)


@pytest.mark.parametrize("tau", TAUS)
def test_codes_that_are_equally_likely_share_their_probability_at_any_temperature(tau):
    f = method(scale=500.0)
    with torch.no_grad():
        f.model.final_layer.linear.weight.zero_()
        f.model.final_layer.linear.bias.fill_(-1e4)[[3, 17, 40]] = 1e4
    z, y, _ = point(f)
    pi = f.posterior(z, torch.zeros(B), y, tau).detach()
    others = math.exp(-2e4 / tau) if tau > 1 else 0.0
    assert_close(pi[..., [3, 17, 40]], torch.full((B, s, s, 3), 1 / (3 + 47 * others), dtype=torch.float64))


@pytest.mark.parametrize("find", [lambda f, z: f.nearest(z), lambda f, z: torch.stack([
    vq.nearest_code(x.flatten(1).T.contiguous(), f.codebook).view(s, s) for x in z])], ids=["flow.py", "vq.py"])
@pytest.mark.parametrize("K, size", [(60, 1.0), (vq.EMPTY, 1.0), (60, 1e-6), (60, 1e6), (1, 1.0)])
def test_equal_codes_in_the_codebook_do_not_disturb_the_nearest(find, K, size):
    f = method(K=K)
    f.codebook = f.codebook * size
    f.codebook[K // 2:2 * (K // 2)] = f.codebook[:K // 2]  # each twice
    z, _, codes = point(f)
    found = find(f, f.embed(codes))
    assert f.embed(found).equal(f.embed(codes))            # of its own vector, whichever of the two
    found, exact = find(f, z * size), exact_nearest(z * size, f.codebook)
    distance = [(f.embed(x).double() - z * size).norm(dim=1) for x in (found, exact)]
    assert (distance[0] - distance[1]).max() <= 1e-5 * size


def test_mean_and_sample_with_equal_codes_are_those_of_one_code_with_their_sum():
    f, twice = method(K=20), method(K=40)
    twice.codebook[:] = torch.cat([f.codebook, f.codebook])
    a, b = f.model.final_layer.linear, twice.model.final_layer.linear
    twice.model.y.data, twice.model.place = f.model.y.data, f.model.place
    b.weight.data, b.bias.data = torch.cat([a.weight.data] * 2), torch.cat([a.bias.data] * 2)
    z, y, _ = point(f)
    assert_close(twice.mean(z, torch.zeros(B), y), f.mean(z, torch.zeros(B), y).detach().double())
    assert twice.embed(twice.sample(y, 3, noise=z)).equal(f.embed(f.sample(y, 3, noise=z)))


# ------------------------------ the baselines

@EXTREME
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_cfm_is_the_plain_formulas(extreme, cfg):
    f = method("cfm", **EXTREMES[extreme])
    z, y, codes = point(f)
    v, leaves = exact_logits(f, y, cfg)
    v = v.movedim(-1, 1)
    zero = torch.zeros(B)
    assert_close(f.velocity(z, zero, y, cfg=cfg).detach(), v.detach())
    one_step = f.sample(y, steps=1, cfg=cfg, noise=z)
    best = f.codebook[exact_nearest(z + v.detach(), f.codebook)]
    distance = [(E.double() - (z + v.detach()).movedim(1, -1)).norm(dim=-1) for E in (f.codebook[one_step], best)]
    assert (distance[0] - distance[1]).max() <= 1e-5 * v.abs().max()
    if cfg == 1:
        loss, _ = f.loss(f.path(z, codes, zero), zero, y, codes)         # t = 0: z1 - z0 is embed - z
        exact = (v - (f.embed(codes).double() - z)).square().mean()
        assert_close(loss.detach(), exact.detach())
        for one, two in zip(torch.autograd.grad(loss, [f.model.y, *f.model.final_layer.linear.parameters()]),
                            torch.autograd.grad(exact, leaves)):
            assert_close(one, two)


@EXTREME
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("steps", [1, 3])
def test_dfm_draws_the_code_at_which_the_running_total_passes_the_uniform_number(extreme, tau, steps):
    f = method("dfm", **EXTREMES[extreme])
    _, y, _ = point(f)
    noise = f.prior(B)
    noise[:, :, 0, 0] = 0.0                                # both uniform numbers at their ends
    noise[:, :, 1, 1] = 1 - 2 ** -24
    with torch.no_grad():
        codes = f.sample(y, steps=steps, tau=tau, noise=noise)
    assert 0 <= codes.min() and codes.max() < len(f.codebook)            # all unmasked
    logits, _ = exact_logits(f, y)
    total = (logits.detach() / tau).softmax(-1).cumsum(-1)  # [B,s,s,K]
    below = total.gather(-1, (codes - 1).clamp(min=0)[..., None])[..., 0].where(codes > 0, 0.0)
    above = total.gather(-1, codes[..., None])[..., 0]
    slack = 1e-6 * len(f.codebook) ** 0.5                  # running totals in float32
    assert (below <= noise[:, 1].double() + slack).all() and (noise[:, 1].double() <= above + slack).all()


# ------------------------------ the network

@pytest.mark.parametrize("name", flow.OBJECTIVES)
@pytest.mark.parametrize("classes, K", [(1, 50), (10_000, 50), (3, vq.EMPTY)])
def test_a_network_of_any_number_of_classes_and_codes_trains_and_samples(name, classes, K, monkeypatch):
    monkeypatch.setitem(train.SIZES, "tiny", dict(depth=1, hidden_size=16, num_heads=2, patch_size=2))
    args, _, _ = train.parse(["--model", "tiny", "--objective", name, "--label-dropout", "0.5", "--data", "nowhere"])
    torch.manual_seed(0)
    f = train.build(args, {"classes": ["x"] * classes}, torch.randn(K, d), s)
    codes, y = torch.randint(K, (B, s, s)), torch.full((B,), classes - 1)
    codes[0, 0, 0] = K - 1
    opt = torch.optim.AdamW(f.parameters(), 1e-3)
    for step in range(3):
        loss, parts = f(codes, y, noise=f.noise(B, train.seeded("cpu", step)))
        if step == 0 and name not in ("cfm", "endpoint"):
            assert parts["ce"].item() == pytest.approx(math.log(K), rel=1e-6)
        opt.zero_grad()
        loss.backward()
        assert_finite(loss, *(x.grad for x in f.parameters() if x.grad is not None))
        opt.step()
    sampled = f.sample(y, 2, cfg=2.0)
    assert sampled.shape == (B, s, s) and 0 <= sampled.min() and sampled.max() < K


@pytest.mark.slow
@pytest.mark.skipif(not train.bf16_is_fast(CPU), reason="this CPU emulates bf16, slowly")
@pytest.mark.parametrize("name", ["purrception", "dfm"])
def test_bf16_trains_as_float32_does(name, tmp_path, monkeypatch):
    """The demo, 300 steps of the same data and noise: the loss of the last fifty differs by less than 1 %."""
    monkeypatch.chdir(tmp_path)
    mean = {}
    for flag in "--bf16", "--no-bf16":
        train.main(["--name", flag[2:], "--steps", "300", "--objective", name, "--log-every", "1",
                    "--sample-every", "0", flag])
        log = [json.loads(line) for line in Path("runs", flag[2:], "log.jsonl").read_text().splitlines()]
        mean[flag] = sum(record["ce"] for record in log[-50:]) / 50
    assert mean["--bf16"] == pytest.approx(mean["--no-bf16"], rel=0.01)
