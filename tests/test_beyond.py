"""What flow.sample does beyond the paper: steps of order 2, a guidance interval, a later start, known codes.

Shapes: B batch, h w grid, K codes, d code dimension.
"""
import pytest
import torch
from test_flow import SIDE, K, d, method, oracle, point

import flow
from flow import OBJECTIVES


def landing(f, *args, **kwargs):
    """Sample, and return where z ends: [B,d,h,w]."""
    ends = []
    f.nearest = lambda z: ends.append(z) or type(f).nearest(f, z)
    f.sample(*args, **kwargs)
    return ends[0]


class Mixture(torch.nn.Module):
    """The exact network for independent positions, each code as likely as any other; float64."""

    def __init__(self, E, velocity):
        super().__init__()
        self.E, self.velocity = E, velocity
        self.seen = {}                                     # t: z
        self.input_size, self.patch_size, self.num_classes = SIDE, 1, 1
        outputs = E.shape[1] if velocity else len(E)
        self.final_layer = torch.nn.Module()
        self.final_layer.linear = torch.nn.Linear(outputs, outputs, dtype=torch.float64)
        torch.nn.init.eye_(self.final_layer.linear.weight)
        torch.nn.init.zeros_(self.final_layer.linear.bias)

    def hidden(self, z, t, y):
        """Return log p(c | z_t) up to a constant or, for CFM, E[z1 - z0 | z_t]: [B,hw,K or d]."""
        self.seen[t[0].item()] = z
        rows, t = z.flatten(2).transpose(1, 2), t[:, None, None].double()
        logits = -(rows[:, :, None] - t[..., None] * self.E).square().sum(3) / (2 * (1 - t) ** 2)
        return (logits.softmax(2) @ self.E - rows) / (1 - t) if self.velocity else logits


def exact(name="purrception"):
    g = torch.Generator().manual_seed(5)
    E = torch.randn(K, d, generator=g).double()
    f = OBJECTIVES[name](Mixture(E, name == "cfm"), E)
    f.codebook = E                                         # the constructor makes it float32
    return f, torch.zeros(40, dtype=torch.long), torch.randn(40, d, SIDE, SIDE, generator=g).double()


def test_order_2_is_order_1_where_the_mean_is_constant():
    codes = torch.randint(K, (1, SIDE, SIDE), generator=torch.Generator().manual_seed(3))
    f, noise = oracle(codes), 50 * torch.randn(3, d, SIDE, SIDE)
    y = torch.arange(3)
    torch.testing.assert_close(landing(f, y, 7, noise=noise, order=2), landing(f, y, 7, noise=noise), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["purrception", "cfm"])
def test_the_error_of_order_2_falls_fourfold_when_steps_double_and_that_of_order_1_twofold(name):
    f, y, noise = exact(name)
    knobs = {"tau": 1.0} if name == "purrception" else {}

    def half_way(order, steps):                            # at the end, all are at a code
        f.model.seen = {}
        f.sample(y, steps, noise=noise, order=order, **knobs)
        return f.model.seen[0.5]

    truth = half_way(2, 800)
    error = {(order, T): (half_way(order, T) - truth).abs().mean() for order in (1, 2) for T in (20, 40)}
    assert 1.8 < error[1, 20] / error[1, 40] < 2.3
    assert 3.2 < error[2, 20] / error[2, 40] < 5
    assert error[2, 20] < 0.3 * error[1, 40]


def test_both_methods_agree_on_an_exact_network_at_either_order():
    (f, y, noise), (cfm, _, _) = exact(), exact("cfm")
    for order in (1, 2):
        a, b = landing(f, y, 9, tau=1.0, noise=noise, order=order), landing(cfm, y, 9, noise=noise, order=order)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)           # t is float32


@pytest.mark.parametrize("t, after", [(0.0, 0.1), (0.3, 0.8), (0.9, 0.95)])
def test_a_step_of_order_2_solves_the_equation_for_a_mean_that_is_linear_in_t(t, after):
    z, mu, slope, n = 0.7, -0.4, 2.5, 20000
    w = z + (after - t) * ((mu - z) / (1 - t) + slope * flow.bend(t, after))
    for i in range(n):                                     # the midpoint rule in small steps
        u, h = t + (after - t) * i / n, (after - t) / n
        v = lambda u, z: (mu + slope * (u - t) - z) / (1 - u)  # noqa: E731
        z = z + h * v(u + h / 2, z + h / 2 * v(u, z))
    assert w == pytest.approx(z, abs=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_steps_are_calls_at_either_order_and_the_last_lands_on_the_mean_or_half_way_beyond(order):
    f, (z, _, y, _) = method(), point()
    end = landing(f, y, 6, noise=z, order=order)
    calls = f.model.calls[:]
    assert [t[0].item() for _, t, _ in calls] == pytest.approx([s / 6 for s in range(6)])
    before, mu = (f.mean(z, t, y, 0.9) for z, t, _ in calls[-2:])
    if order == 2:
        mu = mu + 0.5 * (mu - before)                      # as far as from 4/6 to 5/6, halved
    torch.testing.assert_close(end, mu, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interval, guided", [((0, 1), range(10)), ((0.3, 0.8), range(3, 9)), ((0.95, 1), ())])
def test_outside_the_interval_a_call_has_no_null_class(interval, guided):
    f, (z, _, y, _) = method(), point()
    codes = f.sample(y, 10, cfg=3.0, noise=z, interval=interval)
    assert [len(call[0]) for call in f.model.calls] == [6 if s in guided else 3 for s in range(10)]
    if not guided:
        assert codes.equal(f.sample(y, 10, noise=z))


def test_a_later_start_takes_the_steps_that_are_left():
    f, (z, _, y, _) = method(), point()
    torch.testing.assert_close(landing(f, y, 4, noise=z, start=0.5), euler(f, z, y, [0.5, 0.625, 0.75, 0.875, 1.0]))


def euler(f, z, y, times):
    for t, after in zip(times, times[1:]):
        z = z + (after - t) * f.velocity(z, torch.full((len(y),), t), y, 0.9)
    return z


@pytest.mark.parametrize("order", [1, 2])
def test_known_codes_stay_and_are_on_their_path_at_all_times(order):
    f, (z, _, y, codes) = method(), point()
    keep = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    keep[1:, :2] = True
    known = codes.where(keep, -1)
    sampled = f.sample(y, 5, noise=z, known=known, order=order)
    assert sampled[:, keep].equal(codes[:, keep]) and not sampled.equal(codes)
    assert not sampled[:, ~keep].equal(f.sample(y, 5, noise=z, order=order)[:, ~keep])  # the free ones have seen them
    for zs, ts, _ in f.model.calls[:5]:
        on_path = f.path(z, codes, ts)
        torch.testing.assert_close(zs[..., keep], on_path[..., keep], atol=1e-5, rtol=1e-5)
