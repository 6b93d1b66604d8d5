"""Batch norm over parts of the global batch, independent of the number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_scan.world.collectives import all_mean, all_sum
from dist_scan.world.world import current


class GroupedBatchNorm(_BatchNorm):
    """Batch norm with the statistics of `groups` contiguous equal parts of the global batch.

    The global batch is the rows of all ranks in rank order. groups=1 is SyncBN (PyTorch's does
    not run on a CPU), groups=W the ordinary batch norm of W ranks, and more groups than ranks
    MoCo's split batch norm. Of groups and ranks, one must divide the other. Running statistics
    move by the mean over groups.
    """

    def __init__(self, *args: Any, groups: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups
        self.after: nn.Module | None = None
        """What a fused layer does after the norm (timm's BatchNormAct2d)."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if not self.training or mean is None or var is None:
            use_batch_statistics = mean is None
            out = F.batch_norm(
                x, mean, var, self.weight, self.bias, use_batch_statistics, 0.0, self.eps
            )
        else:
            if self.groups >= current().world_size:
                out = self._normalise_local_groups(x, mean, var)
            else:
                out = self._normalise_groups_of_ranks(x, mean, var)
        return out if self.after is None else self.after(out)

    def _count_batch_and_momentum(self) -> float:
        """Count a batch; returns the weight of its statistics in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _normalise_local_groups(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> Tensor:
        """Every group is a part of this rank's rows."""
        count = self.groups // current().world_size
        momentum = self._count_batch_and_momentum()
        if count == 1:
            return F.batch_norm(
                x, running_mean, running_var, self.weight, self.bias, True, momentum, self.eps
            )
        # Each group updates its own copy of the running statistics.
        means = [running_mean.clone() for _ in range(count)]
        variances = [running_var.clone() for _ in range(count)]
        parts = [
            F.batch_norm(part, mean, var, self.weight, self.bias, True, momentum, self.eps)
            for part, mean, var in zip(x.chunk(count), means, variances)
        ]
        with torch.no_grad():
            running_mean.copy_(torch.stack(means).mean(0))
            running_var.copy_(torch.stack(variances).mean(0))
        return torch.cat(parts)

    def _normalise_groups_of_ranks(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> Tensor:
        """Every group is the rows of world_size / groups ranks."""
        out, mean, var = _BatchNormOverRanks.apply(x, self.weight, self.bias, self.eps, self.groups)
        momentum = self._count_batch_and_momentum()
        with torch.no_grad():
            rows = x.numel() // x.shape[1] * (current().world_size // self.groups)
            unbiased_var = var.mean(0) * (rows / max(rows - 1, 1))
            running_mean.lerp_(mean.mean(0).to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased_var.to(running_var.dtype), momentum)
        return out


class _BatchNormOverRanks(torch.autograd.Function):
    """Batch norm over groups of ranks: (output, mean [groups, C], variance [groups, C]).

    One message forward and one backward. Keeps only the input, as PyTorch's own does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        axes = [d for d in range(x.dim()) if d != 1]
        # E[x] and E[x^2] average over ranks. In float64, so that E[x^2] - E[x]^2 loses no digits.
        local_var, local_mean = torch.var_mean(wide, axes, correction=0)
        local_mean = local_mean.double()
        local_moments = torch.stack([local_mean, local_var.double() + local_mean**2])
        mean, square = _mean_over_groups(local_moments, groups).unbind(1)
        var = (square - mean**2).clamp(min=0)
        # Normalise by the statistics of this rank's group.
        group = _group_of_rank(groups)
        centre = mean[group].to(wide.dtype)
        inverse_std = (var[group] + eps).rsqrt().to(wide.dtype)
        ctx.save_for_backward(x, weight, centre, inverse_std)
        ctx.groups = groups
        ctx.axes = axes
        ctx.mark_non_differentiable(mean, var)
        shape = _channel_shape(x)
        out = (wide - centre.view(shape)) * inverse_std.view(shape)
        if weight is not None and bias is not None:
            out = out * weight.to(wide.dtype).view(shape) + bias.to(wide.dtype).view(shape)
        return out.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, centre, inverse_std = ctx.saved_tensors
        shape = _channel_shape(x)
        wide, g = x.to(centre.dtype), grad.to(centre.dtype)
        normalised = (wide - centre.view(shape)) * inverse_std.view(shape)
        dbias = g.sum(ctx.axes)
        dweight = (g * normalised).sum(ctx.axes)
        # Means of both over the rows of this rank's group
        sums = _mean_over_groups(torch.stack([dbias, dweight]).double(), ctx.groups)
        group_sums = sums[_group_of_rank(ctx.groups)]
        mean_g, mean_g_normalised = (group_sums / (x.numel() // x.shape[1])).to(centre.dtype)
        scale = inverse_std if weight is None else inverse_std * weight.to(centre.dtype)
        dx = g - mean_g.view(shape) - normalised * mean_g_normalised.view(shape)
        dx = (dx * scale.view(shape)).to(x.dtype)
        if weight is None:
            return dx, None, None, None, None
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None


def _channel_shape(x: Tensor) -> list[int]:
    """Shape of a vector over channels that broadcasts to x [B, C, ...]."""
    return [1, -1] + [1] * (x.dim() - 2)


def _group_of_rank(groups: int) -> int:
    return current().rank * groups // current().world_size


def _mean_over_groups(x: Tensor, groups: int) -> Tensor:
    """x of each rank -> [groups, *x.shape], the mean over the ranks of each group."""
    slots = x.new_zeros((groups, *x.shape))
    slots[_group_of_rank(groups)] = x
    return all_sum(slots) / (current().world_size // groups)


def check_groups(groups: int, world_size: int, global_batch: int) -> None:
    """Raise ValueError unless groups and ranks divide one another, and groups a given batch."""
    if groups < 1 or (groups % world_size and world_size % groups):
        raise ValueError(
            f"bn_groups: {groups} and {world_size} ranks: one must divide the other; "
            f"allowed: divisors and multiples of {world_size}"
        )
    if global_batch % groups:
        raise ValueError(
            f"bn_groups: {groups} does not divide global_batch {global_batch}; "
            "allowed: a divisor of it"
        )


def convert_batch_norm(module: nn.Module, groups: int) -> nn.Module:
    """Replace every BatchNorm1d/2d by a GroupedBatchNorm with the same parameters and buffers."""
    for name, child in list(module.named_children()):
        setattr(module, name, convert_batch_norm(child, groups))
    if isinstance(module, GroupedBatchNorm):
        module.groups = groups
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return _to_grouped(module, groups)
    return module


def _to_grouped(old: nn.BatchNorm1d | nn.BatchNorm2d, groups: int) -> GroupedBatchNorm:
    new = GroupedBatchNorm(
        old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, groups=groups
    )
    # The same tensors under the same names
    new._parameters = old._parameters
    new._buffers = old._buffers
    new.training = old.training
    fused = [getattr(old, name, None) for name in ("drop", "act")]
    after = [layer for layer in fused if layer is not None]
    if after:
        new.after = nn.Sequential(*after)
    return new


@torch.no_grad()
def sync_running_stats(module: nn.Module) -> None:
    """Replace running statistics by their mean over ranks, in one message, after a step."""
    if current().world_size == 1:
        return
    statistics: list[Tensor] = []
    for layer in module.modules():
        # With fewer groups than ranks they are equal already.
        if isinstance(layer, GroupedBatchNorm) and layer.groups >= current().world_size:
            buffers = (layer.running_mean, layer.running_var)
            statistics += [buffer for buffer in buffers if buffer is not None]
    if not statistics:
        return
    flat = all_mean(torch.cat([buffer.reshape(-1) for buffer in statistics]))
    for buffer, mean in zip(statistics, flat.split([b.numel() for b in statistics])):
        buffer.copy_(mean.view_as(buffer))
