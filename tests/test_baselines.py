"""Check CFM, Endpoint and DFM of flow.py: their formulas and their steps.

Shapes: B batch, h w grid, K codes, d code dimension.
"""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import CLASSES, K, d, landing, method, plain_outputs, plain_posterior, point, tiny_dit

import train
from flow import DFM, OBJECTIVES

REGRESSIONS = pytest.mark.parametrize("name", ["cfm", "endpoint"])


def test_the_networks_of_all_objectives_differ_at_their_ends_only():
    data = SimpleNamespace(codes=np.zeros((1, 8, 8)), meta={"classes": ["a", "b"]})
    inner = []
    for name in OBJECTIVES:
        args = SimpleNamespace(objective=name, model="DiT-demo/2", z_loss=1e-5, label_dropout=0.1)
        model = train.build(args, data, torch.randn(64, 4)).model
        inner.append({key: x.shape for key, x in model.named_parameters()
                      if not key.startswith(("x_embedder", "final_layer.linear"))})
    assert all(shapes == inner[0] for shapes in inner)


# ----- CFM and Endpoint

@REGRESSIONS
@pytest.mark.parametrize("cfg", [1.0, 1.7])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_network_returns_the_velocity_or_the_mean_and_the_other_follows(name, patch, cfg):
    f = method(name, patch)
    z, t, y, _ = point(f)
    left = 1 - t.view(-1, 1, 1, 1)
    out = plain_outputs(f, z, t, y, cfg).movedim(3, 1)
    mu, v = (z + left * out, out) if name == "cfm" else (out, (out - z) / left)
    torch.testing.assert_close(f.mean(z, t, y, cfg=cfg), mu, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(f.velocity(z, t, y, cfg=cfg), v, atol=1e-4, rtol=1e-5)


@REGRESSIONS
def test_cfm_regresses_z1_minus_z0_and_endpoint_z1(name):
    f = method(name, label_dropout=0)
    _, _, y, codes = point(f)
    t, z0, drop = f.noise(3, torch.Generator().manual_seed(0))
    loss, parts = f(codes, y, [t, z0, drop])
    goal = f.embed(codes) - z0 if name == "cfm" else f.embed(codes)
    out = plain_outputs(f, f.path(z0, codes, t), t, y).movedim(3, 1)
    expected = (out - goal).square().mean()
    torch.testing.assert_close(loss, expected)
    assert list(parts) == ["mse"] and parts["mse"].equal(loss) and not parts["mse"].requires_grad
    weights = list(f.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, weights),
                               torch.autograd.grad(expected, weights), atol=1e-5, rtol=1e-4)


@REGRESSIONS
@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_steps_are_calls_at_s_over_t_that_add_the_velocity(name, cfg):
    f = method(name)
    z, _, y, _ = point(f)
    end = landing(f.sample, f, y, 5, cfg=cfg, noise=z)
    calls = f.model.calls[:]
    assert len(calls) == 5
    for s, (at, t, _) in enumerate(calls):
        assert t.equal(torch.full_like(t, s / 5))
        torch.testing.assert_close(at[:3], z)
        z = z + f.velocity(z, t[:3], y, cfg=cfg) / 5
    torch.testing.assert_close(end, z)


@REGRESSIONS
def test_a_regression_is_float32_under_autocast(name):
    f = method(name)
    z, t, y, _ = point(f)
    with torch.autocast("cpu", torch.bfloat16):
        v = f.velocity(z, t, y, cfg=1.5)
    full = f.velocity(z, t, y, cfg=1.5)
    assert v.dtype == torch.float32 and 0 < (v - full).norm() / full.norm() < 0.05


@REGRESSIONS
def test_a_regression_has_no_posterior_and_takes_no_tau(name):
    f = method(name)
    z, t, y, _ = point(f)
    assert f.posterior is None
    with pytest.raises(AssertionError, match="no temperature"):
        f.mean(z, t, y, 0.9)
    with pytest.raises(AssertionError, match="no temperature"):
        f.sample(y, tau=0.9)


# ----- DFM

def test_the_masked_share_at_time_t_is_one_minus_t():
    f = method("dfm")
    f.model.input_size = 100
    codes = torch.randint(K, (3, 100, 100))
    t = torch.tensor([0.0, 0.3, 0.9])
    z0 = f.prior(3)
    assert z0.shape == (3, 2, 100, 100) and 0 <= z0.min() and z0.max() < 1
    z = f.path(z0, codes, t)
    masked = (z == K).float().mean((1, 2))
    assert (masked - (1 - t)).abs().max() < 0.02 and masked[0] == 1
    assert z[z != K].equal(codes[z != K])


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_step_of_dfm_draws_what_is_due_from_the_guided_posterior_over_tau(patch):
    f = method("dfm", patch)
    y = torch.arange(50) % CLASSES
    noise = f.prior(50)
    when, uniform = noise.unbind(1)
    codes = f.sample(y, 5, 0.8, 1.5, noise)
    calls = f.model.calls[:]
    assert len(calls) == 5 and codes.unique().equal(torch.arange(K))
    for s, (z, t, _) in enumerate(calls):
        z, t = z[:50], t[:50]
        assert t.equal(torch.full((50,), s / 5))
        assert z.equal(f.path(noise, codes, t))             # training sees the same states
        due = (s / 5 <= when) & (when < (s + 1) / 5)
        pi = plain_posterior(f, z, t, y, 0.8, 1.5)[due]
        share = pi.gather(1, codes[due][:, None])
        upper = pi.cumsum(1).gather(1, codes[due][:, None])
        drawn = uniform[due][:, None]                       # lies in the code's share of [0, 1)
        assert (upper - share - 1e-5 <= drawn).all() and (drawn <= upper + 1e-5).all()


def test_dfm_embeds_codes_before_the_first_layer_of_the_network():
    net = tiny_dit()
    plain = copy.deepcopy(net)
    f = DFM(net, torch.randn(7, d))
    table = net.x_embedder[0].weight
    assert table.shape == (8, 3) and 0.01 < table.std() < 0.03      # K codes and "masked"
    z = torch.randint(8, (2, 8, 8))
    t = torch.rand(2)
    y = torch.tensor([0, 4])
    torch.testing.assert_close(f.model.hidden(z, t, y), plain.hidden(table[z].movedim(3, 1), t, y))
