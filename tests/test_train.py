"""train.py: no hidden state, nothing lost, nothing silent."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from vq import InputError

ROOT = Path(__file__).resolve().parent.parent
TIMING = ("images_per_second",)


@pytest.fixture
def run(tmp_path, tiny_data, tiny_size, monkeypatch):
    """Run train.py in an empty folder with small settings and return the checkpoint and the log of runs/NAME."""
    monkeypatch.chdir(tmp_path)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def run(name, *flags):
        train.main(["--data", str(tiny_data), "--name", name, "--model", tiny_size, "--global-batch-size", "8", "--lr", "1e-3",
                    "--log-every", "1", "--no-bf16", *map(str, flags)])
        return read(name)
    yield run
    for s, handler in before.items():
        signal.signal(s, handler)


def read(name):
    log = [json.loads(line) for line in Path("runs", name, "log.jsonl").read_text().splitlines()]
    for record in log:
        for key in TIMING:
            assert record.pop(key) > 0
    return torch.load(Path("runs", name, "ckpt.pt"), weights_only=True), log


def assert_same(a, b):
    """Bit for bit, through nested dictionaries and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def torchrun(*command, processes=2, **kwargs):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone",
                           *map(str, command)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def test_the_first_loss_is_ln_K_and_then_falls(run):
    ckpt, log = run("a", "--steps", 30)
    assert abs(log[0]["ce"] - math.log(32)) < 1e-6
    assert abs(log[0]["z"] - 1e-5 * math.log(32) ** 2) < 1e-8
    assert log[0]["loss"] == pytest.approx(log[0]["ce"] + log[0]["z"])
    assert np.mean([r["ce"] for r in log[-5:]]) < 0.8 * math.log(32)
    assert [r["step"] for r in log] == list(range(1, 31)) and ckpt["step"] == 30
    assert Path("runs/a/samples/0000030.png").exists()


def test_N_and_N_steps_resumed_are_2N_bit_for_bit(run):
    run("half", "--steps", 7)
    half = run("half", "--steps", 14, "--resume")
    whole = run("whole", "--steps", 14)
    for key in ("model", "ema", "opt", "step"):
        assert_same(half[0][key], whole[0][key])
    assert half[1] == whole[1]


@pytest.mark.parametrize("flag, objective, differs", [("geometric-head", "purrception", 1), ("geometric-head", "dfm", 1),
                                                      ("logit-normal", "purrception", 3)])
def test_a_flag_beyond_the_paper_acts_is_recorded_and_outlives_a_break(run, flag, objective, differs):
    """The losses differ from step `differs` on: at first a head of zeros has the same loss at every t."""
    flags = f"--{flag}", "--objective", objective
    half = run("half", "--steps", 3, *flags)
    assert half[0]["args"][flag.replace("-", "_")]
    plain = run("plain", "--steps", differs, "--objective", objective)
    assert half[1][differs - 1]["loss"] != plain[1][-1]["loss"]
    resumed = run("half", "--steps", 6, "--resume")
    whole = run("whole", "--steps", 6, *flags)
    assert_same(resumed[0]["model"], whole[0]["model"])
    assert resumed[1] == whole[1]


def test_a_regression_has_no_head_to_shape(run):
    ckpts = [run(name, "--steps", 2, "--objective", "cfm", *flags)[0] for name, flags in (("a", ()), ("b", ["--geometric-head"]))]
    assert_same(ckpts[0]["model"], ckpts[1]["model"])


def test_resuming_drops_log_lines_past_the_checkpoint(run):
    run("a", "--steps", 4)
    with open("runs/a/log.jsonl", "a") as f:
        f.write(json.dumps({"step": 5, "loss": 0.0}) + "\n")
    _, log = run("a", "--steps", 6, "--resume")
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5, 6] and log[4]["loss"] > 0


def test_the_log_of_N_and_N_steps_is_that_of_2N_between_its_lines_too(run):
    run("half", "--steps", 7, "--log-every", 4)
    with open("runs/half/log.jsonl", "a") as f:
        f.write('{"step": 8, "lo')                         # cut by a crash
    half = run("half", "--steps", 14, "--log-every", 4, "--resume")
    assert [r["step"] for r in half[1]] == [1, 4, 8, 12] and half[1] == run("whole", "--steps", 14, "--log-every", 4)[1]


def test_what_is_no_run_is_not_resumed(run, tiny_vq):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/ckpt.pt").write_bytes(tiny_vq.read_bytes())
    with pytest.raises(InputError, match="runs/a/ckpt.pt: not a checkpoint of train.py"):
        run("a", "--steps", 2, "--resume")


@pytest.mark.parametrize("name", ["a", "b/c"])
def test_a_name_no_folder_can_have_is_refused(run, name):
    Path("runs").mkdir()
    Path("runs/a").write_text("a file")
    Path("runs/b").write_text("a file")
    with pytest.raises(InputError, match=f"--name .*runs/{name} cannot be made"):
        run(name, "--steps", 2)


def test_flags_of_a_resumed_run_reach_the_optimizer(run):
    run("a", "--steps", 1, "--weight-decay", 0.5)
    ckpt, _ = run("a", "--steps", 2, "--resume", "--weight-decay", 0.25)
    assert [group["weight_decay"] for group in ckpt["opt"]["param_groups"]] == [0.25]


def test_a_run_that_died_before_its_first_checkpoint_is_resumed_from_the_start(run):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/log.jsonl").write_text('{"step": 1, "loss": 0.0, "images_per_second": 1}\n')
    assert run("a", "--steps", 3, "--resume")[1] == run("b", "--steps", 3)[1]
    with pytest.raises(InputError, match="no runs/c to resume"):
        run("c", "--steps", 3, "--resume")


def test_resuming_with_another_interval_keeps_the_lines_there_are(run):
    run("a", "--steps", 8, "--log-every", 2)
    _, log = run("a", "--steps", 9, "--log-every", 3, "--resume")
    assert [r["step"] for r in log] == [1, 2, 4, 6, 8, 9]


def test_pictures_can_be_left_out(run):
    run("a", "--steps", 2, "--sample-every", 0)
    assert not Path("runs/a/samples").exists()


def test_resume_alone_takes_the_newest_run_and_its_settings(run):
    run("a", "--steps", 2, "--weight-decay", 0.5)
    train.main(["--resume", "--steps", "3"])
    ckpt, _ = read("a")
    assert ckpt["step"] == 3 and ckpt["args"]["weight_decay"] == 0.5


def test_micro_batches_add_up_to_the_batch(run):
    a, b = run("a", "--steps", 3), run("b", "--steps", 3, "--accumulate", 4)
    for x, y in zip(a[1], b[1]):
        for key in ("loss", "ce", "z", "grad_norm"):
            assert x[key] == pytest.approx(y[key], rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, tiny_data):
    flags = ["train.py", "--data", tiny_data, "--model", "DiT-demo/2", "--steps", 8, "--global-batch-size", 8, "--log-every", 1,
             "--no-bf16", "--name"]
    logs = []
    for processes in (1, 2):
        result = torchrun(ROOT / flags[0], *flags[1:], f"p{processes}", processes=processes, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        logs.append([json.loads(line) for line in (tmp_path / f"runs/p{processes}/log.jsonl").read_text().splitlines()])
    assert len(logs[0]) == len(logs[1]) == 8
    for one, two in zip(*logs):
        for key in ("loss", "ce", "z", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), one["step"]


@pytest.mark.slow
def test_a_signal_finishes_the_step_saves_and_exits(tmp_path, tiny_data):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--data", tiny_data, "--model", "DiT-demo/2", "--steps", "1000000",
                                "--global-batch-size", "8", "--name", "a", "--no-bf16"], cwd=tmp_path,
                               stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "runs/a/log.jsonl"
    for _ in range(300):
        if log.exists() and log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in out
    ckpt = torch.load(tmp_path / "runs/a/ckpt.pt", weights_only=True)
    assert ckpt["step"] >= json.loads(log.read_text().splitlines()[-1])["step"] > 0


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(run):
    with pytest.raises(InputError, match=r"step [0-9]+: loss (nan|inf).*--resume"):
        run("a", "--steps", 50, "--lr", 1e30, "--ckpt-every", 1)
    ckpt, log = read("a")
    assert ckpt["step"] == log[-1]["step"] < 50


def test_a_run_is_not_overwritten(run):
    run("a", "--steps", 1)
    with pytest.raises(InputError, match="--name a: .*--resume"):
        run("a", "--steps", 1)
    with pytest.raises(InputError, match="--steps 1: runs/a has done 1"):
        run("a", "--steps", 1, "--resume")


@pytest.mark.parametrize("left", ["ckpt-0000005.pt", "log.jsonl"])
def test_what_a_run_left_without_a_checkpoint_is_not_overwritten(run, left):
    file = Path("runs/a", left)
    file.parent.mkdir(parents=True)
    file.write_text("valuable")
    with pytest.raises(InputError, match="--name a"):
        run("a", "--steps", 2)
    assert file.read_text() == "valuable" and len(list(file.parent.iterdir())) == 1


def test_runs_without_a_name_are_numbered(run, tiny_data, tiny_size):
    for _ in range(2):
        train.main(["--data", str(tiny_data), "--model", tiny_size, "--steps", "1", "--global-batch-size", "4"])
    assert sorted(p.name for p in Path("runs").iterdir()) == ["001", "002"]


def test_the_recipe_overrides_the_paper_and_the_command_line_both(tiny_data, tiny_size, capsys):
    (tiny_data / "recipe.txt").write_text(f"--lr 0.5\n--model={tiny_size}\n\n--ema-ramp\n")
    args, _, _ = train.parse(["--data", str(tiny_data), "--lr", "0.25", "--no-ema-ramp"])
    assert (args.lr, args.model, args.ema_ramp, args.global_batch_size) == (0.25, tiny_size, False, 256)


def test_flags_can_be_read_from_any_file(tiny_data, tmp_path):
    (tmp_path / "mine.txt").write_text("--lr 0.125\n--steps 7\n")
    args, _, _ = train.parse(["--data", str(tiny_data), f"@{tmp_path}/mine.txt", "--steps", "8"])
    assert (args.lr, args.steps) == (0.125, 8)


def test_resuming_the_flags_of_the_run_count_and_not_a_recipe_written_since(run, tiny_data):
    run("a", "--steps", 1, "--weight-decay", 0.5)
    (tiny_data / "recipe.txt").write_text("--weight-decay 0.125")
    ckpt, _ = run("a", "--steps", 2, "--resume")
    assert ckpt["args"]["weight_decay"] == 0.5


def test_the_defaults_are_the_papers(tmp_path):
    args, _, _ = train.parse(["--data", str(tmp_path)])
    assert (args.model, args.lr, args.weight_decay, args.global_batch_size, args.ema_decay, args.grad_clip, args.z_loss) == (
        "DiT-XL/2", 1e-4, 0.01, 256, 0.9999, 1.0, 1e-5)


def test_an_epoch_is_a_permutation_and_a_pure_function_of_seed_and_epoch():
    rows = np.concatenate([train.batch_rows(10, 4, 3, step) for step in range(5)])          # two epochs of ten
    for epoch in (rows[:10], rows[10:]):
        assert sorted(epoch) == list(range(10))
    assert (rows[:10] != rows[10:]).any()
    train.epoch_order.cache_clear()
    assert (train.batch_rows(10, 4, 3, 2) == rows[8:12]).all()                              # across the epochs' border
    assert (train.batch_rows(10, 4, 4, 2) != rows[8:12]).any()


def test_half_of_the_images_of_a_batch_are_their_mirrored_twins_whatever_the_slice(tiny_data):
    codes = np.load(tiny_data / "codes.npy")
    np.save(tiny_data / "codes_flip.npy", codes + 100)
    data, args = train.open_data(tiny_data), SimpleNamespace(global_batch_size=40, seed=5)
    got, y = train.fetch(data, args, 3, slice(0, 40), torch.device("cpu"))
    rows = train.batch_rows(40, 40, 5, 3)
    twin = (got[:, 0, 0] >= 100).numpy()
    assert (got.numpy() == codes[rows] + 100 * twin[:, None, None]).all() and 10 < twin.sum() < 30
    assert (y.numpy() == data.labels[rows]).all()
    part, part_y = train.fetch(data, args, 3, slice(10, 20), torch.device("cpu"))
    assert part.equal(got[10:20]) and part_y.equal(y[10:20])


def test_the_learning_rate_rises_over_the_warmup_and_falls_over_the_cooldown(run):
    _, log = run("a", "--steps", 8, "--lr", 0.01, "--warmup", 2, "--cooldown", 0.5)
    assert [record["lr"] for record in log] == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    _, log = run("b", "--steps", 2, "--lr", 0.01)          # the paper's rate is constant
    assert [record["lr"] for record in log] == [0.01, 0.01]


def test_the_average_follows_its_formula():
    a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    want = 0.75 * a.weight.detach() + 0.25 * b.weight.detach()
    train.update_ema(a, b, 0.75)
    assert torch.allclose(a.weight, want)


def test_a_folder_of_images_is_refused_with_the_command_that_prepares_it(tmp_path):
    (tmp_path / "photos/cat").mkdir(parents=True)
    (tmp_path / "photos/cat/1.JPG").write_bytes(b"")
    with pytest.raises(InputError, match=r"python vq.py .*photos --vq TOKENIZER --out"):
        train.open_data(tmp_path / "photos")


@pytest.mark.parametrize("spoil, message", [
    (lambda d: (d / "labels.npy").unlink(), "labels.npy"),
    (lambda d: np.save(d / "labels.npy", np.zeros(7, int)), r"labels.npy, int64 \(7,\)"),
    (lambda d: np.save(d / "labels.npy", np.zeros(40)), "labels.npy, float64"),
    (lambda d: np.save(d / "labels.npy", np.zeros((40, 1), int)), r"labels.npy, int64 \(40, 1\)"),
    (lambda d: np.save(d / "labels.npy", np.full(40, "cat")), "encode the images again"),
    (lambda d: np.save(d / "labels.npy", np.full(40, 9)), "do not fit together"),
    (lambda d: np.save(d / "labels.npy", np.full(40, -1)), "do not fit together"),
    (lambda d: np.save(d / "labels.npy", np.array({}, object)), "encode the images again"),
    (lambda d: np.save(d / "codes.npy", np.full((40, 4, 4), -1)), "codes.npy, int64"),
    (lambda d: np.save(d / "codes.npy", np.full((40, 4, 4), 99, np.uint16)), "code 99"),
    (lambda d: np.save(d / "codes.npy", np.full((40, 4, 4), 65535, np.uint16)), "code 65535.*interrupted"),
    (lambda d: np.save(d / "codes.npy", np.zeros((40, 4, 2), np.uint16)), "codes.npy"),
    (lambda d: (d / "codes.npy").write_bytes((d / "codes.npy").read_bytes()[:300]), "encode the images again"),
    (lambda d: (d / "codes.npy").write_bytes((d / "codes.npy").read_bytes().replace(b"'<u2'", b"'<u2\0")), "TokenError|Error"),
    (lambda d: (d / "tiny_vq.pt").write_text("") or edit(d, tokenizer="tiny_vq.pt"), "tiny_vq.pt"),
    (lambda d: (d / "meta.json").write_text("{"), "meta.json"),
    (lambda d: (d / "meta.json").write_text("[" * 100000), "meta.json"),
    (lambda d: edit(d, classes=None), "encode the images again"),
    (lambda d: edit(d, tokenizer=7), "meta.json"),
    (lambda d: edit(d, tokenizer="gone.pt"), "gone.pt"),
    (lambda d: np.save(d / "codes_flip.npy", np.zeros((2, 4, 4), np.uint16)), "do not fit together"),
    (lambda d: np.save(d / "codes_flip.npy", np.full((40, 4, 4), 32, np.uint16)), "holds code 32"),
])
def test_a_damaged_data_directory_is_refused_in_one_sentence_that_names_it(run, tiny_data, spoil, message):
    spoil(tiny_data)
    with pytest.raises(InputError, match=message) as error:
        run("a", "--steps", 1)
    assert str(tiny_data) in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs/a").exists()


def test_files_that_were_no_pictures_are_left_out(run, tiny_data):
    labels = np.load(tiny_data / "labels.npy")
    labels[::2] = -1
    np.save(tiny_data / "labels.npy", labels)
    data = train.open_data(tiny_data)
    assert data.rows.tolist() == list(range(1, 40, 2))
    codes = np.load(tiny_data / "codes.npy")
    codes[::2] = codes[1::2]                               # whatever stands there makes no difference
    log = run("a", "--steps", 3)[1]
    np.save(tiny_data / "codes.npy", codes)
    assert run("b", "--steps", 3)[1] == log


def test_a_full_disk_ends_in_one_sentence_and_keeps_the_checkpoint(run, monkeypatch):
    run("a", "--steps", 1)
    before = Path("runs/a/ckpt.pt").read_bytes()
    save = torch.save

    def full(obj, file):
        save(obj, file)
        raise RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="runs/a/ckpt.pt: cannot be written .*failed writing"):
        run("a", "--steps", 2, "--resume")
    assert Path("runs/a/ckpt.pt").read_bytes() == before
    assert sorted(p.name for p in Path("runs/a").iterdir()) == ["ckpt.pt", "log.jsonl", "samples"]


def edit(data, **changes):
    meta = json.loads((data / "meta.json").read_text()) | changes
    (data / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("recipe", ["--objective diffusion", "--model DiT-XXL/2", "--steps 2.5", "--steps", "--lr [1]", "--ema-ramp no",
                                    "--learning-rate 1", "steps 3", "--seed -1", "--ema-decay 2"])
def test_a_recipe_that_makes_no_sense_is_refused_as_a_flag_is(recipe, tiny_data, capsys):
    (tiny_data / "recipe.txt").write_text(recipe)
    with pytest.raises(SystemExit) as caught:
        train.main(["--data", str(tiny_data)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and "error: " in line and recipe.split()[-1].lstrip("-") in line


def test_a_recipe_of_random_bytes_is_refused(tiny_data, capsys):
    for seed in range(30):
        (tiny_data / "recipe.txt").write_bytes(b"--lr " + np.random.default_rng(seed).bytes(40))
        with pytest.raises(SystemExit) as caught:
            train.main(["--data", str(tiny_data)])
        assert caught.value.code == 2


def test_a_grid_the_patches_do_not_fill_is_refused(run):
    with pytest.raises(InputError, match="--model: patches of 8 .* 4x4"):
        run("a", "--steps", 1, "--model", "DiT-S/8")


@pytest.mark.parametrize("flags, message", [
    (["--steps", "0"], "--steps: 0"), (["--lr", "-1"], "--lr"), (["--ema-decay", "1"], "--ema-decay"),
    (["--model", "DiT-XXL/2"], "--model"), (["--label-dropout", "1.5"], "--label-dropout"), (["--seed", "-1"], "--seed"),
    (["--sample-every", "-1"], "--sample-every"), (["--global-batch-size", "x"], "invalid"), (["--z-loss", "-1"], "--z-loss"),
    (["--seed", str(2 ** 64)], "--seed")])
def test_flags_out_of_range_exit_with_code_2_and_a_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse(flags)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_batch_that_cannot_be_split_is_refused(run):
    with pytest.raises(InputError, match="--global-batch-size 8.*--accumulate 3"):
        run("a", "--accumulate", 3)
