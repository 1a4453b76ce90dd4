"""Compare our networks with the originals they are equal to, and print a table of differences.

    python -m tests.originals --dit ../DiT --ldm ../latent-diffusion --llamagen ../LlamaGen \\
        --fidelity ../torch-fidelity

Each path is a checkout: of facebookresearch/DiT (it needs timm), CompVis/latent-diffusion (einops),
FoundationVision/LlamaGen, and toshas/torch-fidelity (torchvision). Those not given are skipped.
Both sides have the same random weights, but for DiT through a file as published ones come, and the
same inputs, in float32 on a CPU. A difference is the largest absolute one.
"""
import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import fid
from model import SIZES, DiT
from tests.test_fid import as_published, random_inception
from vq import load_vq


def randomise(net, std=0.02):
    """Draw what the initialisation sets to zero, too."""
    for p in net.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=std)
    return net.eval()


def largest(a, b):
    return f"{(a - b).abs().max():.1e}"


def compare_dit(folder):
    """DiT-S/2 with 8 outputs, as theirs has for 4 channels and their variances; 4 latents."""
    from models import DiT as Theirs
    size = SIZES["DiT-S/2"]
    theirs = randomise(Theirs(input_size=32, num_classes=1000, **size))
    ours = DiT(out_channels=8, **size).eval()
    ours.load_state_dict(theirs.state_dict())
    z, t, y = torch.randn(4, 4, 32, 32), 1000 * torch.rand(4), torch.tensor([0, 7, 999, 1000])
    logits = ours(z, t, y)
    others = theirs(z, t, y).movedim(1, -1)
    yield f"DiT-S/2, logits up to {logits.abs().max():.1f}", largest(logits, others)


def compare_tokenizers(name, folder, file, encode, decode):
    """Codes and images of a 256x256 image, for weights that their code has saved in a file."""
    torch.save(file, folder / "vq.pt")
    ours = load_vq(folder / "vq.pt")
    x = torch.rand(1, 3, 256, 256) * 2 - 1
    codes = ours.encode(x)
    others = encode(x).view(codes.shape)
    yield f"{name}, codes that differ of {codes.numel()}", (codes != others).sum().item()
    image = ours.decoder(ours.post_quant_conv(ours.embed(codes)))  # decode() also clamps
    yield f"{name}, images", largest(image, decode(codes))


def compare_ldm(folder):
    """vq-f8: encoder and decoder are theirs, the search is written out."""
    from ldm.modules.diffusionmodules.model import Decoder, Encoder
    settings = dict(ch=128, out_ch=3, ch_mult=(1, 2, 2, 4), num_res_blocks=2, resolution=256,
                    attn_resolutions=[32], in_channels=3, z_channels=4, double_z=False)
    theirs = torch.nn.ModuleDict(dict(
        encoder=Encoder(**settings), decoder=Decoder(**settings),
        quant_conv=torch.nn.Conv2d(4, 4, 1), post_quant_conv=torch.nn.Conv2d(4, 4, 1),
        quantize=torch.nn.ModuleDict(dict(embedding=torch.nn.Embedding(16384, 4)))))
    E = theirs["quantize"]["embedding"].weight

    def encode(x):
        h = theirs["quant_conv"](theirs["encoder"](x)).movedim(1, -1).flatten(0, 2)
        return torch.cdist(h, E, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)

    def decode(codes):
        return theirs["decoder"](theirs["post_quant_conv"](E[codes].movedim(-1, 1)))

    return compare_tokenizers("vq-f8", folder, {"state_dict": theirs.state_dict()}, encode, decode)


def compare_llamagen(folder):
    from tokenizer.tokenizer_image.vq_model import VQ_models
    theirs = VQ_models["VQ-8"]().eval()

    def decode(codes):
        return theirs.decode_code(codes.flatten(), (1, 8, 32, 32))

    file = {"model": theirs.state_dict()}
    return compare_tokenizers("vq_ds8_c2i", folder, file, lambda x: theirs.encode(x)[2][2], decode)


def compare_fidelity(folder):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    path = folder / "inception.pth"
    torch.save(as_published(random_inception()), path)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    ours = fid.load_inception(path)
    for side in (64, 299, 512):
        x = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
        a, (b,) = ours(x), theirs(x)
        yield f"Inception, {side} pixels, features up to {a.max():.0f}", largest(a, b)
    sets = [fid.statistics(np.random.default_rng(i).normal(size=(3000, 2048))) for i in (0, 1)]
    a = fid.frechet_distance(*sets[0], *sets[1])
    b, = fid_statistics_to_metric(*(dict(mu=mu, sigma=S) for mu, S in sets), False).values()
    yield f"Fréchet distance, {a:.1f}, 2048 dimensions", f"{abs(a - b):.1e}"


CHECKS = {
    "dit": (compare_dit, "facebookresearch/DiT"),
    "ldm": (compare_ldm, "CompVis/latent-diffusion"),
    "llamagen": (compare_llamagen, "FoundationVision/LlamaGen"),
    "fidelity": (compare_fidelity, "toshas/torch-fidelity")
}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Compare our networks with the originals.")
    for name, (_, repository) in CHECKS.items():
        parser.add_argument(f"--{name}", metavar="PATH", help=f"checkout of {repository}")
    given = vars(parser.parse_args())
    print("| network | against | difference |\n|---|---|---|")
    for name, (check, repository) in CHECKS.items():
        if not given[name]:
            print(f"| | {repository} | skipped: no --{name} |")
            continue
        torch.manual_seed(0)
        sys.path.insert(0, given[name])
        with tempfile.TemporaryDirectory() as folder:
            for network, difference in check(Path(folder)):
                print(f"| {network} | {repository} | {difference} |", flush=True)
        sys.path.pop(0)


if __name__ == "__main__":
    main()
