"""Thousands of damaged files: each loads, or ends within seconds in one sentence that names it."""
import functools
import io
import signal
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import train
import vq

NUMBERS = [0, 1, 2, 7, 255, 256, 65535, 65536, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 63]


class Slow(BaseException):
    """No script handles it."""


def ring(*_):
    raise Slow


# ----- damage

def place(rng, n):
    """Choose a place in n bytes: half of them near the ends, where headers and directories are."""
    near = min(n, 600)
    ends = rng.integers(near), n - 1 - rng.integers(near)
    return int(rng.choice([*ends, *rng.integers(n, size=2)]))


def mutated(rng, files):
    """Return one of the files with one to three changes."""
    x = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.integers(1, 4)):
        if not x:
            break
        i = place(rng, len(x))
        n = int(rng.choice([1, 2, 4, 8, 100]))
        other = files[rng.integers(len(files))]
        at = place(rng, len(other))
        match rng.integers(7):
            case 0:
                x[i] ^= 1 << int(rng.integers(8))
            case 1:
                del x[i:]
            case 2:
                x[i:i] = rng.bytes(n)
            case 3:
                del x[i:i + n]
            case 4:
                x[i:] = other[at:]
            case 5:
                x[i:i + n] = other[at:at + n]
            case 6:  # a number of a header, in either order of bytes
                n = int(rng.choice([1, 2, 4, 8]))
                value = NUMBERS[rng.integers(len(NUMBERS))] % 256 ** n
                x[i:i + n] = value.to_bytes(n, rng.choice(["little", "big"]))
    return bytes(x)


def damaged(rng, files):
    """Return one of the files mutated; of an archive, half of the time, a member mutated."""
    content = files[rng.integers(len(files))]
    if not zipfile.is_zipfile(io.BytesIO(content)) or rng.random() < 0.5:
        return mutated(rng, files)
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(archive, "w") as new:
        names = old.namelist()
        chosen = names[int(len(names) * rng.random() ** 2)]  # the first is the pickle or a header
        for name in names:
            member = old.read(name)
            new.writestr(name, mutated(rng, [member]) if name == chosen else member)
    return archive.getvalue()


# ----- whole files, and what reads them

def pictures(path):
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    for suffix, mode, options in [
            ("JPEG", "RGB", {"exif": exif}), ("JPEG", "L", {"progressive": True}),
            ("JPEG", "CMYK", {}), ("PNG", "RGB", {"exif": exif}), ("PNG", "P", {"transparency": 3}),
            ("PNG", "I;16", {}), ("PNG", "1", {}), ("PNG", "LA", {}), ("WEBP", "RGBA", {}),
            ("BMP", "RGB", {}), ("BMP", "P", {})]:
        Image.effect_noise((41, 30), 64).convert(mode).save(path, suffix, **options)
        yield path.read_bytes()


class Colours(torch.nn.Module):
    """Stand in for Inception: five features of an image, at no cost."""

    def forward(self, x):
        x = fid.resize(x.float(), 9)
        return torch.cat([x.mean((2, 3)), x[:, :2].std((2, 3))], 1)


def case(kind, tmp_path, data):
    """Return the path of a kind of file, whole ones, what reads it, and what it names."""
    path = tmp_path / "a.npz"
    if kind == "tokenizer":
        config = dict(ch=4, ch_mult=(1,), num_res_blocks=1, n_embed=32, num_groups=2)
        torch.save({"config": config, "state_dict": vq.VQ(**config).state_dict()}, path)
        return path, [path.read_bytes()], lambda: vq.load_vq(path), path
    if kind == "checkpoint":
        net = torch.nn.Linear(3, 3)
        opt = torch.optim.AdamW(net.parameters())
        net(torch.ones(3)).sum().backward()
        opt.step()
        states = {"model": net.state_dict(), "opt": opt.state_dict()}
        args = {"model": "DiT-S/2", "objective": "cfm", "lr": 1.0}
        torch.save({**states, "step": 1, "args": args}, path)
        load = functools.partial(train.load_checkpoint, path, model=net, opt=opt)
        return path, [path.read_bytes()], load, path
    if kind in ("codes.npy", "labels.npy", "meta.json"):
        path = data / kind
        named = ": " if kind == "meta.json" else data  # perhaps the tokenizer that it names
        return path, [path.read_bytes()], lambda: train.open_data(data, "cpu"), named
    if kind == "npz":
        rng = np.random.default_rng(0)
        np.savez(path, arr_0=rng.integers(0, 256, (5, 9, 8, 3), np.uint8))
        right = tmp_path / "right.npz"
        np.savez(right, mu=rng.random(5), sigma=np.cov(rng.random((5, 9))), count=9)
        load = functools.partial(fid.main, [str(path), "--ref", str(right)])
        return path, [path.read_bytes(), right.read_bytes()], load, path
    return path, list(pictures(path)), lambda: vq.crop(vq.read_image(path), 32), path


def outcome(load, named):
    """Return None if it loads or ends in a sentence with this name; else what went wrong."""
    signal.alarm(10)
    try:
        load()
    except vq.InputError as error:
        sentence = str(error.code)
        if "\n" in sentence or str(named) not in sentence:
            return f"not one sentence that names {named}: {sentence!r}"
    except (Exception, Slow) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


COUNTS = {"tokenizer": 300, "checkpoint": 600, "codes.npy": 300, "labels.npy": 300,
          "meta.json": 300, "npz": 700, "picture": 1500}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # libraries warn about what they repair
@pytest.mark.parametrize("kind", COUNTS)
def test_a_damaged_file_loads_or_ends_in_one_sentence(kind, tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(fid, "inception", lambda *_: Colours())
    path, files, load, named = case(kind, tmp_path, tiny_data)
    path.write_bytes(files[0])
    load()
    signal.signal(signal.SIGALRM, ring)
    rng = np.random.default_rng(0)
    wrong = []
    for i in range(COUNTS[kind]):
        path.write_bytes(damaged(rng, files))
        found = outcome(load, named)
        if found:
            wrong.append(f"wrong{i}: {found}")
            (tmp_path / f"wrong{i}").write_bytes(path.read_bytes())
    assert not wrong


def test_a_picture_is_never_handed_to_another_program(tmp_path, monkeypatch):
    path = tmp_path / "cat.png"  # PostScript, which Pillow would give to Ghostscript
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")  # as if it were installed
    monkeypatch.setattr("subprocess.check_call", lambda *args, **_: started.append(args))
    with pytest.raises(vq.InputError, match="cat.png"):
        vq.read_image(path)
    assert not started
