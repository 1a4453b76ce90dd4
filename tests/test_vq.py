"""Test vq.py: the network, its weights, pictures, and encoding that goes on where it stopped."""
import argparse
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import vq
from demo import reconstruct
from conftest import TINY_VQ

FOREIGN = dict(ch=32, ch_mult=(1, 2, 1), num_res_blocks=2, z_channels=8, n_embed=24, embed_dim=5)


def random_vq(**config):
    """Build a network of random weights. Its codes are its own latents, so that many are used."""
    torch.manual_seed(0)
    net = vq.VQ(**config).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):  # weights of ones would hide swapped norms
            module.weight.normal_(1, 0.3)
            module.bias.normal_(0, 0.3)
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    latents = net.quant_conv(net.encoder(images)).movedim(1, -1).flatten(0, -2)
    E = net.quantize.embedding.weight
    E.copy_(latents[torch.randperm(len(latents))[:len(E)]])
    return net


@pytest.fixture(scope="module")
def tiny():
    return random_vq(**TINY_VQ)


@pytest.fixture
def tiny_file(tiny, tmp_path):
    torch.save({"config": TINY_VQ, "state_dict": tiny.state_dict()}, tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


# ----- the network

@pytest.mark.parametrize("config, parameters", [
    (dict(), 67_717_295),                                            # vq-f8
    (dict(z_channels=256, embed_dim=8, l2_norm=True), 70_109_835)])  # vq_ds8_c2i.pt
def test_the_published_networks(config, parameters):
    with torch.device("meta"):
        net = vq.VQ(**config)
    tensors = net.state_dict().values()
    assert len(tensors) == 299 and sum(x.numel() for x in tensors) == parameters
    modules = dict(net.named_modules())
    norms = [m for m in modules.values() if isinstance(m, torch.nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-6)}
    assert {name.removesuffix(".q") for name in modules if name.endswith(".q")} == {
        "encoder.down.3.attn.0", "encoder.down.3.attn.1", "encoder.mid.attn_1",
        "decoder.up.3.attn.0", "decoder.up.3.attn.1", "decoder.up.3.attn.2", "decoder.mid.attn_1"}


def test_the_encoder_runs_from_fine_to_coarse_and_the_decoder_back(tiny):
    net = copy.deepcopy(tiny)
    convs = {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)}
    ran = []
    for name, conv in convs.items():
        conv.register_forward_hook(lambda *_, name=name: ran.append(name))
    net.decode(net.encode(torch.zeros(1, 3, 8, 8)))
    assert ran[:ran.index("quant_conv")] == [name for name in convs if name.startswith("encoder.")]
    levels = [name[:12] for name in ran if name.startswith("decoder.up.")]
    assert list(dict.fromkeys(levels)) == [f"decoder.up.{i}" for i in (3, 2, 1, 0)]


def test_downsampling_pads_right_and_bottom_and_upsampling_repeats_pixels(tiny):
    net = copy.deepcopy(tiny)
    down = net.get_submodule("encoder.down.0.downsample")
    up = net.get_submodule("decoder.up.1.upsample")
    for conv in (down.conv, up.conv):
        conv.weight.fill_(1 / 8)  # of eight channels
        conv.bias.zero_()
    inside = torch.tensor([[9., 9, 6], [9, 9, 6], [6, 6, 4]])  # the weights that lie on the picture
    torch.testing.assert_close(down(torch.ones(1, 8, 6, 6))[0, 0], inside)
    up.conv.weight.zero_()[..., 1, 1] = 1 / 8
    x = torch.randn(1, 1, 2, 3).expand(-1, 8, -1, -1)
    torch.testing.assert_close(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_blocks_and_attention_are_their_formulas():
    net = random_vq(**FOREIGN)
    block = net.get_submodule("encoder.down.1.block.0")
    attention = net.get_submodule("encoder.mid.attn_1")
    x = torch.randn(2, 32, 3, 5)
    h = x
    for norm, conv in (block.norm1, block.conv1), (block.norm2, block.conv2):
        n = norm(h)
        h = conv(n * torch.sigmoid(n))
    torch.testing.assert_close(block(x), block.nin_shortcut(x) + h)

    n = attention.norm(x)
    q, k, v = (getattr(attention, name)(n).flatten(2) for name in "qkv")  # [B,C,hw]
    weights = torch.softmax(q.mT @ k / 32 ** 0.5, -1)
    h = (v @ weights.mT).view(x.shape)
    torch.testing.assert_close(attention(x), x + attention.proj_out(h))


def test_encoding_is_encoder_then_projection_then_nearest_without_tf32(tiny):
    tf32 = []
    hook = tiny.encoder.conv_in.register_forward_hook(
        lambda *_: tf32.append(torch.backends.cudnn.allow_tf32))
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        codes = tiny.encode(x)
        assert tf32 == [False] and torch.backends.cudnn.allow_tf32
    hook.remove()
    assert tiny.factor == 8 and codes.shape == (1, 4, 6)
    z = tiny.quant_conv(tiny.encoder(x))[0].flatten(1).T  # [hw,d]
    distances = torch.cdist(z.double(), tiny.codebook.double())
    assert torch.equal(codes.flatten(), distances.argmin(1)) and len(codes.unique()) > 4


@pytest.mark.parametrize("l2_norm", [False, True])
def test_a_code_is_nearest_to_its_own_vector_and_l2_norm_ignores_lengths(l2_norm):
    net = random_vq(**TINY_VQ, l2_norm=l2_norm)
    weight = net.quantize.embedding.weight.mul_(torch.rand(32, 1) * 9 + 0.1)
    length = weight.norm(dim=1, keepdim=True) if l2_norm else 1
    torch.testing.assert_close(net.codebook, weight / length)
    codes = torch.arange(32).view(1, 4, 8)
    assert torch.equal(net.embed(codes)[0, :, 2, 5], net.codebook[21])
    assert torch.equal(net.nearest(net.embed(codes)), codes)
    scaled = net.embed(codes) * (torch.rand(1, 1, 4, 8) * 9 + 0.1)
    assert torch.equal(net.nearest(scaled), codes) == l2_norm


# ----- weights

def llamagen_name(key):
    """Rename a key of FOREIGN, which has three levels, to LlamaGen's."""
    for i in range(3):
        key = key.replace(f"encoder.down.{i}.", f"encoder.conv_blocks.{i}.")
        key = key.replace(f"decoder.up.{i}.", f"decoder.conv_blocks.{2 - i}.")
    for i, name in enumerate(("block_1", "attn_1", "block_2")):
        key = key.replace(f".mid.{name}.", f".mid.{i}.")
    return key.replace(".block.", ".res.")


@pytest.fixture
def lightning(monkeypatch):
    module = types.ModuleType("pytorch_lightning")
    module.Callback = type("Callback", (), {"__module__": module.__name__})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def file_of(layout, config, state, lightning):
    """Arrange the tensors of a network as its trainer does."""
    if layout == "own":
        return {"config": config, "state_dict": state}
    if layout == "compvis":
        more = {"loss.main.weight": torch.ones(3), "model_ema.decay": torch.tensor(0.9)}
        return {"epoch": 3, "lr": np.float64(1e-4), "state_dict": state | more,
                "callbacks": {lightning.Callback: lightning.Callback()},
                "hyper_parameters": lightning.AttributeDict(lr=1e-4)}
    state = {llamagen_name(key): x for key, x in state.items()}
    more = {"quantize.codebook_used": torch.zeros(65536)}
    file = {"model": state | more, "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    if layout == "llamagen-ema":  # its trainer's; the averaged weights are what it samples with
        file |= {"ema": file["model"], "model": {key: x + 1 for key, x in state.items()}}
    return file


def refusal(path):
    """Return the one line with which a file is refused; it names the file."""
    with pytest.raises(vq.InputError) as caught:
        vq.load_vq(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("layout", ["compvis", "llamagen", "llamagen-ema", "own"])
def test_a_file_of_each_layout_gives_its_network(layout, lightning, tmp_path, monkeypatch):
    config = FOREIGN | {"l2_norm": "llamagen" in layout}
    net = random_vq(**config).to(memory_format=torch.channels_last)  # which rounds differently
    torch.save(file_of(layout, config, net.state_dict(), lightning), tmp_path / "a.pt")
    monkeypatch.delitem(sys.modules, lightning.__name__)
    loaded = vq.load_vq(tmp_path / "a.pt")
    assert loaded.l2_norm == net.l2_norm and loaded.factor == 4
    torch.testing.assert_close(loaded.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    codes = net.encode(x)
    assert torch.equal(loaded.encode(x), codes)
    assert torch.equal(loaded.decode(codes), net.decode(codes))
    assert "lightning" not in str(torch.serialization.get_safe_globals())  # no stub stays behind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_depend_on_neither_precision_device_nor_later_state_of_the_file(
        dtype, tiny, tmp_path, monkeypatch):
    state = copy.deepcopy(tiny).to(dtype).state_dict()
    path = tmp_path / "a.pt"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    torch.save({"config": TINY_VQ, "state_dict": state}, path)
    loaded = vq.load_vq(path)
    on_gpu = vq.load_vq(path, "meta")  # which stands for one
    for net, layout in (loaded, torch.channels_last), (on_gpu, torch.contiguous_format):
        assert net.decoder.conv_in.weight.is_contiguous(memory_format=layout)
    path.write_bytes(bytes(path.stat().st_size))  # in place: a mapping of the file would see it
    for key, x in loaded.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, state[key].float())


@pytest.mark.parametrize("name", [
    "posix.system", "builtins.eval", "functools.partial", "lightning.os.system", "argparse.Action",
    "pytorch_lightning_x.Run", "lightning2.Run", "xlightning.Run", "argparse.NamespaceX"])
def test_what_a_pickle_asks_to_call_is_never_called(
        name, lightning, tiny_file, tmp_path, monkeypatch):
    """A trainer's name becomes a stub; any other is refused by name."""
    monkeypatch.chdir(tmp_path)
    lightning.os = types.SimpleNamespace(system=lambda _: Path("executed").touch())
    monkeypatch.setitem(sys.modules, "lightning.os", lightning.os)
    module, function = name.rsplit(".", 1)
    argument = b"X\x0e\0\0\0touch executed"
    call = f"c{module}\n{function}\n(".encode() + argument + b"tR."  # in pickle's own language
    with zipfile.ZipFile("a.pt", "w") as file:
        file.writestr("a/data.pkl", call)
        file.writestr("a/version", "3\n")
    header = [pickle.dumps(x, 2) for x in (torch.serialization.MAGIC_NUMBER, 1001, {})]
    Path("old.pt").write_bytes(b"".join(header) + call + tiny_file.read_bytes())
    refusal("old.pt")  # the archive behind it does not hide the legacy pickle
    if module == "lightning.os":
        assert isinstance(vq.read_checkpoint("a.pt"), vq.Stub)
    else:
        assert name in refusal("a.pt")
    assert not Path("executed").exists()


def test_what_is_no_tokenizer_is_refused(tiny_file, tmp_path):
    file = torch.load(tiny_file)
    torch.save([3], tmp_path / "other.pt")
    torch.save(file, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pt").write_bytes(tiny_file.read_bytes()[:-1000])
    (tmp_path / "text.pt").write_text("<html>404</html>")
    for name in ("other.pt", "cut.pt", "text.pt", "nowhere.pt"):
        refusal(tmp_path / name)
    assert "torch < 1.6" in refusal(tmp_path / "old.pt")  # how to convert it
    state = file["state_dict"]
    for key in ("quant_conv.weight", "quant_conv.more"):  # of another shape, not of the network
        torch.save(file | {"state_dict": state | {key: torch.zeros(5)}}, tiny_file)
        assert key in refusal(tiny_file)
    del state["quant_conv.bias"]
    torch.save(file, tiny_file)
    assert "quant_conv.bias" in refusal(tiny_file)


# ----- pictures

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def opened(image, path, size, **options):
    image.save(path, **options)
    pixels = vq.crop(vq.read_image(path), size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize("width, height", [(96, 32), (32, 96), (97, 32), (32, 99), (1, 1), (5, 31)])
def test_the_crop_is_the_centre_of_a_picture_of_any_shape(width, height, tmp_path):
    image = Image.new("RGB", (width, height), RED)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste(GREEN, (left, top, left + side, top + side))
    assert (opened(image, tmp_path / "a.png", side) == GREEN).all()
    image.paste(GREEN, (0, 0, width, height))
    assert (opened(image, tmp_path / "a.png", 32) == GREEN).all()  # enlarged, where it is too small


@pytest.mark.parametrize("size", [32, 37])
def test_the_crop_is_adms_step_by_step(size, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (151, 221, 3), np.uint8)
    image = Image.fromarray(picture).resize((110, 75), Image.BOX).resize((55, 37), Image.BOX)
    image = image.resize((round(55 * size / 37), size), Image.BICUBIC)
    left = (image.width - size) // 2
    pixels = opened(Image.fromarray(picture), tmp_path / "a.png", size)
    assert np.array_equal(pixels, np.asarray(image)[:, left:left + size])


@pytest.mark.parametrize("mode, colour, suffix, expected", [
    ("L", 99, "jpg", (99, 99, 99)), ("LA", (55, 51), "png", (215,) * 3), ("1", 1, "png", WHITE),
    ("CMYK", (0, 255, 255, 0), "jpg", RED), ("RGBA", (10, 20, 30, 0), "webp", WHITE),
    ("RGB", BLUE, "bmp", BLUE), ("P", "red", "png", RED), ("I;16", 40000, "png", (156,) * 3)])
def test_every_kind_of_picture_becomes_rgb(mode, colour, suffix, expected, tmp_path):
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    pixels = opened(Image.new(mode, (40, 48), colour), tmp_path / f"a.{suffix}", 32, **options)
    assert np.abs(pixels.astype(int) - expected).max() <= (3 if suffix == "jpg" else 0)


def test_transparent_pictures_lie_on_white_and_hide_their_colours(tmp_path):
    grey = np.full((40, 40), 30000, np.uint16)
    grey[:20] = 1000
    pixels = opened(Image.fromarray(grey), tmp_path / "c.png", 40, transparency=1000)
    assert (pixels[:20] == 255).all() and (pixels[20:] == 30000 >> 8).all()
    colours = np.random.default_rng(0).integers(0, 256, (40, 40, 4), np.uint8)
    colours[:20, :, 3] = 0
    colours[20:, :, 3] = 255
    pixels = opened(Image.fromarray(colours), tmp_path / "a.png", 40)
    assert (pixels[:20] == 255).all() and (pixels[20:] == colours[20:, :, :3]).all()
    palette = Image.fromarray(colours[..., :3]).quantize(8)
    index = palette.getpixel((3, 5))
    pixels = opened(palette, tmp_path / "b.png", 40, transparency=index)
    assert (pixels[np.asarray(palette) == index] == 255).all()


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 5000)])
def test_a_thin_picture_is_cut_before_it_is_enlarged(size, tmp_path, monkeypatch):
    resize = Image.Image.resize
    largest = []
    monkeypatch.setattr(Image.Image, "resize", lambda image, to, *how: largest.append(
        to[0] * to[1]) or resize(image, to, *how))
    ramp = np.arange(size[0] * size[1]) % 256
    image = Image.fromarray(ramp.reshape(size[::-1]).astype(np.uint8))
    pixels = opened(image, tmp_path / "a.png", 256)
    assert max(largest) < 10 * 256 * 256
    middle = np.asarray(image, float)[size[1] // 2, size[0] // 2]
    assert abs(pixels[128, 128, 0] - middle) < 20


@pytest.mark.parametrize("orientation, stored", list(enumerate([  # for the upright picture RG / BW
    ("RG", "BW"), ("GR", "WB"), ("WB", "GR"), ("BW", "RG"),
    ("RB", "GW"), ("GW", "RB"), ("WG", "BR"), ("BR", "WG")], 1)))
def test_a_picture_is_turned_upright_by_its_exif_tag(orientation, stored, tmp_path, monkeypatch):
    colours = dict(R=RED, G=GREEN, B=BLUE, W=WHITE)
    picture = np.array([[colours[c] for c in row] for row in stored], np.uint8)
    image = Image.fromarray(picture.repeat(16, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[274] = orientation
    pixels = opened(image, tmp_path / "a.png", 32, exif=exif)
    assert pixels[8::16, 8::16].tolist() == [[[*RED], [*GREEN]], [[*BLUE], [*WHITE]]]
    monkeypatch.delattr(vq.ImageOps, "exif_transpose")  # where it fails, the picture stays as it is
    assert np.array_equal(opened(image, tmp_path / "a.png", 32, exif=exif), np.asarray(image))


def test_pixels_survive_the_way_to_images_and_back_by_rounding():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    x = vq.from_pixels(pixels)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert torch.equal(vq.to_pixels(x), pixels)
    x = torch.tensor([9.6, 10.4, -3., 254.6, 300.]) / 127.5 - 1  # of these grey levels
    assert vq.to_pixels(x.view(1, 1, 1, 5)).flatten().tolist() == [10, 10, 0, 255, 255]


def test_decoded_pixels_are_clamped_and_depend_on_neither_batch_nor_autocast():
    net = random_vq(**TINY_VQ)
    net.decoder.conv_out.weight.mul_(9)
    codes = torch.randint(0, 32, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    alone = torch.cat([net.decoder(net.post_quant_conv(net.embed(c[None]))) for c in codes])
    assert alone.min() < -1 and alone.max() > 1
    assert torch.equal(net.decode(codes[:1]), alone[:1].clamp(-1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.decode_pixels(codes), vq.to_pixels(alone.clamp(-1, 1)))


def test_a_sheet_shows_every_picture_in_its_place(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), np.uint8)
    vq.save_image(tmp_path / "a.png", pixels, columns=2)
    expected = np.full((3 * 6, 2 * 8, 3), 255, np.uint8)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]):
        expected[row * 6 + 1:row * 6 + 5, column * 8 + 1:column * 8 + 7] = pixels[i]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)


# ----- encoding a data set

FILES = "ant/0.png ant/1.JPG ant/2.bmp bee/0.jpg bee/1.png bee/2.webp cat/0.png cat/d/1.png".split()
BAD = FILES[3]  # in the second batch of three


@pytest.fixture
def images(tmp_path):
    """Make an ImageFolder tree of pictures of many kinds and sizes, one of them cut short."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for i, name in enumerate(FILES):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.resize((40 + 5 * i, 70 - 3 * i), Image.BICUBIC).save(root / name)
    (root / BAD).write_bytes((root / BAD).read_bytes()[:200])
    (root / "ant/notes.txt").write_text("not a picture")
    return root


@pytest.fixture
def run(monkeypatch, tiny_file, tmp_path):
    """Run vq.py with these arguments, in small batches; return its files by name."""
    def run(*arguments):
        settings = "--vq", tiny_file, "--out", tmp_path / "out", "--size", 32, "--batch-size", 3
        monkeypatch.setattr(sys, "argv", ["vq.py", *map(str, [*settings, *arguments])])
        vq.main()
        return {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*")}
    return run


def test_a_walk_takes_each_real_folder_once_and_nothing_hidden(images, monkeypatch):
    for name in (".ipynb_checkpoints", "__MACOSX/ant", "ant/.cache"):
        shutil.copytree(images / "cat", images / name)
    shutil.copy(images / "ant/0.png", images / "ant/.0.png")
    shutil.copy(images / "ant/0.png", images / "ant/._1.JPG")
    (images / "ant/again").symlink_to("..")
    (images / "linked").symlink_to(images / "cat")  # no more a class than a second visit
    assert vq.find_images(images) == [images / name for name in FILES]
    elsewhere = images.rename(images.with_name("elsewhere"))
    images.mkdir()
    for name in ("bee", "cat"):  # a tree of links
        (images / name).symlink_to(elsewhere / name)
    assert vq.find_images(images) == [images / name for name in FILES[3:]]
    with pytest.raises(vq.InputError, match="gone: unreadable folder"):
        vq.find_images(images / "gone")


def test_a_class_has_a_readable_picture_and_is_counted_before_encoding(
        run, images, tmp_path, capsys, monkeypatch):
    for name in FILES[3:6]:
        (images / name).write_bytes(b"")
    for name in ("ant/phone.HEIC", "scan.tiff", "notes.txt", "ant/._phone.HEIC"):
        (images / name).write_bytes(b"")
    monkeypatch.setattr(vq.VQ, "encode", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(images)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "5 images: {'ant': 3, 'cat': 2}" and second.startswith("2 HEIC, TIFF")
    assert json.loads((tmp_path / "out/meta.json").read_text())["classes"] == ["ant", "cat"]
    assert np.load(tmp_path / "out/labels.npy").tolist() == [0, 0, 0, 1, 1]


def arrays(folder):
    return [np.load(folder / f"{name}.npy", "r+") for name in ("codes", "codes_flip", "labels")]


def codes_of(net, paths, flip=False):
    pictures = [vq.crop(vq.read_image(path), 32)[:, ::-1 if flip else 1] for path in paths]
    return net.encode(vq.from_pixels(np.stack(pictures))).numpy()


def test_a_tree_is_encoded_class_by_class_without_its_unreadable_pictures(
        run, images, tiny, tmp_path, capsys):
    meta = json.loads(run(images, "--flip")["meta.json"])
    codes, mirrored, labels = arrays(tmp_path / "out")
    assert meta["classes"] == ["ant", "bee", "cat"] and meta["image_size"] == 32
    assert labels.tolist() == [0, 0, 0, -1, 1, 1, 2, 2]
    paths = [images / name for name in FILES if name != BAD]
    assert np.array_equal(codes[labels >= 0], codes_of(tiny, paths))
    assert np.array_equal(mirrored[labels >= 0], codes_of(tiny, paths, flip=True))
    assert codes.dtype == np.uint16 and codes.max() < 32 and len(np.unique(codes)) > 8
    printed = capsys.readouterr().out
    assert str(images / BAD) in printed and str(paths[0]) not in printed
    assert "7 images of 3 classes, 1 left out" in printed
    first = np.stack([vq.crop(vq.read_image(path), 32) for path in paths[:3]])
    again = tiny.decode_pixels(torch.from_numpy(codes[:3].astype(int))).numpy()
    mse = np.square(first.astype(float) - again).mean()
    assert f"PSNR of a few: {10 * np.log10(255 ** 2 / mse):.1f} dB" in printed
    assert "--model DiT-demo/2 --global-batch-size 64" in printed  # not the paper's run


def test_a_flat_folder_is_one_class_and_one_without_a_readable_picture_is_refused(run, images):
    files = run(images / "bee")
    assert json.loads(files["meta.json"])["classes"] == ["bee"]
    assert files.keys() == {"codes.npy", "labels.npy", "meta.json"}
    for name in FILES[4:6]:
        (images / name).write_bytes(b"")
    shutil.rmtree(images.parent / "out")
    with pytest.raises(vq.InputError, match=str(images)):
        run(images / "bee")


@pytest.mark.parametrize("empty, todo", [
    (np.s_[3:, 3:], 5), (np.s_[:0, 3:6], 3), (np.s_[1::2, 1::2], 4), (np.s_[(7, 3, 3), :0], 1),
    (np.s_[:0, :0], 0)])  # of codes.npy and codes_flip.npy
def test_a_folder_begun_goes_on_where_it_stopped(empty, todo, run, images, tmp_path, monkeypatch):
    whole = run(images, "--flip")
    *maps, labels = arrays(tmp_path / "out")
    for codes, rows in zip(maps, empty):
        codes[rows] = vq.EMPTY
    if (maps[0][3] == vq.EMPTY).any():  # a row is known to be bad once it is done
        labels[3] = 1
    encoded = []
    encode = vq.VQ.encode
    monkeypatch.setattr(vq.VQ, "encode", lambda net, x: encoded.extend(x) or encode(net, x))
    assert run(images, "--flip") == whole
    assert len(encoded) == 2 * todo  # with the mirrored images; nothing is repeated


@pytest.mark.parametrize("name, size", [
    ("codes.npy", 300), ("codes_flip.npy", 0), ("labels.npy", 150)])
def test_damaged_arrays_are_refused_and_lost_ones_made_anew(name, size, run, images, tmp_path):
    whole = run(images, "--flip")
    os.truncate(tmp_path / "out" / name, size)  # numpy would map zeros behind its end
    with pytest.raises(vq.InputError, match=f"{tmp_path}/out: damaged; remove it"):
        run(images, "--flip")
    assert os.path.getsize(tmp_path / "out" / name) == size
    (tmp_path / "out/labels.npy").unlink()
    assert run(images, "--flip") == whole
    array = np.load(tmp_path / "out" / name)
    np.save(tmp_path / "out" / name, array[:5])  # of other images
    with pytest.raises(vq.InputError, match=f"{tmp_path}/out: damaged; .*other images"):
        run(images, "--flip")


def test_a_process_waits_for_the_first_and_encodes_the_rows_of_its_number(
        run, images, tmp_path, monkeypatch):
    whole = run(images, "--flip")
    begun = (tmp_path / "out").rename(tmp_path / "begun")
    (tmp_path / "out").mkdir()
    for codes in arrays(begun)[:2]:
        codes[:] = vq.EMPTY
    steps = iter(["meta.json", "codes.npy", "codes_flip.npy", "labels.npy"])
    monkeypatch.setattr(time, "sleep", lambda _: shutil.copy(begun / next(steps), tmp_path / "out"))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "1")
    run(images, "--flip")
    for codes in arrays(tmp_path / "out")[:2]:
        assert (codes == vq.EMPTY).all((1, 2)).tolist() == [True] * 4 + [False] * 4
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run(images, "--flip") == whole


@pytest.mark.parametrize("change", [
    "flip", "size", "images", "pixels", "time", "weights", "note"])
def test_a_folder_of_other_settings_or_files_is_refused(change, run, images, tiny_file, tmp_path):
    before = run(images)
    if change == "weights":  # trained anew: the same name
        file = torch.load(tiny_file)
        file["state_dict"]["quant_conv.bias"] += 1
        torch.save(file, tiny_file)
    if change == "images":
        (images / "cat/0.png").unlink()
    if change in ("pixels", "time"):  # others under the same name
        times = (images / "cat/0.png").stat()
        if change == "pixels":
            shutil.copy(images / "cat/d/1.png", images / "cat/0.png")
        later = times.st_mtime + (change == "time")
        os.utime(images / "cat/0.png", (later, later))
    if change == "note":
        (tmp_path / "out/meta.json").unlink()
    flags = {"flip": ["--flip"], "size": ["--size", 64]}.get(change, [])
    key = {"flip": "flip is False there, True here", "size": "image_size is 32",
           "weights": "tokenizer_sha256", "note": "classes is None", "pixels": "files"}
    with pytest.raises(vq.InputError, match=f"--out .*{key.get(change, '')}"):
        run(images, *flags)
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert after.items() <= before.items()


def test_a_tokenizer_may_move_between_two_commands(run, images, tiny_file):
    before = run(images)
    moved = tiny_file.rename(tiny_file.with_name("moved.pt"))
    after = run(images, "--vq", moved)
    assert json.loads(after["meta.json"])["tokenizer"] == str(moved)
    assert {**before, "meta.json": 0} == {**after, "meta.json": 0}


def test_of_two_writers_of_a_file_the_last_whole_one_wins(tmp_path):
    path = tmp_path / "a"
    with vq.write_whole(path) as one, vq.write_whole(path) as other:
        one.write(b"1" * 9)
        other.write(b"2" * 99)
    assert path.read_bytes() == b"1" * 9 and list(tmp_path.iterdir()) == [path]


def test_any_name_can_be_printed_on_any_terminal(images, tiny_file, tmp_path):
    """A file name that is not UTF-8, a class with an accent, and an output of ASCII."""
    (images / "cat/0.png").rename(images / "cat" / os.fsdecode(b"\xff.png"))
    (images / "ant").rename(images / "é")
    (images / "cat" / os.fsdecode(b"\xfe.png")).write_bytes(b"")
    command = [sys.executable, vq.__file__, images, "--vq", tiny_file, "--out", tmp_path / "out",
               "--size", 32]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ
                            | {"PYTHONIOENCODING": "ascii:strict", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert "\\udcfe.png" in result.stdout and "{'bee': 3, 'cat': 3, '\\xe9': 3}" in result.stdout


def test_batches_come_in_order_and_are_not_read_far_ahead():
    started = []
    def slow(x):
        started.append(x)
        time.sleep(0.01 * (x % 2))  # of two threads one is always late
        return x
    items = list(range(20))
    ahead = vq.read_ahead(slow, items, 2)
    first = next(ahead)
    time.sleep(0.2)  # time to read on
    assert len(started) <= 6
    assert [first, *ahead] == [([i, i + 1], [i, i + 1]) for i in items[::2]]


def test_reconstruct_shows_both_pictures_and_prints_their_psnr(
        images, tiny_file, tmp_path, capsys):
    paths = images / "ant/0.png", images / "cat/0.png"
    flags = *paths, "--vq", tiny_file, "--size", 32, "--out", tmp_path / "out.png"
    reconstruct.main([*map(str, flags)])
    lines = capsys.readouterr().out.splitlines()
    originals = np.stack([vq.crop(vq.read_image(path), 32) for path in paths])
    net = vq.load_vq(tiny_file)  # channels-last, which rounds differently
    again = net.decode_pixels(net.encode(vq.from_pixels(originals))).numpy()
    page = vq.sheet([originals[0], again[0], originals[1], again[1]], 2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), page)
    psnr = 20 * np.log10(255 / np.sqrt(np.mean((originals[1].astype(float) - again[1]) ** 2)))
    assert lines[1].endswith(f"0.png: PSNR {psnr:.2f} dB")


def test_wrong_folders_sizes_and_codebooks_are_refused(run, images, tiny_file):
    shutil.copy(images / "ant/0.png", images / "stray.png")
    wrong = [("stray.png", [images]), ("nowhere", [images / "nowhere"])]  # mixed; empty
    wrong += [("--size: give", [images / "bee", "--size", n]) for n in (30, 0, -8)]
    for word, arguments in wrong:
        with pytest.raises(vq.InputError, match=word):
            run(*arguments)
    config = TINY_VQ | {"n_embed": 2 ** 16}  # its last code would mean EMPTY
    torch.save({"config": config, "state_dict": vq.VQ(**config).state_dict()}, tiny_file)
    with pytest.raises(vq.InputError, match="--vq"):
        run(images / "bee")


def test_a_process_has_torchruns_number_a_gpu_of_its_own_and_exact_products(monkeypatch):
    used = []
    torch.set_float32_matmul_precision("high")  # as NVIDIA's containers do
    assert vq.setup_process() == (0, 1, torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert vq.setup_process() == (0, 1, torch.device("cuda", 0))
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
           "MASTER_PORT": "29500"}
    monkeypatch.setattr(vq, "os", types.SimpleNamespace(environ=env))
    assert vq.setup_process() == (5, 8, torch.device("cuda", 1))
    assert used == [torch.device("cuda", 0), torch.device("cuda", 1)]
    for wrong in ({"RANK": None}, {"RANK": "8"}, {"RANK": "x"}, {"WORLD_SIZE": "-1"}, {"RANK": ""},
                  {"MASTER_PORT": None}, {"MASTER_ADDR": ""}):
        broken = {name: x for name, x in (env | wrong).items() if x is not None}
        monkeypatch.setattr(vq, "os", types.SimpleNamespace(environ=broken))
        with pytest.raises(vq.InputError, match="RANK .*torchrun"):
            vq.setup_process()
