"""Check vq.py: nearest codes against brute force, the checkpoint readers and what they refuse, crops, the command line."""
import argparse
import copy
import functools
import importlib
import json
import os
import pickle
import re
import runpy
import shutil
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import vq

ROOT = Path(vq.__file__).parent
TINY = dict(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4, n_embed=32, embed_dim=4, num_groups=4)
FOREIGN = dict(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8, n_embed=24, embed_dim=4)  # 32 groups, as published

torch.set_num_threads(min(2, torch.get_num_threads()))


def random_vq(seed=0, **config):
    """Build a network with random weights whose codes differ from place to place: its codebook is made of its own latents."""
    torch.manual_seed(seed)
    net = vq.VQ(**config).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):         # weights of ones would hide norms that were swapped
            module.weight.normal_(1, 0.3), module.bias.normal_(0, 0.3)
    latents = net.quant_conv(net.encoder(torch.rand(4, 3, 64, 64) * 2 - 1)).movedim(1, -1).flatten(0, -2)
    K = len(net.quantize.embedding.weight)
    net.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:K]])
    return net


@pytest.fixture(scope="module")
def tiny():
    return random_vq(**TINY)


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.pt"
    torch.save({"config": TINY, "state_dict": tiny.state_dict()}, path)
    return path


def refusal(path):
    """Load a file that must be refused; return the error's one line, which names the file."""
    with pytest.raises(vq.InputError) as caught:
        vq.load_vq(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert "weights_only" not in message                   # torch's own advice on how to run the pickle after all
    return message


# ---------------------------------------------------------------------------------------------- the network

@pytest.mark.parametrize("config, parameters", [
    (dict(), 67_717_295),                                                      # vq-f8
    (dict(z_channels=256, embed_dim=8, l2_norm=True), 70_109_835)])            # vq_ds8_c2i.pt, codebook_used dropped
def test_parameter_counts_are_the_published_ones(config, parameters):
    with torch.device("meta"):
        tensors = vq.VQ(**config).state_dict()
    assert len(tensors) == 299
    assert sum(t.numel() for t in tensors.values()) == parameters


def test_a_code_stands_for_eight_by_eight_pixels_also_in_pictures_that_are_not_square(tiny):
    codes = tiny.encode(torch.rand(2, 3, 24, 40) * 2 - 1)
    assert tiny.factor == 8 and codes.shape == (2, 3, 5) and codes.dtype == torch.int64
    assert tiny.embed(codes).shape == (2, 4, 3, 5) and tiny.decode(codes).shape == (2, 3, 24, 40)


def test_downsampling_pads_right_and_bottom_only():
    down = vq.Downsample(1).requires_grad_(False)
    down.conv.weight.fill_(1), down.conv.bias.zero_()
    expected = torch.tensor([[9., 9, 6], [9, 9, 6], [6, 6, 4]])               # how many of nine weights lie on the picture
    assert torch.equal(down(torch.ones(1, 1, 6, 6))[0, 0], expected)


def test_upsampling_repeats_pixels():
    up = vq.Upsample(1).requires_grad_(False)
    up.conv.weight.zero_(), up.conv.bias.zero_()
    up.conv.weight[..., 1, 1] = 1
    x = torch.arange(6.).view(1, 1, 2, 3)
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("c_out", [8, 12])
def test_a_residual_block_is_its_formula(c_out):
    block, x = vq.ResBlock(8, c_out).requires_grad_(False), torch.randn(2, 8, 5, 6)
    h = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        n = (h - h.mean((1, 2, 3), keepdim=True)) / (h.var((1, 2, 3), keepdim=True, correction=0) + 1e-6).sqrt()
        h = conv(n * torch.sigmoid(n))
    skip = x if c_out == 8 else torch.einsum("oi,bihw->bohw", block.nin_shortcut.weight[..., 0, 0], x) \
        + block.nin_shortcut.bias[:, None, None]
    torch.testing.assert_close(block(x), skip + h)


def test_group_norms_are_vq_f8s():
    with torch.device("meta"):
        norms = [m for m in vq.VQ().modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-6)}


def test_attention_with_equal_keys_adds_the_mean_value():
    attention = vq.Attention(4).requires_grad_(False)
    attention.k.weight.zero_()
    x = torch.randn(2, 4, 3, 5)
    mean = attention.v(attention.norm(x)).mean((2, 3), keepdim=True)
    torch.testing.assert_close(attention(x), x + attention.proj_out(mean).expand_as(x))


def test_attention_does_not_depend_on_the_order_of_places():
    attention, x = vq.Attention(4).requires_grad_(False), torch.randn(1, 4, 4, 6)
    torch.testing.assert_close(attention(x).flip(2, 3), attention(x.flip(2, 3)))


def test_attention_stands_at_the_coarsest_level_and_in_the_middle():
    with torch.device("meta"):
        names = {name for name, module in vq.VQ().named_modules() if isinstance(module, vq.Attention)}
    assert names == {"encoder.down.3.attn.0", "encoder.down.3.attn.1", "encoder.mid.attn_1", "decoder.mid.attn_1",
                     "decoder.up.3.attn.0", "decoder.up.3.attn.1", "decoder.up.3.attn.2"}


def test_decoded_images_are_clamped():
    net = random_vq(**TINY)
    net.decoder.conv_out.weight.mul_(100)
    codes = torch.randint(0, 32, (2, 4, 4))
    x, z = net.decode(codes), net.embed(codes)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(x, net.decode_latents(z).clamp(-1, 1)) and net.decode_latents(z).abs().max() > 1


# ---------------------------------------------------------------------------------------------- nearest codes

def brute_force(z, E):
    return torch.stack([(row - E.double()).square().sum(1).argmin() for row in z.double()])


@pytest.mark.parametrize("N", [1, 7, 1000, 4099])
def test_nearest_equals_brute_force(N):
    generator = torch.Generator().manual_seed(N)
    z, E = torch.randn(N, 4, generator=generator), torch.randn(1024, 4, generator=generator)
    assert torch.equal(vq.nearest_code(z, E), brute_force(z, E))


@pytest.mark.parametrize("N", [1, 4, 9, 12])
def test_nearest_is_exact_where_a_chunk_holds_four_positions(N):
    k = torch.arange(2 ** 20)
    E = torch.stack([k % 1024, k // 1024], 1).float()      # a grid: its distances are whole numbers, exact in float32
    codes = torch.randint(0, 2 ** 20, (N,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(vq.nearest_code(E[codes], E), codes)


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


def test_ties_go_to_the_lowest_code():
    E = torch.tensor([[3.], [1.], [-1.], [1.], [3.]])
    assert vq.nearest_code(torch.tensor([[0.], [1.], [5.], [-9.], [2.]]), E).tolist() == [1, 1, 0, 2, 0]


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
    angles = (z.movedim(1, -1) @ net.codebook.T).argmax(-1)                   # nearest on the sphere: the largest cosine
    assert torch.equal(net.nearest(z), angles) and len(angles.unique()) > 8


def test_without_l2_norm_the_codebook_is_the_stored_one(tiny):
    assert torch.equal(tiny.codebook, tiny.quantize.embedding.weight)


def test_encoding_is_encoder_then_projection_then_nearest(tiny):
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    z = tiny.quant_conv(tiny.encoder(x))
    codes = tiny.encode(x)
    assert torch.equal(codes.flatten(), brute_force(z[0].flatten(1).T, tiny.codebook)) and len(codes.unique()) > 4


def test_the_network_runs_in_float64(tiny):
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    codes = tiny.encode(x)
    image, twin = tiny.decode(codes), copy.deepcopy(tiny).double()
    assert torch.equal(twin.encode(x.double()), codes)
    torch.testing.assert_close(twin.decode(codes).float(), image, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- readers

# CompVis's names on the left, LlamaGen's on the right, for the three levels of FOREIGN. Names not listed are the same.
LLAMAGEN = {
    "encoder.down.0.block.0.": "encoder.conv_blocks.0.res.0.", "encoder.down.0.downsample.": "encoder.conv_blocks.0.downsample.",
    "encoder.down.1.block.0.": "encoder.conv_blocks.1.res.0.", "encoder.down.1.downsample.": "encoder.conv_blocks.1.downsample.",
    "encoder.down.2.block.0.": "encoder.conv_blocks.2.res.0.", "encoder.down.2.attn.0.": "encoder.conv_blocks.2.attn.0.",
    "encoder.mid.block_1.": "encoder.mid.0.", "encoder.mid.attn_1.": "encoder.mid.1.", "encoder.mid.block_2.": "encoder.mid.2.",
    "decoder.mid.block_1.": "decoder.mid.0.", "decoder.mid.attn_1.": "decoder.mid.1.", "decoder.mid.block_2.": "decoder.mid.2.",
    "decoder.up.2.block.0.": "decoder.conv_blocks.0.res.0.", "decoder.up.2.block.1.": "decoder.conv_blocks.0.res.1.",
    "decoder.up.2.attn.0.": "decoder.conv_blocks.0.attn.0.", "decoder.up.2.attn.1.": "decoder.conv_blocks.0.attn.1.",
    "decoder.up.2.upsample.": "decoder.conv_blocks.0.upsample.",
    "decoder.up.1.block.0.": "decoder.conv_blocks.1.res.0.", "decoder.up.1.block.1.": "decoder.conv_blocks.1.res.1.",
    "decoder.up.1.upsample.": "decoder.conv_blocks.1.upsample.",
    "decoder.up.0.block.0.": "decoder.conv_blocks.2.res.0.", "decoder.up.0.block.1.": "decoder.conv_blocks.2.res.1."}


def llamagen_name(key):
    return next((new + key[len(old):] for old, new in LLAMAGEN.items() if key.startswith(old)), key)


@pytest.fixture
def lightning():
    """Pretend pytorch_lightning is installed, while a file is written; gone when called."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    module = types.ModuleType(names[-1])
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    sys.modules.update({name: module for name in names})
    module.leave = lambda: [sys.modules.pop(name, None) for name in names]
    yield module
    module.leave()


def compvis_file(net, lightning, **more):
    callback = lightning.ModelCheckpoint()
    callback.best, callback.scores = torch.tensor(0.5), {"val/rec_loss": [1.0, None]}
    return {"epoch": 3, "global_step": 9, "callbacks": {lightning.ModelCheckpoint: {"state": callback}}, **more, "state_dict": {
        **net.state_dict(), "loss.discriminator.main.0.weight": torch.ones(3), "loss.logvar": torch.zeros(())}}


def llamagen_file(net):
    return {"model": {**{llamagen_name(k): v for k, v in net.state_dict().items()}, "quantize.codebook_used": torch.zeros(65536)},
            "steps": 7, "args": argparse.Namespace(vq_model="VQ-8", lr=1e-4, betas=[0.9, 0.95])}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", ["compvis", "llamagen", "own"])
@pytest.mark.parametrize("wrappers", ["", "module.", "module._orig_mod."])   # of DistributedDataParallel, of torch.compile
def test_a_file_of_each_layout_gives_its_network(wrappers, layout, zipped, lightning, tmp_path):
    config = {**FOREIGN, "l2_norm": layout == "llamagen"}
    net = random_vq(**config)
    file = {"compvis": lambda: compvis_file(net, lightning), "llamagen": lambda: llamagen_file(net),
            "own": lambda: {"config": config, "state_dict": net.state_dict()}}[layout]()
    weights = "model" if layout == "llamagen" else "state_dict"
    file[weights] = {wrappers + key: value for key, value in file[weights].items()}
    torch.save(file, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    lightning.leave()

    loaded = vq.load_vq(tmp_path / "a.pt")
    assert loaded.l2_norm == net.l2_norm and loaded.factor == 4
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    assert torch.equal(loaded.encode(x), net.encode(x)) and torch.equal(loaded.decode(net.encode(x)), net.decode(net.encode(x)))


@pytest.mark.parametrize("config", [dict(FOREIGN, ch_mult=(1,)), dict(FOREIGN, ch_mult=(1, 2, 2, 4), num_res_blocks=2),
                                    dict(FOREIGN, ch=64, z_channels=3, n_embed=5, embed_dim=2)], ids=["f1", "f8", "wide"])
def test_the_shape_of_a_foreign_network_is_read_off_its_tensors(config, lightning, tmp_path):
    with torch.device("meta"):
        want = {k: v.shape for k, v in vq.VQ(**config).state_dict().items()}
    state = {k: torch.zeros(shape) for k, shape in want.items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    assert {k: v.shape for k, v in vq.load_vq(tmp_path / "a.ckpt").state_dict().items()} == want


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_precision_does_not_matter(dtype, zipped, tiny, tmp_path):
    state = {k: v.to(dtype) for k, v in tiny.state_dict().items()}
    torch.save({"config": TINY, "state_dict": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    for key, value in vq.load_vq(tmp_path / "a.pt").state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[key].float())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("tag", ["cuda:7", "mps"])
def test_a_file_written_on_another_device_loads(tag, zipped, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: tag)
    torch.save({"config": TINY, "state_dict": tiny.state_dict()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert tag.encode() in (tmp_path / "a.pt").read_bytes()
    assert vq.load_vq(tmp_path / "a.pt").codebook.device.type == "cpu"


def test_parameters_and_ordered_dictionaries_load(tiny, tmp_path):
    torch.save({"config": TINY, "state_dict": type(tiny.state_dict())(tiny.named_parameters())}, tmp_path / "a.pt")
    assert torch.equal(vq.load_vq(tmp_path / "a.pt").codebook, tiny.codebook)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_lightnings_hyper_parameters_do_not_stand_in_the_way(zipped, lightning, tmp_path):
    net = random_vq(**FOREIGN)
    file = compvis_file(net, lightning, hyper_parameters=lightning.AttributeDict(lr=1e-4))
    torch.save(file, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    lightning.leave()
    assert torch.equal(vq.load_vq(tmp_path / "a.ckpt").codebook, net.codebook)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_numpy_scalars_and_averaged_weights_do_not_stand_in_the_way(zipped, lightning, tmp_path):
    net = random_vq(**FOREIGN)
    file = compvis_file(net, lightning, lr_schedulers=[{"base_lrs": [np.float64(1e-4)]}])
    file["state_dict"]["model_ema.decay"] = torch.tensor(0.999)
    torch.save(file, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    lightning.leave()
    assert torch.equal(vq.load_vq(tmp_path / "a.ckpt").codebook, net.codebook)


# ---------------------------------------------------------------------------------------------- unsafe files

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
LATER = {"torch.hub.load": torch.hub, "torch.serialization.load": torch.serialization}  # booby-trapped after the writing


@pytest.mark.parametrize("place", ["alone", "beside", "state_dict", "lightning", "llamagen"])
@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_pickle_asks_to_execute_is_refused_by_name(name, place, tiny, lightning, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    attack, callback = ATTACKS[name](marker), lightning.ModelCheckpoint()
    callback.attack = attack
    file = {"alone": attack, "beside": {"config": TINY, "state_dict": tiny.state_dict(), "more": [attack]},
            "state_dict": {"state_dict": {"x": attack}}, "lightning": compvis_file(tiny, lightning, more=callback),
            "llamagen": {**llamagen_file(tiny), "args": argparse.Namespace(x=attack)}}[place]
    paths = {zipped: tmp_path / f"{zipped}.pt" for zipped in (True, False)}
    for zipped, path in paths.items():
        torch.save(file, path, _use_new_zipfile_serialization=zipped)
    lightning.leave()
    if name in LATER:
        monkeypatch.setattr(LATER[name], "load", lambda *_, **__: marker.touch())
    for path in paths.values():
        assert re.search(rf"asks for .*{re.escape(name)}", refusal(path))
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_unsafe_pickles_of_later_protocols_are_refused(protocol, tiny, tmp_path):
    file = {"config": TINY, "state_dict": tiny.state_dict(), "more": ATTACKS["posix.system"](tmp_path / "executed")}
    for zipped in (True, False):
        torch.save(file, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        assert re.search("posix.system|computed on the pickle's stack", refusal(tmp_path / "a.pt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("module, name", [("pytorch_lightning_x", "Run"), ("lightning2.run", "Run"), ("argparse", "NamespaceX"),
                                          ("argparse", "ArgumentParser"), ("torch.storage", "X"), ("xlightning", "Run")])
def test_names_that_only_begin_like_allowed_ones_are_refused(module, name, tmp_path):
    pickled = f"c{module}\n{name}\n)R.".encode()           # "call module.name()" in pickle's own language
    with open(tmp_path / "a.pt", "wb") as f:
        for value in (torch.serialization.MAGIC_NUMBER, 1001, {}):
            pickle.dump(value, f, protocol=2)
        f.write(pickled)
        pickle.dump([], f, protocol=2)
    assert f"{module}.{name}" in refusal(tmp_path / "a.pt")


def test_an_archive_behind_a_legacy_pickle_does_not_hide_it(tiny, tmp_path):
    torch.save(ATTACKS["posix.system"](tmp_path / "executed"), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    torch.save({"config": TINY, "state_dict": tiny.state_dict()}, tmp_path / "b.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes() + (tmp_path / "b.pt").read_bytes())
    with pytest.raises(vq.InputError, match="a.pt"):
        vq.load_vq(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------- damaged files

@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused_whatever_its_length(zipped, tiny, tmp_path):
    torch.save({"config": TINY, "state_dict": tiny.state_dict()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "a.pt").read_bytes()
    for length in sorted({*range(12), *range(12, 400, 37), *np.linspace(400, len(whole), 40, dtype=int)[:-1],
                          *(len(whole) - n for n in (1, 2, 16, 21, 22, 23, 64, 100, 1000))}):
        path = tmp_path / f"first{length}.pt"
        path.write_bytes(whole[:length])
        refusal(path)
        path.unlink()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n", b"<html>404</html>", b"\n" * 100, bytes(4096), b"PK\x03\x04" * 9,
                                     b"\x80\x02.", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    refusal(tmp_path / "a.pt")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "nowhere.pt")
    refusal(tmp_path)


@pytest.mark.parametrize("file", [[], 3, {}, {"ema": {}}, {"state_dict": {}}, {"model": {}}, {"model": {7: torch.zeros(1)}}, torch.zeros(3),
                                  {"state_dict": {"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}}], ids=str)
def test_a_checkpoint_of_something_else_is_refused(file, tmp_path):
    torch.save(file, tmp_path / "a.pt")
    assert "tokenizer" in refusal(tmp_path / "a.pt")


def write_changed(path, net, layout, key, change):
    """Write a file of the given layout with one tensor changed: dropped (None), replaced or added."""
    state = dict(net.state_dict())
    state.pop(key, None) if change is None else state.update({key: change})
    torch.save({"own": {"config": TINY, "state_dict": state}, "compvis": {"state_dict": state},
                "llamagen": {"model": {llamagen_name(k): v for k, v in state.items()}}}[layout], path)


def test_a_missing_tensor_is_named(tiny, tmp_path):
    for key in list(tiny.state_dict())[::8]:               # all would take long
        write_changed(tmp_path / "a.pt", tiny, "own", key, None)
        message = refusal(tmp_path / "a.pt")
        assert f"tensor {key} is missing" in message


@pytest.mark.parametrize("key, layout", [
    ("encoder.conv_in.weight", "compvis"), ("encoder.conv_out.weight", "compvis"), ("quantize.embedding.weight", "compvis"),
    ("encoder.down.0.block.0.conv1.weight", "llamagen"), ("encoder.down.1.block.0.conv1.weight", "compvis"),
    ("encoder.down.2.block.0.conv1.weight", "llamagen"), ("encoder.down.0.block.0.conv1.bias", "compvis"),
    ("encoder.down.2.attn.0.q.weight", "compvis"), ("decoder.up.1.upsample.conv.weight", "llamagen"),
    ("decoder.mid.attn_1.norm.bias", "llamagen")])
def test_a_tensor_missing_from_a_foreign_file_is_named(key, layout, tmp_path):
    write_changed(tmp_path / "a.pt", random_vq(**FOREIGN), layout, key, None)
    assert f"tensor {key} is missing" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("layout", ["own", "compvis"])
def test_an_unexpected_tensor_is_named_with_its_shape(layout, tiny, tmp_path):
    net = tiny if layout == "own" else random_vq(**FOREIGN)
    write_changed(tmp_path / "a.pt", net, layout, "encoder.extra.weight", torch.zeros(5, 7))
    assert "tensor encoder.extra.weight is (5, 7) in the file and unknown" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("key, change", [("encoder.conv_in.weight", 3), ("quantize.embedding.weight", torch.zeros(4)),
                                         ("encoder.conv_in.weight", torch.zeros(()))])
@pytest.mark.parametrize("layout", ["compvis", "own"])
def test_what_describes_no_network_is_refused(key, change, layout, tmp_path):
    write_changed(tmp_path / "a.pt", random_vq(**FOREIGN), layout, key, change)
    refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("config", [dict(TINY, colour="red"), dict(TINY, num_groups=3), dict(TINY, ch="8")])
def test_a_config_that_describes_no_network_is_refused(config, tiny, tmp_path):
    torch.save({"config": config, "state_dict": tiny.state_dict()}, tmp_path / "a.pt")
    assert "no network of this family" in refusal(tmp_path / "a.pt")


def test_a_misshapen_tensor_is_named_with_both_shapes(tiny, tmp_path):
    write_changed(tmp_path / "a.pt", tiny, "own", "quant_conv.weight", torch.zeros(4, 4, 3, 3))
    message = refusal(tmp_path / "a.pt")
    assert all(part in message for part in ("quant_conv.weight", "(4, 4, 3, 3)", "(4, 4, 1, 1)"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_byte_never_gives_another_error(zipped, tiny, tmp_path):
    torch.save({"config": TINY, "state_dict": tiny.state_dict()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole, rng = (tmp_path / "a.pt").read_bytes(), np.random.default_rng(0)
    for position in rng.integers(0, 12000, 25):            # most of what is not plain numbers lies there
        path = tmp_path / f"byte{position}.pt"
        path.write_bytes(whole[:position] + bytes([rng.integers(256)]) + whole[position + 1:])
        try:
            vq.load_vq(path)
        except vq.InputError as error:
            assert path.name in str(error) and "\n" not in str(error)


# ---------------------------------------------------------------------------------------------- pictures

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def solid(size, colour, mode="RGB"):
    return Image.new(mode, size, colour)


def opened(image, path, size, **options):
    image.save(path, **options)
    pixels = vq.open_image(path, size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize("width, height", [(96, 32), (32, 96), (97, 32), (32, 99)])
def test_the_crop_is_the_centre_of_landscape_and_portrait_pictures(width, height, tmp_path):
    image = solid((width, height), RED)
    image.paste(GREEN, ((width - 32) // 2, (height - 32) // 2, (width - 32) // 2 + 32, (height - 32) // 2 + 32))
    assert (opened(image, tmp_path / "a.png", 32) == GREEN).all()


def test_a_picture_twice_too_large_is_averaged_over_blocks(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    blocks = picture.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(opened(Image.fromarray(picture), tmp_path / "a.png", 32) - blocks).max() <= 1  # rounded once in each direction


def test_a_picture_less_than_twice_too_large_is_resized_bicubically(tmp_path):
    ramp = np.repeat(np.arange(48, dtype=np.uint8)[None] * 4, 48, 0)
    pixels = opened(Image.fromarray(ramp), tmp_path / "a.png", 32)
    expected = 4 * ((np.arange(32) + 0.5) * 1.5 - 0.5)     # bicubic keeps straight lines, away from the edge
    assert np.abs(pixels[:, 3:-3, 0] - expected[3:-3]).max() <= 0.51


def test_the_crop_is_adms_step_by_step(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (151, 221, 3), np.uint8)
    image = Image.fromarray(picture).resize((110, 75), Image.BOX).resize((55, 37), Image.BOX)
    image = image.resize((48, 32), Image.BICUBIC)          # 55 * 32 / 37, rounded
    assert np.array_equal(opened(Image.fromarray(picture), tmp_path / "a.png", 32), np.asarray(image)[:, 8:40])


@pytest.mark.parametrize("size", [(16, 24), (1, 1), (5, 31), (40, 7)])
def test_a_picture_smaller_than_the_crop_is_enlarged(size, tmp_path):
    assert (opened(solid(size, GREEN), tmp_path / "a.png", 32) == GREEN).all()


@pytest.mark.parametrize("mode, colour, suffix, expected", [
    ("L", 100, "png", (100, 100, 100)), ("L", 100, "jpg", (100, 100, 100)), ("1", 1, "png", WHITE),
    ("CMYK", (0, 255, 255, 0), "jpg", RED), ("CMYK", (255, 255, 0, 0), "jpg", BLUE), ("LA", (50, 9), "png", (50, 50, 50)),
    ("RGBA", (10, 20, 30, 0), "png", (10, 20, 30)), ("RGBA", (10, 20, 30, 255), "webp", (10, 20, 30)), ("RGB", BLUE, "bmp", BLUE)])
def test_every_kind_of_picture_becomes_rgb(mode, colour, suffix, expected, tmp_path):
    options = {"lossless": True} if suffix == "webp" else {}
    pixels = opened(solid((40, 48), colour, mode), tmp_path / f"a.{suffix}", 32, **options)
    assert np.abs(pixels.astype(int) - expected).max() <= (3 if suffix == "jpg" else 0)


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(tmp_path / "a.png")
    assert (vq.open_image(tmp_path / "a.png", 32) == 40000 // 256).all()


def test_a_palette_becomes_its_colours(tmp_path):
    image = solid((32, 32), RED)
    image.paste(BLUE, (16, 0, 32, 32))
    pixels = opened(image.convert("P", palette=Image.ADAPTIVE, colors=2), tmp_path / "a.png", 32)
    assert (pixels[:, :16] == RED).all() and (pixels[:, 16:] == BLUE).all()


@pytest.mark.parametrize("orientation, stored", list(enumerate([  # what the camera wrote for the upright picture RG / BW
    ("RG", "BW"), ("GR", "WB"), ("WB", "GR"), ("BW", "RG"), ("RB", "GW"), ("GW", "RB"), ("WG", "BR"), ("BR", "WG")], 1)))
def test_a_picture_is_turned_upright_by_its_exif_tag(orientation, stored, tmp_path):
    colours = dict(R=RED, G=GREEN, B=BLUE, W=WHITE)
    picture = np.array([[colours[c] for c in row] for row in stored], np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[274] = orientation
    pixels = opened(Image.fromarray(picture), tmp_path / "a.png", 32, exif=exif)
    assert [[tuple(pixels[y, x].tolist()) for x in (8, 24)] for y in (8, 24)] == [[RED, GREEN], [BLUE, WHITE]]


def test_damage_elsewhere_in_exif_does_not_make_a_picture_unreadable(tmp_path):
    tags = struct.pack("<HHI4s", 256, 2, 3, b"72") + struct.pack("<HHIHH", 274, 3, 1, 3, 0)  # a width in letters; upside down
    picture = solid((32, 32), RED)
    picture.paste(BLUE, (0, 16, 32, 32))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    pixels = opened(picture, tmp_path / "a.jpg", 32, exif=exif, quality=95)
    assert pixels[4, 4].argmax() == 2 and pixels[28, 4].argmax() == 0
    pixels = opened(picture, tmp_path / "b.png", 32, exif=b"Exif\0\0no such thing")
    assert (pixels[4, 4] == RED).all()


def test_pixels_survive_the_way_to_images_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    x = vq.from_pixels(pixels)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert torch.equal(vq.to_pixels(x), pixels) and torch.equal(vq.from_pixels(pixels.numpy()), x)


def test_pixels_are_rounded_not_truncated_and_clamped():
    level = torch.tensor([9.6, 10.4, -3., 254.6, 300.])    # grey levels
    x = (level / 127.5 - 1).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert vq.to_pixels(x)[0, 0, :, 0].tolist() == [10, 10, 0, 255, 255]
    assert vq.to_pixels(x.bfloat16()).dtype == torch.uint8


def test_a_sheet_shows_every_picture_in_its_place():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), np.uint8)
    page = vq.sheet(pixels, columns=2)
    assert page.shape == (3 * 6, 2 * 8, 3) and (page[13:17, 9:15] == 255).all()
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]):
        assert np.array_equal(page[row * 6 + 1:row * 6 + 5, column * 8 + 1:column * 8 + 7], pixels[i])


def test_a_file_takes_its_name_only_when_whole(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), vq.replacing(tmp_path / "a.txt") as partial:
        partial.write_text("ne")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with vq.replacing(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"


# ---------------------------------------------------------------------------------------------- command line

SIZE = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write a small ImageFolder tree: 11 pictures of three classes, of many kinds and sizes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    names = ["ant/0.png", "ant/1.JPEG", "ant/2.png", "ant/3.bmp", "bee/0.jpg", "bee/1.png", "bee/2.webp", "bee/3.png",
             "cat/0.png", "cat/1.png", "cat/deep/2.png"]
    for i, name in enumerate(names):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((40 + 5 * i, 70 - 3 * i), Image.BICUBIC)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.convert("L" if i == 5 else "RGB").save(root / name)
    (root / "ant" / "notes.txt").write_text("not a picture")
    return root


@pytest.fixture
def run(monkeypatch, tiny_file):
    """Run vq.py's main with these arguments, the tiny tokenizer and settings that suit it."""
    def run(*arguments, file=tiny_file):
        monkeypatch.setattr(sys, "argv", ["vq.py", *map(str, arguments), "--vq", str(file), "--size", str(SIZE),
                                          "--batch-size", "3", "--num-workers", "0"])
        vq.main()
    return run


def codes_of(net, paths, flip=False):
    pictures = np.stack([vq.open_image(path, SIZE)[:, ::-1 if flip else 1] for path in paths])
    return net.encode(vq.from_pixels(np.ascontiguousarray(pictures))).numpy()


def data(folder):
    names = sorted(p.name for p in folder.iterdir())
    assert not [name for name in names if "partial" in name or "done" in name]
    return np.load(folder / "codes.npy"), np.load(folder / "labels.npy"), json.loads((folder / "meta.json").read_text())


@pytest.fixture
def copied(images, tmp_path):
    """Give a copy of the tree with a broken picture: row 4, the first bee."""
    root = Path(shutil.copytree(images, tmp_path / "copied"))
    (root / "bee" / "0.jpg").write_bytes((root / "bee" / "0.jpg").read_bytes()[:200])
    return root


def test_a_tree_is_encoded_class_by_class(run, images, tiny, tiny_file, tmp_path):
    run(images, "--out", tmp_path / "out")
    codes, labels, meta = data(tmp_path / "out")
    paths, _, _ = vq.list_images(images)
    assert codes.dtype == np.uint16 and codes.shape == (11, 4, 4)
    assert np.array_equal(codes, codes_of(tiny, paths)) and len(np.unique(codes)) > 8
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 3 and meta["classes"] == ["ant", "bee", "cat"]
    assert [str(p.relative_to(images)) for p in paths[:2]] == ["ant/0.png", "ant/1.JPEG"]
    assert meta["image_size"] == SIZE and meta["tokenizer"] == str(tiny_file) and meta["skipped"] == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["codes.npy", "labels.npy", "meta.json"]


def test_a_flat_folder_is_one_class(run, images, tiny, tmp_path):
    run(images / "bee", "--out", tmp_path / "out")
    codes, labels, meta = data(tmp_path / "out")
    assert labels.tolist() == [0] * 4 and meta["classes"] == ["bee"]
    assert np.array_equal(codes, codes_of(tiny, sorted((images / "bee").iterdir())))


def test_flip_stores_the_codes_of_the_mirrored_pictures(run, images, tiny, tmp_path):
    run(images, "--out", tmp_path / "out", "--flip")
    paths = vq.list_images(images)[0]
    twins = np.load(tmp_path / "out" / "codes_flip.npy")
    assert np.array_equal(twins, codes_of(tiny, paths, flip=True))
    assert np.array_equal(data(tmp_path / "out")[0], codes_of(tiny, paths))
    assert not np.array_equal(twins, data(tmp_path / "out")[0][:, :, ::-1])    # why they are encoded, not mirrored


def test_two_processes_write_the_same_codes_as_one(run, images, tiny_file, tmp_path, monkeypatch):
    run(images, "--out", tmp_path / "one", "--flip")
    monkeypatch.setenv("OMP_NUM_THREADS", "1"), monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.distributed.run.main([str(a) for a in (          # what torchrun calls
        "--standalone", "--nproc_per_node=2", ROOT / "vq.py", images, "--vq", tiny_file, "--out", tmp_path / "two",
        "--size", SIZE, "--batch-size", 3, "--num-workers", 0, "--flip")])
    assert np.array_equal(data(tmp_path / "one")[0], data(tmp_path / "two")[0])
    assert data(tmp_path / "one")[2] == data(tmp_path / "two")[2]
    for name in ("labels.npy", "codes_flip.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_interrupted_run_goes_on_and_repeats_nothing(run, images, tiny, tmp_path, monkeypatch):
    encode, encoded = vq.VQ.encode, []

    def count(self, x, limit=6):
        if len(encoded) >= limit:
            raise KeyboardInterrupt
        encoded.extend(x)
        return encode(self, x)
    monkeypatch.setattr(vq.VQ, "encode", count)
    with pytest.raises(KeyboardInterrupt):
        run(images, "--out", tmp_path / "out")
    assert len(encoded) == 6 and not (tmp_path / "out" / "meta.json").exists()
    monkeypatch.setattr(vq.VQ, "encode", functools.partialmethod(count, limit=99))
    run(images, "--out", tmp_path / "out")
    paths = vq.list_images(images)[0]
    expected = vq.from_pixels(np.stack([vq.open_image(path, SIZE) for path in paths]))
    assert torch.equal(torch.stack(encoded), expected)     # each once, in order
    assert np.array_equal(data(tmp_path / "out")[0], codes_of(tiny, paths))


def test_a_bad_picture_stops_with_its_name_and_the_work_done_is_kept(run, copied, tiny, tmp_path, monkeypatch):
    with pytest.raises(vq.InputError, match=re.escape(str(copied / "bee" / "0.jpg")) + ".*--skip-bad"):
        run(copied, "--out", tmp_path / "out")
    encode, encoded = vq.VQ.encode, []
    monkeypatch.setattr(vq.VQ, "encode", lambda self, x: encoded.extend(x) or encode(self, x))
    run(copied, "--out", tmp_path / "out", "--skip-bad")   # the same command with the flag it asked for
    assert len(encoded) in (7, 8)                          # not the first batch of three again
    assert len(data(tmp_path / "out")[0]) == 10


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", None], ids=["empty", "text", "header", "truncated"])
def test_skip_bad_leaves_pictures_out_and_keeps_codes_and_labels_aligned(content, run, copied, tiny, tmp_path, capsys):
    bad = [copied / "ant" / "2.png", copied / "bee" / "0.jpg"]
    if content is not None:
        bad[1].write_bytes(content)
    bad[0].write_bytes(bad[0].read_bytes()[:-60])
    run(copied, "--out", tmp_path / "out", "--skip-bad", "--flip")
    codes, labels, meta = data(tmp_path / "out")
    good = [p for p in vq.list_images(copied)[0] if p not in bad]
    assert np.array_equal(codes, codes_of(tiny, good)) and labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert np.array_equal(np.load(tmp_path / "out" / "codes_flip.npy"), codes_of(tiny, good, flip=True))
    printed = capsys.readouterr().out
    assert meta["skipped"] == [str(p) for p in bad] and all(str(p) in printed for p in bad)


@pytest.mark.parametrize("moment", ["labels.npy", "meta.json", "unlink"])
def test_finishing_can_be_interrupted_anywhere(moment, run, copied, tiny, tmp_path, monkeypatch):
    replacing, unlink = vq.replacing, Path.unlink

    def kill(path, **_):
        if path.name == moment or moment == "unlink" and path.name in ("partial.json", "done.npy"):
            raise KeyboardInterrupt
        return (unlink if moment == "unlink" else replacing)(path, **_)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((Path, "unlink") if moment == "unlink" else (vq, "replacing")), kill)
        run(copied, "--out", tmp_path / "out", "--skip-bad", "--flip")
    run(copied, "--out", tmp_path / "out", "--skip-bad", "--flip")
    good = [p for p in vq.list_images(copied)[0] if p != copied / "bee" / "0.jpg"]
    codes, labels, meta = data(tmp_path / "out")
    assert np.array_equal(codes, codes_of(tiny, good)) and len(labels) == 10 and len(meta["skipped"]) == 1
    assert not list((tmp_path / "out").glob("done.npy")) + list((tmp_path / "out").glob("partial.json"))


def test_whatever_a_picture_raises_its_name_is_told(run, images, tmp_path, monkeypatch):
    def broken(path, size):
        raise struct.error("required argument is not an integer")  # Pillow's answer to a damaged EXIF tag
    monkeypatch.setattr(vq, "open_image", broken)
    with pytest.raises(vq.InputError, match="0.png"):
        run(images, "--out", tmp_path / "out")


def test_a_finished_folder_is_not_overwritten(run, images, tmp_path):
    run(images, "--out", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(vq.InputError, match="--out .*already holds a data set"):
        run(images, "--out", tmp_path / "out", "--flip")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_codes_from_elsewhere_are_not_overwritten(run, images, tmp_path):
    np.save(tmp_path / "codes.npy", np.arange(3))
    with pytest.raises(vq.InputError, match="--out .*codes.npy; give another folder"):
        run(images, "--out", tmp_path)
    assert np.load(tmp_path / "codes.npy").tolist() == [0, 1, 2] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["flip", "images", "tokenizer", "weights"])
def test_a_partial_folder_of_other_settings_is_refused(change, run, copied, images, tiny_file, tmp_path):
    file = Path(shutil.copy(tiny_file, tmp_path))
    with pytest.raises(vq.InputError):
        run(copied, "--out", tmp_path / "out", file=file)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    if change == "weights":                                # trained anew: the same name and size
        content = torch.load(file)
        content["state_dict"]["quant_conv.bias"] += 1
        torch.save(content, file)
        assert file.stat().st_size == tiny_file.stat().st_size
    arguments = {"flip": [copied, "--flip"], "images": [images / "ant"]}.get(change, [copied])
    with pytest.raises(vq.InputError, match="--out .*another"):
        run(*arguments, "--out", tmp_path / "out", file=tiny_file if change == "tokenizer" else file)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


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


@pytest.mark.parametrize("reference", ["nowhere", "nowhere.npz", "other.npz", "text.npz"])
def test_a_wrong_reference_is_told_before_anything_is_encoded(reference, run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(vq.VQ, "encode", lambda *_: pytest.fail("encoded first"))
    np.savez(tmp_path / "other.npz", images=np.zeros(3)), (tmp_path / "text.npz").write_text("mu")
    with pytest.raises(vq.InputError, match=reference):
        run(images, "--out", tmp_path / "out", "--reference", tmp_path / reference)


def test_after_a_bad_reference_picture_the_same_command_goes_on(run, images, copied, tmp_path):
    with pytest.raises(vq.InputError, match="0.jpg"):
        run(images, "--out", tmp_path / "out", "--reference", copied)
    (copied / "bee" / "0.jpg").unlink()
    run(images, "--out", tmp_path / "out", "--reference", copied)
    assert len(data(tmp_path / "out")[0]) == 11 and len(list((tmp_path / "out" / "reference").iterdir())) == 10


def test_skip_bad_leaves_reference_pictures_out(run, images, copied, tmp_path):
    (copied / "bee" / "0.jpg").write_bytes(b"")
    run(images, "--out", tmp_path / "out", "--reference", copied, "--skip-bad")
    assert len(list((tmp_path / "out" / "reference").iterdir())) == 10


def test_nothing_readable_is_no_data_set(run, copied, images, tmp_path):
    for path in copied.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(vq.InputError, match="ant/0.png and all others cannot be read"):
        run(copied, "--out", tmp_path / "out", "--skip-bad")
    with pytest.raises(vq.InputError, match="--reference .*none of its images"):
        run(images, "--out", tmp_path / "other", "--reference", copied, "--skip-bad")
    assert not list(tmp_path.glob("o*/meta.json"))


def test_reconstruct_writes_both_pictures_and_prints_their_psnr(run, images, tiny, tmp_path, capsys):
    run("--reconstruct", images / "ant" / "0.png", images / "bee" / "0.jpg", "--out", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "000-0.png" in lines[0] and "001-0.png" in lines[1]
    picture = np.asarray(Image.open(tmp_path / "001-0.png"))
    original, again = picture[1:33, 1:33], picture[1:33, 35:67]
    assert len(lines) == 2 and picture.shape == (34, 68, 3)
    assert np.array_equal(original, vq.open_image(images / "bee" / "0.jpg", SIZE))
    assert np.array_equal(again, vq.to_pixels(tiny.decode(tiny.encode(vq.from_pixels(original[None].copy()))))[0])
    psnr = 20 * np.log10(255 / np.sqrt(np.mean((original.astype(float) - again) ** 2)))
    assert float(re.search(r"PSNR (-?[\d.]+) dB", lines[1])[1]) == pytest.approx(psnr, abs=0.006)


def test_reconstruct_names_a_picture_it_cannot_read(run, copied, tmp_path):
    for path in (copied / "bee" / "0.jpg", tmp_path / "nowhere.png"):
        with pytest.raises(vq.InputError, match=re.escape(str(path))):
            run("--reconstruct", path, "--out", tmp_path)


def test_folders_without_classes_that_make_sense_are_refused(images, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(vq.InputError, match="empty: no images"):
        vq.list_images(tmp_path / "empty")
    with pytest.raises(vq.InputError, match="nowhere: no such folder"):
        vq.list_images(tmp_path / "nowhere")
    (tmp_path / "mixed" / "ant").mkdir(parents=True)
    for name in ("mixed/a.png", "mixed/ant/b.png"):
        solid((8, 8), RED).save(tmp_path / name)
    with pytest.raises(vq.InputError, match="a.png: lies beside class folders"):
        vq.list_images(tmp_path / "mixed")


@pytest.mark.parametrize("arguments, message", [
    ([], "give either IMAGES"), (["x", "--reconstruct", "y"], "give either IMAGES"), (["x"], "--out is missing"),
    (["--reconstruct", "x", "--flip"], "leave out --flip"), (["x", "--out", __file__], "test_vq.py is a file"),
    (["x", "--out", f"{__file__}/sub"], "test_vq.py is a file"), (["x", "--out", "."], "no name of its own")])
def test_commands_that_make_no_sense_are_refused(arguments, message, run, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_a_size_that_is_no_multiple_of_a_code_is_refused(monkeypatch, images, tiny_file, tmp_path):
    for size in ("30", "0", "-8"):
        monkeypatch.setattr(sys, "argv", ["vq.py", str(images), "--vq", str(tiny_file), "--out", str(tmp_path / "out"),
                                          "--size", size])
        with pytest.raises(vq.InputError, match=f"--size {size}.*multiple of 8"):
            vq.main()
    assert not (tmp_path / "out").exists()


def test_an_interruption_ends_with_one_line(monkeypatch):
    def main():
        raise KeyboardInterrupt
    monkeypatch.setattr(sys, "argv", ["vq.py"])
    with pytest.raises(SystemExit) as ended:
        vq.run_script(main)
    assert ended.value.code == "vq.py: interrupted; the same command goes on where it stopped"


def test_the_command_ends_with_one_line_and_no_traceback(monkeypatch, images, tmp_path):
    monkeypatch.setattr(sys, "argv", ["vq.py", str(images), "--vq", str(tmp_path / "nowhere.pt"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "vq.py"), run_name="__main__")
    assert re.fullmatch(r"vq\.py: .*nowhere\.pt: no such file.*", ended.value.code)
