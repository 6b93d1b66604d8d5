"""Losses row by row from the papers' formulas, in float64: slow, to test dist_scan/losses.py."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(a: Tensor, n: Tensor, entropy_weight: float) -> Tensor:
    """One head, logits [B, C]: -mean log sum_c p q - entropy_weight * H(mean p)."""
    log_p, log_q = a.double().log_softmax(1), n.double().log_softmax(1)
    log_products = [torch.logsumexp(log_p[i] + log_q[i], 0) for i in range(len(a))]
    mean = log_p.exp().mean(0).clamp(min=1e-8)
    return -torch.stack(log_products).mean() + entropy_weight * (mean * mean.log()).sum()


def nt_xent(first: Tensor, second: Tensor, temperature: float, symmetric: bool) -> Tensor:
    """Anchor by anchor; the 2 B - 1 others are candidates."""
    both, b = torch.cat([first, second]).double(), len(first)
    losses = []
    for i in range(2 * b if symmetric else b):
        logits = torch.stack([both[i] @ both[j] / temperature for j in range(2 * b) if j != i])
        positive = both[i] @ both[(i + b) % (2 * b)] / temperature
        losses.append(torch.logsumexp(logits, 0) - positive)
    return torch.stack(losses).mean()


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Row by row."""
    losses = []
    for q, k in zip(queries.double(), keys.double()):
        logits = torch.cat([(q @ k)[None], queue.double() @ q]) / temperature
        losses.append(torch.logsumexp(logits, 0) - logits[0])
    return torch.stack(losses).mean()


def confident(strong: Tensor, weak: Tensor, threshold: float, class_balance: bool) -> Tensor:
    """As the released code: mean cross-entropy of confident rows, with weights n / n_c."""
    p, labels = weak.double().softmax(1).max(1)
    mask = p > threshold
    counts = [int((labels[mask] == c).sum()) for c in range(weak.shape[1])]
    weights = [sum(counts) / c if c and class_balance else 1.0 for c in counts]
    return torch.nn.functional.cross_entropy(
        strong.double()[mask], labels[mask], torch.tensor(weights, dtype=torch.float64)
    )


def temi(
    student: list[Tensor], teacher: list[Tensor], marginals: list[Tensor], beta: float
) -> Tensor:
    """Per head [H]: mean over pairs and directions of -w log sum_c (s t)^beta / m.

    Student and teacher: logits [2B, C] per head, divided by the temperature.
    """
    s = [logits.double().softmax(1) for logits in student]
    t = [logits.double().softmax(1) for logits in teacher]
    b = len(s[0]) // 2
    weights = [sum(float(x[i] @ x[i + b]) for x in t) / len(t) for i in range(b)]
    losses = []
    for h, marginal in enumerate(marginals):
        terms = []
        for i, w in enumerate(weights):
            for x, other in ((i, i + b), (i + b, i)):
                ratios = (s[h][x] * t[h][other]) ** beta / marginal.double()
                terms.append(-w * ratios.sum().log())
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)
