"""The pull-push loss against its definition in float64, pair by pair; Triton runs interpreted where there is no GPU."""

import pytest
import torch

from spatialprobe.kernels import contrastive_loss as module
from spatialprobe.kernels.contrastive_loss import contrastive_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"]


def definition(
    embeddings: torch.Tensor,  # [B, P, D]
    ids: torch.Tensor,  # int [B, P]
    counts: torch.Tensor,  # int [B]
    margin: float,
    pull_weight: float,
    push_weight: float,
) -> torch.Tensor:
    """The loss as it is written above, with all distances in memory."""
    there = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    pairs = there[:, :, None] & there[:, None, :] & ~torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    same = ids[:, :, None] == ids[:, None, :]
    square = (embeddings[:, :, None] - embeddings[:, None, :]).square().sum(-1)
    distance = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)  # gradient 0 at 0, not NaN
    pull, push = pairs & same, pairs & ~same
    apart = (margin - distance).relu()
    return pull_weight * _mean(distance, pull) + push_weight * _mean(apart, push)


def _mean(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(where, x, 0.0).sum() / where.sum().clamp_min(1)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody wrote is NaN."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: x.fill_(torch.nan) if (x := empty(*a, **k)).is_floating_point() else x
    )


def scenes(batch, pixels, channels, *, objects=3, seed=0, scale=0.5):
    rng = torch.Generator().manual_seed(seed)
    f = torch.randn(batch, pixels, channels, generator=rng) * scale
    return f.to(DEVICE), torch.randint(0, objects, (batch, pixels), generator=rng).to(DEVICE)


def reference(f, ids, counts=None, margin=1.0, pull=1.0, push=1.0):
    """Loss and gradient in float64 by autograd of the definition."""
    f = f.double().requires_grad_()
    counts = torch.full((len(f),), f.shape[1], device=f.device) if counts is None else counts
    loss = definition(f, ids, counts, margin, pull, push)
    loss.backward()
    return loss.item(), f.grad


def ours(f, ids, impl, **options):
    f = f.clone().requires_grad_()
    loss = contrastive_loss(f, ids, impl=impl, **options)
    loss.backward()
    return loss.item(), f.grad


def slow(f, ids, margin):
    """Two loops over the pixels of every scene."""
    pull, push = [], []
    for scene, of in zip(f.double().tolist(), ids.tolist(), strict=True):
        for i, a in enumerate(scene):
            for j, b in enumerate(scene):
                d = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
                if i != j:
                    (pull if of[i] == of[j] else push).append(d if of[i] == of[j] else max(0.0, margin - d))
    return sum(pull) / max(len(pull), 1) + sum(push) / max(len(push), 1)


def test_the_definition_is_the_mean_over_pairs():
    f, ids = scenes(2, 7, 3)
    counts = torch.full((2,), 7, device=DEVICE)
    assert definition(f.double(), ids, counts, 1.0, 1.0, 1.0).item() == pytest.approx(slow(f, ids, 1.0), rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch", "pixels", "channels"), [(1, 1, 1), (1, 2, 3), (3, 17, 32), (2, 130, 5), (1, 64, 33)])
def test_loss_and_gradient_of_any_size(impl, batch, pixels, channels):
    f, ids = scenes(batch, pixels, channels, scale=channels**-0.5)
    wanted, gradient = reference(f, ids, None, 1.0, 0.7, 1.3)
    got, ours_gradient = ours(f, ids, impl, pull_weight=0.7, push_weight=1.3)
    # a distance is a sum of `channels` squares in float32, a gradient a sum of up to `pixels` unit vectors
    assert got == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(ours_gradient.double(), gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("counts", [[0, 9, 1], [17, 2, 5], [0, 0, 0], [1, 1, 1]])
def test_scenes_of_different_numbers_of_pixels(impl, counts):
    f, ids = scenes(3, 17, 4)
    counts = torch.tensor(counts, device=DEVICE)
    wanted, gradient = reference(f, ids, counts)
    beyond = torch.arange(17, device=DEVICE) >= counts[:, None]
    f[beyond] = float("nan")  # not there, so it must not be seen
    got, ours_gradient = ours(f, ids, impl, counts=counts)
    assert got == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(ours_gradient.double(), gradient, rtol=1e-5, atol=1e-6)
    assert (ours_gradient[beyond] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objects", [1, 10**9])
def test_one_object_and_objects_of_a_pixel(impl, objects):
    """No pairs of unequal ids, and none of equal ids: that mean is 0."""
    f, ids = scenes(2, 20, 4, objects=objects)
    wanted, gradient = reference(f, ids)
    got, ours_gradient = ours(f, ids, impl)
    assert got == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(ours_gradient.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_embeddings_and_pairs_at_the_margin_have_no_gradient(impl):
    f = torch.zeros(1, 4, 2, device=DEVICE)
    f[0, 2], f[0, 3] = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.0])
    ids = torch.tensor([[5, 5, 7, 5]], device=DEVICE)
    got, gradient = ours(f, ids, impl)  # 0 and 1: distance 0; 0 and 2, 1 and 2: the margin; 3 and 2: .75
    assert got == pytest.approx((0 + 0.25 + 0.25) / 3 + 0.25 / 3)
    pull, push = 2 / 6, -2 / 6  # six ordered pairs of each kind
    wanted = torch.tensor([[-pull, 0], [-pull, 0], [push * 1, 0], [2 * pull - push, 0]])
    torch.testing.assert_close(gradient[0].cpu(), wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_close_pairs_keep_an_accurate_gradient(impl):
    """Pixels 1e-5 apart at distance 1 from the origin: through dot products, their distance would be noise."""
    f, ids = scenes(1, 40, 8, objects=2)
    f = torch.nn.functional.normalize(f, dim=-1)
    f[:, 20:] = f[:, :20] + 1e-5 * torch.randn(f[:, :20].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wanted, gradient = reference(f, ids)
    got, ours_gradient = ours(f, ids, impl)
    assert got == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(ours_gradient.double(), gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_only_where_values_are_stored(impl, dtype):
    """The loss is that of the rounded embeddings; the gradient is rounded once."""
    f, ids = scenes(2, 19, 6, scale=1e4 if dtype == torch.bfloat16 else 1.0)
    f = f.to(dtype)
    wanted, gradient = reference(f, ids, margin=2e4)
    got, ours_gradient = ours(f, ids, impl, margin=2e4)
    assert ours_gradient.dtype == dtype
    assert got == pytest.approx(wanted, rel=1e-6)
    half_step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(ours_gradient.double(), gradient, rtol=1.01 * half_step, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_tiny_and_strided_embeddings(impl):
    f, ids = scenes(2, 12, 6)
    f = f.transpose(0, 1).contiguous().transpose(0, 1)[:, ::2, ::2] * 1e-17
    wanted, gradient = reference(f, ids[:, ::2])
    got, ours_gradient = ours(f, ids[:, ::2], impl)
    assert got == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(ours_gradient.double(), gradient, rtol=1e-5, atol=1e-7)
    denormal, nothing = ours(f * 1e-24, ids[:, ::2], impl)
    assert denormal == pytest.approx(1.0)  # all distances are 0: every unequal pair misses the margin by all of it
    assert (nothing == 0).all()


def test_finite_differences_agree():
    f, ids = scenes(2, 9, 3)
    loss = lambda x: contrastive_loss(x, ids, margin=0.8, impl="torch")  # noqa: E731
    assert torch.autograd.gradcheck(loss, f.double().requires_grad_(), nondet_tol=0.0)


@pytest.mark.parametrize("pixels", [2, 33])
def test_chunks_do_not_change_the_torch_loss(pixels, monkeypatch):
    """Pairs once each, as on the CPU, whole scenes, and blocks of two rows."""
    f, ids = scenes(2, pixels, 4)
    once = ours(f, ids, "torch")
    monkeypatch.setattr(module, "HALF", 0)
    whole = ours(f, ids, "torch")
    monkeypatch.setattr(module, "BLOCK", 2 * pixels * 4)
    assert [len(p.equal) for p in module._parts(f[:1], ids, None)] == [2] * (pixels // 2) + [1] * (pixels % 2)
    for loss, gradient in (whole, ours(f, ids, "torch")):
        assert loss == pytest.approx(once[0], rel=1e-6)
        torch.testing.assert_close(gradient, once[1])


@pytest.mark.parametrize(("impl", "pixels"), [("torch", 1024), ("triton", 1024 if DEVICE == "cuda" else 256)])
def test_no_tensor_of_all_pairs_is_made(impl, pixels, monkeypatch):
    """No tensor has as many as pixels x pixels / 4 elements, in either pass; 256 are two of Triton's tiles."""
    monkeypatch.setattr(module, "BLOCK", 1 << 14)
    monkeypatch.setattr(module, "HALF", 1 << 14)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            largest = max([largest, *(x.numel() for x in tensors)])
            return out

    f, ids = scenes(1, pixels, 2)
    sums, gradient = (getattr(module, f"_{what}_in_{impl}") for what in ("sums", "gradient"))
    with Largest():  # of the operator itself it would see the results alone
        pairs = sums(f, ids, None, 1.0)[2:]
        gradient(torch.ones((), device=DEVICE), pairs, f, ids, None, 1.0, 1.0, 1.0)
    assert pixels <= largest < pixels * pixels / 4


@pytest.mark.parametrize("impl", IMPLS)
def test_torch_library_and_compile_see_the_op(impl):
    f, ids = scenes(2, 11, 4)
    args = (f.requires_grad_(), ids, torch.tensor([11, 3], device=DEVICE), 1.0, 1.0, 1.0, impl == "triton")
    torch.library.opcheck(module._loss, args)
    compiled = torch.compile(lambda x: contrastive_loss(x, ids, impl=impl) * 2, backend="aot_eager", fullgraph=True)
    x = f.detach().clone().requires_grad_()
    compiled(x).backward()
    torch.testing.assert_close(x.grad, 2 * ours(f.detach(), ids, impl)[1])


def test_what_does_not_fit_is_said():
    f, ids = scenes(2, 5, 3)
    counts = torch.tensor([5, 6], device=DEVICE)
    with pytest.raises(ValueError, match=r"embeddings must be \[B, P, D\] and not empty, got \(2, 5\)"):
        contrastive_loss(f[..., 0], ids)
    with pytest.raises(ValueError, match=r"embeddings must be \[B, P, D\] and not empty, got \(2, 0, 3\)"):
        contrastive_loss(f[:, :0], ids[:, :0])
    with pytest.raises(ValueError, match=r"ids must be integers \(2, 5\)"):
        contrastive_loss(f, ids[:, :4])
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        contrastive_loss(f, ids.float())
    with pytest.raises(ValueError, match=r"counts must be integers \(2,\)"):
        contrastive_loss(f, ids, counts=torch.ones(3, dtype=torch.int64, device=DEVICE))
    if DEVICE == "cpu":  # on CUDA a look at them would wait for the device: loss and gradient are NaN
        with pytest.raises(ValueError, match=r"counts must be 0 .. 5 pixels, got \[5, 6\]"):
            contrastive_loss(f, ids, counts=counts)
    with pytest.raises(ValueError, match="in Triton embeddings must have at most 32 bits"):
        contrastive_loss(f.double(), ids, impl="triton")
    with pytest.raises(ValueError, match="margin must be a distance from 0 on, got -1"):
        contrastive_loss(f, ids, margin=-1)
    with pytest.raises(ValueError, match="impl must be one of auto, triton, torch"):
        contrastive_loss(f, ids, impl="cuda")


@pytest.mark.parametrize("impl", IMPLS)
def test_counts_ids_and_embeddings_of_any_strides_and_integers(impl):
    f, ids = scenes(4, 9, 5)
    counts = torch.tensor([9, 0, 3, 0, 5, 0, 9, 0], device=DEVICE)[::2]
    turned = f.transpose(1, 2).contiguous().transpose(1, 2)
    wanted, gradient = reference(f, ids, counts)
    for one in (counts, counts.int(), counts.to(torch.uint8)):
        got, ours_gradient = ours(turned, ids.T.contiguous().T, impl, counts=one)
        assert got == pytest.approx(wanted, rel=1e-6)
        torch.testing.assert_close(ours_gradient.double(), gradient, rtol=1e-5, atol=1e-6)
    args = (turned.requires_grad_(), ids, counts, 1.0, 1.0, 1.0, impl == "triton")
    torch.library.opcheck(module._loss, args)


def test_wrong_counts_that_nobody_looked_at_make_loss_and_gradient_nan(monkeypatch):
    """As on CUDA, where a look at them would wait for the device."""
    monkeypatch.setattr(module, "_check_counts", lambda counts, pixels: None)
    f, ids = scenes(1, 17, 4)
    for wrong in (18, -1):
        counts = torch.tensor([wrong], device=DEVICE)
        loss, gradient = ours(f, ids, "triton", counts=counts)
        assert loss != loss
        assert gradient.isnan().all()
        with pytest.raises(ValueError, match=r"counts must be 0 .. 17 pixels"):
            ours(f, ids, "torch", counts=counts)
