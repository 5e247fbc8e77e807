"""Questions about the objects that a view shows, as rows of numbers: which relation, of which objects, and the answer.

Each frame's rows depend on that frame alone, so that a clip's views may be chosen afterwards. S frames, P rows of each,
N objects, R relations.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.questions.relations import RELATIONS
from spatialprobe.engine.questions.views import look
from spatialprobe.probes.loading.sampling import generator

ROWS = 256  # P
# Asked from another position means from the first view's, which a probe always sees; the clip's last it seldom sees.
NAMES = tuple(relation.name.replace("_from_last", "_from_first") for relation in RELATIONS)
FROM_FIRST = np.array([name.endswith("_from_first") for name in NAMES])  # [R]
KINDS = tuple(
    "yes_or_no" if relation.kind == "qualitative" else "hour" if relation.unit == "h" else "length"
    for relation in RELATIONS
)
YES_OR_NO, LENGTH = (np.array([kind == asked for kind in KINDS]) for asked in ("yes_or_no", "length"))  # [R]


def relation_rows(
    table: ObjectTable,
    views: Sequence[int],  # [S], indices into the table's frames
    rows: int = ROWS,  # P
) -> Tensor:
    """The label `relations`, float32 [S, P, 4]: relation (-1: the row asks nothing), id, other id or 0, answer.

    Where a view has more questions than rows, relations have equally many as far as they go, with as many yes as no;
    which ones is drawn from the clip's id and the frame, whatever the objects' ids and their order in the table.
    Questions that the relations' own rules leave open are not asked.
    """
    order = np.lexsort(table.centre.T)
    values = measured(table, np.asarray(views))[:, :, order][..., order]  # [R, S, N, N]
    ids, out = table.ids[order], np.zeros((len(views), rows, 4), np.float32)
    out[..., 0] = -1
    for s, view in enumerate(views):
        draw = generator("relations", table.clip, int(table.frames[view])).random(values[:, s].shape)
        relation, first, second = chosen(values[:, s], draw, rows)
        answer = values[relation, s, first, second]
        answer = np.where(YES_OR_NO[relation], answer > 0, answer)
        other = np.where(first == second, 0, ids[second])
        out[s, : len(relation)] = np.stack([relation, ids[first], other, answer], -1)
    return torch.from_numpy(out)


def measured(table: ObjectTable, views: np.ndarray) -> np.ndarray:  # float64 [R, S, N, N]
    """Every relation of object i to object j in each view, of single objects at [i, i]; NaN where it is not asked."""
    seen, n = look(table, views, np.zeros_like(views)), len(table.ids)
    out = np.full((len(RELATIONS), len(views), n, n), np.nan)
    for values, relation in zip(out, RELATIONS, strict=True):
        found = relation.values(seen)
        if relation.arity == 1:
            np.einsum("sii->si", values)[:] = found
        else:
            values[:] = found
    out[np.ix_(FROM_FIRST, views == 0)] = np.nan  # from the first view's own position: the plain question
    return np.where(LENGTH[:, None, None, None] & ~(out > 0), np.nan, out)  # a length of 0 has no logarithm


def chosen(
    values: np.ndarray,  # [R, N, N]
    draw: np.ndarray,  # [R, N, N], uniform in 0 .. 1
    rows: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices into `values` of the questions taken: the least drawn of every relation and answer, then the next."""
    asked = np.nonzero(np.isfinite(values))
    at, relation = draw[asked], asked[0]
    group = 2 * relation + (YES_OR_NO[relation] & (values[asked] > 0))
    by_group = np.lexsort((at, group))
    starts = np.searchsorted(group[by_group], group[by_group])
    turn = np.empty(len(group), np.int64)
    turn[by_group] = np.arange(len(group)) - starts
    turn[~YES_OR_NO[relation]] //= 2  # two at a time, as a yes and a no are
    taken = np.lexsort((group, turn))[:rows]
    return tuple(x[taken] for x in asked)
