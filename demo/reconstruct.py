"""Does a tokenizer suit your pictures? Look at what it makes of some, beside the originals.

    python -m demo.reconstruct cat.jpg dog.png --vq model.ckpt
    python -m demo.reconstruct demo/cat.png --vq demo/cats/tokenizer.pt --size 64

Each picture is cropped as vq.py does, encoded and decoded. OUT is a sheet, original | again.
"""
from pathlib import Path

import torch

from vq import (crop, from_pixels, load_vq, make_parser, psnr, read_image, save_image,
                setup_process)


@torch.inference_mode()
def main(argv=None):
    parser = make_parser(
        "Show what a tokenizer makes of pictures, and its PSNR in dB.",
        ("--size", 256, "side of the centre crop in pixels"),
        ("--out", Path("reconstructions.png"), "sheet to write"))
    parser.add_argument("pictures", nargs="+", type=Path, help="pictures to reconstruct")
    parser.add_argument("--vq", type=Path, required=True, help="weights of the tokenizer")
    args = parser.parse_args(argv)
    _, _, device = setup_process(args.device)
    vq = load_vq(args.vq, device)
    if args.size < 1 or args.size % vq.factor:
        parser.error(f"--size: give a multiple of {vq.factor}")
    pairs = []
    for path in args.pictures:
        original = crop(read_image(path), args.size)
        codes = vq.encode(from_pixels(original[None]).to(device))
        again, = vq.decode_pixels(codes).numpy()
        print(f"{path}: PSNR {psnr(original, again):.2f} dB")
        pairs += [original, again]
    save_image(args.out, pairs, columns=2)
    print(args.out)


if __name__ == "__main__":
    main()
