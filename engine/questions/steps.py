"""Candidates of questions that take several steps: another view's position, counting, choosing, shapes, standing in
the scene. Shapes and standing are seen from above, between the centres of boxes."""

from collections.abc import Callable

import numpy as np

from spatialprobe.engine.questions import relations
from spatialprobe.engine.questions.finding import Found, Material, at, pick, sets, tuples, words_of_pair
from spatialprobe.engine.questions.relations import centres_apart, nearer
from spatialprobe.engine.questions.views import Views

CAMERA_TURNED = 10.0  # degrees between two views, and from half a turn: where the side it turned to is clear
RADII = np.array((1.0, 1.5, 2.0, 2.5, 3.0))  # metres
MIDDLE = (0.25, 0.75)  # of the way between two objects: where a third is that is between them
OUTSIDE = 0.1  # of that way, beyond an end: where it certainly is not
ON_LINE, OFF_LINE = 0.15, 0.4  # of that way, sideways: up to where it is between them, from where it is not
ALIKE, UNLIKE = 1.15, 1.4  # longest side by shortest of a triangle: equilateral up to, certainly not from
FITS = 0.15  # of the width, by which a gap is larger or smaller than what is to fit
TURNED = 20.0  # degrees between straight ahead or behind and what is called left or right

# From where another view was taken


def moved(m: Material, found: Found) -> Found:
    """The candidates whose other view is another."""
    return Found(*(x[(m.views.views != m.views.others)[found.row]] for x in found))


def left_right_there(m: Material) -> Found:
    return moved(m, words_of_pair("left_of_from_last")(m))


def nearer_there(m: Material) -> Found:
    return moved(m, pick(m.relation("nearer_from_last"), m.views.there.far, 2))


def camera_moved(m: Material) -> Found:
    step = m.views.there.eye - m.views.here.eye
    gap = np.sqrt(step[:, 0] ** 2 + step[:, 1] ** 2 + step[:, 2] ** 2)[:, None]
    return at(gap > 0, np.zeros((1, 0), np.int64), gap)


def camera_turned(m: Material) -> Found:
    """Degrees to the right from this view to the other, seen from above; outcome 0: to the left."""
    angle = clockwise(m.views.here.direction[:, 3], m.views.there.direction[:, 3])[:, None]
    ok = (np.abs(angle) >= CAMERA_TURNED) & (np.abs(angle) <= 180 - CAMERA_TURNED)
    return at(ok, np.zeros((1, 0), np.int64), angle, (angle > 0).astype(np.int64))


def clockwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # [..., 2 or 3] -> [...]
    """Degrees from direction a to direction b, seen from above."""
    cross = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return -np.degrees(np.arctan2(cross, a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1]))


# Counting and choosing


def count(name: str, value: Callable[[Views], np.ndarray]) -> Callable[[Material], Found]:
    """How many of three objects have a relation to a fourth, the last of `things`; all four numbers are the value's."""

    def find(m: Material) -> Found:
        order = m.relation(name)
        things = tuples(order.shape[1], 4)
        against = order[:, things[:, :3], things[:, 3:]]  # [R, T, 3]
        return at(np.isfinite(against).all(2), things, value(m.views)[:, things], (against > 0).sum(2))

    return find


def count_within(m: Material) -> Found:
    """How many of three objects are within a radius of a fourth; the value is the radius and the three distances."""
    distance = m.relation("distance")
    things = tuples(distance.shape[1], 4)
    to = distance[:, things[:, :3], things[:, 3:]]  # [R, T, 3]
    radius = RADII[np.arange(len(things)) % len(RADII)][:, None]
    clear = np.abs(relations.logarithm(to / radius)) >= np.log1p(relations.FARTHER)
    value = np.concatenate([np.broadcast_to(radius, (*to.shape[:2], 1)), to], 2)
    return at(clear.all(2), things, value, (to < radius).sum(2))


def nearest_to(m: Material) -> Found:
    """Of three objects the one nearest to (outcome 0) or farthest from (1) a fourth, the last of `things`."""
    things = tuples(m.views.seen.shape[1], 4)
    known = (m.views.seen & m.views.complete.all(2))[:, things].all(2)
    to = centres_apart(m.views)[:, things[:, :3], things[:, 3:]]
    order = nearer(np.where(known[..., None], to, np.nan))[:, :, 0, 1:]
    first, last = (order > 0).all(2), (order < 0).all(2)
    return at(first | last, things, to, last.astype(np.int64))


def in_order(m: Material) -> Found:
    """Three objects from the nearest to the camera to the farthest."""
    order = m.relation("nearer")
    things = tuples(order.shape[1], 3)
    ok = (order[:, things[:, 0], things[:, 1]] > 0) & (order[:, things[:, 1], things[:, 2]] > 0)
    return at(ok, things, m.views.nearest[:, things])


# Shapes


def between(m: Material) -> Found:
    """Whether the first is between the two others (outcome 0) or clearly not (1): how far along, how far aside."""
    things, ok, xy = m.triples
    line, to = xy[:, :, 2] - xy[:, :, 1], xy[:, :, 0] - xy[:, :, 1]
    square = np.maximum(line[..., 0] ** 2 + line[..., 1] ** 2, 1e-12)
    along = (line[..., 0] * to[..., 0] + line[..., 1] * to[..., 1]) / square
    aside = np.abs(line[..., 0] * to[..., 1] - line[..., 1] * to[..., 0]) / square
    yes = (along >= MIDDLE[0]) & (along <= MIDDLE[1]) & (aside <= ON_LINE)
    no = (along <= -OUTSIDE) | (along >= 1 + OUTSIDE) | (aside >= OFF_LINE)
    return at(ok & (yes | no), things, np.stack([along, aside], 2), no.astype(np.int64))


def equilateral(m: Material) -> Found:
    """Whether three objects make a triangle of nearly equal sides (outcome 0), or clearly not; its three sides."""
    things = sets(m.views.seen.shape[1], 3)
    ok, xy = m.flat[:, things].all(2), m.views.centre[:, things, :2]
    step = xy - xy[:, :, [1, 2, 0]]
    sides = np.hypot(step[..., 0], step[..., 1])
    ratio = sides.max(2) / np.maximum(sides.min(2), 1e-12)
    decided = (ratio <= ALIKE) | (ratio >= UNLIKE)
    return at(ok & decided, things, sides, (ratio > ALIKE).astype(np.int64))


def fits_between(m: Material) -> Found:
    """Whether the first's width is smaller than the gap between the two others (outcome 0): the width and the gap."""
    things, ok, _ = m.triples
    width, gap = m.views.extent[:, things[:, 0], 1], gaps(m.views)[:, things[:, 1], things[:, 2]]
    yes, no = gap >= width * (1 + FITS), (gap <= width / (1 + FITS)) & (gap > 0)
    ok = ok & (yes | no) & (things[:, 1] < things[:, 2])
    return at(ok, things, np.stack([width, gap], 2), no.astype(np.int64))


def gaps(views: Views) -> np.ndarray:  # [R, N, N]
    """Between boxes seen from above; 0 where they overlap."""
    x, y = views.half[:, :, 0, :2], views.half[:, :, 1, :2]  # [R, N, 2]
    corners = views.centre[:, :, None, :2] + np.stack([-x - y, x - y, x + y, y - x], 2)  # [R, N, 4, 2]
    to = corners[:, None] - views.centre[:, :, None, None, :2]  # of j from the centre of i: [R, i, j, 4, 2]
    apart, beyond = None, 0.0
    for axis, reach in ((x, views.extent[..., 0] / 2), (y, views.extent[..., 1] / 2)):
        unit = (axis / np.maximum(reach, 1e-12)[..., None])[:, :, None, None]
        local, reach = to[..., 0] * unit[..., 0] + to[..., 1] * unit[..., 1], reach[:, :, None]
        gap = np.maximum(local.min(3), -local.max(3)) - reach  # along an axis of i; > 0: the boxes are apart
        apart = gap if apart is None else np.maximum(apart, gap)
        beyond = beyond + np.maximum(np.abs(local) - reach[..., None], 0) ** 2
    corner = np.sqrt(beyond.min(3))  # the nearest corner of j to the box of i
    apart, corner = np.maximum(apart, apart.swapaxes(1, 2)), np.minimum(corner, corner.swapaxes(1, 2))
    return np.where(apart > 0, corner, 0.0)


# Standing in the scene


def facing(m: Material) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triples [T, 3] (where one stands, what one faces, what is asked about), which are clear [R, T], and the angle
    [R, T] in degrees from facing the second to facing the third, clockwise seen from above."""
    things, ok, xy = m.triples
    ahead, to = xy[:, :, 1] - xy[:, :, 0], xy[:, :, 2] - xy[:, :, 0]
    half = m.views.extent[:, things, 0] / 2
    clear = (np.hypot(ahead[..., 0], ahead[..., 1]) >= half[..., :2].max(2)) & (
        np.hypot(to[..., 0], to[..., 1]) >= half[..., ::2].max(2)
    )
    return things, ok & clear, clockwise(ahead, to)


def facing_side(m: Material) -> Found:
    things, ok, angle = facing(m)
    ok &= (np.abs(angle) >= TURNED) & (np.abs(angle) <= 180 - TURNED)
    return at(ok, things, angle, (angle > 0).astype(np.int64))


def facing_turn(m: Material) -> Found:
    things, ok, angle = facing(m)
    return at(ok & (np.abs(angle) >= TURNED), things, np.abs(angle))


def facing_clock(m: Material) -> Found:
    """Not of a third thing that lies where the second does, at 12 o'clock: the question says that already."""
    things, ok, angle = facing(m)
    hours = angle / 30 % 12
    return at(ok & (np.abs(angle) > 15) & (np.abs(hours % 1 - 0.5) >= relations.HOUR), things, hours)


def path_length(m: Material) -> Found:
    """From the first object past the second to the third."""
    things, ok, xy = m.triples
    step = xy[:, :, 1:] - xy[:, :, :-1]
    return at(ok & (things[:, 0] < things[:, 2]), things, np.hypot(step[..., 0], step[..., 1]).sum(2))
