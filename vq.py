"""Map pixels to codes and back with the frozen VQ autoencoder whose codes Purrception generates.

    encode    x -> h = encoder(x) -> c = argmin_k |h - e_k|         images to codes     (Eq. 9)
    embed     c -> z = e_c                                          codes to latents
    decode    c -> decoder(e_c)                                     codes to images

One network serves three kinds of weights, recognised by their keys: vq-f8 of latent-diffusion,
LlamaGen's vq_ds8_c2i.pt, and those this project trains.

    python vq.py IMAGES --vq vq-f8.ckpt --out data/imagenet --flip      also with torchrun
    python vq.py --reconstruct cat.jpg dog.png --vq vq-f8.ckpt          original | reconstruction

Pictures, files and processes, which the later scripts share, come last: skip them at first.

References: VQGAN (arXiv 2012.09841); CompVis/latent-diffusion; FoundationVision/LlamaGen.
Shapes: B batch, H W pixels, h w grid of codes, K codes, d code dimension, C channels.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import time
import zipfile
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from flow import nearest_code


# ---------- the network

def conv3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResBlock(nn.Module):
    """Map features [B,c_in,h,w] to [B,c_out,h,w]. norm(channels) makes a normalisation."""

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
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        n = self.norm(x)
        parts = [layer(n) for layer in (self.q, self.k, self.v)]
        q, k, v = (part.flatten(2).mT.unsqueeze(1) for part in parts)
        h = F.scaled_dot_product_attention(q, k, v)  # [B,1,hw,C]
        h = h.squeeze(1).mT.reshape(x.shape)
        return x + self.proj_out(h)


def downsample(c):
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # vq-f8 pads right and bottom only
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c):
    repeat = nn.Upsample(scale_factor=2)
    return nn.Sequential(OrderedDict(repeat=repeat, conv=conv3(c, c)))


def middle(c, norm):
    return nn.Sequential(OrderedDict(
        block_1=ResBlock(c, c, norm),
        attn_1=Attention(c, norm),
        block_2=ResBlock(c, c, norm)))


class Level(nn.Module):
    """Apply residual blocks, each followed by attention if asked, then change the resolution."""

    def __init__(self, c_in, c_out, num_blocks, attention, norm, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(num_blocks):
            self.block.append(ResBlock(c_out if i else c_in, c_out, norm))
            self.attn.append(Attention(c_out, norm) if attention else nn.Identity())
        self.downsample = downsample(c_out) if down else nn.Identity()
        self.upsample = upsample(c_out) if up else nn.Identity()

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return self.upsample(self.downsample(h))


class Encoder(nn.Module):
    """Map images [B,3,H,W] to features [B,z_channels,h,w]."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, norm):
        super().__init__()
        self.conv_in = conv3(3, ch)
        self.down = nn.ModuleList()
        last = len(ch_mult) - 1
        c = ch
        for i, m in enumerate(ch_mult):
            self.down.append(Level(c, ch * m, num_res_blocks, i == last, norm, down=i < last))
            c = ch * m
        self.mid = middle(c, norm)
        self.norm_out = norm(c)
        self.conv_out = conv3(c, z_channels)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Map features [B,z_channels,h,w] to images [B,3,H,W]. up.0 is the finest level, the last."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, norm):
        super().__init__()
        last = len(ch_mult) - 1
        c = ch * ch_mult[-1]
        self.conv_in = conv3(z_channels, c)
        self.mid = middle(c, norm)
        self.up = nn.ModuleList()
        for i, m in reversed(list(enumerate(ch_mult))):
            self.up.insert(0, Level(c, ch * m, num_res_blocks + 1, i == last, norm, up=i > 0))
            c = ch * m
        self.norm_out = norm(c)
        self.conv_out = conv3(c, 3)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VQ(nn.Module):
    """Autoencode images through a grid of discrete codes. The defaults are vq-f8's.

    Key names are CompVis's. With l2_norm (LlamaGen), codes and encoder outputs are unit vectors;
    the authors' release samples with codes that are not normalised. A group of a GroupNorm needs
    several channels, so that narrow networks take fewer groups.
    """

    def __init__(self, ch=128, ch_mult=(1, 2, 2, 4), num_res_blocks=2, z_channels=4, n_embed=16384,
                 embed_dim=4, l2_norm=False, num_groups=32):
        super().__init__()
        norm = functools.partial(nn.GroupNorm, num_groups, eps=1e-6)
        self.factor = 2 ** (len(ch_mult) - 1)  # pixels a code, across and down
        self.l2_norm = l2_norm
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels, norm)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels, norm)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    @property
    def codebook(self):
        """The code vectors e_k, [K,d]; unit vectors with l2_norm."""
        E = self.quantize.embedding.weight
        return F.normalize(E, dim=1) if self.l2_norm else E

    def encode(self, x):
        """Map images [B,3,H,W] in [-1,1], of multiples of self.factor, to codes [B,h,w] (Eq. 9)."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 changes codes
            h = self.quant_conv(self.encoder(x))
            return self.nearest(h)

    def embed(self, codes):
        """Look up the latents z [B,d,h,w] of codes [B,h,w]."""
        z = F.embedding(codes, self.codebook)
        return z.movedim(-1, 1).contiguous()

    def nearest(self, z):
        """Find the nearest codes [B,h,w], int64, of latents z [B,d,h,w]."""
        E = self.codebook
        z = z.movedim(1, -1).to(E.dtype)  # [B,h,w,d]
        if self.l2_norm:
            z = F.normalize(z, dim=-1)
        codes = nearest_code(z.flatten(0, -2), E)
        return codes.view(z.shape[:-1])

    def decode(self, codes):
        """Map codes [B,h,w] to images [B,3,H,W], clamped to [-1,1]."""
        z = self.post_quant_conv(self.embed(codes))
        return self.decoder(z).clamp(-1, 1)

    def decode_pixels(self, codes):
        """Decode codes [B,h,w] to pixels uint8 [B,H,W,3] on the CPU, in float32."""
        batches = codes.split(8 if codes.is_cuda else 1)  # 1: rounding depends on the batch
        with torch.autocast(codes.device.type, enabled=False):
            return torch.cat([to_pixels(self.decode(batch)).cpu() for batch in batches])


# ---------- weights

TRAINERS = re.compile(r"(pytorch_lightning|lightning)\..+|argparse\.Namespace|_codecs\.encode|"
                      r"numpy\.(dtype|_?core\.multiarray\.scalar)")


class Stub:
    """Stand in for a trainer's pickled object."""

    def __init__(self, *_, **__):
        pass

    __setstate__ = __init__


def read_checkpoint(path):
    """Read a torch.save file onto the CPU; its tensors stay on the disk until they are used.

    Nothing in it is executed: trainers' objects become stubs, others are refused. Raises InputError
    if it is unsafe, damaged, or older than torch 1.6.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip file; load and save those of torch < 1.6 with a newer torch")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        unknown = [name for name in names if not TRAINERS.fullmatch(name)]
        if unknown:
            raise ValueError(f"it asks for {unknown[0]}, which could run code")
        stubs = [(OrderedDict if name.endswith("Dict") else Stub, name) for name in names]
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"{path}: not readable as weights ({one_line(error)}); use another file")


def from_llamagen(state):
    """Rename LlamaGen's keys to CompVis's. Its decoder counts from coarse to fine."""
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    top = count(state, "decoder.conv_blocks.") - 1
    renamed = {}
    for key, x in state.items():
        key = re.sub(r"\.mid\.([012])", lambda m: f".mid.{middle[m[1]]}", key)
        key = re.sub(r"decoder\.conv_blocks\.(\d+)", lambda m: f"decoder.up.{top - int(m[1])}", key)
        key = key.replace("encoder.conv_blocks", "encoder.down").replace(".res.", ".block.")
        renamed[key] = x
    renamed.pop("quantize.codebook_used", None)
    return renamed


def count(state, prefix):
    """Count the modules whose keys in a state dict are prefix, a number, and more."""
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


def config_of(state):
    """Infer the arguments of VQ from the keys and shapes of published weights."""
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
    """Load a tokenizer as a frozen VQ in eval mode, float32.

    path: vq-f8's model.ckpt, LlamaGen's vq_ds8_c2i.pt, or {"config": arguments of VQ, "state_dict":
    tensors}. Raises InputError for other, damaged or unsafe files.
    """
    file = read_checkpoint(path)
    try:
        if "config" in file:
            config, state = file["config"], file["state_dict"]
        elif "state_dict" in file:  # CompVis
            extra = "loss.", "model_ema."
            state = {k: x for k, x in file["state_dict"].items() if not k.startswith(extra)}
            config = config_of(state)
        else:
            state = from_llamagen(file["model"])
            config = config_of(state) | {"l2_norm": True}
        with torch.device("meta"):
            vq = VQ(**config)
        state = {key: x.to(torch.float32, copy=True) for key, x in state.items()}
        vq.load_state_dict(state, assign=True)
    except Exception as error:  # load_state_dict names key and shapes
        raise InputError(f"{path}: not a tokenizer ({one_line(error)}); use vq-f8 or vq_ds8_c2i")
    vq = vq.eval().requires_grad_(False).to(device)
    if torch.device(device).type == "cpu":  # 1.6x faster; on a GPU, GroupNorm would copy
        vq = vq.to(memory_format=torch.channels_last)
    return vq


# ---------- encoding a data set

# A row of codes.npy is EMPTY until it is encoded. Process 0 makes the arrays, labels.npy last. Each
# process fills its own rows, and the same command goes on after an interruption.
EMPTY = 2 ** 16 - 1


def list_images(root):
    """List an ImageFolder tree: sorted paths, labels, class names. A flat folder is one class."""
    paths = find_images(root)
    stray = [path for path in paths if path.parent == root]
    if not paths or 0 < len(stray) < len(paths):
        raise InputError(f"{stray[0] if stray else root}: give a folder of {' '.join(SUFFIXES)} "
                         "files, or of class folders of them alone")
    names = [root.resolve().name if stray else path.relative_to(root).parts[0] for path in paths]
    classes, labels = np.unique(names, return_inverse=True)
    return paths, labels, classes.tolist()


def open_arrays(args, labels, side, rank):
    """Open codes.npy, with --flip codes_flip.npy of the mirrored images, and labels.npy."""
    blank = np.broadcast_to(np.uint16(EMPTY), (len(labels), side, side))
    arrays = {"codes.npy": blank, "codes_flip.npy": blank, "labels.npy": labels}
    if not args.flip:
        del arrays["codes_flip.npy"]
    for name, array in arrays.items():  # in full size: a full disk shows now
        if rank == 0 and not (args.out / name).exists():
            with write_whole(args.out / name) as file:
                np.save(file, array)
    wait_for((args.out / "labels.npy").exists)
    return [np.load(args.out / name, mmap_mode="r+") for name in arrays]


def encode_folder(args, vq, rank, world, device):
    """Encode this process's share of the images: the rows that are still EMPTY."""
    paths, labels, classes = list_images(args.images)
    names = repr([path.relative_to(args.images) for path in paths])
    meta = dict(
        tokenizer=str(args.vq.resolve()),
        tokenizer_sha256=hashlib.sha256(args.vq.read_bytes()).hexdigest(),
        image_size=args.size, classes=classes, flip=args.flip,
        files=hashlib.sha256(names.encode()).hexdigest(),
        reference="reference.npz", features="inception")  # for fid.py, if that file is there
    claim_folder(args.out, args.out / "meta.json", meta, rank)
    *maps, labels = open_arrays(args, labels, args.size // vq.factor, rank)

    def read(i):
        try:
            return crop(read_image(paths[i]), args.size)
        except InputError as error:
            tqdm.write(f"left out: {error}")
            labels[i] = -1  # before its codes replace EMPTY
            return np.zeros((args.size, args.size, 3), np.uint8)

    todo = [i for i in range(rank, len(paths), world) if any((c[i] == EMPTY).any() for c in maps)]
    batches = [todo[i:i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    bar = tqdm(batches, "encode", unit=" batches", disable=rank > 0)
    for rows, pixels in zip(bar, read_ahead(read, batches)):
        pixels = torch.from_numpy(np.stack(pixels))
        x = from_pixels(pixels.to(device))  # [B,3,H,W]
        for codes, images in zip(maps, (x, x.flip(3))):
            codes[rows] = vq.encode(images).cpu().numpy()
    if rank == 0:
        wait_for(lambda: all((codes[:, 0, 0] != EMPTY).all() for codes in maps))
        bad = (labels < 0).sum()
        if bad == len(labels):
            raise InputError(f"{args.images}: no file can be read as a picture")
        print(f"{len(labels) - bad} images of {len(classes)} classes, {bad} unreadable ones left "
              f"out; next: python train.py --data {args.out}")


def reconstruct(args, vq, device):
    """Write original | reconstruction of each picture, and print its PSNR in dB."""
    for i, path in enumerate(args.reconstruct):
        original = crop(read_image(path), args.size)[None]
        codes = vq.encode(from_pixels(original).to(device))
        again = vq.decode_pixels(codes).numpy()
        mse = np.square(original.astype(float) - again).mean()
        psnr = 10 * math.log10(255 ** 2 / mse) if mse else math.inf
        target = (args.out or Path("reconstructions")) / f"{i:03d}-{path.stem}.png"
        save_image(target, [*original, *again], columns=2)
        print(f"{target}: PSNR {psnr:.2f} dB")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description="Encode images into codes, or reconstruct images.")
    add = parser.add_argument
    add("images", nargs="?", type=Path, help="ImageFolder tree to encode: one sub-folder per class")
    add("--vq", type=Path, required=True, help="tokenizer: vq-f8, LlamaGen's or this project's")
    add("--out", type=Path, help="folder to write; default with --reconstruct: reconstructions")
    add("--size", type=int, default=256, help="side of the centre crop in pixels")
    add("--flip", action="store_true", help="also store the codes of the mirrored images")
    add("--reconstruct", nargs="+", type=Path, metavar="IMAGE", help="reconstruct these instead")
    add("--batch-size", type=int, default=32, help="images per process and batch")
    args = parser.parse_args()
    if bool(args.images and args.out) == bool(args.reconstruct):
        parser.error("give IMAGES and --out, to encode them, or --reconstruct IMAGE...")
    rank, world, device = setup_process()
    vq = load_vq(args.vq, device)
    if len(vq.codebook) > EMPTY:
        raise InputError(f"--vq {args.vq}: has more than {EMPTY} codes; use another")
    if args.size <= 0 or args.size % vq.factor:
        raise InputError(f"--size {args.size}: give a positive multiple of {vq.factor}")
    if args.images:
        encode_folder(args, vq, rank, world, device)
    elif rank == 0:
        reconstruct(args, vq, device)


# ---------- pictures (from here on: skip on first reading)

SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp"
FORMATS = "PNG", "JPEG", "WEBP", "BMP"  # Pillow opens some others by running programs


def from_pixels(pixels):
    """Map uint8 [B,H,W,3] (tensor or array) to images float32 [B,3,H,W] in [-1,1]."""
    x = torch.as_tensor(pixels).movedim(-1, 1).contiguous()
    return x.float() / 127.5 - 1


def to_pixels(x):
    """Map images [B,3,H,W] in [-1,1] to uint8 [B,H,W,3] by rounding; the release truncates."""
    x = ((x.float() + 1) * 127.5).round().clamp(0, 255)
    return x.byte().movedim(1, -1)


def find_images(folder):
    """Return the sorted paths of all pictures in a folder and the folders in it."""
    return sorted(Path(place, name) for place, _, names in os.walk(folder, followlinks=True)
                  for name in names if name.lower().endswith(SUFFIXES))


def read_image(path):
    """Read a picture as an upright RGB Image. Raises InputError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF data: do not rotate
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"{path}: not readable ({one_line(error)}); repair or remove it")


def crop(image, size):
    """Scale an Image and crop its centre as ADM does: uint8 [size,size,3]."""
    while min(image.size) >= 2 * size:
        image = image.resize([x // 2 for x in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(x * scale) for x in image.size], Image.BICUBIC)
    left, top = ((x - size) // 2 for x in image.size)
    return np.array(image)[top:top + size, left:left + size]


def sheet(pixels, columns):
    """Arrange uint8 [B,H,W,3] in rows on a white picture [H',W',3], two pixels apart."""
    B, H, W, _ = np.shape(pixels)
    rows = -(-B // columns)
    page = np.full((rows * columns, H + 2, W + 2, 3), 255, np.uint8)
    page[:B, 1:-1, 1:-1] = pixels
    page = page.reshape(rows, columns, H + 2, W + 2, 3).swapaxes(1, 2)
    return page.reshape(rows * (H + 2), columns * (W + 2), 3)


def save_image(path, pixels, columns=None):
    """Write uint8 [H,W,3] as a PNG file; [B,H,W,3] as a sheet of so many columns."""
    pixels = sheet(pixels, columns) if columns else np.asarray(pixels)
    with write_whole(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


# ---------- files and processes

class InputError(SystemExit):
    """Name a wrong file or flag, and end the script with exit code 1."""


def one_line(error):
    """Return the kind of an error and the start of what it says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def write_whole(path):
    """Open a file that becomes `path` once it is complete. Raises InputError on failure."""
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
        raise InputError(f"{path}: cannot be written ({one_line(error)})")
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            partial.unlink()


def read_ahead(read, batches):
    """Yield [read(x) for x in batch] for every batch, in order; threads keep two batches ahead."""
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        ahead = deque()
        for batch in batches:
            ahead.append([pool.submit(read, x) for x in batch])
            if len(ahead) > 2:
                yield [future.result() for future in ahead.popleft()]
        for futures in ahead:
            yield [future.result() for future in futures]


def wait_for(ready):
    """Wait until another process makes ready() true. If that one fails, torchrun ends this one."""
    while not ready():
        time.sleep(0.2)


def claim_folder(folder, note, record, rank):
    """Let process 0 write what a folder's files belong to, as JSON, into the file `note`.

    Raises InputError if the folder holds files of another record. num_samples alone may differ.
    """
    def ours():
        with contextlib.suppress(OSError, ValueError, TypeError):  # no such file, another's file
            return {**json.loads(note.read_text()), "num_samples": 0} == {**record, "num_samples": 0}

    if rank == 0:
        if any(folder.glob("[!.]*")) and not ours():
            raise InputError(f"--out {folder}: holds other files (see {note}); use another folder")
        with write_whole(note) as file:
            file.write(json.dumps(record, indent=1).encode())
    wait_for(ours)  # two processes with different checkpoints never mix their images


def setup_process():
    """Return rank, world size and device, as torchrun sets them."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers allow TF32
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus and local >= gpus:
        raise InputError(f"--nproc_per_node: process {local} has no GPU; start at most {gpus}")
    if gpus:
        torch.cuda.set_device(device)
    return rank, max(1, world), device


if __name__ == "__main__":
    main()
