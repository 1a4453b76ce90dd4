"""Draw the demo's data set: portraits of cats in ten coats, no download needed.

    python -m demo.cats.cats                          cats.png: a column for each coat, six rows
    python -m demo.cats.cats --rows 10 --seed 3 --out more.png

A cat is a pure function of (seed, index): a pose, a light, a coat, and dice for each part of the
face. Shapes live in head coordinates (u, v): the origin lies between the eyes, the cheeks at u = -1
and 1, the crown at v = -0.9, the chin at v = 0.9. Each shape becomes an anti-aliased mask and is
painted over the picture, back to front. The order of the dice is part of the data set: draw new
ones last.

Shapes: H W pixels, M numbers, n cats.
"""
import argparse
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).resolve().parent  # the demo's data directory

GOLD = (250, 206, 62)
GREEN = (150, 204, 92)
AMBER = (240, 160, 44)
BLUE = (92, 172, 240)
COPPER = (222, 122, 44)
LOOKS = {
    # coat            fur              muzzle           eyes, one of
    "black":        ((46, 44, 52),    (60, 57, 65),    (GOLD, GREEN, AMBER)),
    "white":        ((243, 241, 238), (252, 250, 248), (BLUE, GREEN, GOLD)),
    "grey":         ((134, 143, 158), (164, 171, 183), (GOLD, GREEN, COPPER)),
    "ginger tabby": ((238, 156, 76),  (252, 228, 196), (GREEN, AMBER, GOLD)),
    "cream":        ((238, 206, 152), (250, 234, 206), (COPPER, BLUE, GREEN)),
    "brown":        ((116, 74, 50),   (142, 96, 68),   (AMBER, GREEN, GOLD)),
    "tuxedo":       ((46, 44, 52),    (248, 246, 243), (GREEN, GOLD, AMBER)),
    "siamese":      ((236, 222, 198), (74, 53, 46),    (BLUE,)),
    "calico":       ((246, 242, 236), (250, 247, 243), (GREEN, AMBER, GOLD)),
    "brown tabby":  ((164, 132, 98),  (230, 212, 184), (GREEN, GOLD, AMBER)),
}
MARKINGS = {
    "ginger tabby": (182, 86, 26),
    "brown tabby": (62, 44, 34),
    "siamese": (86, 62, 52),
    "calico": (228, 138, 56),
}
COATS = tuple(LOOKS)                            # a cat's label is its place here
NUMBERS = (                                     # what draw() reports of a cat
    "x", "y", "scale", "yaw", "pitch", "tilt", "light x", "light y", "ear", "lid", "pupil", "fur",
    "eye red", "eye green", "eye blue", "backdrop red", "backdrop green", "backdrop blue")
WHITE = np.array((250, 247, 242), np.float32).reshape(3, 1, 1)
INK = np.array((32, 26, 28), np.float32).reshape(3, 1, 1)
PINK = np.array((232, 150, 150), np.float32).reshape(3, 1, 1)

OVERSAMPLE = 4                                  # masks are drawn this many times larger
ANGLES = np.linspace(0, 2 * np.pi, 36, endpoint=False)
S = np.linspace(0, 1, 9)[:, None]               # the parameter along a curve
BOTH = (-1, 1)                                  # the sides of a face: left, right


# ----- shapes

def jitter(rng, colour, amount):
    """Return colour (RGB, 0..255) a little brighter or darker and a little off in hue: [3,1,1]."""
    gain = 1 + amount * (rng.uniform(-1, 1) + 0.3 * rng.uniform(-1, 1, (3, 1, 1)))
    return np.clip(np.reshape(colour, (3, 1, 1)) * gain, 0, 255).astype(np.float32)


def oval(u, v, ru, rv, slant=0.0):
    """Return 36 points [36,2] of an ellipse centred at (u, v) and turned by slant radians."""
    x = ru * np.cos(ANGLES)
    y = rv * np.sin(ANGLES)
    c = np.cos(slant)
    s = np.sin(slant)
    return np.stack([u + x * c - y * s, v + x * s + y * c], 1)


def stroke(start, end, width, bend=0.0, taper=0.0):
    """Return a brush stroke [18,2], bent sideways, from `width` at its start to width * taper."""
    start = np.array(start)
    along = np.subtract(end, start)
    normal = np.array([-along[1], along[0]]) / np.hypot(*along)
    spine = start + S * along + 4 * bend * S * (1 - S) * normal
    half = width / 2 * (1 - (1 - taper) * S ** 2) * normal
    return np.concatenate([spine + half, (spine - half)[::-1]])


def rounded(corners):
    """Round the corners of a polygon: the closed quadratic B-spline [9n,2] of n control points."""
    q = np.array(corners)[:, None]              # [n,1,2]
    enter = (np.roll(q, 1, 0) + q) / 2
    leave = (q + np.roll(q, -1, 0)) / 2
    return ((1 - S) ** 2 * enter + 2 * S * (1 - S) * q + S ** 2 * leave).reshape(-1, 2)


class Canvas:
    """A picture [3,H,W] in progress, with the pose of the head and the light that falls on it."""

    def __init__(self, rng, size, backdrop):
        self.size = size
        self.scale = rng.uniform(0.335, 0.39)   # half a head's width
        self.centre = np.array([0.5, 0.57]) + rng.uniform(-0.04, 0.04, 2)
        self.yaw = rng.uniform(-0.16, 0.16)
        self.pitch = rng.uniform(-0.06, 0.07)
        self.tilt = np.clip(rng.normal(0, 0.13), -0.3, 0.3)
        c = np.cos(self.tilt)
        s = np.sin(self.tilt)
        self.axes = self.scale * np.array([[c, s], [-s, c]])  # (u, v) @ axes: offset from centre

        pixel = (np.arange(size) + 0.5) / size
        xy = np.stack(np.meshgrid(pixel, pixel), -1)          # [H,W,2] in 0..1
        u, v = np.moveaxis((xy - self.centre) @ np.linalg.inv(self.axes), -1, 0)
        angle = rng.uniform(-np.pi, 0)          # the light comes from somewhere above
        self.to_light = np.cos(angle), np.sin(angle)
        facing = np.clip(u * self.to_light[0] + v * self.to_light[1], -1.3, 1.3)
        light = 0.98 + 0.17 * facing - 0.1 * np.clip(u * u + v * v, 0, 2)
        self.light = light.astype(np.float32)
        glow = (xy - 0.5) @ self.to_light
        self.image = (backdrop * (1 + 0.4 * glow)).astype(np.float32)

    def turned(self, points):
        """Move points of the face as the head turns: most in its middle, not at all at its rim."""
        return points + (self.yaw, self.pitch) * np.maximum(1 - points ** 2, 0)

    def mask(self, *shapes, blur=0.0):
        """Return the coverage [H,W] in 0..1 of a union of polygons in (u, v); blur is a radius."""
        big = self.size * OVERSAMPLE
        picture = Image.new("L", (big, big))
        pen = ImageDraw.Draw(picture)
        for points in shapes:
            pen.polygon(((points @ self.axes + self.centre) * big).ravel().tolist(), fill=255)
        picture = picture.reduce(OVERSAMPLE)
        if blur:
            picture = picture.filter(ImageFilter.GaussianBlur(blur * self.scale * self.size))
        return np.asarray(picture, np.float32) / 255

    def paint(self, mask, colour):
        """Blend the colour [3,1,1], shaded by the light.

        The light is added as well, because on black fur a factor alone would not show.
        """
        shaded = colour * self.light + 40 * (self.light - 0.95)
        self.image += mask * (shaded - self.image)


# ----- the parts of a cat

def head_outline(rng):
    """Return the head's polygon: a round skull, wide cheeks with a tuft each, a small chin."""
    cheek = rng.uniform(0.98, 1.1)
    chin = rng.uniform(0.88, 0.96)
    tuft = rng.uniform(0.0, 0.14)
    half = np.array([
        (0.25, -0.88), (0.66, -0.76), (0.95, -0.36), (cheek, 0.08), (cheek + tuft, 0.4),
        (cheek + tuft - 0.05, 0.48), (0.84, 0.6), (0.6, 0.8), (0.26, chin)])
    return rounded(np.concatenate([half, half[::-1] * (-1, 1)]))


def ear_outlines(rng, yaw):
    """Return the polygons of the left and the right ear; the head hides their lower parts."""
    tip_u = rng.uniform(0.66, 0.88)
    tip_v = rng.uniform(-1.34, -1.14)
    inner = rng.uniform(0.08, 0.18)
    middle_v = tip_v / 2 - 0.4
    ears = []
    for side in BOTH:
        u = tip_u * (1 - 0.5 * side * yaw)      # the ear turned away looks narrower
        corners = [
            (inner, -0.66), ((inner + u) / 2 - 0.07, middle_v), (u - 0.05, tip_v),
            (u + 0.04, tip_v), (u / 2 + 0.58, middle_v + 0.22), (0.97, -0.1), (0.4, -0.2)]
        ears.append(rounded(corners) * (side, 1))
    return ears


def tabby_stripes(rng):
    """Return a tabby's strokes: a fan on the forehead, bars on the cheeks."""
    width = rng.uniform(0.13, 0.18)
    fan = rng.uniform(0.26, 0.34)
    count = rng.integers(1, 3)
    bars = np.linspace(-0.1, 0.5, rng.integers(3, 5))
    strokes = [stroke((0, -1.0), (0, -0.28), width, taper=0.3)]
    for side in BOTH:
        for k in range(1, count + 1):
            top = side * fan * k, -1.0
            bottom = side * 0.2 * k, -0.4
            strokes.append(stroke(top, bottom, width, 0.04 * side, 0.3))
        for v in bars:
            outer = side * 1.25, v
            inner = side * 0.62, v + 0.08
            strokes.append(stroke(outer, inner, 0.9 * width, -0.05 * side))
    return strokes


def calico_patch(rng, side):
    """Return a patch of fur on one side of the forehead."""
    u = side * rng.uniform(0.55, 0.75)
    v = rng.uniform(-0.5, -0.2)
    ru = rng.uniform(0.44, 0.58)
    rv = rng.uniform(0.45, 0.65)
    return oval(u, v, ru, rv, side * rng.uniform(-0.5, 0.5))


def draw_coat(canvas, rng, coat, head, ears, marking, muzzle):
    """Paint what tells the coats apart, stripes, mask, patches or blaze; then the muzzle."""
    def on_head(shapes, colour, blur=0.0):
        canvas.paint(head * canvas.mask(*map(canvas.turned, shapes), blur=blur), colour)

    cheeks = [oval(side * 0.18, 0.52, 0.28, 0.22) for side in BOTH]
    cheeks.append(oval(0, 0.72, 0.2, 0.16))
    softness = 0.06
    if coat.endswith("tabby"):
        on_head(tabby_stripes(rng), marking)
    elif coat == "siamese":
        face = oval(0, 0.22, rng.uniform(0.42, 0.6), rng.uniform(0.5, 0.64))
        on_head([face], marking, blur=0.16)
        canvas.paint((1 - head) * canvas.mask(*ears), marking)
    elif coat == "calico":
        for side, colour in zip(rng.permutation(BOTH), (marking, INK + 20)):
            patch = head * canvas.mask(canvas.turned(calico_patch(rng, side)))
            ear = canvas.mask(ears[max(side, 0)])
            canvas.paint((1 - head) * ear + patch, colour)  # at once, so that no seam shows
    elif coat == "tuxedo":
        brow = rng.uniform(-0.9, -0.1)
        width = rng.uniform(0.1, 0.3)
        half = np.array([(width / 2, 0.1), (0.64, 0.38), (0.6, 0.8), (0.1, 1.1)])
        cheeks = [rounded([(0, brow), *half, *half[::-1] * (-1, 1)])]
        softness = 0.0
    on_head(cheeks, muzzle, softness)


def draw_eyes(canvas, rng, iris):
    """Paint two eyes: dark rim, iris in the shade of its lid, pupil, highlight.

    Return half the height of an eye and half the width of its pupil.
    """
    apart = rng.uniform(0.4, 0.47)
    level = rng.uniform(-0.08, 0.04)
    slant = rng.uniform(-0.3, -0.05)
    wide = rng.uniform(0.25, 0.3)
    high = rng.uniform(0.17, 0.27)
    pupil = rng.uniform(0.07, 0.17)
    gaze_u, gaze_v = rng.uniform((-0.07, -0.02), (0.07, 0.03))

    def pair(du, dv, ru, rv, slant=0.0, blur=0.0):
        """Mask an oval for each eye, off its centre by (du, dv)."""
        ovals = [oval(side * apart + du, level + dv, ru, rv, side * slant) for side in BOTH]
        return canvas.mask(*map(canvas.turned, ovals), blur=blur)

    eye = pair(0, 0, wide, high, slant)
    canvas.paint(pair(0, 0, wide + 0.05, high + 0.05, slant), INK)
    canvas.paint(eye, iris)
    canvas.paint(eye * pair(0, -0.8 * high, wide, 0.65 * high, blur=0.05), 0.6 * iris)
    canvas.paint(eye * pair(gaze_u, gaze_v, pupil, max(pupil, 0.9 * high)), INK)
    canvas.paint(pair(0.6 * gaze_u - 0.08, 0.6 * gaze_v - 0.09, 0.065, 0.065), WHITE)
    return high, pupil


def draw_face(canvas, rng, nose, mouth, whisker):
    """Paint mouth, nose and whiskers in the colours given."""
    wide = rng.uniform(0.12, 0.16)
    tip = 0.45                                  # where the nose ends, the mouth begins
    lips = [stroke((0, tip), (0, tip + 0.08), 0.05, taper=1)]
    for side in BOTH:
        lips.append(stroke((0, tip + 0.07), (side * 0.25, tip + 0.07), 0.06, 0.08 * side, 0.5))
    canvas.paint(0.8 * canvas.mask(*map(canvas.turned, lips)), mouth)
    triangle = [
        (-wide, tip - 0.2), (wide, tip - 0.2), (wide, tip - 0.12), (0, tip), (-wide, tip - 0.12)]
    canvas.paint(canvas.mask(canvas.turned(rounded(triangle))), nose)

    length = rng.uniform(0.65, 0.95)
    droop = rng.uniform(-0.1, 0.12)
    strokes = []
    for side in BOTH:
        root = canvas.turned(np.array([side * 0.36, tip + 0.03]))
        for k in (-1, 0, 1):
            end = root + (side * length, 0.34 * k + droop)
            strokes.append(stroke(root + (0, 0.1 * k), end, 0.05, -0.06 * side, 0.3))
    canvas.paint(0.7 * canvas.mask(*strokes), whisker)


def draw_body(canvas, rng, name, fur, muzzle):
    """Paint the chest, the ears and the head. Return the head's mask and the ears' outlines."""
    skull = head_outline(rng)
    ears = ear_outlines(rng, canvas.yaw)
    shoulder = rng.uniform(0.8, 1.0)
    head = canvas.mask(skull)
    corners = [
        (-0.5, 0.3), (0.5, 0.3), (shoulder, 1.0), (1.2, 2.6), (-1.2, 2.6), (-shoulder, 1.0)]
    chest = canvas.mask(rounded(corners))
    canvas.paint(chest, 0.94 * fur)
    if name == "tuxedo":
        canvas.paint(chest * canvas.mask(oval(0, 1.3, 0.42, 0.75)), 0.95 * muzzle)
    shadow = canvas.mask(skull + (0, 0.12), blur=0.1)
    canvas.paint(0.5 * chest * shadow, 0.5 * fur)
    canvas.paint(canvas.mask(*ears), 0.94 * fur)
    canvas.paint(head, fur)
    return head, ears


# ----- cats

def draw(rng, coat, size=64):
    """Draw one cat of COATS[coat], all that varies drawn from the np.random.Generator.

    Return the picture uint8 [size,size,3] and its numbers [M], named by NUMBERS: x and y of the
    head's centre and its scale in picture widths; angles in radians; the direction to the light, a
    unit vector; in head coordinates the height v of the ears' tips, half the height of an eye and
    half the width of its pupil; the fur's brightness, where 1 is the coat's own; colours in 0..255.
    """
    name = COATS[coat]
    plain_fur, muzzle, eyes = LOOKS[name]
    fur = jitter(rng, plain_fur, 0.08)
    muzzle = jitter(rng, muzzle, 0.08)
    marking = jitter(rng, MARKINGS.get(name, plain_fur), 0.08)
    pale = fur.mean() > 180
    value = rng.uniform(0.42, 0.68) if pale else rng.uniform(0.66, 0.86)  # the head stands out
    backdrop = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.06, 0.28), value)
    backdrop = 255 * np.reshape(backdrop, (3, 1, 1))
    canvas = Canvas(rng, size, backdrop)

    head, ears = draw_body(canvas, rng, name, fur, muzzle)
    draw_coat(canvas, rng, name, head, ears, marking, muzzle)
    inner = []
    for side, ear in zip(BOTH, ears):
        middle = np.array([0.58, -0.68]) * (side, 1)  # the inner ear is the ear shrunk to this
        inner.append(middle + 0.62 * (ear - middle))
    flesh = 0.6 * PINK + 0.4 * (marking if name == "siamese" else fur)
    canvas.paint((1 - head) * canvas.mask(*inner, blur=0.03), flesh)
    iris = jitter(rng, eyes[rng.integers(len(eyes))], 0.1)
    lid, pupil = draw_eyes(canvas, rng, iris)
    nose = jitter(rng, PINK, 0.15)
    mouth = nose * (0.4 if muzzle.mean() > 110 else 0.75)
    draw_face(canvas, rng, nose, mouth, INK + 60 if pale else WHITE)

    levels = (canvas.image.clip(0, 252) / 4).round() * 4  # 64 levels make files half as large
    ear = ears[0][:, 1].min()
    brightness = fur.mean() / np.mean(plain_fur)
    numbers = [
        *canvas.centre, canvas.scale, canvas.yaw, canvas.pitch, canvas.tilt, *canvas.to_light,
        ear, lid, pupil, brightness, *iris.ravel(), *backdrop.ravel()]
    return levels.astype(np.uint8).transpose(1, 2, 0), numbers


def cats(n, seed, size=64):
    """Draw n cats, coats in turn: uint8 [n,size,size,3], labels uint8 [n], numbers float32 [n,M].

    Label i is i % 10, a place in COATS. draw() explains the numbers; they do not depend on the
    size. Cat i depends on (seed, i) alone, so a longer set begins with the shorter one.
    """
    labels = np.arange(n) % len(COATS)
    images = np.empty((n, size, size, 3), np.uint8)
    numbers = np.empty((n, len(NUMBERS)), np.float32)
    for i in range(n):
        images[i], numbers[i] = draw(np.random.default_rng((seed, i)), labels[i], size)
    return images, labels.astype(np.uint8), numbers


def main():
    parser = argparse.ArgumentParser(description="Draw a sheet of cats, a column for each coat.")
    add = parser.add_argument
    add("--out", default="cats.png", help="picture to write")
    add("--rows", type=int, default=6, help="cats of each coat")
    add("--seed", type=int, default=0, help="another seed, other cats")
    args = parser.parse_args()
    images, _, _ = cats(args.rows * len(COATS), args.seed)
    rows = images.reshape(args.rows, len(COATS), *images.shape[1:])  # [rows,10,H,W,3]
    page = np.concatenate(np.concatenate(rows, 1), 1)
    Image.fromarray(page).save(args.out)


if __name__ == "__main__":
    main()
