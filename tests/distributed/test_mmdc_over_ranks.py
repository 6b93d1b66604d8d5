"""MMDC: W ranks equal one, the targets stay the same ones over any number of ranks, refinement, resume."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.ranks import run_ranks

N, B, STEPS = 60, 24, 4
CASES = {
    "plain": dict(matching_block=24),
    "small blocks": dict(matching_block=10),
    "spread": dict(matching_block=16, sigma=0.05, means="random", code_dim=5),
    "rotation": dict(matching_block=24, rotation=True),
    "refined": dict(matching_block=24, refine_from=0, refine_restarts=2, track=True),
    "tracked": dict(matching_block=24, track=True, rotation=True),
}


def make(name: str):
    """The method in float64 on a tiny network."""
    from dist_scan.methods.base import MethodInputs
    from dist_scan.methods.mmdc import MMDCConfig, MMDCMethod
    from dist_scan.models.backbone import BackboneConfig, build_backbone

    torch.manual_seed(0)
    config = BackboneConfig(name="vgg_small", width=2)
    backbone = build_backbone(config)
    inputs = MethodInputs(
        num_images=N,
        global_batch=B,
        seed=3,
        epochs=STEPS,
        feature_dim=backbone.num_features,
        backbone=backbone,
        backbone_config=config,
    )
    return MMDCMethod(
        MMDCConfig(num_clusters=4, **{"rotation": False, **CASES[name]}), inputs
    ).double()


def images(*keys: int) -> torch.Tensor:
    return torch.randn(
        *keys[1:], 3, 16, 16, generator=torch.Generator().manual_seed(keys[0]), dtype=torch.float64
    )


def embed_with(folder):
    """What the stage hands to begin_epoch, on made images."""

    def embed(network, recipe):
        from dist_scan.data.feature_table import FeatureTable
        from dist_scan.world.collectives import barrier
        from dist_scan.world.world import current

        assert recipe == 0
        if current().rank == 0:
            table = FeatureTable.create(folder, N, 1, network.num_features, 1)
            with torch.no_grad():
                table.write_shard(0, network.eval()(images(99, N)).float().numpy()[:, None])
        barrier()
        return FeatureTable.open(folder)

    return embed


def train(name: str, folder=None):
    """Losses, the first gradient, the state and all target ids after STEPS steps through DDP; and the method."""
    from dist_scan.data.batch import Batch
    from dist_scan.models.batch_norm import sync_running_stats
    from dist_scan.world.collectives import all_mean
    from dist_scan.world.world import current, wrap_ddp

    method, world = make(name), current()
    network, mine = (
        wrap_ddp(method),
        slice(world.rank * B // world.world_size, (world.rank + 1) * B // world.world_size),
    )
    groups = method.parameter_groups()
    optimizer = torch.optim.SGD([p for g in groups for p in g.parameters], lr=0.5, momentum=0.9)
    losses, first = [], {}
    for s in range(STEPS):
        epoch = s  # an epoch of one step: with rotation every second one rotates
        method.begin_epoch(
            epoch, embed_with(folder / str(world.world_size) / str(s)) if folder else None
        )
        method.train()
        index = torch.from_numpy(np.random.default_rng(s).permutation(N)[:B])
        views = tuple(images(10 * s + v, B)[mine] for v in range(len(method.epoch_views(epoch))))
        batch = Batch(index[mine], views, epoch, s)
        step = network(batch)
        step.loss.backward()
        losses.append(float(all_mean(step.loss.detach())))
        first = first or {n: p.grad.clone().numpy() for n, p in method.named_parameters()}
        optimizer.step()
        method.end_step(batch, step)
        sync_running_stats(method)
        optimizer.zero_grad()
    history = method.history.whole().numpy() if method.history is not None else np.zeros((N, 0))
    state = (
        method.target_id.state()
    )  # as plain numbers: a tensor sent between processes dies with its sender
    state["shards"] = {s: t.tolist() for s, t in state["shards"].items()}
    return (
        losses,
        first,
        {k: v.numpy() for k, v in method.state_dict().items()},
        method.target_id.whole().numpy(),
        state,
        history,
    )


@cache
def trained(world_size: int, name: str, folder=None):
    """Every rank's result."""
    return [train(name, folder)] if world_size == 1 else run_ranks(train, world_size, name, folder)


def close(a, b, what) -> None:
    scale = max(float(np.abs(b).max()), 1e-3) if np.size(b) else 1.0
    assert np.allclose(a, b, rtol=1e-6, atol=1e-6 * scale), (
        f"{what}: {np.abs(a - b).max()} of {scale}"
    )


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one(name, tmp_path: Path) -> None:
    folder = tmp_path if name == "refined" else None
    alone = trained(1, name, folder)[0]
    assert np.any(alone[1]["network.head.weight"]) and len(set(alone[0])) == STEPS
    for world_size in (2, 3) if name == "small blocks" else (3,):
        for rank in trained(world_size, name, folder):
            close(rank[0], alone[0], "loss")
            for part in (1, 2):
                assert rank[part].keys() == alone[part].keys()
                for key, expected in alone[part].items():
                    close(rank[part][key], expected, key)
            assert np.array_equal(rank[3], alone[3]) and np.array_equal(rank[5], alone[5])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_multiset_of_targets_is_kept(world_size: int) -> None:
    ids = trained(world_size, "small blocks")[0][3]
    assert np.array_equal(np.sort(ids), np.arange(N)), "nothing padded, doubled or lost"
    assert not np.array_equal(ids, np.arange(N)), "targets move"


def test_refinement_takes_the_means_and_keeps_the_numbers_of_the_clusters(tmp_path: Path) -> None:
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.search.kmeans import kmeans
    from dist_scan.search.options import KMeansOptions

    method = make("refined").eval()
    before = method.codes.component(method.target_id.whole().numpy())
    embed = embed_with(tmp_path / "table")
    method.begin_epoch(0, embed)
    ids = method.target_id.whole().numpy()
    assert ids.min() >= N and ids.max() < N + 4
    found = kmeans(
        FeatureTable.open(tmp_path / "table"), 4, KMeansOptions(iterations=300, restarts=2, seed=3)
    ).assignment
    assert len(set(zip(found, ids))) == len(set(found)), "k-means' clusters, renamed"
    assert (before == ids - N).sum() == max(
        (before == np.array(p)[found]).sum() for p in permutations(range(4))
    )


def test_refinement_that_was_asked_to_leave_goes_on(tmp_path: Path) -> None:
    from dist_scan.monitoring.progress import StopRequested

    targets, polls = [], iter(range(3))
    for name, stop in (
        ("whole", lambda: False),
        ("asked", lambda: next(polls, None) is None),
        ("asked", lambda: False),
    ):
        method = make("refined").eval()
        method.inputs = replace(method.inputs, work_dir=tmp_path / name, stop_requested=stop)
        try:
            method.begin_epoch(0, embed_with(tmp_path / f"table {len(targets)}"))
        except StopRequested:
            assert (tmp_path / name / "refinement.npz").is_file()
            targets.append("stopped")
        else:
            targets.append(method.target_id.whole().tolist())
    assert (
        targets[1] == "stopped"
        and targets[2] == targets[0]
        and not (tmp_path / "asked" / "refinement.npz").exists()
    )


def test_refinement_comes_once_a_round(tmp_path: Path) -> None:
    from dist_scan.methods.mmdc import MMDCConfig

    method = make("rotation")
    method.config = MMDCConfig(num_clusters=4, refine_from=2, refine_restarts=1)
    asked = []

    def embed(network, recipe):
        asked.append(epoch)
        return embed_with(tmp_path / str(epoch))(network, recipe)

    for epoch in range(6):
        method.begin_epoch(epoch, embed)
    assert asked == [2, 4]
    assert [method.epoch_views(e) for e in range(4)] == [(0, 1), (2, 2, 2, 2), (1,), (2, 2, 2, 2)]
    method.config = method.config.model_copy(update={"rotation_first": True})
    assert [method.is_rotation_epoch(e) for e in range(4)] == [True, False, True, False]


def test_rotations_are_told_apart_by_their_label() -> None:
    """A head that reads the corner which each quarter turn brings to the top left has the rotation's label."""
    from dist_scan.data.batch import Batch

    method = make("rotation")

    class Corners(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, -1], x[:, 0, -1, -1], x[:, 0, -1, 0]], 1)

    method.network.backbone, method.rotation_head = (
        Corners(),
        torch.nn.Linear(4, 4, bias=False, dtype=torch.float64),
    )
    picture = torch.zeros(5, 3, 8, 8, dtype=torch.float64)
    picture[:, :, 0, 0] = (
        1  # turned counter-clockwise the top left corner goes to the bottom left, bottom right, top right
    )
    with torch.no_grad():
        method.rotation_head.weight.copy_(50 * torch.eye(4, dtype=torch.float64)[[0, 3, 2, 1]])
    step = method(Batch(torch.arange(5), (picture,) * 4, 1, 0))
    assert step.metrics["rotation_accuracy"] == 1 and step.loss < 1e-6


def load_whole(states):
    method = make("plain")
    method.target_id.load(
        [
            {**state, "shards": {s: torch.tensor(rows) for s, rows in state["shards"].items()}}
            for state in states
        ]
    )
    return method.target_id.whole().tolist()


def test_target_ids_survive_another_number_of_ranks() -> None:
    results = trained(3, "small blocks")
    states = [r[4] for r in results]
    assert load_whole(states) == results[0][3].tolist()
    assert run_ranks(load_whole, 2, states) == [results[0][3].tolist()] * 2


def test_a_tracked_round_holds_the_nearest_mean_of_what_was_matched(tmp_path: Path) -> None:
    """A round of two epochs has one column: the clusters of the batch of its epoch of codes; images it did not meet have none."""
    from dist_scan.data.batch import Batch

    history = trained(1, "tracked")[0][5]
    assert history.shape == (N, STEPS // 2) and [(column >= 0).sum() for column in history.T] == [
        B,
        B,
    ]
    method, rows, x = make("tracked"), torch.arange(5, 5 + B), images(3, B)
    with torch.no_grad():
        method.network.head.weight.normal_()
    step = method.train()(Batch(rows, (x, x), 2, 0))
    method.end_step(Batch(rows, (x, x), 2, 0), step)
    outputs = method.eval().network(x).detach().numpy()
    nearest = np.linalg.norm(outputs[:, None] - method.codes.means[None], axis=2).argmin(1)
    kept = method.history.whole().numpy()
    assert len(set(nearest)) > 1 and np.array_equal(kept[5 : 5 + B, 1], nearest)
    assert (kept[:, 0] == -1).all() and (np.delete(kept[:, 1], range(5, 5 + B)) == -1).all()


def test_what_was_tracked_is_published_beside_the_last_targets(tmp_path: Path) -> None:
    from dist_scan.data.assignments import Assignments

    method, embed = make("refined"), embed_with(tmp_path / "table")
    method.begin_epoch(2, embed)
    outputs = embed(method.network, 0).rows(np.arange(N), 0)
    method.float().prepare_publish()
    method.publish(tmp_path)
    with np.load(tmp_path / "history.npz") as kept:
        assert kept["epoch"].tolist() == [0, 1, 2, 3] and (kept["cluster"][[0, 1, 3]] == -1).all()
        assert np.array_equal(kept["cluster"][2], outputs.argmax(1)), (
            "of refinement: the nearest mean of what k-means saw"
        )
    found = Assignments.load(tmp_path)
    assert found.num_clusters == 4 and np.array_equal(
        found.cluster, method.codes.component(method.target_id.whole().numpy())
    )


def test_what_is_published_assigns_to_the_nearest_mean(tmp_path: Path) -> None:
    from dist_scan.models.backbone import load_backbone
    from dist_scan.models.cluster_model import load_cluster_model

    method, x = make("spread").float().eval(), images(5, 30).float()
    with torch.no_grad():
        head = method.network.head
        head.weight.normal_()
        head.bias.copy_(
            -head.weight @ method.network.backbone(x).mean(0)
        )  # outputs in all directions
    method.publish(tmp_path)
    outputs = method.network(x).detach().numpy()
    nearest = np.linalg.norm(outputs[:, None] - method.codes.means[None], axis=2).argmin(1)
    assert len(set(nearest)) > 1
    assert np.array_equal(load_cluster_model(tmp_path).eval()(x).argmax(1).numpy(), nearest)
    torch.testing.assert_close(load_backbone(tmp_path)[0].eval()(x), method.network.backbone(x))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(refine_from=3), "allowed with rotation: even"),
        (dict(rotation=False, rotation_first=True), "set rotation: true"),
        (dict(code_dim=7), "set means: random"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, text) -> None:
    from dist_scan.methods.mmdc import MMDCConfig

    with pytest.raises(ValueError, match=text):
        MMDCConfig(num_clusters=4, **settings)


def test_no_weight_decay_on_vectors() -> None:
    decayed, free = make("rotation").parameter_groups()
    assert (
        all(p.ndim > 1 for p in decayed.parameters)
        and all(p.ndim == 1 for p in free.parameters)
        and free.weight_decay == 0.0
    )
