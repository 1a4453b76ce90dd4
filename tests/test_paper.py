"""The paper (arXiv 2510.01478), claim by claim, in its order: read this file first.

f.model(z, t, y) are the network's logits, [B,h,w,K]; f.codebook holds the code vectors e_k.
Shapes: B batch, h w grid, K codes, d code dimension.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from fakes import SIDE, Fake, K, d, landing, method, outputs_of, point, tiny_dit

from flow import OBJECTIVES, Purrception


def test_z_t_is_the_interpolation_between_noise_and_the_code_vectors():
    f = method()
    codes = torch.randint(K, (2, SIDE, SIDE))
    z0 = torch.randn(2, d, SIDE, SIDE)
    z = f.path(z0, codes, torch.tensor([0.25, 0.0]))
    z1 = f.codebook[codes].movedim(3, 1)
    torch.testing.assert_close(z[0], 0.25 * z1[0] + 0.75 * z0[0])
    assert z[1].equal(z0[1])


def test_pi_is_the_softmax_of_the_logits_over_tau():                                # Eq. 12, 15
    f = method()
    z, t, y, _ = point(f)
    pi = torch.softmax(f.model(z, t, y) / 0.7, 3)
    torch.testing.assert_close(f.posterior(z, t, y, tau=0.7), pi)


def test_mu_is_pis_mean_of_the_code_vectors_and_the_velocity_points_to_it():        # Eq. 13
    f = method()
    z, t, y, _ = point(f)
    mu = (f.posterior(z, t, y, tau=0.7) @ f.codebook).movedim(3, 1)
    v = (mu - z) / (1 - t.view(-1, 1, 1, 1))
    torch.testing.assert_close(f.mean(z, t, y, tau=0.7), mu)
    torch.testing.assert_close(f.velocity(z, t, y, tau=0.7), v)


@pytest.mark.parametrize("z_loss", [0, 1e-5, 0.1])
def test_the_loss_is_cross_entropy_plus_z_loss_as_its_docstring_says(z_loss):       # Eq. 14
    f = method(z_loss=z_loss).double()
    z, t, y, codes = point(f)
    logits = f.model(z, t.double(), y).flatten(0, 2)
    ce = F.cross_entropy(logits, codes.flatten())
    z_part = z_loss * logits.logsumexp(1).square().mean()
    loss, parts = f.loss(z, t.double(), y, codes)
    weights = list(f.parameters())
    torch.testing.assert_close([loss, *parts.values()], [ce + z_part, ce, z_part])
    torch.testing.assert_close(torch.autograd.grad(loss, weights),
                               torch.autograd.grad(ce + z_part, weights))


def test_a_zero_head_starts_at_ln_k():
    f = Purrception(tiny_dit(random=False, out_channels=512), torch.randn(512, d))
    _, parts = f(torch.randint(512, (2, 8, 8)), torch.tensor([0, 1]))
    assert parts["ce"].item() == pytest.approx(math.log(512), abs=1e-6)
    assert parts["z"].item() == pytest.approx(1e-5 * math.log(512) ** 2, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_t_steps_are_t_calls_and_the_last_lands_on_mu(steps):                       # Appendix B
    f = method()
    z, _, y, _ = point(f)
    end = landing(f.sample, f, y, steps, tau=0.7, noise=z)
    calls = f.model.calls[:]
    assert len(calls) == steps
    for s, (_, t, _) in enumerate(calls):
        assert t.equal(torch.full((3,), s / steps))
        mu = f.mean(z, t, y, tau=0.7)
        z = z + (mu - z) / (1 - s / steps) / steps
    torch.testing.assert_close(end, mu)


@pytest.mark.parametrize("steps, cfg", [(1, 1.0), (7, 1.0), (10, 3.0)])
def test_a_one_hot_posterior_returns_its_codes_whatever_the_noise(steps, cfg):
    f = method()
    patch = torch.tensor([[7, 2], [0, 10]])
    head = f.model.final_layer.linear
    head.weight.data.zero_()
    head.bias.data = 1000.0 * F.one_hot(patch.flatten(), K).flatten()   # every patch is that
    noise = 50 * torch.randn(3, d, SIDE, SIDE)
    codes = f.sample(torch.tensor([0, 1, 2]), steps, 0.9, cfg, noise)
    assert codes.equal(patch.repeat(3, 2, 2))


def test_tau_to_zero_is_the_arg_max_and_tau_to_infinity_is_uniform():
    f = method()
    z, t, y, _ = point(f)
    best = f.model(z, t, y).argmax(3)
    assert f.posterior(z, t, y, tau=1e-7).equal(F.one_hot(best, K).float())
    torch.testing.assert_close(f.posterior(z, t, y, tau=1e7), torch.full((*best.shape, K), 1 / K))


@pytest.mark.parametrize("cfg", [0.0, 1.0, 1.5])
def test_guidance_acts_on_the_logits_one_is_off_and_zero_forgets_the_class(cfg):
    f = method()
    z, t, y, _ = point(f)
    pi = f.posterior(z, t, y, tau=0.7, cfg=cfg)
    _, _, labels = f.model.calls[0]
    assert len(labels) == (3 if cfg == 1 else 6)                # in one call
    c = f.model(z, t, y)
    u = f.model(z, t, torch.full_like(y, f.model.num_classes))
    guided = {0.0: u, 1.0: c, 1.5: u + 1.5 * (c - u)}[cfg]
    torch.testing.assert_close(pi, torch.softmax(guided / 0.7, 3))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_labels_are_dropped_at_the_given_rate(rate):
    f = method(label_dropout=rate)
    B = 4000
    y = torch.randint(f.model.num_classes, (B,))
    f(torch.zeros(B, SIDE, SIDE, dtype=torch.long), y.clone())
    _, _, seen = f.model.calls[0]
    dropped = seen == f.model.num_classes
    assert seen[~dropped].equal(y[~dropped])
    assert abs(dropped.float().mean() - rate) <= 5 * math.sqrt(rate * (1 - rate) / B)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_method_learns_a_toy_distribution_of_grids_by_class(name):
    torch.manual_seed(0)
    codebook = torch.tensor([[1.5, 1.5], [1.5, -1.5], [-1.5, 1.5], [-1.5, -1.5]])
    grids = torch.tensor([[[0, 1], [2, 3]], [[3, 3], [3, 3]], [[2, 0], [1, 1]]])
    share = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.2, 0.8]])    # of each grid, by class
    net = Fake(outputs_of(name, 4, 2), side=2, D=64, in_channels=2)
    f = OBJECTIVES[name](net, codebook)
    opt = torch.optim.Adam(f.parameters(), lr=3e-3)
    for _ in range(400):
        y = torch.randint(2, (256,))
        drawn = share[y].multinomial(1).squeeze(1)
        loss, _ = f(grids[drawn], y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    y = torch.arange(2).repeat_interleave(2000)
    codes = f.sample(y, steps=50, tau=None if name in ("cfm", "endpoint") else 1.0)
    found = (codes[:, None] == grids).all(3).all(2)             # [B,grid]
    assert (found.view(2, 2000, 3).float().mean(1) - share).abs().max() < 0.1
