"""train.py: a run depends on its flags alone, nothing of it gets lost, and wrong input is named."""
import argparse
import codecs
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_flatten

import sample
import train
import vq
from vq import InputError, sheet

ROOT = Path(__file__).resolve().parent.parent
TIMING = ("images_per_second",)  # what may differ between the logs of equal runs
CPU = torch.device("cpu")
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"


def main(*flags):
    train.main([str(flag) for flag in flags])


@pytest.fixture(name="run")
def run_fixture(tmp_path, tiny_data, tiny_size, monkeypatch):
    """Run train.py in an empty folder with small settings; return what read() does."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name, *flags):
        main("--data", tiny_data, "--name", name, "--model", tiny_size, "--global-batch-size", 8,
             "--lr", 1e-3, "--log-every", 1, "--no-bf16", *flags)
        return read(name)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read(name, folder="."):
    """Return the checkpoint and the log of runs/NAME, the log without its speeds."""
    path = Path(folder, "runs", name)
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    for record in log:
        for key in TIMING:
            assert "val" in record or record.pop(key) > 1  # even on a slow machine
    return torch.load(path / "ckpt.pt", weights_only=True), log


def assert_same(a, b):
    """Compare bit for bit, through nested dictionaries and lists."""
    values, structure = tree_flatten(a)
    others, other_structure = tree_flatten(b)
    assert structure == other_structure
    for x, y in zip(values, others):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def assert_same_training(a, b):
    """Compare two checkpoints bit for bit, but for their flags."""
    for key in ("model", "ema", "opt", "step"):
        assert_same(a[key], b[key])


def close(log):
    """Allow for the rounding that other micro-batches and processes bring."""
    return [pytest.approx(record, rel=1e-4) for record in log]


def call(folder, *command, code=0):
    """Run Python in a folder, check its exit code, and return what it printed, line by line."""
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True,
        timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == code and "FutureWarning" not in result.stderr, result.stderr
    return (result.stderr if code else result.stdout).splitlines()


# ----- the paper's settings

def test_the_defaults_are_the_papers(tmp_path):
    paper = dict(
        objective="purrception", model="DiT-XL/2", steps=3_500_000, global_batch_size=256, lr=1e-4,
        weight_decay=0.01, warmup=0, cooldown=0, grad_clip=1, ema_decay=0.9999, ema_ramp=False,
        z_loss=1e-5, label_dropout=0.1, geometric_head=False, logit_normal=False)
    args, run = train.parse(["--data", str(tmp_path)])
    assert run is None and paper.items() <= vars(args).items()
    optimizer = train.make_optimizer(torch.nn.Linear(2, 3), args.lr)
    adamw = dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    assert isinstance(optimizer, torch.optim.AdamW) and adamw.items() <= optimizer.defaults.items()


def test_the_first_loss_is_ln_K_and_then_falls(run):
    ckpt, log = run("a", "--steps", 30)
    assert abs(log[0]["ce"] - math.log(32)) < 1e-6
    assert abs(log[0]["z"] - 1e-5 * math.log(32) ** 2) < 1e-8
    assert log[0]["loss"] == pytest.approx(log[0]["ce"] + log[0]["z"])
    assert np.mean([record["ce"] for record in log[-5:]]) < 0.8 * math.log(32)
    assert [record["step"] for record in log] == list(range(1, 31)) and ckpt["step"] == 30


def test_an_epoch_is_a_permutation_and_a_pure_function_of_seed_and_epoch():
    rows = np.concatenate([train.batch_rows(10, 4, 3, step) for step in range(5)])  # two epochs
    for epoch in (rows[:10], rows[10:]):
        assert sorted(epoch) == list(range(10))
    assert (rows[:10] != rows[10:]).any()
    train.epoch_order.cache_clear()
    assert (train.batch_rows(10, 4, 3, 2) == rows[8:12]).all()  # across the epochs' border
    assert (train.batch_rows(10, 4, 4, 2) != rows[8:12]).any()


def test_batches_are_of_readable_images_half_of_them_mirrored_whatever_the_slice(tiny_data):
    codes = np.load(tiny_data / "codes.npy")
    np.save(tiny_data / "codes_flip.npy", codes + np.uint16(15))
    labels = np.load(tiny_data / "labels.npy")
    labels[::2] = -1
    np.save(tiny_data / "labels.npy", labels)
    data, _ = train.open_data(tiny_data, CPU)
    args = SimpleNamespace(global_batch_size=40, seed=5)
    got, y = train.load_batch(data, args, 3, slice(0, 40), CPU)
    rows = 1 + 2 * train.batch_rows(20, 40, 5, 3)
    mirrored = (got.numpy() != codes[rows]).any((1, 2))
    assert (got.numpy() == codes[rows] + 15 * mirrored[:, None, None]).all()
    assert 10 < mirrored.sum() < 30 and (y.numpy() == labels[rows]).all()
    part, part_y = train.load_batch(data, args, 3, slice(10, 20), CPU)
    assert part.equal(got[10:20]) and part_y.equal(y[10:20])


def test_rate_average_and_noise_follow_their_schedules(run, monkeypatch):
    seeded = Mock(wraps=train.seeded)
    update = Mock()
    with monkeypatch.context() as patch:
        patch.setattr(train, "seeded", seeded)
        patch.setattr(train, "update_ema", update)
        _, log = run("a", "--steps", 8, "--lr", 0.01, "--warmup", 2, "--cooldown", 0.5, "--seed", 7,
                     "--ema-ramp", "--ema-decay", 0.2, "--sample-every", 0)
    rates = [record["lr"] for record in log]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    decays = [call.args[2] for call in update.mock_calls]
    assert decays == pytest.approx([1 / 10, 2 / 11] + 6 * [0.2])
    assert [call.args[1:] for call in seeded.mock_calls] == [(7, step) for step in range(8)]
    assert not Path("runs/a/samples").exists()
    ckpt, log = run("b", "--steps", 2, "--ema-decay", 0)  # the paper's rate is constant
    assert [record["lr"] for record in log] == [0.001, 0.001]
    assert_same(ckpt["ema"], ckpt["model"])


def test_the_average_follows_its_formula():
    a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    want = 0.75 * a.weight.detach() + 0.25 * b.weight.detach()
    train.update_ema(a, b, 0.75)
    assert torch.allclose(a.weight, want)


def test_gradients_are_clipped_rounded_in_bf16_and_added_up_over_micro_batches(run):
    ckpt, exact = run("clipped", "--steps", 1, "--grad-clip", 0.01)
    moments = [state["exp_avg"].norm() for state in ckpt["opt"]["state"].values()]
    assert torch.stack(moments).norm() == pytest.approx((1 - 0.9) * 0.01, rel=1e-4)
    _, rounded = run("rounded", "--steps", 1, "--bf16")
    assert rounded[0]["grad_norm"] != exact[0]["grad_norm"]
    assert rounded[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.02)
    _, parts = run("parts", "--steps", 3, "--accumulate", 4)
    assert parts == close(run("whole", "--steps", 3)[1])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, tiny_data):
    flags = ("--data", tiny_data, "--model", "DiT-demo/2", "--steps", 8, "--global-batch-size", 8,
             "--log-every", 1, "--no-bf16", "--sample-every", 4, "--val", tiny_data,
             "--geometric-head", "--name")
    call(tmp_path, ROOT / "train.py", *flags, "one")
    call(tmp_path, *TORCHRUN, ROOT / "train.py", *flags, "two")
    call(tmp_path, *TORCHRUN, ROOT / "train.py", *flags, "four", "--accumulate", 2)
    one, two, four = (read(name, tmp_path)[1] for name in ("one", "two", "four"))
    for log in (one, two, four):  # approx() compares no lists in dictionaries
        for i in (4, 9):
            assert sum(log[i].pop("val_by_t")) / 8 == pytest.approx(log[i]["val"])
    assert len(one) == 10 and two == close(one) and four == close(one)


def test_processes_exchange_gradients_in_the_last_micro_batch_only():
    seen = []

    def ddp(codes, y, noise):
        seen.append((len(codes), ddp.require_backward_grad_sync))
        return torch.ones((), requires_grad=True) * 1, {}

    args = argparse.Namespace(accumulate=3, bf16=False)
    train.backward(ddp, torch.zeros(6, 2, 2), torch.zeros(6), [torch.zeros(6)], args)
    assert seen == [(2, False), (2, False), (2, True)]


# ----- checkpoints and resuming

@pytest.mark.parametrize("flags", [(), ("--geometric-head",), ("--logit-normal", "--ema-ramp")])
def test_N_and_N_steps_resumed_are_2N_bit_for_bit(run, flags, capsys):
    run("half", "--steps", 7, "--log-every", 4, *flags)
    main("--resume", "--steps", 14)
    ended = os.path.getmtime("runs/half/ckpt.pt")
    main("--resume")  # a finished run changes no more, and is not written again
    assert os.path.getmtime("runs/half/ckpt.pt") == ended
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("runs/half/ckpt.pt: 14 of 14 steps; next: python sample.py "
                    "--ckpt runs/half/ckpt.pt")
    half, log = read("half")
    whole, whole_log = run("whole", "--steps", 14, "--log-every", 4, *flags)
    assert_same_training(half, whole)
    assert log == whole_log and [record["step"] for record in log] == [1, 4, 8, 12]
    if flags:  # and they have an effect
        assert log != run("plain", "--steps", 14, "--log-every", 4)[1]


def test_a_run_killed_before_its_first_checkpoint_keeps_its_flags(run, monkeypatch):
    """Here those of a regression, whose head has no codes to learn together."""
    whole, _ = run("whole", "--steps", 3, "--objective", "cfm")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update_ema", Mock(side_effect=[None, KeyboardInterrupt]))
        run("a", "--steps", 3, "--objective", "cfm", "--geometric-head")
    assert sorted(os.listdir("runs/a")) == ["args.json", "log.jsonl"]
    main("--name", "a", "--resume")
    assert_same_training(read("a")[0], whole)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(run, monkeypatch, capsys, name):
    """It comes after step 1, whose losses are already summed up: step 2 is the last."""
    number = getattr(signal, name)
    before = signal.getsignal(number)
    interrupt = Mock(side_effect=lambda *_: signal.raise_signal(number))
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", interrupt)
        ckpt, log = run("it's/a", "--steps", 4)
    assert ckpt["step"] == len(log) == 2 and signal.getsignal(number) == before
    out = capsys.readouterr().out
    assert "2 of 4 steps; next: python train.py --name 'it'\"'\"'s/a' --resume" in out
    monkeypatch.setattr(train, "update_ema", interrupt)
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        assert run("b", "--steps", 4)[0]["step"] == 4
    finally:
        signal.signal(number, before)


def test_the_newest_checkpoint_of_any_name_goes_on_or_is_sampled_and_is_named(run, capsys):
    whole, _ = run("exp/one", "--steps", 4, "--keep-every", 2)
    folder = Path("runs/exp/one")
    for file in (folder / "ckpt.pt", folder / "ckpt-0000004.pt"):
        file.unlink()
    with open(folder / "log.jsonl", "ab") as file:
        file.write(b'\n\0\0\n{"step": 3')  # the log is no gate
    (folder / "log.jsonl").rename("damaged")
    capsys.readouterr()
    sample.main(["--num-samples", "2", "--steps", "1"])
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "checkpoint: runs/exp/one/ckpt-0000002.pt, step 2 of 4"
    Path("damaged").rename(folder / "log.jsonl")
    main("--resume")
    assert "runs/exp/one/ckpt-0000002.pt, step 2 of 4" in capsys.readouterr().out
    again = torch.load(folder / "ckpt.pt", weights_only=True)
    assert_same_training(again, whole)


def test_a_checkpoint_is_let_go_once_it_is_loaded(run):
    """What is written into its file afterwards changes nothing."""
    def overwrite(*arguments):
        update(*arguments)
        path = Path("runs/a/ckpt-0000002.pt")
        path.write_bytes(bytes(path.stat().st_size))  # in place

    update = train.update_ema
    whole, _ = run("a", "--steps", 4, "--keep-every", 2)
    Path("runs/a/ckpt.pt").unlink()
    Path("runs/a/ckpt-0000004.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update_ema", overwrite)
        main("--resume", "--name", "a", "--keep-every", 0)
    assert_same_training(read("a")[0], whole)


def test_codes_tokenizer_and_checkpoint_belong_together(run, tiny_data, tiny_vq):
    run("a", "--steps", 2)
    resume = "--name", "a", "--resume", "--steps", 3
    meta = json.loads((tiny_data / "meta.json").read_text())
    sha = vq.load_vq(tiny_vq).sha256
    file = torch.load(tiny_vq)
    file["state_dict"]["quant_conv.bias"] += 1
    torch.save(file, tiny_vq.with_name("other.pt"))

    def say(**changes):
        (tiny_data / "meta.json").write_text(json.dumps(meta | changes))

    say(tokenizer=str(tiny_vq.with_name("other.pt")), tokenizer_sha256=sha)
    for call in (lambda: main(*resume), lambda: sample.main([])):  # of the same shape, not the same
        with pytest.raises(InputError, match=f"{tiny_data}: .*another tokenizer .*other.pt"):
            call()
    say(tokenizer=str(tiny_vq.with_name("other.pt")))  # codes of another tokenizer
    for call in (lambda: main(*resume), lambda: sample.main([])):
        with pytest.raises(InputError, match=f"{tiny_data}: .*runs/a.*tokenizer_sha256 is {sha}"):
            call()
    say(classes=["black", "ginger tabby", "white"])
    for call in (lambda: main(*resume), lambda: sample.main([])):
        with pytest.raises(InputError, match=f"{tiny_data}: .*runs/a.*classes is .'black', 'white"):
            call()
    moved = tiny_data.rename(tiny_data.with_name("moved"))
    tiny_vq.rename(moved / "tokenizer.pt")
    (moved / "meta.json").write_text(json.dumps(meta | {"tokenizer": "tokenizer.pt"}))
    main(*resume, "--data", moved)
    assert read("a")[0]["step"] == 3


def test_processes_that_read_different_things_do_not_train_together(monkeypatch):
    def gather(everyone, mine):
        everyone[:] = mine, mine | {"step": 8}

    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    train.agree({"step": 8, "lr": 0.1})
    with pytest.raises(InputError, match="processes differ.*step is 8 there, 4 here"):
        train.agree({"step": 4, "lr": 0.1})


def test_resuming_takes_the_newest_run_and_its_flags_unless_told_others(run, tiny_data):
    run("a", "--steps", 1, "--weight-decay", 0.5, "--geometric-head")
    run("b", "--steps", 1)
    for name in ("args.json", "ckpt.pt"):
        os.utime(f"runs/b/{name}", (0, 0))
    (tiny_data / "recipe.txt").write_text("--weight-decay 0.125")  # it is too late for this
    main("--resume", "--steps", 2, "--lr", 0.25)
    ckpt, log = read("a")
    assert [record["lr"] for record in log] == [0.001, 0.25]
    assert ckpt["args"] == json.loads(Path("runs/a/args.json").read_text())
    main("--name", "a", "--resume", "--steps", 3, "--weight-decay", 0.25)
    for after, decay in ((ckpt, 0.5), (read("a")[0], 0.25)):
        groups = after["opt"]["param_groups"]  # the second is the geometric head's
        assert [(group["weight_decay"], group["lr"]) for group in groups] == 2 * [(decay, 0.25)]


def test_checkpoints_and_pictures_are_made_when_due_and_at_the_end(run):
    run("a", "--steps", 25, "--lr", 0.01, "--log-every", 15, "--keep-every", 10,
        "--sample-every", 15, "--ema-decay", 0.9)
    assert sorted(path.name for path in Path("runs/a").rglob("*0*.*")) == [
        "0000015.png", "0000025.png", "ckpt-0000010.pt", "ckpt-0000020.pt", "ckpt-0000025.pt"]
    ckpt, log = read("a")
    assert [record["step"] for record in log] == [1, 15]
    assert train.load_run("runs/a/ckpt-0000010.pt").step == 10
    last = train.load_run()
    assert_same(dict(last.flow.model.state_dict()), dict(ckpt["ema"]))
    # The picture shows averaged weights, and noise that the seed fixes.
    noise = last.flow.prior(9, train.seeded("cpu", 0))
    codes = last.flow.sample(torch.arange(3).repeat(3), steps=50, noise=noise)
    picture = np.asarray(Image.open("runs/a/samples/0000025.png"))
    assert (picture == sheet(last.vq.decode_pixels(codes), 3)).all() and len(codes.unique()) > 3


def test_a_run_of_an_older_version_samples_and_goes_on(run, tiny_data, tiny_size):
    """Its checkpoint alone held the flags. Some of today's flags were unknown; the data moved."""
    meta = json.loads((tiny_data / "meta.json").read_text())
    del meta["reference"]
    (tiny_data / "meta.json").write_text(json.dumps(meta))
    ckpt, _ = run("old", "--steps", 2)
    Path("runs/old/args.json").unlink()
    ckpt["args"] = {
        "started": "2026-01-01 12:00:00", "data": "/gone", "objective": "purrception",
        "model": tiny_size, "steps": 2, "global_batch_size": 8, "accumulate": 1, "lr": 1e-3,
        "warmup": 0, "weight_decay": 0.01, "grad_clip": 1.0, "ema_decay": 0.9999, "ema_ramp": False,
        "z_loss": 1e-5, "label_dropout": 0.1, "seed": 0, "bf16": False, "compile": False,
        "log_every": 1, "ckpt_every": 25000, "keep_every": 0, "sample_every": 5000}
    torch.save(ckpt, "runs/old/ckpt.pt")
    sample.main(["--data", str(tiny_data), "--num-samples", "2", "--steps", "2"])
    assert Path("samples/000001.png").exists()
    main("--resume", "--data", tiny_data, "--steps", 4)
    resumed, _ = read("old")
    assert_same_training(resumed, run("new", "--steps", 4)[0])


def test_a_refused_command_leaves_the_run_as_it_was(run, capsys):
    run("a", "--steps", 2)
    before = Path("runs/a/args.json").read_text()
    for wrong in (("--model", "DiT-S/2"), ("--steps", 0), ("--accumulate", 3), ("--log-every", 0)):
        with pytest.raises(SystemExit):
            main("--name", "a", "--resume", *wrong)
    assert Path("runs/a/args.json").read_text() == before
    main("--name", "a", "--resume", "--steps", 3, "--ckpt-every", 0)
    assert read("a")[0]["step"] == 3  # the end is always saved


def test_runs_behind_links_are_found_and_broken_links_are_not(run):
    run("old", "--steps", 1)
    run("new", "--steps", 1)
    Path("far").mkdir()
    Path("runs/new").rename("far/new")
    Path("runs/new").symlink_to(Path("far/new").absolute())
    Path("runs/new/ckpt-old.pt").symlink_to("nowhere")
    main("--resume", "--steps", 2)
    assert read("new")[0]["step"] == 2 and read("old")[0]["step"] == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stays(run):
    with pytest.raises(InputError) as error:
        run("a", "--steps", 50, "--lr", 1e30, "--ckpt-every", 1)
    ckpt, log = read("a")
    assert 0 < ckpt["step"] == log[-1]["step"] < 50
    assert re.match(f"step {ckpt['step'] + 1}: loss (nan|inf).*--resume", str(error.value))
    with pytest.raises(InputError, match="step 2: loss nan"):
        run("b", "--steps", 2, "--grad-clip", "nan")


def test_a_run_is_not_overwritten(run, tiny_data, tiny_size):
    file = Path("runs/a/ckpt-0000005.pt")
    file.parent.mkdir(parents=True)
    file.write_text("valuable")
    for name in ("a", "a/ckpt-0000005.pt/b"):
        with pytest.raises(InputError, match="--name .*--resume"):
            run(name, "--steps", 1)
    assert file.read_text() == "valuable" and os.listdir("runs/a") == [file.name]
    Path("runs/b").mkdir()  # by a process that was killed at its start
    run("b", "--steps", 1)
    shutil.rmtree("runs/b")
    for _ in range(2):  # without a name, runs are numbered
        main("--data", tiny_data, "--model", tiny_size, "--steps", 1, "--global-batch-size", 4)
    assert sorted(os.listdir("runs")) == ["001", "002", "a"]


# ----- flags and data

def test_the_recipe_overrides_the_paper_and_the_command_line_both(tiny_data, tiny_size):
    recipe = f"--lr 0.5\n--model={tiny_size}  # small\n\n--ema-ramp --name 'a b'\n"
    (tiny_data / "recipe.txt").write_bytes(codecs.BOM_UTF8 + recipe.encode())
    args, _ = train.parse(["--data", str(tiny_data), "--lr", "0.25", "--no-ema-ramp"])
    assert (args.lr, args.model, args.ema_ramp, args.name) == (0.25, tiny_size, False, "a b")
    assert args.global_batch_size == 256 and "--lr 0.5" in args.recipe


@pytest.mark.parametrize("name, array", [
    ("labels.npy", np.zeros(7, int)),
    ("labels.npy", np.full(40, -1)),  # no picture was readable
    ("labels.npy", np.full(40, 9)),
    ("labels.npy", np.full(40, 1.0)),
    ("labels.npy", np.zeros((40, 1), int)),
    ("codes.npy", np.full((40, 4, 4), np.nan)),
    ("codes.npy", np.zeros((40, 0, 0), np.uint16)),
    ("codes_flip.npy", np.zeros((40, 2, 2), np.uint16)),
    ("codes.npy", np.full((40, 4, 4), 32, np.uint16)),  # there are 32 codes
    ("codes_flip.npy", np.full((40, 4, 4), 65535, np.uint16)),  # its encoding was interrupted
    ("codes.npy", None)])
def test_an_unusable_data_directory_is_named(run, tiny_data, name, array):
    if array is None:
        os.truncate(tiny_data / name, 300)
    else:
        np.save(tiny_data / name, array)
    with pytest.raises(InputError, match=f"{tiny_data}: .*; ") as error:
        run("a", "--steps", 1)
    assert "\n" not in str(error.value) and not Path("runs").exists()


@pytest.mark.parametrize("key, value", [
    ("reference", 5), ("image_size", None), ("classes", {"black": 0}), ("tokenizer", ["a.pt"]),
    ("classes", [1, 2, 3]), ("classes", ["black", "white", "ginger", None]), ("image_size", 64)])
def test_a_wrong_entry_of_meta_json_is_named(run, tiny_data, key, value):
    meta = json.loads((tiny_data / "meta.json").read_text())
    (tiny_data / "meta.json").write_text(json.dumps(meta | {key: value}))
    with pytest.raises(InputError, match=f"{tiny_data}: .*{key}.* in meta.json"):
        run("a", "--steps", 1)


@pytest.mark.parametrize("key, value", [
    ("model", "DiT-Q/2"), ("objective", "gan"), ("lr", "fast"), ("steps", None), ("warmup", 0.5)])
def test_a_wrong_setting_of_a_run_is_named(run, key, value):
    ckpt, _ = run("a", "--steps", 1)
    args = ckpt["args"] | {key: value}
    torch.save(ckpt | {"args": args}, "runs/b.pt")
    with pytest.raises(InputError, match=f"runs/b.pt: .*{value}"):
        sample.main(["--ckpt", "runs/b.pt"])
    Path("runs/a/ckpt.pt").unlink()
    Path("runs/a/args.json").write_text(json.dumps(args))
    with pytest.raises(InputError, match=f"runs/a/args.json: .*{value}"):
        main("--name", "a", "--resume")


@pytest.mark.parametrize("flags, recipe, message", [
    ("--data photos", "", "python vq.py .*photos --vq TOKENIZER --out"),
    ("--accumulate 3", "", "--global-batch-size"),
    ("--model DiT-S/8", "", "--model DiT-S/8: patches"),
    ("--resume", "", "runs/a/.*: not found"),
    ("--steps 2.5", "", "--steps: "),
    ("", "--name it's", "recipe.txt: unreadable"),
    ("", "--objective diffusion", "--objective")])
def test_other_wrong_input_is_named(run, tiny_data, capsys, flags, recipe, message):
    (tiny_data / "recipe.txt").write_text(recipe)
    with pytest.raises(SystemExit) as error:
        run("a", "--steps", 1, *flags.split())
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
