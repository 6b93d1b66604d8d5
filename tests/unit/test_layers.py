"""Layers: heads in one product, batch norm by groups, the momentum copy, normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dist_scan.heads.linear import ClusterHeads
from dist_scan.models.batch_norm import GroupedBatchNorm, convert_batch_norm
from dist_scan.models.layers import FeatureNorm, MomentumCopy, Sobel


def test_heads_equal_separate_linears_and_differ() -> None:
    heads, x = ClusterHeads(6, (4, 7), 3), torch.randn(5, 6)
    out = heads(x)
    assert [o.shape for o in out] == [(5, 4)] * 3 + [(5, 7)] * 3
    for h in range(6):
        at = heads.rows(h)
        torch.testing.assert_close(
            out[h], nn.functional.linear(x, heads.weight[at], heads.bias[at])
        )
        torch.testing.assert_close(heads.head_logits(h, x), out[h])
    assert not torch.equal(heads.weight[heads.rows(0)], heads.weight[heads.rows(1)])
    assert heads.weight.abs().max() <= 1 / 6**0.5  # torch's default init for a Linear of width 6


def test_heads_stay_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        heads = ClusterHeads(6, 4, 2)
        assert (
            heads(torch.randn(3, 6).bfloat16())[0].dtype
            == heads.head_logits(1, torch.randn(3, 6).bfloat16()).dtype
            == torch.float32
        )


def test_split_batch_norm_equals_ordinary_norm_of_each_part() -> None:
    x = torch.randn(8, 3, 4, 4)
    whole, parts = nn.BatchNorm2d(3), [nn.BatchNorm2d(3) for _ in range(4)]
    grouped = convert_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), 4)[0]
    assert isinstance(grouped, GroupedBatchNorm)
    torch.testing.assert_close(grouped(x), torch.cat([p(c) for p, c in zip(parts, x.chunk(4))]))
    torch.testing.assert_close(
        grouped.running_var, torch.stack([p.running_var for p in parts]).mean(0)
    )
    one = convert_batch_norm(nn.BatchNorm2d(3), 1)
    torch.testing.assert_close(one(x), whole(x))
    torch.testing.assert_close(one.eval()(x), whole.eval()(x))
    with pytest.raises(ValueError, match="divisor of global_batch"):
        convert_batch_norm(nn.BatchNorm2d(3), 3)(x)


def test_convert_keeps_names_and_tensors() -> None:
    old = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {k: v.data_ptr() for k, v in old.state_dict().items()}
    assert {k: v.data_ptr() for k, v in convert_batch_norm(old, 2).state_dict().items()} == before


def test_fused_norms_keep_their_activation() -> None:
    from timm.layers import BatchNormAct2d

    norm, x = BatchNormAct2d(3), torch.randn(4, 3, 2, 2)
    expected = norm(x)
    torch.testing.assert_close(convert_batch_norm(norm, 1)(x), expected)
    assert expected.min() == 0


def test_momentum_copy_averages_parameters_not_buffers() -> None:
    source = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    copy = MomentumCopy(source, 0.9)
    before = copy.module[0].weight.clone()
    with torch.no_grad():
        source[0].weight += 1
        source[1].running_mean += 5
    copy.update(source)
    torch.testing.assert_close(copy.module[0].weight, before + 0.1)
    assert not copy.module[1].running_mean.any()
    copy(torch.randn(4, 2) + 3)
    assert copy.module[1].running_mean.any() and not any(p.requires_grad for p in copy.parameters())


def test_feature_norm() -> None:
    x = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    x[:, 3] = 1.0
    out = FeatureNorm("standardise", 4, x.mean(0), x.std(0))(torch.from_numpy(x))
    torch.testing.assert_close(out[:, :3].std(0, correction=0), torch.ones(3), rtol=1e-4, atol=1e-4)
    assert out[:, 3].abs().max() < 0.1
    assert torch.allclose(FeatureNorm("l2", 4)(torch.from_numpy(x)).norm(dim=1), torch.ones(50))


def test_sobel_of_an_edge() -> None:
    image = torch.zeros(1, 3, 5, 6)
    image[..., 3:] = 1
    out = Sobel()(image)
    assert out.shape == (1, 2, 5, 6) and out[0, 0, 2, 2] == -4 and out[0, 1, 2, 2] == 0
