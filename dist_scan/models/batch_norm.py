"""Batch norm whose statistics belong to parts of the global batch, whatever the number of ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_scan.world.collectives import all_mean, all_sum
from dist_scan.world.world import current


class GroupedBatchNorm(_BatchNorm):
    """Statistics over `groups` contiguous equal parts of the global batch (the ranks' rows in rank order).

    groups=1 is SyncBN, groups=W the ordinary batch norm of W ranks, more groups than ranks MoCo's split batch norm. Groups and
    ranks: one must divide the other. torch's SyncBatchNorm refuses the CPU. Running statistics move by the mean over groups.
    """

    def __init__(self, *args, groups: int = 1, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups
        self.after: nn.Module | None = (
            None  # what a fused layer does after the norm (timm's BatchNormAct2d)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.running_mean is None:
            out = F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.running_mean is None,
                0.0,
                self.eps,
            )
        else:
            check_groups(self.groups, current().world_size)
            out = self._local(x) if self.groups >= current().world_size else self._spanning(x)
        return out if self.after is None else self.after(out)

    def _rate(self) -> float:
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _local(self, x: Tensor) -> Tensor:
        """Every group lies inside this rank."""
        count, rate = self.groups // current().world_size, self._rate()
        if count == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, rate, self.eps
            )
        if len(x) % count:
            raise ValueError(
                f"bn_groups: {self.groups} groups do not divide {len(x) * current().world_size} rows; "
                "allowed: a divisor of global_batch"
            )
        means = [self.running_mean.clone() for _ in range(count)]
        variances = [self.running_var.clone() for _ in range(count)]
        out = torch.cat(
            [
                F.batch_norm(part, m, v, self.weight, self.bias, True, rate, self.eps)
                for part, m, v in zip(x.chunk(count), means, variances)
            ]
        )
        with torch.no_grad():
            self.running_mean.copy_(torch.stack(means).mean(0))
            self.running_var.copy_(torch.stack(variances).mean(0))
        return out

    def _spanning(self, x: Tensor) -> Tensor:
        """Every group spans world_size / groups ranks."""
        out, mean, var = _Spanning.apply(x, self.weight, self.bias, self.eps, self.groups)
        rate = self._rate()
        with torch.no_grad():
            rows = x.numel() // x.shape[1] * (current().world_size // self.groups)
            self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), rate)
            self.running_var.lerp_(
                (var.mean(0) * (rows / max(rows - 1, 1))).to(self.running_var.dtype), rate
            )
        return out


class _Spanning(torch.autograd.Function):
    """Batch norm over groups of ranks. One message forward, one backward; keeps the input only, as torch's own does."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, groups):
        wide = x if x.dtype == torch.float64 else x.float()
        axes = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(wide, axes, correction=0)
        # ranks' first and second moments add up; float64, so that subtracting the squared mean costs nothing
        mean, square = _over_groups(
            torch.stack([mean.double(), var.double() + mean.double() ** 2]), groups
        ).unbind(1)
        var = (square - mean**2).clamp(min=0)  # [groups, C]
        own = current().rank * groups // current().world_size
        centre, invstd = mean[own].to(wide.dtype), (var[own] + eps).rsqrt().to(wide.dtype)
        ctx.save_for_backward(x, weight, centre, invstd)
        ctx.groups, ctx.axes = groups, axes
        ctx.mark_non_differentiable(mean, var)
        shape = [1, -1] + [1] * (x.dim() - 2)
        out = (wide - centre.view(shape)) * invstd.view(shape)
        if weight is not None:
            out = out * weight.to(wide.dtype).view(shape) + bias.to(wide.dtype).view(shape)
        return out.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, centre, invstd = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide, g = x.to(centre.dtype), grad.to(centre.dtype)
        normal = (wide - centre.view(shape)) * invstd.view(shape)
        sums = torch.stack(
            [g.sum(ctx.axes), (g * normal).sum(ctx.axes)]
        )  # gradients of bias and weight
        own = current().rank * ctx.groups // current().world_size
        mean_g, mean_gn = (
            _over_groups(sums.double(), ctx.groups)[own] / (x.numel() // x.shape[1])
        ).to(centre.dtype)
        scale = invstd if weight is None else invstd * weight.to(centre.dtype)
        dx = (g - mean_g.view(shape) - normal * mean_gn.view(shape)) * scale.view(shape)
        if weight is None:
            return dx.to(x.dtype), None, None, None, None
        return dx.to(x.dtype), sums[1].to(weight.dtype), sums[0].to(weight.dtype), None, None


def _over_groups(x: Tensor, groups: int) -> Tensor:
    """x of this rank -> [groups, *x.shape], the mean over each group's ranks."""
    world = current()
    slots = x.new_zeros((groups, *x.shape))
    slots[world.rank * groups // world.world_size] = x
    return all_sum(slots) / (world.world_size // groups)


def check_groups(groups: int, world_size: int, global_batch: int | None = None) -> None:
    """Raises ValueError unless groups and ranks divide one another, and (when a batch is given) the groups divide it."""
    if groups < 1 or (groups % world_size and world_size % groups):
        raise ValueError(
            f"bn_groups: {groups} and {world_size} ranks: one must divide the other; "
            f"allowed: divisors and multiples of {world_size}"
        )
    if global_batch is not None and global_batch % groups:
        raise ValueError(
            f"bn_groups: {groups} does not divide global_batch {global_batch}; allowed: a divisor of it"
        )


def convert_batch_norm(module: nn.Module, groups: int) -> nn.Module:
    """Replace every BatchNorm1d/2d by a GroupedBatchNorm that holds the same parameters and buffers under the same names."""
    for name, child in list(module.named_children()):
        setattr(module, name, convert_batch_norm(child, groups))
    if isinstance(module, GroupedBatchNorm):
        module.groups = groups
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return _converted(module, groups)
    return module


def _converted(old: nn.Module, groups: int) -> GroupedBatchNorm:
    new = GroupedBatchNorm(
        old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, groups=groups
    )
    new._parameters, new._buffers, new.training = old._parameters, old._buffers, old.training
    rest = [m for m in (getattr(old, "drop", None), getattr(old, "act", None)) if m is not None]
    if rest:
        new.after = nn.Sequential(*rest)
    return new


@torch.no_grad()
def sync_running_stats(module: nn.Module) -> None:
    """Make running statistics equal on all ranks: their mean, in one message. The engine calls it after each step."""
    if current().world_size == 1:
        return
    stats = [
        b
        for m in module.modules()
        if isinstance(m, GroupedBatchNorm) and m.groups >= current().world_size
        for b in (m.running_mean, m.running_var)
        if b is not None
    ]
    if not stats:
        return
    flat = all_mean(torch.cat([s.reshape(-1) for s in stats]))
    for buffer, mean in zip(stats, flat.split([s.numel() for s in stats])):
        buffer.copy_(mean.view_as(buffer))
