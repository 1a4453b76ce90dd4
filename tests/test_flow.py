"""Check flow.py's method and its head in chunks, beyond what test_paper.py tells.

Shapes: B batch, h w grid, N tokens of G positions, D width, K codes, d code dimension.
"""
import inspect
import weakref

import pytest
import torch
import torch.nn.functional as F
from fakes import (CLASSES, SIDE, Fake, K, d, method, plain_loss, plain_mean, plain_posterior,
                   point, tiny_dit)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flow
from flow import DFM, OBJECTIVES, Purrception, linear_cross_entropy


def assert_same(ours, theirs, rtol=1e-6):
    """Compare tensor by tensor, relative to the largest entry."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= rtol * b.abs().max()


class Memory(TorchDispatchMode):
    """Watch operations: their names, the largest tensor made, the most numbers alive at once."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.largest = self.peak = 0
        self.live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        theirs = {x.untyped_storage().data_ptr() for x in given}
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            new = storage and id(storage) not in self.live and storage.data_ptr() not in theirs
            if new:                         # not a view, not in place
                self.largest = max(self.largest, x.numel())
                weakref.finalize(storage, self.live.pop, id(storage), None)
                self.live[id(storage)] = storage.nbytes() // x.element_size()
        self.peak = max(self.peak, sum(self.live.values()))
        return out


# ----- training

def test_noise_is_a_uniform_time_and_normal_numbers_of_each_positions_own():
    B = 2000
    t, z0, drop = method().noise(B, torch.Generator().manual_seed(0))
    assert t.dtype == z0.dtype == torch.float32 and t.shape == drop.shape == (B,)
    assert 0 <= t.min() and t.max() < 1
    u = t.sort().values                     # Kolmogorov's distance of t to U(0, 1)
    assert (u - (torch.arange(B) + 0.5) / B).abs().max() < 1.95 / B ** 0.5
    assert z0.shape == (B, d, SIDE, SIDE) and abs(z0.mean()) < 0.02 and abs(z0.std() - 1) < 0.02
    correlation = torch.corrcoef(torch.cat([z0.flatten(1), t[:, None], drop[:, None]], 1).T)
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_forward_is_the_loss_on_the_path_at_its_own_noise_or_at_what_is_given(name):
    f = method(name, label_dropout=0.5)
    _, _, y, codes = point(f)
    torch.manual_seed(0)
    drawn, _ = f(codes, y)
    torch.manual_seed(0)
    t, z0, drop = f.noise(3)
    given, _ = f(codes, y, noise=[t, z0, drop])
    z, _, seen = f.model.calls[0]
    assert seen.equal(y.masked_fill(drop, CLASSES))
    expected, _ = f.loss(f.path(z0, codes, t), t, seen, codes)
    assert drawn.equal(given) and given.equal(expected)


@pytest.mark.parametrize("name, draw", [("purrception", torch.randn), ("dfm", torch.rand)])
def test_the_prior_is_drawn_where_its_generator_is(name, draw):
    f = method(name)
    shape = f.prior(2).shape
    expected = draw(shape, generator=torch.Generator().manual_seed(3))
    for device in "cpu", "meta":            # the codebook's; sample.py draws on the CPU
        assert f.to(device).prior(2, torch.Generator().manual_seed(3)).equal(expected)
    assert f.prior(2).device.type == "meta"


def test_the_defaults_are_the_papers():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    assert default(linear_cross_entropy, "z_weight") == 1e-5
    assert default(Purrception.sample, "tau") == 0.9
    for function in DFM.sample, Purrception.posterior, Purrception.mean, Purrception.velocity:
        assert default(function, "tau") == 1.0
    for objective in OBJECTIVES.values():
        f = objective(Fake(), torch.randn(K, d))
        assert f.z_loss == 1e-5 and f.label_dropout == 0.1
        assert default(f.sample, "steps") == 100
        for function in f.sample, f.posterior, f.mean, f.velocity:
            assert function is None or default(function, "cfg") == 1.0


def test_the_codebook_is_frozen_and_kept_out_of_checkpoints():
    f = method()
    assert "codebook" not in f.state_dict()
    assert not f.codebook.requires_grad and f.codebook.dtype == torch.float32


# ----- posterior, mean and velocity

@pytest.mark.parametrize("tau, cfg", [(1, 1), (0.7, 1), (0.9, 1.3), (0.5, 4), (1, -1)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_all_is_made_of_the_networks_logits_by_the_plain_formulas(patch, tau, cfg):
    f = Purrception(tiny_dit(patch_size=patch, out_channels=K), torch.randn(K, d))
    z, t, y, codes = point(f)
    mu = plain_mean(f, z, t, y, tau, cfg)
    v = (mu - z) / (1 - t.view(-1, 1, 1, 1))
    pi = plain_posterior(f, z, t, y, tau, cfg)
    torch.testing.assert_close(f.posterior(z, t, y, tau, cfg), pi, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(f.mean(z, t, y, tau, cfg), mu, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(f.velocity(z, t, y, tau, cfg), v, atol=1e-4, rtol=1e-4)
    assert_same([f.loss(z, t, y, codes)[0]], plain_loss(f.model(z, t, y), codes, 1e-5)[:1], 1e-5)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_posterior_mean_and_velocity_are_float32_under_autocast(cfg):
    f = method(scale=30.0)
    z, _, y, _ = point(f)
    t = torch.zeros(3)
    with torch.autocast("cpu", torch.bfloat16):
        pi, mu, v = (call(z, t, y, 0.9, cfg) for call in (f.posterior, f.mean, f.velocity))
    assert pi.dtype == mu.dtype == v.dtype == torch.float32
    exact = torch.einsum("bhwk,kd->bdhw", pi.double(), f.codebook.double()).float()
    torch.testing.assert_close(pi.sum(3), torch.ones(3, SIDE, SIDE))
    torch.testing.assert_close(mu, exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(v + z, exact, atol=1e-5, rtol=1e-5)
    full = plain_posterior(f, z, t, y, 0.9, cfg)        # only features and products are bf16
    assert 0 < (pi - full).abs().max() < 0.1 * cfg


# ----- sampling

@pytest.mark.parametrize("name", OBJECTIVES)
def test_sample_is_a_function_of_the_noise_image_by_image_and_leaves_it_alone(name):
    f = method(name)
    y = torch.tensor([0, 1, 2])
    noise = f.prior(3)
    before = noise.clone()
    codes = f.sample(y, 5, noise=noise)
    assert codes.shape == (3, SIDE, SIDE) and codes.dtype == torch.int64
    alone = [f.sample(y[i:i + 1], 5, noise=noise[i:i + 1]) for i in range(3)]
    assert codes.equal(torch.cat(alone)) and noise.equal(before)
    assert not codes.equal(f.sample(y, 5, noise=noise.flip(0)))
    assert not any(z.requires_grad for z, _, _ in f.model.calls)
    torch.manual_seed(1)
    drawn = f.sample(y, 5)
    torch.manual_seed(1)
    assert drawn.equal(f.sample(y, 5, noise=f.prior(3)))


# ----- the network's patches, and chunks of its outputs

@pytest.mark.parametrize("patch", [1, 2, 4])
def test_to_tokens_orders_codes_as_the_network_does_and_on_grid_undoes_it(patch):
    codes = torch.arange(2 * 8 * 12).view(2, 8, 12)
    tokens = flow.to_tokens(codes, patch)
    assert tokens.shape == (2, 96 // patch ** 2, patch ** 2)
    for n in range(tokens.shape[1]):
        i = n // (12 // patch) * patch
        j = n % (12 // patch) * patch
        assert tokens[1, n].tolist() == codes[1, i:i + patch, j:j + patch].flatten().tolist()
    square = codes[:, :, :8]
    rows = flow.to_tokens(square, patch).flatten(0, 1).T.flatten()      # in the order of outputs()
    f = Purrception(Fake(side=8, patch=patch), torch.randn(K, d))
    assert f.on_grid(rows.unsqueeze(1)).squeeze(3).equal(square)


@pytest.mark.parametrize("rows", [1, 5, 12, 13])        # there are twelve tokens
@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunks_change_no_result(monkeypatch, name, rows):
    f = method(name)
    z, t, y, codes = point(f)
    noise = f.prior(3)

    def results():
        calls = [call for call in (f.posterior, f.mean, f.velocity) if call]
        return [f.loss(z, t, y, codes)[0], *(call(z, t, y, cfg=1.5) for call in calls)]

    whole = results()
    sampled = f.sample(y, 5, cfg=1.5, noise=noise)
    monkeypatch.setattr(flow, "chunk_rows", lambda K, device, cpu=0: rows)
    torch.testing.assert_close(results(), whole)
    assert f.sample(y, 5, cfg=1.5, noise=noise).equal(sampled)


def test_memory_of_sampling_is_bounded_by_the_chunk(monkeypatch):
    monkeypatch.setattr(flow, "chunk_rows", lambda K, device, cpu=0: 20)
    codes = 1000
    f = Purrception(Fake(codes), torch.randn(codes, d))
    y = torch.zeros(256, dtype=torch.long)
    z = f.prior(256)
    with Memory() as memory:
        f.sample(y, 2, cfg=1.5, noise=z)
    assert memory.peak < 2 ** 20 < 256 * SIDE ** 2 * codes // 3     # 2^18 distances at a time


# ----- linear_cross_entropy

def head_inputs(rows, groups=1, D=6, K=9, dtype=torch.float64):
    """Draw h, weight and bias, which want gradients, and targets."""
    g = torch.Generator().manual_seed(2)
    shapes = (rows, D), (groups * K, D), (groups * K,)
    inputs = [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]
    target = torch.randint(K, (rows, groups) if groups > 1 else (rows,), generator=g)
    return [x.requires_grad_() for x in inputs], target


def plain_head(h, W, b, target, z_weight=1e-5):
    groups = target[0].numel()
    return plain_loss(F.linear(h, W, b).unflatten(1, (groups, -1)), target, z_weight)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rows", [1, 4, 5, 11])         # a chunk holds four
@pytest.mark.parametrize("z_weight", [0.0, 1e-5, 0.5])
def test_value_and_gradients_equal_the_plain_formula(monkeypatch, rows, groups, z_weight):
    monkeypatch.setattr(flow, "chunk_rows", lambda K, device, cpu=0: 4)
    inputs, target = head_inputs(rows, groups)
    ours = linear_cross_entropy(*inputs, target, z_weight)
    theirs = plain_head(*inputs, target, z_weight)
    assert_same(ours, theirs)
    assert [x.requires_grad for x in ours] == [True, False, False]
    ours, theirs = (torch.autograd.grad(3 * loss, inputs) for loss, _, _ in (ours, theirs))
    assert_same(ours, theirs)


def test_a_second_backward_pass_raises_and_leaves_the_first_ones_gradients_alone():
    inputs, target = head_inputs(7)
    loss = 3 * linear_cross_entropy(*inputs, target)[0]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [x.clone() for x in first]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_same(first, kept, 0)


def test_no_gradients_are_formed_when_none_are_wanted():
    inputs, target = head_inputs(64, groups=2)
    with Memory() as memory:
        loss, _, _ = linear_cross_entropy(*inputs, target)
    assert "mm" in memory.names                         # the products that form the gradients
    with Memory() as memory, torch.no_grad():
        quiet, _, _ = linear_cross_entropy(*inputs, target)
    assert "mm" not in memory.names
    assert quiet.equal(loss) and not quiet.requires_grad


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_under_autocast_only_the_product_is_bf16(monkeypatch, features):
    monkeypatch.setattr(flow, "chunk_rows", lambda K, device, cpu=0: 1)  # two hundred chunks to sum
    (h, W, b), target = head_inputs(200, groups=2, dtype=torch.float32)
    inputs = [h.detach().to(features).requires_grad_(), W, b]
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(*inputs, target)
        logits = F.linear(*inputs)
    assert logits.dtype == torch.bfloat16
    assert_same(ours, plain_loss(logits.float().unflatten(1, (2, -1)), target, 1e-5), 1e-5)
    found = torch.autograd.grad(ours[0], inputs)
    assert [x.dtype for x in found] == [features, torch.float32, torch.float32]
    exact = torch.autograd.grad(plain_head(h, W, b, target)[0], [h, W, b])
    assert_same([x.float() for x in found], exact, 0.01)


def test_the_z_loss_reaches_features_weights_and_bias_in_bf16():
    # In bf16 the factor 1 + 2e-4 of pi is 1: it must be in the gradient before that is rounded.
    inputs, target = head_inputs(2048, D=64, K=4096, dtype=torch.float32)
    inputs[1].data /= 8                                 # logits of standard deviation 1.4

    def share(dtype, autocast):
        """Return the z-loss's share of the gradients: those with it minus those without."""
        found = []
        for z_weight in 1e-5, 0.0:
            leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, _, _ = linear_cross_entropy(*leaves, target, z_weight)
            found.append(torch.autograd.grad(loss, leaves))
        return [(x - y).double() for x, y in zip(*found)]

    exact = share(torch.float64, autocast=False)
    for g, e in zip(share(torch.float32, autocast=True), exact):
        assert 0.65 < (g * e).sum() / (e * e).sum() < 1.35


def test_memory_of_the_loss_is_bounded_by_the_chunk_not_by_the_positions(monkeypatch):
    monkeypatch.setattr(flow, "chunk_rows", lambda K, device, cpu=0: 8)
    chunk = 8 * 256
    for rows in 256, 1024:
        inputs, target = head_inputs(rows, groups=2, D=8, K=256, dtype=torch.float32)
        with Memory() as memory:
            torch.autograd.grad(2 * linear_cross_entropy(*inputs, target)[0], inputs)
        assert memory.largest <= max(chunk, *(x.numel() for x in inputs))
        kept = 2 * sum(x.numel() for x in inputs)       # the gradients, and those of a chunk
        assert memory.peak - kept < 6 * chunk < 256 * 2 * 256 // 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")                   # the compiler's own
def test_the_compiled_loss_agrees(monkeypatch):
    inputs, target = head_inputs(300, groups=4, K=50)

    def results():
        loss, _, _ = linear_cross_entropy(*inputs, target, 1e-3)
        return [*torch.autograd.grad(loss, inputs), loss.detach()]

    expected = results()
    monkeypatch.setattr(flow, "loss_and_gradient", torch.compile(flow.loss_and_gradient))
    monkeypatch.setattr(flow, "chunk_rows", lambda K, device, cpu=0: 128)      # the last is smaller
    torch.testing.assert_close(results(), expected)
