"""Objects as the mean of the patches that they cover, and answers to every relation for pairs of them.

B clips, S views, H x W pixels of the masks, N = h * w patches, M objects, P pairs of a view, D width of the tokens, R
relations. What a relation means, and which one a pair is asked about, is not known here. The head is not told where in
a view an object is, nor how large: only what the patches say. (A mean over many patches has less noise than one over
few, so how large an object looks is not hidden altogether.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatialprobe.probes.backbone import Tokens


class PairReader(nn.Module):
    """An MLP on what two objects' vectors say each for itself and by their product, with two outputs per relation.

    An object's vector is its mean patch in the view that is asked about beside its mean over all views that show it, so
    that a question of one camera can be told from one of the room. Who is first matters: the first layer is linear in
    either vector with weights of its own, so in their difference too. Of a single object the other's part is 0.
    Computed in float32 also where the rest is not.
    """

    def __init__(
        self,
        tokens: int,  # D
        relations: int,  # R
        *,
        hidden: int = 256,
        dropout: float = 0.1,
        centre: Tensor | None = None,  # float32 [R], added to first outputs (default: 0)
        scale: Tensor | None = None,  # float32 [R], by which they are multiplied before (default: 1)
    ):
        super().__init__()
        if hidden < 1 or relations < 1 or not 0 <= dropout < 1:
            got = f"{hidden}, {relations} and {dropout}"
            raise ValueError(f"hidden and relations must be at least 1 and dropout in [0, 1), got {got}")
        self.first, self.second, self.factor = (nn.Linear(2 * tokens, hidden) for _ in range(3))
        self.product = nn.Linear(hidden, hidden, bias=False)
        layers = [nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, hidden)]
        self.answer = nn.Sequential(*layers, nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 2 * relations))
        zeros, ones = torch.zeros(relations), torch.ones(relations)
        self.register_buffer("centre", torch.stack([zeros if centre is None else centre, zeros], -1))
        self.register_buffer("scale", torch.stack([ones if scale is None else scale, ones], -1))

    def forward(
        self,
        tokens: Tokens,
        masks: Tensor,  # int [B, S, H, W], 1 .. M is the object at each pixel, 0 none
        objects: Tensor,  # bool [B, S, M], whether the view shows the object
        pairs: Tensor,  # int64 [B, S, P, 2], each 0 .. M
    ) -> dict[str, Tensor]:
        """{"scores": float32 [B, S, P, R, 2]}: for each pair, asked in its view, every relation's two outputs."""
        with torch.autocast(masks.device.type, enabled=False):
            in_view = object_means(tokens.patches.float(), masks, objects.shape[2], tokens.grid)  # [B, S, M, D]
            everywhere = in_view.sum(1) / objects.sum(1).clamp(min=1)[..., None]  # [B, M, D]
            vectors = torch.cat([in_view, everywhere[:, None].expand_as(in_view)], -1)
            # Per object, not per question: there are many more of these.
            first, second, factor = (layer(vectors) for layer in (self.first, self.second, self.factor))
            here, left = of_pairs(torch.cat([first, factor], -1), pairs[..., 0]).chunk(2, -1)
            there, right = of_pairs(torch.cat([second, factor], -1), pairs[..., 1]).chunk(2, -1)
            raw = self.answer(here + there + self.product(left * right)).unflatten(-1, (-1, 2))
            return {"scores": self.centre + self.scale * raw}


def of_pairs(parts: Tensor, numbers: Tensor) -> Tensor:  # [B, S, M, C], int64 [B, S, P] of 0 .. M -> [B, S, P, C]
    """Each number's row of its clip and view, the first being 1; zeros for 0."""
    rows = F.pad(parts, (0, 0, 1, 0)).flatten(0, 2)
    view = torch.arange(numbers.shape[0] * numbers.shape[1], device=numbers.device).view(*numbers.shape[:2], 1)
    return rows.index_select(0, (view * (parts.shape[2] + 1) + numbers).flatten()).view(*numbers.shape, -1)


def object_means(
    patches: Tensor,  # float32 [B, S, N, D]
    masks: Tensor,  # int [B, S, H, W], 1 .. M
    objects: int,  # M
    grid: tuple[int, int],  # (h, w)
) -> Tensor:
    """Per view each object's mean patch [B, S, M, D], weighted by `patch_shares`; 0 where a view does not show it."""
    shares = patch_shares(masks, objects, grid)
    return shares @ patches / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)


def patch_shares(masks: Tensor, objects: int, grid: tuple[int, int]) -> Tensor:  # float32 [B, S, M, N]
    """The share of each patch's pixels that are the object's. A pixel belongs to the patch that its centre lies in.

    An object of a single pixel still has the patch of that pixel: none vanishes. Raises ValueError for masks coarser
    than the patches, where some patch would have no pixel.
    """
    (batch, views, *size), patches = masks.shape, grid[0] * grid[1]
    if size[0] < grid[0] or size[1] < grid[1]:
        raise ValueError(f"masks must be at least as fine as the {grid[0]}x{grid[1]} patches, got {size[0]}x{size[1]}")
    y, x = (
        ((torch.arange(n, device=masks.device) + 0.5) * (cells / n)).long() for n, cells in zip(size, grid, strict=True)
    )
    cell = y[:, None] * grid[1] + x  # [H, W]
    view = torch.arange(batch * views, device=masks.device).view(batch, views, 1, 1)
    place = (view * (objects + 1) + masks.long()) * patches + cell
    pixels = counted(place, batch * views * (objects + 1) * patches).view(batch, views, objects + 1, patches)
    return pixels[:, :, 1:] / counted(cell, patches)


def counted(numbers: Tensor, count: int) -> Tensor:  # int64 [...] of 0 .. count - 1 -> float32 [count]
    """How often each number is there: torch.bincount, which torch.compile cannot see through."""
    ones = torch.ones(1, device=numbers.device).expand(numbers.numel())
    return torch.zeros(count, device=numbers.device).scatter_add_(0, numbers.flatten(), ones)
