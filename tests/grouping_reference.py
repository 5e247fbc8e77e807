"""Slow definitions that the grouping is tested against: plain numpy and Python, written from the formulas."""

import numpy as np


def pairwise_distances(x: np.ndarray, metric: str = "euclidean") -> np.ndarray:
    """Float64 distances [N, N] by differences, which do not cancel."""
    x = x.astype(np.float64)
    if metric == "cosine":
        x = x / np.sqrt((x * x).sum(1, keepdims=True))
    squared = np.stack([((x - row) ** 2).sum(1) for row in x])
    return squared / 2 if metric == "cosine" else np.sqrt(squared)


def core_distances(
    distances: np.ndarray,  # [N, N]
    min_samples: int,  # the point itself not counted
) -> np.ndarray:
    return np.sort(distances, axis=1)[:, min(min_samples, len(distances) - 1)]


def spanning_tree(
    distances: np.ndarray,  # [N, N]
    core: np.ndarray,  # [N]
    alpha: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Prim's algorithm in the canonical order (weight, smaller index, larger index): ends [N-1, 2], weights [N-1]."""
    n = len(distances)
    weight, low, high = np.full(n, np.inf), np.full(n, n), np.full(n, n)
    outside = np.ones(n, bool)
    newest, edges = 0, []
    for _ in range(n - 1):
        outside[newest] = False
        w = np.maximum(np.maximum(core, core[newest]), distances[newest] / alpha)
        a, b = np.minimum(np.arange(n), newest), np.maximum(np.arange(n), newest)
        better = (w < weight) | ((w == weight) & ((a < low) | ((a == low) & (b < high))))
        weight, low, high = np.where(better, [w, a, b], [weight, low, high])
        left = np.flatnonzero(outside)
        newest = left[np.lexsort((high[left], low[left], weight[left]))[0]]
        edges.append((weight[newest], int(low[newest]), int(high[newest])))
    edges.sort()
    return np.array([e[1:] for e in edges]).reshape(-1, 2), np.array([e[0] for e in edges])


def labels_with_ties_merged(ends: np.ndarray, weights: np.ndarray, min_cluster_size: int) -> np.ndarray:
    """Excess of mass on the hierarchy in which all edges of equal weight merge at once.

    Such a hierarchy does not depend on the order of equal edges, so exact implementations must agree on it.
    """
    n = len(weights) + 1
    order = np.argsort(weights, kind="stable")
    ends, weights = ends[order].tolist(), weights[order].tolist()
    parent = list(range(n))

    def find(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    children: list[list[int]] = [[] for _ in range(n)]  # of nodes; the first n are points
    height, size, node = [0.0] * n, [1] * n, list(range(n))
    start = 0
    while start < n - 1:
        stop = start
        while stop < n - 1 and weights[stop] == weights[start]:
            stop += 1
        old_roots = {find(x) for pair in ends[start:stop] for x in pair}
        for a, b in ends[start:stop]:
            parent[find(a)] = find(b)
        merged: dict[int, list[int]] = {}
        for root in sorted(old_roots):
            merged.setdefault(find(root), []).append(node[root])
        for root, parts in merged.items():
            node[root] = len(children)
            children.append(parts)
            height.append(weights[start])
            size.append(sum(size[p] for p in parts))
        start = stop
    return _excess_of_mass(children, height, size, n, min_cluster_size)


def _excess_of_mass(children, height, size, n, min_cluster_size):
    birth, stability, parents, kids, cluster_of = [0.0], [0.0], [-1], [[]], [0] * n
    stack = [(len(children) - 1, 0)]
    while stack:
        at, cluster = stack.pop()
        if at < n:
            cluster_of[at] = cluster
            continue
        density = 1.0 / height[at] if height[at] > 0 else np.inf
        survivors = [c for c in children[at] if size[c] >= min_cluster_size]
        for child in children[at]:
            if len(survivors) == 1 and child == survivors[0]:
                stack.append((child, cluster))
                continue
            stability[cluster] += (density - birth[cluster]) * size[child]
            if size[child] >= min_cluster_size:
                birth.append(density)
                stability.append(0.0)
                parents.append(cluster)
                kids.append([])
                kids[cluster].append(len(birth) - 1)
                stack.append((child, len(birth) - 1))
            else:
                below = [child]
                while below:
                    x = below.pop()
                    if x < n:
                        cluster_of[x] = cluster
                    else:
                        below.extend(children[x])
    chosen = [False] + [True] * (len(birth) - 1)
    for c in range(len(birth) - 1, 0, -1):
        together = sum(stability[k] for k in kids[c])
        if together > stability[c]:
            chosen[c], stability[c] = False, together
        else:
            below = list(kids[c])
            while below:
                k = below.pop()
                chosen[k] = False
                below.extend(kids[k])
    label, count = [-1] * len(birth), 0
    for c in range(1, len(birth)):
        if chosen[c]:
            label[c], count = count, count + 1
        else:
            label[c] = label[parents[c]]
    return np.array([label[c] for c in cluster_of])


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labellings differ by nothing but the names of the clusters; noise (-1) is noise."""
    if not np.array_equal(a < 0, b < 0):
        return False
    pairs = np.unique(np.stack([a, b]), axis=1)
    return len(np.unique(pairs[0])) == pairs.shape[1] == len(np.unique(pairs[1]))


def temporal_overlap(
    predicted: np.ndarray,  # [S, H, W]
    truth: np.ndarray,  # [S, H, W]
    ignore: int = 0,
    threshold: float = 0.5,
) -> tuple[float, float, int]:
    """T-mIoU, T-SR and the number of instances, one pair of masks at a time."""

    def iou(a: np.ndarray, b: np.ndarray) -> float:
        return (a & b).sum() / (a | b).sum()

    instances = [g for g in np.unique(truth) if g != ignore]
    clusters = [p for p in np.unique(predicted) if p >= 0]
    means, successes = [], []
    for g in instances:
        mask = truth == g
        views = mask.any((1, 2))
        if clusters:
            best = max(clusters, key=lambda p: iou(mask.any(0), (predicted == p).any(0)))
            per_view = [iou(mask[v], predicted[v] == best) for v in np.flatnonzero(views)]
        else:
            per_view = [0.0] * int(views.sum())
        means.append(np.mean(per_view))
        successes.append(min(per_view) >= threshold)
    if not instances:
        return np.nan, np.nan, 0
    return float(np.mean(means)), float(np.mean(successes)), len(instances)
