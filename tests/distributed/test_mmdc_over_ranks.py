"""MMDC: several ranks equal one, targets are only permuted, refinement, restart, publication."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_scan.data.batch import Batch
from dist_scan.data.feature_table import FeatureTable
from tests.support.methods import (
    assert_all_close,
    assert_close,
    gradients,
    local_slice,
    make_method,
    state_arrays,
    tiny_inputs,
    update,
)
from tests.support.ranks import run_ranks

if TYPE_CHECKING:
    from dist_scan.methods.mmdc import MMDCMethod

NUM_IMAGES, GLOBAL_BATCH, STEPS = 60, 24, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"matching_block": 24},
    "small blocks": {"matching_block": 10},
    "spread": {"matching_block": 16, "sigma": 0.05, "means": "random", "code_dim": 5},
    "rotation": {"matching_block": 24, "rotation": True},
    "refined": {"matching_block": 24, "refine_from": 0, "refine_restarts": 2, "track": True},
    "tracked": {"matching_block": 24, "track": True, "rotation": True},
}


def make(name: str, **inputs: Any) -> MMDCMethod:
    """The method in float64 with four clusters; an epoch is one step."""
    from dist_scan.models.backbone import BackboneConfig, build_backbone

    torch.manual_seed(0)
    config = BackboneConfig(name="vgg_small", width=2)
    backbone = build_backbone(config)
    method_inputs = tiny_inputs(
        NUM_IMAGES,
        GLOBAL_BATCH,
        seed=3,
        epochs=STEPS,
        feature_dim=backbone.num_features,
        backbone=backbone,
        backbone_config=config,
        **inputs,
    )
    settings = {"num_clusters": 4, "rotation": False, **SETTINGS[name]}
    return make_method("mmdc", settings, method_inputs).double()


def random_images(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)


class EmbedImages:
    """Embeds random images into a new folder at each call, as a stage does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = 0

    def __call__(self, network: nn.Module, recipe: str | int = "center") -> FeatureTable:
        from dist_scan.world.collectives import barrier
        from dist_scan.world.world import current

        assert recipe == 0
        self.calls += 1
        out = self.folder / f"{current().world_size}-{self.calls}"
        if current().rank == 0:
            table = FeatureTable.create(out, (NUM_IMAGES, 1, network.num_features), 1)
            with torch.no_grad():
                outputs = network.eval()(random_images(99, NUM_IMAGES))
            table.write_shard(0, outputs.float().numpy()[:, None])
        barrier()
        return FeatureTable.open(out)


@dataclass(frozen=True)
class Trained:
    """Result of a training: mean losses, gradients of the first step, and all state at the end."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    target_ids: np.ndarray
    bank_state: dict[str, Any]
    history: np.ndarray


def train(name: str, folder: Path) -> Trained:
    """STEPS epochs of one step each through DDP."""
    from dist_scan.world.collectives import all_mean
    from dist_scan.world.world import wrap_ddp

    method = make(name)
    network = wrap_ddp(method)
    embed = EmbedImages(folder)
    parameters = [p for group in method.parameter_groups() for p in group.parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    local = local_slice(GLOBAL_BATCH)
    losses: list[float] = []
    first_gradients: dict[str, np.ndarray] = {}
    for epoch in range(STEPS):
        method.begin_epoch(epoch, embed)
        method.train()
        index = torch.from_numpy(np.random.default_rng(epoch).permutation(NUM_IMAGES))
        views = tuple(
            random_images(10 * epoch + view, GLOBAL_BATCH)[local]
            for view in range(len(method.epoch_views(epoch)))
        )
        batch = Batch(index[:GLOBAL_BATCH][local], views, epoch, epoch)
        step = update(method, network, optimizer, batch)
        losses.append(float(all_mean(step.loss.detach())))
        first_gradients = first_gradients or gradients(method)
    history = np.zeros((NUM_IMAGES, 0))
    if method.history is not None:
        history = method.history.whole().numpy()
    bank_state = method.target_id.state()
    # As lists: a tensor sent to another process lives only as long as its sender.
    bank_state["shards"] = {s: rows.tolist() for s, rows in bank_state["shards"].items()}
    target_ids = method.target_id.whole().numpy()
    return Trained(losses, first_gradients, state_arrays(method), target_ids, bank_state, history)


@cache
def trained_by_rank(world_size: int, name: str, folder: Path) -> list[Trained]:
    return [train(name, folder)] if world_size == 1 else run_ranks(train, world_size, name, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mmdc")


@pytest.mark.parametrize("name", SETTINGS)
def test_several_ranks_equal_one(name: str, folder: Path) -> None:
    (single,) = trained_by_rank(1, name, folder / name)
    assert np.any(single.gradients["network.head.weight"])
    assert len(set(single.losses)) == STEPS
    for world_size in (2, 3) if name == "small blocks" else (3,):
        for rank in trained_by_rank(world_size, name, folder / name):
            assert_close(rank.losses, single.losses, "loss")
            assert_all_close(rank.gradients, single.gradients, "gradient")
            assert_all_close(rank.state, single.state, "state")
            assert np.array_equal(rank.target_ids, single.target_ids)
            assert np.array_equal(rank.history, single.history)


# --- targets ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_targets_are_only_permuted(world_size: int, folder: Path) -> None:
    ids = trained_by_rank(world_size, "small blocks", folder / "small blocks")[0].target_ids
    assert np.array_equal(np.sort(ids), np.arange(NUM_IMAGES))
    assert not np.array_equal(ids, np.arange(NUM_IMAGES))


def load_target_ids(states: list[dict[str, Any]]) -> list[int]:
    method = make("plain")
    for state in states:
        state["shards"] = {s: torch.tensor(rows) for s, rows in state["shards"].items()}
    method.target_id.load(states)
    return method.target_id.whole().tolist()


def test_target_ids_are_loaded_on_another_number_of_ranks(folder: Path) -> None:
    results = trained_by_rank(3, "small blocks", folder / "small blocks")
    states = [result.bank_state for result in results]
    expected = results[0].target_ids.tolist()
    assert run_ranks(load_target_ids, 2, states) == [expected] * 2
    assert load_target_ids(states) == expected


def test_rotations_are_labelled_counter_clockwise() -> None:
    """Uses a head that tells from the four corners which rotation it sees."""
    method = make("rotation")

    class Corners(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            corners = x[:, 0, 0, 0], x[:, 0, 0, -1], x[:, 0, -1, -1], x[:, 0, -1, 0]
            return torch.stack(corners, 1)

    method.network.backbone = Corners()
    method.rotation_head = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    # Rotated counter-clockwise, the top left corner moves to the bottom left, the bottom right and
    # the top right.
    image = torch.zeros(5, 3, 8, 8, dtype=torch.float64)
    image[:, :, 0, 0] = 1
    with torch.no_grad():
        method.rotation_head.weight.copy_(50 * torch.eye(4, dtype=torch.float64)[[0, 3, 2, 1]])
    step = method(Batch(torch.arange(5), (image,) * 4, 1, 0))
    assert step.metrics["rotation_accuracy"] == 1
    assert step.loss < 1e-6


# --- refinement ---


def test_refinement_relabels_the_clusters_of_kmeans(tmp_path: Path) -> None:
    from dist_scan.search.kmeans import kmeans
    from dist_scan.search.options import KMeansOptions

    method = make("refined").eval()
    before = method.codes.component(method.target_id.whole().numpy())
    method.begin_epoch(0, EmbedImages(tmp_path))
    ids = method.target_id.whole().numpy()
    assert ids.min() >= NUM_IMAGES
    assert ids.max() < NUM_IMAGES + 4
    table = FeatureTable.open(tmp_path / "1-1")
    clusters = kmeans(table, 4, KMeansOptions(iterations=300, restarts=2, seed=3)).assignment
    assert len(set(zip(clusters, ids))) == len(set(clusters)), "the clusters of k-means, renamed"
    most_equal = max((before == np.array(p)[clusters]).sum() for p in permutations(range(4)))
    assert (before == ids - NUM_IMAGES).sum() == most_equal


def test_refinement_goes_on_after_a_stop_request(tmp_path: Path) -> None:
    from dist_scan.monitoring.progress import StopRequested

    undisturbed = make("refined", work_dir=tmp_path / "undisturbed").eval()
    undisturbed.begin_epoch(0, EmbedImages(tmp_path / "undisturbed tables"))
    stopped = make("refined", work_dir=tmp_path / "stopped").eval()
    embed = EmbedImages(tmp_path / "stopped tables")
    polls = iter(range(3))
    usual_inputs = stopped.inputs
    stopped.inputs = replace(usual_inputs, stop_requested=lambda: next(polls, None) is None)
    with pytest.raises(StopRequested):
        stopped.begin_epoch(0, embed)
    assert (tmp_path / "stopped" / "refinement.npz").is_file()
    stopped.inputs = usual_inputs
    stopped.begin_epoch(0, embed)
    assert not (tmp_path / "stopped" / "refinement.npz").exists()
    assert stopped.target_id.whole().tolist() == undisturbed.target_id.whole().tolist()


def test_refinement_happens_once_per_round(tmp_path: Path) -> None:
    from dist_scan.methods.mmdc import MMDCConfig

    method = make("rotation")
    method.config = MMDCConfig(num_clusters=4, refine_from=2, refine_restarts=1)
    embed = EmbedImages(tmp_path)
    calls = []
    for epoch in range(6):
        method.begin_epoch(epoch, embed)
        calls.append(embed.calls)
    assert calls == [0, 0, 1, 1, 2, 2]


def test_views_follow_the_kind_of_epoch() -> None:
    from dist_scan.methods.mmdc import MMDCConfig

    method = make("rotation")
    method.config = MMDCConfig(num_clusters=4, refine_from=2, refine_restarts=1)
    assert [method.epoch_views(e) for e in range(4)] == [(0, 1), (2, 2, 2, 2), (1,), (2, 2, 2, 2)]
    method.config = method.config.model_copy(update={"rotation_first": True})
    assert [method.is_rotation_epoch(e) for e in range(4)] == [True, False, True, False]


# --- results ---


def nearest_means(method: MMDCMethod, outputs: np.ndarray) -> np.ndarray:
    return np.linalg.norm(outputs[:, None] - method.codes.means[None], axis=2).argmin(1)


def test_a_round_has_one_column_in_the_history(folder: Path) -> None:
    history = trained_by_rank(1, "tracked", folder / "tracked")[0].history
    assert history.shape == (NUM_IMAGES, STEPS // 2)
    assert [(column >= 0).sum() for column in history.T] == [GLOBAL_BATCH, GLOBAL_BATCH]


def test_the_history_holds_the_nearest_means_of_the_matched_outputs() -> None:
    method = make("tracked")
    first, last = 5, 5 + GLOBAL_BATCH
    images = random_images(3, GLOBAL_BATCH)
    with torch.no_grad():
        method.network.head.weight.normal_()
    # Before the step, whose forward pass moves the running statistics of batch norm.
    nearest = nearest_means(method, method.eval().network(images).detach().numpy())
    batch = Batch(torch.arange(first, last), (images, images), 2, 0)
    method.end_step(batch, method.train()(batch))
    history = method.history.whole().numpy()
    assert len(set(nearest)) > 1
    assert np.array_equal(history[first:last, 1], nearest)
    assert (history[:, 0] == -1).all()
    assert (np.delete(history[:, 1], range(first, last)) == -1).all()


def test_history_and_last_targets_are_published(tmp_path: Path) -> None:
    from dist_scan.data.assignments import Assignments

    method = make("refined")
    method.begin_epoch(2, EmbedImages(tmp_path / "tables"))
    outputs = FeatureTable.open(tmp_path / "tables" / "1-1").rows(np.arange(NUM_IMAGES), 0)
    method.float().prepare_publish()
    method.publish(tmp_path)
    with np.load(tmp_path / "history.npz") as history:
        assert history["epoch"].tolist() == [0, 1, 2, 3]
        assert (history["cluster"][[0, 1, 3]] == -1).all()
        # In a refined round: the nearest means of the outputs that k-means clustered.
        assert np.array_equal(history["cluster"][2], outputs.argmax(1))
    clusters = Assignments.load(tmp_path)
    assert clusters.num_clusters == 4
    components = method.codes.component(method.target_id.whole().numpy())
    assert np.array_equal(clusters.cluster, components)


def test_the_published_model_assigns_to_the_nearest_mean(tmp_path: Path) -> None:
    from dist_scan.models.backbone import load_backbone
    from dist_scan.models.cluster_model import load_cluster_model

    method = make("spread").float().eval()
    images = random_images(5, 30).float()
    with torch.no_grad():
        # Outputs in all directions.
        head = method.network.head
        head.weight.normal_()
        head.bias.copy_(-head.weight @ method.network.backbone(images).mean(0))
    method.publish(tmp_path)
    nearest = nearest_means(method, method.network(images).detach().numpy())
    assert len(set(nearest)) > 1
    model = load_cluster_model(tmp_path).eval()
    assert np.array_equal(model(images).argmax(1).numpy(), nearest)
    backbone = load_backbone(tmp_path)[0].eval()
    torch.testing.assert_close(backbone(images), method.network.backbone(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine_from": 3}, "allowed with rotation: even"),
        ({"rotation": False, "rotation_first": True}, "set rotation: true"),
        ({"code_dim": 7}, "set means: random"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    from dist_scan.methods.mmdc import MMDCConfig

    with pytest.raises(ValueError, match=message):
        MMDCConfig(num_clusters=4, **settings)


def test_vectors_have_no_weight_decay() -> None:
    matrices, vectors = make("rotation").parameter_groups()
    assert all(p.ndim > 1 for p in matrices.parameters)
    assert all(p.ndim == 1 for p in vectors.parameters)
    assert vectors.weight_decay == 0.0
