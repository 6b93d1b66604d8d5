"""DeepCluster's (v1, v2) whole-set moment and its training: W ranks equal one; the assignment is kept; labels are not needed."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from dist_scan.config import RuntimeConfig
from dist_scan.data.feature_table import FeatureTable
from dist_scan.engine.optimizer import OptimizerConfig
from dist_scan.engine.stop import StopFlag
from dist_scan.engine.training_loop import Trainer, TrainJob, TrainSettings
from dist_scan.monitoring.bottleneck import TrainingSetup
from tests.support.ranks import run_ranks

N, B, STEPS = 96, 24, 3
KMEANS = dict(num_clusters=8, whiten_dim=6, top_lr_scale=2.0, track=True)
CASES = {
    "kmeans": KMEANS,
    "released": KMEANS | dict(sampler="released_order", whiten_dim=None, top_momentum=0.5),
    "images": KMEANS | dict(sampler="images"),
    "v2": dict(num_clusters=6, num_heads=3, projection_dim=8, hidden_dim=16, small_crops=1),
    "pic": dict(num_clusters=3, clustering="pic", whiten_dim=6, pic_sigma=0.7, pic_neighbours=3),
}


def images() -> torch.Tensor:
    """Six kinds of pictures with noise, in float64."""
    gen = torch.Generator().manual_seed(5)
    kinds = torch.randn(6, 3, 8, 8, generator=gen, dtype=torch.float64)
    return kinds[torch.arange(N) % 6] + 0.5 * torch.randn(
        N, 3, 8, 8, generator=gen, dtype=torch.float64
    )


def make(settings: dict, folder, epochs: int = 2):
    """The method in float64 on a tiny network, and an embed over all ranks into folder."""
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.methods.base import MethodInputs, method_class
    from dist_scan.models.backbone import BackboneConfig, build_backbone
    from dist_scan.world.collectives import barrier
    from dist_scan.world.world import current

    torch.manual_seed(0)
    config = BackboneConfig(name="resnet_small", width=4)
    inputs = MethodInputs(
        num_images=N,
        global_batch=B,
        seed=3,
        feature_dim=16,
        backbone=build_backbone(config),
        backbone_config=config,
        epochs=epochs,
        work_dir=folder / f"work-{current().world_size}",
    )

    @torch.no_grad()
    def embed(network, recipe="center"):
        out = folder / f"embed-{current().world_size}"
        barrier()
        if current().rank == 0:
            table = FeatureTable.create(out, N, 1, network.num_features, 8)
            for s in range(8):
                table.write_shard(
                    s, network.eval()(images()[slice(*table.shard_range(s))])[:, None].numpy()
                )
        network.eval()
        barrier()
        return FeatureTable.open(out)

    cls = method_class("deepcluster_v2" if "small_crops" in settings else "deepcluster")
    return cls(cls.Config(**settings), inputs).double(), embed


def train(settings: dict, folder):
    """Two epochs of a few steps through DDP: losses, assignments, rows visited, the state at the end, what is logged."""
    from dist_scan.data.batch import Batch
    from dist_scan.engine.optimizer import (
        OptimizerConfig,
        build_optimizer,
        reset_optimizer_state,
        set_learning_rate,
    )
    from dist_scan.models.batch_norm import sync_running_stats
    from dist_scan.world.collectives import all_mean
    from dist_scan.world.world import current, wrap_ddp

    method, embed = make(settings, folder)
    network, world, x = wrap_ddp(method), current(), images()
    optimizer = build_optimizer(
        OptimizerConfig(lr=0.02, weight_decay=1e-3), method.parameter_groups()
    )
    losses, assigned, visited = [], [], []
    for epoch in range(2):
        reset_optimizer_state(optimizer, method.begin_epoch(epoch, embed))
        order = method.epoch_rows(epoch, np.arange(N))
        order = np.random.default_rng(epoch).permutation(N) if order is None else order
        method.train()
        assigned.append(method.targets.numpy().copy())
        visited.append(order)
        for s in range(STEPS):
            rows = torch.from_numpy(order[s * B : (s + 1) * B]).chunk(world.world_size)[world.rank]
            set_learning_rate(optimizer, 0.02)
            views = (x[rows], x[rows].flip(3), x[rows, :, 1:7, 1:7])[
                : len(method.recipes_for(method.config))
            ]
            batch = Batch(rows, views, epoch, s)
            step = network(batch)
            step.loss.backward()
            optimizer.step()
            method.end_step(batch, step)
            sync_running_stats(method)
            optimizer.zero_grad()
            losses.append(float(all_mean(step.loss.detach())))
    method.prepare_publish()
    return (
        losses,
        assigned,
        visited,
        {k: v.numpy() for k, v in method.state_dict().items()},
        method.end_epoch(1, None),
    )


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one(name, tmp_path: Path) -> None:
    losses, assigned, visited, state, logged = train(CASES[name], tmp_path)
    assert (
        len(np.unique(assigned[1])) > 2
        and (losses[2] < losses[0] or name == "v2")
        and 0 < logged["nmi_previous"] <= 1
    )
    for world_size in (3,) if name == "kmeans" else (2,):
        for other in run_ranks(train, world_size, CASES[name], tmp_path):
            np.testing.assert_allclose(other[0], losses, rtol=1e-6)
            for mine, theirs in zip((*assigned, *visited), (*other[1], *other[2])):
                np.testing.assert_array_equal(theirs, mine)
            for key, value in state.items():
                np.testing.assert_allclose(other[3][key], value, rtol=1e-6, atol=1e-8, err_msg=key)
            assert other[4] == pytest.approx(logged)


def test_pic_beyond_the_top_layer_leaves_the_smallest_clusters_out(tmp_path: Path) -> None:
    method, embed = make(CASES["pic"], tmp_path)
    method.begin_epoch(0, embed)
    order = method.epoch_rows(0, np.arange(N))
    logged, targets = method.end_epoch(0, None), method.targets.numpy()
    assert logged["clusters"] == 3 and logged["images_left_out"] == (targets == -1).sum() > 0
    assert len(order) == N and (targets[order] >= 0).all()


def test_every_epoch_has_a_new_top_layer_without_memory_and_clusters_no_gaps(
    tmp_path: Path,
) -> None:
    method, embed = make(KMEANS | dict(num_clusters=40, reassign=2), tmp_path, epochs=3)
    fresh = method.begin_epoch(0, embed)
    assert (
        [p.shape for p in fresh] == [(40, 16), (40,)]
        and not fresh[1].any()
        and 0.005 < float(fresh[0].detach().std()) < 0.015
    )
    first = fresh[0].detach().clone()
    method.epoch_rows(0, np.arange(N))
    targets = method.targets.numpy()
    assert set(targets) == set(range(int(method.used))) and int(method.facts[1]) == 40 - int(
        method.used
    )
    assert method.begin_epoch(1, embed) == () and torch.equal(method.top.weight, first)
    method.begin_epoch(2, embed)
    assert not torch.equal(method.top.weight, first)
    assert [g.sgd_momentum for g in method.parameter_groups()] == [None, 0.0]


def test_what_is_published(tmp_path: Path) -> None:
    from dist_scan.data.assignments import Assignments
    from dist_scan.models.backbone import load_backbone

    method, embed = make(KMEANS, tmp_path)
    for epoch in range(2):
        method.begin_epoch(epoch, embed)
    method.float().prepare_publish()
    (tmp_path / "out").mkdir()
    method.publish(tmp_path / "out")
    found, history = Assignments.load(tmp_path / "out"), np.load(tmp_path / "out" / "history.npz")
    np.testing.assert_array_equal(found.cluster, method.assignment.whole().numpy())
    assert (
        history["cluster"].shape == (2, N)
        and (history["cluster"][1] == found.cluster).all()
        and history["epoch"].tolist() == [0, 1]
    )
    assert load_backbone(tmp_path / "out")[0].num_features == 16


def test_v2_tracks_the_first_head_and_publishes_clusters(tmp_path: Path) -> None:
    from dist_scan.data.assignments import Assignments

    method, embed = make(CASES["v2"] | dict(track=True), tmp_path)
    assert "clusters" in method.publishes and "history" in method.memory_banks()
    seen = []
    for epoch in range(2):
        method.begin_epoch(epoch, embed)
        seen.append(method.assignment.whole().numpy()[:, 0])
    method.float().prepare_publish()
    (tmp_path / "out").mkdir()
    method.publish(tmp_path / "out")
    with np.load(tmp_path / "out" / "history.npz") as history:
        np.testing.assert_array_equal(history["cluster"], seen)
        assert history["epoch"].tolist() == [0, 1]
    np.testing.assert_array_equal(Assignments.load(tmp_path / "out").cluster, seen[-1])


def test_v2_heads_look_at_their_view_and_small_views_share_the_targets(tmp_path: Path) -> None:
    from dist_scan.data.batch import Batch

    method, embed = make(CASES["v2"], tmp_path)
    assert method.recipes_for(method.config) == ("dcv2",) * 3
    method.begin_epoch(0, embed)
    rows = torch.arange(B)
    method.epoch_rows(0, np.arange(N))
    method.projections.write(
        torch.arange(N), torch.nn.functional.normalize(torch.randn(N, 2, 8), dim=2)
    )
    method.begin_epoch(1, embed)
    method.epoch_rows(1, np.arange(N))
    for head in range(3):  # nearest prototype by cosine of the view it looks at
        nearest = (
            method.projections.whole()[:, head % 2] @ method.prototypes[head].float().T
        ).argmax(1)
        assert (nearest == method.targets[:, head]).double().mean() > 0.9
    method.eval()
    x = images()[rows]
    both = method(Batch(rows, (x, x.flip(3), x[:, :, 1:7, 1:7]), 1, 0))
    one = [float(method(Batch(rows, (v, v), 1, 0)).loss) for v in (x, x.flip(3), x[:, :, 1:7, 1:7])]
    assert float(both.loss) == pytest.approx(np.mean(one)) and both.for_end_step[
        "projections"
    ].shape == (
        B,
        2,
        8,
    )
    method.end_step(Batch(rows, (x,), 1, 0), both)
    torch.testing.assert_close(
        method.projections.read(rows), both.for_end_step["projections"].float()
    )
    assert [p is method.prototypes for p in method.begin_epoch(2, embed)] == [True]


class Pictures:
    """A feed of the pictures above."""

    steps_per_epoch, rows = N // B, np.arange(N)

    def batches(self, epoch, first_step=0, views=None, order=None):
        from dist_scan.data.batch import Batch
        from dist_scan.data.order import epoch_order

        x, order = images(), epoch_order(self.rows, 0, epoch) if order is None else order
        for s in range(first_step, self.steps_per_epoch):
            rows = torch.from_numpy(order[s * B : (s + 1) * B])
            yield Batch(
                rows,
                (x[rows], x[rows].flip(3), x[rows, :, 1:7, 1:7]),
                epoch,
                epoch * self.steps_per_epoch + s,
            )


class StopAt(StopFlag):
    """Requests a stop that takes effect at the end of the n-th step of this start; 0: never."""

    def __init__(self, step: int = 0) -> None:
        super().__init__()
        self.steps_left = step

    @property
    def requested(self) -> bool:
        self.steps_left -= 1
        return self.steps_left == 0


def trainer(
    name: str, folder: Path, stop: StopFlag, embeds: list[int], checkpoint_s: float = 1e9
) -> Trainer:
    """A training of three epochs; `embeds` gets an entry for each call of embed."""
    method, embed = make(CASES[name], folder, epochs=3)

    def counted(network: nn.Module, recipe: str | int = "center") -> FeatureTable:
        embeds.append(len(embeds))
        return embed(network, recipe)

    return Trainer(
        TrainJob(
            method=method,
            feed=Pictures(),
            settings=TrainSettings(optimizer=OptimizerConfig(lr=0.02), epochs=3, precision="fp64"),
            run_dir=folder,
            out=folder,
            setup=TrainingSetup(B),
            runtime=RuntimeConfig(checkpoint_s=checkpoint_s),
            stop=stop,
            embed=counted,
        )
    )


@pytest.mark.parametrize("name", ["kmeans", "v2"])
def test_a_run_resumed_inside_an_epoch_does_not_cluster_again(
    name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_scan.methods import deepcluster, deepcluster_v2
    from dist_scan.monitoring.progress import StopRequested

    calls = []
    for module in (deepcluster, deepcluster_v2):
        monkeypatch.setattr(
            module,
            "kmeans",
            lambda *a, real=module.kmeans, **k: (calls.append(1), real(*a, **k))[1],
        )
    whole = trainer(name, tmp_path / "whole", StopAt(), [])
    whole.run()
    wanted, per_epoch = len(calls), len(calls) // 3
    for step in (6, 4):  # in the second epoch; at the very end of the first
        folder, embeds = tmp_path / str(step), []
        calls.clear()
        with pytest.raises(StopRequested):
            trainer(name, folder, StopAt(step), embeds).run()
        before = len(calls)
        resumed = trainer(name, folder, StopAt(), embeds)
        resumed.run()
        assert before == per_epoch * (2 if step == 6 else 1) and len(calls) == wanted
        assert len(embeds) == (3 if name == "kmeans" else 1)
        for key, value in whole.method.state_dict().items():
            assert torch.equal(resumed.method.state_dict()[key], value), key
        assert torch.equal(resumed.method.assignment.whole(), whole.method.assignment.whole())


def test_a_crash_right_after_the_moment_finds_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same step there is a checkpoint from the end of the epoch before: the newer one is used."""
    from dist_scan.monitoring.progress import StopRequested

    embeds = []
    # A checkpoint at every step, also at the last one of the epoch.
    with pytest.raises(StopRequested):
        trainer("kmeans", tmp_path, StopAt(4), embeds, checkpoint_s=1e-9).run()
    assert len(embeds) == 1
    crashing = trainer("kmeans", tmp_path, StopAt(), embeds)
    monkeypatch.setattr(crashing, "_step", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        crashing.run()
    assert len(embeds) == 2
    assert (tmp_path / "work" / "checkpoints" / "step-000000004-begun").is_dir()
    state = trainer("kmeans", tmp_path, StopAt(), embeds).run()
    assert len(embeds) == 3
    assert state.epoch == 3


def test_asked_to_stop_while_it_clusters_keeps_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_scan.methods import deepcluster
    from dist_scan.monitoring.progress import StopRequested

    embeds, real = [], deepcluster.kmeans
    monkeypatch.setattr(
        deepcluster,
        "kmeans",
        lambda *a, **k: real(*a, **{**k, "stop_requested": lambda: len(embeds) == 2}),
    )
    with pytest.raises(StopRequested):
        trainer("kmeans", tmp_path, StopAt(), embeds).run()
    monkeypatch.setattr(deepcluster, "kmeans", real)
    resumed = trainer("kmeans", tmp_path, StopAt(), embeds)
    assert resumed.state.step == 4
    resumed.run()
    whole = trainer("kmeans", tmp_path / "whole", StopAt(), [])
    whole.run()
    assert len(embeds) == 4
    for key, value in whole.method.state_dict().items():
        assert torch.equal(resumed.method.state_dict()[key], value), key
