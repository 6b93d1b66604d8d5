"""Cluster heads, batch norm by groups, momentum copy, feature normalisation and Sobel filter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dist_scan.heads.linear import ClusterHeads
from dist_scan.models.batch_norm import GroupedBatchNorm, check_groups, convert_batch_norm
from dist_scan.models.layers import FeatureNorm, MomentumCopy, Sobel


def test_heads_equal_separate_linear_layers_and_differ() -> None:
    heads, x = ClusterHeads(6, (4, 7), 3), torch.randn(5, 6)
    logits = heads(x)
    assert [x.shape for x in logits] == [(5, 4)] * 3 + [(5, 7)] * 3
    for h in range(6):
        rows = heads.slices[h]
        expected = nn.functional.linear(x, heads.weight[rows], heads.bias[rows])
        torch.testing.assert_close(logits[h], expected)
        torch.testing.assert_close(heads.head_logits(h, x), expected)
    assert not torch.equal(heads.weight[heads.slices[0]], heads.weight[heads.slices[1]])
    default_bound = 1 / 6**0.5  # of a Linear layer of width 6
    assert heads.weight.abs().max() <= default_bound


def test_heads_stay_float32_under_autocast() -> None:
    x = torch.randn(3, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        heads = ClusterHeads(6, 4, 2)
        assert heads(x)[0].dtype == torch.float32
        assert heads.head_logits(1, x).dtype == torch.float32


def test_split_batch_norm_equals_ordinary_batch_norm_of_each_part() -> None:
    x = torch.randn(8, 3, 4, 4)
    parts = [nn.BatchNorm2d(3) for _ in range(4)]
    grouped = convert_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), 4)[0]
    assert isinstance(grouped, GroupedBatchNorm)
    expected = torch.cat([norm(chunk) for norm, chunk in zip(parts, x.chunk(4))])
    torch.testing.assert_close(grouped(x), expected)
    running_var = torch.stack([norm.running_var for norm in parts]).mean(0)
    torch.testing.assert_close(grouped.running_var, running_var)


def test_batch_norm_with_one_group_is_ordinary_batch_norm() -> None:
    x = torch.randn(8, 3, 4, 4)
    ordinary, grouped = nn.BatchNorm2d(3), convert_batch_norm(nn.BatchNorm2d(3), 1)
    torch.testing.assert_close(grouped(x), ordinary(x))
    torch.testing.assert_close(grouped.eval()(x), ordinary.eval()(x))


def test_groups_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="3 does not divide global_batch 8"):
        check_groups(groups=3, world_size=1, global_batch=8)


def test_converting_batch_norm_keeps_names_and_tensors() -> None:
    old = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    addresses = {name: x.data_ptr() for name, x in old.state_dict().items()}
    new = convert_batch_norm(old, 2)
    assert {name: x.data_ptr() for name, x in new.state_dict().items()} == addresses


def test_fused_batch_norm_keeps_its_activation() -> None:
    from timm.layers import BatchNormAct2d

    norm, x = BatchNormAct2d(3), torch.randn(4, 3, 2, 2)
    expected = norm(x)
    torch.testing.assert_close(convert_batch_norm(norm, 1)(x), expected)
    assert expected.min() == 0


def test_momentum_copy_averages_parameters_but_not_buffers() -> None:
    linear, norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
    source = nn.Sequential(linear, norm)
    average = MomentumCopy(source, 0.9)
    before = linear.weight.detach().clone()
    assert norm.running_mean is not None
    with torch.no_grad():
        linear.weight += 1
        norm.running_mean += 5
    average.update(source)
    state = average.module.state_dict()
    torch.testing.assert_close(state["0.weight"], before + 0.1)
    assert not state["1.running_mean"].any()
    average(torch.randn(4, 2) + 3)
    assert state["1.running_mean"].any(), "its statistics come from its own forward passes"
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_feature_norm() -> None:
    x = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    x[:, 3] = 1.0
    features = torch.from_numpy(x)
    standardised = FeatureNorm("standardise", 4, x.mean(0), x.std(0))(features)
    std = standardised[:, :3].std(0, correction=0)
    torch.testing.assert_close(std, torch.ones(3), rtol=1e-4, atol=1e-4)
    assert standardised[:, 3].abs().max() < 0.1, "a constant dimension stays small"
    assert torch.allclose(FeatureNorm("l2", 4)(features).norm(dim=1), torch.ones(50))
    assert FeatureNorm("none", 4)(features) is features


def test_sobel_of_an_edge() -> None:
    image = torch.zeros(1, 3, 5, 6)
    image[..., 3:] = 1
    edges = Sobel()(image)
    assert edges.shape == (1, 2, 5, 6)
    assert edges[0, 0, 2, 2] == -4
    assert edges[0, 1, 2, 2] == 0
