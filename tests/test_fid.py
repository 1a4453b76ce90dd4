"""Check fid.py: closed forms of the distance, the published network, every kind of input and refusal."""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import fid

torch.set_num_threads(min(2, torch.get_num_threads()))
ROOT = Path(fid.__file__).parent


# ------------------------------ the distance

def covariance(d, seed, n=None):
    x = np.random.default_rng(seed).normal(size=(n or 4 * d, d)) * np.linspace(0.1, 3, d)
    return x.T @ x / len(x)


A, B = covariance(32, 1), covariance(32, 2)
VARIANCES = np.random.default_rng(0).uniform(0, 4, (2, 32))


@pytest.mark.parametrize("shift, S1, S2, expected", [
    (0, A, A, 0),
    (0.5, A, A, 32 * 0.25),
    (0, A, 0 * A, np.trace(A)),
    (0, 0 * A, A, np.trace(A)),
    (0, *map(np.diag, VARIANCES), np.square(np.subtract(*np.sqrt(VARIANCES))).sum()),
    (1, A, B, 32 + np.trace(A) + np.trace(B) - 2 * np.trace(scipy.linalg.sqrtm(A @ B)).real),
], ids=["itself", "equal covariances: that of the means", "to a point: the trace", "from a point",
        "diagonal: that of the standard deviations", "the formula with sqrtm"])
def test_distance_in_closed_form(shift, S1, S2, expected):
    value = fid.frechet_distance(np.arange(32), S1, np.arange(32) + shift, S2)
    assert value >= 0
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("n1, n2", [(20, 30), (20, 200), (1, 20)])
def test_distance_is_right_for_fewer_samples_than_features_and_symmetric(n1, n2):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n1, 64)) / np.sqrt(n1)
    Y = rng.normal(size=(n2, 64)) / np.sqrt(n2) * 2
    # With S1 = X^T X and S2 = Y^T Y, tr (S1 S2)^(1/2) is the sum of the singular values of X Y^T.
    expected = np.square(X).sum() + np.square(Y).sum() - 2 * scipy.linalg.svdvals(X @ Y.T).sum()
    value = fid.frechet_distance(np.zeros(64), X.T @ X, np.zeros(64), Y.T @ Y)
    swapped = fid.frechet_distance(np.zeros(64), Y.T @ Y, np.zeros(64), X.T @ X)
    assert value == pytest.approx(expected, rel=1e-6)
    assert swapped == pytest.approx(expected, rel=1e-6) and swapped == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("mu, sigma", [((3,), (3, 3)), ((4,), (4,)), ((4, 4), (4, 4)), ((4,), (4, 3))])
def test_distance_refuses_shapes_that_do_not_fit(mu, sigma):
    with pytest.raises(ValueError, match="mu"):
        fid.frechet_distance(np.zeros(4), np.eye(4), np.zeros(mu), np.zeros(sigma))


def test_statistics_are_those_of_numpy_in_float64_and_leave_the_features_alone():
    x = 1000 + np.random.default_rng(0).normal(size=(50, 7))
    before = x.copy()
    mu, sigma = fid.statistics(x)
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    assert np.array_equal(x, before) and fid.statistics(x.astype(np.float32))[1].dtype == np.float64


# ------------------------------ the network

# The published file: convolutions in the order in which they run, each with a batch norm, and fc.
CONVS = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
for blocks, steps in {
    "5b 5c 5d": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "6a": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "6b 6c 6d 6e": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "7a": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "7b 7c": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool",
}.items():
    CONVS += [f"Mixed_{block}.branch{step}" for block in blocks.split() for step in steps.split()]
TENSORS = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
PUBLISHED = [f"{conv}.{tensor}" for conv in CONVS for tensor in TENSORS] + ["fc.weight", "fc.bias"]


def own_keys(net):
    """Return the network's keys in the order in which it runs, but for num_batches_tracked."""
    return [key for key in net.state_dict() if not key.endswith("num_batches_tracked")]


def as_published(net):
    """Return the network's state under the published names, without the help of our_name."""
    return {name: net.state_dict()[key] for name, key in zip(PUBLISHED, own_keys(net), strict=True)}


@pytest.fixture(scope="module")
def network():
    """Return a network of random weights, with batch norms that matter."""
    torch.manual_seed(0)
    net = fid.InceptionV3().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1)
    return net


def pixels(n, h, w, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator)


def test_resize_takes_output_pixel_i_at_i_times_the_ratio():
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    x = fid.resize(ramp)
    expected = (torch.arange(299) * 64 / 299).clamp(max=63)         # beyond the last pixel: the last
    torch.testing.assert_close(x[0, 0, 17], expected)
    torch.testing.assert_close(fid.resize(ramp.mT)[0, 0, :, 17], expected)
    assert x[0, 0, 0, 298] == 63 and x[0, 0, 0, 1] == pytest.approx(64 / 299)
    half = fid.resize(torch.tensor([[0.0, 10.0], [20.0, 50.0]])[None, None], size=4)[0, 0]
    assert half.tolist() == [[0, 5, 10, 10], [10, 20, 30, 30], [20, 35, 50, 50], [20, 35, 50, 50]]
    same = pixels(1, 299, 299).float()
    assert torch.equal(fid.resize(same), same)


def test_published_keys_become_ours_one_to_one_and_the_sizes_agree(network):
    assert len(PUBLISHED) == 94 * 5 + 2
    assert [fid.our_name(key) for key in PUBLISHED] == own_keys(network)
    state = as_published(network)
    assert sum(v.numel() for v in state.values()) == 23_885_392           # and headers: 95,628,359 bytes
    shapes = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.bn.running_var": (192,),
              "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5), "Mixed_5d.branch_pool.bn.bias": (64,),
              "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
              "Mixed_6c.branch7x7dbl_5.conv.weight": (192, 160, 1, 7),
              "Mixed_6e.branch7x7_3.conv.weight": (192, 192, 7, 1),
              "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
              "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
              "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
              "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
              "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_pixels_enter_as_x_minus_128_over_128_and_batch_norms_have_tensorflows_epsilon(network):
    entered = []
    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, x: entered.append(x[0]))
    network(torch.tensor([0, 64, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    hook.remove()
    assert entered[0].shape == (1, 3, 299, 299)
    assert entered[0].amax((0, 2, 3)).tolist() == [-1, -0.5, 127 / 128]
    assert {m.eps for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.001}


@pytest.mark.parametrize("name, c, kind", [
    ("Mixed_5b", 192, "mean"), ("Mixed_6b", 768, "mean"),
    ("Mixed_7b", 1280, "mean"), ("Mixed_7c", 2048, "max")])
@torch.inference_mode()
def test_average_pools_leave_the_padding_out_and_the_last_block_takes_the_maximum(network, name, c, kind):
    x = torch.randn(1, c, 9, 9)
    padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)           # [1,c,h,w,9]
    inside = windows.isfinite()
    pools = {"mean": torch.where(inside, windows, 0).sum(-1) / inside.sum(-1), "max": windows.amax(-1)}
    block = network.get_submodule(name)
    conv = block["branch_pool"][1]
    out = block(x)[:, -conv.conv.out_channels:]
    assert [key for key, pool in pools.items() if torch.allclose(out, conv(pool), atol=1e-4)] == [kind]


@pytest.mark.slow
def test_loading_and_freezing_change_no_feature(network, tmp_path):
    counters = {f"{conv}.bn.num_batches_tracked": torch.tensor(0) for conv in CONVS}
    torch.save(as_published(network) | counters, tmp_path / "w.pth")
    frozen, x = fid.load_inception(tmp_path / "w.pth"), pixels(2, 40, 56)
    assert not any("bn" in key for key in frozen.state_dict())
    features = frozen(x)
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    torch.testing.assert_close(features, network(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(features[1:], frozen(x[1:]), atol=1e-4, rtol=0)
    with pytest.raises(TypeError, match="uint8"):
        frozen(x.float() / 255)


def test_untrained_features_depend_on_the_seed_alone():
    convs = []
    for seed, state in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(state)
        convs.append(fid.untrained_inception(seed).Mixed_7c.branch1x1.conv)
    assert torch.equal(convs[0].weight, convs[1].weight) and not torch.equal(convs[0].weight, convs[2].weight)
    assert convs[0].weight.std() == pytest.approx((2 / 2048) ** 0.5, rel=0.01)
    assert convs[0].bias.abs().max() == 0


# ------------------------------ its weights

FILE_NAMES = ["weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"]


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    """Return the path of random weights in the published form, without num_batches_tracked."""
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(as_published(network), path)
    return path


def refusal(path=None):
    with pytest.raises(fid.InputError) as error:
        fid.load_inception(path)
    sentence = str(error.value)
    assert fid.URL in sentence and "--weights" in sentence and "\n" not in sentence
    return sentence


def test_loader_takes_either_name_from_the_hub_cache_else_downloads(weights, network, tmp_path, monkeypatch):
    def offline(url, path, hash_prefix, **_):
        assert url == fid.URL and Path(path) == cache / FILE_NAMES[0] and hash_prefix.startswith("6726825d")
        raise OSError("no route to host")

    cache = tmp_path / "checkpoints"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert "no route to host" in refusal()
    for name in FILE_NAMES:
        (cache / name).symlink_to(weights)
        net = fid.load_inception()
        (cache / name).unlink()
        assert torch.equal(net.fc.weight, network.fc.weight)
        assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.slow
def test_loader_refuses_another_networks_file(weights, tmp_path):
    state = torch.load(weights)
    classes = {"fc.weight": torch.zeros(1000, 2048)}
    head = {"AuxLogits.fc.weight": torch.zeros(1000, 768)}
    missing = {key: value for key, value in state.items() if key != "Mixed_6b.branch1x1.bn.bias"}
    for other, word in ((state | classes | head, "AuxLogits.fc.weight"),           # torchvision's
                        (state | head, "AuxLogits.fc.weight"),
                        (state | classes, "fc.weight"),
                        (missing, "Mixed_6b.branch1x1.bn.bias"),
                        ({"state_dict": state}, ""),
                        (torch.zeros(3), "")):
        torch.save(other, tmp_path / "other.pth")
        sentence = refusal(tmp_path / "other.pth")
        assert "other.pth" in sentence and word in sentence


def test_loader_refuses_missing_damaged_and_malicious_files(weights, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"fc.bias": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1_000_000])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for name in ("evil.pth", "cut.pth", "empty.pth", "text.pth", "nothing.pth"):
        assert name in refusal(tmp_path / name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for name in FILE_NAMES:
        (tmp_path / "evil.pth").rename(tmp_path / "checkpoints" / name)
        refusal()
        (tmp_path / "checkpoints" / name).rename(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


# ------------------------------ the command

class Colours(torch.nn.Module):
    """Stand in for Inception: 5 features of an image, at no cost."""

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        x = x.float()
        return torch.cat([x.mean((2, 3)), x[:, :2].std((2, 3))], 1)


@pytest.fixture
def cheap(monkeypatch, tmp_path):
    """Work with that network in an empty folder."""
    monkeypatch.setattr(fid, "untrained_inception", Colours)
    monkeypatch.setattr(fid, "load_inception", lambda path=None: Colours())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pair(cheap):
    """Make the folders a and b, of 7 and 5 images."""
    folder("a", 7)
    folder("b", 5, seed=1)


def folder(path, n, seed=0):
    Path(path).mkdir()
    for i, x in enumerate(pixels(n, 10, 12, seed)):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(f"{path}/{i:06d}.png")


def array(path, n, seed=0, **more):
    np.savez(path, arr_0=pixels(n, 10, 12, seed).permute(0, 2, 3, 1).numpy(), **more)


def command(*argv):
    fid.main(["--num-workers", "2", *map(str, argv)])


def run(capsys, *argv):
    """Run the command and return its number, the last thing printed, and its last line."""
    command(*argv)
    line = capsys.readouterr().out.splitlines()[-1]
    return float(line.split()[-1]), line


def refused(capsys, *argv):
    """Run the command and return the one sentence with which it ends."""
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    if stop.value.code == 2:                               # argparse: usage, then the sentence
        return capsys.readouterr().err.splitlines()[-1]
    assert isinstance(stop.value, fid.InputError)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code   # Python prints it, exit code 1
    return stop.value.code


@pytest.mark.slow
def test_a_folder_against_itself_gives_zero_on_the_real_network(tmp_path, capsys):
    folder(tmp_path / "images", 3)
    command(tmp_path / "images", "--ref", tmp_path / "images", "--features", "untrained")
    printed = capsys.readouterr()
    assert abs(float(printed.out.split()[-1])) < 1e-3 and "(not FID) of 3 images" in printed.out
    assert printed.err.count("singular") == 2


def test_folders_and_arrays_of_the_same_images_agree_whatever_the_batch(pair, capsys):
    array("a.npz", 7)
    expected, line = run(capsys, "a", "--ref", "b")
    assert line.startswith("FID on Inception features of 7 images") and expected > 1
    for side in ("a", "a.npz"):
        for batch in (1, 3, 7, 100):
            value, line = run(capsys, side, "--ref", "b", "--batch-size", batch)
            assert value == pytest.approx(expected, rel=1e-4)
            assert "of 7 images" in line and "against 5 " in line


def test_threads_read_every_image_in_its_place_and_few_batches_ahead(pair, monkeypatch):
    seen, read = [], fid.read_image
    monkeypatch.setattr(fid, "read_image", lambda path: seen.append(path) or read(path))
    batches = fid.read_folder(sorted(Path("a").iterdir()), argparse.Namespace(batch_size=1, num_workers=2))
    found = [next(batches)]
    time.sleep(0.2)                                        # time to read on, were they to
    assert len(seen) <= 3
    found += batches
    assert np.array_equal(np.concatenate(found), pixels(7, 10, 12).permute(0, 2, 3, 1).numpy())


def test_every_kind_of_image_is_found_below_a_folder_and_below_links(cheap, capsys):
    for name, mode in (("a/1.PNG", "RGBA"), ("a/2.png", "P"), ("b/3.jpg", "CMYK"), ("b/c/4.JPEG", "L"),
                       ("5.webp", "RGB"), ("6.Bmp", "RGB")):
        path = Path("images", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (200, 30, 30)).convert(mode).save(path)
    Path("images/notes.txt").write_text("not an image")
    assert "of 6 images" in run(capsys, "images", "--ref", "images")[1]
    Path("images/link").symlink_to(Path("images/a").absolute())
    assert "of 8 images" in run(capsys, "images", "--ref", "images")[1]


def test_saved_statistics_give_the_same_number_as_the_images(pair, capsys):
    value, _ = run(capsys, "a", "--ref", "b", "--save-stats", "a.npz")
    run(capsys, "b", "--ref", "a", "--save-stats", "b.npz")
    assert run(capsys, "a", "--ref", "b.npz")[0] == value
    again, line = run(capsys, "a.npz", "--ref", "b.npz")
    assert again == value and "of 7 images (a.npz) against 5 " in line


def test_statistics_of_other_features_are_not_taken_for_these(pair, capsys):
    for features in ("inception", "untrained"):
        run(capsys, "b", "--ref", "a", "--save-stats", f"{features}.npz", "--features", features)
        run(capsys, "a", "--ref", f"{features}.npz", "--features", features)
    np.savez("foreign.npz", mu=np.zeros(5), sigma=np.eye(5))
    for other, features in (("inception", "untrained"), ("untrained", "inception"), ("foreign", "untrained")):
        for argv in (("a", "--ref", f"{other}.npz"), (f"{other}.npz", "--ref", "a")):
            sentence = refused(capsys, *argv, "--features", features)
            assert f"{other}.npz" in sentence and features in sentence


def test_statistics_beside_images_are_what_counts(pair, capsys):
    """ADM's reference batch: 10,000 images, and the statistics of the whole training set."""
    foreign = {"mu": np.full(5, 3.0), "sigma": np.eye(5)}
    array("images.npz", 4)
    array("adm.npz", 4, **foreign, mu_s=np.zeros(9))
    np.savez("plain.npz", **foreign)
    value, line = run(capsys, "a", "--ref", "adm.npz")
    assert value == run(capsys, "a", "--ref", "plain.npz")[0] and "an unknown number" in line
    # Foreign statistics are Inception's: for other features the images count.
    other, line = run(capsys, "a", "--ref", "adm.npz", "--features", "untrained")
    assert other == run(capsys, "a", "--ref", "images.npz")[0] != value and "against 4 " in line


def test_save_stats_writes_a_whole_file_or_none(pair, capsys, monkeypatch):
    class Interruption:
        def __array__(self, dtype=None, copy=None):
            raise KeyboardInterrupt                        # in the middle of writing: mu comes first

    run(capsys, "b", "--ref", "a", "--save-stats", "old.npz")
    before = Path("old.npz").read_bytes()
    monkeypatch.setattr(fid, "statistics", lambda features: (np.zeros(5), Interruption()))
    for name in ("old.npz", "new.npz"):
        with pytest.raises(KeyboardInterrupt):
            command("a", "--ref", "b", "--save-stats", name)
    assert Path("old.npz").read_bytes() == before and not Path("new.npz").exists()


# ------------------------------ what sample.py recorded

RECORD = {"num_samples": 6, "reference": "reference.npz", "features": "untrained"}


@pytest.fixture
def samples(cheap):
    """Make what sample.py leaves: samples/, samples.npz and their record; and the reference."""
    folder("samples", 6)
    array("samples.npz", 6)
    array("reference.npz", 5, seed=1)
    Path("samples.json").write_text(json.dumps({"tau": 0.9, **RECORD}))


def test_reference_and_features_are_those_that_sample_py_recorded(samples, capsys):
    value, line = run(capsys, "samples/")
    assert line.startswith("Fréchet distance on untrained features (not FID) of 6 images (samples)")
    assert "against 5 " in line
    assert value == run(capsys, "samples", "--ref", "reference.npz", "--features", "untrained")[0]
    assert value == run(capsys, "samples.npz")[0]
    assert run(capsys, "samples", "--features", "inception")[1].startswith("FID on Inception features")


FOREIGN = [{}, [1, 2], {"data": [1]}, {"num_samples": "many"}, RECORD | {"num_samples": "many"},
           RECORD | {"features": "clip"}, RECORD | {"features": [1]}, RECORD | {"reference": None}]


@pytest.mark.parametrize("text", ["", "{", *map(json.dumps, FOREIGN)])
def test_without_a_recorded_reference_one_must_be_named(samples, capsys, text):
    Path("samples.json").write_text(text)
    sentence = refused(capsys, "samples")
    assert "samples" in sentence and "--ref" in sentence
    assert run(capsys, "samples", "--ref", "samples")[0] == pytest.approx(0, abs=1e-6)


def test_unfinished_samples_are_refused(samples, capsys):
    array("samples.npz", 5)                                # written whole, so it holds what was wanted
    assert run(capsys, "samples.npz")[0] > 0
    Path("samples/000003.png").unlink()
    for argv in ([], ["--ref", "reference.npz"]):
        sentence = refused(capsys, "samples", *argv)
        assert "samples" in sentence and "6" in sentence


# ------------------------------ refusals

@pytest.mark.filterwarnings("ignore:Exception ignored in")          # numpy leaves the file open that is no archive
def test_every_bad_input_is_refused_in_one_sentence(pair, capsys):
    Path("empty").mkdir()
    for name, n in (("one", 1), ("mixed", 3), ("text", 3), ("cut", 3)):
        folder(name, n)
    Image.new("RGB", (8, 8)).save("mixed/000001.png")
    Path("text/000001.png").write_bytes(b"not an image")
    Path("cut/000001.png").write_bytes(Path("a/000001.png").read_bytes()[:200])
    Path("image.png").write_bytes(Path("a/000001.png").read_bytes())
    np.savez("keys.npz", images=np.zeros(3))
    np.savez("float.npz", arr_0=np.zeros((4, 8, 8, 3), np.float32))
    np.savez("planes.npz", arr_0=np.zeros((4, 3, 8, 8), np.uint8))
    np.savez("pickled.npz", arr_0=np.array([{}, {}]))
    np.savez("flat.npz", mu=np.zeros(5), sigma=np.zeros(5))
    np.savez("scalar.npz", mu=1.0, sigma=1.0)
    np.savez("words.npz", mu=np.full(5, "a"), sigma=np.full((5, 5), "b"))
    np.savez("half.npz", mu=np.zeros(5))
    np.savez("wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    array("single.npz", 1)
    array("cut.npz", 9)
    Path("cut.npz").write_bytes(Path("cut.npz").read_bytes()[:900])
    Path("text.npz").write_text("not a zip file")
    assert "--ref" in refused(capsys, "a")
    for bad, *words in (
            ["missing"], ["missing.npz"], ["image.png"], ["text.npz"], ["cut.npz"], ["pickled.npz"],
            ["scalar.npz"], ["words.npz"], ["text/000001.png"], ["cut/000001.png"], ["empty", "0"],
            ["one", "1"], ["single.npz", "1"], ["mixed/000001.png", "mixed/000000.png", "(8, 8", "(10, 12"],
            ["float.npz", "float32", "(4, 8, 8, 3)"], ["planes.npz", "uint8", "(4, 3, 8, 8)"],
            ["keys.npz", "arr_0"], ["flat.npz", "mu", "sigma"], ["half.npz", "sigma"],
            ["wide.npz", "9", "5"]):
        side = bad.split("/")[0]
        for argv in ((side, "--ref", "a"), ("a", "--ref", side)):
            sentence = refused(capsys, *argv)
            assert all(word in sentence for word in [bad, *words]), sentence


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_statistics_that_are_not_finite_are_refused(pair, capsys, bad):
    for place in ((0, 0), (3, 2), ([2, 4], [3, 1])):       # in mu, on sigma's diagonal, off it
        rows = np.vstack([np.zeros(5), 4 * np.eye(5)])
        rows[place] = bad
        np.savez("stats.npz", mu=rows[0], sigma=rows[1:])
        for argv in (("stats.npz", "--ref", "a"), ("a", "--ref", "stats.npz")):
            assert "stats.npz" in refused(capsys, *argv)


@pytest.mark.parametrize("argv, word", [
    (["--batch-size", 0], "--batch-size"),
    (["--num-workers", 0], "--num-workers"),
    (["--save-stats", "no/where.npz"], "where.npz"),
    (["--save-stats", "stats.dat"], "stats.dat"),
    (["--save-stats", "folder.npz"], "folder.npz"),
    (["--features", "clip"], "--features"),
    (["--features", "untrained", "--weights", "w.pth"], "--weights"),
])
def test_bad_flags_are_refused(pair, capsys, argv, word):
    Path("folder.npz").mkdir()
    assert word in refused(capsys, "a", "--ref", "b", *argv)


def test_torchrun_is_refused(pair, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused(capsys, "a", "--ref", "b")


@pytest.mark.slow
def test_ctrl_c_while_threads_read_ends_in_one_line(pair):
    program = """if True:
        import os, runpy, signal
        from PIL import Image
        once = iter([signal.SIGINT])
        Image.open = lambda path, **_: [os.kill(os.getpid(), number) for number in once]
        runpy.run_path("fid.py", run_name="__main__")"""
    argv = [sys.executable, "-c", program, Path("a").absolute(), "--ref", ROOT, "--features", "untrained"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "interrupted\n")


@pytest.mark.slow
def test_nothing_of_the_project_is_imported():
    program = "import fid, sys; sys.exit(bool({'vq', 'model', 'flow', 'train', 'sample'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
