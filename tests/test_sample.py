"""sample.py, and the three documented commands one after the other."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import ROOT, torchrun

import sample
import train

sys.path.insert(0, str(ROOT / "demo"))
import film  # noqa: E402

from flow import Purrception  # noqa: E402
from vq import InputError, from_pixels, load_vq, open_image  # noqa: E402


@pytest.fixture
def trained(tmp_path, tiny_data, tiny_size, monkeypatch):
    """A folder with a run of a few steps in it, which the test works in."""
    monkeypatch.chdir(tmp_path)
    train.main(["--data", str(tiny_data), "--name", "a", "--model", tiny_size, "--global-batch-size", "8", "--steps", "24",
                "--lr", "1e-2", "--ema-decay", "0.5", "--no-bf16"])
    return tmp_path


def make(out, *flags, n=6):
    sample.main(["--out", out, "--steps", "3", "--num-samples", str(n), "--no-bf16", *map(str, flags)])
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
    before = Path("a.json").read_text()
    with pytest.raises(InputError, match="--out a: .*a.json"):
        make("a", "--tau", 0.5)
    assert Path("a.json").read_text() == before
    Path("b").mkdir()
    Path("b/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--out b"):
        make("b")
    assert not Path("b.json").exists()


def test_a_record_whose_images_are_gone_does_not_stand_in_the_way(trained):
    make("a", "--tau", 0.9)
    shutil.rmtree("a")
    assert (make("a", "--tau", 0.5) == make("b", "--tau", 0.5)).all()


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
    assert record["reference"] == str(tiny_data / "reference.npz") and record["features"] == "untrained"
    assert (record["tau"], record["cfg_scale"], record["steps"], record["seed"], record["classes"]) == (0.8, 1.5, 3, 0, [0, 1, 2])
    with Image.open("a.png") as page:
        assert page.size == (3 * 34, 2 * 34)


def test_several_temperatures_make_one_sheet_with_the_same_noise_in_a_column(trained):
    sample.main(["--out", "new/a", "--steps", "3", "--num-samples", "4", "--tau", "0.5", "0.9", "--no-bf16"])
    page = np.asarray(Image.open("new/a-temperatures.png"))
    assert page.shape == (2 * 34, 4 * 34, 3) and not Path("new/a").exists()
    for row, tau in enumerate((0.5, 0.9)):
        assert (page[34 * row + 1:34 * row + 33, 35:67] == make(f"t{tau}", "--tau", tau, n=4)[1]).all()


# ------------------------------------------------------------------------ beyond the paper

@pytest.fixture
def picture(trained):
    """A picture of another size than the data's, and its codes [1,4,4] as vq.py crops and encodes it."""
    pixels = np.random.default_rng(7).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 50), Image.BICUBIC).save("cat.png")
    vq = load_vq("tiny_vq.pt")
    return "cat.png", vq, vq.encode(from_pixels(open_image("cat.png", 32)[None]))


def test_flags_beyond_the_paper_are_recorded_where_used_and_change_the_images(trained):
    a = make("a", "--cfg-scale", 3)
    assert not {"order", "interval", "picture", "start", "keep", "resample"} & set(json.loads(Path("a.json").read_text()))
    b = make("b", "--cfg-scale", 3, "--order", 2)
    c = make("c", "--cfg-scale", 3, "--cfg-interval", 0.9, 1)              # three steps: none is guided
    assert (a != b).any() and (a != c).any() and (c == make("d")).all()
    record = json.loads(Path("b.json").read_text())
    assert record["order"] == 2 and "start" not in record
    assert json.loads(Path("c.json").read_text())["interval"] == [0.9, 1.0]
    with pytest.raises(InputError, match="--out b"):
        make("b", "--cfg-scale", 3)


def test_a_start_lies_on_the_path_from_the_noise_to_the_picture(trained, picture, monkeypatch):
    path, _, codes = picture
    seen = []
    follow = Purrception.sample
    monkeypatch.setattr(Purrception, "sample", lambda f, y, **how: seen.append((f, how)) or follow(f, y, **how))
    a, b = make("a"), make("b", "--from", path, "--start", 0.25)
    (f, plain), (_, how) = seen
    assert how["start"] == 0.25 and "start" not in plain and (a != b).any()
    torch.testing.assert_close(how["noise"], 0.75 * plain["noise"] + 0.25 * f.embed(codes))
    assert json.loads(Path("b.json").read_text())["picture"] == path


@pytest.mark.parametrize("flags", [(), ("--order", 2, "--start", 0.3), ("--resample", 2)])
def test_the_codes_of_a_kept_box_stay_and_images_depend_on_their_index_alone(trained, picture, flags, monkeypatch):
    path, vq, codes = picture
    drawn = []
    decode = sample.decode_pixels
    monkeypatch.setattr(sample, "decode_pixels", lambda vq, codes: drawn.append(codes) or decode(vq, codes))
    a = make("a", "--from", path, "--keep", 0, 3, 32, 9, *flags)
    assert (a[:, :16] == decode(vq, codes).numpy()[:, :16]).all()        # the decoder alone would not do: it sees all codes
    drawn = drawn[1:]                                      # after the picture itself
    assert drawn[0][:, :2].equal(codes[:, :2].expand(6, -1, -1))
    assert not drawn[0][:, 2:].equal(codes[:, 2:].expand(6, -1, -1))
    assert (a == make("b", "--from", path, "--keep", 0, 3, 32, 9, *flags, "--per-proc-batch-size", 4)).all()
    Path("a/000001.png").unlink()
    assert (a == make("a", "--from", path, "--keep", 0, 3, 32, 9, *flags)).all()


@pytest.mark.parametrize("flags, message", [
    ("--from gone.png --start 0.5", "gone.png: unreadable"), ("--from tiny_vq.pt --start 0.5", "tiny_vq.pt: unreadable"),
    ("--from cat.png --keep 0 0 33 8", "--keep 0 0 33 8: .*32x32"), ("--from cat.png --keep 8 0 8 8", "--keep 8 0 8 8"),
    ("--from cat.png --keep -1 0 8 8", "--keep -1 0 8 8")])
def test_a_picture_or_a_box_that_makes_no_sense_is_refused_in_a_sentence(trained, picture, flags, message):
    with pytest.raises(InputError, match=message) as error:
        make("a", *flags.split())
    assert "\n" not in str(error.value) and not Path("a").exists() and not Path("a.json").exists()


# ------------------------------------------------------------------------ the film strip

def test_the_film_strip_ends_where_z_and_mu_agree_with_the_sample(trained):
    film.main(["--out", "a.png", "--steps", "4", "--classes", "0", "1", "--tau", "0.9"])
    page = np.asarray(Image.open("a.png"))[14:]            # below the times
    assert page.shape[1] == 5 * 34                         # t = 0, 1/4, ..., 1
    tile = lambda row, column: page[34 * row + 1:34 * row + 33, 34 * column + 1:34 * column + 33]  # noqa: E731
    images = make("b", "--steps", 4, "--tau", 0.9, n=2)
    for i in range(2):
        assert (tile(3 * i, 4) == tile(3 * i + 1, 4)).all()
        assert (tile(3 * i, 4) == images[i]).all()
    assert (tile(0, 0) != tile(1, 0)).any()                # noise is not yet what the model believes


def test_the_film_strip_wants_a_posterior_mean(trained, tiny_data, tiny_size, capsys):
    train.main(["--data", str(tiny_data), "--name", "dfm", "--model", tiny_size, "--global-batch-size", "8", "--steps", "1",
                "--objective", "dfm"])
    with pytest.raises(SystemExit) as error:
        film.main(["--ckpt", "runs/dfm/ckpt.pt"])
    assert error.value.code == 2 and "--objective dfm" in capsys.readouterr().err


def test_the_heat_map_runs_from_dark_to_light():
    colours = film.heat(np.array([[[0.0, 5.0], [7.5, 10.0]]]), 10, 2)
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


def test_a_wrong_checkpoint_is_refused_by_name(trained, tiny_vq):
    for path in (tiny_vq, "nowhere.pt"):
        with pytest.raises(InputError, match=Path(path).name):
            make("x", "--ckpt", path)
    ckpt = Path("runs/a/ckpt.pt")
    ckpt.write_bytes(ckpt.read_bytes()[:5000])
    with pytest.raises(InputError, match="ckpt.pt"):
        make("x")
    assert not Path("x").exists() and not Path("x.json").exists()


def test_weights_that_do_not_fit_the_data_are_refused(trained, tiny_data):
    meta = json.loads((tiny_data / "meta.json").read_text())
    (tiny_data / "meta.json").write_text(json.dumps(meta | {"classes": ["a", "b", "c", "d"]}))
    with pytest.raises(InputError, match="runs/a/ckpt.pt: does not fit .*embedding_table") as error:
        make("x")
    assert "\n" not in str(error.value)


def test_without_a_run_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run python train.py first"):
        make("a")


@pytest.mark.parametrize("objective", ["cfm", "endpoint", "dfm"])
def test_the_baselines_train_and_sample_and_refuse_what_means_nothing_to_them(trained, tiny_data, tiny_size, objective, capsys):
    flags = ["--data", str(tiny_data), "--name", objective, "--model", tiny_size, "--global-batch-size", "8", "--steps", "4",
             "--objective", objective, "--no-bf16"]
    train.main(flags)
    a = make("a", "--ckpt", f"runs/{objective}/ckpt.pt", "--cfg-scale", 1.5)
    assert (a == make("b", "--ckpt", f"runs/{objective}/ckpt.pt", "--cfg-scale", 1.5, "--per-proc-batch-size", 1)).all()
    if objective != "dfm":
        with pytest.raises(SystemExit) as error:
            make("c", "--ckpt", f"runs/{objective}/ckpt.pt", "--tau", 0.9)
        message = capsys.readouterr().err
        assert error.value.code == 2 and "--tau" in message and f"--objective {objective}" in message
        make("c", "--ckpt", f"runs/{objective}/ckpt.pt", "--order", 2)
    else:
        with pytest.raises(SystemExit) as error:
            make("c", "--ckpt", "runs/dfm/ckpt.pt", "--order", 2)
        assert error.value.code == 2 and "dfm" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    *((f"{flag} 0", f"{flag}: 0") for flag in ("--tau", "--steps", "--num-samples", "--per-proc-batch-size")),
    ("--tau 1e-42", "--tau: 1e-42"), ("--tau nan", "--tau: nan"), ("--cfg-scale nan", "--cfg-scale"), ("--seed -1", "--seed"),
    ("--npz --tau 0.3 0.9", "--npz"), ("--order 3", "--order"),
    ("--cfg-interval 0.5 2", "--cfg-interval"), ("--cfg-interval 0.8 0.3", "LO"),
    ("--start 0.5", "--from"), ("--keep 0 0 8 8", "--from"), ("--from cat.png", "--start"), ("--from cat.png --start 1", "--start"),
    ("--from cat.png --start -0.1", "--start"), ("--from cat.png --start 0.5 --resample 2", "--resample")])
def test_flags_that_make_no_sense_exit_with_code_2_and_a_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        sample.main(flags.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/a", "."])
def test_a_folder_that_cannot_be_filled_is_refused_by_name(trained, out):
    Path("file").write_text("valuable")
    with pytest.raises(InputError, match=out):
        make(out)
    assert Path("file").read_text() == "valuable"


@pytest.mark.slow
def test_the_documented_commands_work_one_after_the_other(tmp_path, tiny_data):
    def run(*command):
        result = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()[-1]

    (tiny_data / "recipe.txt").write_text("--model DiT-demo/2\n--steps 3\n--global-batch-size 8\n")
    assert "next: python sample.py" in run(ROOT / "train.py", "--data", tiny_data)
    assert "next: python fid.py samples/" in run(ROOT / "sample.py", "--tau", 0.9, "--num-samples", 6, "--steps", 2)
    last = run(ROOT / "fid.py", "samples/")
    assert "not FID" in last and "6 images" in last and float(last.split()[-1]) > 0

    result = torchrun(ROOT / "sample.py", "--tau", 0.9, "--num-samples", 6, "--steps", 2, "--out", "two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for i in range(6):                                     # two processes make what one makes
        assert (tmp_path / f"two/{i:06d}.png").read_bytes() == (tmp_path / f"samples/{i:06d}.png").read_bytes()


@pytest.mark.slow
def test_a_wrong_input_is_one_line_and_exit_code_1(tmp_path):
    for script, flags in (("train.py", ["--data", "nowhere"]), ("sample.py", []), ("fid.py", ["nowhere"])):
        result = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        assert "nowhere" in result.stderr or "runs/" in result.stderr


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(trained):
    command = [sys.executable, ROOT / "sample.py", "--data", "tiny", "--num-samples", "300", "--per-proc-batch-size", "1", "--steps", "50",
               "--out", "a", "--ckpt", "runs/demo/ckpt.pt"]
    train.main(["--data", "tiny", "--name", "demo", "--model", "DiT-demo/2", "--global-batch-size", "8", "--steps", "1"])
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not Path("a/000001.png").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.splitlines()[-1].startswith("interrupted") and "Traceback" not in err
    assert not list(Path("a").glob(".*"))                  # no half-written picture
    count = len(list(Path("a").iterdir()))
    assert count < 300
