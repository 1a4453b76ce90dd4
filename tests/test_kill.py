"""Kill the commands at any moment, stop them by SIGTERM, fill their disk: repeated, they end as if nothing had been.

A process that imports torch once forks a child for every command; so a command costs what it does, not three seconds.
It has one thread when it forks: a pool of threads would not survive in the child.
"""
import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from test_train import ROOT, TIMING, assert_same

pytestmark = pytest.mark.slow

KILLS = 20           # of each command: most at random moments of its life,
SAVES = 4            # the last while it writes a file
ENDED = 60           # seconds within which a process must have ended whose peer was killed
SERVER = """
import gc, json, os, resource, sys
import torch, torch._dynamo, train, sample, vq, model    # the compiler is what Tensor.normal_ on "meta" imports
torch.set_num_threads(1)
model.SIZES["tiny"] = dict(depth=2, hidden_size=32, num_heads=2, patch_size=2)
gc.freeze()                                 # a child copies no page because of the garbage collector

def serve():
    for line in iter(sys.stdin.readline, ""):
        request, pids = json.loads(line), []
        for rank in range(request["processes"]):
            pid = os.fork()
            if pid == 0:
                return rank, request
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        sys.stdin.readline()                # until then an ended child keeps its number
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
    os._exit(0)

rank, request = serve()                     # goes on in the child
os.chdir(request["folder"])
for stream, name in enumerate((os.devnull, f"stdout{rank}", f"stderr{rank}")):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
if request["processes"] > 1:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["processes"]),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]))
if request["limit"]:                        # Python ignores SIGXFSZ: writing on raises OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"],) * 2)
name, *sys.argv[1:] = request["command"]
{"train": train, "sample": sample, "vq": vq}[name].main()
sys.stdout.flush()
os._exit(0)                                 # taking the interpreter down costs more than the command
"""


class Process:
    """A command in one or more children of the server; pids are theirs, code is the first one's exit code."""

    def __init__(self, server, folder, *command, processes=1, limit=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        request = dict(folder=str(folder), command=list(map(str, command)), processes=processes, limit=limit, port=port)
        self.folder, self.server = folder, server
        print(json.dumps(request), file=server.stdin, flush=True)
        self.pids = json.loads(server.stdout.readline())

    def kill(self, number=signal.SIGKILL, rank=0):
        os.kill(self.pids[rank], number)

    def ended(self, rank=0):
        return Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def wait(self):
        print(file=self.server.stdin, flush=True)
        self.codes = json.loads(self.server.stdout.readline())
        self.code = self.codes[0]
        paths = [self.folder / f"stderr{rank}" for rank in range(len(self.pids))]
        self.errors = [path.read_text() if path.exists() else "" for path in paths]
        return self

    def sentence(self):
        """Return the one sentence with which the command ended; what a progress bar printed does not count."""
        self.wait()
        assert self.code == 1 and "Traceback" not in self.errors[0], self.errors[0]
        text = re.sub(r"[^\r\n]*\[\d\d:\d\d[^]\r\n]*\]", "", self.errors[0]).strip()
        assert "\n" not in text, text
        return text


@pytest.fixture(scope="module")
def server():
    environment = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


@pytest.fixture
def start(server):
    return lambda *args, **options: Process(server, *args, **options)


# ------------------------------ killed at random moments

class Train:
    """Seven steps; a checkpoint after each, numbered ones and pictures after some."""

    files = "runs/a"

    def __init__(self, data):
        self.flags = ["--data", data, "--name", "a", "--model", "tiny", "--steps", 7, "--global-batch-size", 8,
                      "--no-bf16", "--log-every", 1, "--ckpt-every", 1, "--keep-every", 3, "--sample-every", 5]

    def command(self, folder):
        return ["train", *self.flags, *["--resume"] * (folder / self.files).exists()]

    def done(self, process):
        return process.code == 0 or process.errors[0].startswith("--steps 7: runs/a has done 7 already")

    def result(self, folder):
        """Return all that must be the same: not when the run began, and how fast it was."""
        run, result = folder / self.files, {}
        for path in run.glob("*.pt"):
            result[path.name] = torch.load(path, weights_only=True)
            del result[path.name]["args"]["started"]
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        result["log"] = [{key: x for key, x in record.items() if key not in TIMING} for record in log]
        return result


class Files:
    """A command whose files must have the same bytes."""

    def command(self, folder):
        return self.flags

    def done(self, process):
        return process.code == 0

    def result(self, folder):
        files = [path for pattern in self.files for path in folder.glob(pattern) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.suffix != ".partial"}


class Sample(Files):
    files = "out*", "out/*"

    def __init__(self, checkpoint):
        self.flags = ["sample", "--ckpt", checkpoint, "--num-samples", 24, "--per-proc-batch-size", 2, "--steps", 3,
                      "--npz", "--no-bf16", "--out", "out"]


class Encode(Files):
    files = "out/**/*",

    def __init__(self, images, tokenizer):
        self.flags = ["vq", images, "--vq", tokenizer, "--out", "out", "--size", 32, "--batch-size", 2,
                      "--num-workers", 2, "--flip", "--reference", images]


@pytest.fixture
def trained(start, tmp_path, tiny_data):
    """The checkpoint of a finished run."""
    (tmp_path / "trained").mkdir()
    assert start(tmp_path / "trained", *Train(tiny_data).command(tmp_path / "trained")).wait().code == 0
    return tmp_path / "trained/runs/a/ckpt.pt"


@pytest.fixture
def images(tmp_path):
    """Sixty pictures of three classes."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / f"images/{i % 3}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40 + i, 3), np.uint8)).save(path)
    return tmp_path / "images"


def half_written(folder):
    return [path for path in folder.rglob(".*.partial")]


def kill_while_saving(process, number):
    """Kill the process at the first sight of its half-written file of this number; at the latest when it has ended."""
    seen = set()
    while len(seen) < number and not process.ended():
        with contextlib.suppress(FileNotFoundError):       # it has just become the whole file
            seen.update(path.stat().st_ino for path in half_written(process.folder))
    process.kill()


@pytest.mark.parametrize("script", ["train", "sample", "vq"])
def test_a_command_killed_and_repeated_ends_with_the_bytes_of_one_that_was_not(script, start, request, tmp_path):
    fixture = request.getfixturevalue
    job = {"train": lambda: Train(fixture("tiny_data")), "sample": lambda: Sample(fixture("trained")),
           "vq": lambda: Encode(fixture("images"), fixture("tiny_vq"))}[script]()
    life = math.inf
    for folder in (tmp_path / "first", tmp_path / "whole"):
        folder.mkdir()
        began = time.perf_counter()
        assert start(folder, *job.command(folder)).wait().code == 0
        life = min(life, time.perf_counter() - began)
    expected = job.result(folder)
    assert_same(job.result(tmp_path / "first"), expected)
    rng = np.random.default_rng(0)
    killed = cut = 0
    for i in range(3 * KILLS):                             # some kills may come too late: the machine's speed varies
        folder = tmp_path / f"killed{i}"
        folder.mkdir()
        process = start(folder, *job.command(folder))
        if killed < KILLS - SAVES:
            time.sleep(rng.random() * life)
            process.kill()
        else:
            kill_while_saving(process, rng.integers(1, 9))
        killed += process.wait().code == -signal.SIGKILL
        cut += any(half_written(folder))
        again = start(folder, *job.command(folder)).wait()
        assert job.done(again), again.errors
        assert_same(job.result(folder), expected)
        shutil.rmtree(folder)
        if killed == KILLS:
            break
    assert killed == KILLS and cut > 0
    print(f"{script}: a life of {life:.2f} s, {killed} killed, {cut} of them while a file was half written")


# ------------------------------ stopped by SIGTERM

def log_of(folder):
    path = folder / "runs/a/log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_any_process_ends_all_within_a_step_and_saves(processes, start, tmp_path, tiny_data):
    flags = "--steps", 10 ** 6, "--ckpt-every", 10 ** 6, "--sample-every", 0
    process = start(tmp_path, *Train(tiny_data).command(tmp_path), *flags, processes=processes)
    wait_for(lambda: len(log_of(tmp_path)) >= 3)
    process.kill(signal.SIGTERM, rank=processes - 1)
    step = len(log_of(tmp_path))                           # each step has a line
    assert process.wait().codes == [0] * processes, process.errors
    assert "--resume" in (tmp_path / "stdout0").read_text()
    saved = torch.load(tmp_path / "runs/a/ckpt.pt", weights_only=True)["step"]
    assert saved == len(log_of(tmp_path)) <= step + 2      # a line may have been underway when they were counted


# ------------------------------ a full disk

@pytest.mark.parametrize("file", ["ckpt.pt", "ckpt-0000003.pt", "samples/0000003.png"])
def test_a_full_disk_while_training_is_one_sentence_and_the_checkpoint_stays(file, start, tmp_path, tiny_data, trained):
    job, path, run = Train(tiny_data), tmp_path / "runs/a" / file, tmp_path / "runs/a"
    assert start(tmp_path, *job.command(tmp_path), "--steps", 2, "--sample-every", 0).wait().code == 0
    before, log = (run / "ckpt.pt").read_bytes(), (run / "log.jsonl").read_text()
    pictures = file.endswith("png")
    size = 1000 if pictures else len(before) // 2          # bytes a file may have
    flags = "--ckpt-every", 7 if file != "ckpt.pt" else 1, "--sample-every", 3 if pictures else 0
    keep = "--keep-every", 3 if file == "ckpt-0000003.pt" else 0
    sentence = start(tmp_path, *job.command(tmp_path), *flags, *keep, limit=size).sentence()
    assert sentence.startswith(f"{path.relative_to(tmp_path)}: cannot be written")
    assert (run / "ckpt.pt").read_bytes() == before and not path.exists() or file == "ckpt.pt"
    assert (run / "log.jsonl").read_text().startswith(log) and not half_written(tmp_path)
    assert start(tmp_path, *job.command(tmp_path)).wait().code == 0       # with room again it goes on
    assert_same(job.result(tmp_path)["ckpt.pt"]["model"], torch.load(trained, weights_only=True)["model"])


def test_the_sentence_stands_on_a_line_of_its_own_below_the_progress_bar(start, tmp_path, tiny_data):
    process = start(tmp_path, *Train(tiny_data).command(tmp_path), limit=10 ** 4).wait()
    assert process.errors[0].splitlines()[-1].startswith("runs/a/ckpt.pt: cannot be written")


def test_a_disk_too_full_for_a_line_of_the_log_is_one_sentence(start, tmp_path, tiny_data):
    job, log = Train(tiny_data), tmp_path / "runs/a/log.jsonl"
    assert start(tmp_path, *job.command(tmp_path), "--steps", 2).wait().code == 0
    with open(log, "a") as file:                           # a long log, longer than a checkpoint
        file.write(log.read_text().splitlines()[0].replace("}", ' ' * 10 ** 6 + "}") + "\n")
    size = log.stat().st_size + 9
    assert "log.jsonl" in start(tmp_path, *job.command(tmp_path), limit=size).sentence()


@pytest.mark.parametrize("file, size", [("out/000003.png", 500), ("out.png", 3000), ("out.npz", 40_000)])
def test_a_full_disk_while_sampling_is_one_sentence_and_the_rest_is_kept(file, size, start, tmp_path, trained):
    job, path = Sample(trained), tmp_path / file
    assert start(tmp_path, *job.command(tmp_path)).wait().code == 0
    expected = job.result(tmp_path)
    assert path.stat().st_size > size
    path.unlink()                                          # the only one that is too large and not there yet
    sentence = start(tmp_path, *job.command(tmp_path), limit=size).sentence()
    assert sentence.startswith(f"{file}: cannot be written")
    left = job.result(tmp_path)
    assert left == {name: x for name, x in expected.items() if name != file} and not half_written(tmp_path)
    assert start(tmp_path, *job.command(tmp_path)).wait().code == 0 and job.result(tmp_path) == expected


@pytest.mark.parametrize("file, size", [
    ("out/reference/000003.png", 2000), ("out/codes.npy", 1000), ("out/labels.npy", 560)])
def test_a_full_disk_while_encoding_is_one_sentence_and_the_rest_is_kept(file, size, start, tmp_path, images, tiny_vq):
    job, path = Encode(images, tiny_vq), tmp_path / file
    assert start(tmp_path, *job.command(tmp_path)).wait().code == 0
    expected = job.result(tmp_path)
    assert path.stat().st_size > size
    path.unlink()
    sentence = start(tmp_path, *job.command(tmp_path), limit=size).sentence()
    assert sentence.startswith(f"{file}: cannot be written")
    left = job.result(tmp_path)
    assert left == {name: x for name, x in expected.items() if name != file} and not half_written(tmp_path)
    assert start(tmp_path, *job.command(tmp_path)).wait().code == 0 and job.result(tmp_path) == expected


# ------------------------------ several processes

def assert_same_log(log, expected):
    """Compare what two logs say, up to the rounding that another number of processes brings."""
    assert [x["step"] for x in log] == [x["step"] for x in expected]
    for one, two in zip(log, expected):
        for key in ("loss", "ce", "z", "grad_norm", "lr"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), one["step"]


def test_one_process_then_two_then_one_train_as_one_does(start, tmp_path, tiny_data):
    job = Train(tiny_data)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert start(tmp_path / "whole", *job.command(tmp_path / "whole"), "--steps", 9).wait().code == 0
    for steps, processes in (3, 1), (6, 2), (9, 1):
        command = [*job.command(tmp_path / "parts"), "--steps", steps]
        process = start(tmp_path / "parts", *command, processes=processes).wait()
        assert process.codes == [0] * processes, process.errors
    assert_same_log(log_of(tmp_path / "parts"), log_of(tmp_path / "whole"))


def workers_of(pid):
    """Return the children of torchrun that are training, in the order of their ranks."""
    ranks = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {x: int(child) for x in variables if x.startswith(b"RANK=")}
    return [ranks[name] for name in sorted(ranks)]


@pytest.mark.parametrize("rank", [0, 1])
def test_if_a_process_under_torchrun_is_killed_the_other_ends_and_resume_goes_on(rank, start, tmp_path, tiny_data):
    """torchrun sees it within a second, and gives the other process thirty seconds after SIGTERM."""
    flags = ["--data", tiny_data, "--name", "a", "--model", "DiT-demo/2", "--global-batch-size", 8, "--no-bf16",
             "--log-every", 1, "--ckpt-every", 2, "--sample-every", 0, "--steps"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "train.py"
    process = subprocess.Popen([*map(str, [*command, *flags, 10 ** 6])], cwd=tmp_path, env=environment, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: len(log_of(tmp_path)) >= 5)
    workers = workers_of(process.pid)
    os.kill(workers[rank], signal.SIGKILL)
    began = time.monotonic()
    errors = process.communicate(timeout=ENDED)[1]
    assert process.returncode == 1 and "SIGKILL" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    print(f"ended after {time.monotonic() - began:.1f} s")
    done = torch.load(tmp_path / "runs/a/ckpt.pt", weights_only=True)["step"]
    steps = done + 2
    resumed = start(tmp_path, "train", *flags, steps, "--resume", processes=2).wait()
    assert resumed.codes == [0, 0], resumed.errors
    (tmp_path / "whole").mkdir()
    assert start(tmp_path / "whole", "train", *flags, steps).wait().code == 0
    assert_same_log(log_of(tmp_path), log_of(tmp_path / "whole"))


@pytest.mark.parametrize("rank", [0, 1])
def test_if_a_process_is_killed_the_other_ends_by_itself_too(rank, start, tmp_path, tiny_data):
    flags = "--steps", 10 ** 6, "--sample-every", 0
    process = start(tmp_path, *Train(tiny_data).command(tmp_path), *flags, processes=2)
    wait_for(lambda: len(log_of(tmp_path)) >= 3)
    process.kill(rank=rank)
    wait_for(lambda: process.ended(1 - rank), ENDED)
    codes = process.wait().codes
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert "peer" in process.errors[1 - rank] or "Connection" in process.errors[1 - rank]
