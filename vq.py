"""Map pixels to codes and back with the frozen VQ autoencoder whose codes Purrception generates.

    encode    x -> h = encoder(x) -> c = argmin_k |h - e_k|         images to codes     (Eq. 9)
    embed     c -> z = e_c                                          codes to latents
    decode    c -> decoder(e_c)                                     codes to images

One network serves three kinds of weight files, recognised by their keys: vq-f8 of latent-diffusion,
LlamaGen's vq_ds8_c2i.pt, and the files this project trains.

    python vq.py IMAGES --vq vq-f8.ckpt --out data/imagenet --flip      also with torchrun
    python vq.py --reconstruct cat.jpg dog.png --vq vq-f8.ckpt          original | reconstruction

References: VQGAN (arXiv 2012.09841); CompVis/latent-diffusion; FoundationVision/LlamaGen.
Shapes: B batch, H W pixels, h w grid of codes, K codes, d code dimension, C channels.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm


class InputError(SystemExit):
    """Name a wrong file or flag, and end the script with exit code 1."""


# ---------- the network

def norm(channels):
    return nn.GroupNorm(1, channels, eps=1e-6)  # VQ sets the number of groups


class ResBlock(nn.Module):
    """Map features [B,c_in,h,w] to [B,c_out,h,w]."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        n = self.norm(x)
        q, k, v = (f(n).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B,1,hw,C]
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


def downsample(c):
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # vq-f8 pads right and bottom only
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c):
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1)))


def middle(c):
    return nn.Sequential(OrderedDict(block_1=ResBlock(c, c), attn_1=Attention(c), block_2=ResBlock(c, c)))


class Level(nn.Module):
    """Apply residual blocks, each followed by attention if asked, then change the resolution."""

    def __init__(self, c_in, c_out, num_blocks, attention, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_out if i else c_in, c_out) for i in range(num_blocks))
        self.attn = nn.ModuleList(Attention(c_out) if attention else nn.Identity() for _ in range(num_blocks))
        self.downsample = downsample(c_out) if down else nn.Identity()
        self.upsample = upsample(c_out) if up else nn.Identity()

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return self.upsample(self.downsample(h))


class Encoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        c, last = ch, len(ch_mult) - 1
        for i, m in enumerate(ch_mult):
            self.down.append(Level(c, ch * m, num_res_blocks, attention=i == last, down=i < last))
            c = ch * m
        self.mid = middle(c)
        self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, z_channels, 3, padding=1)

    def forward(self, x):  # [B,3,H,W]
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))  # [B,z_channels,h,w]


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        self.up = nn.ModuleList()
        c, last = ch * ch_mult[-1], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = middle(c)
        for i, m in reversed(list(enumerate(ch_mult))):  # up.0 is the finest level, as published
            self.up.insert(0, Level(c, ch * m, num_res_blocks + 1, attention=i == last, up=i > 0))
            c = ch * m
        self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):  # [B,z_channels,h,w]
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # [B,3,H,W]


class VQ(nn.Module):
    """Autoencode images through a grid of discrete codes; the defaults are vq-f8's.

    Key names are CompVis's. With l2_norm (LlamaGen), codes and encoder outputs are unit vectors; the authors'
    release samples with unnormalised codes. Narrow networks need few groups: one of one channel has no mean.
    """

    def __init__(self, ch=128, ch_mult=(1, 2, 2, 4), num_res_blocks=2, z_channels=4, n_embed=16384,
                 embed_dim=4, l2_norm=False, num_groups=32):
        super().__init__()
        self.factor, self.l2_norm = 2 ** (len(ch_mult) - 1), l2_norm
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels)
        self.quantize = nn.Module()
        E = torch.randn(n_embed, embed_dim)  # nn.Embedding's own imports the compiler, on "meta"
        self.quantize.embedding = nn.Embedding.from_pretrained(E, freeze=False)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = num_groups

    @property
    def codebook(self) -> Tensor:
        """The code vectors e_k, [K,d]; unit vectors with l2_norm."""
        E = self.quantize.embedding.weight
        return F.normalize(E, dim=1) if self.l2_norm else E

    def encode(self, x: Tensor) -> Tensor:
        """Map images [B,3,H,W] in [-1,1] to codes [B,h,w] int64 (Eq. 9); H, W multiples of self.factor."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 changes codes
            return self.nearest(self.quant_conv(self.encoder(x)))

    def embed(self, codes: Tensor) -> Tensor:
        """Look up the latents z [B,d,h,w] of codes [B,h,w] int64."""
        return F.embedding(codes, self.codebook).movedim(-1, 1).contiguous()

    def nearest(self, z: Tensor) -> Tensor:
        """Map latents z [B,d,h,w] to their nearest codes [B,h,w] int64."""
        E = self.codebook
        z = z.movedim(1, -1).to(E.dtype)  # [B,h,w,d]
        if self.l2_norm:
            z = F.normalize(z, dim=-1)
        return nearest_code(z.flatten(0, -2), E).view(z.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Map codes [B,h,w] int64 to images [B,3,H,W], clamped to [-1,1]."""
        return self.decoder(self.post_quant_conv(self.embed(codes))).clamp(-1, 1)


def nearest_code(z, E):
    """Find argmin_k |z - e_k| for every row of z [N,d] among the rows of E [K,d]: int64 [N]."""
    e2 = E.square().sum(1)  # |z|^2 is left out, the same for all k
    codes = torch.empty(len(z), dtype=torch.long, device=z.device)
    step = max(1, (2 ** 26 if z.is_cuda else 2 ** 18) // len(E))  # 1 MiB of distances stays in a CPU's cache
    with torch.autocast(z.device.type, enabled=False):  # float32 island: bf16 changes codes
        for i in range(0, len(z), step):
            codes[i:i + step] = torch.addmm(e2, z[i:i + step], E.T, alpha=-2).argmin(1)
    return codes


# ---------- weights

TRAINERS = re.compile(r"(pytorch_lightning|lightning)\..+|argparse\.Namespace|_codecs\.encode|"
                      r"numpy\.(dtype|_?core\.multiarray\.scalar)")


class Stub:
    """Stand in for a trainer's pickled object: accept any arguments, do nothing."""
    def __init__(self, *_, **__):
        pass
    __setstate__ = __init__


def read_checkpoint(path):
    """Read a torch.save file, zip or legacy, onto the CPU. Raises InputError if unsafe or damaged.

    weights_only=True stops at the first name that tensors do not need. If it is a trainer's, a stub
    replaces it. A zip file's tensors stay on disk until used.
    """
    stubs = {}
    while True:
        try:
            entries = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
            stored = len(entries) > 0 and not any(entry.compress_type for entry in entries)
            with torch.serialization.safe_globals([(stub, name) for name, stub in stubs.items()]):
                return torch.load(path, "cpu", weights_only=True, mmap=stored)
        except Exception as error:  # a damaged file fails in many ways
            asked = re.search(r"GLOBAL (\S+)", str(error))
            name = asked[1] if asked else ""
            if not TRAINERS.fullmatch(name) or name in stubs:
                why = f"it asks for {name}" if asked else type(error).__name__
                raise InputError(f"{path}: not readable as weights ({why}); use another file") from None
            stubs[name] = OrderedDict if name.endswith("Dict") else Stub


def from_llamagen(state):
    """Rename LlamaGen's keys to CompVis's."""
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    levels = len({key.split(".")[2] for key in state if key.startswith("decoder.conv_blocks.")})
    renamed = {}
    for key, x in state.items():
        key = re.sub(r"\.mid\.([012])", lambda m: f".mid.{middle[m[1]]}", key)
        key = key.replace("encoder.conv_blocks", "encoder.down")
        key = re.sub(r"decoder\.conv_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", key)
        renamed[key.replace(".res.", ".block.")] = x
    renamed.pop("quantize.codebook_used", None)
    return renamed


def config_of(state):
    """Infer the arguments of VQ from the keys and shapes of published weights."""
    ch = len(state["encoder.conv_in.weight"])
    levels = len({key.split(".")[2] for key in state if key.startswith("encoder.down.")})
    blocks = len({key.split(".")[4] for key in state if key.startswith("encoder.down.0.block.")})
    ch_mult = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) // ch for i in range(levels)]
    n_embed, embed_dim = state["quantize.embedding.weight"].shape
    return dict(ch=ch, ch_mult=ch_mult, num_res_blocks=blocks, n_embed=n_embed, embed_dim=embed_dim,
                z_channels=len(state["encoder.conv_out.weight"]))


def load_vq(path: str | Path, device="cpu") -> VQ:
    """Load a tokenizer as a frozen VQ in eval mode, float32.

    path: vq-f8's model.ckpt, LlamaGen's vq_ds8_c2i.pt, or {"config": arguments of VQ, "state_dict": tensors}.
    Raises InputError for other, damaged or unsafe files.
    """
    file = read_checkpoint(path)
    try:
        if "config" in file:
            config, state = file["config"], file["state_dict"]
        elif "state_dict" in file:  # CompVis
            state = {k: x for k, x in file["state_dict"].items() if not k.startswith(("loss.", "model_ema."))}
            config = config_of(state)
        else:
            state = from_llamagen(file["model"])
            config = config_of(state) | {"l2_norm": True}
        with torch.device("meta"):
            vq = VQ(**config)
        state = {key: x.to(torch.float32, copy=True) for key, x in state.items()}
        vq.load_state_dict(state, assign=True)
    except Exception as error:  # load_state_dict names the key and both shapes
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{path}: not a tokenizer ({why}); use vq-f8, vq_ds8_c2i or the demo's") from None
    layout = torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format
    return vq.eval().requires_grad_(False).to(device, memory_format=layout)  # CPU: 1.6x; GPU: norms copy


# ---------- pictures and files

def from_pixels(pixels):
    """Map uint8 [B,H,W,3] (tensor or array) to images float32 [B,3,H,W] in [-1,1]."""
    return torch.as_tensor(pixels).movedim(-1, 1).contiguous().float() / 127.5 - 1


def to_pixels(x):
    """Map images [B,3,H,W] in [-1,1] to uint8 [B,H,W,3] by rounding; the authors' release truncates."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)


def decode_pixels(vq, codes):
    """Decode codes [B,h,w] to uint8 [B,H,W,3]; on a CPU one by one, as rounding depends on the batch."""
    with torch.autocast(codes.device.type, enabled=False):  # float32 island
        return torch.cat([to_pixels(vq.decode(c)).cpu() for c in codes.split(8 if codes.is_cuda else 1)])


def open_image(path, size):
    """Read a picture as uint8 [size,size,3]: upright, RGB, cropped as ADM does. Raises InputError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF data: do not rotate
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which convert() clips to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
        while min(image.size) >= 2 * size:
            image = image.resize([x // 2 for x in image.size], Image.BOX)
        scale = size / min(image.size)
        image = image.resize([round(x * scale) for x in image.size], Image.BICUBIC)
        left, top = ((x - size) // 2 for x in image.size)
        return np.array(image)[top:top + size, left:left + size]
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"{path}: unreadable ({error}); repair it or use another") from None


def sheet(pixels, columns):
    """Arrange uint8 [B,H,W,3] in rows on a white picture [H',W',3], two pixels apart."""
    B, H, W, _ = np.shape(pixels)
    rows = -(-B // columns)
    page = np.full((rows * columns, H + 2, W + 2, 3), 255, np.uint8)
    page[:B, 1:-1, 1:-1] = pixels
    page = page.reshape(rows, columns, H + 2, W + 2, 3).swapaxes(1, 2)
    return page.reshape(rows * (H + 2), columns * (W + 2), 3)


@contextlib.contextmanager
def replacing(path):
    """Open a file that becomes `path` once complete. Raises InputError on failure."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            end = file.tell()
        if partial.stat().st_size < end:  # which numpy does not report
            raise OSError("the disk is full")
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        raise InputError(f"{path}: cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):  # gone if all went well
            partial.unlink()


def save_image(path, pixels, columns=None):
    """Write uint8 [H,W,3] as a PNG file; [B,H,W,3] as a sheet of so many columns."""
    pixels = sheet(pixels, columns) if columns else np.asarray(pixels)
    with replacing(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def read_json(path):
    """Read a JSON dictionary, or raise InputError."""
    try:
        return dict(json.loads(path.read_text()))
    except Exception as error:
        raise InputError(f"{path}: not a JSON dictionary ({error}); repair it") from None


def start_process():
    """Return rank, world size and device, as torchrun sets them. Ctrl-C then exits cleanly."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted; run the same command to continue"))
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers allow TF32: it changes codes
    gpus, device = torch.cuda.device_count(), torch.device("cpu")
    if gpus and local >= gpus:
        raise InputError(f"--nproc_per_node: process {local} has no GPU; start at most {gpus}")
    if gpus:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    return rank, max(1, world), device


def claim_folder(folder, note, record, rank):
    """Write `record` to the JSON file `note`, in process 0. Raises InputError if others' files are there."""
    def same():
        return note.exists() and read_json(note) | {"num_samples": 0} == record | {"num_samples": 0}
    if rank == 0:
        if any(folder.glob("[!.]*")) and not same():
            raise InputError(f"--out {folder}: holds other files (see {note}); use another folder")
        with replacing(note) as file:
            file.write(json.dumps(record, indent=1).encode())
    while not same():  # if process 0 fails, torchrun ends the others
        time.sleep(0.2)


# ---------- encoding a data set

SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp"
FORMATS = "PNG", "JPEG", "WEBP", "BMP"  # Pillow opens some others by running programs
EMPTY = 2 ** 16 - 1  # in codes.npy: not encoded yet


def list_images(root):
    """List an ImageFolder tree: sorted paths, labels, class names. A flat folder is one class."""
    paths = sorted(Path(folder, name) for folder, _, names in os.walk(root, followlinks=True)
                   for name in names if name.lower().endswith(SUFFIXES))
    if not paths:
        raise InputError(f"{root}: no images; give a folder of {' '.join(SUFFIXES)} files or of such folders")
    stray = [path for path in paths if path.parent == root]
    if stray and len(stray) < len(paths):  # their class is unclear
        raise InputError(f"{stray[0]}: not in a class folder; move it into one")
    names = [root.resolve().name] * len(stray) or [path.relative_to(root).parts[0] for path in paths]
    classes, labels = np.unique(names, return_inverse=True)
    return paths, labels, classes.tolist()


def read_pictures(rows, paths, args, title):
    """Yield each batch of rows, its pictures uint8 [B,size,size,3], and its unreadable rows.

    Threads read ahead. An unreadable file raises InputError; with --skip-bad, it is black.
    """
    bad = set()
    def read(i):
        try:
            return open_image(paths[i], args.size)
        except InputError as error:
            if not args.skip_bad:
                raise InputError(f"{error}, or --skip-bad") from None
            tqdm.write(f"skipped {error}")
            bad.add(i)
            return np.zeros((args.size, args.size, 3), np.uint8)

    batches = [rows[i:i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    with ThreadPoolExecutor(args.num_workers) as pool:
        ahead = [pool.map(read, batch) for batch in batches[:2]]
        for i, batch in enumerate(tqdm(batches, title, unit=" batches", disable=args.rank > 0)):
            pixels = np.stack(list(ahead.pop(0)))
            yield batch, pixels, [i for i in batch if i in bad]
            ahead += [pool.map(read, batch) for batch in batches[i + 2:i + 3]]


def crop_reference(args, paths):
    """Crop this process's share of the missing reference pictures like the training pictures."""
    targets = [args.out / "reference" / f"{i:06d}.png" for i in range(len(paths))]
    todo = [i for i in range(args.rank, len(paths), args.world) if not targets[i].exists()]
    for rows, pixels, bad in read_pictures(todo, paths, args, "crop the reference"):
        for i, picture in zip(rows, pixels):
            if i not in bad:
                save_image(targets[i], picture)


def open_arrays(args, labels, side):
    """Open codes.npy, codes_flip.npy and labels.npy for writing; process 0 creates them."""
    blank = np.broadcast_to(np.uint16(EMPTY), (len(labels), side, side))
    arrays = {"codes.npy": blank} | ({"codes_flip.npy": blank} if args.flip else {}) | {"labels.npy": labels}
    for name, array in arrays.items():  # in full size: a full disk shows at once
        if args.rank == 0 and not (args.out / name).exists():
            with replacing(args.out / name) as file:
                np.save(file, array)
    while not (args.out / "labels.npy").exists():  # the last one
        time.sleep(0.2)
    return [np.load(args.out / name, mmap_mode="r+") for name in arrays]


def encode_folder(args, vq, device):
    """Encode this process's share of args.images into args.out: the rows that are still EMPTY."""
    paths, labels, classes = list_images(args.images)
    reference, crops = None, []
    if args.reference and zipfile.is_zipfile(args.reference):  # an .npz, used as it is
        reference = str(args.reference.resolve())
    elif args.reference:
        reference, crops = "reference", list_images(args.reference)[0]
    names = repr([path.relative_to(args.images) for path in paths] + crops)
    meta = dict(tokenizer=str(args.vq.resolve()), image_size=args.size, classes=classes, reference=reference,
                features="inception", flip=args.flip, files=hashlib.sha256(names.encode()).hexdigest(),
                tokenizer_sha256=hashlib.sha256(args.vq.read_bytes()).hexdigest())
    claim_folder(args.out, args.out / "meta.json", meta, args.rank)
    crop_reference(args, crops)
    *maps, labels = open_arrays(args, labels, args.size // vq.factor)
    todo = [i for i in range(args.rank, len(paths), args.world) if any((c[i] == EMPTY).any() for c in maps)]
    for rows, pixels, bad in read_pictures(todo, paths, args, "encode"):
        labels[bad] = -1  # before their codes replace EMPTY
        x = from_pixels(torch.from_numpy(pixels).to(device))  # [B,3,H,W]
        for codes, images in zip(maps, (x, x.flip(3))):
            codes[rows] = vq.encode(images).cpu().numpy()
    if args.rank == 0:
        print(f"{len(paths)} images of {len(classes)} classes; next: python train.py --data {args.out}")


def reconstruct(args, vq, device):
    """Write original | reconstruction of each picture, and print its PSNR in dB."""
    for i, path in enumerate(args.reconstruct):
        original = open_image(path, args.size)[None]
        again = decode_pixels(vq, vq.encode(from_pixels(original).to(device))).numpy()
        mse = np.square(original.astype(float) - again).mean()
        target = (args.out or Path("reconstructions")) / f"{i:03d}-{path.stem}.png"
        save_image(target, [*original, *again], columns=2)
        print(f"{target}: PSNR {10 * math.log10(255 ** 2 / mse) if mse else math.inf:.2f} dB")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description="Encode images into codes, or reconstruct images.")
    add = parser.add_argument
    add("images", nargs="?", type=Path, help="ImageFolder tree to encode: one sub-folder per class")
    add("--vq", type=Path, required=True, help="tokenizer: vq-f8, LlamaGen's or this project's")
    add("--out", type=Path, help="folder to write; default with --reconstruct: reconstructions")
    add("--size", type=int, default=256, help="side of the centre crop in pixels")
    add("--flip", action="store_true", help="also store the codes of the mirrored images")
    add("--reference", type=Path, help="reference for fid.py: folder of images, or ADM's .npz")
    add("--reconstruct", nargs="+", type=Path, metavar="IMAGE", help="reconstruct these instead")
    add("--batch-size", type=int, default=32, help="images per process and batch")
    add("--num-workers", type=int, default=min(8, os.cpu_count()), help="threads that read images")
    add("--skip-bad", action="store_true", help="skip unreadable files, and print their names")
    args = parser.parse_args()
    if args.batch_size < 1 or args.num_workers < 1:
        parser.error("--batch-size and --num-workers must be at least 1")
    encoding = args.images or args.flip or args.reference or args.skip_bad
    if bool(encoding) == bool(args.reconstruct) or encoding and not (args.images and args.out):
        parser.error("give IMAGES, --out, and --flip, --reference, --skip-bad; or --reconstruct IMAGE...")
    args.rank, args.world, device = start_process()
    vq = load_vq(args.vq, device)
    if len(vq.codebook) > EMPTY:
        raise InputError(f"--vq {args.vq}: has {len(vq.codebook)} codes; use one with at most {EMPTY}")
    if args.size <= 0 or args.size % vq.factor:
        raise InputError(f"--size {args.size}: must be a positive multiple of {vq.factor} pixels")
    if args.images:
        encode_folder(args, vq, device)
    elif args.rank == 0:
        reconstruct(args, vq, device)


if __name__ == "__main__":
    main()
