"""sample.py, and the documented commands one after the other."""
import json
import os
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_fid import as_published
from test_train import ROOT, TORCHRUN, call, run_fixture  # noqa: F401

import fid
import sample
import train
from vq import InputError


@pytest.fixture
def trained(run):
    """Train a few steps in an empty folder, in which the test works."""
    run("a", "--steps", 24, "--lr", 1e-2, "--ema-decay", 0.5)


def make(out, *flags, n=6):
    sample.main(["--out", out, "--steps", "3", "--num-samples", str(n), *map(str, flags)])
    return np.stack([np.asarray(Image.open(f"{out}/{i:06d}.png")) for i in range(n)])


def record(out):
    return json.loads(Path(f"{out}.json").read_text())


def test_an_image_depends_on_seed_and_index_alone(trained):
    a = make("a", "--per-proc-batch-size", 6)
    assert (a[0] != a[3]).any()  # of the same class
    assert (a == make("b", "--per-proc-batch-size", 1)).all()
    assert (a == make("c", "--per-proc-batch-size", 4, n=9)[:6]).all()
    assert (a != make("d", "--seed", 1)).any()


@pytest.mark.parametrize("number", [3, 5])
def test_a_command_that_a_full_disk_ended_goes_on(trained, monkeypatch, number):
    def save(path, *pixels):
        if path == Path(f"a/{number:06d}.png"):
            raise InputError(f"{path}: the disk is full")
        save_image(path, *pixels)

    save_image = sample.save_image
    whole = make("whole")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="a/.*: the disk is full"):
        patch.setattr(sample, "save_image", save)
        patch.setattr(sample, "wait_for", lambda ready: None)  # it would wait for ever
        make("a", "--per-proc-batch-size", 1)
    assert sorted(os.listdir("a")) == [f"{i:06d}.png" for i in range(number)]
    kept = os.stat("a/000001.png").st_mtime_ns
    assert (make("a") == whole).all() and os.stat("a/000001.png").st_mtime_ns == kept
    assert (make("a", n=8)[:6] == whole).all() and record("a")["num_samples"] == 8


def test_images_of_other_settings_are_not_mixed(trained):
    make("a", "--tau", 0.9)
    before = record("a")
    for out, flags, reason in (
            ("a", ("--tau", 0.5), "tau is 0.9 there, 0.5 here"),
            ("a", ("--order", 2), r"interval is None there, \[0, 1\] here"),
            ("runs", (), "taken, give another")):
        with pytest.raises(InputError, match=f"--out {out}: .*{reason}"):
            make(out, *flags)
    with pytest.raises(SystemExit):
        make(".")
    assert record("a") == before and not Path("runs.json").exists()
    shutil.rmtree("a")  # without its images, a record does not stand in the way
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "fill_folder", Mock(side_effect=KeyboardInterrupt))
        make("a", "--tau", 0.5)
    assert not Path("a.png").exists()  # the sheet does not outlive its images
    assert (make("a", "--tau", 0.5) == make("c", "--tau", 0.5)).all()


def test_settings_change_the_images_and_are_recorded(trained, tiny_data):
    a = make("a", "--cfg-scale", 3)
    assert record("a") == dict(
        ckpt=str(Path("runs/a/ckpt.pt").resolve()), step=24,
        tau=0.9, cfg_scale=3, steps=3, seed=0, classes=[0, 1, 2], bf16=False,
        num_samples=6, reference=str(tiny_data / "reference.npz"), weights=record("a")["weights"])
    with Image.open("a.png") as page:
        assert page.size == (9 * 34, 34)  # three rounds of three classes, one begun
    for name, flags, value in (
            ("cfg_scale", ("--cfg-scale", 1), 1), ("tau", ("--tau", 0.1), 0.1),
            ("bf16", ("--bf16",), True), ("order", ("--order", 2), 2),
            ("interval", ("--cfg-interval", 0.9, 1), [0.9, 1]),
            ("tau_end", ("--tau-end", 0.1), 0.1)):
        assert (make(name, "--cfg-scale", 3, *flags) != a).any(), name
        assert record(name)[name] == value
    # None of the three steps is in the interval, and so none was guided.
    assert Path("interval.png").read_bytes() == Path("cfg_scale.png").read_bytes()


def test_classes_are_taken_in_turn_by_name_or_number(trained):
    names = ["black", "white", "ginger tabby"]
    assert sample.pick_classes(["ginger tabby", "0"], names) == [2, 0]
    assert sample.pick_classes(None, names) == [0, 1, 2]
    only = make("a", "--classes", "white", n=2)
    with Image.open("a.png") as page:
        assert page.size == (10 * 34, 34)  # not a tower
    assert (only[1] == make("b")[1]).all()  # image 1 is white either way
    for wrong in ("blue", "3"):
        with pytest.raises(InputError, match="--classes"):
            sample.pick_classes([wrong], names)
    assert sample.pick_classes(None, ["crane", "crane"]) == [0, 1]
    for names, wanted in ((["crane", "crane"], "crane"), (["10", "20"], "1")):
        with pytest.raises(InputError, match="--classes"):
            sample.pick_classes([wanted], names)
    months = sorted(map(str, range(1, 13)))
    assert sample.pick_classes(["1", "2", "10"], months) == [0, 4, 1]  # names, not numbers
    with pytest.raises(InputError, match="--classes: '0'"):
        sample.pick_classes(["0", "1"], months)


def test_two_commands_do_not_mix_in_a_folder(trained, monkeypatch):
    """The second takes the folder, still empty, while the first draws its first images."""
    def overtaken(*arguments):
        monkeypatch.setattr(sample, "draw", draw)
        make("a", "--seed", 2)
        return draw(*arguments)

    draw = sample.draw
    monkeypatch.setattr(sample, "draw", overtaken)
    monkeypatch.setattr(time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    with pytest.raises(InputError, match="--out a: .*seed is 2 there, 1 here"):
        make("a", "--seed", 1)
    assert (make("a", "--seed", 2) == make("b", "--seed", 2)).all()


def test_two_trainings_of_a_run_do_not_mix_in_a_folder(run):
    run("a", "--steps", 6, "--keep-every", 3)
    make("s")
    for name in ("ckpt.pt", "ckpt-0000006.pt"):
        Path("runs/a", name).unlink()
    train.main(["--name", "a", "--resume", "--lr", "0.05"])
    with pytest.raises(InputError, match="--out s: .*weights is"):
        make("s", n=8)


def test_the_default_folder_is_made_anew_and_a_named_one_is_not(trained, capsys):
    def default(*flags):
        sample.main(["--steps", "2", *map(str, flags)])
        return sorted(path.name for path in Path("samples").iterdir()), capsys.readouterr().out

    files, out = default("--num-samples", 5)
    assert len(files) == 5 and "anew" not in out
    files, out = default("--num-samples", 3, "--tau", 0.5)
    assert len(files) == 3
    assert f"samples/ is made anew, it was of {Path('runs/a/ckpt.pt').resolve()}" in out
    files, out = default("--num-samples", 2, "--tau", 0.5)
    assert len(files) == 2 and record("samples")["num_samples"] == 2
    make("named", n=4)
    with pytest.raises(InputError, match="--out named: holds more images"):
        make("named", n=3)
    Path("samples.json").write_text('{"owner": "another program"}')
    Path("samples/photo.png").write_text("valuable")
    with pytest.raises(InputError, match="--out samples"):
        default()
    assert Path("samples/photo.png").exists()


def test_a_process_does_not_wait_for_ever_for_one_that_samples_another_step(
        trained, monkeypatch):
    make("a")
    for name, value in dict(RANK=1, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="here",
                             MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    Path("a.json").write_text(json.dumps(record("a") | {"step": 48}))
    monkeypatch.setattr(time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    with pytest.raises(InputError, match="--out a: .*step is 48 there, 24 here"):
        make("a")


@pytest.mark.parametrize("training, flags, refused", [
    ("--objective cfm", "--order 2 --cfg-scale 1.5", "--tau 0.9"),
    ("--objective endpoint", "--order 2 --cfg-scale 1.5", "--tau 0.9"),
    ("--objective cfm", "--order 2", "--tau-end 0.5"),
    ("--objective dfm", "--tau 0.9 --cfg-scale 1.5", "--order 2"),
    ("--objective dfm", "--tau 0.9", "--tau-end 0.5"),
    ("--label-dropout 0", "--order 2", "--cfg-scale 1.5")])
def test_each_method_samples_and_refuses_what_means_nothing_to_it(run, training, flags, refused):
    run("a", "--steps", 4, *training.split())
    a = make("a", *flags.split())
    assert (a == make("b", *flags.split(), "--per-proc-batch-size", 1)).all()
    with pytest.raises(InputError, match=f"{refused.split()[0]}.*runs/a/ckpt.pt"):
        make("c", *refused.split())


def test_a_checkpoint_that_is_damaged_or_of_other_data_is_named(trained, tiny_vq, tiny_data):
    Path("half.pt").write_bytes(Path("runs/a/ckpt.pt").read_bytes()[:5000])
    meta = json.loads((tiny_data / "meta.json").read_text())
    (tiny_data / "meta.json").write_text(json.dumps(meta | {"classes": ["a", "b", "c", "d"]}))
    for name in ("half.pt: ", "nowhere.pt: ", f"{tiny_vq.name}: ", "runs/a/ckpt.pt"):
        with pytest.raises(InputError, match=name) as error:
            make("x", "--ckpt", name.removesuffix(": "))
        assert "\n" not in str(error.value)
    for flag in ("--tau 0", "--tau-end 0", "--tau-end inf", "--cfg-scale nan",
                 "--per-proc-batch-size 0", "--cfg-interval 0.2 1"):
        with pytest.raises(SystemExit) as error:
            make("x", *flag.split())
        assert error.value.code == 2
    assert not Path("x").exists() and not Path("x.json").exists()


@pytest.mark.slow
def test_the_documented_commands_work_one_after_the_other(tmp_path, tiny_data):
    [error] = call(tmp_path, ROOT / "train.py", "--data", "nowhere", code=1)
    assert "nowhere" in error
    (tiny_data / "recipe.txt").write_text("--model DiT-demo/2\n--steps 3\n--global-batch-size 8\n")
    last = call(tmp_path, ROOT / "train.py", "--data", tiny_data)[-1]
    assert "next: python sample.py" in last
    command = ROOT / "sample.py", "--tau", 0.9, "--num-samples", 6, "--steps", 2
    assert "next: python fid.py samples/" in call(tmp_path, *command)[-1]
    net = fid.InceptionV3()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked = None  # the published file lacks it
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(as_published(net), tmp_path / "w.pth")
    last = call(tmp_path, ROOT / "fid.py", "samples/", "--weights", "w.pth")[-1]
    assert last.startswith("FID ") and "6 images" in last and float(last.split()[-1]) > 0
    call(tmp_path, *TORCHRUN, *command, "--out", "two")
    for path in tmp_path.glob("samples/*.png"):  # two processes make what one makes
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
