"""Methods on one rank: what they select, average, skip and publish."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.engine.optimizer import OptimizerConfig
from dist_scan.engine.precision import autocast
from dist_scan.engine.training_loop import TrainingLoopConfig, TrainJob, train
from dist_scan.heads.selection import held_out_loss
from dist_scan.losses import instance_discrimination_loss
from dist_scan.methods.base import Method
from dist_scan.methods.moco import permutation
from dist_scan.methods.nce import instance_loss
from dist_scan.methods.rotnet import rotate_by_quarter_turns
from dist_scan.models.cluster_model import load_cluster_model
from dist_scan.monitoring.bottleneck import TrainingSetup
from tests.reference import losses as reference
from tests.support.methods import make_method, tiny_inputs, update, write_cluster_model

NUM_IMAGES, GLOBAL_BATCH = 64, 16


def make(kind: str, on_features: bool = False, **settings: Any) -> Method:
    inputs = tiny_inputs(NUM_IMAGES, GLOBAL_BATCH, seed=0, on_features=on_features)
    return make_method(kind, settings, inputs).train()


def make_selflabel(model_folder: Path, **settings: Any) -> Method:
    folders = {"model": model_folder}
    inputs = tiny_inputs(NUM_IMAGES, GLOBAL_BATCH, seed=0, input_folders=folders)
    return make_method("selflabel", settings, inputs).train()


def make_batch(step: int = 0) -> Batch:
    """Two views of the first images, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(GLOBAL_BATCH, 3, 8, 8, generator=generator) for _ in range(2)]
    return Batch(torch.arange(GLOBAL_BATCH), tuple(views), 0, step)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write_cluster_model(tmp_path)


# --- SCAN ---


def test_heads_are_selected_with_entropy_weight_one() -> None:
    logits, neighbours = torch.randn(6, 3), torch.tensor([[3, 4], [5, 0]])
    losses = [reference.scan(logits[:2], logits[neighbours[:, k]], 1.0) for k in (0, 1)]
    torch.testing.assert_close(held_out_loss(logits, neighbours), sum(losses) / 2)


def test_scan_publishes_the_best_head_of_the_best_epoch(tmp_path: Path) -> None:
    method = make("scan", on_features=True, num_clusters=4, num_heads=3, normalise="none")
    features = torch.randn(8, 16)

    def batches() -> Iterator[Batch]:
        yield Batch(torch.arange(8), (features,), 0, 0)

    held_out = HeldOut(batches, np.arange(8)[:, None])
    with torch.no_grad():
        # Sharper predictions: head 1 agrees best with itself.
        rows = method.heads.slices[1]
        method.heads.weight[rows] *= 20
        logged = method.end_epoch(0, held_out)
        best_weight = method.heads.weight[rows].clone()
        assert logged["best_head"] == 1
        method.heads.weight.zero_()
        method.end_epoch(1, held_out)
    method.publish(tmp_path)
    model = load_cluster_model(tmp_path).eval()
    assert torch.equal(model.head.weight, best_weight)
    assert model(make_batch().views[0]).shape == (GLOBAL_BATCH, 4)
    heads = json.loads((tmp_path / "heads.json").read_text())
    assert heads["best_epoch"] == 0
    assert len(heads["heads"]) == 3


# --- self-labelling ---


def test_released_ema_is_sgd_at_a_smaller_rate_with_frozen_buffers(model_folder: Path) -> None:
    released = make_selflabel(model_folder, threshold=0.1, ema=0.9, ema_meaning="released")
    plain = make_selflabel(model_folder, threshold=0.1)
    buffers = {name: value.clone() for name, value in released.model.named_buffers()}
    for method, lr in ((released, 0.1), (plain, 0.01)):
        optimizer = torch.optim.SGD(method.model.parameters(), lr=lr, momentum=0.9)
        for number in range(3):
            update(method, method, optimizer, make_batch(number))
    for a, b in zip(released.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, buffers[name]) for name, v in released.model.named_buffers())


def test_selflabel_skips_and_warns_without_confident_images(model_folder: Path) -> None:
    method = make_selflabel(model_folder, threshold=0.999999)
    step = method(make_batch())
    assert step.skip
    assert step.loss == 0
    assert method.end_epoch(0, None)["clusters_used"] == 0
    assert "lower method.threshold, or set method.ema" in method.warning()
    assert "epoch 1: 0% of the clusters" in method.warning()


def end_epoch_with(method: Method, confident: Sequence[int], seen: int = 100) -> dict[str, float]:
    """End an epoch in which these numbers of images per cluster were confident."""
    method.confident.copy_(torch.tensor(confident))
    method.seen.fill_(seen)
    return method.end_epoch(0, None)


def test_selflabel_ends_at_a_plateau_also_after_a_restart(model_folder: Path) -> None:
    settings = {"plateau_epochs": 2, "plateau_gain": 0.02}
    method = make_selflabel(model_folder, **settings)
    for confident in (
        [10, 10, 10, 10],
        [11, 11, 11, 11],
        [12, 11, 11, 11],
        [12, 12, 12, 12],
        [12, 12, 12, 12],
    ):
        logged = end_epoch_with(method, confident)
        assert logged["confident_share"] == sum(confident) / 100
        assert not method.early_stop_reason()
        assert not method.warning()
    restarted = make_selflabel(model_folder, **settings)
    restarted.load_state_dict(method.state_dict())
    end_epoch_with(restarted, [12, 12, 13, 12])
    assert "has stayed at 49.0% (best 48.0%) for 2 epochs" in restarted.early_stop_reason()


def test_selflabel_without_plateau_epochs_trains_all_epochs(model_folder: Path) -> None:
    method = make_selflabel(model_folder, plateau_epochs=None)
    for _ in range(9):
        end_epoch_with(method, [5, 5, 5, 5])
    assert method.early_stop_reason() == ""


def test_selflabel_publishes_the_teacher_and_the_counts_of_the_last_epoch(
    model_folder: Path, tmp_path: Path
) -> None:
    method = make_selflabel(model_folder, threshold=0.1, ema=0.5)
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.5)
    update(method, method, optimizer, make_batch())
    confident = method.confident.clone()
    assert confident.sum() == GLOBAL_BATCH
    assert method.seen == GLOBAL_BATCH
    method.end_epoch(0, None)
    method.publish(tmp_path / "out")
    published = load_cluster_model(tmp_path / "out").head.weight
    assert torch.equal(published, method.teacher.module.head.weight)
    assert not torch.equal(published, method.model.head.weight)
    summary = json.loads((tmp_path / "out" / "confident.json").read_text())
    assert summary["per_cluster"] == confident.tolist()
    assert summary["images"] == GLOBAL_BATCH
    assert summary["confident_share"] == 1.0


class TwoSteps:
    """A feed of two batches per epoch."""

    steps_per_epoch = 2
    rows = np.arange(2)

    def batches(
        self,
        epoch: int,
        first_step: int = 0,
        views: tuple[int, ...] | None = None,
        order: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        return iter([make_batch(0), make_batch(1)][first_step:])


def test_training_logs_warnings_and_ends_at_a_plateau(model_folder: Path, tmp_path: Path) -> None:
    log: list[str] = []
    state = train(
        TrainJob(
            method=make_selflabel(model_folder, threshold=0.999999, plateau_epochs=2),
            feed=TwoSteps(),
            settings=TrainingLoopConfig(optimizer=OptimizerConfig(kind="sgd", lr=0.1), epochs=9),
            run_dir=tmp_path,
            out=tmp_path,
            setup=TrainingSetup(global_batch=GLOBAL_BATCH),
            name="selflabelling",
            log=log.append,
        )
    )
    assert state.epoch == 2
    assert state.skipped == 4
    assert len(state.warnings) == 2
    assert sum(line.startswith("warning: selflabelling: ") for line in log) == 2
    ended = "selflabelling: ended after epoch 2 of 9: the share of confident images has stayed at"
    assert log[-1].startswith(f"{ended} 0.0%")


def test_with_bf16_the_backbone_is_bf16_and_logits_are_fp32(model_folder: Path) -> None:
    method = make_selflabel(model_folder, threshold=0.1, ema=0.9)
    dtypes = []

    def record(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        dtypes.append(output.dtype)

    method.model.backbone.conv1.register_forward_hook(record)
    method.model.head.register_forward_hook(record)
    with autocast("bf16", torch.device("cpu")):
        step = method(make_batch())
    step.loss.backward()
    assert dtypes == [torch.bfloat16, torch.float32]
    assert step.loss.dtype == torch.float32
    for parameter in method.model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


# --- pretext tasks ---


def test_moco_shuffles_by_seed_and_step() -> None:
    assert torch.equal(permutation(8, 1, 2), permutation(8, 1, 2))
    assert not torch.equal(permutation(64, 1, 2), permutation(64, 1, 3))
    assert sorted(permutation(8, 1, 2).tolist()) == list(range(8))


def test_moco_enqueues_the_keys_and_averages_the_key_encoder() -> None:
    method = make("moco", queue_size=32, projection_dim=4, key_momentum=0.5, bn_groups=4)
    step = method(make_batch())
    before = method.key_encoder.module[0].conv1.weight.clone()
    with torch.no_grad():
        method.backbone.conv1.weight += 1
    method.end_step(make_batch(), step)
    torch.testing.assert_close(method.queue.rows[:GLOBAL_BATCH], step.for_end_step["keys"])
    torch.testing.assert_close(method.key_encoder.module[0].conv1.weight, before + 0.5)


def test_rotnet_rotates_every_image_four_times() -> None:
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    rotated, turns = rotate_by_quarter_turns(images)
    assert turns.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert torch.equal(rotated[0], images[0])
    assert torch.equal(rotated[6], images[1].flip((1, 2)))
    # Counter-clockwise: the last column becomes the first row.
    assert torch.equal(rotated[5][:, 0], images[1][:, :, -1])


def test_instance_loss_is_a_softmax_over_the_memory() -> None:
    z = F.normalize(torch.randn(5, 8), dim=1).requires_grad_()
    memory = F.normalize(torch.randn(20, 8), dim=1)
    index = torch.tensor([3, 0, 7, 7, 19])
    expected = instance_discrimination_loss(z, index, memory, 0.1)
    loss = instance_loss(z, memory[index], memory, 0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0])


def test_nce_remembers_a_moving_average_of_unit_length() -> None:
    method = make("nce", projection_dim=4, memory_momentum=0.25)
    before = method.memory.read(torch.arange(NUM_IMAGES))
    torch.testing.assert_close(before.norm(dim=1), torch.ones(NUM_IMAGES))
    step = method(make_batch())
    method.end_step(make_batch(), step)
    after = method.memory.read(torch.arange(NUM_IMAGES))
    average = 0.25 * before[:GLOBAL_BATCH] + 0.75 * step.for_end_step["projections"]
    torch.testing.assert_close(after[:GLOBAL_BATCH], F.normalize(average, dim=1))
    assert torch.equal(after[GLOBAL_BATCH:], before[GLOBAL_BATCH:])


def test_simclr_pairs_the_two_views_of_an_image() -> None:
    """The positive of a first view is the second view of the same image."""
    method = make("simclr", temperature=0.2, projection_dim=8).double().eval()
    batch = make_batch()
    views = [view.double() for view in batch.views]
    with torch.no_grad():
        first, second = (F.normalize(method.projector(method.backbone(v)), dim=1) for v in views)
        loss = method(Batch(batch.index, tuple(views), 0, 0)).loss
    torch.testing.assert_close(loss, reference.nt_xent(first, second, 0.2, False))
    shifted = reference.nt_xent(first, second.roll(1, 0), 0.2, False)
    assert abs(float(loss - shifted)) > 1e-4
