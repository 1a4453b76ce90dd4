"""What one small GPU, a Mac or a long run asks for: memory, --recompute, --device, --val."""
import contextlib
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_train import CPU, ROOT, main, read, run_fixture  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import fid
import flow
import model
import sample
import train
import vq
from vq import InputError


# ----- memory

@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_blocks_have_the_same_gradients(bf16):
    torch.manual_seed(0)
    net = model.DiT(4, hidden_size=32, depth=2, num_heads=2, out_channels=20, num_classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    f = flow.Purrception(net, torch.randn(20, 4))
    codes = torch.randint(20, (6, 4, 4))
    noise = f.noise(6)

    def gradients():
        """Return the loss, its gradients, and how many numbers the backward pass was left."""
        f.zero_grad()
        left = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: left.append(x) or x, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = f(codes, torch.arange(6) % 3, noise)
        loss.backward()
        found = [loss, *(p.grad for p in f.parameters() if p.requires_grad)]
        return found, sum(x.numel() for x in left)

    plain, most = gradients()
    net.recompute = True
    again, least = gradients()
    assert all(a.equal(b) for a, b in zip(plain, again, strict=True)) and least < most / 2


def test_recompute_trains_as_without_and_is_kept(run, monkeypatch):
    checkpoint = Mock(side_effect=model.checkpoint)
    monkeypatch.setattr(model, "checkpoint", checkpoint)
    plain, log = run("a", "--steps", 3)
    assert not checkpoint.called
    again, log2 = run("b", "--steps", 3, "--recompute")
    assert checkpoint.call_count == 3 * 2  # blocks
    assert log == log2 and again["args"]["recompute"] and not plain["args"]["recompute"]
    assert all(x.equal(again["ema"][name]) for name, x in plain["ema"].items())


def test_out_of_memory_is_one_sentence(run, monkeypatch):
    def backward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "backward", backward)
    with pytest.raises(InputError, match="--accumulate 4, --recompute, or a smaller --model"):
        run("a", "--steps", 3, "--accumulate", 2)


# ----- devices

class Watch(TorchDispatchMode):
    """Refuse float64 on a device that lacks it, and random numbers that are not the CPU's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                assert x.dtype != torch.float64 and "rand" not in str(function), function
        return out


@pytest.mark.parametrize("name", flow.OBJECTIVES)
def test_a_device_without_float64_and_generators_trains_and_samples(name, monkeypatch):
    """The fake device is torch's "meta", which has shapes and types but no numbers.

    Mixing it with the CPU is an error. It has no autocast, which is off there anyway.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    meta = torch.device("meta")
    regression = issubclass(flow.OBJECTIVES[name], flow.CFM)
    net = model.DiT(4, hidden_size=32, depth=2, num_heads=2, num_classes=3,
                    in_channels=32 if name == "dfm" else 4, out_channels=4 if regression else 20)
    f = flow.OBJECTIVES[name](net, torch.randn(20, 4)).to(meta)
    codes = torch.zeros(6, 4, 4, dtype=torch.long, device=meta)
    y = torch.zeros(6, dtype=torch.long, device=meta)
    with Watch():
        t, z0, drop = f.noise(6, train.seeded(meta, 0, 1))
        noise = [x.to(meta) for x in (flow.logit_normal(t), z0, drop)]
        loss, _ = f(codes, y, noise)
        loss.backward()
        tau = {} if regression else {"tau": 0.9}
        assert f.sample(y, 3, cfg=1.5, noise=noise[1], **tau).shape == codes.shape
        if name != "dfm":
            sampled = flow.sample_beyond(f, y, 3, tau.get("tau"), 1.5, noise[1])
            assert sampled.shape == codes.shape
    assert all(p.grad.dtype == torch.float32 for p in f.parameters() if p.requires_grad)


def test_the_device_is_a_gpu_if_there_is_one_or_what_is_asked_for(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert vq.setup_process()[2] == torch.device("cuda", 0)
    assert vq.setup_process("cpu")[2] == CPU
    ckpt, _ = run("a", "--steps", 2, "--device", "cpu")
    assert "device" not in ckpt["args"]
    sample.main(["--num-samples", "2", "--steps", "2", "--out", "a", "--device", "cpu"])
    np.savez("two.npz", mu=np.zeros(3), sigma=np.eye(3))
    fid.main(["two.npz", "--ref", "two.npz", "--device", "cpu"])
    monkeypatch.undo()
    for call in (lambda *x: main(*x), lambda *x: sample.main([*x]), lambda *x: fid.main(["a", *x])):
        for name in ("mps", "cuda", "tpu", "meta"):
            with pytest.raises(InputError, match=f"--device {name}: not here"):
                call("--device", name)
    assert not train.bf16_is_fast(torch.device("mps"))
    assert train.seeded(torch.device("mps"), 1).device == CPU


# ----- the held-out loss

@pytest.fixture
def val(tiny_data):
    """Another data directory of the same classes: the first nine images, one of them unreadable."""
    folder = tiny_data.with_name("val")
    folder.mkdir()
    labels = np.load(tiny_data / "labels.npy")[:9]
    labels[4] = -1
    np.save(folder / "labels.npy", labels)
    np.save(folder / "codes.npy", np.load(tiny_data / "codes.npy")[:9])
    (folder / "meta.json").write_bytes((tiny_data / "meta.json").read_bytes())
    return folder


def plain_held_out(name, val, t):
    """Return the mean loss of a run's averaged weights on all images, one after the other."""
    run = train.load_run(f"runs/{name}/ckpt.pt")
    data, _ = train.open_data(val, CPU)
    rows = data.readable[np.linspace(0, len(data.readable) - 1, 256).astype(int)]
    z0 = run.flow.prior(256, train.seeded("cpu", run.args.seed))
    losses = []
    for i, row in enumerate(rows):
        codes = torch.from_numpy(data.codes[[row]].astype(int))
        y = torch.from_numpy(data.labels[[row]].astype(int))
        times = torch.tensor([t])
        z = run.flow.path(z0[[i]], codes, times)
        if run.args.objective == "purrception":
            losses.append(-run.flow.posterior(z, times, y).gather(3, codes[..., None]).log().mean())
        else:
            wanted = (run.flow.embed(codes) - z) / (1 - t)
            losses.append((run.flow.velocity(z, times, y) - wanted).square().mean())
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("objective", ["purrception", "cfm"])
def test_the_held_out_loss_is_that_of_the_averaged_weights(run, val, objective):
    _, log = run("a", "--steps", 4, "--sample-every", 2, "--val", val, "--objective", objective,
                 "--log-every", 3, "--lr", 0.1, "--ema-decay", 0.1)
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    assert ["val" in record for record in log] == [False, True, False, True]
    assert ["loss" in record for record in log] == [True, False, True, False]
    by_t = log[-1]["val_by_t"]
    assert len(by_t) == 8 and log[-1]["val"] == pytest.approx(sum(by_t) / 8)
    for i in (0, 5, 7):
        plain = plain_held_out("a", val, (2 * i + 1) / 16)
        assert by_t[i] == pytest.approx(plain, rel=1e-4)
    assert by_t != log[1]["val_by_t"]


def test_the_held_out_loss_changes_no_training_and_resumes(run, val):
    plain, _ = run("a", "--steps", 6)
    ckpt, log = run("b", "--steps", 6, "--sample-every", 3, "--val", val)
    assert all(x.equal(plain["model"][name]) for name, x in ckpt["model"].items())
    run("c", "--steps", 3, "--sample-every", 3, "--val", val)
    main("--name", "c", "--resume", "--steps", 6)
    ckpt, again = read("c")
    assert again == log and ckpt["args"]["val"] == str(val)
    main("--name", "c", "--resume", "--steps", 7, "--val", "")
    assert "val" not in read("c")[1][-1]


def test_a_checkpoint_is_saved_before_pictures_and_held_out_loss(run, val, monkeypatch):
    monkeypatch.setattr(train, "held_out", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(InputError, match="out of memory"):
        run("a", "--steps", 3, "--sample-every", 3, "--val", val)
    assert read("a")[0]["step"] == 3


def test_held_out_codes_of_another_grid_are_refused(run, val):
    np.save(val / "codes.npy", np.load(val / "codes.npy")[:, :1, :1])
    with pytest.raises(InputError, match=f"{val}: .*image_size in meta.json do not fit"):
        run("a", "--steps", 3, "--val", val)
    meta = json.loads((val / "meta.json").read_text())
    (val / "meta.json").write_text(json.dumps(meta | {"image_size": 8}))
    with pytest.raises(InputError, match=f"{val}: not the data of .*image_size is 32 there, 8"):
        run("a", "--steps", 3, "--val", val)


@pytest.mark.parametrize("key, value", [
    ("classes", ["white", "black", "ginger tabby"]), ("tokenizer", "other.pt")])
def test_held_out_codes_of_others_are_refused(run, val, tiny_vq, key, value):
    file = torch.load(tiny_vq)
    file["state_dict"]["quant_conv.bias"] += 1
    torch.save(file, val / "other.pt")
    meta = json.loads((val / "meta.json").read_text())
    (val / "meta.json").write_text(json.dumps(meta | {key: value}))
    with pytest.raises(InputError, match=f"{val}: not the data of .*/tiny"):
        run("a", "--steps", 2, "--val", val)
    assert not Path("runs/a").exists()


def test_the_demo_has_held_out_codes_of_its_own():
    cats, _ = train.open_data(ROOT / "demo/cats", CPU)
    val, tokenizer = train.open_data(ROOT / "demo/cats/val", CPU)
    assert val.meta["classes"] == cats.meta["classes"] and len(val.readable) == 500
    assert (val.labels == np.arange(500) % 10).all()
    pixels = np.load(ROOT / "demo/cats/reference.npz")["arr_0"][:50]
    with torch.no_grad():
        codes = tokenizer.encode(vq.from_pixels(pixels))
    assert (codes.numpy() == val.codes[:50]).mean() > 0.999
    # No held-out cat is a training cat.
    assert not (cats.codes[:, None, :2] == val.codes[None, :50, :2]).all((2, 3)).any()
