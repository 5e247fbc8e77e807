"""What stands in a demo room: each kind of object as boxes with procedural finishes, drawn from a random generator.

It knows nothing of rooms or cameras. The proportions are plausible, not measured from real furniture.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spatialprobe.engine.demo.patterns import Colour, Finish, mix


@dataclass(frozen=True)
class Part:
    """One box, upright and turned about the vertical. In an object's own frame until the object is placed."""

    centre: tuple[float, float, float]  # metres
    size: tuple[float, float, float]  # metres, full extents along its own x, y, z
    yaw: float  # radians, counter-clockwise seen from above
    finish: Finish


WOODS = ((0.66, 0.47, 0.31), (0.52, 0.36, 0.24), (0.78, 0.62, 0.44), (0.40, 0.28, 0.20))
FABRICS = ((0.35, 0.47, 0.56), (0.64, 0.42, 0.34), (0.48, 0.54, 0.42), (0.60, 0.57, 0.52), (0.72, 0.58, 0.36))
BOOKS = ((0.62, 0.24, 0.20), (0.20, 0.34, 0.48), (0.30, 0.44, 0.32), (0.82, 0.72, 0.50), (0.45, 0.30, 0.45))
WHITE, STEEL, DARK = (0.93, 0.92, 0.90), (0.70, 0.72, 0.74), (0.17, 0.17, 0.19)


def finish(
    rng: np.random.Generator, pattern: str, colour: Colour, contrast: float = 0.2, period: float = 0.1, glow: float = 0
) -> Finish:
    """A finish of `colour` whose pattern darkens it by up to `contrast`."""
    offset = tuple(float(x) for x in rng.uniform(-5, 5, 2))
    return Finish(pattern, (colour, mix(colour, (0.0, 0.0, 0.0), contrast)), period, offset, glow)


def wood(rng: np.random.Generator) -> Finish:
    return finish(rng, "wood", WOODS[rng.integers(len(WOODS))], 0.28, 0.07)


def fabric(rng: np.random.Generator) -> Finish:
    pattern = ("stripes", "checker", "noise")[rng.integers(3)]
    return finish(rng, pattern, FABRICS[rng.integers(len(FABRICS))], 0.22, 0.16)


def plain(rng: np.random.Generator, colour: Colour, glow: float = 0) -> Finish:
    return finish(rng, "plain", colour, 0.06, 0.4, glow)


def box(x: float, y: float, z: float, width: float, depth: float, height: float, look: Finish) -> Part:
    """A part that stands at height `z`, centred on (x, y)."""
    return Part((x, y, z + height / 2), (width, depth, height), 0.0, look)


def legs(width: float, depth: float, height: float, side: float, look: Finish) -> list[Part]:
    xs, ys = (width - side) / 2, (depth - side) / 2
    return [box(sx * xs, sy * ys, 0, side, side, height, look) for sx in (-1, 1) for sy in (-1, 1)]


# Every builder below returns parts that stand on z = 0, with the back towards +y and the front towards -y.


def build_table(rng: np.random.Generator, height: float = 0.74) -> list[Part]:
    w, d, look = rng.uniform(1.0, 1.35), rng.uniform(0.62, 0.8), wood(rng)
    return [*legs(w - 0.06, d - 0.06, height - 0.04, 0.06, look), box(0, 0, height - 0.04, w, d, 0.04, look)]


def build_coffee_table(rng: np.random.Generator) -> list[Part]:
    top, *_ = reversed(build_table(rng, 0.42))
    w, d, _ = top.size
    return [*legs(w - 0.06, d - 0.06, 0.38, 0.06, top.finish), box(0, 0, 0.14, w - 0.1, d - 0.1, 0.02, top.finish), top]


def build_chair(rng: np.random.Generator) -> list[Part]:
    frame, seat = wood(rng), fabric(rng)
    posts = [box(sx * 0.19, 0.2, 0.45, 0.04, 0.04, 0.45, frame) for sx in (-1, 1)]
    rails = [box(0, 0.2, z, 0.34, 0.025, 0.09, frame) for z in (0.58, 0.78)]
    return [*legs(0.42, 0.44, 0.42, 0.04, frame), box(0, 0, 0.42, 0.44, 0.46, 0.05, seat), *posts, *rails]


def build_sofa(rng: np.random.Generator) -> list[Part]:
    w, seats, cloth, feet = rng.uniform(1.6, 2.0), int(rng.integers(2, 4)), fabric(rng), plain(rng, DARK)
    pillow = finish(rng, "stripes", FABRICS[rng.integers(len(FABRICS))], 0.35, 0.09)
    each = (w - 0.36) / seats
    cushions = [box((i - (seats - 1) / 2) * each, -0.06, 0.34, each - 0.02, 0.66, 0.12, cloth) for i in range(seats)]
    arms = [box(sx * (w - 0.18) / 2, 0, 0.08, 0.18, 0.85, 0.54, cloth) for sx in (-1, 1)]
    back = box(0, 0.33, 0.34, w - 0.36, 0.18, 0.48, cloth)
    soft = [box(sx * (w / 2 - 0.42), 0.18, 0.46, 0.38, 0.12, 0.3, pillow) for sx in (-1, 1)]
    return [
        *legs(w, 0.8, 0.08, 0.07, feet),
        box(0, 0, 0.08, w - 0.36, 0.84, 0.26, cloth),
        *arms,
        back,
        *cushions,
        *soft,
    ]


def build_bed(rng: np.random.Generator) -> list[Part]:
    w, frame, linen, cover = rng.uniform(1.3, 1.6), wood(rng), plain(rng, WHITE), fabric(rng)
    pillows = [box(sx * w / 4, 0.72, 0.5, w / 2 - 0.14, 0.36, 0.12, linen) for sx in (-1, 1)]
    board = box(0, 1.0, 0.0, w, 0.05, 0.98, frame)
    base = box(0, 0, 0.08, w, 1.96, 0.22, frame)
    blanket = [box(0, -0.28, 0.3, w + 0.02, 1.42, 0.23, cover), box(0, 0.36, 0.5, w + 0.02, 0.16, 0.04, linen)]
    return [
        *legs(w, 1.9, 0.08, 0.08, frame),
        base,
        box(0, 0, 0.3, w - 0.04, 1.94, 0.2, linen),
        board,
        *pillows,
        *blanket,
    ]


def fronts(width: float, y: float, z: float, height: float, columns: int, rows: int, look: Finish) -> list[Part]:
    """Drawer or door fronts with knobs, 2 cm proud of the plane y (which faces -y)."""
    w, h, knob = width / columns, height / rows, Finish("plain", (STEEL, STEEL))
    parts = []
    for column in range(columns):
        x = (column - (columns - 1) / 2) * w
        inner = 0.36 * w * (0 if columns == 1 else 1 if column < columns / 2 else -1)  # knobs meet where doors meet
        for row in range(rows):
            parts.append(box(x, y - 0.01, z + row * h + 0.012, w - 0.024, 0.02, h - 0.024, look))
            parts.append(box(x + inner, y - 0.03, z + (row + 0.55) * h, 0.035, 0.02, 0.035, knob))
    return parts


def build_nightstand(rng: np.random.Generator) -> list[Part]:
    body = wood(rng)
    return [box(0, 0, 0, 0.46, 0.4, 0.52, body), *fronts(0.44, -0.2, 0.06, 0.44, 1, 2, wood(rng))]


def build_wardrobe(rng: np.random.Generator) -> list[Part]:
    w, body = rng.uniform(0.9, 1.2), wood(rng)
    return [box(0, 0, 0, w, 0.56, 1.96, body), *fronts(w - 0.04, -0.28, 0.08, 1.84, 2, 1, body)]


def build_sideboard(rng: np.random.Generator) -> list[Part]:
    w, body = rng.uniform(1.0, 1.3), wood(rng)
    lid = box(0, 0, 0.72, w + 0.04, 0.46, 0.03, body)
    return [box(0, 0, 0.06, w, 0.42, 0.66, body), lid, *fronts(w - 0.04, -0.21, 0.1, 0.6, 3, 1, wood(rng))]


def build_bookshelf(rng: np.random.Generator) -> list[Part]:
    w, frame = rng.uniform(0.8, 1.0), wood(rng)
    sides = [box(sx * (w - 0.03) / 2, 0, 0, 0.03, 0.28, 1.8, frame) for sx in (-1, 1)]
    parts = [*sides, box(0, 0.13, 0, w - 0.06, 0.02, 1.8, frame)]
    for z in (0.05, 0.48, 0.91, 1.34, 1.77):
        parts.append(box(0, -0.01, z, w - 0.06, 0.26, 0.03, frame))
    for z in (0.08, 0.51, 0.94, 1.37):
        x = -w / 2 + 0.05
        while x < w / 2 - 0.2 and rng.random() < 0.92:  # rows of equal books, with a gap at the end now and then
            wide, tall = rng.uniform(0.1, 0.22), rng.uniform(0.22, 0.34)
            wide = min(wide, w / 2 - 0.05 - x)
            spines = finish(rng, "stripes", BOOKS[rng.integers(len(BOOKS))], 0.3, 0.05)
            parts.append(box(x + wide / 2, 0.02, z, wide - 0.01, 0.18, tall, spines))
            x += wide
    return parts


def build_desk(rng: np.random.Generator) -> list[Part]:
    w, look = rng.uniform(1.15, 1.4), wood(rng)
    drawers = [box(w / 2 - 0.24, 0, 0, 0.4, 0.56, 0.7, look)]
    drawers += [
        Part((p.centre[0] + w / 2 - 0.24, *p.centre[1:]), p.size, 0.0, p.finish)
        for p in fronts(0.38, -0.28, 0.06, 0.62, 1, 3, wood(rng))
    ]
    side = box(-w / 2 + 0.05, 0, 0, 0.04, 0.56, 0.7, look)
    return [box(0, 0, 0.7, w, 0.64, 0.04, look), side, *drawers, box(0, 0.26, 0.35, w - 0.5, 0.02, 0.35, look)]


def build_lamp(rng: np.random.Generator) -> list[Part]:
    shade, metal = finish(rng, "stripes", (0.97, 0.90, 0.74), 0.08, 0.06, glow=0.85), plain(rng, DARK)
    return [
        box(0, 0, 0, 0.28, 0.28, 0.03, metal),
        box(0, 0, 0.03, 0.03, 0.03, 1.27, metal),
        box(0, 0, 1.25, 0.34, 0.34, 0.3, shade),
    ]


def build_picture(rng: np.random.Generator) -> list[Part]:
    w, h = rng.uniform(0.6, 1.0), rng.uniform(0.45, 0.65)
    sky, land = BOOKS[rng.integers(len(BOOKS))], FABRICS[rng.integers(len(FABRICS))]
    art = Finish("landscape", (mix(sky, WHITE, 0.45), land), 0.5, (float(rng.uniform(-5, 5)), 0.0))
    mount = box(0, -0.004, 0.03, w - 0.06, 0.03, h - 0.06, plain(rng, WHITE))
    return [box(0, 0, 0, w, 0.03, h, plain(rng, DARK)), mount, box(0, -0.01, 0.09, w - 0.18, 0.03, h - 0.18, art)]


def build_window(rng: np.random.Generator) -> list[Part]:
    w, h, frame = rng.uniform(1.0, 1.4), 1.2, plain(rng, WHITE)
    offset = (float(rng.uniform(-5, 5)), 0.0)
    view = Finish("landscape", ((0.62, 0.80, 0.96), (0.46, 0.62, 0.42)), 0.9, offset, glow=1.0)
    bars = [box(0, -0.01, 0, 0.05, 0.06, h, frame), box(0, -0.01, h / 2 - 0.025, w, 0.06, 0.05, frame)]
    edges = [box(sx * (w - 0.06) / 2, -0.01, 0, 0.06, 0.06, h, frame) for sx in (-1, 1)]
    ends = [box(0, -0.01, z, w, 0.06, 0.06, frame) for z in (0, h - 0.06)]
    return [
        box(0, 0, 0, w - 0.04, 0.03, h, view),
        *bars,
        *edges,
        *ends,
        box(0, -0.04, -0.04, w + 0.1, 0.12, 0.04, frame),
    ]


def build_door(rng: np.random.Generator) -> list[Part]:
    leaf, trim = wood(rng), plain(rng, WHITE)
    jambs = [box(sx * 0.47, 0, 0, 0.08, 0.07, 2.08, trim) for sx in (-1, 1)]
    panels = [box(0, -0.02, z, 0.6, 0.05, h, leaf) for z, h in ((0.2, 0.65), (1.05, 0.8))]
    handle = box(0.36, -0.05, 1.0, 0.12, 0.04, 0.03, plain(rng, STEEL))
    return [box(0, 0.01, 0, 0.86, 0.05, 2.0, leaf), *jambs, box(0, 0, 2.0, 1.02, 0.07, 0.08, trim), *panels, handle]


def build_drape(rng: np.random.Generator, width: float, height: float, cloth: Finish) -> list[Part]:
    """Cloth in folds under a rail, shared by curtains and shower curtains."""
    folds = int(width / 0.07)
    each = width / folds
    hung = [box((i + 0.5 - folds / 2) * each, 0.02 * (i % 2), 0.04, each, 0.04, height, cloth) for i in range(folds)]
    return [*hung, box(0, 0.01, height + 0.04, width + 0.06, 0.03, 0.03, plain(rng, STEEL))]


def build_curtain(rng: np.random.Generator) -> list[Part]:
    cloth = finish(rng, "noise", FABRICS[rng.integers(len(FABRICS))], 0.15, 0.3)
    return build_drape(rng, 0.42, 2.12, cloth)


def build_shower_curtain(rng: np.random.Generator) -> list[Part]:
    return build_drape(rng, 0.84, 1.9, finish(rng, "checker", (0.62, 0.80, 0.82), 0.2, 0.16))


def build_refrigerator(rng: np.random.Generator) -> list[Part]:
    skin, bar = plain(rng, ((0.86, 0.87, 0.88), STEEL)[rng.integers(2)]), plain(rng, DARK)
    doors = [box(0, -0.31, z, 0.64, 0.04, h, skin) for z, h in ((0.06, 0.6), (0.68, 1.08))]
    handles = [box(-0.27, -0.34, z, 0.03, 0.03, 0.36, bar) for z in (0.27, 0.78)]
    return [box(0, 0, 0, 0.66, 0.6, 1.78, skin), *doors, *handles]


def build_counter(rng: np.random.Generator) -> list[Part]:
    w = rng.uniform(1.5, 1.9)
    slab = finish(rng, "noise", (0.42, 0.42, 0.44), 0.35, 0.12)
    body = [
        box(0, 0.02, 0, w - 0.02, 0.54, 0.86, wood(rng)),
        *fronts(w - 0.06, -0.25, 0.1, 0.72, 4, 1, plain(rng, WHITE)),
    ]
    return [*body, box(0, 0, 0.86, w, 0.6, 0.04, slab)]


def build_sink(rng: np.random.Generator) -> list[Part]:
    white, metal = plain(rng, WHITE), plain(rng, STEEL)
    rim = [box(sx * 0.27, 0, 0.78, 0.06, 0.46, 0.1, white) for sx in (-1, 1)]
    rim += [box(0, y, 0.78, 0.6, d, 0.1, white) for y, d in ((-0.205, 0.05), (0.17, 0.12))]
    tap = [box(0, 0.17, 0.88, 0.03, 0.03, 0.16, metal), box(0, 0.09, 1.02, 0.03, 0.17, 0.025, metal)]
    cupboard = [box(0, 0.02, 0, 0.54, 0.38, 0.7, wood(rng)), *fronts(0.5, -0.17, 0.05, 0.62, 2, 1, white)]
    return [*cupboard, box(0, 0, 0.7, 0.6, 0.46, 0.08, white), *rim, *tap]


def build_toilet(rng: np.random.Generator) -> list[Part]:
    white = plain(rng, WHITE)
    bowl = [box(0, -0.1, 0, 0.26, 0.4, 0.24, white), box(0, -0.13, 0.24, 0.38, 0.5, 0.16, white)]
    lid = box(0, -0.12, 0.4, 0.37, 0.48, 0.03, finish(rng, "plain", (0.85, 0.85, 0.84), 0.05))
    return [
        *bowl,
        lid,
        box(0, 0.24, 0.24, 0.42, 0.2, 0.54, white),
        box(0, 0.24, 0.78, 0.1, 0.08, 0.02, plain(rng, STEEL)),
    ]


def build_bathtub(rng: np.random.Generator) -> list[Part]:
    white, inside = plain(rng, WHITE), plain(rng, (0.82, 0.88, 0.90))
    long = [box(0, sy * 0.33, 0, 1.6, 0.08, 0.56, white) for sy in (-1, 1)]
    ends = [box(sx * 0.75, 0, 0, 0.1, 0.58, 0.56, white) for sx in (-1, 1)]
    tap = box(0.75, 0, 0.56, 0.04, 0.1, 0.14, plain(rng, STEEL))
    return [box(0, 0, 0.0, 1.4, 0.58, 0.36, inside), *long, *ends, tap]


@dataclass(frozen=True)
class Kind:
    """A kind of object: its ScanNet20 tag, where it stands, and how it is built."""

    tag: str
    place: str  # "wall", "free", or relative to an anchor: "front", "beside", "around"
    build: Callable[[np.random.Generator], list[Part]]
    anchor: str = ""  # kind that must already stand in the room, for the relative places
    lift: float = 0.0  # metres from the floor to its lowest part
    stuck: bool = False  # fixed to the wall, without the gap that furniture keeps


KINDS = {
    "table": Kind("table", "free", build_table),
    "coffee table": Kind("table", "front", build_coffee_table, anchor="sofa"),
    "chair": Kind("chair", "free", build_chair),
    "table chair": Kind("chair", "around", build_chair, anchor="table"),
    "desk chair": Kind("chair", "front", build_chair, anchor="desk"),
    "sofa": Kind("sofa", "wall", build_sofa),
    "bed": Kind("bed", "wall", build_bed),
    "nightstand": Kind("cabinet", "beside", build_nightstand, anchor="bed"),
    "wardrobe": Kind("cabinet", "wall", build_wardrobe),
    "sideboard": Kind("cabinet", "wall", build_sideboard),
    "bookshelf": Kind("bookshelf", "wall", build_bookshelf),
    "desk": Kind("desk", "wall", build_desk),
    "lamp": Kind("otherfurniture", "wall", build_lamp),
    "picture": Kind("picture", "wall", build_picture, lift=1.42, stuck=True),
    "window": Kind("window", "wall", build_window, lift=0.98, stuck=True),
    "curtain": Kind("curtain", "beside", build_curtain, anchor="window", lift=0.12, stuck=True),
    "door": Kind("door", "wall", build_door, stuck=True),
    "refrigerator": Kind("refrigerator", "wall", build_refrigerator),
    "counter": Kind("counter", "wall", build_counter),
    "sink": Kind("sink", "wall", build_sink),
    "toilet": Kind("toilet", "wall", build_toilet),
    "bathtub": Kind("bathtub", "wall", build_bathtub),
    "shower curtain": Kind("shower curtain", "front", build_shower_curtain, anchor="bathtub", lift=0.1),
}

# Kinds of each room in the order they are placed: what the room is for comes first, what may be missing last.
ROOMS = {
    "living room": ("sofa", "coffee table", "bookshelf", "window", "curtain", "sideboard", "lamp", "picture", "chair"),
    "bedroom": ("bed", "nightstand", "wardrobe", "window", "curtain", "desk", "desk chair", "picture", "lamp"),
    "study": ("desk", "desk chair", "bookshelf", "bookshelf", "window", "sofa", "lamp", "picture", "door"),
    "kitchen": (
        "counter",
        "refrigerator",
        "table",
        "table chair",
        "table chair",
        "window",
        "sideboard",
        "picture",
        "door",
    ),
    "bathroom": ("bathtub", "shower curtain", "sink", "toilet", "window", "picture", "door"),
}
