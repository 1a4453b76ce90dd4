"""Ten thousand damaged inputs: each loads, or ends within ten seconds in one sentence that names the file.

Half of them are whole files with bytes flipped, cut, inserted or taken from another file; half are put together from
parts that are valid by themselves: headers of wild sizes, arrays of wild types, dictionaries of wild values.
"""
import collections
import io
import itertools
import json
import signal
import struct
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sample
import train
import vq

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]    # libraries warn about what they repair

SECONDS = 10
TOKENIZER = dict(ch=4, ch_mult=(1,), num_res_blocks=1, z_channels=4, n_embed=32, embed_dim=4, num_groups=2)
SIZES = [0, 1, 2, 3, 7, 40, 255, 256, 65535, 65536, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 63, 2 ** 64 - 1]
JSON = [None, True, 0, -1, 7, 2.5, 1e300, "", "x", "\0", "\ud800", "x" * 9999,
        [], {}, [[]], [None], ["a", "a"], {"a": 1}, [{}] * 3]


class Slow(BaseException):
    """Nothing handles it."""


@pytest.fixture(autouse=True)
def handlers():
    """Raise Slow at an alarm; afterwards, put back what train.main changed too."""
    def alarm(*_):
        raise Slow
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, alarm)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ------------------------------ mutations

def place(rng, n):
    """Choose a place in n bytes: half of them near the ends, where headers and directories are."""
    near = min(n, 600)
    return int(rng.choice([rng.integers(n), rng.integers(near), n - 1 - rng.integers(near), rng.integers(n)]))


def mutated(rng, files):
    """Return one of the files with one to three changes."""
    x = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.integers(1, 4)):
        if not x:
            break
        i, n = place(rng, len(x)), int(rng.choice([1, 2, 4, 8, 100]))
        other = files[rng.integers(len(files))]
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
                x[i:] = other[place(rng, len(other)):]
            case 5:
                at = place(rng, len(other))
                x[i:i + n] = other[at:at + n]
            case 6:                                        # a number of a header, in either order of bytes
                n = int(rng.choice([1, 2, 4, 8]))
                value = SIZES[rng.integers(len(SIZES))] % 256 ** n
                x[i:i + n] = value.to_bytes(n, rng.choice(["little", "big"]))
    return bytes(x)


def some(rng, values):
    return values[rng.integers(len(values))]


def saved(write, *args, **kwargs):
    with io.BytesIO() as file:
        write(file, *args, **kwargs)
        return file.getvalue()


# ------------------------------ arrays

TYPES = ["<u2", ">u2", "|u1", "<i8", "<f8", "<f4", "<f2", "<c16", "|b1", "<M8[s]", "<m8[D]", "|S3", "<U2", "|V5",
         "<f16", "|O", "<u2x", "", "[('a', '<u2')]", [("a", "<i8")]]


def wild_array(rng, right, shapes=((),)):
    """Return an array of another type, shape or content than `right`."""
    shapes = [right.shape, right.shape[:-1], (*right.shape, 1), (0, *right.shape[1:]),
              (*right.shape[:1], *[0] * (right.ndim - 1)), (),
              (*right.shape[:1], 0, 0, *right.shape[3:]),
              *shapes]
    shape, kind = some(rng, shapes), some(rng, [right.dtype.str] * 8 + TYPES[:15])
    array = np.zeros(shape, kind)
    if array.dtype.kind in "uifcb":
        low, high = some(rng, [(0, 1), (0, 3), (-1, 9), (0, 40), (-1e9, 1e9)])
        array = rng.uniform(low, high, shape)
        lowest = 0 if kind[1] in "ub" else None
        array = np.asarray(array if kind[1] in "fc" else np.clip(np.round(array), lowest, None)).astype(kind)
        if array.size and array.dtype.kind in "fc" and rng.random() < 0.3:
            array.flat[rng.integers(array.size)] = some(rng, [np.nan, np.inf, -np.inf, 1e308, -1e308])
    return array


def wild_npy(rng, right):
    """Return a .npy file whose header says anything."""
    if rng.random() < 0.5:
        return saved(np.save, wild_array(rng, right))
    shape = [some(rng, [*right.shape, *SIZES, -1, 2.5, "a"]) for _ in range(rng.integers(0, 5))]
    header = {"descr": some(rng, [right.dtype.str] * 9 + TYPES), "fortran_order": some(rng, [False, True, 0, None]),
              "shape": tuple(shape if rng.random() < 0.5 else right.shape)}
    if rng.random() < 0.1:
        header.pop(some(rng, list(header)))
    text = repr(header).encode() + b"\n"
    version, size = some(rng, [(b"\1\0", "<H"), (b"\2\0", "<I"), (b"\3\0", "<I"), (b"\x09\0", "<H")])
    return b"\x93NUMPY" + version + struct.pack(size, len(text)) + text + right.tobytes()


def wild_npz(rng, right):
    """Return an .npz file with wild arrays in the place of some of these."""
    arrays = {}
    for name, x in right.items():
        case = rng.random()
        if case < 0.9:
            arrays[name] = wild_array(rng, x) if case < 0.5 else x
    if rng.random() < 0.1:
        arrays["count"] = some(rng, [-1, 2.5, np.nan, "seven", [1, 2], {}, None])
    if rng.random() < 0.1:
        arrays["features"] = some(rng, ["untrained", 7, [], None])
    return saved(some(rng, [np.savez, np.savez_compressed]), **arrays)


# ------------------------------ pictures

def picture(mode, suffix, **options):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (30, 41, 3), np.uint8)).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    return saved(image.save, suffix, **options)


def exif(data=None):
    tags = Image.Exif()
    tags[274] = 6
    tags[270] = "a description"
    return b"Exif\0\0" + data if data else tags.tobytes()


def pictures():
    return [
        picture("RGB", "JPEG", exif=exif()), picture("L", "JPEG", progressive=True), picture("CMYK", "JPEG"),
        picture("RGB", "PNG", exif=exif()), picture("P", "PNG", transparency=3), picture("I;16", "PNG"),
        picture("1", "PNG"), picture("LA", "PNG"), picture("RGBA", "WEBP", lossless=True, exif=exif()),
        picture("RGB", "WEBP"), picture("RGB", "BMP"), picture("P", "BMP")]


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def wild_png(rng, _):
    """Return a PNG file of right check sums; its header, palette, transparency and pixels need not fit together."""
    side = [1, 7, 40] * 5 + SIZES[:13] + [13000]
    header = struct.pack(">IIBBBBB", some(rng, side), some(rng, side), some(rng, [1, 2, 4, 8, 16, 3]),
                         some(rng, [0, 2, 3, 4, 6, 1]), 0, 0, some(rng, [0, 0, 1, 2]))
    names = [b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"zTXt", b"gAMA", b"acTL", b"fcTL"]
    more = [chunk(some(rng, names), rng.bytes(rng.integers(0, 40))) for _ in range(rng.integers(0, 3))]
    pixels = zlib.compress(some(rng, [bytes(40 * 41 * 8), rng.bytes(500), b""]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def wild_bmp(rng, _):
    """Return a BMP file with a wild header."""
    side = [0, 1, 7, 40, -40, -1, 13000, 2 ** 31 - 1, -2 ** 31]
    header = struct.pack("<IiiHHIIiiII", some(rng, [40, 40, 40, 12, 108, 124, 0]), some(rng, side), some(rng, side), 1,
                         some(rng, [1, 4, 8, 16, 24, 32, 0, 7]), some(rng, [0, 0, 0, 1, 2, 3, 4]),
                         some(rng, SIZES[:13]), 0, 0, some(rng, SIZES[:8]), 0)
    start = struct.pack("<IHHI", 54, 0, 0, some(rng, [54, 0, 70, 9999]))
    return b"BM" + start + header + rng.bytes(rng.integers(0, 6000))


def wild_exif(rng, _):
    """Return a picture whose EXIF data is a directory of wild entries."""
    order = some(rng, "<>")
    entries = [struct.pack(order + "HHII", some(rng, [274, 256, 270, 34665, 0x8825, 0]), rng.integers(0, 14),
                           some(rng, SIZES[:13]), some(rng, [6, 8, 8, *SIZES[:13]])) for _ in range(rng.integers(1, 5))]
    data = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", some(rng, [8, 8, 8, 0, 999]), len(entries))
    return picture("RGB", some(rng, ["JPEG", "PNG", "WEBP"]), exif=exif(data + b"".join(entries) + bytes(4)))


def wild_picture(rng, files):
    return some(rng, [wild_png, wild_bmp, wild_exif])(rng, files)


# ------------------------------ the files of a data directory and of a run

def wild_meta(rng, right):
    meta = dict(right)
    for name in rng.choice(list(meta), rng.integers(1, 3)):
        meta[name] = some(rng, JSON)
        if rng.random() < 0.2:
            del meta[name]
    return json.dumps(meta, ensure_ascii=bool(rng.integers(2))).encode("utf8", "surrogatepass")


def wild_recipe(rng, _):
    names = [name for action in train.flags()._actions for name in action.option_strings]
    values = ["0", "-1", "1", "nan", "inf", "1e400", "9" * 5000, "1_0", "tiny", "cfm", "", "@", "@x", "@\0", "--", "-",
              "\x85", "\u0663", "\ufeff", "[", "%s", "x" * 9999]
    words = [some(rng, [*names, *values, *names]) + some(rng, ["", "=", "=7"]) for _ in range(rng.integers(1, 6))]
    return some(rng, [" ", "\n", "\r", "\t"]).join(words).encode(some(rng, ["utf8", "utf8", "utf16", "utf7"]))


def wild_checkpoint(rng, right):
    """Return a checkpoint in which some value, or one within, is another."""
    ckpt = {name: dict(x) if isinstance(x, dict) else x for name, x in right.items()}
    inner = some(rng, [ckpt, ckpt["args"], ckpt["ema"], ckpt["opt"]])
    name = some(rng, list(inner))
    if inner is ckpt["args"] or rng.random() < 0.3:        # the values of its flags are trusted
        del inner[name]
    else:
        inner[name] = some(rng, [*JSON, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), right])
    return saved(lambda file: torch.save(ckpt, file, _use_new_zipfile_serialization=bool(rng.integers(2))))


def wild_tokenizer(rng, right):
    config, state = dict(right["config"]), dict(right["state_dict"])
    layout = some(rng, ["config", "config", "state_dict", "model"])
    values = [*JSON[:11], 4, 8, 64, torch.zeros(3), torch.zeros(8, 3, 3, 3, dtype=torch.complex64),
              torch.zeros(32, 4).to_sparse()]
    inner = config if layout == "config" and rng.random() < 0.7 else state
    inner[some(rng, list(inner))] = some(rng, values)
    file = {"config": config, "state_dict": state} if layout == "config" else {layout: state}
    return saved(lambda out: torch.save(file, out, _use_new_zipfile_serialization=bool(rng.integers(2))))


# ------------------------------ ten thousand of them

class Case:
    """A kind of file: where it lies, whole ones, how wild ones are made, and what reads it."""

    def __init__(self, path, files, wild, load, right=None, named=None):
        self.path, self.files, self.wild, self.load = path, files, wild, load
        self.right = right
        self.named = str(named or path)


def case(kind, tmp_path, data, monkeypatch):
    """Return the case of this kind in a folder that holds the data directory `data`."""
    cpu = torch.device("cpu")
    tokenizer = {"config": TOKENIZER, "state_dict": vq.VQ(**TOKENIZER).state_dict()}
    torch.save(tokenizer, tmp_path / "tiny_vq.pt")         # the data directory's, smaller
    args = Namespace(batch_size=2, num_workers=1, size=32, skip_bad=False, reconstruct=None, rank=1, device="cpu",
                     ref=tmp_path / "right.npz", features=None, weights=None, save_stats=None)

    def read_data():
        found = train.open_data(data)
        if found.meta["tokenizer"] != str(tmp_path / "tiny_vq.pt"):
            train.open_tokenizer(found, cpu)
        train.check_codes(found, 32, 2)
        sample.pick_classes(None, found.meta["classes"])

    def read_run():
        train.parse(["--name", "a", "--resume"])
        sample.load_run(path, cpu, data)

    def read_set():
        fid.compare(Namespace(**vars(args) | {"samples": path}))

    def read_pictures():
        for _ in vq.read_pictures([0], [path], args, "read"):
            pass

    def measure_picture():
        for pixels in fid.read_folder([path], args):
            Colours()(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    if kind.startswith("tokenizer"):
        path = tmp_path / "a.pt"
        file = saved(lambda out: torch.save(tokenizer, out, _use_new_zipfile_serialization="zip" in kind))
        return Case(path, [file], wild_tokenizer, lambda: vq.load_vq(path), tokenizer)
    if kind == "checkpoint":
        path = Path("runs/a/ckpt.pt")
        train.main(["--data", str(data), "--name", "a", "--model", "tiny", "--global-batch-size", "8", "--steps", "1",
                    "--no-bf16", "--sample-every", "0"])
        network = vq.load_vq(tmp_path / "tiny_vq.pt")
        monkeypatch.setattr(sample, "open_tokenizer", lambda *_: network)
        return Case(path, [path.read_bytes()], wild_checkpoint, read_run, torch.load(path, weights_only=True))
    if kind in ("codes.npy", "labels.npy"):
        path = data / kind
        files = [path.read_bytes(), (data / "labels.npy").read_bytes()]
        return Case(path, files, wild_npy, read_data, np.load(path), data)
    if kind == "meta.json":
        path = data / kind
        right, anything = json.loads(path.read_text()), ": "             # it may be the file that meta.json names
        return Case(path, [path.read_bytes()], wild_meta, read_data, right, anything)
    if kind == "recipe.txt":
        path, repository = data / kind, Path(train.__file__).parent
        files = [(repository / "demo/recipe.txt").read_bytes()]
        return Case(path, files, wild_recipe, lambda: train.parse(["--data", str(data)]))
    if kind.startswith("npz"):
        path, rng = tmp_path / "a.npz", np.random.default_rng(0)
        images = {"arr_0": rng.integers(0, 256, (5, 9, 8, 3), np.uint8)}
        numbers = {"mu": rng.random(5), "sigma": np.cov(rng.random((5, 9))), "count": np.array(9),
                   "features": np.array("inception")}
        np.savez(tmp_path / "right.npz", **numbers)
        right = images if "images" in kind else numbers
        files = [saved(write, **right) for write in (np.savez, np.savez_compressed)]
        return Case(path, files, wild_npz, read_set, right)
    path = tmp_path / "a.png"
    return Case(path, pictures(), wild_picture, read_pictures if kind == "picture" else measure_picture)


class Colours(torch.nn.Module):
    """Stand in for Inception: resized as there, then 5 features of an image at no cost."""

    def forward(self, x):
        x = fid.resize(x.float(), 9)
        return torch.cat([x.mean((2, 3)), x[:, :2].std((2, 3))], 1)


def outcome(load, named, capsys):
    """Return None if it loads or ends in a sentence that names the file; otherwise what went wrong."""
    signal.alarm(SECONDS)
    try:
        load()
    except SystemExit as error:
        sentence = error.code
        if error.code == 2:                                # argparse: usage, then the sentence; it names the flag
            sentence = capsys.readouterr().err.splitlines()[-1]
            return None if " error: " in sentence else f"no sentence: {sentence}"
        if error.code == 0:                                # --help
            return None
        if not isinstance(sentence, str) or "\n" in sentence or named not in sentence:
            return f"not one sentence that names {named}: {sentence!r}"
    except (Exception, Slow) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return None


KINDS = {"tokenizer zip": 300, "tokenizer legacy": 300, "checkpoint": 300, "codes.npy": 2000, "labels.npy": 2000,
         "meta.json": 1000, "recipe.txt": 1000, "npz images": 900, "npz statistics": 900, "picture": 800,
         "picture for fid.py": 500}
assert sum(KINDS.values()) == 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_loads_or_ends_in_one_sentence(kind, tmp_path, tiny_data, tiny_size, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "load_inception", lambda path=None: Colours())
    monkeypatch.setattr(fid, "untrained_inception", Colours)
    it, rng = case(kind, tmp_path, tiny_data, monkeypatch), np.random.default_rng(0)
    wrong = collections.Counter()
    for i in range(KINDS[kind]):
        content = it.wild(rng, it.right) if i % 2 else mutated(rng, it.files)
        it.path.write_bytes(content)
        found = outcome(it.load, it.named, capsys)
        if found:
            wrong[found[:150]] += 1
            (tmp_path / f"wrong{i}").write_bytes(content)
    assert not wrong, "\n".join(f"{n} x {what}" for what, n in wrong.most_common(30))


def test_a_recipe_that_reads_itself_is_refused(tiny_data, capsys):
    path = tiny_data / "recipe.txt"
    path.write_text(f"@{path}")
    assert outcome(lambda: train.parse(["--data", str(tiny_data)]), str(path), capsys) is None


@pytest.mark.parametrize("reader", ["picture", "picture for fid.py"])
@pytest.mark.parametrize("side", [0, 13_000, 40_000])
def test_a_picture_of_no_or_very_many_pixels_is_one_sentence_at_worst(
        side, reader, tmp_path, tiny_data, monkeypatch, capsys):
    it = case(reader, tmp_path, tiny_data, monkeypatch)
    rows = zlib.compress(bytes(side * (1 + -(-side // 8))), 1)           # of one bit a pixel
    it.path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
                        + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    found = outcome(it.load, it.named, capsys)
    assert found is None, found


def test_a_bmp_of_no_pixels_is_refused(tmp_path, tiny_data, monkeypatch, capsys):
    for reader, wide, high in itertools.product(["picture", "picture for fid.py"], [0, 5], [0, 7]):
        it = case(reader, tmp_path, tiny_data, monkeypatch)
        header = struct.pack("<IiiHHIIiiII", 40, wide, high, 1, 24, 0, 0, 0, 0, 0, 0)
        it.path.write_bytes(b"BM" + struct.pack("<IHHI", 54 + 24 * 7, 0, 0, 54) + header + bytes(24 * 7))
        found = outcome(it.load, it.named, capsys)
        assert found is None, (reader, wide, high, found)


@pytest.mark.parametrize("reader", [lambda path: vq.open_image(path, 8), fid.read_image], ids=["vq", "fid"])
def test_a_picture_is_never_handed_to_another_program(reader, tmp_path, monkeypatch):
    path = tmp_path / "cat.png"                            # PostScript, which Pillow would give to Ghostscript
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n" + b"showpage\n" * 9)
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")            # as if it were installed
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: started.append(args))
    with pytest.raises(SystemExit, match="cat.png"):
        reader(path)
    assert not started
