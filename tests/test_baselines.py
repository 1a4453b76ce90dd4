"""Check CFM and DFM of flow.py: what perfect networks must return, and where the three methods differ.

Shapes: B batch, h w grid, K codes, d code dimension.
"""
import copy
import itertools
import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flow
import train
from flow import CFM, DFM, OBJECTIVES, Endpoint, Purrception
from model import DiT

K = 3


class Fake(nn.Module):
    """A network of one patch whose hidden features already are its outputs: f(z, t, y), [B,1,p*p*outputs]."""

    def __init__(self, f, side, outputs, in_channels=4):
        super().__init__()
        self.f = f
        self.input_size = self.patch_size = side
        self.num_classes = 1
        self.in_channels = in_channels
        self.x_embedder = nn.Identity()
        linear = nn.Linear(side * side * outputs, side * side * outputs)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.final_layer = SimpleNamespace(linear=linear)

    def hidden(self, z, t, y):
        return self.f(z, t, y)


def build(name, patch=2, classes=5):
    """Build a method of 7 codes of 3 numbers around a DiT of random weights, for a grid of 8 x 8."""
    torch.manual_seed(0)
    in_channels = 16 if name == "dfm" else 3
    out_channels = 3 if name in ("cfm", "endpoint") else 7
    net = DiT(input_size=8, patch_size=patch, in_channels=in_channels, out_channels=out_channels,
              hidden_size=16, depth=1, num_heads=2, num_classes=classes)
    method = OBJECTIVES[name](net, torch.randn(7, 3))
    for x in net.parameters():
        if x.requires_grad:
            nn.init.normal_(x, std=0.2)                    # z, t and y all matter
    return method


def point(f, B=2):
    """Draw codes, t and y, and the point z of the path."""
    codes = torch.randint(len(f.codebook), (B, 8, 8))
    t = torch.rand(B)
    y = torch.randint(f.model.num_classes, (B,))
    return codes, t, y, f.path(f.prior(B), codes, t)


def guided_outputs(f, z, t, y, cfg):
    """Guide the outputs of a regression's network by hand: [B,d,h,w]."""
    c = f.model(z, t, y)                                   # [B,h,w,d]
    u = f.model(z, t, torch.full_like(y, f.model.num_classes))
    return (u + cfg * (c - u)).movedim(-1, 1)


# ------------------------------------------------------------------------ CFM

def test_cfm_with_a_perfect_network_returns_the_two_points_it_was_taught():
    E = torch.tensor([[2.0, 1.0], [-2.0, -1.0], [9.0, 9.0]])

    def velocity(z, t, y):
        """Compute (E[z1 | z] - z) / (1 - t) for two equally likely points."""
        z, t = z.flatten(1), t[:, None]
        logits = -(z[:, None] - t[:, None] * E[:2]).square().sum(2) / (2 * (1 - t) ** 2)
        return ((logits.softmax(1) @ E[:2] - z) / (1 - t)).unsqueeze(1)

    cfm = CFM(Fake(velocity, 1, 2), E)
    y = torch.zeros(2000, dtype=torch.long)
    codes = cfm.sample(y, steps=100, noise=torch.randn(2000, 2, 1, 1)).flatten()
    share = codes.bincount(minlength=K) / len(codes)
    assert share[2] == 0 and abs(share[0] - 0.5) < 0.05
    z0 = torch.tensor([[0.3, 0.4], [-1.0, 0.2]]).view(2, 2, 1, 1)
    ends = cfm.sample(y[:2], steps=200, noise=z0)
    assert ends.flatten().tolist() == [0, 1]               # each noise goes to the nearer point


def test_cfm_regresses_z1_minus_z0():
    E, codes = torch.randn(K, 2), torch.tensor([[[0]], [[2]]])
    cfm = CFM(Fake(lambda z, t, y: torch.zeros(2, 1, 2), 1, 2), E, label_dropout=0)
    z0, t = torch.randn(2, 2, 1, 1), torch.tensor([0.2, 0.7])
    noise = t, z0, torch.zeros(2, dtype=torch.bool)
    loss, parts = cfm(codes, torch.zeros(2, dtype=torch.long), noise=noise)
    z1 = E[codes[:, 0, 0]].view(2, 2, 1, 1)
    torch.testing.assert_close(loss, (z1 - z0).square().mean())
    assert list(parts) == ["mse"] and parts["mse"].equal(loss) and not parts["mse"].requires_grad


@pytest.mark.parametrize("cfg", [1.0, 1.7])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_cfm_velocity_is_the_networks_own_with_guidance(patch, cfg):
    f = build("cfm", patch)
    _, t, y, z = point(f)
    expected = guided_outputs(f, z, t, y, cfg)
    torch.testing.assert_close(f.velocity(z, t, y, cfg=cfg), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_cfm_steps_are_calls_at_s_over_t_that_add_the_velocity(cfg):
    f = build("cfm")
    _, _, y, z = point(f)
    seen, landed = [], []
    velocity = f.velocity
    f.velocity = lambda z, t, y, *knobs: seen.append((z, t, knobs)) or velocity(z, t, y, *knobs)
    f.nearest = lambda z: landed.append(z) or CFM.nearest(f, z)
    codes = f.sample(y, 5, cfg=cfg, noise=z)
    assert len(seen) == 5 and all(knobs == (None, cfg) for _, _, knobs in seen)
    for s, (at, t, _) in enumerate(seen):
        torch.testing.assert_close(t, torch.full((2,), s / 5))
        torch.testing.assert_close(at, z)
        z = z + velocity(z, t, y, cfg=cfg) / 5             # Euler, by hand
    torch.testing.assert_close(landed[0], z)
    assert codes.equal(f.nearest(z)) and not codes.is_inference() and not landed[0].requires_grad


def test_cfm_velocity_is_float32_under_autocast_and_float64_for_a_float64_network():
    f = build("cfm")
    _, t, y, z = point(f)
    with torch.autocast("cpu", torch.bfloat16):
        v = f.velocity(z, t, y, cfg=1.5)
    full = f.velocity(z, t, y, cfg=1.5)
    assert v.dtype == torch.float32 and (v - full).norm() / full.norm() < 0.05
    assert f.double().velocity(z.double(), t.double(), y, cfg=1.5).dtype == torch.float64


def test_cfm_has_no_posterior_and_takes_no_tau():
    cfm = CFM(Fake(lambda z, t, y: torch.zeros(len(z), 1, 2), 1, 2), torch.randn(K, 2))
    z, t, y = torch.randn(1, 2, 1, 1), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    assert cfm.posterior is None and cfm.mean is None
    with pytest.raises(TypeError, match="tau"):
        cfm.sample(y, tau=0.9)
    with pytest.raises(TypeError, match="positional"):     # where the others take tau; this is not cfg
        cfm.sample(y, 1, 0.9)
    with pytest.raises(AssertionError, match="no temperature"):
        cfm.velocity(z, t, y, 0.9)
    assert cfm.sample(y, 1, cfg=0.9).shape == (1, 1, 1) and cfm.velocity(z, t, y, cfg=0.9).shape == z.shape


# ------------------------------------------------------------------------ Endpoint

def test_endpoint_regresses_z1():
    E, codes = torch.randn(K, 2), torch.tensor([[[0]], [[2]]])
    f = Endpoint(Fake(lambda z, t, y: 2 * z.flatten(2).transpose(1, 2), 1, 2), E, label_dropout=0)
    z0, t = torch.randn(2, 2, 1, 1), torch.tensor([0.2, 0.7])
    loss, parts = f(codes, torch.zeros(2, dtype=torch.long), noise=(t, z0, torch.zeros(2, dtype=torch.bool)))
    z1, t = E[codes[:, 0, 0]].view(2, 2, 1, 1), t.view(2, 1, 1, 1)
    torch.testing.assert_close(loss, (2 * (t * z1 + (1 - t) * z0) - z1).square().mean())
    assert list(parts) == ["mse"] and parts["mse"].equal(loss) and not parts["mse"].requires_grad


@pytest.mark.parametrize("cfg", [1.0, 1.7])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_endpoint_mean_is_the_networks_own_with_guidance_and_its_velocity_leads_there(patch, cfg):
    f = build("endpoint", patch)
    _, t, y, z = point(f)
    mu = guided_outputs(f, z, t, y, cfg)
    torch.testing.assert_close(f.mean(z, t, y, cfg=cfg), mu, atol=1e-5, rtol=1e-4)
    left = 1 - t.view(-1, 1, 1, 1)
    torch.testing.assert_close(f.velocity(z, t, y, cfg=cfg), (mu - z) / left, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", [1, 2])
def test_an_endpoint_that_is_known_is_reached_in_any_number_of_steps(order):
    codes = torch.randint(7, (2, 8, 8))
    f = build("endpoint")
    f.mean = lambda z, t, y, tau, cfg: f.embed(codes)
    for steps in (1, 3, 10):
        assert f.sample(torch.zeros(2, dtype=torch.long), steps, order=order).equal(codes)


def test_endpoint_has_no_posterior_and_takes_no_tau():
    f = build("endpoint")
    _, t, y, z = point(f)
    assert f.posterior is None
    for refuse in (f.mean, f.velocity):
        with pytest.raises(AssertionError, match="no temperature"):
            refuse(z, t, y, 0.9)
    with pytest.raises(TypeError, match="tau"):
        f.sample(y, tau=0.9)


# ------------------------------------------------------------------------ DFM

# Of two positions that depend on each other.
JOINT = torch.tensor([[0.4, 0.0, 0.1], [0.05, 0.25, 0.0], [0.0, 0.1, 0.1]])


def perfect_dfm():
    """DFM on 1x2 codes with the true posterior of JOINT: a 2x2 grid whose lower row is not looked at."""
    table = torch.zeros(K + 1, K + 1, 4, K)
    for a, b in itertools.product(range(K + 1), repeat=2):
        given = JOINT.clone()
        if a < K:
            given *= (torch.arange(K) == a).float().view(-1, 1)
        if b < K:
            given *= (torch.arange(K) == b).float()
        given = given / given.sum().clamp(min=1e-9)
        table[a, b] = torch.stack([given.sum(1), given.sum(0), *[torch.ones(K) / K] * 2])

    def logits(z, t, y):                                   # reads the codes themselves
        a, b = z[:, 0].unbind(1)
        return table[a, b].clamp(min=1e-12).log().view(len(z), 1, -1)

    return DFM(Fake(logits, 2, K), torch.randn(K, 2), label_dropout=0)


@pytest.mark.parametrize("steps", [1, 3, pytest.param(300, marks=pytest.mark.slow)])
def test_dfm_with_a_perfect_posterior_returns_the_data(steps):
    torch.manual_seed(0)
    n = 20000
    dfm = perfect_dfm()
    codes = dfm.sample(torch.zeros(n, dtype=torch.long), steps=steps)[:, 0]
    assert codes.max() < K                                 # nothing is left masked
    joint = (K * codes[:, 0] + codes[:, 1]).bincount(minlength=K * K).view(K, K) / n
    for axis in (0, 1):                                    # the marginals at any number of steps
        assert (joint.sum(axis) - JOINT.sum(axis)).abs().max() < 0.015
    if steps == 1:                                         # both at once: independent
        assert (joint - JOINT.sum(1, keepdim=True) * JOINT.sum(0)).abs().max() < 0.015
    if steps == 300:                                       # one after the other: the joint
        assert (joint - JOINT).abs().max() < 0.015


def test_the_masked_fraction_at_time_t_is_one_minus_t():
    dfm = perfect_dfm()
    dfm.model.input_size = 100
    codes, t = torch.randint(K, (3, 100, 100)), torch.tensor([0.0, 0.3, 0.9])
    z0 = dfm.prior(3)
    assert z0.shape == (3, 2, 100, 100) and 0 <= z0.min() and z0.max() < 1
    z = dfm.path(z0, codes, t)
    masked = (z == K).float().mean((1, 2))
    assert (masked - (1 - t)).abs().max() < 0.02 and masked[0] == 1
    assert (z[z != K] == codes[z != K]).all()


@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_dfm_steps_are_calls_at_s_over_t_and_each_unmasks_what_is_due(cfg):
    f = build("dfm")
    noise, y = f.prior(2), torch.tensor([0, 1])
    calls, hidden = [], f.model.hidden
    f.model.hidden = lambda z, t, y: calls.append((z[:2], t)) or hidden(z, t, y)
    codes = f.sample(y, 5, 0.8, cfg, noise)
    assert len(calls) == 5 and codes.shape == (2, 8, 8) and codes.dtype == torch.int64
    assert not codes.is_inference()
    for s, (z, t) in enumerate(calls):
        torch.testing.assert_close(t, torch.full_like(t, s / 5))
        shown = noise[:, 0] < s / 5
        assert z.equal(torch.where(shown, codes, 7))       # so what is unmasked stays as it is
        assert z.equal(f.path(noise, codes, t[:2]))        # training sees the same states


def test_dfm_draws_its_codes_from_the_guided_posterior_over_tau():
    f = build("dfm")
    noise, y = f.prior(2), torch.tensor([0, 1])
    t, masked = torch.zeros(2), torch.full((2, 8, 8), 7)
    codes = f.sample(y, 1, 0.8, 1.5, noise)
    c = f.model(masked, t, y)                              # [B,h,w,K]
    u = f.model(masked, t, torch.full_like(y, f.model.num_classes))
    pi = ((u + 1.5 * (c - u)) / 0.8).softmax(3)
    upper = pi.cumsum(3).gather(3, codes.unsqueeze(3)).squeeze(3)
    lower = upper - pi.gather(3, codes.unsqueeze(3)).squeeze(3)
    uniform = noise[:, 1]                                  # lies in the code's share of [0,1)
    assert (lower - 1e-5 <= uniform).all() and (uniform <= upper + 1e-5).all()
    assert len(codes.unique()) == 7                        # else this would check little


def test_dfm_embeds_codes_before_the_first_layer_of_the_network():
    net = build("purrception").model
    plain = copy.deepcopy(net)
    dfm = DFM(net, torch.randn(7, 3))
    table = net.x_embedder[0].weight
    assert table.shape == (8, 3) and 0.01 < table.std() < 0.03          # K codes and "masked"
    z = torch.randint(8, (2, 8, 8))
    t, y = torch.rand(2), torch.tensor([0, 5])
    torch.testing.assert_close(dfm.model.hidden(z, t, y), plain.hidden(table[z].movedim(3, 1), t, y))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_dfm_loss_is_cross_entropy_and_z_loss_of_the_networks_logits(patch):
    f = build("dfm", patch)
    codes, t, y, z = point(f)
    loss, parts = f.loss(z, t, y, codes)
    logits = f.model(z, t, y).flatten(0, 2)
    torch.testing.assert_close(parts["ce"], F.cross_entropy(logits, codes.flatten()))
    torch.testing.assert_close(parts["z"], 1e-5 * logits.logsumexp(1).square().mean())
    torch.testing.assert_close(loss, parts["ce"] + parts["z"])
    loss.backward()
    assert f.model.x_embedder[0].weight.grad.any()


def test_dfm_has_no_mean_and_no_velocity():
    assert DFM.mean is None and DFM.velocity is None


def test_dfm_posterior_is_that_of_the_masked_positions():
    dfm = perfect_dfm()
    z = torch.tensor([[[0, K], [K, 1]]])
    pi = dfm.posterior(z, torch.tensor([0.5]), torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(pi[0, 0, 1], JOINT[0] / JOINT[0].sum())


# ------------------------------------------------------------------------ all three

@pytest.mark.parametrize("name", OBJECTIVES)
def test_sample_is_a_function_of_the_noise_and_leaves_it_alone(name):
    f = build(name)
    y = torch.tensor([0, 1])
    noise, other = f.prior(2), f.prior(2)
    before = noise.clone()
    codes = f.sample(y, 5, noise=noise)
    assert codes.equal(f.sample(y, 5, noise=noise)) and noise.equal(before)
    assert not codes.equal(f.sample(y, 5, noise=other))
    torch.manual_seed(1)
    drawn = f.sample(y, 5)
    torch.manual_seed(1)
    assert drawn.equal(f.sample(y, 5, noise=f.prior(2)))


@pytest.mark.parametrize("chunk", [1, 5 * 7, 32 * 7, 33 * 7])            # there are 32 tokens
@pytest.mark.parametrize("name", ["cfm", "endpoint", "dfm"])
def test_chunks_change_no_sample_and_no_loss(monkeypatch, name, chunk):
    f = build(name)
    codes, t, y, z = point(f)
    noise = f.prior(2)

    def results():
        return f.sample(y, 5, cfg=1.5, noise=noise), f.loss(z, t, y, codes)[0]

    sampled, loss = results()
    monkeypatch.setattr(flow, "CHUNK", chunk)
    again, loss_again = results()
    assert again.equal(sampled)
    torch.testing.assert_close(loss_again, loss)


def test_the_networks_of_all_objectives_differ_at_their_ends_only():
    meta, counts, ends = {"classes": list("ab")}, {}, {}
    for objective in OBJECTIVES:
        args = Namespace(objective=objective, model="DiT-demo/2", z_loss=1e-5, label_dropout=0.1)
        model = train.build(args, meta, torch.randn(64, 4), 8).model
        sizes = {name: x.numel() for name, x in model.named_parameters()}
        outer = "x_embedder", "final_layer.linear"
        ends[objective] = sum(size for name, size in sizes.items() if name.startswith(outer))
        counts[objective] = sum(sizes.values()) - ends[objective]
    assert len(set(counts.values())) == 1 and len(set(ends.values())) == 3


def test_purrception_and_cfm_share_their_path():
    E, codes = torch.randn(K, 2), torch.randint(K, (2, 1, 1))
    z0, t = torch.randn(2, 2, 1, 1), torch.rand(2)
    a, b = Purrception(Fake(None, 1, K), E), CFM(Fake(None, 1, 2), E)
    assert torch.equal(a.path(z0, codes, t), b.path(z0, codes, t))


@pytest.mark.parametrize("scale, bits", [(0.0, 5.0), (1e3, 0.0)])
def test_the_posterior_holds_log2_k_bits_if_uniform_and_0_if_one_hot(scale, bits):
    net = Fake(lambda z, t, y: scale * torch.eye(32)[torch.zeros(len(z), 1, dtype=torch.long)], 1, 32)
    z, t, y = torch.randn(2, 4, 1, 1), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    pi = Purrception(net, torch.randn(32, 4)).posterior(z, t, y)
    entropy = torch.special.entr(pi).sum(3) / math.log(2)
    assert entropy.shape == (2, 1, 1) and (entropy - bits).abs().max() < 1e-5


def test_a_code_of_probability_zero_is_never_picked():
    pi = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.25, 0.5, 1 - 2 ** -24])
    assert flow.pick(pi, uniform).flatten().tolist() == [1, 1, 2, 2]
