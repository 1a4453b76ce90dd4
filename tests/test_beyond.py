"""Check what flow.py has beyond the paper.

Shapes: B batch, h w grid, K codes, d code dimension.
"""
import pytest
import torch
from fakes import SIDE, K, landing, method, point

import flow
from demo.edit import Edited
from flow import sample_beyond


@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_steps_of_order_1_alone_are_those_of_the_paper(cfg):
    f = method()
    z, _, y, _ = point(f)
    ours = landing(sample_beyond, f, f, y, 6, 0.7, cfg, z, order=1)
    torch.testing.assert_close(ours, landing(f.sample, f, y, 6, 0.7, cfg, z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["purrception", "cfm", "endpoint"])
def test_with_twice_the_steps_the_error_falls_twofold_at_order_1_and_fourfold_at_order_2(name):
    f = method(name)
    z, _, y, _ = point(f)
    tau = 0.9 if name == "purrception" else None

    def half_way(order, steps):             # the last step follows another rule
        f.model.calls.clear()
        sample_beyond(f, y, steps, tau, noise=z, order=order)
        half, t, _ = f.model.calls[steps // 2]
        assert t[0] == 0.5
        return half

    truth = half_way(2, 800)
    error = {(order, steps): (half_way(order, steps) - truth).abs().mean()
             for order in (1, 2) for steps in (20, 40)}
    assert 1.8 < error[1, 20] / error[1, 40] < 2.3
    assert 3.2 < error[2, 20] / error[2, 40] < 5
    assert error[2, 20] < 0.3 * error[1, 40]


@pytest.mark.parametrize("t, after", [(0.0, 0.1), (0.3, 0.8), (0.9, 0.95)])
def test_a_step_of_order_2_solves_the_equation_for_a_mean_that_is_linear_in_t(t, after):
    z, mu, slope, n = 0.7, -0.4, 2.5, 20000
    ours = z + (after - t) * ((mu - z) / (1 - t) + slope * flow.slope_weight(t, after))
    h = (after - t) / n

    def v(u, z):
        return (mu + slope * (u - t) - z) / (1 - u)

    for i in range(n):                      # the midpoint rule in small steps
        u = t + i * h
        z = z + h * v(u + h / 2, z + h / 2 * v(u, z))
    assert ours == pytest.approx(z, abs=1e-6)


# 1 - 0.059 in three steps is a little more than that after rounding; 1 - 0.01 is a little less.
@pytest.mark.parametrize("start, steps", [(0, 6), (0.5, 4), (0.059, 3), (0.01, 3)])
@pytest.mark.parametrize("order", [1, 2])
def test_steps_share_what_is_left_and_the_last_lands_on_mu_or_half_way_beyond(order, start, steps):
    f = method()
    z, _, y, _ = point(f)
    edited = Edited(f, torch.full((1, SIDE, SIDE), -1), start)
    end = landing(sample_beyond, f, edited, y, steps, noise=z, order=order)
    calls = f.model.calls[:]
    times = [t[0].item() for _, t, _ in calls]
    assert times == pytest.approx([start + (1 - start) * s / steps for s in range(steps)])
    assert calls[0][0].equal(z)
    before, mu = (f.mean(z, t, y, 0.9) for z, t, _ in calls[-2:])
    if order == 2:
        mu = mu + 0.5 * (mu - before)       # to 1 it is as far as between the calls; halved
    torch.testing.assert_close(end, mu, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interval, guided", [
    ((0, 1), range(10)), ((0.3, 0.8), range(3, 9)), ((0.95, 1), ())])
def test_outside_the_interval_a_call_has_no_null_class(interval, guided):
    f = method()
    z, _, y, _ = point(f)
    codes = sample_beyond(f, y, 10, cfg=3.0, noise=z, interval=interval)
    assert [len(z) for z, _, _ in f.model.calls] == [6 if s in guided else 3 for s in range(10)]
    if not guided:
        assert codes.equal(sample_beyond(f, y, 10, noise=z))


@pytest.mark.parametrize("order", [1, 2])
def test_the_temperature_goes_linearly_in_t_from_tau_to_tau_end(order):
    f = method()
    z, _, y, _ = point(f)
    used = []
    f.mean = lambda z, t, y, tau, cfg: used.append((t[0].item(), tau)) or type(f).mean(
        f, z, t, y, tau, cfg)
    constant = sample_beyond(f, y, 5, 0.9, noise=z, order=order)
    assert {tau for _, tau in used} == {0.9}
    del used[:]
    falling = sample_beyond(f, y, 5, 0.9, noise=z, order=order, tau_end=0.4)
    assert [tau for _, tau in used] == pytest.approx([0.9 - 0.5 * t for t, _ in used])
    assert not falling.equal(constant)
    assert sample_beyond(f, y, 5, 0.9, noise=z, order=order, tau_end=0.9).equal(constant)


@pytest.mark.parametrize("order", [1, 2])
def test_known_codes_stay_and_are_on_their_path_at_all_times(order):
    f = method()
    z, _, y, codes = point(f)
    keep = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    keep[1:, :2] = True
    f.codebook[6] = f.codebook[5]           # of the two, nearest() returns code 5
    codes[:, 1, 0] = 6
    edited = Edited(f, codes.where(keep, -1))
    sampled = sample_beyond(edited, y, 5, noise=z, order=order)
    for at, t, _ in f.model.calls:
        on_path = f.path(z, codes, t)
        torch.testing.assert_close(at[..., keep], on_path[..., keep], atol=1e-5, rtol=1e-5)
    free = sample_beyond(f, y, 5, noise=z, order=order)
    assert sampled[:, keep].equal(codes[:, keep]) and not free[:, keep].equal(codes[:, keep])
    assert not sampled[:, ~keep].equal(free[:, ~keep])      # the others have seen them


def test_logit_normal_times_are_the_quantiles_of_uniform_ones():
    t = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    logits = flow.logit_normal(t).logit()
    torch.testing.assert_close(torch.distributions.Normal(0, 1).cdf(logits), t, atol=1e-5, rtol=0)


def geometric(f):
    """Give f a geometric head that starts at zero; return its weight and optimizer."""
    W = torch.nn.init.zeros_(f.model.final_layer.linear.weight)
    optimizer = torch.optim.AdamW([W], 0.01, weight_decay=0.5)
    flow.geometric_head(f, optimizer)
    return W, optimizer


def test_a_geometric_head_trains_W_and_A_of_the_sum_W_plus_phi_A():
    f = method()
    weight, optimizer = geometric(f)
    assert not weight.any()
    E = f.codebook
    phi = torch.cat([E, E.square()], 1)
    phi = (phi - phi.mean(0)) / phi.std(0, correction=0)
    G = len(weight) // K
    D = weight.shape[1]
    W = torch.zeros(G, K, D, requires_grad=True)
    A = torch.zeros(G, phi.shape[1], D, requires_grad=True)
    apart = torch.optim.AdamW([W, A], 0.01, weight_decay=0.5)
    goal = torch.randn(len(weight), D)
    for _ in range(5):
        total = (W + phi @ A).flatten(0, 1)
        torch.testing.assert_close(weight, total, atol=1e-4, rtol=0)
        weight.grad = (weight.detach() - goal).sin()
        optimizer.step()
        optimizer.zero_grad()
        apart.zero_grad()
        (1 - (total - goal).cos()).sum().backward()
        apart.step()
    assert A.abs().mean() > 0.01 and not A[0].allclose(A[1])    # a place in the patch has its own


def test_a_geometric_head_learns_alike_for_equal_codes():
    f = method()
    f.codebook.fill_(0.3)
    weight, optimizer = geometric(f)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.isfinite().all() and weight.equal(weight[:1].expand_as(weight))
