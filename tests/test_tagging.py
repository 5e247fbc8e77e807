"""Tagging against slow float64 definitions, scikit-learn and torch's own decoder; and what it must and cannot learn."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score, f1_score
from study_layouts import write_scannet
from torch import nn

from spatialprobe.engine.demo.scenes import CLASS_NAMES_20, make_scene
from spatialprobe.probes.backbone import SPECIAL, Backbone, Tokens
from spatialprobe.probes.heads.tag_decoder import TagDecoder
from spatialprobe.probes.labels import Labels, ScanNetLabels
from spatialprobe.probes.metrics.tagging import (
    TaggingMetrics,
    average_precision,
    chance_precision,
    frequency_groups,
    tagging_scores,
)
from spatialprobe.probes.tasks.tagging import TAGGING, TagFacts, asymmetric_loss, read_text_embeddings

GRID = (2, 3)


def answers(clips, classes, seed=0, share=0.3):
    """Scores rounded so that many are equal, and which classes are there."""
    rng = torch.Generator().manual_seed(seed)
    scores = (torch.randn(clips, classes, generator=rng) * 3).round() / 2
    return scores, torch.rand(clips, classes, generator=rng) < share


def facts_of(classes, rates=None, text=None):
    return TagFacts(tuple(f"class {k}" for k in range(classes)), rates or (0.5,) * classes, text)


def small(**settings):
    """The task's defaults at a size for the CPU."""
    small_ones = {"embed": 16, "depth": 1, "heads": 2, "decoder_width": 32, "decoder_heads": 2, "dropout": 0.0}
    return TAGGING.defaults.with_settings(**{**small_ones, "decoder_dropout": 0.0, **settings})


# -- metrics --------------------------------------------------------------------------------------------------------


def slow_precision(scores, present):
    """Sum over thresholds, highest first, of (recall - recall before) * precision."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [p for s, p in zip(scores, present, strict=True) if s >= threshold]
        recall = sum(chosen) / sum(present)
        total, before = total + (recall - before) * sum(chosen) / len(chosen), recall
    return total


@pytest.mark.parametrize(("clips", "classes"), [(1, 1), (2, 3), (13, 5), (64, 20)])
def test_average_precision_is_the_stepwise_sum_and_scikit_learns(clips, classes):
    scores, present = answers(clips, classes, seed=clips)
    present[0, 0] = True
    got = average_precision(scores, present)
    assert got.dtype == torch.float64
    for k in range(classes):
        truth, column = present[:, k].tolist(), scores[:, k].tolist()
        if not any(truth):
            assert math.isnan(got[k])
            continue
        assert got[k].item() == pytest.approx(slow_precision(column, truth), abs=1e-12)
        assert got[k].item() == pytest.approx(average_precision_score(truth, column), abs=1e-12)


def test_average_precision_does_not_depend_on_the_order_of_clips():
    scores, present = answers(40, 6)
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        average_precision(scores, present), average_precision(scores[shuffle], present[shuffle]), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_chance_is_the_mean_over_all_orders(clips):
    for positives in range(1, clips + 1):
        orders = permutations([True] * positives + [False] * (clips - positives))
        mean = np.mean([slow_precision(range(clips), order) for order in orders])
        assert chance_precision(clips, torch.tensor([positives])).item() == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(
    ("classes", "sizes"), [(20, (6, 6, 8)), (200, (66, 66, 68)), (1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1))]
)
def test_classes_are_grouped_by_training_rate(classes, sizes):
    rates = torch.rand(classes, generator=torch.Generator().manual_seed(classes)).tolist()
    groups = frequency_groups(rates)
    ordered = sorted(range(classes), key=lambda k: -rates[k])
    head, mid = sizes[0], sizes[0] + sizes[1]
    assert {name: group.tolist() for name, group in groups.items()} == {
        "head": ordered[:head], "mid": ordered[head:mid], "tail": ordered[mid:],
    }  # fmt: skip


def test_equally_common_classes_stay_in_their_order():
    groups = frequency_groups([0.5, 0.9, 0.5, 0.5, 0.1, 0.5])
    assert [groups[name].tolist() for name in ("head", "mid", "tail")] == [[1, 0], [2, 3], [5, 4]]


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scikit_learns_over_the_classes_that_are_there(seed):
    scores, present = answers(30, 20, seed, share=0.1)
    present[:, [2, 7]] = False
    rates = torch.rand(20, generator=torch.Generator().manual_seed(seed)).tolist()
    got = tagging_scores(scores, present, rates, cut=0.5)
    there = [k for k in range(20) if present[:, k].any()]
    precision = {k: average_precision_score(present[:, k], scores[:, k]) for k in there}
    predicted = (scores >= 0.5).numpy()
    ordered = sorted(range(20), key=lambda k: -rates[k])
    expected = {
        "mAP": np.mean(list(precision.values())),
        "OF1": f1_score(present.numpy().ravel(), predicted.ravel()),
        "CF1": np.mean([f1_score(present[:, k], predicted[:, k], zero_division=0) for k in there]),
        "mAP_chance": np.mean([chance_precision(30, present[:, k].sum()).item() for k in there]),
        "classes_scored": len(there),
        "classes": 20,
    }
    for name, group in (("head", ordered[:6]), ("mid", ordered[6:12]), ("tail", ordered[12:])):
        expected[f"AP_{name}"] = np.mean([precision[k] for k in group if k in precision])
    expected["MidRatio"] = expected["AP_mid"] / expected["mAP"]
    assert len(there) <= 18
    assert got == pytest.approx(expected, abs=1e-12)


def test_a_group_without_any_class_is_not_a_number():
    present = torch.tensor([[True, False, False], [False, False, True]])
    got = tagging_scores(torch.rand(2, 3), present, [0.9, 0.5, 0.1], cut=0.5)
    assert math.isnan(got["AP_mid"])
    assert math.isnan(got["MidRatio"])
    assert got["classes_scored"] == 2


def test_metrics_are_of_all_batches_together():
    logits, present = answers(11, 4)
    metrics = TaggingMetrics([0.4, 0.3, 0.2, 0.1])
    for part in (slice(0, 4), slice(4, 5), slice(5, 11)):
        metrics.update({"logits": logits[part].clone().requires_grad_()}, {"present": present[part]})
    assert metrics.result() == tagging_scores(logits, present, metrics.rates, cut=0.0)


def test_what_cannot_be_scored_is_named():
    scores, present = answers(5, 3)
    with pytest.raises(ValueError, match=r"none of the 3 classes is there in any of 5 clips"):
        tagging_scores(scores, torch.zeros_like(present), [0.1] * 3, cut=0)
    with pytest.raises(ValueError, match=r"\[N, 4\] for 4 rates, got \[5, 3\]"):
        tagging_scores(scores, present, [0.1] * 4, cut=0)
    scores[2, 1] = math.nan
    with pytest.raises(ValueError, match="NaN for 1 of 5 clips"):
        tagging_scores(scores, present, [0.1] * 3, cut=0)
    with pytest.raises(ValueError, match="at least 1 clip, got none"):
        TaggingMetrics([0.1]).result()


# -- loss -----------------------------------------------------------------------------------------------------------


def slow_loss(logits, present, gamma_negative, gamma_positive, clip):
    total = 0.0
    for row, truth in zip(logits.tolist(), present.tolist(), strict=True):
        for x, there in zip(row, truth, strict=True):
            p = 1 / (1 + math.exp(-x))
            q = max(p - clip, 0)
            total -= (1 - p) ** gamma_positive * math.log(p) if there else q**gamma_negative * math.log(1 - q)
    return total / len(logits)


@pytest.mark.parametrize("clip", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(("negative", "positive"), [(4.0, 0.0), (0.0, 0.0), (2.5, 1.5)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_is_the_papers(negative, positive, clip, share):
    logits, present = answers(7, 5, share=share)
    got = asymmetric_loss(logits, present, gamma_negative=negative, gamma_positive=positive, clip=clip)
    assert got.item() == pytest.approx(slow_loss(logits, present, negative, positive, clip), rel=2e-6)
    if not (negative or positive or clip):
        assert got.item() == pytest.approx(F.binary_cross_entropy_with_logits(logits, present.float()).item() * 5)


def test_powers_weight_the_gradient_and_have_none():
    logits, present = answers(6, 4)
    logits.requires_grad_()
    asymmetric_loss(logits, present, gamma_negative=4, gamma_positive=1).backward()
    p = logits.detach().double().sigmoid()
    expected = torch.where(present, -(1 - p) * (1 - p), p**4 * p) / 6
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-5, atol=1e-9)


def test_hopeless_logits_keep_a_loss_and_a_gradient():
    logits = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = asymmetric_loss(logits, torch.tensor([[True, False]]))
    loss.backward()
    assert loss.item() == pytest.approx(400)
    assert logits.grad.tolist() == [[-1, 1]]


def test_the_tasks_loss_reads_its_options():
    logits, present = answers(5, 3)
    config = small(gamma_negative=1.0, gamma_positive=2.0, clip=0.1)
    got = TAGGING.loss({"logits": logits}, {"present": present}, config, torch.Generator())
    assert got["loss"].item() == pytest.approx(slow_loss(logits, present, 1.0, 2.0, 0.1), rel=2e-6)


# -- head -----------------------------------------------------------------------------------------------------------


def random_tokens(width, *, special, batch=2, views=3, seed=0):
    length = GRID[0] * GRID[1] + (SPECIAL if special else 0)
    rng = torch.Generator().manual_seed(seed)
    return Tokens([torch.randn(batch, views, length, width, generator=rng) for _ in range(2)], GRID)


def torchs_layer(layer, width, heads):
    """The same weights in torch's decoder layer."""
    other = nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True).double()
    state = {}
    for ours, theirs in (("among", "self_attn"), ("read", "multihead_attn")):
        attention = getattr(layer, ours)
        for part in ("weight", "bias"):
            both = torch.cat([getattr(attention.q, part), getattr(attention.kv, part)])
            state |= {f"{theirs}.in_proj_{part}": both, f"{theirs}.out_proj.{part}": getattr(attention.proj, part)}
    for ours, theirs in (("norm1", "norm1"), ("norm2", "norm2"), ("norm3", "norm3")):
        state |= {f"{theirs}.{part}": x for part, x in getattr(layer, ours).named_parameters()}
    for i, theirs in ((0, "linear1"), (3, "linear2")):
        state |= {f"{theirs}.{part}": x for part, x in layer.mlp[i].named_parameters()}
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize(("width", "tokens", "special"), [(8, 8, True), (12, 5, False)])
def test_head_is_torchs_decoder_with_a_score_per_class(width, tokens, special, embedded):
    torch.manual_seed(0)
    texts = torch.randn(7, 9, dtype=torch.float64) if embedded else None
    head = TagDecoder(tokens, 7, width=width, layers=2, heads=2, dropout=0.0, embeddings=texts).double()
    for p in head.parameters():  # norms and biases that start at 1 and 0 would hide what is wrong with them
        nn.init.normal_(p, std=0.5)
    read = random_tokens(tokens, special=special)
    read.pairs = [x.double() for x in read.pairs]
    memory = read.pairs[-1][:, :, SPECIAL if special else 0 :].reshape(2, -1, tokens)
    if width != tokens:
        memory = memory @ head.memory.weight.T + head.memory.bias
    x = (texts @ head.query.weight.T + head.query.bias) if embedded else head.queries
    x = x.expand(2, -1, -1)
    for layer in head.layers:
        x = torchs_layer(layer, width, 2)(x, memory)
    logits = head(read)["logits"]
    assert logits.shape == (2, 7)
    for b, k in product(range(2), range(7)):
        assert logits[b, k].item() == pytest.approx((x[b, k] @ head.weight[k] + head.bias[k]).item(), abs=1e-12)


@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_gradients_reach_every_parameter(tmp_path, texts, depth):
    path = tmp_path / "texts.npy"
    np.save(path, np.random.default_rng(0).normal(size=(5, 6)).astype(np.float16))
    config, facts = small(depth=depth), facts_of(5, text=read_text_embeddings(path, 5) if texts else None)
    backbone = Backbone(config.embed, config.depth, heads=config.heads)
    head = TAGGING.head(backbone.width, config, facts)
    outputs = head(backbone(torch.randn(4, 2, *GRID, config.embed)))
    TAGGING.loss(outputs, {"present": torch.rand(4, 5) < 0.5}, config, torch.Generator())["loss"].backward()
    assert sum(p.numel() for p in head.parameters()) > 0
    lost = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not lost


def test_dropout_acts_in_training_alone():
    head = TagDecoder(8, 3, width=8, heads=2, dropout=0.5)
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.5] * 4
    tokens = random_tokens(8, special=True)
    assert not torch.equal(head(tokens)["logits"], head(tokens)["logits"])
    head.eval()
    assert torch.equal(head(tokens)["logits"], head(tokens)["logits"])


def test_defaults_are_the_studys():
    head = TAGGING.head(1024, TAGGING.defaults, facts_of(20))
    assert head.queries.shape == head.weight.shape == (20, 512)
    assert [layer.among.heads for layer in head.layers] == [8, 8]
    assert head.layers[0].drop.p == 0.1
    with pytest.raises(ValueError, match="multiple of its heads, got 30 and 8"):
        TAGGING.head(16, TAGGING.defaults.with_settings(decoder_width=30), facts_of(2))
    with pytest.raises(ValueError, match=r"layers and classes of at least 1 and dropout in \[0, 1\), got 0, 2 and 0.1"):
        TAGGING.head(16, TAGGING.defaults.with_settings(decoder_layers=0), facts_of(2))


# -- text embeddings ------------------------------------------------------------------------------------------------


def test_text_embeddings_are_read_and_kept(tmp_path):
    texts = torch.randn(4, 6)
    np.save(tmp_path / "t.npy", texts.numpy())
    save_file({"text_embeddings": texts.bfloat16(), "other": texts}, tmp_path / "t.safetensors")
    assert torch.equal(read_text_embeddings(tmp_path / "t.npy", 4), texts)
    read = read_text_embeddings(str(tmp_path / "t.safetensors"), 4)
    assert read.dtype == torch.float32
    assert torch.equal(read, texts.bfloat16().float())
    head = TAGGING.head(16, small(), facts_of(4, text=read))
    assert torch.equal(head.state_dict()["embeddings"], read)
    head = TAGGING.head(16, small(), facts_of(4, text=texts))
    assert torch.equal(head.state_dict()["embeddings"], texts)
    assert "embeddings" not in dict(head.named_parameters())


def test_text_embeddings_that_do_not_fit_are_refused(tmp_path):
    texts, path = np.zeros((4, 6), np.float32), tmp_path / "t.npy"
    np.save(path, texts)
    with pytest.raises(ValueError, match=r"t.npy must hold \[5, channels\], a row per class, got \[4, 6\]"):
        read_text_embeddings(path, 5)
    save_file({"clip": torch.zeros(4, 6)}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"t\.safetensors must hold text_embeddings, got clip"):
        read_text_embeddings(tmp_path / "t.safetensors", 4)
    save_file({"text_embeddings": torch.zeros(4, 6, dtype=torch.int32)}, tmp_path / "i.safetensors")
    with pytest.raises(ValueError, match=r"finite floats, got torch.int32"):
        read_text_embeddings(tmp_path / "i.safetensors", 4)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"torn.safetensors: "):
        read_text_embeddings(tmp_path / "torn.safetensors", 4)
    with pytest.raises(ValueError, match=r"a .npy or .safetensors file, got .*t.pt"):
        read_text_embeddings(tmp_path / "t.pt", 4)
    with pytest.raises(ValueError, match=r"none.npy: .*No such file"):
        read_text_embeddings(tmp_path / "none.npy", 4)
    np.save(path, texts.astype(np.int64))
    with pytest.raises(ValueError, match="one array of floats, got int64"):
        read_text_embeddings(path, 4)
    with (tmp_path / "z.npy").open("wb") as file:
        np.savez(file, texts, texts)
    with pytest.raises(ValueError, match="one array of floats, got several arrays"):
        read_text_embeddings(tmp_path / "z.npy", 4)
    np.save(path, texts + np.inf)
    with pytest.raises(ValueError, match=r"finite floats, got torch\.float32, or values that are not finite"):
        read_text_embeddings(path, 4)


# -- labels ---------------------------------------------------------------------------------------------------------


class CountedLabels(Labels):
    """Pixel counts from memory."""

    names = ("tag_pixel_counts",)

    def __init__(self, counts, class_names):
        super().__init__("memory")
        self.counts, self.class_names = counts, class_names

    def ids(self, split=None):
        return sorted(self.counts)

    def path(self, clip_id):
        raise NotImplementedError

    _frames = _read = path

    def frames(self, clip_id):
        return len(self.counts[clip_id])

    def read(self, clip_id, frames, wanted):
        return {"tag_pixel_counts": self.counts[clip_id][list(frames)]}


def test_a_class_is_there_from_the_threshold_over_all_views_on():
    counts = torch.tensor([[[100, 199, 0], [100, 0, 7]], [[0, 0, 200], [2**30, 0, 0]]], dtype=torch.int32)
    facts = facts_of(3)
    present = TAGGING.targets({"tag_pixel_counts": counts}, small(), facts)["present"]
    assert present.tolist() == [[True, False, False], [True, False, True]]
    present = TAGGING.targets({"tag_pixel_counts": counts}, small(threshold=7), facts)["present"]
    assert present.tolist() == [[True, True, True], [True, False, True]]
    many = torch.full((1, 4, 3), 2**30, dtype=torch.int32)  # sums beyond int32
    assert TAGGING.targets({"tag_pixel_counts": many}, small(), facts)["present"].all()
    with pytest.raises(ValueError, match="count 2 classes as in training, got 3"):
        TAGGING.targets({"tag_pixel_counts": counts}, small(), facts_of(2))


@pytest.mark.parametrize("classes", [1, 20, 200])
def test_any_list_of_classes_is_learned_from_its_labels(classes):
    rng = torch.Generator().manual_seed(classes)
    counts = {f"clip{i}": torch.randint(0, 150, (4, classes), generator=rng, dtype=torch.int32) for i in range(9)}
    labels = CountedLabels(counts, [f"class {k}" for k in range(classes)])
    facts = TAGGING.facts(labels, labels.ids()[:7], small())
    assert facts.names == tuple(labels.class_names)
    for k in range(classes):
        there = [
            bool(counts[f"clip{i}"][:, k].sum() >= 200 and (counts[f"clip{i}"][:, k] > 0).sum() >= 2) for i in range(7)
        ]
        assert facts.rates[k] == sum(there) / 7
    metrics = TAGGING.metrics(small(), facts)
    batch = {"tag_pixel_counts": torch.stack(list(counts.values()))}
    targets = TAGGING.targets(batch, small(), facts)
    metrics.update({"logits": batch["tag_pixel_counts"].sum(1).float() - 199.5}, targets)
    result = metrics.result()
    assert result["mAP"] == result["OF1"] == 1
    assert result["classes"] == classes


def test_rates_are_the_studys_file_or_computed_alike(tmp_path):
    scenes = [make_scene(seed, frames=4, height=24, width=40) for seed in range(4)]
    root = write_scannet(tmp_path, "train", scenes)
    labels = ScanNetLabels(root)
    computed = TAGGING.facts(labels, labels.ids("train"), small())
    given = TAGGING.facts(labels, [], small(train_pos_rate=root / "train_pos_rate_20.npy"))
    assert computed == given
    assert given.names == CLASS_NAMES_20
    assert 0 < sum(given.rates) < 20


def test_labels_that_cannot_be_learned_from_are_named(tmp_path):
    labels = CountedLabels({"a": torch.zeros(3, 2, dtype=torch.int32)}, ("x", "y"))
    with pytest.raises(ValueError, match=r"none of the 2 classes is there in 1 training clips of memory"):
        TAGGING.facts(labels, ["a"], small())
    with pytest.raises(ValueError, match="needs labels with classes, and memory has none"):
        TAGGING.facts(CountedLabels({}, ()), ["a"], small())
    with pytest.raises(ValueError, match="at least 1 clip, got none"):
        TAGGING.facts(labels, [], small())
    path = tmp_path / "rates.npy"
    for rates in ([0.5], [0.5, 1.5], [0.5, -0.1], [0.5, math.nan]):
        np.save(path, rates)
        with pytest.raises(ValueError, match=r"rates.npy must be \[2\] shares of 1"):
            TAGGING.facts(labels, [], small(train_pos_rate=path))
    with pytest.raises(ValueError, match="threshold must be at least 1 pixel, got 0"):
        TAGGING.facts(labels, ["a"], small(threshold=0))
    for wrong in ({"gamma_negative": -1}, {"gamma_positive": -1}, {"clip": 1}, {"clip": -0.1}):
        with pytest.raises(ValueError, match=r"must be 0 or more and clip in \[0, 1\)"):
            TAGGING.facts(labels, ["a"], small(**wrong))


# -- learning -------------------------------------------------------------------------------------------------------


def train_and_score(features, present, config, epochs):
    """A probe trained on the first half of the clips and scored on the others."""
    torch.manual_seed(0)
    half, facts = len(features) // 2, facts_of(present.shape[1])
    entry, backbone = nn.Linear(features.shape[-1], config.embed), Backbone(config.embed, config.depth, heads=2)
    probe = nn.Sequential(entry, backbone, TAGGING.head(backbone.width, config, facts))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(half).split(16):
            loss = TAGGING.loss(probe(features[batch]), {"present": present[batch]}, config, torch.Generator())["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    metrics = TAGGING.metrics(config, facts)
    with torch.no_grad():
        for batch in torch.arange(half, len(features)).split(50):
            metrics.update(probe(features[batch]), {"present": present[batch]})
    return metrics.result()


@pytest.mark.parametrize("depth", [0, 1])
def test_classes_written_into_tokens_are_found(depth):
    rng = torch.Generator().manual_seed(0)
    present = torch.rand(200, 5, generator=rng) < 0.4
    features = torch.randn(200, 2, *GRID, 8, generator=rng) * 0.3
    view = torch.randint(0, 2, (200, 5), generator=rng)
    row, column = (torch.randint(0, n, (200, 5), generator=rng) for n in GRID)
    for i, k in present.nonzero().tolist():  # each class that is there marks one token of one view
        features[i, view[i, k], row[i, k], column[i, k], k] += 3
    result = train_and_score(features, present, small(depth=depth), epochs=14)
    assert result["mAP"] > 0.97
    assert result["OF1"] > 0.9
    assert result["mAP_chance"] < 0.5


def test_noise_teaches_nothing():
    rng = torch.Generator().manual_seed(1)
    present = torch.rand(600, 5, generator=rng) < 0.3
    result = train_and_score(torch.randn(600, 2, *GRID, 8, generator=rng), present, small(), epochs=2)
    # an AP of 300 clips, 90 of them positive, spreads by about .03 around chance, the mean of five by .015
    assert abs(result["mAP"] - result["mAP_chance"]) < 0.06
