"""vq.py: the network, what the checkpoint reader gives and refuses, pictures, encoding killed anywhere."""
import argparse
import contextlib
import copy
import functools
import importlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import train
import vq

ROOT = Path(vq.__file__).parent
TINY = dict(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4, n_embed=32, embed_dim=4, num_groups=4)
FOREIGN = dict(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8, n_embed=24, embed_dim=4)
ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])

torch.set_num_threads(min(2, torch.get_num_threads()))


def random_vq(seed=0, **config):
    """Build a network of random weights whose codebook is made of its own latents: its codes differ."""
    torch.manual_seed(seed)
    net = vq.VQ(**config).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):         # weights of ones would hide swapped norms
            module.weight.normal_(1, 0.3)
            module.bias.normal_(0, 0.3)
    latents = net.quant_conv(net.encoder(torch.rand(4, 3, 64, 64) * 2 - 1)).movedim(1, -1).flatten(0, -2)
    K = len(net.quantize.embedding.weight)
    net.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:K]])
    return net


def save(file, path, zipped=True, **options):
    torch.save(file, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def own(net, config=TINY):
    return {"config": config, "state_dict": net.state_dict()}


@pytest.fixture(scope="module")
def tiny():
    return random_vq(**TINY)


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    return save(own(tiny), tmp_path_factory.mktemp("tokenizer") / "tiny.pt")


def same_weights(net, other):
    a, b = net.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refusal(path):
    """Load a file that must be refused; return the error's one line, which names the file."""
    with pytest.raises(vq.InputError) as caught:
        vq.load_vq(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert "weights_only" not in message                   # torch's advice on how to run the pickle after all
    return message


# ------------------------------ the network

@pytest.mark.parametrize("config, parameters", [
    (dict(), 67_717_295),                                                # vq-f8
    (dict(z_channels=256, embed_dim=8, l2_norm=True), 70_109_835)])      # vq_ds8_c2i.pt
def test_the_published_networks(config, parameters):
    with torch.device("meta"):
        net = vq.VQ(**config)
    tensors, modules = net.state_dict(), dict(net.named_modules())
    assert len(tensors) == 299 and sum(t.numel() for t in tensors.values()) == parameters
    norms = [m for m in modules.values() if isinstance(m, torch.nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-6)}
    assert {name for name, m in modules.items() if isinstance(m, vq.Attention)} == {
        "encoder.down.3.attn.0", "encoder.down.3.attn.1", "encoder.mid.attn_1", "decoder.mid.attn_1",
        "decoder.up.3.attn.0", "decoder.up.3.attn.1", "decoder.up.3.attn.2"}


def test_a_code_stands_for_eight_by_eight_pixels_of_any_picture(tiny):
    codes = tiny.encode(torch.rand(2, 3, 24, 40) * 2 - 1)
    assert tiny.factor == 8 and codes.shape == (2, 3, 5) and codes.dtype == torch.int64
    assert tiny.embed(codes).shape == (2, 4, 3, 5) and tiny.decode(codes).shape == (2, 3, 24, 40)


def test_downsampling_pads_right_and_bottom_only_and_upsampling_repeats_pixels():
    down, up = (f(1).requires_grad_(False) for f in (vq.downsample, vq.upsample))
    for conv in (down.conv, up.conv):
        conv.weight.fill_(1)
        conv.bias.zero_()
    expected = torch.tensor([[9., 9, 6], [9, 9, 6], [6, 6, 4]])          # how many weights lie on the picture
    assert torch.equal(down(torch.ones(1, 1, 6, 6))[0, 0], expected)
    up.conv.weight.zero_()[..., 1, 1] = 1
    x = torch.arange(6.).view(1, 1, 2, 3)
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("c_out", [8, 12])
def test_a_residual_block_is_its_formula(c_out):
    block, x = vq.ResBlock(8, c_out).requires_grad_(False), torch.randn(2, 8, 5, 6)
    h = x
    for conv in (block.conv1, block.conv2):
        variance, mean = torch.var_mean(h, (1, 2, 3), keepdim=True, correction=0)
        n = (h - mean) / (variance + 1e-6).sqrt()
        h = conv(n * torch.sigmoid(n))
    skip = x
    if c_out != 8:
        matrix, bias = block.nin_shortcut.weight[..., 0, 0], block.nin_shortcut.bias
        skip = torch.einsum("oi,bihw->bohw", matrix, x) + bias[:, None, None]
    torch.testing.assert_close(block(x), skip + h)


def test_attention_is_over_all_places_whatever_their_order():
    attention, x = vq.Attention(4).requires_grad_(False), torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(attention(x).flip(2, 3), attention(x.flip(2, 3)))
    attention.k.weight.zero_()                             # equal keys: the mean value is added everywhere
    mean = attention.v(attention.norm(x)).mean((2, 3), keepdim=True)
    torch.testing.assert_close(attention(x), x + attention.proj_out(mean).expand_as(x))


def test_decoded_images_are_clamped():
    net = random_vq(**TINY)
    net.decoder.conv_out.weight.mul_(100)
    codes = torch.randint(0, 32, (2, 4, 4))
    x, whole = net.decode(codes), net.decoder(net.post_quant_conv(net.embed(codes)))
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(x, whole.clamp(-1, 1)) and whole.abs().max() > 1


def test_images_are_encoded_without_tf32_and_the_setting_comes_back():
    net, seen = random_vq(**TINY), []
    net.encoder.conv_in.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        net.encode(torch.zeros(1, 3, 8, 8))
        assert seen == [False] and torch.backends.cudnn.allow_tf32


# ------------------------------ nearest codes

def brute_force(z, E):
    return torch.stack([(row - E.double()).square().sum(1).argmin() for row in z.double()])


@pytest.mark.parametrize("N", [1, 7, 1000, 4099])
def test_nearest_equals_brute_force_also_under_autocast(N):
    generator = torch.Generator().manual_seed(N)
    z, E = torch.randn(N, 4, generator=generator), torch.randn(1024, 4, generator=generator)
    expected = brute_force(z, E)
    assert torch.equal(vq.nearest_code(z, E), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq.nearest_code(z, E), expected)


@pytest.mark.parametrize("N", [1, 4, 9, 12])
def test_nearest_is_exact_where_a_chunk_holds_four_positions_and_in_ties(N):
    k = torch.arange(2 ** 20)
    E = torch.stack([k % 1024, k // 1024], 1).float()      # a grid: whole numbers are exact in float32
    codes = torch.randint(0, 2 ** 20, (N,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(vq.nearest_code(E[codes], E), codes)
    E = torch.tensor([[3.], [1.], [-1.], [1.], [3.]])      # ties go to the lowest code
    assert vq.nearest_code(torch.tensor([[0.], [1.], [5.], [-9.], [2.]]), E).tolist() == [1, 1, 0, 2, 0]


def test_nearest_never_holds_all_distances_at_once():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out
    with Largest() as largest:
        vq.nearest_code(torch.zeros(9000, 2), torch.zeros(1024, 2))
    assert largest.numel <= 2 ** 22 < 9000 * 1024


@pytest.mark.parametrize("l2_norm", [False, True])
def test_a_code_is_nearest_to_its_own_vector(l2_norm):
    net = random_vq(**TINY, l2_norm=l2_norm)
    z = net.embed(net.nearest(torch.randn(2, 4, 5, 3)))
    assert torch.equal(net.embed(net.nearest(z)), z)
    codes = torch.arange(32).view(1, 4, 8)
    assert torch.equal(net.nearest(net.embed(codes)), codes)
    assert torch.equal(net.embed(codes)[0, :, 2, 5], net.codebook[21])


def test_l2_norm_gives_unit_codes_and_ignores_the_length_of_latents():
    net = random_vq(**TINY, l2_norm=True)
    net.quantize.embedding.weight.mul_(torch.rand(32, 1) * 9 + 0.1)
    torch.testing.assert_close(net.codebook.norm(dim=1), torch.ones(32))
    z, length = torch.randn(3, 4, 8, 8), torch.rand(3, 1, 8, 8) * 9 + 0.1
    assert torch.equal(net.nearest(z), net.nearest(z * length))
    angles = (z.movedim(1, -1) @ net.codebook.T).argmax(-1)              # nearest: the largest cosine
    assert torch.equal(net.nearest(z), angles) and len(angles.unique()) > 8


def test_encoding_is_encoder_then_projection_then_nearest(tiny):
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    z = tiny.quant_conv(tiny.encoder(x))
    codes = tiny.encode(x)
    assert torch.equal(tiny.codebook, tiny.quantize.embedding.weight)    # without l2_norm
    assert torch.equal(codes.flatten(), brute_force(z[0].flatten(1).T, tiny.codebook))
    assert len(codes.unique()) > 4


def test_the_network_runs_in_float64(tiny):
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    codes = tiny.encode(x)
    image, twin = tiny.decode(codes), copy.deepcopy(tiny).double()
    assert torch.equal(twin.encode(x.double()), codes)
    torch.testing.assert_close(twin.decode(codes).float(), image, atol=1e-5, rtol=1e-5)


# ------------------------------ readers

# CompVis's names and LlamaGen's, in turn, for the three levels of FOREIGN. Names not listed are the same.
NAMES = """
encoder.mid.block_1. encoder.mid.0. encoder.mid.attn_1. encoder.mid.1. encoder.mid.block_2. encoder.mid.2.
decoder.mid.block_1. decoder.mid.0. decoder.mid.attn_1. decoder.mid.1. decoder.mid.block_2. decoder.mid.2.
encoder.down.0.block.0. encoder.conv_blocks.0.res.0. encoder.down.1.block.0. encoder.conv_blocks.1.res.0.
encoder.down.0.downsample. encoder.conv_blocks.0.downsample.
encoder.down.1.downsample. encoder.conv_blocks.1.downsample.
encoder.down.2.block.0. encoder.conv_blocks.2.res.0. encoder.down.2.attn.0. encoder.conv_blocks.2.attn.0.
decoder.up.2.block.0. decoder.conv_blocks.0.res.0. decoder.up.2.block.1. decoder.conv_blocks.0.res.1.
decoder.up.2.attn.0. decoder.conv_blocks.0.attn.0. decoder.up.2.attn.1. decoder.conv_blocks.0.attn.1.
decoder.up.2.upsample. decoder.conv_blocks.0.upsample. decoder.up.1.upsample. decoder.conv_blocks.1.upsample.
decoder.up.1.block.0. decoder.conv_blocks.1.res.0. decoder.up.1.block.1. decoder.conv_blocks.1.res.1.
decoder.up.0.block.0. decoder.conv_blocks.2.res.0. decoder.up.0.block.1. decoder.conv_blocks.2.res.1.
""".split()


def llamagen_name(key):
    pairs = zip(NAMES[::2], NAMES[1::2])
    return next((new + key.removeprefix(old) for old, new in pairs if key.startswith(old)), key)


@pytest.fixture
def lightning():
    """Pretend that pytorch_lightning is installed while a file is written; leave() takes it away."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    module = types.ModuleType(names[-1])
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    sys.modules.update({name: module for name in names})
    module.leave = lambda: [sys.modules.pop(name, None) for name in names]
    yield module
    module.leave()


def compvis_file(net, lightning, more=None):
    callback = lightning.ModelCheckpoint()
    callback.best, callback.scores = torch.tensor(0.5), {"val/rec_loss": [1.0, None]}
    training = {"loss.discriminator.main.0.weight": torch.ones(3), "model_ema.decay": torch.tensor(0.999)}
    return {"epoch": 3, "callbacks": {lightning.ModelCheckpoint: {"state": callback}}, "more": more,
            "hyper_parameters": lightning.AttributeDict(lr=1e-4), "lr": np.float64(1e-4),
            "state_dict": {**net.state_dict(), **training}}


def llamagen_file(net):
    state = {llamagen_name(key): value for key, value in net.state_dict().items()}
    return {"model": {**state, "quantize.codebook_used": torch.zeros(65536)}, "steps": 7,
            "args": argparse.Namespace(vq_model="VQ-8", lr=1e-4, betas=[0.9, 0.95])}


@ZIPPED
@pytest.mark.parametrize("layout", ["compvis", "llamagen", "own"])
def test_a_file_of_each_layout_gives_its_network(layout, zipped, lightning, tmp_path):
    config = {**FOREIGN, "l2_norm": layout == "llamagen"}
    net = random_vq(**config).to(memory_format=torch.channels_last)      # as load_vq does; it rounds differently
    file = {"compvis": lambda: compvis_file(net, lightning), "llamagen": lambda: llamagen_file(net),
            "own": lambda: own(net, config)}[layout]()
    save(file, tmp_path / "a.pt", zipped)
    lightning.leave()

    loaded = vq.load_vq(tmp_path / "a.pt")
    assert loaded.l2_norm == net.l2_norm and loaded.factor == 4 and same_weights(loaded, net)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    codes = net.encode(x)
    assert torch.equal(loaded.encode(x), codes) and torch.equal(loaded.decode(codes), net.decode(codes))
    assert "lightning" not in str(torch.serialization.get_safe_globals())      # no stub stays behind


@pytest.mark.parametrize("config", [
    dict(FOREIGN, ch_mult=(1,)), dict(FOREIGN, ch_mult=(1, 2, 2, 4), num_res_blocks=2),
    dict(FOREIGN, ch=64, z_channels=3, n_embed=5, embed_dim=2)], ids=["f1", "f8", "wide"])
def test_the_shape_of_a_foreign_network_is_read_off_its_tensors(config, tmp_path):
    with torch.device("meta"):
        want = {key: value.shape for key, value in vq.VQ(**config).state_dict().items()}
    save({"state_dict": {key: torch.zeros(shape) for key, shape in want.items()}}, tmp_path / "a.ckpt")
    loaded = vq.load_vq(tmp_path / "a.ckpt").state_dict()
    assert {key: value.shape for key, value in loaded.items()} == want


@ZIPPED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_precision_does_not_matter(dtype, zipped, tiny, tmp_path):
    state = OrderedDict(copy.deepcopy(tiny).to(dtype).named_parameters())
    save({"config": TINY, "state_dict": state}, tmp_path / "a.pt", zipped)
    for key, value in vq.load_vq(tmp_path / "a.pt").state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[key].float())


@ZIPPED
@pytest.mark.parametrize("tag", ["cuda:7", "mps"])
def test_a_file_written_on_another_device_loads(tag, zipped, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: tag)
    save(own(tiny), tmp_path / "a.pt", zipped)
    assert tag.encode() in (tmp_path / "a.pt").read_bytes()
    assert vq.load_vq(tmp_path / "a.pt").codebook.device.type == "cpu"


@pytest.mark.parametrize("device, layout", [("cpu", torch.channels_last), ("meta", torch.contiguous_format)])
def test_the_layout_of_weights_is_the_devices(device, layout, tiny_file):
    net = vq.load_vq(tiny_file, torch.device(device))      # meta stands for a GPU
    weight = net.encoder.down[0].block[0].conv1.weight
    assert weight.device.type == device and weight.is_contiguous(memory_format=layout)
    assert net.embed(torch.zeros(2, 3, 5, dtype=torch.int64, device=device)).is_contiguous()


def test_a_file_overwritten_later_does_not_change_the_network(tiny, tiny_file, tmp_path):
    path = Path(shutil.copy(tiny_file, tmp_path))
    loaded = vq.load_vq(path)
    with open(path, "r+b") as file:                        # in place: a mapping of the file would see it
        file.write(bytes(path.stat().st_size))
    assert same_weights(loaded, tiny)


def test_a_compressed_archive_gives_its_weights_or_is_refused(tiny, tiny_file, tmp_path):
    with zipfile.ZipFile(tiny_file) as plain:
        with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    with contextlib.suppress(vq.InputError):
        assert same_weights(vq.load_vq(tmp_path / "a.pt"), tiny)


# ------------------------------ unsafe files

class Asks:
    """Pickle as a call of function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


ATTACKS = {
    "posix.system": lambda marker: Asks(os.system, f"touch {marker}"),
    "eval": lambda marker: Asks(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: Asks(exec, f"open({str(marker)!r}, 'w')"),
    "getattr": lambda marker: Asks(getattr, "text", "upper"),
    "functools.partial": lambda marker: Asks(functools.partial, os.system, f"touch {marker}"),
    "torch.hub.load": lambda marker: Asks(torch.hub.load, "someone/something", "model"),
    "torch.serialization.load": lambda marker: Asks(torch.serialization.load, str(marker)),
    "importlib.import_module": lambda marker: Asks(importlib.import_module, "os"),
}
LATER = {"torch.hub.load": torch.hub, "torch.serialization.load": torch.serialization}


def write_legacy(path, pickled):
    """Write a legacy file around a pickle given in pickle's own language."""
    with open(path, "wb") as file:
        for value in (torch.serialization.MAGIC_NUMBER, 1001, {}):
            pickle.dump(value, file, protocol=2)
        file.write(pickled)
        pickle.dump([], file, protocol=2)


@pytest.mark.parametrize("place", ["alone", "beside", "state_dict", "lightning", "llamagen"])
@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_pickle_asks_to_run_is_refused_by_name(name, place, tiny, lightning, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    attack, callback = ATTACKS[name](marker), lightning.ModelCheckpoint()
    callback.attack = attack
    file = {"alone": attack, "state_dict": {"state_dict": {"x": attack}},
            "beside": own(tiny) | {"more": [attack]}, "lightning": compvis_file(tiny, lightning, callback),
            "llamagen": llamagen_file(tiny) | {"args": argparse.Namespace(x=attack)}}[place]
    paths = [save(file, tmp_path / f"{zipped}.pt", zipped) for zipped in (True, False)]
    lightning.leave()
    if name in LATER:                                      # written in its own name, now a trap
        monkeypatch.setattr(LATER[name], "load", lambda *_, **__: marker.touch())
    for path in paths:
        assert re.search(rf"\b{re.escape(name)}\b", refusal(path))
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_unsafe_pickles_of_later_protocols_are_refused(protocol, tiny, tmp_path):
    file = own(tiny) | {"more": ATTACKS["posix.system"](tmp_path / "executed")}
    for zipped in (True, False):
        refusal(save(file, tmp_path / "a.pt", zipped, pickle_protocol=protocol))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("module, name", [
    ("pytorch_lightning_x", "Run"), ("lightning2.run", "Run"), ("xlightning", "Run"), ("torch.storage", "X"),
    ("argparse", "NamespaceX"), ("argparse", "Action"), ("os", "lightning.Run"), ("_codecs", "encodeX")])
def test_names_that_only_look_like_allowed_ones_are_refused(module, name, tmp_path):
    write_legacy(tmp_path / "a.pt", f"c{module}\n{name}\n)R.".encode())  # "call module.name()"
    assert f"{module}.{name}" in refusal(tmp_path / "a.pt")


def test_a_trainers_name_is_never_called_even_if_it_is_installed(lightning, tmp_path):
    lightning.touch = lambda *_: (tmp_path / "executed").touch()
    write_legacy(tmp_path / "a.pt", f"c{lightning.__name__}\ntouch\n)R.".encode())
    assert isinstance(vq.read_checkpoint(tmp_path / "a.pt"), vq.Stub)
    assert not (tmp_path / "executed").exists()


def test_an_archive_behind_a_legacy_pickle_does_not_hide_it(tiny_file, tmp_path):
    attack = save(ATTACKS["posix.system"](tmp_path / "executed"), tmp_path / "a.pt", zipped=False)
    attack.write_bytes(attack.read_bytes() + tiny_file.read_bytes())
    refusal(attack)
    assert not (tmp_path / "executed").exists()


# ------------------------------ damaged files

@ZIPPED
@pytest.mark.slow
def test_a_truncated_file_is_refused_whatever_its_length(zipped, tiny, tmp_path):
    whole = save(own(tiny), tmp_path / "a.pt", zipped).read_bytes()
    lengths = {*range(12), *range(12, 400, 37), *np.linspace(400, len(whole), 40, dtype=int)[:-1]}
    for length in sorted(lengths | {len(whole) - n for n in (1, 2, 16, 21, 22, 23, 64, 100, 1000)}):
        path = tmp_path / f"first{length}.pt"
        path.write_bytes(whole[:length])
        refusal(path)
        path.unlink()


@ZIPPED
@pytest.mark.slow
def test_a_damaged_byte_never_gives_another_error(zipped, tiny, tmp_path):
    whole = save(own(tiny), tmp_path / "a.pt", zipped).read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 12000, 25):            # most of what is not plain numbers lies there
        path = tmp_path / f"byte{position}.pt"
        path.write_bytes(whole[:position] + bytes([rng.integers(256)]) + whole[position + 1:])
        try:
            vq.load_vq(path)
        except vq.InputError as error:
            assert path.name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("content", [
    b"", b"not a checkpoint\n", b"<html>404</html>", b"\n" * 100, bytes(4096), b"PK\3\4" * 9, b"\x80\x02.",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"])
def test_what_is_not_a_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    for path in (tmp_path / "a.pt", tmp_path / "nowhere.pt", tmp_path):
        refusal(path)


@pytest.mark.parametrize("file", [
    [], 3, {}, {"ema": {}}, {"state_dict": {}}, {"model": {}}, {"model": {7: torch.zeros(1)}}, torch.zeros(3),
    {"state_dict": {"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}},
    {"config": TINY, "state_dict": {7: torch.zeros(1)}}, {"config": TINY, "state_dict": torch.zeros(1)}])
def test_a_checkpoint_of_something_else_is_refused(file, tmp_path):
    refusal(save(file, tmp_path / "a.pt"))


def changed(path, net, layout, key, change):
    """Write a file of the given layout with one tensor changed: dropped (None), replaced or added."""
    state = dict(net.state_dict())
    state.pop(key, None) if change is None else state.update({key: change})
    file = {"own": {"config": TINY, "state_dict": state}, "compvis": {"state_dict": state},
            "llamagen": {"model": {llamagen_name(k): v for k, v in state.items()}}}[layout]
    return save(file, path)


@pytest.mark.parametrize("layout, keys", [
    ("own", sorted(vq.VQ(**TINY).state_dict())[::8]),      # all would take long
    ("compvis", ["encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight",
                 "encoder.down.1.block.0.conv1.weight", "encoder.down.0.block.0.conv1.bias",
                 "encoder.down.2.attn.0.q.weight"]),
    ("llamagen", ["encoder.down.0.block.0.conv1.weight", "encoder.down.2.block.0.conv1.weight",
                  "decoder.up.1.upsample.conv.weight", "decoder.mid.attn_1.norm.bias"])])
def test_a_missing_tensor_is_named(layout, keys, tiny, tmp_path):
    net = tiny if layout == "own" else random_vq(**FOREIGN)
    for key in keys:
        message = refusal(changed(tmp_path / "a.pt", net, layout, key, None))
        assert re.search(rf"([Mm]issing|KeyError).*\b{re.escape(key)}\b", message)


@pytest.mark.parametrize("layout", ["own", "compvis"])
def test_a_tensor_that_does_not_fit_is_named(layout, tiny, tmp_path):
    net = tiny if layout == "own" else random_vq(**FOREIGN)
    message = refusal(changed(tmp_path / "a.pt", net, layout, "encoder.extra.weight", torch.zeros(5, 7)))
    assert re.search("[Uu]nexpected.*encoder.extra.weight", message)
    for key in ("quant_conv.weight", "encoder.down.0.block.0.conv2.weight"):
        message = refusal(changed(tmp_path / "a.pt", net, layout, key, torch.zeros(4, 4, 5, 5)))
        assert all(part in message for part in (key, "[4, 4, 5, 5]", str(list(net.state_dict()[key].shape))))


@pytest.mark.parametrize("key, change", [
    ("encoder.conv_in.weight", 3), ("encoder.conv_in.weight", torch.zeros(())),
    ("quantize.embedding.weight", torch.zeros(4))])
@pytest.mark.parametrize("layout", ["compvis", "own"])
def test_what_describes_no_network_is_refused(key, change, layout, tmp_path):
    refusal(changed(tmp_path / "a.pt", random_vq(**FOREIGN), layout, key, change))


@pytest.mark.parametrize("change", [{"colour": "red"}, {"ch": "8"}, {"ch_mult": ()}, {"n_embed": -1}])
def test_a_config_that_describes_no_network_is_refused(change, tiny, tmp_path):
    refusal(save(own(tiny, TINY | change), tmp_path / "a.pt"))


# ------------------------------ pictures

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def opened(image, path, size, **options):
    image.save(path, **options)
    pixels = vq.open_image(path, size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize("width, height", [
    (96, 32), (32, 96), (97, 32), (32, 99), (16, 24), (1, 1), (5, 31), (40, 7)])
def test_the_crop_is_the_centre_of_a_picture_of_any_shape(width, height, tmp_path):
    image, side = Image.new("RGB", (width, height), RED), min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste(GREEN, (left, top, left + side, top + side))
    assert (opened(image, tmp_path / "a.png", side) == GREEN).all()
    image.paste(GREEN, (0, 0, width, height))
    assert (opened(image, tmp_path / "a.png", 32) == GREEN).all()        # enlarged, where it is too small


def test_the_crop_is_adms_step_by_step(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (151, 221, 3), np.uint8)
    image = Image.fromarray(picture).resize((110, 75), Image.BOX).resize((55, 37), Image.BOX)
    image = image.resize((48, 32), Image.BICUBIC)          # 55 * 32 / 37, rounded
    pixels = opened(Image.fromarray(picture), tmp_path / "a.png", 32)
    assert np.array_equal(pixels, np.asarray(image)[:, 8:40])


@pytest.mark.parametrize("mode, colour, suffix, expected", [
    ("L", 99, "png", (99, 99, 99)), ("L", 99, "jpg", (99, 99, 99)), ("LA", (50, 9), "png", (50, 50, 50)),
    ("1", 1, "png", WHITE), ("CMYK", (0, 255, 255, 0), "jpg", RED), ("CMYK", (255, 255, 0, 0), "jpg", BLUE),
    ("RGBA", (10, 20, 30, 0), "png", (10, 20, 30)), ("RGBA", (10, 20, 30, 255), "webp", (10, 20, 30)),
    ("RGB", BLUE, "bmp", BLUE), ("P", "red", "png", RED), ("I;16", 40000, "png", (156,) * 3)])
def test_every_kind_of_picture_becomes_rgb(mode, colour, suffix, expected, tmp_path):
    options = {"lossless": True} if suffix == "webp" else {}
    pixels = opened(Image.new(mode, (40, 48), colour), tmp_path / f"a.{suffix}", 32, **options)
    assert np.abs(pixels.astype(int) - expected).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize("orientation, stored", list(enumerate([         # for the upright picture RG / BW
    ("RG", "BW"), ("GR", "WB"), ("WB", "GR"), ("BW", "RG"),
    ("RB", "GW"), ("GW", "RB"), ("WG", "BR"), ("BR", "WG")], 1)))
def test_a_picture_is_turned_upright_by_its_exif_tag(orientation, stored, tmp_path):
    colours = dict(R=RED, G=GREEN, B=BLUE, W=WHITE)
    picture = np.array([[colours[c] for c in row] for row in stored], np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[274] = orientation
    pixels = opened(Image.fromarray(picture), tmp_path / "a.png", 32, exif=exif)
    assert [[tuple(pixels[y, x].tolist()) for x in (8, 24)] for y in (8, 24)] == [[RED, GREEN], [BLUE, WHITE]]


def test_damaged_exif_does_not_make_a_picture_unreadable(tmp_path):
    picture = Image.new("RGB", (32, 32), RED)
    picture.paste(BLUE, (0, 16, 32, 32))
    width, turn = struct.pack("<HHI4s", 256, 2, 3, b"72"), struct.pack("<HHIHH", 274, 3, 1, 3, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + width + turn + bytes(4)    # the width is in letters
    pixels = opened(picture, tmp_path / "a.jpg", 32, exif=exif, quality=95)
    assert {pixels[4, 4].argmax(), pixels[28, 4].argmax()} == {0, 2}     # whole, perhaps unturned
    pixels = opened(picture, tmp_path / "b.png", 32, exif=b"Exif\0\0no such thing")
    assert (pixels[4, 4] == RED).all() and (pixels[28, 4] == BLUE).all()


def test_pixels_survive_the_way_to_images_and_back_by_rounding():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    x = vq.from_pixels(pixels)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert torch.equal(vq.to_pixels(x), pixels) and torch.equal(vq.from_pixels(pixels.numpy()), x)
    level = torch.tensor([9.6, 10.4, -3., 254.6, 300.])    # grey levels
    x = (level / 127.5 - 1).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert vq.to_pixels(x)[0, 0, :, 0].tolist() == [10, 10, 0, 255, 255]
    assert vq.to_pixels(x.bfloat16()).dtype == torch.uint8


def test_decoded_pixels_depend_on_neither_batch_nor_autocast(tiny):
    codes = torch.randint(0, 32, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    alone = torch.cat([vq.to_pixels(tiny.decode(c[None])) for c in codes])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq.decode_pixels(tiny, codes), alone)


def test_a_sheet_shows_every_picture_in_its_place():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), np.uint8)
    page = vq.sheet(pixels, columns=2)
    assert page.shape == (3 * 6, 2 * 8, 3) and (page[13:17, 9:15] == 255).all()
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]):
        assert np.array_equal(page[row * 6 + 1:row * 6 + 5, column * 8 + 1:column * 8 + 7], pixels[i])


# ------------------------------ writing files

@contextlib.contextmanager
def full_disk(size):
    """Let files grow to `size` bytes only. With the fixture capsys, what is printed stays in memory."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))         # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_takes_its_name_only_when_whole(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with vq.replacing(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(KeyError), vq.replacing(path) as file:
        file.write(b"ne")
        raise KeyError
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1
    with vq.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and len(list(path.parent.iterdir())) == 1


WRITERS = {
    "bytes": lambda file: file.write(bytes(9000)), "npy": lambda file: np.save(file, np.zeros(9000)),
    "pt": lambda file: torch.save({"x": torch.zeros(9000)}, file),       # which raises RuntimeError
    "png": lambda file: Image.effect_noise((99, 99), 99).save(file, "PNG")}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_sentence_and_what_was_there_stays(kind, capsys, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with full_disk(1000), pytest.raises(vq.InputError, match=f"{tmp_path}/a: cannot be written"):
        with vq.replacing(tmp_path / "a") as file:
            WRITERS[kind](file)
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("below", ["a", "sub/a", "sub/deeper/a"])
def test_a_file_in_the_place_of_a_folder_is_one_sentence(below, tmp_path):
    (tmp_path / "file").write_text("old")
    target = tmp_path / "file" / below
    with pytest.raises(vq.InputError, match=f"{target}: "), vq.replacing(target):
        pass
    assert (tmp_path / "file").read_text() == "old"


# ------------------------------ encoding a data set

SIZE = 32
BAD = "bee/0.jpg"                                          # row 4, in the second batch of three
ARRAYS = "codes.npy", "codes_flip.npy", "labels.npy"


class Killed(BaseException):
    """End a run where it stands, as SIGKILL does: vq.py handles it nowhere."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write a small ImageFolder tree: 11 pictures of three classes, of many kinds and sizes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    names = ["ant/0.png", "ant/1.JPEG", "ant/2.png", "ant/3.bmp", BAD, "bee/1.png", "bee/2.webp", "bee/3.png",
             "cat/0.png", "cat/1.png", "cat/deep/2.png"]
    for i, name in enumerate(names):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        picture = picture.resize((40 + 5 * i, 70 - 3 * i), Image.BICUBIC)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.convert("L" if i == 5 else "RGB").save(root / name)
    (root / "ant" / "notes.txt").write_text("not a picture")
    return root


@pytest.fixture
def copied(images, tmp_path):
    """Give a copy of the tree with a broken picture."""
    root = Path(shutil.copytree(images, tmp_path / "copied"))
    (root / BAD).write_bytes((root / BAD).read_bytes()[:200])
    return root


def command(*arguments, file, batch_size=3):
    settings = "--vq", file, "--size", SIZE, "--batch-size", batch_size, "--num-workers", 2
    return ["vq.py", *map(str, settings + arguments)]      # what comes later counts


def start(arguments, **environment):
    """Start vq.py as a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(x) for name, x in environment.items()}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def run(monkeypatch, tiny_file):
    """Run vq.py's main with these arguments, the tiny tokenizer and settings that suit it."""
    def run(*arguments, file=tiny_file):
        monkeypatch.setattr(sys, "argv", command(*arguments, file=file))
        vq.main()
    before = signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def encoded(monkeypatch):
    """Collect the images that are encoded; before the one of number encoded.limit the run is killed."""
    class Encoded(list):
        limit = math.inf

    images, encode = Encoded(), vq.VQ.encode

    def count(self, x):
        if len(images) >= images.limit:
            raise Killed
        images.extend(x)
        return encode(self, x)
    monkeypatch.setattr(vq.VQ, "encode", count)
    return images


def codes_of(net, paths, flip=False):
    pictures = np.stack([vq.open_image(path, SIZE)[:, ::-1 if flip else 1] for path in paths])
    return vq.VQ.encode(net, vq.from_pixels(np.ascontiguousarray(pictures))).numpy()


def data(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return np.load(folder / "codes.npy"), np.load(folder / "labels.npy"), meta


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tree_is_encoded_class_by_class(run, images, tiny, tiny_file, tmp_path):
    run(images, "--out", tmp_path / "out")
    codes, labels, meta = data(tmp_path / "out")
    paths = vq.list_images(images)[0]
    assert codes.dtype == np.uint16 and codes.shape == (11, 4, 4)
    assert np.array_equal(codes, codes_of(tiny, paths)) and len(np.unique(codes)) > 8
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 3 and meta["classes"] == ["ant", "bee", "cat"]
    assert [str(p.relative_to(images)) for p in paths[:2]] == ["ant/0.png", "ant/1.JPEG"]
    assert meta["image_size"] == SIZE and meta["tokenizer"] == str(tiny_file) and meta["reference"] is None
    assert contents(tmp_path / "out").keys() == {"codes.npy", "labels.npy", "meta.json"}


def test_a_flat_folder_is_one_class_and_flip_encodes_the_mirrored_pictures(run, images, tiny, tmp_path):
    run(images / "bee", "--out", tmp_path / "out", "--flip")
    codes, labels, meta = data(tmp_path / "out")
    paths, twins = sorted((images / "bee").iterdir()), np.load(tmp_path / "out" / "codes_flip.npy")
    assert labels.tolist() == [0] * 4 and meta["classes"] == ["bee"]
    assert np.array_equal(codes, codes_of(tiny, paths))
    assert np.array_equal(twins, codes_of(tiny, paths, flip=True))
    assert not np.array_equal(twins, codes[:, :, ::-1])    # why they are encoded, not mirrored


def test_pictures_stay_in_order_and_are_not_read_far_ahead(run, images, tiny, encoded, monkeypatch, tmp_path):
    started, ahead, open_image, encode = [], [], vq.open_image, vq.VQ.encode

    def slow_open(path, size):
        started.append(path)
        ahead.append(len(started) - len(encoded))
        time.sleep(0.02 * (len(started) % 2))              # of two threads one is always late
        return open_image(path, size)
    monkeypatch.setattr(vq.VQ, "encode", lambda self, x: time.sleep(0.02) or encode(self, x))
    with monkeypatch.context() as patch:
        patch.setattr(vq, "open_image", slow_open)
        run(images, "--out", tmp_path / "out", "--batch-size", 1)
    assert np.array_equal(data(tmp_path / "out")[0], codes_of(tiny, vq.list_images(images)[0]))
    assert max(ahead) <= 3                                 # batches


@pytest.mark.parametrize("n_embed, fits", [(2 ** 16 - 1, True), (2 ** 16, False)])
def test_no_code_may_be_the_one_that_means_empty(n_embed, fits, run, images, tmp_path):
    config = dict(TINY, n_embed=n_embed)
    file = save(own(vq.VQ(**config), config), tmp_path / "a.pt")
    with contextlib.nullcontext() if fits else pytest.raises(vq.InputError, match=f"--vq {file}: .*65535"):
        run(images / "bee", "--out", tmp_path / "out", file=file)
    assert (tmp_path / "out").exists() == fits


# What a killed run leaves: the rows that are EMPTY in codes.npy, those in codes_flip.npy, and missing files.
EVERY, NONE = np.s_[:], np.s_[:0]
STATES = {
    "note": (EVERY, EVERY, ARRAYS), "codes": (EVERY, EVERY, ARRAYS[1:]),
    "unlabelled": (EVERY, EVERY, ARRAYS[2:]), "half": (np.s_[3:], np.s_[3:], ()),
    "flip missing": (NONE, np.s_[3:6], ()), "row cut": (np.s_[4, 2:], NONE, ()),
    "one entry": (np.s_[10, 3, 3], NONE, ()), "other process": (np.s_[1::2], np.s_[1::2], ()),
    "done": (NONE, NONE, ())}


@pytest.mark.parametrize("state", STATES)
def test_a_folder_begun_goes_on_from_any_state(state, run, copied, encoded, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(copied, "--out", whole, "--skip-bad", "--flip")
    shutil.copytree(whole, out)
    codes, twins, labels = (np.load(out / name, mmap_mode="r+") for name in ARRAYS)
    *empty, missing = STATES[state]
    codes[empty[0]] = twins[empty[1]] = vq.EMPTY
    todo = (codes == vq.EMPTY).any((1, 2)) | (twins == vq.EMPTY).any((1, 2))
    labels[todo] = vq.list_images(copied)[1][todo]         # a picture is known to be bad when its row is done
    for name in missing:
        (out / name).rename(out / f".{name}.partial")
    encoded.clear()
    run(copied, "--out", out, "--skip-bad", "--flip")
    assert contents(out) == contents(whole)
    assert len(encoded) == 2 * todo.sum()                  # with its mirror image; nothing is repeated


@pytest.mark.parametrize("moment", ARRAYS)
def test_a_kill_between_two_writes_does_no_harm(moment, run, copied, tmp_path, monkeypatch):
    class Dying(np.memmap):
        def __setitem__(self, rows, value):
            if Path(self.filename).name == moment and 4 in rows:
                raise Killed
            super().__setitem__(rows, value)

    load, flags = np.load, ("--skip-bad", "--flip")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(np, "load", lambda *args, **options: load(*args, **options).view(Dying))
        run(copied, "--out", tmp_path / "out", *flags)
    run(copied, "--out", tmp_path / "out", *flags)
    run(copied, "--out", tmp_path / "whole", *flags)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(run, images, copied, tiny_file, tmp_path):
    flags = "--flip", "--skip-bad", "--reference", images
    run(copied, "--out", tmp_path / "one", *flags)
    arguments = command(copied, "--out", tmp_path / "two", *flags, file=tiny_file)
    both = [start(arguments, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2) for rank in "01"]    # as torchrun does
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_process_waits_for_the_first_and_takes_rows_by_their_number(run, images, tmp_path, monkeypatch):
    whole, begun, out = (tmp_path / name for name in ("whole", "begun", "out"))
    run(images, "--out", whole)
    shutil.copytree(whole, begun)
    np.load(begun / "codes.npy", mmap_mode="r+")[1:] = vq.EMPTY          # the first process has done a row
    steps = iter(["meta.json", "codes.npy", "labels.npy"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(time, "sleep", lambda _: shutil.copy(begun / next(steps), out))
    out.mkdir()
    for rank, left in (1, [2, 4, 6, 8, 10]), (0, []):
        monkeypatch.setenv("RANK", str(rank))
        run(images, "--out", out)
        assert np.flatnonzero((data(out)[0] == vq.EMPTY).any((1, 2))).tolist() == left
    assert contents(out) == contents(whole)


def test_an_interrupted_run_goes_on_and_repeats_nothing(run, images, tiny, tmp_path, encoded):
    encoded.limit = 6
    with pytest.raises(Killed):
        run(images, "--out", tmp_path / "out")
    codes = data(tmp_path / "out")[0]
    assert len(encoded) == 6 and (codes[:6] != vq.EMPTY).all() and (codes[6:] == vq.EMPTY).all()
    encoded.limit = 99
    run(images, "--out", tmp_path / "out")
    paths = vq.list_images(images)[0]
    expected = vq.from_pixels(np.stack([vq.open_image(path, SIZE) for path in paths]))
    assert torch.equal(torch.stack(encoded), expected)     # each once, in order
    assert np.array_equal(data(tmp_path / "out")[0], codes_of(tiny, paths))


def test_a_bad_picture_stops_with_its_name_and_the_work_done_is_kept(run, copied, tmp_path, encoded):
    with pytest.raises(vq.InputError, match=re.escape(str(copied / BAD)) + ".*--skip-bad"):
        run(copied, "--out", tmp_path / "out")
    assert len(encoded) == 3
    run(copied, "--out", tmp_path / "out", "--skip-bad")   # the same command with the flag it asked for
    assert len(encoded) <= 11                              # not the first batch of three again


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", None],
                         ids=["empty", "text", "header", "truncated"])
def test_skip_bad_marks_pictures_and_keeps_the_others_in_place(content, run, copied, tiny, tmp_path, capsys):
    bad = [copied / "ant" / "2.png", copied / BAD]
    if content is not None:
        bad[1].write_bytes(content)
    bad[0].write_bytes(bad[0].read_bytes()[:-60])
    run(copied, "--out", tmp_path / "out", "--skip-bad", "--flip")
    codes, labels, _ = data(tmp_path / "out")
    assert labels.tolist() == [0, 0, -1, 0, -1, 1, 1, 1, 2, 2, 2] and (codes != vq.EMPTY).all()
    good = [path for path in vq.list_images(copied)[0] if path not in bad]
    twins = np.load(tmp_path / "out" / "codes_flip.npy")
    assert np.array_equal(codes[labels >= 0], codes_of(tiny, good))
    assert np.array_equal(twins[labels >= 0], codes_of(tiny, good, flip=True))
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in bad) and not any(str(path) in printed for path in good)


def test_whatever_a_picture_raises_its_name_is_told(run, images, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise struct.error("required argument is not an integer")        # Pillow's, for a damaged tag
    monkeypatch.setattr(vq.Image, "open", broken)
    with pytest.raises(vq.InputError, match="0.png"):
        run(images, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["codes.npy", "meta.json", "reference/a.png"])
def test_files_from_elsewhere_are_not_overwritten(name, run, images, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(vq.InputError, match=f"{tmp_path}.*meta.json"):
        run(images, "--out", tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", ["flip", "size", "reference", "images", "tokenizer", "weights"])
def test_a_folder_of_other_settings_is_refused(change, finished, run, copied, images, tiny_file, tmp_path):
    file, out = Path(shutil.copy(tiny_file, tmp_path)), tmp_path / "out"
    with contextlib.nullcontext() if finished else pytest.raises(vq.InputError):
        run(copied, "--out", out, *["--skip-bad"] * finished, file=file)
    before = contents(out)
    if change == "weights":                                # trained anew: the same name and size
        content = torch.load(file)
        content["state_dict"]["quant_conv.bias"] += 1
        assert save(content, file).stat().st_size == tiny_file.stat().st_size
    arguments = {"flip": [copied, "--flip"], "size": [copied, "--size", 64], "images": [images / "ant"],
                 "reference": [copied, "--reference", images]}.get(change, [copied])
    with pytest.raises(vq.InputError, match=f"--out {out}: .*meta.json"):
        run(*arguments, "--out", out, "--skip-bad", file=tiny_file if change == "tokenizer" else file)
    assert contents(out) == before


def many(images, folder, count):
    """Make a flat folder that holds one picture under many names."""
    folder.mkdir()
    for i in range(count):
        os.link(images / "ant" / "0.png", folder / f"{i:04d}.png")
    return folder


@pytest.mark.parametrize("count, size", [
    (400, 5000), (60, 1500)])
def test_a_full_disk_shows_before_anything_is_encoded(count, size, run, images, encoded, capsys, tmp_path):
    folder = many(images, tmp_path / "many", count)
    with full_disk(size), pytest.raises(vq.InputError, match="codes.npy: cannot be written"):
        run(folder, "--out", tmp_path / "out")             # codes.npy: 128 bytes and 32 for each picture
    assert contents(tmp_path / "out").keys() == {"meta.json"} and not encoded


# ------------------------------ reference pictures

def test_reference_pictures_are_cropped_as_the_training_pictures_are(run, images, tmp_path):
    run(images / "ant", "--out", tmp_path / "out", "--reference", images)
    paths = vq.list_images(images)[0]
    assert data(tmp_path / "out")[2]["reference"] == "reference"
    crops = sorted((tmp_path / "out" / "reference").iterdir())
    assert [p.name for p in crops] == [f"{i:06d}.png" for i in range(11)]
    for path, crop in zip(paths, crops):
        assert np.array_equal(np.asarray(Image.open(crop)), vq.open_image(path, SIZE))


def test_a_reference_archive_is_recorded_as_it_is(run, images, tmp_path):
    np.savez(tmp_path / "batch.npz", arr_0=np.zeros((1, SIZE, SIZE, 3), np.uint8))
    run(images / "ant", "--out", tmp_path / "out", "--reference", tmp_path / "batch.npz")
    assert data(tmp_path / "out")[2]["reference"] == str(tmp_path / "batch.npz")


@pytest.mark.parametrize("reference", ["nowhere", "nowhere.npz", "text.npz"])
def test_a_wrong_reference_is_told_before_anything_is_written(reference, run, images, tmp_path):
    (tmp_path / "text.npz").write_text("mu")
    with pytest.raises(vq.InputError, match=reference):
        run(images, "--out", tmp_path / "out", "--reference", tmp_path / reference)
    assert not (tmp_path / "out").exists()


def test_a_bad_reference_picture_is_told_before_anything_is_encoded(run, images, copied, encoded, tmp_path):
    arguments = images, "--out", tmp_path / "out", "--reference", copied
    crops = tmp_path / "out" / "reference"
    with pytest.raises(vq.InputError, match=re.escape(BAD)):
        run(*arguments)
    assert not encoded
    run(*arguments, "--skip-bad")
    assert len(encoded) == 11 and len(list(crops.iterdir())) == 10 and not (crops / "000004.png").exists()

    before = {path: path.stat().st_mtime_ns for path in crops.iterdir()}
    shutil.copy(images / BAD, copied / BAD)                # repaired: the same command makes what is missing
    run(*arguments)
    after = {path: path.stat().st_mtime_ns for path in crops.iterdir()}
    assert len(encoded) == 11 and after.keys() - before.keys() == {crops / "000004.png"}
    assert before.items() <= after.items()


def test_nothing_readable_leaves_nothing_to_train_on(run, copied, tmp_path):
    for path in copied.rglob("*.*"):
        path.write_bytes(b"")
    with contextlib.suppress(vq.InputError):
        run(copied, "--out", tmp_path / "out", "--skip-bad")
    with pytest.raises(vq.InputError, match=str(tmp_path / "out")):
        train.open_data(tmp_path / "out")


# ------------------------------ reconstructions

def test_reconstruct_writes_both_pictures_and_prints_their_psnr(run, images, tiny_file, tmp_path, capsys):
    run("--reconstruct", images / "ant" / "0.png", images / BAD, "--out", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "000-0.png" in lines[0] and "001-0.png" in lines[1]
    picture = np.asarray(Image.open(tmp_path / "001-0.png"))
    original, again = picture[1:33, 1:33], picture[1:33, 35:67]
    assert len(lines) == 2 and picture.shape == (34, 68, 3)
    assert np.array_equal(original, vq.open_image(images / BAD, SIZE))
    net = vq.load_vq(tiny_file)                            # channels-last, which rounds differently
    expected = vq.to_pixels(net.decode(net.encode(vq.from_pixels(original[None].copy()))))[0]
    assert np.array_equal(again, expected)
    psnr = 20 * np.log10(255 / np.sqrt(np.mean((original.astype(float) - again) ** 2)))
    assert float(re.search(r"PSNR (-?[\d.]+) dB", lines[1])[1]) == pytest.approx(psnr, abs=0.006)


def test_reconstruct_names_a_picture_it_cannot_read(run, copied, tmp_path):
    for path in (copied / BAD, tmp_path / "nowhere.png"):
        with pytest.raises(vq.InputError, match=re.escape(str(path))):
            run("--reconstruct", path, "--out", tmp_path)


def test_reconstruct_does_not_advise_a_flag_that_it_refuses(run, tmp_path):
    with pytest.raises(vq.InputError) as caught:
        run("--reconstruct", tmp_path / "nowhere.png", "--out", tmp_path)
    assert "--skip-bad" not in str(caught.value)


# ------------------------------ command line

def test_folders_without_classes_that_make_sense_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(vq.InputError, match=f"{name}: no images"):
            vq.list_images(tmp_path / name)
    (tmp_path / "mixed" / "ant").mkdir(parents=True)
    for name in ("mixed/a.png", "mixed/ant/b.png"):
        Image.new("RGB", (8, 8), RED).save(tmp_path / name)
    with pytest.raises(vq.InputError, match="mixed/a.png: .*class"):
        vq.list_images(tmp_path / "mixed")


@pytest.mark.parametrize("arguments, named", [
    ("", "IMAGES"), ("x", "--out"), ("x --reconstruct y --out z", "IMAGES"),
    ("--reconstruct x --flip", "--flip"), ("--reconstruct x --skip-bad", "--skip-bad"),
    ("x --out y --batch-size 0", "--batch-size"), ("x --out y --num-workers 0", "--num-workers"),
    ("x --reconstruct y", "IMAGES")])
def test_commands_that_make_no_sense_are_refused(arguments, named, run, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments.split())
    assert ended.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("size", [30, 0, -8])
def test_a_size_that_is_not_a_multiple_of_a_code_is_refused(size, run, images, tmp_path):
    with pytest.raises(vq.InputError, match=f"--size {size}: .*multiple of 8"):
        run(images, "--out", tmp_path / "out", "--size", size)
    assert not (tmp_path / "out").exists()


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    assert vq.start_process() == (5, 8, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(vq.InputError, match="--nproc_per_node: process 2 "):
        vq.start_process()


def test_a_process_multiplies_float32_exactly_whatever_was_set_before(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    torch.set_float32_matmul_precision("high")             # as NVIDIA's containers do, by an environment variable
    vq.start_process()
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):     # as encode() does
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


@pytest.mark.slow
def test_a_wrong_input_ends_the_command_with_one_line_and_exit_code_1(images, tmp_path):
    process = start(command(images, "--out", tmp_path / "out", file=tmp_path / "nowhere.pt"))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and printed == "" and not (tmp_path / "out").exists()
    assert re.fullmatch(r".*nowhere\.pt: .*\n", errors)


@pytest.mark.slow
def test_ctrl_c_ends_the_command_with_one_line_and_exit_code_1(images, tiny_file, tmp_path):
    folder, codes = many(images, tmp_path / "many", 2000), tmp_path / "out" / "codes.npy"
    process = start(command(folder, "--out", tmp_path / "out", file=tiny_file, batch_size=1))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (codes.exists() and (np.load(codes)[0] != vq.EMPTY).all()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    bar, last = errors.splitlines()[-2:]
    assert process.returncode == 1 and printed == "" and "Traceback" not in errors
    assert "encode" in bar and re.match("interrupted.*same command", last)
    assert (np.load(codes)[-1] == vq.EMPTY).all()          # it was not the end
