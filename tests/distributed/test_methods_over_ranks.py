"""W ranks with B/W images equal 1 rank with B: losses, gradients and, after some steps, everything a method remembers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.ranks import run_ranks

B, STEPS = 24, 3
CASES = {
    "simclr": dict(temperature=0.2, projection_dim=8),
    "simclr-symmetric": dict(temperature=0.2, projection_dim=8, symmetric=True),
    "moco": dict(queue_size=48, projection_dim=8, bn_groups=12, momentum=0.9),
    "moco-symmetric": dict(queue_size=48, projection_dim=8, bn_groups=12, symmetric=True),
    "scan": dict(num_clusters=4, num_heads=3, normalise="l2"),
    "scan-frozen": dict(num_clusters=4, num_heads=3, normalise="none", train_backbone=False),
    "scan-features": dict(num_clusters=4, num_heads=3, normalise="standardise"),
    "scan-features-numbers": dict(num_clusters=(4, 6), num_heads=2, normalise="standardise"),
    "temi-features": dict(num_clusters=(4, 6), num_heads=2, momentum=0.9),
    "selflabel": dict(threshold=0.4, ema=None),
    "selflabel-teacher": dict(threshold=0.4, ema=0.9, class_balance=False),
    "rotnet": dict(),
    "nce": dict(projection_dim=8, temperature=0.2),
    "selflabel-released": dict(threshold=0.4, ema=0.9, ema_meaning="released"),
}


def make(name: str, folder):
    """The method in float64, the same on every rank, from a tiny network."""
    from dist_scan.methods.base import MethodInputs, method_class
    from dist_scan.models.backbone import BackboneConfig, build_backbone

    torch.manual_seed(0)
    config, kind = BackboneConfig(name="resnet_small", width=4), name.split("-")[0]
    features = "features" in name
    inputs = MethodInputs(
        num_images=100,
        global_batch=B,
        seed=3,
        on_features=features,
        feature_dim=16,
        backbone=build_backbone(config),
        backbone_config=config,
        input_folders={"model": folder},
        feature_mean=np.full(16, 0.1) if features else None,
        feature_std=np.full(16, 2.0) if features else None,
    )
    cls = method_class(kind)
    return cls(cls.Config(kind=kind, **CASES[name]), inputs).double()


def train(name: str, folder, skip_step: int = -1):
    """Losses (means over ranks), the first gradient, and the state after STEPS steps of SGD through DDP."""
    from dist_scan.data.batch import Batch, HeldOut
    from dist_scan.models.batch_norm import sync_running_stats
    from dist_scan.world.collectives import all_mean
    from dist_scan.world.world import current, wrap_ddp

    method, world = make(name, folder), current()
    network, mine = (
        wrap_ddp(method),
        slice(world.rank * B // world.world_size, (world.rank + 1) * B // world.world_size),
    )
    optimizer = torch.optim.SGD(
        [p for g in method.parameter_groups() for p in g.parameters], lr=0.02, momentum=0.9
    )
    gen, losses, first = torch.Generator().manual_seed(1), [], {}
    shape = (B, 16) if "features" in name else (B, 3, 8, 8)
    for s in range(STEPS):
        views = [torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(2)]
        if s == skip_step:
            method.config = method.config.model_copy(update={"threshold": 0.999999})
        batch = Batch(torch.arange(B)[mine], tuple(v[mine] for v in views), 0, s)
        method.train()
        step = network(batch)
        if s == skip_step:
            assert step.skip
            method.config = method.config.model_copy(update={"threshold": 0.4})
            continue
        step.loss.backward()
        losses.append(float(all_mean(step.loss.detach())))
        first = first or {
            n: p.grad.clone().numpy() for n, p in method.named_parameters() if p.requires_grad
        }
        optimizer.step()
        method.end_step(batch, step)
        sync_running_stats(method)
        optimizer.zero_grad()
    held = torch.randn((9, *shape[1:]), generator=gen, dtype=torch.float64)
    part = np.array_split(np.arange(9), world.world_size)[world.rank]
    neighbours = np.array([[1, 5], [6, 8], [0, 7], [4, 4]])
    method.eval()
    logged = method.end_epoch(
        0, HeldOut(lambda: iter([Batch(torch.from_numpy(part), (held[part],), 0, 0)]), neighbours)
    )
    return losses, first, {k: v.numpy() for k, v in method.state_dict().items()}, logged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    from dist_scan.models.backbone import BackboneConfig, build_backbone
    from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
    from dist_scan.models.layers import FeatureNorm

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(7)
    config = BackboneConfig(name="resnet_small", width=4)
    save_cluster_model(
        path,
        ClusterModel(build_backbone(config), FeatureNorm("none", 16), nn.Linear(16, 4), config),
    )
    return path


def close(a, b, what) -> None:
    scale = max(float(np.abs(b).max()), 1e-3) if np.size(b) else 1.0
    assert np.allclose(a, b, rtol=1e-6, atol=1e-6 * scale, equal_nan=True), (
        f"{what}: {np.abs(a - b).max()} of {scale}"
    )


def compare(results, alone) -> None:
    for rank in results:
        close(rank[0], alone[0], "loss")
        for part in (1, 2):
            assert rank[part].keys() == alone[part].keys()
            for name, expected in alone[part].items():
                close(rank[part][name], expected, f"{'gradient' if part == 1 else 'state'} {name}")
        assert rank[3] == pytest.approx(alone[3], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one(name, folder) -> None:
    alone = train(name, folder)
    assert all(np.any(g) for n, g in alone[1].items() if n.endswith("weight"))
    for world_size in (
        (2, 3, 4) if name in ("moco", "scan", "simclr", "selflabel", "temi-features") else (3,)
    ):
        compare(run_ranks(train, world_size, name, folder), alone)


def test_a_skipped_step_leaves_ddp_usable(folder) -> None:
    compare(run_ranks(train, 2, "selflabel", folder, 1), train("selflabel", folder, 1))


def norm(groups: int):
    """Output, input gradient, weight gradient (summed) and running statistics of a batch norm on float32 with a large mean."""
    from dist_scan.models.batch_norm import GroupedBatchNorm, sync_running_stats
    from dist_scan.world.collectives import all_sum, gather_rows
    from dist_scan.world.world import current

    torch.manual_seed(0)
    world, x = current(), torch.randn(12, 3, 2, 2) + 100
    mine = (
        x[world.rank * 12 // world.world_size : (world.rank + 1) * 12 // world.world_size]
        .clone()
        .requires_grad_()
    )
    layer = GroupedBatchNorm(3, groups=groups)
    out = layer(mine)
    (out**3).sum().backward()
    sync_running_stats(layer)
    return [
        t.detach().numpy()
        for t in (
            gather_rows(out),
            gather_rows(mine.grad),
            all_sum(layer.weight.grad),
            layer.running_mean,
            layer.running_var,
        )
    ]


@pytest.mark.parametrize(("groups", "world_size"), [(1, 2), (1, 3), (2, 2), (2, 4), (4, 2), (6, 3)])
def test_batch_norm_groups_do_not_depend_on_ranks(groups, world_size: int) -> None:
    expected = norm(groups)
    for rank in run_ranks(norm, world_size, groups):
        for got, want in zip(rank, expected):
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def bank_write():
    """Every rank writes another number of rows, reads others; the state goes out."""
    from dist_scan.models.memory_bank import MemoryBank
    from dist_scan.world.world import current

    bank, r = MemoryBank(20, dtype=torch.int64, num_shards=5, fill=-1), current().rank
    bank.write(torch.arange(r, 20, 3)[: 4 + r], torch.arange(r, 20, 3)[: 4 + r] * 10)
    assert bank.whole().tolist() == bank.read(torch.arange(20)).tolist()
    state = (
        bank.state()
    )  # as lists: a tensor in a message lives only as long as the process that sent it
    return bank.read(torch.arange(20 - r)).tolist(), state | {
        "shards": {s: t.tolist() for s, t in state["shards"].items()}
    }


def bank_load(states):
    from dist_scan.models.memory_bank import MemoryBank

    bank = MemoryBank(20, dtype=torch.int64, num_shards=5)
    bank.load(
        [s | {"shards": {k: torch.tensor(v) for k, v in s["shards"].items()}} for s in states]
    )
    return bank.read(torch.arange(20)).tolist()


def test_bank_is_dealt_again_for_another_number_of_ranks() -> None:
    written = run_ranks(bank_write, 3)
    whole = written[0][0]
    assert [i for i, v in enumerate(whole) if v >= 0] == sorted(
        [*range(0, 12, 3), *range(1, 16, 3), *range(2, 20, 3)]
    )
    assert all(v in (-1, i * 10) for i, v in enumerate(whole)) and written[2][0] == whole[:18]
    for world_size in (1, 2):
        assert run_ranks(bank_load, world_size, [s for _, s in written]) == [whole] * world_size
