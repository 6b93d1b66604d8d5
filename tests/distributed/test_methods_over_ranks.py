"""W ranks with B/W images equal one rank with B: losses, gradients and state after some steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.support.methods import (
    FEATURE_DIM,
    assert_all_close,
    assert_close,
    gradients,
    local_slice,
    make_method,
    state_arrays,
    tiny_inputs,
    update,
    write_cluster_model,
)
from tests.support.ranks import run_ranks

if TYPE_CHECKING:
    from dist_scan.data.batch import HeldOut
    from dist_scan.methods.base import Method

GLOBAL_BATCH, STEPS = 24, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "simclr": {"temperature": 0.2, "projection_dim": 8},
    "simclr-symmetric": {"temperature": 0.2, "projection_dim": 8, "symmetric": True},
    "moco": {"queue_size": 48, "projection_dim": 8, "bn_groups": 12, "key_momentum": 0.9},
    "moco-symmetric": {
        "queue_size": 48,
        "projection_dim": 8,
        "bn_groups": 12,
        "symmetric": True,
    },
    "scan": {"num_clusters": 4, "num_heads": 3, "normalise": "l2"},
    "scan-frozen": {
        "num_clusters": 4,
        "num_heads": 3,
        "normalise": "none",
        "train_backbone": False,
    },
    "scan-features": {"num_clusters": 4, "num_heads": 3, "normalise": "standardise"},
    "scan-features-numbers": {
        "num_clusters": (4, 6),
        "num_heads": 2,
        "normalise": "standardise",
    },
    "temi-features": {"num_clusters": (4, 6), "num_heads": 2, "teacher_momentum": 0.9},
    "selflabel": {"threshold": 0.4, "ema": None},
    "selflabel-teacher": {"threshold": 0.4, "ema": 0.9, "class_balance": False},
    "selflabel-released": {"threshold": 0.4, "ema": 0.9, "ema_meaning": "released"},
    "rotnet": {},
    "nce": {"projection_dim": 8, "temperature": 0.2},
}
"""By name: the kind of a method, and "features" if it trains on cached features."""
WITH_MORE_RANKS = ("moco", "scan", "simclr", "selflabel", "temi-features")


@dataclass(frozen=True)
class Trained:
    """Result of a training: losses are means over ranks, gradients those of the first step."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    logged: dict[str, float]


def make(name: str, model_folder: Path) -> Method:
    """The method in float64, the same on every rank."""
    on_features = "features" in name
    inputs = tiny_inputs(
        num_images=100,
        global_batch=GLOBAL_BATCH,
        seed=3,
        on_features=on_features,
        input_folders={"model": model_folder},
        feature_mean=np.full(FEATURE_DIM, 0.1) if on_features else None,
        feature_std=np.full(FEATURE_DIM, 2.0) if on_features else None,
    )
    return make_method(name.split("-")[0], SETTINGS[name], inputs).double()


def train(name: str, model_folder: Path, skipped_step: int = -1) -> Trained:
    """STEPS steps of SGD through DDP; in `skipped_step` no image is confident."""
    from dist_scan.data.batch import Batch
    from dist_scan.world.collectives import all_mean
    from dist_scan.world.world import wrap_ddp

    method = make(name, model_folder)
    network = wrap_ddp(method)
    parameters = [p for group in method.parameter_groups() for p in group.parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    shape = (FEATURE_DIM,) if "features" in name else (3, 8, 8)
    local = local_slice(GLOBAL_BATCH)
    losses: list[float] = []
    first_gradients: dict[str, np.ndarray] = {}
    for number in range(STEPS):
        views = [
            torch.randn((GLOBAL_BATCH, *shape), generator=generator, dtype=torch.float64)
            for _ in range(2)
        ]
        local_views = tuple(view[local] for view in views)
        batch = Batch(torch.arange(GLOBAL_BATCH)[local], local_views, 0, number)
        method.train()
        if number == skipped_step:
            assert step_without_confident_images(method, network, batch).skip
            continue
        step = update(method, network, optimizer, batch)
        losses.append(float(all_mean(step.loss.detach())))
        first_gradients = first_gradients or gradients(method)
    method.eval()
    held_out = torch.randn((9, *shape), generator=generator, dtype=torch.float64)
    logged = method.end_epoch(0, make_held_out(held_out))
    return Trained(losses, first_gradients, state_arrays(method), logged)


def step_without_confident_images(method: Method, network: Any, batch: Any) -> Any:
    """A forward pass with a threshold that no probability reaches."""
    usual = method.config
    method.config = usual.model_copy(update={"threshold": 0.999999})
    step = network(batch)
    method.config = usual
    return step


def make_held_out(rows: torch.Tensor) -> HeldOut:
    """Nine held-out rows, of which four are anchors."""
    from dist_scan.data.batch import Batch, HeldOut
    from dist_scan.world.world import current

    local = np.array_split(np.arange(9), current().world_size)[current().rank]

    def batches() -> Iterator[Batch]:
        yield Batch(torch.from_numpy(local), (rows[local],), 0, 0)

    return HeldOut(batches, np.array([[1, 5], [6, 8], [0, 7], [4, 4]]))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    return write_cluster_model(tmp_path_factory.mktemp("model"))


def assert_equal_results(ranks: list[Trained], single: Trained) -> None:
    for rank in ranks:
        assert_close(rank.losses, single.losses, "loss")
        assert_all_close(rank.gradients, single.gradients, "gradient")
        assert_all_close(rank.state, single.state, "state")
        assert rank.logged == pytest.approx(single.logged, rel=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_several_ranks_equal_one(name: str, model_folder: Path) -> None:
    single = train(name, model_folder)
    weight_gradients = [g for key, g in single.gradients.items() if key.endswith("weight")]
    assert all(np.any(gradient) for gradient in weight_gradients)
    for world_size in (2, 3, 4) if name in WITH_MORE_RANKS else (3,):
        assert_equal_results(run_ranks(train, world_size, name, model_folder), single)


def test_training_goes_on_after_a_skipped_step(model_folder: Path) -> None:
    ranks = run_ranks(train, 2, "selflabel", model_folder, 1)
    assert_equal_results(ranks, train("selflabel", model_folder, 1))


def batch_norm_results(groups: int) -> list[np.ndarray]:
    """Output, gradients of input and weight, and running statistics, for a mean far from 0."""
    from dist_scan.models.batch_norm import GroupedBatchNorm, sync_running_stats
    from dist_scan.world.collectives import all_sum, gather_rows

    torch.manual_seed(0)
    images = torch.randn(12, 3, 2, 2) + 100
    local = images[local_slice(12)].clone().requires_grad_()
    layer = GroupedBatchNorm(3, groups=groups)
    output = layer(local)
    (output**3).sum().backward()
    sync_running_stats(layer)
    results = [
        gather_rows(output),
        gather_rows(local.grad),
        all_sum(layer.weight.grad),
        layer.running_mean,
        layer.running_var,
    ]
    return [result.detach().numpy() for result in results]


@pytest.mark.parametrize(("groups", "world_size"), [(1, 2), (1, 3), (2, 2), (2, 4), (4, 2), (6, 3)])
def test_batch_norm_groups_do_not_depend_on_the_number_of_ranks(
    groups: int, world_size: int
) -> None:
    expected = batch_norm_results(groups)
    for results in run_ranks(batch_norm_results, world_size, groups):
        for result, value in zip(results, expected):
            np.testing.assert_allclose(result, value, rtol=2e-4, atol=2e-4)


def write_to_bank() -> tuple[list[int], dict[str, Any]]:
    """Ranks write and read different numbers of rows; returns what was read, and the state."""
    from dist_scan.models.memory_bank import MemoryBank
    from dist_scan.world.world import current

    rank = current().rank
    bank = MemoryBank(20, dtype=torch.int64, num_shards=5, fill=-1)
    rows = torch.arange(rank, 20, 3)[: 4 + rank]
    bank.write(rows, rows * 10)
    assert bank.whole().tolist() == bank.read(torch.arange(20)).tolist()
    state = bank.state()
    # As lists: a tensor sent to another process lives only as long as its sender.
    state["shards"] = {shard: rows.tolist() for shard, rows in state["shards"].items()}
    return bank.read(torch.arange(20 - rank)).tolist(), state


def load_bank(states: list[dict[str, Any]]) -> list[int]:
    from dist_scan.models.memory_bank import MemoryBank

    bank = MemoryBank(20, dtype=torch.int64, num_shards=5)
    for state in states:
        state["shards"] = {shard: torch.tensor(rows) for shard, rows in state["shards"].items()}
    bank.load(states)
    return bank.read(torch.arange(20)).tolist()


def test_a_memory_bank_is_loaded_on_another_number_of_ranks() -> None:
    results = run_ranks(write_to_bank, 3)
    rows = results[0][0]
    is_written = [*range(0, 12, 3), *range(1, 16, 3), *range(2, 20, 3)]
    assert [i for i, value in enumerate(rows) if value >= 0] == sorted(is_written)
    assert all(value in (-1, i * 10) for i, value in enumerate(rows))
    assert results[2][0] == rows[:18]
    for world_size in (1, 2):
        states = [state for _, state in results]
        assert run_ranks(load_bank, world_size, states) == [rows] * world_size
