"""Check on a GPU what differs there: bf16, TF32, compiled code, batches of pictures, two processes.

    python -m pytest -m gpu tests                             in other runs GPUs are hidden
    python -m pytest tests/test_gpu.py --gpu-tests-on cpu     these run there, but prove little
"""
import copy

import pytest
import test_train
import torch
from fakes import tiny_dit
from torch import nn

import flow as method
import train
import vq
from flow import Purrception

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # the compiler's own
K, d, SIDE, CLASSES = 512, 4, 16, 10


@pytest.fixture
def device(request):
    device = torch.device(request.config.getoption("--gpu-tests-on"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: pytest -m gpu tests")
    return device


@pytest.fixture
def tf32():
    """Allow TF32 everywhere, as NVIDIA's containers do; setup_process() takes back what harms."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    vq.setup_process()


@pytest.fixture
def compiled(monkeypatch):
    """Compile a copy as --compile does: the blocks, one by one, and the loss."""
    eager = method.loss_and_gradient

    def compiled(flow):
        monkeypatch.setattr(method, "loss_and_gradient", eager)  # restored after the test, too
        torch._dynamo.reset()
        flow = copy.deepcopy(flow)
        train.compile_blocks(flow.model)
        assert method.loss_and_gradient is not eager
        return flow

    return compiled


def build(device):
    """Build the method around three blocks, with all weights drawn: no zero hides a mistake."""
    net = tiny_dit(random=False, input_size=SIDE, in_channels=d, out_channels=K, hidden_size=128,
                   depth=3, num_classes=CLASSES)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
    return Purrception(net, torch.randn(K, d)).to(device)


def batch(device, B=8):
    """Draw codes, classes, and the noise of a training step: the same on every device."""
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(K, (B, SIDE, SIDE), generator=g)
    y = torch.randint(CLASSES, (B,), generator=g)
    t, drop = torch.rand(2, B, generator=g)
    z0 = torch.randn(B, d, SIDE, SIDE, generator=g)
    return [x.to(device) for x in (codes, y, t, z0, drop < 0.1)]


def step(flow, dtype=None):
    """Compute the loss and the gradients of a step, under autocast to dtype if it is given."""
    device = flow.codebook.device
    codes, y, t, z0, drop = batch(device)
    t, z0 = (x.to(flow.codebook.dtype) for x in (t, z0))
    flow.zero_grad()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss, _ = flow(codes, y, noise=(t, z0, drop))
    loss.backward()
    params = {name: x for name, x in flow.named_parameters() if x.requires_grad}
    return loss.item(), {name: x.grad.double().cpu() for name, x in params.items()}


def assert_close(step, exact, off_loss, off):
    """Compare two losses, and the norm of each gradient's difference to its own norm."""
    (loss, gradients), (exact_loss, exact_gradients) = step, exact
    assert abs(loss / exact_loss - 1) < off_loss
    for name, x in exact_gradients.items():
        assert (gradients[name] - x).norm() <= off * x.norm(), name


@pytest.mark.parametrize("dtype, off_loss, off", [(None, 1e-4, 5e-3), (torch.bfloat16, 2e-3, 0.05)])
def test_a_training_step_is_close_to_float64(device, dtype, off_loss, off):
    ours = step(build(device), dtype)  # in float32, cuDNN uses TF32 in the patch embedding
    assert_close(ours, step(build("cpu").double()), off_loss, off)


def test_a_compiled_training_step_is_close_to_an_eager_one(device, compiled):
    flow = build(device)
    eager = step(flow)
    eager_bf16 = step(flow, torch.bfloat16)
    fast = compiled(flow)
    assert fast.state_dict().keys() == flow.state_dict().keys()
    assert_close(step(fast), eager, 1e-4, 1e-3)
    assert_close(step(fast, torch.bfloat16), eager_bf16, 5e-3, 0.05)


def test_nearest_codes_are_those_of_float64(device, tf32):
    g = torch.Generator().manual_seed(0)
    E = torch.randn(16384, d, generator=g)
    z = torch.randn(4, d, 32, 32, generator=g)
    rows = z.movedim(1, -1).flatten(0, 2)
    exact = torch.cat([torch.cdist(x, E.double()).argmin(1) for x in rows.double().split(512)])
    codes = Purrception(nn.Module(), E).to(device).nearest(z.to(device))
    assert (codes.flatten().cpu() != exact).float().mean() < 1e-3  # TF32 would change 1.5 %


@torch.inference_mode()
def tokenizer(device):
    """Build a random tokenizer whose codes are outputs of its encoder: images use many of them."""
    torch.manual_seed(0)
    net = vq.VQ(ch=32, ch_mult=(1, 2, 2), n_embed=1024, num_groups=8).eval()
    images = torch.rand(16, 3, 64, 64) * 2 - 1
    h = net.quant_conv(net.encoder(images)).movedim(1, -1).flatten(0, 2)
    net.quantize.embedding.weight.data.copy_(h[torch.randperm(len(h))[:1024]])
    return net.to(device), images.to(device)


@torch.inference_mode()
def test_tf32_does_not_change_encoded_codes(device, tf32):
    net, images = tokenizer(device)
    codes = net.encode(images)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert codes.equal(net.encode(images)) and len(codes.unique()) > 100
    exact = net.cpu().encode(images.cpu())
    assert (codes.cpu() != exact).float().mean() < 5e-3  # near ties alone


def test_two_processes_train_as_one(device, tmp_path, tiny_data):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    test_train.test_two_processes_train_as_one(tmp_path, tiny_data)
