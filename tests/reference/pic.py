"""Power iteration clustering the slow, obvious way: a dense graph and loops."""

import math

import numpy as np


def pic(ids, squared, sigma, alpha, iterations, teleport):
    """(assignment, rows joined) from neighbours [N, K] and their squared distances."""
    n = len(ids)
    a = np.zeros((n, n))
    for i in range(n):
        for j, d2 in zip(ids[i], squared[i]):
            a[i, j] = math.exp(-d2 / sigma**2)
    graph = a + a.T
    v = np.full(n, 1 / n)
    for _ in range(iterations):
        v = alpha * (graph @ v) + (1 - alpha) * (v if teleport == "paper" else 1 / n)
        v = v / v.sum()
    root = []
    for i in range(n):
        at, moved = i, True
        while moved:
            moved, best, to = False, 0.0, at
            for j in range(n):
                pull = graph[at, j] * (v[j] - v[at])
                if pull > best:
                    best, to, moved = pull, j, True
            at = to
        root.append(at)
    members = {r: [i for i in range(n) if root[i] == r] for r in set(root)}
    final, joined = list(root), 0
    for i in range(n):
        if len(members[root[i]]) == 1:
            larger = [j for j in ids[i] if len(members[root[j]]) > 1]
            if larger:
                final[i], joined = root[larger[0]], joined + 1
    names = {r: c for c, r in enumerate(sorted(set(final)))}
    return np.array([names[r] for r in final]), joined
