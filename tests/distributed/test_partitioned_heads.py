"""SCAN with its heads, or the clusters of every head, split over ranks.

Losses, gradients, selection and publication equal those of one rank that has all heads, and a
checkpoint can be resumed with another number of ranks or another partition.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.feed import EpochPlan, FeatureFeed, NeighbourSampler, held_out_features
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.engine.optimizer import OptimizerConfig
from dist_scan.engine.stop import StopFlag
from dist_scan.engine.train_state import gather_state
from dist_scan.engine.training_loop import Trainer, TrainingLoopConfig, TrainJob
from dist_scan.heads.partition import HeadPartition
from dist_scan.heads.selection import PublishedHeads
from dist_scan.methods.base import MethodInputs
from dist_scan.methods.scan import ScanConfig, ScanMethod
from dist_scan.monitoring.bottleneck import TrainingSetup
from dist_scan.monitoring.progress import StopRequested
from dist_scan.pipeline import Pipeline
from dist_scan.run_config import load_config
from dist_scan.search.neighbours import search_neighbours
from dist_scan.storage.tensors import load_tensors
from dist_scan.world.collectives import all_mean
from dist_scan.world.world import World, current, wrap_ddp
from tests.support.ranks import run_ranks

Arrays = dict[str, np.ndarray]

B, DIM, STEPS, ROWS, EPOCHS = 24, 6, 4, 60, 3
SCALES = (1.0, 600.0)
"""Of the features. The larger gives logits of some hundreds, where products of probabilities
underflow."""


def make_method(partition: HeadPartition, seed: int = 0) -> ScanMethod:
    """Four heads of 5 and 7 clusters (uneven over 2 and 3 ranks), in float64."""
    torch.manual_seed(seed)
    inputs = MethodInputs(
        num_images=ROWS,
        global_batch=B,
        seed=3,
        on_features=True,
        feature_dim=DIM,
        head_partition=partition,
        feature_mean=np.full(DIM, 0.1),
        feature_std=np.full(DIM, 2.0),
    )
    return ScanMethod(ScanConfig(num_clusters=(5, 7), num_heads=2), inputs).double()


def assert_close(found: Arrays, expected: Arrays, rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = rtol * max(1e-3, float(np.abs(value).max()))
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


# --- some steps, an epoch's end and a publication --------------------------------------------


class TrainResult(NamedTuple):
    metrics: list[dict[str, float]]
    """Loss and metrics of each step, means over ranks."""
    gradients: list[Arrays]
    """Of each step, of all heads; on rank 0."""
    state: Arrays
    """Final state, published logits and those of the selected head; on rank 0."""
    epoch_metrics: dict[str, float]
    num_local_rows: int
    """Rows of the weight on this rank."""


def train(partition: HeadPartition, scale: float, folder: Path) -> TrainResult:
    method, world = make_method(partition), current()
    network = method if method.sharded_state else wrap_ddp(method)
    assert bool(method.sharded_state) == (partition != "batch")

    def gather_all(tensors: dict[str, Tensor]) -> Arrays:
        """Complete tensors on rank 0."""
        arrays = {}
        for name, tensor in tensors.items():
            sharding = method.sharded_state.get(name)
            whole = tensor if sharding is None else sharding.gather(tensor)
            if whole is not None:
                arrays[name] = whole.detach().cpu().numpy().copy()
        return arrays

    generator = torch.Generator().manual_seed(1)

    def random_features(n: int) -> Tensor:
        return torch.randn(n, DIM, generator=generator, dtype=torch.float64) * scale

    local = slice(world.rank * B // world.world_size, (world.rank + 1) * B // world.world_size)
    visible = local if partition == "batch" else slice(0, B)
    optimizer = torch.optim.SGD(method.heads.parameters(), lr=0.05 / scale, momentum=0.9)
    metrics, gradients = [], []
    for s in range(STEPS):
        views = [random_features(B) for _ in range(2)]
        step = network(Batch(torch.arange(B)[visible], tuple(v[visible] for v in views), 0, s))
        step.loss.backward()
        values = {"loss": step.loss, **step.metrics}
        metrics.append({name: float(all_mean(x.detach())) for name, x in values.items()})
        gradients.append(gather_all({name: p.grad for name, p in method.named_parameters()}))
        optimizer.step()
        optimizer.zero_grad()

    held_out = random_features(9)
    part = np.array_split(np.arange(9), world.world_size)[world.rank]
    batch = Batch(torch.from_numpy(part), (held_out[part],), 0, 0)
    neighbours = np.array([[1, 5], [6, 8], [0, 7], [4, 4]])
    epoch_metrics = method.end_epoch(0, HeldOut(lambda: iter([batch]), neighbours))
    state = gather_all(method.state_dict())
    method.prepare_publish()
    if world.rank == 0:
        method.publish(folder)
        published = PublishedHeads(folder)
        for h in range(4):
            state[f"published {h}"] = published.logits(h, held_out).detach().numpy()
        state["selected"] = method.selection.selected_head()(held_out).detach().numpy()
    return TrainResult(metrics, gradients, state, epoch_metrics, len(method.heads.weight))


def train_at_all_scales(partition: HeadPartition, folder: Path) -> list[TrainResult]:
    return [train(partition, scale, folder / str(scale)) for scale in SCALES]


@pytest.fixture(scope="module")
def one_rank_results(tmp_path_factory: pytest.TempPathFactory) -> list[TrainResult]:
    return train_at_all_scales("batch", tmp_path_factory.mktemp("one-rank"))


@pytest.mark.parametrize(
    "partition, world_size",
    [
        ("heads", 1),
        ("heads", 2),
        ("heads", 3),
        ("clusters", 1),
        ("clusters", 2),
        ("clusters", 3),
        ("batch", 2),
    ],
)
def test_every_partition_equals_one_rank(
    partition: HeadPartition,
    world_size: int,
    one_rank_results: list[TrainResult],
    tmp_path: Path,
) -> None:
    if world_size == 1:
        ranks = [train_at_all_scales(partition, tmp_path)]
    else:
        ranks = run_ranks(train_at_all_scales, world_size, partition, tmp_path)
    for i, expected in enumerate(one_rank_results):
        results = [rank[i] for rank in ranks]
        for result in results:
            for found, wanted in zip(result.metrics, expected.metrics, strict=True):
                assert found == pytest.approx(wanted, rel=1e-9)
            assert result.epoch_metrics == pytest.approx(expected.epoch_metrics, rel=1e-9)
        for found, wanted in zip(results[0].gradients, expected.gradients, strict=True):
            assert all(np.any(gradient) for gradient in wanted.values())
            assert_close(found, wanted, 1e-8)
        assert_close(results[0].state, expected.state, 1e-8)
        # Partitioned weights are stored once over all ranks.
        total_rows = sum(result.num_local_rows for result in results)
        assert total_rows == 24 * (world_size if partition == "batch" else 1)


# --- checkpoints -----------------------------------------------------------------------------


class StopAfter(StopFlag):
    """Requests a stop that takes effect at the end of the n-th step of this start; 0: never."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps_left = steps

    @property
    def requested(self) -> bool:
        self.steps_left -= 1
        return self.steps_left == 0


class Training(NamedTuple):
    """A training in a folder, which has the feature table, the neighbours and the checkpoints."""

    partition: HeadPartition
    folder: Path
    optimizer: str
    stop_after: int = 0
    """Step of a stop request; 0: train to the end."""
    seed: int = 0
    """Of the initial weights, which a resumed training replaces."""


def run_training(training: Training) -> Arrays:
    """Train from the newest checkpoint; the state of method and optimizer at the end, on rank 0."""
    world, folder = current(), training.folder
    table = FeatureTable.open(folder / "table")
    neighbours = NeighbourTable.open(folder / "neighbours")
    readers = world if training.partition == "batch" else World()
    plan = EpochPlan(np.arange(ROWS), B, 3, readers, neighbours=NeighbourSampler(neighbours))
    anchors = np.arange(20)
    optimizer = OptimizerConfig(kind=training.optimizer, lr=0.02)
    trainer = Trainer(
        TrainJob(
            method=make_method(training.partition, training.seed),
            feed=FeatureFeed(table, plan, world.device),
            settings=TrainingLoopConfig(optimizer=optimizer, epochs=EPOCHS, precision="fp64"),
            seed=3,
            run_dir=folder,
            out=folder,
            setup=TrainingSetup(B),
            name="heads",
            stop=StopAfter(training.stop_after),
            log=lambda text: None,
            held_out=held_out_features(table, anchors, neighbours.rows(anchors)[0], world),
        )
    )
    if training.stop_after:
        with pytest.raises(StopRequested):
            trainer.run()
    else:
        assert trainer.run().step == EPOCHS * (ROWS // B)
    saved = gather_state(trainer.method, trainer.optimizer)
    tensors = {f"method {name}": value for name, value in saved["method"].items()}
    for number, slots in saved["optimizer"]["state"].items():
        tensors |= {f"optimizer {number} {name}": value for name, value in slots.items()}
    return {name: x.detach().numpy().copy() for name, x in tensors.items() if x is not None}


def run_trainings(trainings: list[Training]) -> list[Arrays]:
    return [run_training(training) for training in trainings]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a feature table and its neighbours."""
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ROWS, DIM)) + 3 * np.eye(DIM)[rng.integers(0, 5, ROWS)]
    np.save(folder / "rows.npy", rows)
    table = FeatureTable.from_npy(folder / "rows.npy", folder / "table", 3)
    search_neighbours(table, folder / "neighbours", 4)
    return folder


@pytest.fixture
def new_folder(tables: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder for a training, by its name."""

    def make_folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        for part in ("table", "neighbours"):
            (tmp_path / name / part).symlink_to(tables / part)
        return tmp_path / name

    return make_folder


def assert_checkpoint_is_complete(folder: Path, stopped: Arrays) -> None:
    """The checkpoint has the shapes that one rank would have written, and the ranks' values."""
    state = torch.load(next(folder.glob("work/checkpoints/step-*")) / "state.pt", weights_only=True)
    assert state["train_state"]["step"] == 3
    expected = make_method("batch").state_dict()
    shapes = {name: tuple(x.shape) for name, x in state["method"].items()}
    assert shapes == {name: tuple(x.shape) for name, x in expected.items()}
    for name, value in state["method"].items():
        np.testing.assert_array_equal(value.numpy(), stopped[f"method {name}"])


def test_a_checkpoint_can_be_resumed_with_other_ranks_and_partitions(
    new_folder: Callable[[str], Path],
) -> None:
    """Stopped in the second epoch, then resumed.

    With the same ranks and partition: the same bits as without a stop. With more ranks, fewer, one,
    or another partition: equal up to float64's rounding.
    """
    expected = {
        optimizer: run_training(Training("batch", new_folder(f"one-rank-{optimizer}"), optimizer))
        for optimizer in ("sgd", "adam")
    }
    heads, clusters = new_folder("heads"), new_folder("clusters")
    batch_to_clusters, to_three_ranks = new_folder("batch-to-clusters"), new_folder("to-three")
    on_two = run_ranks(
        run_trainings,
        2,
        [
            Training("heads", new_folder("heads-without-stop"), "sgd"),
            Training("heads", heads, "sgd", stop_after=3),
            Training("heads", heads, "sgd", seed=9),
            Training("clusters", new_folder("clusters-without-stop"), "adam"),
            Training("clusters", clusters, "adam", stop_after=3),
            Training("clusters", clusters, "adam", seed=9),
            Training("batch", batch_to_clusters, "sgd", stop_after=3),
            Training("clusters", batch_to_clusters, "sgd", seed=9),
            Training("heads", to_three_ranks, "adam", stop_after=3),
        ],
    )[0]
    for without_stop, _, resumed in (on_two[0:3], on_two[3:6]):
        assert any("optimizer" in name for name in resumed)
        for name, value in without_stop.items():
            np.testing.assert_array_equal(resumed[name], value, err_msg=name)

    to_two_ranks, to_one_rank = new_folder("to-two"), new_folder("to-one")
    on_three = run_ranks(
        run_trainings,
        3,
        [
            Training("clusters", to_three_ranks, "adam", seed=9),
            Training("clusters", to_two_ranks, "sgd", stop_after=3),
            Training("heads", to_one_rank, "adam", stop_after=3),
        ],
    )[0]
    on_two_again = run_ranks(run_trainings, 2, [Training("heads", to_two_ranks, "sgd", seed=9)])[0]
    on_one = run_training(Training("batch", to_one_rank, "adam", seed=9))
    for optimizer, folder, stopped, resumed in (
        ("sgd", heads, on_two[1], on_two[2]),
        ("adam", clusters, on_two[4], on_two[5]),
        ("sgd", batch_to_clusters, on_two[6], on_two[7]),
        ("adam", to_three_ranks, on_two[8], on_three[0]),
        ("sgd", to_two_ranks, on_three[1], on_two_again[0]),
        ("adam", to_one_rank, on_three[2], on_one),
    ):
        assert_checkpoint_is_complete(folder, stopped)
        assert_close(resumed, expected[optimizer], 1e-8)


# --- the stage -------------------------------------------------------------------------------

CONFIG = """
data:
  train: {source: "sklearn:digits", limit: 200}
  size: 8
  stored: raw
  resolution: 8
  mean: [0.3, 0.3, 0.3]
  std: [0.35, 0.35, 0.35]
stages:
  pixels: {kind: embed, pixels: true, num_shards: 2}
  neighbours: {kind: neighbours, features: pixels, num_neighbours: 5}
  heads:
    kind: train
    features: pixels
    network: {name: pixels}
    neighbours: neighbours
    method: {kind: scan, num_clusters: [10, 13], num_heads: 2}
    optimizer: {lr: 0.05}
    epochs: 4
    global_batch: 60
    held_out_share: 0.3
    precision: fp64
"""


def run_pipelines(config: Path, folders: dict[str, Path]) -> dict[str, tuple[str, Arrays]]:
    """By value of runtime.head_partition: (log, published heads) of a run in that folder."""
    results = {}
    for setting, folder in folders.items():
        lines: list[str] = []
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        run = load_config(
            config, [f"runtime.run_dir={folder}", f"runtime.head_partition={setting}"]
        )
        published = Pipeline(run, current(), StopFlag(), lines.append).run()["heads"]
        tensors = load_tensors(published / "heads.safetensors")
        arrays = {name: x.numpy().copy() for name, x in tensors.items()}
        results[setting] = ("\n".join(lines), arrays)
    return results


def test_the_stage_publishes_all_heads_for_any_partition(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    _, expected = run_pipelines(config, {"auto": tmp_path / "one-rank"})["auto"]
    assert expected["weight"].shape == (46, 192)
    assert np.any(expected["alignment"] >= 0)
    folders = {setting: tmp_path / setting for setting in ("heads", "clusters")}
    for setting, (log, found) in run_ranks(run_pipelines, 2, config, folders)[0].items():
        assert f"heads: splitting the {setting} over 2 ranks (set by runtime.head_partition)" in log
        assert_close(found, expected, 1e-6)
