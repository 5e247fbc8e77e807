"""What objects are called in a view: by their tag, and several of one tag by what sets each apart, or not at all.

A description never gives away an answer: each type of question says which attribute it asks about.
"""

from collections.abc import Sequence

import numpy as np

from spatialprobe.engine.questions.relations import BY_NAME, left_of, nearer
from spatialprobe.engine.questions.views import Views

ATTRIBUTES = ("side", "distance", "height")  # that descriptions use, the first that decides
NOUNS = {  # of tags that no one says
    "otherfurniture": "piece of furniture",
    "otherprop": "object",
    "otherstructure": "structure",
}
SINGULAR = ("ss", "us", "is", "as")  # endings in s of one thing: mattress, bus, chassis, canvas


def noun(tag: str) -> str:
    """Of one object, also where its tag is a plural: "set of kitchen cabinets"."""
    word = NOUNS.get(tag) or " ".join(tag.replace("_", " ").split())
    return f"set of {word}" if word.endswith("s") and not word.endswith(SINGULAR) else word


class Named:
    """What the objects are called in each of R views, for questions about each attribute ("": about none of them)."""

    def __init__(self, views: Views, tags: Sequence[Sequence[str]]):  # of the objects of each clip
        shape = views.seen.shape
        self.called: dict[str, list[list[str | None]]] = {}  # attribute -> [R][N]; None: not to be named
        self.known = {attribute: np.zeros(shape, bool) for attribute in ("", *ATTRIBUTES)}  # [R, N]
        self.lacking: set[str] = set()  # attributes without which some object has no name
        nouns = [[noun(tag) for tag in of_clip] for of_clip in tags]
        plain = [[f"the {word}" for word in words] + [None] * (shape[1] - len(words)) for words in nouns]
        for attribute, known in self.known.items():
            self.called[attribute] = [plain[c] for c in views.clip.tolist()]
            known[:] = np.array([[name is not None for name in row] for row in plain], bool)[views.clip]
        orders: dict[str, np.ndarray] = {}
        for c, words in enumerate(nouns):
            if len(set(words)) == len(words):
                continue
            orders = orders or {
                "side": left_of(views.here),
                "distance": nearer(views.nearest),
                "height": BY_NAME["taller"].of(views),
            }
            for word in dict.fromkeys(word for word in words if words.count(word) > 1):
                group = np.array([i for i, other in enumerate(words) if other == word])
                self.tell_apart(word, group, np.flatnonzero(views.clip == c), orders, views)

    def tell_apart(
        self, word: str, group: np.ndarray, rows: np.ndarray, orders: dict[str, np.ndarray], views: Views
    ) -> None:
        """Renames objects that share a word, in views that show several of them."""
        at = np.ix_(rows, group)
        there = views.visible[at]
        count = there.sum(1)
        ends = {}  # attribute -> which object of the group is before all others that the view shows, and which after
        for attribute, order in orders.items():
            order, among = order[np.ix_(rows, group, group)], there & views.complete[at][..., 2]
            both = (among if attribute == "height" else there)[:, None]
            first, last = ((((order * sign) > 0) & both).sum(2) == count[:, None] - 1 for sign in (1, -1))
            usable = there & (among | (attribute != "height"))
            ends[attribute] = (first & usable).tolist(), (last & usable).tolist()
        for s, shown in enumerate(count.tolist()):
            if shown < 2:
                continue
            words, row = phrases(word, shown), int(rows[s])
            for avoided, called in self.called.items():
                called[row] = called[row].copy()
                for k, i in enumerate(group.tolist()):
                    ways = [
                        words[a][0] if ends[a][0][s][k] else words[a][1]
                        for a in ATTRIBUTES
                        if a != avoided and (ends[a][0][s][k] or ends[a][1][s][k])
                    ]
                    called[row][i] = ways[0] if ways else None
                    if not ways:
                        self.known[avoided][row, i] = False
                        self.lacking.add(avoided)

    def names(self, leak: str, row: int, things: list[int]) -> list[str]:
        called = self.called[leak][row]
        return [called[i] for i in things]


def phrases(word: str, shown: int) -> dict[str, tuple[str, str]]:
    """For each attribute the object that comes first, and the one that comes last."""
    tall = ("taller", "shorter") if shown == 2 else ("tallest", "shortest")
    return {
        "side": (f"the leftmost {word}", f"the rightmost {word}"),
        "distance": (f"the {word} nearest to the camera", f"the {word} farthest from the camera"),
        "height": (f"the {tall[0]} {word}", f"the {tall[1]} {word}"),
    }
