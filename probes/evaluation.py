"""One pass over clips for any number of probes: their loss and their task's metrics."""

from collections.abc import Callable, Iterable, Sequence

import torch

from spatialprobe.probes.loading.batches import Batch
from spatialprobe.probes.training import Trainee, autocast, features_of, project, targets_of, task_loss


@torch.no_grad()
def evaluate_all(
    trainees: Sequence[Trainee],
    batches: Iterable[Batch],
    *,
    loss: bool = True,
    metrics: bool = True,
    progress: Callable[[int], object] = lambda batches: None,
) -> list[dict[str, float]]:
    """Each probe's "loss", the mean over clips, and its task's metrics, or what of them is asked for.

    A metric may work on its clips in threads of its own while the next batch runs (grouping does).
    """
    scores = [t.probe.task.metrics(t.config, t.probe.facts) if metrics else None for t in trainees]
    totals, clips = [0.0] * len(trainees), 0
    for trainee in trainees:
        trainee.probe.eval()
    for number, batch in enumerate(batches):
        device = batch.frames.device
        with autocast(device):
            projected = project([t.probe for t in trainees], features_of(batch, trainees))
        of_each = zip(trainees, projected, targets_of(batch, trainees), strict=True)
        for i, (trainee, x, targets) in enumerate(of_each):
            with autocast(device):
                outputs = {name: y.float() for name, y in trainee.probe.read(x, targets).items()}
            if loss:
                generator = torch.Generator(device).manual_seed(number)  # every evaluation samples alike
                totals[i] += float(task_loss(trainee.probe, outputs, targets, generator)["loss"]) * len(batch.ids)
            if scores[i] is not None:
                scores[i].update(outputs, targets)
        clips += len(batch.ids)
        progress(1)
    for trainee in trainees:
        trainee.probe.train()
    if not clips:
        raise ValueError("an evaluation needs at least 1 clip, got none")
    found = [{} if score is None else score.result() for score in scores]
    losses = [{"loss": total / clips} if loss else {} for total in totals]
    return [of_loss | numbers for of_loss, numbers in zip(losses, found, strict=True)]
