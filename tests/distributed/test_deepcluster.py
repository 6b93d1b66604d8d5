"""DeepCluster's whole-set moment and its training: W ranks equal one; the assignment is kept; labels are not needed."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks

N, B, STEPS = 96, 24, 3
KMEANS = dict(num_clusters=8, whiten_dim=6, top_lr_scale=2.0, track=True)
CASES = {"kmeans": KMEANS, "released": KMEANS | dict(sampler="released_order", whiten_dim=None, top_momentum=0.5), "images": KMEANS | dict(sampler="images"),
         "pic": dict(num_clusters=3, clustering="pic", whiten_dim=6, pic_sigma=0.7, pic_neighbours=3)}


def images() -> torch.Tensor:
    """Six kinds of pictures with noise, in float64."""
    gen = torch.Generator().manual_seed(5)
    kinds = torch.randn(6, 3, 8, 8, generator=gen, dtype=torch.float64)
    return kinds[torch.arange(N) % 6] + 0.5 * torch.randn(N, 3, 8, 8, generator=gen, dtype=torch.float64)


def make(settings: dict, folder, epochs: int = 2):
    """The method in float64 on a tiny network, and an embed over all ranks into folder."""
    from dist_scan.data.tables import FeatureTable
    from dist_scan.methods.base import Given
    from dist_scan.methods.deepcluster import DeepCluster, DeepClusterConfig
    from dist_scan.models.backbone import BackboneConfig, build_backbone
    from dist_scan.world.collectives import barrier
    from dist_scan.world.world import current

    torch.manual_seed(0)
    config = BackboneConfig(name="resnet_small", width=4)
    given = Given(num_images=N, global_batch=B, seed=3, total_steps=2 * STEPS, feature_dim=16, backbone=build_backbone(config),
                  backbone_config=config, epochs=epochs, work_dir=folder / f"work-{current().world_size}")

    @torch.no_grad()
    def embed(network, recipe="center"):
        out = folder / f"embed-{current().world_size}"
        barrier()
        if current().rank == 0:
            table = FeatureTable.create(out, N, 1, 16, 8)
            for s in range(8):
                table.write_shard(s, network.eval()(images()[slice(*table.shard_range(s))])[:, None].numpy())
        network.eval()
        barrier()
        return FeatureTable.open(out)

    return DeepCluster(DeepClusterConfig(**settings), given).double(), embed


def train(settings: dict, folder):
    """Two epochs of a few steps through DDP: losses, assignments, rows visited, the state at the end, what is logged."""
    from dist_scan.data.batch import Batch
    from dist_scan.engine.optim import OptimizerConfig, build_optimizer, forget, set_learning_rate
    from dist_scan.models.layers import sync_running_stats
    from dist_scan.world.collectives import all_mean
    from dist_scan.world.world import current, wrap

    method, embed = make(settings, folder)
    network, world, x = wrap(method), current(), images()
    optimizer = build_optimizer(OptimizerConfig(lr=0.02, weight_decay=1e-3), method.parameter_groups())
    losses, assigned, visited = [], [], []
    for epoch in range(2):
        forget(optimizer, method.begin_epoch(epoch, embed))
        order = method.epoch_rows(epoch, np.arange(N))
        method.train()
        assigned.append(method.targets.numpy().copy())
        visited.append(order)
        for s in range(STEPS):
            rows = torch.from_numpy(order[s * B:(s + 1) * B]).chunk(world.world_size)[world.rank]
            set_learning_rate(optimizer, 0.02)
            step = network(Batch(rows, (x[rows],), epoch, s))
            step.loss.backward()
            optimizer.step()
            sync_running_stats(method)
            optimizer.zero_grad()
            losses.append(float(all_mean(step.loss.detach())))
    method.collect()
    return losses, assigned, visited, {k: v.numpy() for k, v in method.state_dict().items()}, method.end_epoch(1, None)


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one(name, tmp_path):
    losses, assigned, visited, state, logged = train(CASES[name], tmp_path)
    assert len(np.unique(assigned[1])) > 2 and losses[2] < losses[0] and 0 < logged["nmi_previous"] <= 1
    for world_size in (2, 3) if name == "kmeans" else (2,):
        for other in run_ranks(train, world_size, CASES[name], tmp_path):
            np.testing.assert_allclose(other[0], losses, rtol=1e-6)
            for mine, theirs in zip((*assigned, *visited), (*other[1], *other[2])):
                np.testing.assert_array_equal(theirs, mine)
            for key, value in state.items():
                np.testing.assert_allclose(other[3][key], value, rtol=1e-6, atol=1e-8, err_msg=key)
            assert other[4] == pytest.approx(logged)


def test_pic_beyond_the_top_layer_leaves_the_smallest_clusters_out(tmp_path):
    method, embed = make(CASES["pic"], tmp_path)
    method.begin_epoch(0, embed)
    order = method.epoch_rows(0, np.arange(N))
    logged, targets = method.end_epoch(0, None), method.targets.numpy()
    assert logged["clusters"] == 3 and logged["images_left_out"] == (targets == -1).sum() > 0
    assert len(order) == N and (targets[order] >= 0).all()


def test_every_epoch_has_a_new_top_layer_without_memory_and_clusters_no_gaps(tmp_path):
    method, embed = make(KMEANS | dict(num_clusters=40, reassign=2), tmp_path, epochs=3)
    fresh = method.begin_epoch(0, embed)
    assert [p.shape for p in fresh] == [(40, 16), (40,)] and not fresh[1].any() and 0.005 < float(fresh[0].detach().std()) < 0.015
    first = fresh[0].detach().clone()
    method.epoch_rows(0, np.arange(N))
    targets = method.targets.numpy()
    assert set(targets) == set(range(int(method.used))) and int(method.facts[1]) == 40 - int(method.used)
    assert method.begin_epoch(1, embed) == () and torch.equal(method.top.weight, first)
    method.begin_epoch(2, embed)
    assert not torch.equal(method.top.weight, first)
    assert [g.momentum for g in method.parameter_groups()] == [None, 0.0]


def test_what_is_published(tmp_path):
    from dist_scan.data.assignments import Assignments
    from dist_scan.models.backbone import load_backbone

    method, embed = make(KMEANS, tmp_path)
    for epoch in range(2):
        method.begin_epoch(epoch, embed)
    method.float().collect()
    (tmp_path / "out").mkdir()
    method.publish(tmp_path / "out")
    found, history = Assignments.load(tmp_path / "out"), np.load(tmp_path / "out" / "history.npz")
    np.testing.assert_array_equal(found.cluster, method.assignment.whole().numpy())
    assert history["cluster"].shape == (2, N) and (history["cluster"][1] == found.cluster).all() and history["epoch"].tolist() == [0, 1]
    assert load_backbone(tmp_path / "out")[0].num_features == 16
