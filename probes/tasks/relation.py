"""Relations between objects: is the chair left of the table from this camera, which is taller, how far apart are they?

The protocol is ours, not published: the trunk is that of the study's tagging probe, the head pools its patches over
each object's mask. What is asked, and the answers, are the labels' (`relations` of probes.labels), for each sampled
view alone. B clips, S views, H x W pixels of the masks, P questions of a view, M objects, R relations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spatialprobe.engine.questions.relations import RELATIONS
from spatialprobe.probes.heads.pair_reader import PairReader
from spatialprobe.probes.labels import Labels
from spatialprobe.probes.labels.relations import KINDS, NAMES
from spatialprobe.probes.metrics.relation import RADIANS, Asked, RelationMetrics, chosen_scores
from spatialprobe.probes.task import ProbeConfig, ProbeTask

OPTIONS = {
    "hidden": 256,  # width of the head
    "head_dropout": 0.1,
    "beta": 0.1,  # error of a length's logarithm from which on the loss grows linearly
}
SPREADS = (0.1, 10.0)  # bounds of the spread of a length's logarithm


@dataclass(frozen=True)
class RelationFacts:
    """What is asked, and where the answers of the training clips lie. Tuples have an entry per relation."""

    names: tuple[str, ...]
    levels: tuple[int, ...]
    kinds: tuple[str, ...]  # as `metrics.relation.Kind`
    means: tuple[float, ...]  # of a length's logarithm; 0 of other kinds
    spreads: tuple[float, ...]  # its standard deviation, within SPREADS; 1 of other kinds

    @property
    def asked(self) -> tuple[Asked, ...]:
        return tuple(Asked(*one) for one in zip(self.names, self.levels, self.kinds, strict=True))


def relation_facts(labels: Labels, ids: Sequence[str], config: ProbeConfig) -> RelationFacts:
    """From the first views of the training clips, which every epoch shows.

    Raises ValueError for options out of range, for labels of other relations than are known here, and if no first view
    has a question.
    """
    options = config.options
    if options["hidden"] < 1 or not 0 <= options["head_dropout"] < 1 or not options["beta"] > 0:
        got = f"{options['hidden']}, {options['head_dropout']} and {options['beta']}"
        raise ValueError(f"hidden must be at least 1, head_dropout in [0, 1) and beta positive, got {got}")
    if tuple(labels.relation_names) != NAMES:
        raise ValueError(f"labels in {labels.root} ask other relations than the {len(NAMES)} that are known here")
    rows = torch.cat([labels.read(clip_id, [0], ("relations",))["relations"][0] for clip_id in ids])
    if not (rows[:, 0] >= 0).any():
        raise ValueError(
            f"relations have nothing to learn: the first views of {len(ids)} training clips of {labels.root} show no "
            "object that is asked about"
        )
    means, spreads = [], []
    for index, kind in enumerate(KINDS):
        answers = rows[rows[:, 0] == index, 3].double()
        logs = answers.log() if kind == "length" else answers[:0]
        means.append(float(logs.mean()) if len(logs) else 0.0)
        spreads.append(float(logs.std().clamp(*SPREADS)) if len(logs) > 1 else 1.0)
    levels = tuple(relation.level for relation in RELATIONS)
    return RelationFacts(NAMES, levels, KINDS, tuple(means), tuple(spreads))


def relation_head(width: int, config: ProbeConfig, facts: RelationFacts) -> PairReader:
    return PairReader(
        width,
        len(facts.names),
        hidden=config.options["hidden"],
        dropout=config.options["head_dropout"],
        centre=torch.tensor(facts.means),
        scale=torch.tensor(facts.spreads),
    )


# -- what is asked ----------------------------------------------------------------------------------------------------


def relation_targets(labels: dict[str, Tensor], config: ProbeConfig, facts: RelationFacts) -> dict[str, Tensor]:
    """What is asked, with the objects of a clip that are asked about numbered 1 .. M, and the answers.

    masks int64 [B, S, H, W], 0 where there is no such object; objects bool [B, S, M], which of them a view shows; pairs
    int64 [B, S, P, 2], 0 for none; relation int64 [B, S, P], -1 in rows that ask nothing; answer float32 [B, S, P].
    """
    rows = labels["relations"]
    relation, answer = rows[..., 0].long(), rows[..., 3]
    pairs, masks, count = numbered(rows[..., 1:3].long(), labels["instance_masks"])
    batch, views = relation.shape[:2]
    view = torch.arange(batch * views, device=rows.device).view(batch, views, 1, 1)
    pixels = torch.bincount((view * (count + 1) + masks).flatten(), minlength=batch * views * (count + 1))
    return {
        "masks": masks,
        "objects": pixels.view(batch, views, count + 1)[..., 1:] > 0,
        "pairs": pairs,
        "relation": relation,
        "answer": answer,
    }


def numbered(
    pairs: Tensor,  # int64 [B, S, P, 2] ids, 0 is none
    masks: Tensor,  # int [B, S, H, W] ids, 0 is none
) -> tuple[Tensor, Tensor, int]:
    """Both with the ids in each clip's pairs replaced by 1, 2, ... and others by 0; M: the largest number, or 1."""
    largest = int(torch.stack([pairs.max(), masks.max()]).max())
    numbers = torch.zeros(len(pairs), largest + 1, dtype=torch.int64, device=pairs.device)
    numbers.scatter_(1, pairs.flatten(1), 1)
    numbers[:, 0] = 0
    numbers *= numbers.cumsum(1)
    renamed = (numbers.gather(1, x.flatten(1).long()).view(x.shape) for x in (pairs, masks))
    return *renamed, max(1, int(numbers.max()))


# -- loss -------------------------------------------------------------------------------------------------------------


def relation_loss(
    outputs: dict[str, Tensor], targets: dict[str, Tensor], config: ProbeConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Mean over all questions of the batch, of each kind its own: logistic loss of yes or no, smooth L1 loss (Huber's
    divided by `beta`) of a length's logarithm, half the squared distance from the unit vector that points to an hour.

    A relation's yes and no are asked equally often, the other way round, and so count alike. A batch that asks nothing
    has loss 0 and gradient 0. Nothing in it is random.
    """
    scores, asked = chosen_scores(outputs, targets)
    if not len(scores):
        return {"loss": 0 * outputs["scores"].sum()}
    relation, answer = targets["relation"][asked], targets["answer"][asked]
    first = scores[:, 0]
    yes_or_no, length = (of_kind(kind, relation) for kind in ("yes_or_no", "length"))
    logistic = F.binary_cross_entropy_with_logits(first, (answer > 0.5).float(), reduction="none")
    logs = torch.where(length, answer, 1).log()
    far_off = F.smooth_l1_loss(first, logs, reduction="none", beta=config.options["beta"])
    angle = answer * RADIANS
    turned = ((scores - torch.stack([angle.sin(), angle.cos()], -1)) ** 2).sum(-1) / 2
    each = torch.where(yes_or_no, logistic, torch.where(length, far_off, turned))
    return {"loss": each.mean()}


def of_kind(kind: str, relation: Tensor) -> Tensor:  # int64 [K] -> bool [K]
    return torch.tensor([there == kind for there in KINDS], device=relation.device)[relation]


RELATION = ProbeTask(
    name="relation",
    labels=("relations", "instance_masks"),
    defaults=ProbeConfig(
        embed=512, depth=2, dropout=0.1, lr=3e-4, weight_decay=0.05, warmup=2, epochs=20, batch=8, views=8,
        options=OPTIONS,
    ),
    score="loss",
    higher_is_better=True,
    facts=relation_facts,
    head=relation_head,
    targets=relation_targets,
    loss=relation_loss,
    metrics=lambda config, facts: RelationMetrics(facts.asked),
    shown="balanced_accuracy",
    facts_type=RelationFacts,
    told=("masks", "objects", "pairs"),
)  # fmt: skip
