"""Slow, obvious float64 losses, row by row from the papers' formulas, to hold dist_scan/losses.py against."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(a: Tensor, n: Tensor, weight: float) -> Tensor:
    """One head, logits [B, C]: -mean log sum_c p q - weight * H(mean p); differentiable, float64 log space, no tricks of the product."""
    log_p, log_q = a.double().log_softmax(1), n.double().log_softmax(1)
    consistency = -torch.stack(
        [torch.logsumexp(log_p[i] + log_q[i], 0) for i in range(len(a))]
    ).mean()
    mean = log_p.exp().mean(0).clamp(min=1e-8)
    return consistency + weight * (mean * mean.log()).sum()


def nt_xent(first: Tensor, second: Tensor, t: float, symmetric: bool) -> Tensor:
    """Anchor by anchor; the 2B-1 others are candidates."""
    both, b = torch.cat([first, second]).double(), len(first)
    losses = []
    for i in range(2 * b if symmetric else b):
        others = [j for j in range(2 * b) if j != i]
        exponents = torch.stack([both[i] @ both[j] / t for j in others])
        losses.append(torch.logsumexp(exponents, 0) - both[i] @ both[(i + b) % (2 * b)] / t)
    return torch.stack(losses).mean()


def info_nce(q: Tensor, k: Tensor, queue: Tensor, t: float) -> Tensor:
    """Row by row."""
    q, k, queue = q.double(), k.double(), queue.double()
    return torch.stack(
        [
            torch.logsumexp(torch.cat([(q[i] @ k[i])[None], queue @ q[i]]) / t, 0) - q[i] @ k[i] / t
            for i in range(len(q))
        ]
    ).mean()


def confident(strong: Tensor, weak: Tensor, threshold: float, balance: bool) -> Tensor:
    """As the released code: weights n / n_c, F.cross_entropy's weighted mean over the confident rows."""
    p, labels = weak.double().softmax(1).max(1)
    keep = p > threshold
    counts = [int((labels[keep] == c).sum()) for c in range(weak.shape[1])]
    n = sum(counts)
    weight = torch.tensor([n / c if c and balance else 1.0 for c in counts], dtype=torch.float64)
    return torch.nn.functional.cross_entropy(strong.double()[keep], labels[keep], weight)


def temi(
    student: list[Tensor], teacher: list[Tensor], marginals: list[Tensor], beta: float
) -> Tensor:
    """Per head, mean over pairs and directions of -w log sum_c (s t)^beta / m; student and teacher [2B, C] logits (temperature inside)."""
    s, t = ([x.double().softmax(1) for x in heads] for heads in (student, teacher))
    b = len(s[0]) // 2
    weights = [sum(float(x[i] @ x[i + b]) for x in t) / len(t) for i in range(b)]
    out = []
    for h in range(len(s)):
        pmi = lambda i, j: ((s[h][i] * t[h][j]) ** beta / marginals[h].double()).sum().log()  # noqa: E731
        out.append(
            -torch.stack(
                [w * (pmi(i, i + b) + pmi(i + b, i)) / 2 for i, w in enumerate(weights)]
            ).mean()
        )
    return torch.stack(out)
