"""DeepCluster and DeepCluster-v2: several ranks equal one; targets survive a restart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_scan.config import RuntimeConfig
from dist_scan.data.batch import Batch
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.order import epoch_order
from dist_scan.engine.optimizer import OptimizerConfig
from dist_scan.engine.stop import StopFlag
from dist_scan.engine.training_loop import Trainer, TrainingLoopConfig, TrainJob
from dist_scan.monitoring.bottleneck import TrainingSetup
from dist_scan.monitoring.progress import StopRequested
from tests.support.methods import make_method, state_arrays, tiny_inputs, update
from tests.support.ranks import run_ranks

if TYPE_CHECKING:
    from dist_scan.methods.base import Method

NUM_IMAGES, GLOBAL_BATCH, STEPS = 96, 24, 3
KMEANS: dict[str, Any] = {
    "num_clusters": 8,
    "whiten_dim": 6,
    "top_lr_scale": 2.0,
    "track": True,
}
V2: dict[str, Any] = {
    "num_clusters": 6,
    "num_heads": 3,
    "projection_dim": 8,
    "hidden_dim": 16,
    "small_crops": 1,
}
PIC: dict[str, Any] = {
    "num_clusters": 3,
    "clustering": "pic",
    "whiten_dim": 6,
    "pic_sigma": 0.7,
    "pic_neighbours": 3,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "kmeans": KMEANS,
    "released": KMEANS | {"sampler": "released_order", "whiten_dim": None, "top_momentum": 0.5},
    "images": KMEANS | {"sampler": "images"},
    "v2": V2,
    "pic": PIC,
}


def make_images() -> Tensor:
    """Noisy images of six kinds [N, 3, 8, 8], in float64."""
    generator = torch.Generator().manual_seed(5)
    kinds = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(NUM_IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    return kinds[torch.arange(NUM_IMAGES) % 6] + 0.5 * noise


def make_views(images: Tensor) -> tuple[Tensor, ...]:
    """Two large views and a small one."""
    return images, images.flip(3), images[:, :, 1:7, 1:7]


def make(settings: dict[str, Any], folder: Path, epochs: int = 2) -> Method:
    """The method in float64."""
    from dist_scan.world.world import current

    work_dir = folder / f"work-{current().world_size}"
    inputs = tiny_inputs(NUM_IMAGES, GLOBAL_BATCH, seed=3, epochs=epochs, work_dir=work_dir)
    kind = "deepcluster_v2" if "small_crops" in settings else "deepcluster"
    return make_method(kind, settings, inputs).double()


class EmbedImages:
    """Embeds the images into a folder, as a stage does; counts its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = 0

    @torch.no_grad()
    def __call__(self, network: nn.Module, recipe: str | int = "center") -> FeatureTable:
        from dist_scan.world.collectives import barrier
        from dist_scan.world.world import current

        self.calls += 1
        out = self.folder / f"embed-{current().world_size}"
        network.eval()
        barrier()
        if current().rank == 0:
            table = FeatureTable.create(out, (NUM_IMAGES, 1, network.num_features), 8)
            for shard in range(8):
                images = make_images()[slice(*table.shard_range(shard))]
                table.write_shard(shard, network(images)[:, None].numpy())
        barrier()
        return FeatureTable.open(out)


@dataclass(frozen=True)
class Trained:
    """Result of a training: mean losses; targets and visited rows of each epoch; final state."""

    losses: list[float]
    targets: list[np.ndarray]
    visited: list[np.ndarray]
    state: dict[str, np.ndarray]
    logged: dict[str, float]


def train(settings: dict[str, Any], folder: Path) -> Trained:
    """Two epochs of a few steps through DDP."""
    from dist_scan.engine.optimizer import (
        build_optimizer,
        reset_optimizer_state,
        set_learning_rate,
    )
    from dist_scan.world.collectives import all_mean
    from dist_scan.world.world import current, wrap_ddp

    method = make(settings, folder)
    embed = EmbedImages(folder)
    network = wrap_ddp(method)
    images = make_images()
    optimizer_config = OptimizerConfig(lr=0.02, weight_decay=1e-3)
    optimizer = build_optimizer(optimizer_config, method.parameter_groups())
    num_views = len(method.recipes_for(method.config))
    losses, targets, visited = [], [], []
    for epoch in range(2):
        reset_optimizer_state(optimizer, method.begin_epoch(epoch, embed))
        method.load_targets()
        order = method.epoch_rows(epoch, np.arange(NUM_IMAGES))
        if order is None:
            order = np.random.default_rng(epoch).permutation(NUM_IMAGES)
        method.train()
        targets.append(method.targets.numpy().copy())
        visited.append(order)
        for number in range(STEPS):
            rows = torch.from_numpy(order[number * GLOBAL_BATCH : (number + 1) * GLOBAL_BATCH])
            rows = rows.chunk(current().world_size)[current().rank]
            set_learning_rate(optimizer, 0.02)
            batch = Batch(rows, make_views(images[rows])[:num_views], epoch, number)
            step = update(method, network, optimizer, batch)
            losses.append(float(all_mean(step.loss.detach())))
    method.prepare_publish()
    return Trained(losses, targets, visited, state_arrays(method), method.end_epoch(1, None))


@pytest.mark.parametrize("name", SETTINGS)
def test_several_ranks_equal_one(name: str, tmp_path: Path) -> None:
    single = train(SETTINGS[name], tmp_path)
    assert len(np.unique(single.targets[1])) > 2
    assert single.losses[2] < single.losses[0] or name == "v2"
    assert 0 < single.logged["nmi_previous"] <= 1
    world_size = 3 if name == "kmeans" else 2
    for rank in run_ranks(train, world_size, SETTINGS[name], tmp_path):
        np.testing.assert_allclose(rank.losses, single.losses, rtol=1e-6)
        for actual, expected in zip(rank.targets, single.targets):
            np.testing.assert_array_equal(actual, expected)
        for actual, expected in zip(rank.visited, single.visited):
            np.testing.assert_array_equal(actual, expected)
        for key, value in single.state.items():
            np.testing.assert_allclose(rank.state[key], value, rtol=1e-6, atol=1e-8, err_msg=key)
        assert rank.logged == pytest.approx(single.logged)


def test_pic_leaves_out_the_smallest_clusters_beyond_the_top_layer(tmp_path: Path) -> None:
    method = make(PIC, tmp_path)
    method.begin_epoch(0, EmbedImages(tmp_path))
    method.load_targets()
    order = method.epoch_rows(0, np.arange(NUM_IMAGES))
    targets, logged = method.targets.numpy(), method.end_epoch(0, None)
    assert logged["clusters"] == 3
    assert logged["images_left_out"] == (targets == -1).sum() > 0
    assert len(order) == NUM_IMAGES
    assert (targets[order] >= 0).all()


def test_every_clustering_has_a_new_top_layer_and_ids_without_gaps(tmp_path: Path) -> None:
    method = make(KMEANS | {"num_clusters": 40, "reassign": 2}, tmp_path, epochs=3)
    embed = EmbedImages(tmp_path)
    weight, bias = method.begin_epoch(0, embed)
    assert weight.shape == (40, 16)
    assert bias.shape == (40,)
    assert not bias.any()
    assert 0.005 < float(weight.detach().std()) < 0.015
    first_weight = weight.detach().clone()
    method.load_targets()
    num_used = int(method.used)
    assert set(method.targets.numpy()) == set(range(num_used))
    assert method.end_epoch(0, None)["empty_clusters"] == 40 - num_used
    assert method.begin_epoch(1, embed) == ()
    assert torch.equal(method.top.weight, first_weight)
    method.begin_epoch(2, embed)
    assert not torch.equal(method.top.weight, first_weight)
    assert [group.sgd_momentum for group in method.parameter_groups()] == [None, 0.0]


def publish(method: Method, folder: Path) -> None:
    folder.mkdir()
    method.float().prepare_publish()
    method.publish(folder)


def test_backbone_last_clusters_and_history_are_published(tmp_path: Path) -> None:
    from dist_scan.data.assignments import Assignments
    from dist_scan.models.backbone import load_backbone

    method = make(KMEANS, tmp_path)
    for epoch in range(2):
        method.begin_epoch(epoch, EmbedImages(tmp_path))
    publish(method, tmp_path / "out")
    clusters = Assignments.load(tmp_path / "out").cluster
    np.testing.assert_array_equal(clusters, method.assignment.whole().numpy())
    with np.load(tmp_path / "out" / "history.npz") as history:
        assert history["cluster"].shape == (2, NUM_IMAGES)
        assert (history["cluster"][1] == clusters).all()
        assert history["epoch"].tolist() == [0, 1]
    assert load_backbone(tmp_path / "out")[0].num_features == 16


def test_v2_publishes_the_history_of_its_first_head(tmp_path: Path) -> None:
    from dist_scan.data.assignments import Assignments

    method = make(V2 | {"track": True}, tmp_path)
    assert "clusters" in method.publishes
    assert "history" in method.memory_banks
    expected = []
    for epoch in range(2):
        method.begin_epoch(epoch, EmbedImages(tmp_path))
        expected.append(method.assignment.whole().numpy()[:, 0])
    publish(method, tmp_path / "out")
    with np.load(tmp_path / "out" / "history.npz") as history:
        np.testing.assert_array_equal(history["cluster"], expected)
        assert history["epoch"].tolist() == [0, 1]
    np.testing.assert_array_equal(Assignments.load(tmp_path / "out").cluster, expected[-1])


def test_v2_targets_are_the_nearest_centroids_of_the_view_of_a_head(tmp_path: Path) -> None:
    method = make(V2, tmp_path)
    assert method.recipes_for(method.config) == ("dcv2",) * 3
    method.begin_epoch(0, EmbedImages(tmp_path))
    all_rows = torch.arange(NUM_IMAGES)
    method.projections.write(all_rows, F.normalize(torch.randn(NUM_IMAGES, 2, 8), dim=2))
    (reset,) = method.begin_epoch(1, EmbedImages(tmp_path))
    assert reset is method.prototypes
    method.load_targets()
    for head in range(3):
        projections = method.projections.whole()[:, head % 2]
        nearest = (projections @ method.prototypes[head].float().T).argmax(1)
        assert (nearest == method.targets[:, head]).double().mean() > 0.9


def test_v2_views_share_the_targets_and_large_ones_are_remembered(tmp_path: Path) -> None:
    method = make(V2, tmp_path)
    method.begin_epoch(0, EmbedImages(tmp_path))
    method.load_targets()
    method.eval()
    rows = torch.arange(GLOBAL_BATCH)
    views = make_views(make_images()[rows])
    step = method(Batch(rows, views, 1, 0))
    losses = [float(method(Batch(rows, (v, v), 1, 0)).loss.detach()) for v in views]
    assert float(step.loss.detach()) == pytest.approx(np.mean(losses))
    projections = step.for_end_step["projections"]
    assert projections.shape == (GLOBAL_BATCH, 2, 8)
    method.end_step(Batch(rows, views, 1, 0), step)
    torch.testing.assert_close(method.projections.read(rows), projections.float())


# --- restarts ---


class ImageFeed:
    """A feed of the images above."""

    steps_per_epoch = NUM_IMAGES // GLOBAL_BATCH
    rows = np.arange(NUM_IMAGES)

    def batches(
        self,
        epoch: int,
        first_step: int = 0,
        views: tuple[int, ...] | None = None,
        order: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        images = make_images()
        if order is None:
            order = epoch_order(self.rows, 0, epoch)
        for number in range(first_step, self.steps_per_epoch):
            rows = torch.from_numpy(order[number * GLOBAL_BATCH : (number + 1) * GLOBAL_BATCH])
            step = epoch * self.steps_per_epoch + number
            yield Batch(rows, make_views(images[rows]), epoch, step)


class StopAt(StopFlag):
    """Requests a stop that takes effect at the end of the n-th step of this start; 0: never."""

    def __init__(self, step: int = 0) -> None:
        super().__init__()
        self.steps_left = step

    @property
    def requested(self) -> bool:
        self.steps_left -= 1
        return self.steps_left == 0


def make_trainer(
    name: str,
    embed: EmbedImages,
    stop_at: int = 0,
    checkpoint_s: float = 1e9,
) -> Trainer:
    """A training of three epochs in the folder of `embed`."""
    return Trainer(
        TrainJob(
            method=make(SETTINGS[name], embed.folder, epochs=3),
            feed=ImageFeed(),
            settings=TrainingLoopConfig(
                optimizer=OptimizerConfig(lr=0.02), epochs=3, precision="fp64"
            ),
            run_dir=embed.folder,
            out=embed.folder,
            setup=TrainingSetup(GLOBAL_BATCH),
            runtime=RuntimeConfig(checkpoint_s=checkpoint_s),
            stop=StopAt(stop_at),
            embed=embed,
        )
    )


def assert_equal_methods(actual: Method, expected: Method) -> None:
    for key, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[key], value), key
    assert torch.equal(actual.assignment.whole(), expected.assignment.whole())


def count_kmeans(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Count the calls of k-means in a method's module."""
    counted = Mock(wraps=module.kmeans)
    monkeypatch.setattr(module, "kmeans", counted)
    return counted


@pytest.mark.parametrize("name", ["kmeans", "v2"])
@pytest.mark.parametrize("stop_at", [4, 6])
def test_a_run_resumed_inside_an_epoch_does_not_cluster_again(
    name: str, stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 is the last of the first epoch, step 6 is in the second."""
    from dist_scan.methods import deepcluster, deepcluster_v2

    kmeans = count_kmeans(deepcluster if name == "kmeans" else deepcluster_v2, monkeypatch)
    undisturbed = make_trainer(name, EmbedImages(tmp_path / "undisturbed"))
    undisturbed.run()
    calls_per_epoch = kmeans.call_count // 3
    kmeans.reset_mock()
    embed = EmbedImages(tmp_path / "stopped")
    with pytest.raises(StopRequested):
        make_trainer(name, embed, stop_at).run()
    assert kmeans.call_count == calls_per_epoch * (2 if stop_at == 6 else 1)
    resumed = make_trainer(name, embed)
    resumed.run()
    assert kmeans.call_count == calls_per_epoch * 3
    assert embed.calls == (3 if name == "kmeans" else 1)
    assert_equal_methods(resumed.method, undisturbed.method)


def test_a_crash_right_after_clustering_resumes_from_the_checkpoint_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same step there is also a checkpoint from the end of the previous epoch."""
    embed = EmbedImages(tmp_path)
    # A checkpoint at every step, also at the last one of the epoch.
    with pytest.raises(StopRequested):
        make_trainer("kmeans", embed, stop_at=4, checkpoint_s=1e-9).run()
    assert embed.calls == 1
    crashing = make_trainer("kmeans", embed)
    monkeypatch.setattr(crashing, "_step", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        crashing.run()
    assert embed.calls == 2
    assert (tmp_path / "work" / "checkpoints" / "step-000000004-begun").is_dir()
    state = make_trainer("kmeans", embed).run()
    assert embed.calls == 3
    assert state.epoch == 3


def test_a_stop_request_while_clustering_keeps_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_scan.methods import deepcluster

    embed = EmbedImages(tmp_path / "stopped")
    kmeans = deepcluster.kmeans

    def stop_in_second_epoch(*args: Any, **options: Any) -> Any:
        return kmeans(*args, **{**options, "stop_requested": lambda: embed.calls == 2})

    monkeypatch.setattr(deepcluster, "kmeans", stop_in_second_epoch)
    with pytest.raises(StopRequested):
        make_trainer("kmeans", embed).run()
    monkeypatch.setattr(deepcluster, "kmeans", kmeans)
    resumed = make_trainer("kmeans", embed)
    assert resumed.state.step == 4
    resumed.run()
    assert embed.calls == 4
    undisturbed = make_trainer("kmeans", EmbedImages(tmp_path / "undisturbed"))
    undisturbed.run()
    assert_equal_methods(resumed.method, undisturbed.method)
