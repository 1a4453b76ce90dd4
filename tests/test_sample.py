"""sample.py, and the three documented commands one after the other."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from test_train import ROOT, torchrun
from vq import InputError


@pytest.fixture
def trained(tmp_path, tiny_data, tiny_size, monkeypatch):
    """A folder with a run of a few steps in it, which the test works in."""
    monkeypatch.chdir(tmp_path)
    train.main(["--data", str(tiny_data), "--name", "a", "--model", tiny_size, "--global-batch-size", "8", "--steps", "24",
                "--lr", "1e-2", "--ema-decay", "0.5", "--precision", "float32"])
    return tmp_path


def make(out, *flags, n=6):
    sample.main(["--out", out, "--steps", "3", "--num-samples", str(n), "--precision", "float32", *map(str, flags)])
    return np.stack([np.asarray(Image.open(f"{out}/{i:06d}.png")) for i in range(n)])


def test_an_image_depends_on_seed_and_index_alone(trained):
    a = make("a", "--per-proc-batch-size", 6)
    assert (a == make("b", "--per-proc-batch-size", 1)).all()
    assert (a == make("c", "--per-proc-batch-size", 4, n=9)[:6]).all()
    assert (a != make("d", "--seed", 1)).any()


def test_what_is_there_is_kept_and_what_is_missing_is_made_again(trained):
    a = make("a")
    Path("a/000002.png").unlink()
    kept = os.stat("a/000001.png").st_mtime_ns
    assert (make("a") == a).all()
    assert os.stat("a/000001.png").st_mtime_ns == kept
    assert len(make("a", n=8)) == 8 and json.loads(Path("a.json").read_text())["num_samples"] == 8


def test_images_of_other_settings_are_not_mixed(trained):
    make("a", "--tau", 0.9)
    with pytest.raises(InputError, match="--out a: holds images of another tau"):
        make("a", "--tau", 0.5)
    Path("b").mkdir()
    Path("b/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--out b: is not empty"):
        make("b")


def test_temperature_and_guidance_change_the_images(trained):
    a = make("a", "--tau", 1.0)
    assert (make("b", "--tau", 0.1) != a).any() and (make("c", "--cfg-scale", 4.0, "--tau", 1.0) != a).any()


def test_classes_are_taken_in_turn_by_name_or_number(trained):
    assert sample.pick_classes(["ginger tabby", "0"], ["black", "white", "ginger tabby"]) == [2, 0]
    assert sample.pick_classes(None, ["black", "white"]) == [0, 1]
    only = make("a", "--classes", "white", n=2)
    assert (only[1] == make("b")[1]).all()                 # image 1 is white either way
    for wrong in ("blue", "3", "-1", "\u00b2"):
        with pytest.raises(InputError, match=f"--classes {wrong}: no such class"):
            sample.pick_classes([wrong], ["black", "white", "ginger tabby"])


def test_the_sidecar_holds_what_repeats_the_images(trained, tiny_data):
    make("a", "--tau", 0.8, "--cfg-scale", 1.5)
    record = json.loads(Path("a.json").read_text())
    assert record["data"] == str(tiny_data) and record["step"] == 24 and record["num_samples"] == 6
    assert (record["tau"], record["cfg_scale"], record["steps"], record["seed"], record["classes"]) == (0.8, 1.5, 3, 0, [0, 1, 2])
    assert Image.open("a.png").size == (3 * 34, 2 * 34)


def test_several_temperatures_make_one_sheet_with_the_same_noise_in_a_column(trained):
    sample.main(["--out", "new/a", "--steps", "3", "--num-samples", "4", "--tau", "0.5", "0.9", "--precision", "float32"])
    page = np.asarray(Image.open("new/a-temperatures.png"))
    assert page.shape == (2 * 34, 4 * 34, 3) and not Path("new/a").exists()
    for row, tau in enumerate((0.5, 0.9)):
        assert (page[34 * row + 1:34 * row + 33, 35:67] == make(f"t{tau}", "--tau", tau, n=4)[1]).all()


def test_the_film_strip_ends_where_z_and_mu_agree_with_the_sample(trained):
    sample.main(["--out", "a", "--steps", "4", "--num-samples", "2", "--trajectory", "--tau", "0.9", "--precision", "float32"])
    page = np.asarray(Image.open("a-trajectory.png"))[14:]  # below the times
    assert page.shape[1] == 5 * 34                         # t = 0, 1/4, ..., 1
    tile = lambda row, column: page[34 * row + 1:34 * row + 33, 34 * column + 1:34 * column + 33]  # noqa: E731
    sample.main(["--out", "b", "--steps", "4", "--num-samples", "2", "--tau", "0.9", "--precision", "float32"])
    for i in range(2):
        assert (tile(3 * i, 4) == tile(3 * i + 1, 4)).all()
        assert (tile(3 * i, 4) == np.asarray(Image.open(f"b/{i:06d}.png"))).all()
    assert (tile(0, 0) != tile(1, 0)).any()                # noise is not yet what the model believes


def test_the_heat_map_runs_from_dark_to_light():
    colours = sample.heat(np.array([[[0.0, 5.0], [7.5, 10.0]]]), 10, 2)
    assert colours.shape == (1, 4, 4, 3)
    grey = colours.sum(-1)[0]
    assert grey[0, 0] < grey[0, 3] < grey[3, 0] < grey[3, 3]


def test_the_npz_holds_the_same_images(trained):
    images = make("a", "--npz")
    with np.load("a.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and (file["arr_0"] == images).all()


def test_guidance_is_refused_without_a_null_class(trained, tiny_data, tiny_size, capsys):
    train.main(["--data", str(tiny_data), "--name", "b", "--model", tiny_size, "--global-batch-size", "8", "--steps", "1",
                "--label-dropout", "0"])
    with pytest.raises(SystemExit) as error:
        make("b", "--ckpt", "runs/b/ckpt.pt", "--cfg-scale", 2.0)
    assert error.value.code == 2 and "--label-dropout 0" in capsys.readouterr().err


def test_what_wrappers_put_before_the_weights_names_is_taken_off(trained):
    a, ckpt = make("a"), torch.load("runs/a/ckpt.pt")
    torch.save(dict(ckpt, ema={"module._orig_mod." + key: value for key, value in ckpt["ema"].items()}), "wrapped.pt")
    assert (make("b", "--ckpt", "wrapped.pt") == a).all()


def test_a_wrong_checkpoint_is_refused_by_name(trained, tiny_vq):
    for path, message in ((tiny_vq, "not a checkpoint of train.py"), ("nowhere.pt", "no such file")):
        with pytest.raises(InputError, match=f"{Path(path).name}.*{message}"):
            make("x", "--ckpt", path)
    ckpt = Path("runs/a/ckpt.pt")
    ckpt.write_bytes(ckpt.read_bytes()[:5000])
    with pytest.raises(InputError, match="ckpt.pt: not a readable torch file"):
        make("x")
    assert not Path("x").exists()


def test_without_a_run_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run python train.py first"):
        make("a")


@pytest.mark.parametrize("objective", ["cfm", "dfm"])
def test_the_baselines_train_and_sample_and_refuse_what_means_nothing_to_them(trained, tiny_data, tiny_size, objective, capsys):
    flags = ["--data", str(tiny_data), "--name", objective, "--model", tiny_size, "--global-batch-size", "8", "--steps", "4",
             "--objective", objective, "--precision", "float32"]
    train.main(flags)
    a = make("a", "--ckpt", f"runs/{objective}/ckpt.pt", "--cfg-scale", 1.5)
    assert (a == make("b", "--ckpt", f"runs/{objective}/ckpt.pt", "--cfg-scale", 1.5, "--per-proc-batch-size", 1)).all()
    if objective == "cfm":
        for main in (lambda: make("c", "--ckpt", "runs/cfm/ckpt.pt", "--tau", 0.9), lambda: train.main([*flags, "--z-loss", "1e-5"])):
            with pytest.raises(SystemExit) as error:
                main()
            assert error.value.code == 2 and "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    *((f"{flag} 0", f"{flag} 0") for flag in ("--tau", "--steps", "--num-samples", "--per-proc-batch-size")),
    ("--tau 1e-42", "--tau 1e-42"), ("--cfg-scale nan", "--cfg-scale nan"), ("--trajectory --tau 0.3 0.9", "--trajectory"),
    ("--npz --tau 0.3 0.9", "--npz"), ("--npz --trajectory", "--npz"), (f"--out {__file__}", "is a file"),
    (f"--out {__file__}/a", "is a file"), ("--out .", "no name of its own")])
def test_flags_that_make_no_sense_exit_with_code_2_and_a_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        sample.main(flags.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_documented_commands_work_one_after_the_other(tmp_path, tiny_data):
    def run(*command):
        result = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()[-1]

    (tiny_data / "recipe.json").write_text(json.dumps(dict(model="DiT-demo/2", steps=3, global_batch_size=8)))
    assert "next: python sample.py" in run(ROOT / "train.py", "--data", tiny_data)
    assert "next: python fid.py samples/" in run(ROOT / "sample.py", "--tau", 0.9, "--num-samples", 6, "--steps", 2)
    last = run(ROOT / "fid.py", "samples/")
    assert "not FID" in last and "6 images" in last and float(last.split()[-1]) > 0

    result = torchrun(ROOT / "sample.py", "--tau", 0.9, "--num-samples", 6, "--steps", 2, "--out", "two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for i in range(6):                                     # two processes make what one makes
        assert (tmp_path / f"two/{i:06d}.png").read_bytes() == (tmp_path / f"samples/{i:06d}.png").read_bytes()


def test_a_wrong_input_is_one_line_and_exit_code_1(tmp_path):
    for script, flags in (("train.py", ["--data", "nowhere"]), ("sample.py", []), ("fid.py", ["nowhere"]),
                          ("vq.py", ["nowhere", "--vq", "nowhere.pt", "--out", "o"])):
        result = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == 1 and result.stderr.startswith(f"{script}: ") and result.stderr.count("\n") == 1, result.stderr
