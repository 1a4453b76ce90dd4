"""Kill the commands at any moment, fill their disk: repeated, they end as if nothing had been.

A server that has imported torch forks a process for each command, which saves its start.
"""
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import model
import vq
from test_train import TIMING, assert_same, close

FORK = multiprocessing.get_context("forkserver")
KILLS = 8  # of each command, at random moments of its life


def be(command, folder, rank, world, port, limit=0, cut=0):
    """Run a script in this process; harm it by a full disk, or kill it in file number `cut`."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock would outlive a killed process
    model.SIZES["tiny"] = dict(depth=2, hidden_size=32, num_heads=2, patch_size=2)
    replace = os.replace
    files = []

    def replace_or_die(source, target):
        files.append(source)
        if len(files) == cut:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = replace_or_die
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(f"output{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if limit:  # bytes a file may have; Python ignores SIGXFSZ
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    script, *sys.argv[1:] = map(str, command)
    importlib.import_module(script).main()


def start(folder, command, world=1, **harm):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    args = [(command, folder, rank, world, port) for rank in range(world)]
    processes = [FORK.Process(target=be, args=x, kwargs=harm, daemon=True) for x in args]
    for process in processes:
        process.start()
    return processes


def codes(processes):
    """Wait for the processes; return their exit codes."""
    for process in processes:
        process.join(60)
        process.kill()  # if it hangs
    return [process.exitcode for process in processes]


def succeed(folder, command, world=1):
    assert codes(start(folder, command, world)) == [0] * world, (folder / "output0").read_text()


def log_of(folder):
    """Return the log without times. If a step has two lines, after a kill, the later counts."""
    path = folder / "runs/a/log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = {line["step"]: {key: line[key] for key in line if key not in TIMING} for line in lines}
    return [steps[step] for step in sorted(steps)]


def assert_same_end(folder, whole):
    for path in [*whole.glob("runs/*/*.pt"), *whole.glob("out.*"), *whole.glob("out/*")]:
        other = folder / path.relative_to(whole)
        if path.suffix == ".pt":
            assert_same(*(torch.load(x, weights_only=True) for x in (other, path)))
        else:
            assert other.read_bytes() == path.read_bytes(), path
    assert log_of(folder) == log_of(whole)


@pytest.fixture
def commands(tmp_path, tiny_data, tiny_vq, monkeypatch):
    """Return for each script a function from a folder to the command to be given there."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # its threads would not survive a fork
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    FORK.set_forkserver_preload(["torch._dynamo", "sample", "test_kill"])
    def train(folder, *flags):
        run = folder / "runs/a"
        resume = ["--resume"] if (run / "args.json").exists() else []
        if not resume:  # killed before it wrote its flags
            shutil.rmtree(run, ignore_errors=True)
        return ["train", "--data", tiny_data, "--name", "a", "--model", "tiny", "--steps", 7,
                "--global-batch-size", 8, "--lr", 0.02, "--ema-ramp", "--no-bf16", "--log-every", 1,
                "--ckpt-every", 1, "--keep-every", 3, "--sample-every", 5, *resume, *flags]

    for i in range(40):
        path = tmp_path / f"images/{i % 3}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40 + i), 64).save(path)
    succeed(tmp_path / "trained", train(tmp_path / "trained"))
    encode = ["vq", tmp_path / "images", "--vq", tiny_vq, "--out", "out", "--size", 32,
              "--batch-size", 2, "--flip"]
    sample = ["sample", "--ckpt", tmp_path / "trained/runs/a/ckpt.pt", "--num-samples", 24,
              "--per-proc-batch-size", 2, "--steps", 3, "--no-bf16", "--out", "out"]
    return {"train": train, "sample": lambda folder: sample, "vq": lambda folder: encode}


@pytest.mark.slow
@pytest.mark.parametrize("script, file, cuts", [
    ("train", "runs/a/ckpt.pt", (1, 2, 4, 5, 12)), ("sample", "out/000000.png", (1, 9, 26)),
    ("vq", "out/codes.npy", (1, 2, 3, 4))])
def test_a_command_killed_or_out_of_disk_and_repeated_ends_with_the_bytes_of_one_that_was_not(
        script, file, cuts, commands, tmp_path):
    command, whole = commands[script], tmp_path / "whole"
    began = time.monotonic()
    succeed(whole, command(whole))
    life = time.monotonic() - began
    half = (whole / file).stat().st_size // 2
    rng = np.random.default_rng(0)
    killed = []
    for harm in ({"limit": half}, *({"cut": n} for n in cuts), *[{}] * KILLS):
        folder = tmp_path / f"harmed{len(killed)}"
        running = start(folder, command(folder), **harm)
        if not harm:
            time.sleep(rng.random() * life)
            running[0].kill()
        killed.append(codes(running) == [-signal.SIGKILL])
        said = "".join(path.read_text() for path in folder.glob("output0"))
        assert "Traceback" not in said and (f"{file}: cannot be w" in said) == ("limit" in harm)
        succeed(folder, command(folder))
        assert_same_end(folder, whole)
    assert killed[:1 + len(cuts)] == [False, *[True] * len(cuts)]
    assert sum(killed) >= len(cuts) + 2  # kills at random moments may come too late


@pytest.mark.slow
def test_one_process_then_two_then_one_end_as_one_does(commands, tmp_path):
    for script in ("sample", "vq"):
        one, two = tmp_path / f"{script}1", tmp_path / f"{script}2"
        succeed(one, commands[script](one))
        succeed(two, commands[script](two), world=2)
        assert_same_end(two, one)
    parts = tmp_path / "parts"
    for steps, world in (3, 1), (5, 2), (7, 1):
        succeed(parts, commands["train"](parts, "--steps", steps), world)
    assert log_of(parts) == close(log_of(tmp_path / "trained"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_if_a_process_is_killed_the_other_ends_and_if_it_is_stopped_both_save(
        rank, number, commands, tmp_path):
    folder = tmp_path / "two"
    processes = start(folder, commands["train"](folder, "--steps", 10 ** 6), world=2)
    while len(log_of(folder)) < 3 and processes[0].is_alive():
        time.sleep(0.01)
    os.kill(processes[rank].pid, number)
    ended = codes(processes)
    steps = len(log_of(folder))  # each step has a line
    if number == signal.SIGTERM:
        assert ended == [0, 0] and torch.load(folder / "runs/a/ckpt.pt")["step"] == steps
    else:
        assert ended[rank] == -number and ended[1 - rank] == 1
    succeed(folder, commands["train"](folder, "--steps", steps + 1), world=2)


def test_a_file_takes_its_name_only_when_whole(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with vq.write_whole(path) as file:
        file.write(b"whole")
        assert not path.exists()
    for error, told in (KeyError, KeyError), (OSError, vq.InputError):
        with pytest.raises(told), vq.write_whole(path) as file:
            file.write(b"half")
            raise error
    with pytest.raises(vq.InputError, match="a.txt/b: "), vq.write_whole(path / "b"):
        pass
    assert path.read_bytes() == b"whole" and os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("save", [np.save, lambda file, x: torch.save(torch.from_numpy(x), file)])
def test_a_full_disk_is_noticed_whoever_writes(save, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(vq.InputError, match="a.x: "), vq.write_whole(tmp_path / "a.x") as file:
            save(file, np.zeros(200))  # numpy reports no error of a file so small
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
