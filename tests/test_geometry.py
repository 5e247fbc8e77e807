"""Camera maths and geometry metrics against scipy and slow float64 definitions, on random and degenerate input."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from spatialprobe.probes.geometry import (
    compose,
    decode_extrinsic,
    encode_cameras,
    inverse,
    line_angle,
    quaternion,
    rebase,
    rotation_angle,
    rotation_matrix,
    umeyama,
)
from spatialprobe.probes.metrics.geometry import (
    GeometryMetrics,
    area_under_curve,
    depth_scores,
    most_confident,
    pair_errors,
    point_error,
)

rng = np.random.default_rng(0)
AXES = np.concatenate([np.eye(3), -np.eye(3), [[1, 1, 0], [0, -1, 1], [1, -2, 3]]])


def tensor(x):
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def rotations_of(degrees):
    axes = AXES / np.linalg.norm(AXES, axis=1, keepdims=True)
    return Rotation.from_rotvec(axes * np.radians(degrees))


def cameras(*shape, seed=0):
    """Random extrinsics [*shape, 3, 4], float64."""
    random = np.random.default_rng(seed)
    count = math.prod(shape)
    turns = Rotation.random(count, random_state=seed).as_matrix().reshape(*shape, 3, 3)
    return tensor(np.concatenate([turns, random.normal(size=(*shape, 3, 1))], -1))


def square(extrinsic):  # [3, 4] -> numpy [4, 4]
    return np.vstack([extrinsic.numpy(), [0, 0, 0, 1]])


# -- cameras ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0, 1e-6, 0.01, 30, 90, 119, 121, 179, 179.9999, 180])
def test_quaternions_and_angles_are_scipys_at_any_angle(degrees):
    turns = rotations_of(degrees)
    matrices = tensor(turns.as_matrix())
    ours = quaternion(matrices)
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(len(AXES), dtype=torch.float64))
    assert (ours[:, 3] >= 0).all()
    same = (ours * tensor(turns.as_quat())).sum(-1).abs()  # both signs are the rotation
    torch.testing.assert_close(same, torch.ones_like(same), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation_matrix(ours), matrices, rtol=0, atol=1e-12)
    angle = rotation_angle(torch.eye(3, dtype=torch.float64).expand_as(matrices), matrices)
    torch.testing.assert_close(angle, torch.full_like(angle, degrees), rtol=1e-9, atol=1e-9)


def test_quaternion_sign_is_w_or_the_largest_of_the_others():
    turns = tensor([np.diag([1.0, -1, -1]), np.diag([-1.0, 1, -1]), np.diag([-1.0, -1, 1])])
    assert quaternion(turns).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    for turn in Rotation.random(20, random_state=1):
        expected = turn.as_quat(canonical=True)  # w > 0
        np.testing.assert_allclose(quaternion(tensor(turn.as_matrix())), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-30, 1e-3, 1, 7, 1e30])
def test_a_quaternion_may_have_any_length(length, dtype):
    turn = Rotation.random(5, random_state=2)
    q = (tensor(turn.as_quat()) * length).to(dtype)
    torch.testing.assert_close(rotation_matrix(q).double(), tensor(turn.as_matrix()), rtol=0, atol=1e-6)


def test_a_quaternion_of_length_0_is_no_rotation():
    assert rotation_matrix(torch.zeros(4)).tolist() == np.eye(3).tolist()


def test_angles_between_random_rotations_are_scipys():
    a, b = Rotation.random(50, random_state=3), Rotation.random(50, random_state=4)
    ours = rotation_angle(tensor(a.as_matrix()), tensor(b.as_matrix()))
    np.testing.assert_allclose(ours, np.degrees((a.inv() * b).magnitude()), rtol=1e-10)


def test_line_angle_is_up_to_sign_and_keeps_small_angles():
    a, b = rng.normal(size=(50, 3)), rng.normal(size=(50, 3))
    cosine = np.abs((a * b).sum(1)) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(line_angle(tensor(a), tensor(b)), np.degrees(np.arccos(cosine)), rtol=1e-8)
    x = tensor([[1.0, 0, 0]] * 3)
    y = tensor([[-2.0, 0, 0], [3.0, 3e-9, 0], [0.0, 0, 0]])
    np.testing.assert_allclose(line_angle(x, y), [0, math.degrees(1e-9), 90], rtol=1e-6)


def test_inverse_and_compose_are_those_of_4_by_4_matrices():
    a, b = cameras(2, seed=5)
    np.testing.assert_allclose(square(inverse(a)), np.linalg.inv(square(a)), atol=1e-12)
    np.testing.assert_allclose(square(compose(a, b)), square(a) @ square(b), atol=1e-12)


def test_rebase_makes_the_first_camera_the_world():
    extrinsic, points = cameras(2, 3, seed=6), tensor(rng.normal(size=(2, 3, 2, 4, 3)))
    turned, moved = rebase(extrinsic, points)
    for b in range(2):
        first = square(extrinsic[b, 0])
        for s in range(3):
            np.testing.assert_allclose(square(turned[b, s]), square(extrinsic[b, s]) @ np.linalg.inv(first), atol=1e-12)
            flat = np.c_[points[b, s].reshape(-1, 3), np.ones(8)] @ first.T
            np.testing.assert_allclose(moved[b, s].reshape(-1, 3), flat[:, :3], atol=1e-12)
    np.testing.assert_allclose(turned[:, 0], np.broadcast_to(np.eye(3, 4), (2, 3, 4)), atol=1e-14)


def test_rebase_in_float32_of_a_world_far_from_its_origin():
    near = cameras(1, 3, seed=7)
    far = near.clone()
    far[..., 3] -= near[..., :3] @ tensor([300, -200, 100])  # the same cameras, the world moved
    turned, _ = rebase(far.float(), torch.zeros(1, 3, 1, 1, 3))
    expected, _ = rebase(near, torch.zeros(1, 3, 1, 1, 3).double())
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned.double(), expected, rtol=0, atol=3e-4)  # 374 * 2**-24 of each float32 matrix


def test_equal_cameras_have_no_baseline_however_far_the_world():
    turn = cameras(1, 1, seed=16)[..., :3]
    extrinsic = torch.cat([turn, -turn @ tensor([[300.0], [-200], [100]])], -1).float().expand(1, 4, 3, 4)
    rebased, _ = rebase(extrinsic, torch.zeros(1, 4, 1, 1, 3))
    assert rebased[..., 3].abs().max() < 1e-9


def test_encoded_cameras_are_translation_scalar_last_quaternion_and_angles_of_view():
    extrinsic, intrinsic = cameras(2, 3, seed=8), torch.eye(3).double().repeat(2, 3, 1, 1)
    intrinsic[..., 0, 0], intrinsic[..., 1, 1] = 50.0, 40.0
    pose = encode_cameras(extrinsic, intrinsic, (30, 80))
    torch.testing.assert_close(pose[..., :3], extrinsic[..., 3])
    expected = Rotation.from_matrix(extrinsic[..., :3].reshape(-1, 3, 3).numpy()).as_quat(canonical=True)
    np.testing.assert_allclose(pose[..., 3:7].reshape(-1, 4), expected, atol=1e-12)
    assert pose[0, 0, 7].item() == pytest.approx(2 * math.atan(15 / 40))  # height first
    assert pose[0, 0, 8].item() == pytest.approx(2 * math.atan(40 / 50))
    pose[..., 3:7] *= -3
    torch.testing.assert_close(decode_extrinsic(pose), extrinsic)


# -- similarity -------------------------------------------------------------------------------------------------------


def slow_similarity(source, target):
    """scipy's proper rotation of centred points, then the scale and translation of least squares."""
    a, b = source - source.mean(0), target - target.mean(0)
    turn = Rotation.align_vectors(b, a)[0].as_matrix()
    turned = a @ turn.T
    scale = (turned * b).sum() / (a * a).sum()
    return scale, turn, target.mean(0) - scale * turn @ source.mean(0)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("noise", [0, 0.3])
@pytest.mark.parametrize("count", [4, 50])
def test_umeyama_is_least_squares_over_proper_rotations(count, noise, mirrored):
    source = rng.normal(size=(count, 3)) * [3, 2, 1] + [5, -4, 9]
    turn = Rotation.random(random_state=count).as_matrix()
    target = 2.5 * source @ turn.T + [1, 2, 3] + noise * rng.normal(size=(count, 3))
    if mirrored:
        target = target * [-1, 1, 1]
    scale, expected, move = slow_similarity(source, target)
    ours = umeyama(tensor(source), tensor(target))
    assert torch.linalg.det(ours.rotation).item() == pytest.approx(1)
    np.testing.assert_allclose(ours.scale, scale, rtol=1e-9)
    np.testing.assert_allclose(ours.rotation, expected, atol=1e-7)
    np.testing.assert_allclose(ours.apply(tensor(source)), scale * source @ expected.T + move, atol=1e-6)
    if not noise and not mirrored:
        np.testing.assert_allclose(ours.rotation, turn, atol=1e-9)


def test_umeyama_of_points_in_a_plane_or_on_a_line_still_fits_them():
    turn = Rotation.random(random_state=9).as_matrix()
    for directions in (2, 1):
        source = rng.normal(size=(20, directions)) @ rng.normal(size=(directions, 3)) + 3
        target = 0.5 * source @ turn.T - 1
        ours = umeyama(tensor(source), tensor(target))
        assert torch.linalg.det(ours.rotation).item() == pytest.approx(1)
        np.testing.assert_allclose(ours.apply(tensor(source)), target, atol=1e-9)


@pytest.mark.parametrize("count", [1, 7])
def test_umeyama_of_equal_points_only_moves(count):
    source, target = tensor([[0.1, 0.7, -0.3]]).expand(count, 3), tensor(rng.normal(size=(count, 3)))
    ours = umeyama(source, target)
    assert ours.scale == 1
    assert ours.rotation.tolist() == np.eye(3).tolist()
    np.testing.assert_allclose(ours.apply(source[:1])[0], target.mean(0), atol=1e-15)


def test_umeyama_onto_equal_points_has_scale_0():
    ours = umeyama(tensor(rng.normal(size=(9, 3))), tensor([[1.0, 2, 3]]).expand(9, 3))
    assert ours.scale == 0
    assert torch.linalg.det(ours.rotation).item() == pytest.approx(1)
    np.testing.assert_allclose(ours.translation, [1, 2, 3], atol=1e-15)


def test_umeyama_says_what_it_wants():
    with pytest.raises(ValueError, match=r"at least 1 point, got \[0, 3\] and \[0, 3\]"):
        umeyama(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"two \[N, 3\].*got \[4, 3\] and \[5, 3\]"):
        umeyama(torch.zeros(4, 3), torch.zeros(5, 3))


# -- points and depth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 101])
def test_the_most_confident_quarter_is_numpys_percentile(count):
    for confidence in (rng.random(count), rng.integers(1, 4, count) / 2, np.ones(count)):
        expected = confidence >= np.percentile(confidence, 75)
        assert most_confident(tensor(confidence)).tolist() == expected.tolist()


def slow_point_error(predicted, truth, confidence):
    chosen = confidence >= np.percentile(confidence, 75)
    scale, turn, move = slow_similarity(predicted[chosen], truth[chosen])
    total = sum(
        c * np.linalg.norm(scale * turn @ p + move - t) for p, t, c in zip(predicted, truth, confidence, strict=True)
    )
    return total / confidence.sum()


def slow_depth(predicted, truth):
    middle = lambda x: sorted(x)[(len(x) - 1) // 2]  # noqa: E731
    scaled = [p * middle(truth) / middle(predicted) for p in predicted]
    pairs = list(zip(scaled, truth, strict=True))
    within = [sum(max(p / t, t / p) < 1.25**k for p, t in pairs) / len(pairs) for k in (1, 2, 3)]
    return [sum(abs(p - t) / t for p, t in pairs) / len(pairs), *within]


def test_point_error_is_the_slow_one_and_ignores_similarities():
    truth, confidence = rng.normal(size=(40, 3)), rng.random(40) + 0.1
    predicted = truth + 0.2 * rng.normal(size=(40, 3))
    chosen = most_confident(tensor(confidence))
    ours = point_error(tensor(predicted), tensor(truth), tensor(confidence), chosen)
    assert ours == pytest.approx(slow_point_error(predicted, truth, confidence), rel=1e-9)
    moved = 7 * predicted @ Rotation.random(random_state=1).as_matrix() + 100
    assert point_error(tensor(moved), tensor(truth), tensor(confidence), chosen) == pytest.approx(ours, rel=1e-8)


@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_depth_scores_are_the_slow_ones_and_ignore_scale(count):
    truth = rng.random(count) * 3 + 0.5
    predicted = truth * np.exp(0.4 * rng.normal(size=count))
    expected = slow_depth(predicted.tolist(), truth.tolist())
    assert depth_scores(tensor(predicted), tensor(truth)) == pytest.approx(expected, rel=1e-12)
    assert depth_scores(tensor(predicted * 1e-4), tensor(truth)) == pytest.approx(expected, rel=1e-9)


def test_depth_scores_of_predictions_that_vanish_or_are_not_finite():
    assert depth_scores(tensor([0.0, 0, 0]), tensor([2.0, 2, 2])) == [0, 1, 1, 1]  # scale is not scored
    assert depth_scores(tensor([0.0, 1, 1]), tensor([2.0, 2, 2])) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert depth_scores(tensor([math.inf, 1, 1]), tensor([2.0, 2, 2])) == [math.inf, 0, 0, 0]
    with pytest.raises(ValueError, match="at least 1 pixel"):
        depth_scores(tensor([]), tensor([]))


# -- pairs of cameras -------------------------------------------------------------------------------------------------


def slow_pairs(predicted, truth, auc):
    """Rotation and translation errors of each clip's pairs, by 4 x 4 matrices and scipy."""
    rotation, translation = [], []
    for guess, true in zip(predicted, truth, strict=True):
        for i, j in combinations(range(len(true)), 2):
            relative = []
            for x in (guess, true):
                first, second = square(x[i]), square(x[j])
                relative.append(np.linalg.inv(first) @ second if auc == "batch" else second @ np.linalg.inv(first))
            a, b = (Rotation.from_matrix(x[:3, :3]) for x in relative)
            rotation.append(np.degrees((a.inv() * b).magnitude()))
            t, u = (x[:3, 3] / np.linalg.norm(x[:3, 3]) for x in relative)
            translation.append(np.degrees(np.arccos(min(1, abs(t @ u)))))
    return np.array(rotation), np.array(translation)


@pytest.mark.parametrize("auc", ["pair", "batch"])
def test_pair_errors_are_the_slow_ones(auc):
    truth = cameras(3, 4, seed=10)
    guess = truth + 0.1 * cameras(3, 4, seed=11)
    guess[..., :3] = rotation_matrix(quaternion(truth[..., :3]) + 0.1 * tensor(rng.normal(size=(3, 4, 4))))
    rotation, translation = pair_errors(guess, truth, auc)
    expected = slow_pairs(guess, truth, auc)
    np.testing.assert_allclose(rotation.flatten(), expected[0], rtol=1e-7)
    np.testing.assert_allclose(translation.flatten(), expected[1], rtol=1e-6)


def test_pair_errors_do_not_depend_on_the_world_but_the_published_codes_do():
    truth, guess, world = cameras(2, 3, seed=12), cameras(2, 3, seed=13), cameras(1, seed=14)[0]
    elsewhere = [compose(x, world.expand_as(x)) for x in (guess, truth)]
    for a, b in zip(pair_errors(guess, truth), pair_errors(*elsewhere), strict=True):
        torch.testing.assert_close(a, b)
    published = [pair_errors(*x, "batch")[1] for x in ((guess, truth), elsewhere)]
    assert (published[0] - published[1]).abs().max() > 1


def test_cameras_side_by_side_and_half_turns():
    truth = torch.eye(3, 4).double().repeat(1, 3, 1, 1)
    truth[0, 1:, 0, 3] = tensor([1.0, 2.0])  # parallel, in a row
    guess = truth.clone()
    guess[0, 1, :, :3] = torch.diag(tensor([-1.0, 1, -1]))  # half a turn off
    guess[0, 2, :, 3] *= -5  # behind instead of before: the same line
    rotation, translation = pair_errors(guess, truth)
    np.testing.assert_allclose(rotation, [[180, 0, 180]], atol=1e-9)
    np.testing.assert_allclose(translation, [[0, 0, 0]], atol=1e-9)


def test_a_pair_without_a_true_baseline_has_no_translation_to_predict():
    truth = torch.eye(3, 4).double().repeat(1, 3, 1, 1)
    truth[0, 2, 2, 3] = 1.0
    truth[0, 1, 0, 3] = 1e-7  # what float32 makes of none
    guess = torch.eye(3, 4).double().repeat(1, 3, 1, 1)
    rotation, translation = pair_errors(guess, truth)
    assert rotation.tolist() == [[0, 0, 0]]
    np.testing.assert_array_equal(translation, [[math.nan, 90, 90]])  # the prediction has none where there is one
    truth[0, 1, 0, 3] = 0
    assert pair_errors(guess, truth, "batch")[1].tolist() == [[90, 90, 90]]


def test_predicted_cameras_that_are_not_finite_are_wrong():
    truth = cameras(1, 2, seed=15)
    rotation, translation = pair_errors(torch.full_like(truth, math.nan), truth)
    assert (rotation.item(), translation.item()) == (180, 90)


@pytest.mark.parametrize("degrees", [30, 10, 5, 3])
def test_area_under_curve_is_the_mean_cumulative_histogram(degrees):
    error = rng.random(200) * 45
    histogram = np.histogram(error, bins=np.arange(degrees + 1))[0] / 200
    assert area_under_curve(tensor(error), degrees) == pytest.approx(np.cumsum(histogram).mean())
    published = torch.histc(tensor(error), bins=31, min=0, max=30) / 200
    expected = published[:degrees].cumsum(0).mean().item()
    assert area_under_curve(tensor(error), degrees, 30 / 31) == pytest.approx(expected)
    assert area_under_curve(tensor([0.0, 0]), degrees) == 1


# -- all of it --------------------------------------------------------------------------------------------------------


def batch(clips, views, seed, size=(3, 5)):
    """Random outputs and targets of a batch, some pixels invalid."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(clips, views, *shape, generator=random)  # noqa: E731
    truth = cameras(clips, views, seed=seed)
    intrinsic = torch.eye(3).double().repeat(clips, views, 1, 1)
    poses = encode_cameras(truth, intrinsic, size).float() + 0.05 * torch.randn(clips, views, 9, generator=random)
    points, depth = 2 * draw(*size, 3), draw(*size) + 0.5
    outputs = {
        "points": points + 0.3 * draw(*size, 3),
        "depth": depth * (1 + draw(*size)),
        "poses": torch.stack([torch.zeros_like(poses), poses], 2),  # the last refinement is scored
    }
    valid = draw(*size) < 0.8
    targets = {"points": points, "depth": depth, "confidence": draw(*size) * valid, "valid": valid}
    return outputs, targets | {"extrinsic": truth.float()}


@pytest.mark.parametrize("auc", ["pair", "batch"])
def test_metrics_of_two_batches_are_the_slow_ones(auc):
    metrics, clips, rotation, translation = GeometryMetrics(auc), [], [], []
    for seed, count in ((20, 3), (21, 1)):
        outputs, targets = batch(count, 3, seed)
        metrics.update(outputs, targets)
        for i in range(count):
            valid = targets["valid"][i]
            p, t, c = (
                x[i][valid].double().numpy() for x in (outputs["points"], targets["points"], targets["confidence"])
            )
            q, d = (x["depth"][i][valid].double().numpy() for x in (outputs, targets))
            top = c >= np.percentile(c, 75)
            clips.append([slow_point_error(p, t, c), *slow_depth(q[top].tolist(), d[top].tolist())])
        guess = decode_extrinsic(outputs["poses"][:, :, 1].double())
        errors = slow_pairs(guess, targets["extrinsic"].double(), auc)
        rotation, translation = np.append(rotation, errors[0]), np.append(translation, errors[1])
    worst, width = np.maximum(rotation, translation), 30 / 31 if auc == "batch" else 1
    expected = dict(
        zip(["point_error", "AbsRel", "delta_1.25", "delta_1.25^2", "delta_1.25^3"], np.mean(clips, 0), strict=True)
    )
    expected |= {f"RRA@{a}": (rotation < a).mean() for a in (5, 15, 30)}
    expected |= {f"RTA@{a}": (translation < a).mean() for a in (5, 15, 30)}
    expected |= {f"AUC@{a}": np.mean([(worst < k * width).mean() for k in range(1, a + 1)]) for a in (30, 10, 5, 3)}
    expected |= {"clips_scored": 4, "pairs_scored": 12}
    assert 0 < expected["AUC@30"] < 1
    assert metrics.result() == pytest.approx(expected, rel=1e-6)


def test_perfect_predictions_of_another_scale_are_perfect():
    outputs, targets = batch(2, 4, seed=22)
    pose = encode_cameras(targets["extrinsic"].double(), torch.eye(3).double().repeat(2, 4, 1, 1), (3, 5))
    pose[..., :3] *= 4
    outputs = {"points": targets["points"] * 4 + 1, "depth": targets["depth"] * 4, "poses": pose[:, :, None]}
    metrics = GeometryMetrics()
    metrics.update(outputs, targets)
    found = metrics.result()
    assert found["point_error"] == pytest.approx(0, abs=1e-6)
    assert found["AbsRel"] == pytest.approx(0, abs=1e-6)
    assert [found[n] for n in ("delta_1.25", "RRA@5", "RTA@5", "AUC@30", "AUC@3")] == [1] * 5


def test_a_pair_without_baseline_counts_by_its_rotation_alone():
    outputs, targets = batch(1, 2, seed=23)
    targets["extrinsic"][:] = torch.eye(3, 4)
    outputs["poses"][..., 3:7] = torch.tensor([0, 0, math.sin(math.radians(1.25)), math.cos(math.radians(1.25))])
    outputs["poses"][:, 0, :, 3:7] = torch.tensor([0.0, 0, 0, 1])
    metrics, published = GeometryMetrics(), GeometryMetrics("batch")
    for each in (metrics, published):
        each.update(outputs, targets)
    found = metrics.result()
    assert found["RRA@5"] == 1
    assert math.isnan(found["RTA@30"])
    assert found["AUC@5"] == pytest.approx(3 / 5)  # 2.5 degrees are right below 3, 4 and 5
    assert (published.result()["RTA@30"], published.result()["AUC@30"]) == (0, 0)


def test_one_view_has_no_pairs_and_a_clip_without_valid_pixels_no_points():
    metrics = GeometryMetrics()
    outputs, targets = batch(2, 1, seed=24)
    targets["valid"][0], targets["confidence"][0] = False, 0.0
    metrics.update(outputs, targets)
    found = metrics.result()
    alone = GeometryMetrics()
    alone.update({n: x[1:] for n, x in outputs.items()}, {n: x[1:] for n, x in targets.items()})
    assert (found["clips_scored"], found["pairs_scored"]) == (1, 0)
    assert found["point_error"] == alone.result()["point_error"]
    assert all(math.isnan(found[name]) for name in ("RRA@5", "RTA@30", "AUC@30"))


def test_no_valid_pixel_at_all_leaves_the_cameras():
    metrics = GeometryMetrics()
    outputs, targets = batch(2, 3, seed=25)
    targets["valid"][:] = False
    metrics.update(outputs, targets)
    found = metrics.result()
    assert found["clips_scored"] == 0
    assert math.isnan(found["point_error"])
    assert math.isnan(found["AbsRel"])
    guess = decode_extrinsic(outputs["poses"][:, :, 1].double())
    assert found["RRA@30"] == (slow_pairs(guess, targets["extrinsic"].double(), "pair")[0] < 30).mean()


def test_points_that_are_not_finite_are_infinitely_wrong_where_the_truth_is_valid():
    outputs, targets = batch(2, 2, seed=26)
    before = GeometryMetrics()
    before.update(outputs, targets)
    outputs["points"][~targets["valid"]] = math.nan
    after = GeometryMetrics()
    after.update(outputs, targets)
    assert after.result() == before.result()
    outputs["points"][0, 0][targets["valid"][0, 0]] = math.inf
    after.update(outputs, targets)
    assert after.result()["point_error"] == math.inf


def test_metrics_say_what_they_want():
    with pytest.raises(ValueError, match="auc must be one of pair, batch, got 'mean'"):
        GeometryMetrics("mean")
    with pytest.raises(ValueError, match="at least 1 clip"):
        GeometryMetrics().result()
