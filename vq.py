"""Turn pixels into codes and back: the frozen VQ autoencoder Purrception works in.

    encode    x -> h = encoder(x) -> c = argmin_k |h - e_k|^2           images to codes       (Eq. 9)
    embed     c -> z = e_c                                              codes to latents
    decode    c -> decoder(e_c)                                         codes to images

One network serves three families of weights, told apart by their keys: vq-f8 of latent-diffusion, LlamaGen's
vq_ds8_c2i.pt, and the files this project trains itself.

    python vq.py IMAGES --vq vq-f8.ckpt --out data/imagenet --flip     encode an ImageFolder tree once
    torchrun --nproc_per_node=8 vq.py IMAGES --vq vq-f8.ckpt --out data/imagenet --flip
    python vq.py --reconstruct cat.jpg dog.png --vq vq-f8.ckpt         original | reconstruction, with PSNR

References: VQGAN (Esser et al. 2021, arXiv 2012.09841); latent diffusion (Rombach et al. 2022, CompVis/latent-diffusion);
LlamaGen (Sun et al. 2024, FoundationVision/LlamaGen).

Shapes: B batch, H W pixels, h w grid of codes (H/f, W/f; f = 8 as published), K codes, D code dimension, C channels, N images.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import pickletools
import re
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import nn
from tqdm import tqdm


class InputError(ValueError):
    """Say in one sentence which file or flag is wrong, what was found, and what to do."""


# ---------------------------------------------------------------------------------------------- the network

def norm(channels):
    """Make a group norm."""
    return nn.GroupNorm(1, channels, eps=1e-6)            # VQ sets the number of groups


class ResBlock(nn.Module):
    """Add to x two rounds of norm, swish and convolution: [B,c_in,h,w] to [B,c_out,h,w]."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Attend over all h*w positions with one head of width C."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        n = self.norm(x)
        q, k, v = (f(n).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # [B,1,hw,C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width by a convolution of stride two."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))          # vq-f8 pads right and bottom only


class Upsample(nn.Module):
    """Double height and width: repeat every pixel, then convolve."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, attention after each where asked, then a change of resolution."""

    def __init__(self, c_in, c_out, num_blocks, attention, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(num_blocks))
        self.attn = nn.ModuleList(Attention(c_out) for _ in range(num_blocks if attention else 0))
        if downsample:
            self.downsample = Downsample(c_out)
        if upsample:
            self.upsample = Upsample(c_out)

    def forward(self, h):
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        resample = getattr(self, "downsample", None) or getattr(self, "upsample", None)
        return resample(h) if resample else h


class Middle(nn.Module):
    """Two residual blocks around an attention, at the coarsest resolution."""

    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResBlock(c, c), Attention(c), ResBlock(c, c)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Map images [B,3,H,W] to features [B,z_channels,h,w]."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i - 1] if i else ch, widths[i], num_res_blocks, attention=i == last, downsample=i < last)
            for i in range(len(widths)))
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x):                                  # [B,3,H,W]
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))  # [B,z_channels,h,w]


class Decoder(nn.Module):
    """Map features [B,z_channels,h,w] to images [B,3,H,W]."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(                           # up.0 is the finest level, as in the published files
            Level(widths[min(i + 1, last)], widths[i], num_res_blocks + 1, attention=i == last, upsample=i > 0)
            for i in range(len(widths)))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):                                  # [B,z_channels,h,w]
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))     # [B,3,H,W]


def exact_convolutions():
    """Let cuDNN convolve float32 as float32 meanwhile: TF32's 10 bits, torch's default, change codes."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


class VQ(nn.Module):
    """Autoencode images through a grid of discrete codes; the defaults are vq-f8's.

    Key names are CompVis/latent-diffusion's. With l2_norm (LlamaGen) codes and encoder outputs are unit vectors.
    num_groups is that of every group norm. Networks narrower than the published ones need fewer than 32: a group of a
    single channel loses its mean, and with it the picture's brightness.
    """

    def __init__(self, ch=128, ch_mult=(1, 2, 2, 4), num_res_blocks=2, z_channels=4, n_embed=16384, embed_dim=4,
                 l2_norm=False, num_groups=32):
        super().__init__()
        self.factor, self.l2_norm = 2 ** (len(ch_mult) - 1), l2_norm
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                if module.num_channels % num_groups:
                    raise ValueError(f"{module.num_channels} channels do not split into {num_groups} groups")
                module.num_groups = num_groups

    @property
    def codebook(self):
        """Return the K code vectors e_k, float [K,D]; of length one with l2_norm."""
        E = self.quantize.embedding.weight
        return F.normalize(E, dim=1) if self.l2_norm else E

    def encode(self, x):
        """Map images [B,3,H,W] in [-1,1] to codes [B,h,w] int64; H and W are multiples of self.factor (Eq. 9)."""
        with exact_convolutions():
            return self.nearest(self.quant_conv(self.encoder(x)))

    def embed(self, codes):
        """Look up codes [B,h,w] int64: latents z [B,D,h,w]."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def nearest(self, z):
        """Find the nearest code of every latent vector: z [B,D,h,w] to codes [B,h,w] int64."""
        exact = torch.promote_types(z.dtype, torch.float32)              # float32 island; float64 stays
        z, E = z.movedim(1, -1).to(exact), self.codebook.to(exact)       # [B,h,w,D], [K,D]
        if self.l2_norm:
            z = F.normalize(z, dim=-1)
        return nearest_code(z.flatten(0, -2), E).view(z.shape[:-1])

    def decode(self, codes):
        """Map codes [B,h,w] int64 to images [B,3,H,W], clamped to [-1,1]."""
        return self.decode_latents(self.embed(codes)).clamp(-1, 1)

    def decode_latents(self, z):
        """Map latents [B,D,h,w] to images [B,3,H,W], not clamped."""
        with exact_convolutions():
            return self.decoder(self.post_quant_conv(z))


@torch.no_grad()
def nearest_code(z, E):
    """Return argmin_k |z - e_k|^2 for every row of z [N,D] among the rows of E [K,D]: int64 [N].

    |z|^2 is the same for all k, so it is enough to compare |e_k|^2 - 2 z.e_k. 2^22 scores at a time go into one buffer, used
    again for every chunk: a new buffer for each fragmented the heap to sixty times the memory.
    """
    e2, step = E.square().sum(1), max(1, 2 ** 22 // len(E))
    codes, scores = torch.empty(len(z), dtype=torch.long, device=z.device), E.new_empty(min(step, len(z)), len(E))
    with torch.autocast(z.device.type, enabled=False):     # in bf16 neighbours would trade places
        for i in range(0, len(z), step):
            chunk = z[i:i + step]
            codes[i:i + step] = torch.addmm(e2, chunk, E.T, alpha=-2, out=scores[:len(chunk)]).argmin(1)
    return codes


# ---------------------------------------------------------------------------------------------- weights

# The names a pickle of tensors needs. Of others, a trainer's objects and numpy's scalars become inert stubs; the rest is refused.
TENSOR_GLOBALS = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"} | {
    f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")}
INERT = re.compile(r"(pytorch_lightning|lightning)\..+|argparse\.Namespace|_codecs\.encode|"
                   r"numpy\.(dtype|_?core\.multiarray\.scalar)")


class Stub:
    """Stand in for a trainer's pickled object: takes anything, does nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


def pickled_names(path):
    """Yield the names ("module.name") the pickles of a torch file ask for, without running any of them."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        if zipfile.is_zipfile(file):
            archive = stack.enter_context(zipfile.ZipFile(file))
            streams = [archive.open(name) for name in archive.namelist() if name.endswith("data.pkl")]
        else:                                              # legacy files: five pickles in a row, then raw numbers
            file.seek(0)
            streams = [file] * 5
        for stream in streams:
            yield from names_in(stream)


def names_in(stream):
    """Yield the names one pickle asks for."""
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":                # of a protocol torch.save does not use
            yield "a name computed on the pickle's stack"


def read_checkpoint(path, mmap=False):
    """Read a torch.save file, zip or legacy, onto the CPU; what its pickle asks to execute is never executed.

    mmap: leave the tensors on the disk until they are used, for who wants a few of many.
    Raises InputError, naming the file, where it is missing, damaged, or asks for anything but tensors and trainer stubs.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; give the path of a checkpoint")
    try:
        names = set(pickled_names(path)) - TENSOR_GLOBALS
        refused = sorted(name for name in names if not INERT.fullmatch(name))
        if not refused:
            inert = [(OrderedDict if name.endswith("Dict") else Stub, name) for name in names]  # items only go into a dict
            with torch.serialization.safe_globals(inert):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:                             # a damaged file fails in a dozen ways
        reason = str(error).split("WeightsUnpickler error: ")[-1].split("\n")[0]  # not torch's advice to run it anyway
        raise InputError(f"{path}: not a readable torch file ({type(error).__name__}: {reason}); "
                         "download or copy it again") from None
    raise InputError(f"{path}: its pickle asks for {', '.join(refused)}, which tensors do not need; it was not loaded; get "
                     "another copy, or if you trust its source save its tensors alone")


def unwrapped(state):
    """Take the prefixes off a state dict's keys that DistributedDataParallel and torch.compile put there."""
    return {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in state.items()}


def compvis_name(key, levels):
    """Translate one of LlamaGen's key names to CompVis's; others pass unchanged."""
    key = re.sub(r"\.mid\.([012])\.", lambda m: f".mid.{('block_1', 'attn_1', 'block_2')[int(m[1])]}.", key)
    key = re.sub(r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1.", key)
    key = re.sub(r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", key)  # fine to coarse
    return re.sub(r"(down|up)\.(\d+)\.res\.", r"\1.\2.block.", key)


def first_convs(state):
    """Name the first convolution of every level that the encoder's keys mention."""
    levels = [int(m[1]) for key in state if (m := re.match(r"encoder\.down\.(\d+)\.", key))]
    return [f"encoder.down.{i}.block.0.conv1.weight" for i in range(1 + max(levels, default=0))]


def shape_of_network(state, l2_norm):
    """Read the keyword arguments of VQ off its tensors."""
    ch = state["encoder.conv_in.weight"].shape[0]
    n_embed, embed_dim = state["quantize.embedding.weight"].shape
    return dict(ch=ch, ch_mult=tuple(state[key].shape[0] // ch for key in first_convs(state)),
                num_res_blocks=sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", key)) for key in state),
                z_channels=state["encoder.conv_out.weight"].shape[0], n_embed=n_embed, embed_dim=embed_dim, l2_norm=l2_norm)


def load_vq(path):
    """Load a tokenizer: a frozen VQ in eval mode, in float32 on the CPU.

    path: vq-f8's model.ckpt (CompVis/latent-diffusion), LlamaGen's vq_ds8_c2i.pt, or a file of this project,
    {"config": keyword arguments of VQ, "state_dict": tensors}. The kind is told by the keys. Raises InputError, naming
    the file and the key, where the file is unsafe, damaged, or its tensors are not exactly the network's.
    """
    file = read_checkpoint(path)
    keys = {key for key in ("config", "state_dict", "model") if isinstance(file, dict) and isinstance(file.get(key), dict)}
    kind = "state_dict" if "state_dict" in keys else "model"
    for key, value in file[kind].items() if kind in keys else ():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise InputError(f"{path}: {key!r} is of type {type(value).__name__}, no tensor; give a tokenizer's file")
    state, config = unwrapped(file[kind]) if kind in keys else {}, None
    if {"config", "state_dict"} <= keys:
        config = file["config"]
    elif "state_dict" in keys:                             # CompVis: without the losses, averages of weights
        state = {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}
    elif "model" in keys:                                  # LlamaGen
        levels = len({m[1] for k in state if (m := re.match(r"encoder\.conv_blocks\.(\d+)\.", k))})
        state = {compvis_name(k, levels): v for k, v in state.items() if k != "quantize.codebook_used"}
    else:
        raise InputError(f"{path}: neither vq-f8 (\"state_dict\"), nor LlamaGen (\"model\"), nor this project's (\"config\"); "
                         "give a tokenizer's file")
    for key in ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight", *first_convs(state)):
        if key not in state:
            raise InputError(f"{path}: tensor {key} is missing; give the file of a VQ tokenizer, whole")
    try:
        with torch.device("meta"):
            vq = VQ(**(config or shape_of_network(state, l2_norm="model" in keys)))
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{path}: describes no network of this family ({error}); give a supported tokenizer's file") from None
    want, have = ({k: tuple(v.shape) for k, v in s.items()} for s in (vq.state_dict(), state))
    for key in sorted(want.keys() | have.keys()):
        if want.get(key) != have.get(key):
            raise InputError(f"{path}: tensor {key} is {have.get(key, 'missing')} in the file and "
                             f"{want.get(key, 'unknown')} in the network; give a whole file of a supported tokenizer")
    vq.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return vq.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # encodes 1.6x faster on a CPU


# ---------------------------------------------------------------------------------------------- pictures

def from_pixels(pixels):
    """Map uint8 [B,H,W,3] (tensor or array) to images float32 [B,3,H,W] in [-1,1]."""
    return torch.as_tensor(pixels).movedim(-1, 1).contiguous().float() / 127.5 - 1


def to_pixels(x):
    """Map images [B,3,H,W] in [-1,1] to uint8 [B,H,W,3], by rounding (the authors' release truncates)."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)


def decode_pixels(vq, codes):
    """Decode codes [B,h,w] to pictures uint8 [B,H,W,3] on the CPU, one by one.

    A batch of 256x256 pictures takes hundreds of MiB for each, and convolutions round differently with its size.
    """
    with torch.autocast(codes.device.type, enabled=False):               # float32 island, whoever calls
        return torch.cat([to_pixels(vq.decode(c[None])).cpu() for c in codes])


T = Image.Transpose
UPRIGHT = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270, 7: T.TRANSVERSE,
           8: T.ROTATE_90}                                 # by the EXIF tag Orientation


def upright(image):
    """Turn a picture as its EXIF tag says. ImageOps.exif_transpose would read, and stumble over, all the other tags as well."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, struct.error):        # a damaged block says nothing of the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def open_image(path, size):
    """Read a picture as uint8 [size,size,3]: upright by its EXIF tag, RGB, ADM's centre crop.

    ADM (openai/guided-diffusion, image_datasets.py) halves with a box filter while twice too large, then resizes bicubically.
    """
    with Image.open(path) as image:
        image = upright(image)
        if image.mode.startswith("I"):                     # 16-bit grey, which convert() would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image)[top:top + size, left:left + size]


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path to write to, which takes path's place when all went well: path is never half-written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path):
    """Read a dictionary from a JSON file. Raises InputError, naming the file, where it holds something else."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: is no JSON dictionary ({error}); write it again") from None


def save_json(path, record):
    """Write a dictionary as a JSON file."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=1))


def save_image(path, pixels):
    """Write uint8 [H,W,3], tensor or array, as a picture."""
    with replacing(path) as partial:
        Image.fromarray(np.asarray(pixels)).save(partial, "PNG")


def sheet(pixels, columns):
    """Lay out uint8 [B,H,W,3] row by row on one white picture, uint8 [H',W',3], two pixels apart."""
    pixels = np.asarray(pixels)
    B, H, W, _ = pixels.shape
    rows = -(-B // columns)
    page = np.full((rows * columns, H + 2, W + 2, 3), 255, np.uint8)
    page[:B, 1:-1, 1:-1] = pixels
    return page.reshape(rows, columns, H + 2, W + 2, 3).swapaxes(1, 2).reshape(rows * (H + 2), columns * (W + 2), 3)


# ---------------------------------------------------------------------------------------------- command line

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def join_processes():
    """Join the processes torchrun started, if it did: rank, number of processes, device (a GPU each, where there are any)."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    gpu = torch.cuda.is_available()
    if gpu and local >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node: process {local} finds no GPU of its own; start at most {torch.cuda.device_count()}")
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None,
                                             timeout=timedelta(hours=1))  # process 0 may be saving or painting so long
    return rank, world, device


def wait(world):
    """Wait for all processes, where there is more than one."""
    if world > 1:
        torch.distributed.barrier()


def run_script(main):
    """Run a script's main(): an InputError or Ctrl-C ends it with one sentence and exit code 1, not with a traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(sys.argv[0]).name}: interrupted; the same command goes on where it stopped")
    if torch.distributed.is_initialized():                 # not after an error: the others may be waiting for this process
        torch.distributed.destroy_process_group()


def first_process_only(action, rank, world):
    """Have process 0 do something and the others wait; an InputError is raised in all of them. Returns what it returned."""
    outcome = [None, None]                                 # what came out; what was wrong
    if rank == 0:
        try:
            outcome[0] = action()
        except InputError as error:
            outcome[1] = str(error)
    if world > 1:
        torch.distributed.broadcast_object_list(outcome)
    if outcome[1]:
        raise InputError(outcome[1])
    return outcome[0]


def new_or_old_folder(text):
    """Read a flag that names a folder to write, which may be new: a Path."""
    path = Path(text)
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text} has no name of its own to put files beside; give the folder's name")
    for parent in (path, *path.parents):
        if parent.exists() and not parent.is_dir():
            raise argparse.ArgumentTypeError(f"{parent} is a file; give another folder")
    return path


def list_images(root):
    """List an ImageFolder tree: sorted paths, their labels, class names (sub-folders; a flat folder is one class)."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a folder of images, one sub-folder per class")
    pictures = sorted(Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names
                      if Path(name).suffix.lower() in SUFFIXES)
    if not pictures:
        raise InputError(f"{root}: no images in it; give a folder of png, jpg, jpeg, webp or bmp files")
    flat = [p for p in pictures if p.parent == root]
    if flat and len(flat) < len(pictures):
        raise InputError(f"{flat[0]}: lies beside class folders; move it into one of them, or elsewhere")
    names = [root.resolve().name] * len(flat) or [p.relative_to(root).parts[0] for p in pictures]
    classes, labels = np.unique(names, return_inverse=True)
    return pictures, labels, classes.tolist()


class Pictures(torch.utils.data.Dataset):
    """Decode pictures in worker processes: (row, uint8 [size,size,3], what was wrong with the file or "")."""

    def __init__(self, paths, rows, size):
        self.paths, self.rows, self.size = paths, rows, size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = int(self.rows[i])
        try:
            return row, open_image(self.paths[row], self.size), ""
        except Exception as error:                         # Pillow raises a dozen kinds, struct.error among them
            return row, np.zeros((self.size, self.size, 3), np.uint8), str(error) or type(error).__name__


def load_pictures(paths, rows, args):
    """Decode rows of paths in args.num_workers processes: batches of rows, uint8 [B,size,size,3], and errors."""
    return torch.utils.data.DataLoader(Pictures(paths, rows, args.size), args.batch_size, num_workers=args.num_workers,
                                       pin_memory=torch.cuda.is_available())


def claim_folder(args, paths, shapes):
    """Make the arrays `shapes` in the data directory args.out and note what is encoded; or find the same encoding begun."""
    names = "\n".join(str(p.relative_to(args.images)) for p in paths)
    task = dict(tokenizer=str(args.vq.resolve()), tokenizer_sha256=hashlib.sha256(args.vq.read_bytes()).hexdigest(),
                image_size=args.size, flip=args.flip, files=hashlib.sha256(names.encode()).hexdigest())
    print(f"{args.vq}: sha256 {task['tokenizer_sha256']}")
    out, note = args.out, args.out / "partial.json"
    if not note.exists():
        for name in ("meta.json", "codes.npy", "codes_flip.npy", "labels.npy"):
            if (out / name).exists():
                raise InputError(f"--out {out}: already holds a data set, or its {name}; give another folder")
        out.mkdir(parents=True, exist_ok=True)
        for name, (dtype, *shape) in shapes.items():
            np.lib.format.open_memmap(out / f"{name}.npy", "w+", dtype, tuple(shape))
        save_json(note, task)
    elif read_json(note) != task:
        raise InputError(f"--out {out}: holds a part of another encoding ({note.name} differs in images, tokenizer or flags); "
                         "repeat that command, or give another folder")


def encode_folder(args, vq, rank, world, device):
    """Encode args.images into args.out, rows split over processes; an interrupted run goes on where it stopped.

    Every row has its own place in codes.npy, and done.npy tells which are filled. meta.json, written last, makes the folder
    a data directory.
    """
    paths, labels, classes = list_images(args.images)
    if args.reference:
        check_reference(args.reference)                    # a wrong path is told now, not after hours of encoding
    kinds, N, side = ["codes", "codes_flip"][:1 + args.flip], len(paths), args.size // vq.factor
    shapes = {kind: (np.uint16, N, side, side) for kind in kinds} | {"done": (np.uint8, N)}
    first_process_only(lambda: claim_folder(args, paths, shapes), rank, world)
    maps = {kind: np.load(args.out / f"{kind}.npy", mmap_mode="r+") for kind in shapes}
    todo = np.flatnonzero(maps["done"] == 0)
    wait(world)                                            # every process must have read `done` before one writes it

    with tqdm(total=len(todo), unit=" images", desc="encode", disable=rank > 0, smoothing=0.05) as bar, torch.inference_mode():
        for rows, pixels, errors in load_pictures(paths, todo[rank::world], args):
            rows, good = rows.numpy(), np.array([not e for e in errors])
            for row, error in zip(rows, errors):
                if error and not args.skip_bad:
                    raise InputError(f"{paths[row]}: cannot be read ({error}); repeat the command with --skip-bad to "
                                     "leave it out")
            x = from_pixels(pixels.to(device, non_blocking=True))
            for kind, images in zip(kinds, (x, x.flip(3))):
                maps[kind][rows[good]] = vq.encode(images).cpu().numpy()[good]
            maps["done"][rows] = np.where(good, 1, 2)      # after the codes: a row that counts as done is done
            bar.update(min(len(rows) * world, bar.total - bar.n))
    wait(world)
    if rank == 0:
        reference = crop_reference(args) if args.reference else None
        finish_folder(args.out, maps, labels, [str(p) for p in paths], dict(
            tokenizer=str(args.vq.resolve()), image_size=args.size, classes=classes, reference=reference, features="inception"))


def finish_folder(out, maps, labels, paths, meta):
    """Remove the rows of unreadable files, then write labels.npy and, last, meta.json. Interrupted, it can be done again."""
    done = np.array(maps.pop("done"))
    good, skipped = np.flatnonzero(done == 1), [paths[i] for i in np.flatnonzero(done == 2)]
    if len(good) == 0:
        raise InputError(f"{paths[0]} and all others cannot be read; give a folder of images, and remove {out}")
    for kind, codes in maps.items():
        codes.flush()
        if skipped and len(codes) == len(done):            # else done before an interruption
            with replacing(out / f"{kind}.npy") as partial:
                whole = np.lib.format.open_memmap(partial, "w+", np.uint16, (len(good), *codes.shape[1:]))
                for i in range(0, len(good), 10000):
                    whole[i:i + 10000] = codes[good[i:i + 10000]]
                whole.flush()
    with replacing(out / "labels.npy") as partial, open(partial, "wb") as f:
        np.save(f, labels[good])
    save_json(out / "meta.json", dict(meta, skipped=skipped))
    for name in ("partial.json", "done.npy"):              # the note first: without it the folder counts as finished
        (out / name).unlink()
    for path in skipped:
        print(f"skipped {path}: cannot be read")
    print(f"{len(good)} images of {len(meta['classes'])} classes in {out}; next: python train.py --data {out}")


def check_reference(path):
    """Raise InputError where path is neither a folder of images nor an .npz that fid.py can take as a reference."""
    if path.suffix != ".npz":
        list_images(path)
    elif not zipfile.is_zipfile(path) or not {"arr_0", "mu"} & set(np.load(path)):
        raise InputError(f"--reference {path}: is no .npz of images (arr_0) or of statistics (mu); give a folder of images, or "
                         "ADM's .npz")


def crop_reference(args):
    """Prepare what fid.py is to compare with: the images of a folder cropped as the training images are, or an .npz as it is."""
    if args.reference.suffix == ".npz":
        return str(args.reference.resolve())
    paths, _, _ = list_images(args.reference)
    folder = args.out / "reference"
    shutil.rmtree(folder, ignore_errors=True)              # of an interrupted run, perhaps of other pictures
    folder.mkdir()
    for rows, pixels, errors in tqdm(load_pictures(paths, range(len(paths)), args), desc="crop the reference", unit=" batches"):
        for row, picture, error in zip(rows.tolist(), pixels, errors):
            if error and not args.skip_bad:
                raise InputError(f"{paths[row]}: cannot be read ({error}); repeat the command with --skip-bad to leave it out")
            if error:
                print(f"skipped {paths[row]}: cannot be read")
            else:
                save_image(folder / f"{row:06d}.png", picture)
    if not any(folder.iterdir()):
        raise InputError(f"--reference {args.reference}: none of its images can be read; give other ones")
    return "reference"


def reconstruct(args, vq, device):
    """Write original | reconstruction for each picture and print its PSNR in dB."""
    args.out.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(args.reconstruct):
        _, pixels, error = Pictures([path], [0], args.size)[0]
        if error:
            raise InputError(f"{path}: cannot be read ({error}); give a picture")
        with torch.inference_mode():
            again = decode_pixels(vq, vq.encode(from_pixels(pixels[None]).to(device))).numpy()[0]
        mse = np.square(pixels.astype(np.float64) - again).mean()
        target = args.out / f"{number:03d}-{Path(path).stem}.png"
        save_image(target, sheet([pixels, again], columns=2))
        print(f"{target}: PSNR {10 * math.log10(255 ** 2 / mse) if mse else math.inf:.2f} dB")


def main():
    """Read the flags and encode, or reconstruct."""
    parser = argparse.ArgumentParser(description="Encode a folder of images into codes, or look at reconstructions.")
    parser.add_argument("images", nargs="?", type=Path, help="ImageFolder tree to encode: one sub-folder per class")
    parser.add_argument("--vq", type=Path, required=True, help="tokenizer: vq-f8, LlamaGen's vq_ds8_c2i, or this project's")
    parser.add_argument("--out", type=new_or_old_folder, help="folder to write (default for --reconstruct: reconstructions)")
    parser.add_argument("--size", type=int, default=256, help="side of the centre crop in pixels")
    parser.add_argument("--flip", action="store_true", help="also store the codes of the mirrored images")
    parser.add_argument("--reference", type=Path, help="images (or ADM's .npz) for fid.py to compare with")
    parser.add_argument("--reconstruct", nargs="+", metavar="IMAGE", help="write original | reconstruction of these instead")
    parser.add_argument("--batch-size", type=int, default=32, help="images a process encodes at once")
    parser.add_argument("--num-workers", type=int, default=min(8, os.cpu_count()),
                        help="processes reading images, for each that encodes")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read, and list them")
    args = parser.parse_args()
    if args.batch_size < 1 or args.num_workers < 0:
        parser.error("--batch-size is at least 1, --num-workers at least 0")
    if (args.images is None) == (args.reconstruct is None):
        parser.error("give either IMAGES to encode, or --reconstruct IMAGE...")
    if args.images and not args.out:
        parser.error("--out is missing: name the data directory to write")
    if args.reconstruct and (args.flip or args.reference or args.skip_bad):
        parser.error("--reconstruct looks at single pictures; leave out --flip, --reference and --skip-bad")
    rank, world, device = join_processes()
    vq = load_vq(args.vq).to(device)
    if len(vq.codebook) > 2 ** 16:
        raise InputError(f"--vq {args.vq}: has {len(vq.codebook)} codes; codes.npy holds at most 65,536")
    if args.size % vq.factor or args.size <= 0:
        raise InputError(f"--size {args.size}: give a multiple of {vq.factor}, the pixels a code stands for")
    if not args.reconstruct:
        encode_folder(args, vq, rank, world, device)
    elif rank == 0:
        args.out = args.out or Path("reconstructions")
        reconstruct(args, vq, device)


if __name__ == "__main__":
    run_script(main)
