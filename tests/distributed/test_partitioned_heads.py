"""Heads, or the clusters of every head, dealt over the ranks: the losses, gradients, choice and publication of one rank that has them all;
a checkpoint that any number of ranks and any dealing goes on from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.feed import EpochPlan, FeatureFeed, NeighbourSampler, held_out_features
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.engine.optimizer import OptimizerConfig, ScheduleConfig
from dist_scan.engine.sharded_state import gather_state
from dist_scan.engine.stop import StopFlag
from dist_scan.engine.training_loop import Trainer, TrainJob, TrainSettings
from dist_scan.heads.partition import HeadPartition
from dist_scan.monitoring.bottleneck import TrainingSetup
from dist_scan.monitoring.progress import StopRequested
from dist_scan.world.world import World, current
from tests.support.ranks import run_ranks

B, DIM, STEPS, ROWS, EPOCHS = 24, 6, 4, 60, 3
SCALES = (
    1.0,
    600.0,
)  # of the features: logits of some hundreds, where products of probabilities underflow
DEALT = [
    ("heads", 1),
    ("heads", 2),
    ("heads", 3),
    ("clusters", 1),
    ("clusters", 2),
    ("clusters", 3),
]  # 5 and 7 clusters over 2 and 3 ranks are uneven


def make(share: str, seed: int = 0):
    """Four heads in float64, the same whoever shares them."""
    from dist_scan.methods.base import MethodInputs
    from dist_scan.methods.scan import ScanConfig, ScanMethod

    torch.manual_seed(seed)
    inputs = MethodInputs(
        num_images=ROWS,
        global_batch=B,
        seed=3,
        on_features=True,
        feature_dim=DIM,
        head_partition=share,
        feature_mean=np.full(DIM, 0.1),
        feature_std=np.full(DIM, 2.0),
    )
    return ScanMethod(ScanConfig(num_clusters=(5, 7), num_heads=2), inputs).double()


def whole(method, name: str, mine: torch.Tensor) -> np.ndarray | None:
    rows = method.sharded_state.get(name)
    found = mine if rows is None else rows.gather(mine)
    return None if found is None else found.detach().cpu().numpy().copy()


def train(share: str, scale: float, folder: Path):
    """Losses and metrics (means over ranks), whole gradients, whole state after some steps, what choosing logs; published by rank 0."""
    from dist_scan.data.batch import Batch, HeldOut
    from dist_scan.heads.selection import PublishedHeads
    from dist_scan.world.collectives import all_mean
    from dist_scan.world.world import wrap_ddp

    method, world = make(share), current()
    network = method if method.sharded_state else wrap_ddp(method)
    assert bool(method.sharded_state) == (share != "batch")
    seen = (
        slice(0, B)
        if share != "batch"
        else slice(world.rank * B // world.world_size, (world.rank + 1) * B // world.world_size)
    )
    optimizer = torch.optim.SGD(method.heads.parameters(), lr=0.05 / scale, momentum=0.9)
    gen, told, gradients = torch.Generator().manual_seed(1), [], []
    draw = lambda n: torch.randn(n, DIM, generator=gen, dtype=torch.float64) * scale  # noqa: E731
    for s in range(STEPS):
        views = [draw(B) for _ in range(2)]
        step = network(Batch(torch.arange(B)[seen], tuple(v[seen] for v in views), 0, s))
        step.loss.backward()
        told.append(
            {k: float(all_mean(v.detach())) for k, v in {"loss": step.loss, **step.metrics}.items()}
        )
        gradients.append({n: whole(method, n, p.grad) for n, p in method.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    held, part = draw(9), np.array_split(np.arange(9), world.world_size)[world.rank]
    neighbours = np.array([[1, 5], [6, 8], [0, 7], [4, 4]])
    logged = method.end_epoch(
        0, HeldOut(lambda: iter([Batch(torch.from_numpy(part), (held[part],), 0, 0)]), neighbours)
    )
    state = {n: whole(method, n, v) for n, v in method.state_dict().items()}
    method.prepare_publish()
    if world.rank == 0:
        method.publish(folder)
        kept = PublishedHeads(folder)
        state |= {f"published {h}": kept.logits(h, held).detach().numpy() for h in range(4)}
        state["chosen"] = method.choice.selected_head()(held).detach().numpy()
    return told, gradients, state, logged, len(method.heads.weight)


def close(found: dict, wanted: dict, rtol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(
            found[name],
            value,
            rtol=rtol,
            atol=rtol * max(1e-3, float(np.abs(value).max())),
            err_msg=name,
        )


def trains(share: str, folder: Path):
    return [train(share, scale, folder / str(scale)) for scale in SCALES]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    return trains("batch", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("share, world_size", [*DEALT, ("batch", 2)])
def test_dealt_equals_one_rank(share, world_size: int, alone, tmp_path: Path) -> None:
    ranks = (
        run_ranks(trains, world_size, share, tmp_path)
        if world_size > 1
        else [trains(share, tmp_path)]
    )
    for scale, expected in enumerate(alone):
        for told, _, _, logged, _ in (rank[scale] for rank in ranks):
            for mine, wanted in zip(told, expected[0], strict=True):
                assert mine == pytest.approx(wanted, rel=1e-9)
            assert logged == pytest.approx(expected[3], rel=1e-9)
        first = ranks[0][scale]
        for mine, wanted in zip(first[1], expected[1], strict=True):
            assert all(np.any(g) for g in wanted.values())
            close(mine, wanted, 1e-8)
        close(first[2], expected[2], 1e-8)
        held = sum(
            rank[scale][4] for rank in ranks
        )  # rows of weights over all ranks: once, unless each has all
        assert held == 24 * (world_size if share == "batch" else 1)


class StopAfter(StopFlag):
    """Requests a stop that takes effect at the end of the n-th step of this start; 0: never."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps_left = steps

    @property
    def requested(self) -> bool:
        self.steps_left -= 1
        return self.steps_left == 0


def trainer(share: HeadPartition, folder: Path, kind: str, steps: int, seed: int) -> Trainer:
    """A training on the feature table in a folder."""
    world = current()
    table = FeatureTable.open(folder / "table")
    neighbours = NeighbourTable.open(folder / "neighbours")
    plan = EpochPlan(
        np.arange(ROWS),
        B,
        3,
        world if share == "batch" else World(),
        neighbours=NeighbourSampler(neighbours),
    )
    anchors = np.arange(20)
    return Trainer(
        TrainJob(
            method=make(share, seed),
            feed=FeatureFeed(table, plan, world.device),
            settings=TrainSettings(
                OptimizerConfig(kind=kind, lr=0.02), ScheduleConfig(), EPOCHS, 3, "fp64"
            ),
            run_dir=folder,
            out=folder,
            setup=TrainingSetup(B),
            name="heads",
            stop=StopAfter(steps),
            log=lambda text: None,
            held_out=held_out_features(table, anchors, neighbours.rows(anchors)[0], world),
        )
    )


def school(
    share: HeadPartition, folder: Path, kind: str, steps: int = 0, seed: int = 0
) -> dict[str, np.ndarray]:
    """Train to the end, or to the step of a stop: the state of method and optimizer, on rank 0.

    seed: of the initial weights, which a resumed training replaces.
    """
    run = trainer(share, folder, kind, steps, seed)
    try:
        state = run.run()
    except StopRequested:
        assert steps
    else:
        assert not steps and state.step == EPOCHS * (ROWS // B)
    saved = gather_state(run.method, run.optimizer)
    flat = {f"method {k}": v for k, v in saved["method"].items()}
    for number, slots in saved["optimizer"]["state"].items():
        flat |= {f"optimizer {number} {name}": value for name, value in slots.items()}
    return {k: v.detach().numpy().copy() for k, v in flat.items() if v is not None}


def schools(jobs: list[tuple]):
    return [school(*job) for job in jobs]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory):
    from dist_scan.search.neighbours import mine_neighbours

    folder = tmp_path_factory.mktemp("bank")
    rng = np.random.default_rng(0)
    np.save(
        folder / "rows.npy",
        rng.normal(size=(ROWS, DIM)) + 3 * np.eye(DIM)[rng.integers(0, 5, ROWS)],
    )
    mine_neighbours(
        FeatureTable.from_npy(folder / "rows.npy", folder / "table", 3), folder / "neighbours", 4
    )
    return folder


@pytest.fixture
def fresh(table, tmp_path: Path):
    """A folder for one training, by a name."""

    def make_folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        for part in ("table", "neighbours"):
            (tmp_path / name / part).symlink_to(table / part)
        return tmp_path / name

    return make_folder


def saved_whole(folder: Path, stopped: dict) -> None:
    """The checkpoint in folder is what one rank would have written, and holds what the ranks had."""
    state = torch.load(next(folder.glob("work/checkpoints/step-*")) / "state.pt", weights_only=True)
    assert state["position"]["step"] == 3
    assert {k: tuple(v.shape) for k, v in state["method"].items()} == {
        k: tuple(v.shape) for k, v in make("batch").state_dict().items()
    }
    for name, value in state["method"].items():
        np.testing.assert_array_equal(value.numpy(), stopped[f"method {name}"])


def test_a_checkpoint_is_whole_and_goes_on_however_it_is_dealt(fresh) -> None:
    """Stopped in the second epoch; resumed as before: the same bits as never stopped. With more ranks, fewer, one, or dealt otherwise:
    the same to float64's rounding."""
    alone = {kind: school("batch", fresh(f"alone-{kind}"), kind) for kind in ("sgd", "adam")}
    again = {}  # (optimizer, folder) -> (stopped, resumed)
    heads, clusters, mixed, grown = (
        fresh(name) for name in ("heads", "clusters", "mixed", "grown")
    )
    found = run_ranks(
        schools,
        2,
        [
            ("heads", fresh("undisturbed-heads"), "sgd"),
            ("heads", heads, "sgd", 3),
            ("heads", heads, "sgd", 0, 9),
            ("clusters", fresh("undisturbed-clusters"), "adam"),
            ("clusters", clusters, "adam", 3),
            ("clusters", clusters, "adam", 0, 9),
            ("batch", mixed, "sgd", 3),
            ("clusters", mixed, "sgd", 0, 9),
            ("heads", grown, "adam", 3),
        ],
    )[0]
    for undisturbed, stopped, resumed in (found[0:3], found[3:6]):
        assert any("optimizer" in name for name in resumed)
        for name, value in undisturbed.items():
            np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    again |= {
        ("sgd", heads): found[1:3],
        ("adam", clusters): found[4:6],
        ("sgd", mixed): found[6:8],
    }
    shrunk, whole_again = fresh("shrunk"), fresh("whole")
    more = run_ranks(
        schools,
        3,
        [
            ("clusters", grown, "adam", 0, 9),
            ("clusters", shrunk, "sgd", 3),
            ("heads", whole_again, "adam", 3),
        ],
    )[0]
    again["adam", grown] = [found[8], more[0]]
    again["sgd", shrunk] = [more[1], *run_ranks(schools, 2, [("heads", shrunk, "sgd", 0, 9)])[0]]
    again["adam", whole_again] = [more[2], school("batch", whole_again, "adam", 0, 9)]
    for (kind, folder), (stopped, resumed) in again.items():
        saved_whole(folder, stopped)
        close(resumed, alone[kind], 1e-8)


CONFIG = """
data: {train: {source: "sklearn:digits", limit: 200}, size: 8, stored: raw, resolution: 8, mean: [0.3, 0.3, 0.3], std: [0.35, 0.35, 0.35]}
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


def pipeline(config: Path, settings: dict[str, Path]):
    """By setting of runtime.heads: what the heads stage says and publishes, run in that folder."""
    from dist_scan.storage.tensors import load_tensors
    from dist_scan.pipeline import Pipeline
    from dist_scan.run_config import load_config

    out = {}
    for setting, folder in settings.items():
        said: list[str] = []
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        run = load_config(config, [f"runtime.run_dir={folder}", f"runtime.heads={setting}"])
        published = Pipeline(run, current(), StopFlag(), said.append).run()["heads"]
        out[setting] = (
            "\n".join(said),
            {k: v.numpy().copy() for k, v in load_tensors(published / "heads.safetensors").items()},
        )
    return out


def test_the_stage_publishes_whole_heads_whoever_held_them(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(CONFIG)
    alone = pipeline(tmp_path / "small.yaml", {"auto": tmp_path / "alone"})["auto"][1]
    assert alone["weight"].shape == (46, 192) and np.any(alone["alignment"] >= 0)
    for setting, (said, dealt) in run_ranks(
        pipeline, 2, tmp_path / "small.yaml", {s: tmp_path / s for s in ("heads", "clusters")}
    )[0].items():
        assert f"heads: {setting} split over 2 ranks (set by runtime.heads)" in said
        close(dealt, alone, 1e-6)
