"""Captioned 64x64 scenes, drawn by numpy alone: a deterministic substitute for a photo collection.

A scene is a soft gradient with one main object (kind x colour = 48 classes), which is lit from the top left and casts a
shadow; half of the scenes also have a small companion object. Scenes are drawn in chunks of 256, each with a generator
of its own, so scene i of a split does not depend on how many are drawn. A hash of the caption decides the split, so no
two splits share a caption.
"""

from dataclasses import dataclass, fields

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "white")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("night", "grey", "sky", "sand")
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
CLASSES = tuple(f"{colour} {kind}" for kind in SHAPES for colour in COLOURS)

SIZE = 64
CHUNK = 256
# Captions are hashed into 16 equal parts; each split has some of them.
SPLITS = {
    "train": range(0, 8),
    "validation": range(8, 10),
    "calibration": range(10, 12),
    "reference": range(12, 14),
    "evaluation": range(14, 16),
}

_RGB = (
    np.array(
        [
            [214, 40, 40],
            [40, 160, 64],
            [44, 92, 222],
            [248, 212, 44],
            [132, 52, 184],
            [244, 126, 22],
            [246, 128, 186],
            [248, 248, 246],
        ],
        np.float32,
    )
    / 255
)
_TOP = np.array([[14, 18, 42], [104, 106, 112], [118, 178, 226], [232, 212, 172]], np.float32) / 255
_BOTTOM = np.array([[46, 42, 84], [148, 150, 156], [196, 224, 242], [196, 166, 122]], np.float32) / 255
_WORDS = "a at the on background left right of above below top bottom center".split()


def vocabulary():
    """Every word that can occur in a caption, in a fixed order."""
    return _WORDS + [*SIZES, *COLOURS, *SHAPES, *TEXTURES[1:], *BACKGROUNDS]


@dataclass
class Scenes:
    """Attributes of n scenes.  Columns of the [n, 2] arrays are the main object and its companion."""

    pair: np.ndarray  # [n] bool: is there a companion?
    kind: np.ndarray  # [n, 2]
    colour: np.ndarray  # [n, 2]
    size: np.ndarray  # [n] of the main object; 1 (large) beside a companion, which is small
    texture: np.ndarray  # [n] of the main object; 0 (plain) where it is small
    position: np.ndarray  # [n] of an object alone
    relation: np.ndarray  # [n] of the main object to its companion
    background: np.ndarray  # [n]
    looks: np.ndarray  # [n, 16] uniform in [0, 1): details that the caption does not mention

    def __len__(self):
        return len(self.pair)

    def __getitem__(self, rows):
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def labels(self):
        """kind x colour of the main object, [n] in 0..47, an index into CLASSES."""
        return self.kind[:, 0] * len(COLOURS) + self.colour[:, 0]

    def captions(self):
        """One sentence per scene."""
        return [self._caption(i) for i in range(len(self))]

    def _caption(self, i):
        words = ["a", SIZES[self.size[i]]]
        if self.texture[i]:
            words.append(TEXTURES[self.texture[i]])
        words += [COLOURS[self.colour[i, 0]], SHAPES[self.kind[i, 0]]]
        if self.pair[i]:
            words += [RELATIONS[self.relation[i]], "a", "small", COLOURS[self.colour[i, 1]], SHAPES[self.kind[i, 1]]]
        else:
            words += ["at the", POSITIONS[self.position[i]]]
        return " ".join([*words, "on a", BACKGROUNDS[self.background[i]], "background"])

    def images(self):
        """The scenes as uint8 images [n, 64, 64, 3]."""
        out = np.empty((len(self), SIZE, SIZE, 3), np.uint8)
        for start in range(0, len(self), CHUNK):
            rows = slice(start, start + CHUNK)
            out[rows] = _render(self[rows])
        return out


def draw(split, n, start=0):
    """Scenes start .. start + n - 1 of a split. Raises ValueError for a split that is not in SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if n < 0 or start < 0:
        raise ValueError(f"n and start must not be negative, got {n} and {start}")
    chunks = [_chunk(split, c) for c in range(start // CHUNK, -(-(start + n) // CHUNK))] or [_chunk(split, 0)[:0]]
    scenes = Scenes(**{f.name: np.concatenate([getattr(c, f.name) for c in chunks]) for f in fields(Scenes)})
    first = start % CHUNK
    return scenes[first : first + n]


def _chunk(split, chunk):
    rng = np.random.default_rng([list(SPLITS).index(split), chunk])
    # 24 candidates per scene: the smallest splits keep an eighth of them, so a chunk always has enough.
    m = 24 * CHUNK
    pair = rng.random(m) < 0.5
    size = np.where(pair, 1, rng.integers(0, 2, m))
    texture = np.where(size == 1, rng.choice(3, m, p=[0.5, 0.25, 0.25]), 0)
    # What a caption does not mention is set to zero, so that equal captions are equal rows.
    scenes = Scenes(
        pair=pair,
        kind=rng.integers(0, len(SHAPES), (m, 2)),
        colour=rng.integers(0, len(COLOURS), (m, 2)),
        size=size,
        texture=texture,
        position=np.where(pair, 0, rng.integers(0, len(POSITIONS), m)),
        relation=np.where(pair, rng.integers(0, len(RELATIONS), m), 0),
        background=rng.integers(0, len(BACKGROUNDS), m),
        looks=np.zeros((m, 16)),
    )
    scenes.kind[:, 1] *= pair
    scenes.colour[:, 1] *= pair
    scenes = scenes[np.flatnonzero(np.isin(_bucket(scenes), SPLITS[split]))[:CHUNK]]
    scenes.looks = rng.random((CHUNK, 16)).astype(np.float32)
    return scenes


def _bucket(scenes):
    """Hash each caption to 0..15: the attributes as one number, mixed by the finaliser of splitmix64."""
    code = np.zeros(len(scenes), np.uint64)
    digits = [scenes.pair, *scenes.kind.T, *scenes.colour.T, scenes.size, scenes.texture]
    for digit in [*digits, scenes.position, scenes.relation, scenes.background]:
        code = code * np.uint64(16) + digit.astype(np.uint64)
    code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((code ^ (code >> np.uint64(31))) % np.uint64(16)).astype(int)


def _distance(kind, x, y, r):
    """Signed distance to the outline, negative inside.  kind [n], x and y [n, H, W], r [n, 1, 1]."""
    out = np.empty_like(x)
    for k, name in enumerate(SHAPES):
        rows = kind == k
        if not rows.any():
            continue
        X, Y, R = x[rows], y[rows], r[rows]
        if name == "circle":
            d = np.hypot(X, Y) - 0.95 * R
        elif name == "square":
            d = np.maximum(np.abs(X), np.abs(Y)) - 0.82 * R
        elif name == "triangle":
            up = Y - 0.14 * R
            d = np.maximum(0.8660254 * np.abs(X) - 0.5 * up, up) - 0.58 * R
        elif name == "star":
            # Five-fold symmetry: fold onto one half point and measure to its straight edge.
            half = np.float32(np.pi / 5)
            angle = np.abs((np.arctan2(X, -Y) + half) % (2 * half) - half)
            radius = np.hypot(X, Y)
            px, py = radius * np.cos(angle), radius * np.sin(angle)
            outer, inner = 1.08 * R, 0.5 * R
            ex, ey = inner * np.cos(half) - outer, inner * np.sin(half)
            d = ((px - outer) * ey - py * ex) / np.hypot(ex, ey)
        elif name == "ring":
            d = np.abs(np.hypot(X, Y) - 0.73 * R) - 0.25 * R
        else:
            w = 0.32 * R
            d = np.minimum(
                np.maximum(np.abs(X) - R, np.abs(Y) - w),
                np.maximum(np.abs(Y) - R, np.abs(X) - w),
            )
        out[rows] = d
    return out


def _layout(s, u):
    """Centres [n, 2, 2] (object, x and y) and radii [n, 2] in a frame of [-1, 1]; u [n, 6] in [-1, 1)."""
    n = len(s)
    centre, radius = np.zeros((n, 2, 2), np.float32), np.zeros((n, 2), np.float32)
    reach = np.where(s.size == 1, 0.38, 0.52)
    centre[:, 0, 0], centre[:, 0, 1] = (s.position % 3 - 1) * reach, (s.position // 3 - 1) * reach
    radius[:, 0] = np.where(s.size == 1, 0.52, 0.34)
    axis, sign = np.where(s.relation < 2, 0, 1), np.where(s.relation % 2 == 0, -1, 1)
    rows = np.flatnonzero(s.pair)
    centre[rows, 0] = 0
    centre[rows, 0, axis[rows]] = 0.42 * sign[rows]
    centre[rows, 1, axis[rows]] = -0.60 * sign[rows]
    # Objects may also move across the axis of the relation.
    centre[rows, 0, 1 - axis[rows]] = 0.20 * u[rows, 4]
    centre[rows, 1, 1 - axis[rows]] = 0.40 * u[rows, 5]
    radius[rows] = [0.47, 0.31]
    centre += 0.05 * u[:, :4].reshape(n, 2, 2)
    return centre, radius


def _rotate(x, y, angle):
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _render(s):
    n, u = len(s), 2 * s.looks - 1
    grid = ((np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE) * 2 - 1
    gx, gy = np.meshgrid(grid, grid)
    pixel = 2 / SIZE

    lean = 0.5 * u[:, 0, None, None]
    t = np.clip((gy + lean * gx) / 2.6 + 0.5, 0, 1)[..., None]
    top, bottom = _TOP[s.background][:, None, None], _BOTTOM[s.background][:, None, None]
    image = (top * (1 - t) + bottom * t) * (1 + 0.08 * u[:, 1, None, None, None])

    centre, radius = _layout(s, u[:, 2:8])
    radius *= 1 + 0.06 * u[:, 8:10]
    turn = 0.22 * u[:, 10:12]
    for j in range(2):
        rows = np.arange(n) if j == 0 else np.flatnonzero(s.pair)
        if not len(rows):
            continue
        r = radius[rows, j, None, None]
        dx, dy = gx - centre[rows, j, 0, None, None], gy - centre[rows, j, 1, None, None]
        angle = turn[rows, j, None, None]
        kind = s.kind[rows, j]
        shadow = _distance(kind, *_rotate(dx - 0.05, dy - 0.07, angle), r)
        image[rows] *= 1 - 0.34 * np.clip(0.5 - shadow / 0.16, 0, 1)[..., None]

        x, y = _rotate(dx, dy, angle)
        d = _distance(kind, x, y, r)
        # Light from the top left, and a darker rim that keeps pale objects apart from pale backgrounds.
        light = 1.02 - 0.16 * (dx + dy) / (1.4 * r)
        rim = 0.30 * np.clip(1 + d / (1.8 * pixel), 0, 1)
        if j == 0:
            texture = s.texture[:, None, None]
            f = np.float32(2 * np.pi / 0.36)
            stripes = np.clip(0.5 + 1.5 * np.sin(f * (x + y) * 0.7071), 0, 1)
            dots = np.clip(2.2 * (np.sin(f * x) * np.sin(f * y)) - 0.5, 0, 1)
            light = light * (1 - np.where(texture == 1, 0.50 * stripes, np.where(texture == 2, 0.55 * dots, 0)))
        colour = _RGB[s.colour[rows, j]] * (1 + 0.05 * u[rows, 12 + 2 * j, None])
        alpha = np.clip(0.5 - d / pixel, 0, 1)[..., None]
        image[rows] = image[rows] * (1 - alpha) + (colour[:, None, None] * (light * (1 - rim))[..., None]) * alpha
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
