"""Map pixels to codes and back with the frozen VQ autoencoder whose codes Purrception generates.

    encode    c = argmin_k |encoder(x) - e_k|     (Eq. 8, 9)
    embed     z = e_c
    decode    x = decoder(z)

The network (VQGAN, arXiv 2012.09841) is that of vq-f8 (CompVis/latent-diffusion), vq_ds8_c2i
(FoundationVision/LlamaGen) and this project's tokenizers.

    python vq.py IMAGES --vq vq-f8.ckpt --out data/imagenet     encode a folder; also with torchrun

Shapes: B batch, H W pixels, h w grid of codes, K codes, d code dimension, C channels.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shlex
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from flow import nearest_code
from model import chain


# ----- the network

def conv3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = norm(c_out)
        self.conv2 = conv3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    def __init__(self, c, norm):
        super().__init__()
        self.norm = norm(c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2).mT.unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B,1,hw,C]
        h = h.squeeze(1).mT.reshape(x.shape)
        return x + self.proj_out(h)


def middle(c, norm):
    return chain(block_1=ResBlock(c, c, norm), attn_1=Attention(c, norm),
                 block_2=ResBlock(c, c, norm))


class Level(nn.Module):
    """Apply residual blocks, perhaps with attention, then perhaps change the resolution."""

    def __init__(self, c_in, c_out, num_blocks, attention, norm, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(num_blocks):
            self.block.append(ResBlock(c_out if i else c_in, c_out, norm))
            self.attn.append(Attention(c_out, norm) if attention else nn.Identity())
        self.downsample = chain()
        self.upsample = chain()
        if down:  # vq-f8 pads right and bottom only
            pad = nn.ZeroPad2d((0, 1, 0, 1))
            self.downsample = chain(pad=pad, conv=nn.Conv2d(c_out, c_out, 3, stride=2))
        if up:
            self.upsample = chain(repeat=nn.Upsample(scale_factor=2), conv=conv3(c_out, c_out))

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return self.upsample(self.downsample(h))


def encoder(ch, ch_mult, num_blocks, z_channels, norm):
    """Map images [B,3,H,W] to [B,z_channels,h,w]."""
    last = len(ch_mult) - 1
    down = nn.Sequential()
    c = ch
    for i, m in enumerate(ch_mult):
        down.append(Level(c, ch * m, num_blocks, i == last, norm, down=i < last))
        c = ch * m
    return chain(
        conv_in=conv3(3, ch), down=down, mid=middle(c, norm),
        norm_out=norm(c), act=nn.SiLU(), conv_out=conv3(c, z_channels))


def decoder(ch, ch_mult, num_blocks, z_channels, norm):
    """Map [B,z_channels,h,w] to images [B,3,H,W]."""
    last = len(ch_mult) - 1
    levels = {}
    top = c = ch * ch_mult[-1]
    for i, m in reversed(list(enumerate(ch_mult))):  # up.0, the finest, is last
        levels[str(i)] = Level(c, ch * m, num_blocks + 1, i == last, norm, up=i > 0)
        c = ch * m
    return chain(
        conv_in=conv3(z_channels, top), mid=middle(top, norm), up=chain(**levels),
        norm_out=norm(c), act=nn.SiLU(), conv_out=conv3(c, 3))


class VQ(nn.Module):
    """Autoencode images through a grid of codes. Defaults are vq-f8's, key names CompVis's.

    With l2_norm (LlamaGen), all e_k and encoder outputs are unit vectors; the authors' release
    samples with other e_k.
    """

    def __init__(self, ch=128, ch_mult=(1, 2, 2, 4), num_res_blocks=2, z_channels=4, n_embed=16384,
                 embed_dim=4, l2_norm=False, num_groups=32):
        super().__init__()
        norm = functools.partial(nn.GroupNorm, num_groups, eps=1e-6)
        self.factor = 2 ** (len(ch_mult) - 1)  # pixels per code, each way
        self.l2_norm = l2_norm
        self.encoder = encoder(ch, ch_mult, num_res_blocks, z_channels, norm)
        self.decoder = decoder(ch, ch_mult, num_res_blocks, z_channels, norm)
        self.quantize = chain(embedding=nn.Embedding(n_embed, embed_dim))
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    @property
    def codebook(self):
        """The vectors e_k, [K,d]; unit vectors with l2_norm."""
        E = self.quantize.embedding.weight
        return F.normalize(E, dim=1) if self.l2_norm else E

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # TF32 changes codes
    def encode(self, x):
        """Map images [B,3,H,W] in [-1,1] to codes (Eq. 8, 9). self.factor must divide H and W."""
        return self.nearest(self.quant_conv(self.encoder(x)))

    def embed(self, codes):
        """Look up the latents z [B,d,h,w] of codes [B,h,w]."""
        return F.embedding(codes, self.codebook).movedim(-1, 1).contiguous()

    def nearest(self, z):
        """Find the nearest codes [B,h,w], int64, of latents z [B,d,h,w]."""
        E = self.codebook
        z = z.movedim(1, -1).to(E.dtype)  # [B,h,w,d]
        if self.l2_norm:
            z = F.normalize(z, dim=-1)
        return nearest_code(z, E)

    def decode(self, codes):
        """Map codes [B,h,w] to images [B,3,H,W], clamped to [-1,1]."""
        z = self.post_quant_conv(self.embed(codes))
        return self.decoder(z).clamp(-1, 1)

    def decode_pixels(self, codes):
        """Decode codes [B,h,w] to pixels uint8 [B,H,W,3] on the CPU, in float32."""
        batches = codes.split(8 if codes.is_cuda else 1)  # on a CPU, batches change rounding
        with torch.autocast(codes.device.type, enabled=False):
            return torch.cat([to_pixels(self.decode(batch)).cpu() for batch in batches])


# ----- weights

TRAINERS = re.compile(r"(pytorch_lightning|lightning)\..+|argparse\.Namespace|_codecs\.encode|"
                      r"numpy\.(dtype|_?core\.multiarray\.scalar)")


class Stub:
    def __init__(self, *_, **__):
        pass

    __setstate__ = __init__


def read_checkpoint(path):
    """Read a torch.save file onto the CPU, its tensors when they are used.

    Nothing in it is executed: trainers' objects become stubs, others are refused.
    """
    with InputError.explain(f"{path}: unreadable; a file of torch < 1.6 must be saved anew"):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        for name in names:
            if not TRAINERS.fullmatch(name):
                raise ValueError(f"it asks for {name}, which could run code")
        stubs = [(OrderedDict if name.endswith("Dict") else Stub, name) for name in names]
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, "cpu", weights_only=True, mmap=True)


def from_llamagen(state):
    """Rename LlamaGen's keys to CompVis's. Its decoder counts from coarse to fine."""
    names = {".mid.0.": ".mid.block_1.", ".mid.1.": ".mid.attn_1.", ".mid.2.": ".mid.block_2.",
             "encoder.conv_blocks.": "encoder.down.", ".res.": ".block."}
    levels = count(state, "decoder.conv_blocks.")
    for i in range(levels):
        names[f"decoder.conv_blocks.{i}."] = f"decoder.up.{levels - 1 - i}."
    renamed = {}
    for key, x in state.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[key] = x
    renamed.pop("quantize.codebook_used", None)
    return renamed


def count(state, prefix):
    """Count the modules whose keys are a prefix, a number, and more."""
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


def config_of(state):
    """Infer VQ's arguments from the keys and shapes of its weights."""
    ch = len(state["encoder.conv_in.weight"])
    levels = range(count(state, "encoder.down."))
    n_embed, embed_dim = state["quantize.embedding.weight"].shape
    return dict(
        ch=ch,
        ch_mult=[len(state[f"encoder.down.{i}.block.0.conv1.weight"]) // ch for i in levels],
        num_res_blocks=count(state, "encoder.down.0.block."),
        z_channels=len(state["encoder.conv_out.weight"]),
        n_embed=n_embed,
        embed_dim=embed_dim)


def load_vq(path, device="cpu"):
    """Load a frozen VQ, in eval mode and float32. Raises InputError for other or damaged files.

    path: vq-f8's or LlamaGen's file, or {"config": arguments of VQ, "state_dict": tensors}. The
    attribute sha256 identifies it.
    """
    file = read_checkpoint(path)
    with InputError.explain(f"{path}: not a tokenizer; use vq-f8 or vq_ds8_c2i"):
        if "config" in file:
            config = file["config"]
            state = file["state_dict"]
        elif "state_dict" in file:  # CompVis
            extra = "loss.", "model_ema."
            state = {k: x for k, x in file["state_dict"].items() if not k.startswith(extra)}
            config = config_of(state)
        else:  # LlamaGen, which samples with averaged weights
            state = from_llamagen(file.get("ema") or file["model"])
            config = config_of(state) | {"l2_norm": True}
        with torch.device("meta"):
            vq = VQ(**config)
        state = {key: x.to(torch.float32, copy=True) for key, x in state.items()}
        vq.load_state_dict(state, assign=True)
        vq.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if torch.device(device).type == "cpu":  # 1.6x faster; GroupNorm on a GPU would copy
        vq.to(memory_format=torch.channels_last)
    return vq.eval().requires_grad_(False).to(device)


# ----- encoding a data set

# A row of codes.npy is EMPTY until it is encoded. Each process fills its own block of rows, so
# machines share no page of a file.
EMPTY = 2 ** 16 - 1


def list_images(root):
    """List a folder of class folders, or of one class: paths, labels, class names."""
    paths = find_images(root)
    flat = [path for path in paths if path.parent == root]
    if 0 < len(flat) < len(paths):
        raise InputError(f"{flat[0]}: move it into a class folder")
    groups = {}
    for path in paths:
        name = root.resolve().name if flat else path.relative_to(root).parts[0]
        groups.setdefault(name, []).append(path)
    groups = {name: groups[name] for name in sorted(groups) if any(map(is_readable, groups[name]))}
    if not groups:
        raise InputError(f"{root}: holds no readable picture")
    labels = np.repeat(range(len(groups)), [len(group) for group in groups.values()])
    paths = [path for group in groups.values() for path in group]
    return paths, labels, list(groups)


def open_arrays(args, labels, side, rank):
    """Open codes.npy, with --flip also codes_flip.npy, and labels.npy, which is made last."""
    blank = np.broadcast_to(np.uint16(EMPTY), (len(labels), side, side))
    names = ["codes", "codes_flip", "labels"] if args.flip else ["codes", "labels"]
    paths = [args.out / f"{name}.npy" for name in names]
    if rank == 0 and not paths[-1].exists():
        for path in paths:  # in full size, so a full disk shows now
            with write_whole(path) as file:
                np.save(file, labels if path == paths[-1] else blank)
    wait_for(paths[-1].exists)
    with InputError.explain(f"{args.out}: damaged; remove it and repeat"):
        for mode in ("r", "r+"):  # "r" refuses a file cut short, which "r+" would fill up
            arrays = [np.load(path, mmap_mode=mode) for path in paths]
        if {x.shape for x in arrays} != {blank.shape, labels.shape}:
            raise ValueError("arrays of other images")
    return arrays


def describe(args, vq, paths, classes):
    """Return what meta.json records; other pictures of the same names differ in it."""
    files = []
    for path in paths:
        file = path.stat() if path.exists() else path.lstat()  # of a broken link
        files.append((str(path.relative_to(args.images)), file.st_size, file.st_mtime))
    return dict(
        tokenizer=str(args.vq.resolve()),
        tokenizer_sha256=vq.sha256,
        image_size=args.size, classes=classes, flip=args.flip,
        files=hashlib.sha256(repr(files).encode()).hexdigest(),
        reference="reference.npz")


def encode_folder(args, vq, rank, world, device):
    """Encode this process's rows that are still EMPTY."""
    paths, labels, classes = list_images(args.images)
    if rank == 0:
        counts = dict(zip(classes, np.bincount(labels).tolist()))
        print(f"{len(paths)} images:", str(counts)[:500])
        others = len(find_images(args.images, OTHERS))
        if others:
            print(f"{others} HEIC, TIFF or AVIF files left out; convert to PNG")
    claim_folder(args.out, args.out / "meta.json", describe(args, vq, paths, classes), rank)
    *maps, labels = open_arrays(args, labels, args.size // vq.factor, rank)

    def read(i):
        try:
            return crop(read_image(paths[i]), args.size)
        except InputError as error:
            tqdm.write(f"left out: {error}")
            labels[i] = -1  # before its codes replace EMPTY
            return np.zeros((args.size, args.size, 3), np.uint8)

    def missing(rows):
        return any((codes[rows] == EMPTY).any() for codes in maps)

    todo = [i for i in np.array_split(range(len(paths)), world)[rank] if missing(i)]
    for rows, pixels in read_ahead(read, todo, args.batch_size, desc="encode", disable=rank > 0):
        pixels = np.stack(pixels)
        x = from_pixels(pixels).to(device)  # [B,3,H,W]
        for codes, images in zip(maps, (x, x.flip(3))):
            codes[rows] = vq.encode(images).cpu().numpy()
        if rank == 0 and rows[0] == todo[0]:
            few = torch.tensor(maps[0][rows[:4]].astype(int), device=device)
            db = psnr(pixels[:4], vq.decode_pixels(few))
            tqdm.write(f"PSNR of a few: {db:.1f} dB; below 20, try another tokenizer")
    if rank == 0:
        wait_for(lambda: not missing(np.s_[:, 0, 0]))
        bad = (labels < 0).sum()
        print(f"{len(labels) - bad} images of {len(classes)} classes, {bad} left out")
        model = "demo" if device.type == "cpu" else "S"
        flags = f"--model DiT-{model}/2 --global-batch-size 64 --steps 20000 --ema-ramp"
        data = shlex.quote(str(args.out))
        print(f"next: python train.py --data {data}", flags if len(labels) < 200_000 else "")


def psnr(a, b):
    """Compute the PSNR of pixels uint8 in dB."""
    mse = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return 10 * math.log10(255 ** 2 / max(mse, 1e-9))


@torch.inference_mode()
def main():
    parser = make_parser(
        "Encode a folder of images into codes.",
        ("--size", 256, "side of the centre crop in pixels"),
        ("--flip", False, "also encode the mirrored images"),
        ("--batch-size", 32, "images at a time"))
    add = parser.add_argument
    add("images", type=Path, help="folder with one sub-folder per class")
    add("--vq", type=Path, required=True, help="weights of the tokenizer")
    add("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    rank, world, device = setup_process(args.device)
    vq = load_vq(args.vq, device)
    if len(vq.codebook) > EMPTY:
        raise InputError(f"--vq {args.vq}: has over {EMPTY} codes; use another")
    if min(args.size, args.batch_size) < 1 or args.size % vq.factor:
        raise InputError(f"--size: give a multiple of {vq.factor}; --batch-size: one or more")
    encode_folder(args, vq, rank, world, device)


# ----- pictures

SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp"
FORMATS = "PNG", "JPEG", "WEBP", "BMP"  # for some others, Pillow runs programs
OTHERS = ".heic", ".heif", ".tif", ".tiff", ".avif"


def from_pixels(pixels):
    """Map uint8 [B,H,W,3] to images float32 [B,3,H,W] in [-1,1]."""
    x = torch.as_tensor(pixels).movedim(-1, 1).contiguous()
    return x.float() / 127.5 - 1


def to_pixels(x):
    """Map images [B,3,H,W] in [-1,1] to uint8 [B,H,W,3] by rounding; the release truncates."""
    x = ((x.float() + 1) * 127.5).round().clamp(0, 255)
    return x.byte().movedim(1, -1)


def find_images(folder, suffixes=SUFFIXES, seen=None):
    """List the pictures in a folder and those below, which are entered once."""
    seen = seen or set()
    found = []
    with InputError.explain(f"{folder}: unreadable folder"):
        real = folder.resolve()
        if real in seen:
            return []
        seen.add(real)
        for path in sorted(folder.iterdir()):
            if path.name.startswith((".", "__MACOSX")):
                continue
            if path.is_dir():
                found += find_images(path, suffixes, seen)
            elif path.suffix.lower() in suffixes:
                found.append(path)
    return found


def read_image(path):
    """Read a picture as an upright RGB Image, on white where it is transparent."""
    unreadable = InputError.explain(f"{path}: not a readable picture")
    with unreadable, Image.open(path, formats=FORMATS) as image:
        image.load()
        with suppress(Exception):  # damaged EXIF data: do not rotate
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip
            grey = np.asarray(image)
            clear = grey == image.info.get("transparency")
            image = Image.fromarray(np.where(clear, 255, grey >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def is_readable(path):
    with suppress(InputError):
        return read_image(path)


def crop(image, size):
    """Scale an Image and crop its centre as ADM does: uint8 [size,size,3]."""
    spare = [max(0, x - 8 * min(image.size)) // 2 for x in image.size]
    image = ImageOps.crop(image, tuple(spare))  # of a thin one, the middle is enough
    while min(image.size) >= 2 * size:
        image = image.resize([x // 2 for x in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(x * scale) for x in image.size], Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return np.array(image)[top:top + size, left:left + size]


def sheet(pixels, columns):
    """Arrange uint8 [B,H,W,3] on a white picture, two pixels apart."""
    B, H, W, _ = np.shape(pixels)
    page = np.pad(pixels, [(0, -B % columns), (1, 1), (1, 1), (0, 0)], constant_values=255)
    page = page.reshape(-1, columns, H + 2, W + 2, 3)
    return page.swapaxes(1, 2).reshape(-1, columns * (W + 2), 3)


def save_image(path, pixels, columns=None):
    """Write uint8 [H,W,3] as PNG; [B,H,W,3] as a sheet of so many columns."""
    pixels = sheet(pixels, columns) if columns else np.asarray(pixels)
    with write_whole(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


# ----- files and processes

class InputError(SystemExit):
    """Exit with code 1 and one line that names a file or flag."""

    def __init__(self, message):
        super().__init__(" ".join(message.split())[:500])

    @classmethod
    @contextmanager
    def explain(cls, message):
        """Turn any error in a with block into this one."""
        try:
            yield
        except Exception as error:
            raise cls(f"{message} ({type(error).__name__}: {error})")

    @classmethod
    def compare(cls, message, theirs, ours):
        """Refuse dictionaries that differ, and name the first difference."""
        for key in sorted({*theirs, *ours}):
            if theirs.get(key) != ours.get(key):
                raise cls(f"{message}: {key} is {theirs.get(key)} there, {ours.get(key)} here")


@contextmanager
def write_whole(path):
    """Open a file that becomes `path` once complete."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            end = file.tell()
        if partial.stat().st_size < end:  # which numpy does not report
            raise OSError("the disk is full")
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        raise InputError(f"{path}: cannot be written ({error})")
    finally:
        with suppress(OSError):  # it is gone if all went well
            partial.unlink()


def write_json(path, record):
    with write_whole(path) as file:
        file.write(json.dumps(record, indent=1).encode())


def read_ahead(read, items, n, **bar):
    """Yield n items at a time, with read() of each; threads read a batch ahead. bar: for tqdm."""
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        ahead = pool.map(read, items[:n])
        for i in tqdm(range(0, len(items), n), unit=" batches", **bar):
            found = ahead
            ahead = pool.map(read, items[i + n:i + 2 * n])
            yield items[i:i + n], list(found)


def wait_for(ready, limit=math.inf):
    """Wait for another process; if it fails, torchrun ends this one."""
    end = time.monotonic() + limit
    while not ready() and time.monotonic() < end:
        time.sleep(0.2)


def claim_folder(folder, note, record, rank, remake=False):
    """Write record to the file `note`; refuse, or remake, a folder of another record.

    Return a function that refuses it once another command has taken it.
    """
    ignored = {"num_samples": 0, "tokenizer": ""}  # the tokenizer's sha256 counts
    ours = record | ignored

    def theirs():
        with InputError.explain(f"{note}: unreadable; give another --out"):
            return (json.loads(note.read_text()) if note.exists() else {}) | ignored

    if rank == 0 and remake and "ckpt" in theirs() and theirs() != ours:
        print(f"{folder}/ is made anew, it was of {theirs()['ckpt']}")
        for path in folder.glob("[0-9]*.png"):
            path.unlink()
    if rank == 0 and (theirs() == ours or not any(folder.glob("[!.]*"))):
        write_json(note, record)
    wait_for(lambda: theirs() == ours, 300 if rank else 0)

    def check():
        InputError.compare(f"--out {folder}: taken, give another", theirs(), ours)

    check()
    return check


def make_parser(text, *flags):
    """Make a parser of flags (name, default or its type, help) and --device."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    device = "--device", str, "cuda, cpu or mps; None: cuda if there is one"
    for name, default, text in (*flags, device):
        kind = type(default)
        if kind is type:
            kind, default = default, None
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
        parser.add_argument(name, default=default, help=text, **how)
    return parser


def setup_process(name=None):
    """Return rank and world size, from torchrun, and a device. Make any text printable."""
    with suppress(AttributeError):  # a notebook prints all
        sys.stdout.reconfigure(errors="backslashreplace")
    rank, local, world = 0, 0, 1
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"
    if any(map(os.environ.get, names[:3])):
        with InputError.explain(f"{' '.join(names)} MASTER_ADDR: set all, as torchrun, or none"):
            rank, local, world, _ = (int(os.environ[name]) for name in names)
            if not 0 <= local <= rank < world or not os.environ["MASTER_ADDR"]:
                raise ValueError("they do not fit together")
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers allow TF32
    name = name or ("cuda" if torch.cuda.device_count() else "cpu")
    with InputError.explain(f"--device {name}: not here; give another"):
        device = torch.device("cuda", local) if name == "cuda" else torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.empty(0, device=device).cpu()
    return rank, world, device


if __name__ == "__main__":
    main()
