"""Methods on one rank: what they choose, average, skip and publish."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.engine.optimizer import OptimizerConfig, ScheduleConfig
from dist_scan.engine.training_loop import TrainJob, TrainSettings, train
from dist_scan.heads.selection import held_out_loss
from dist_scan.methods.base import MethodInputs, method_class
from dist_scan.methods.moco import permutation
from dist_scan.methods.nce import instance_loss
from dist_scan.methods.rotnet import rotate_by_quarter_turns
from dist_scan.models.backbone import BackboneConfig, build_backbone
from dist_scan.models.cluster_model import ClusterModel, load_cluster_model, save_cluster_model
from dist_scan.models.layers import FeatureNorm
from dist_scan.monitoring.bottleneck import TrainingSetup
from tests.reference import losses as reference

CONFIG = BackboneConfig(name="resnet_small", width=4)


def make(kind: str, settings: dict, **inputs):
    cls = method_class(kind)
    torch.manual_seed(0)
    return cls(
        cls.Config(kind=kind, **settings),
        MethodInputs(
            num_images=64,
            global_batch=16,
            seed=0,
            feature_dim=16,
            backbone=build_backbone(CONFIG),
            backbone_config=CONFIG,
            **inputs,
        ),
    )


def batch(step: int = 0) -> Batch:
    gen = torch.Generator().manual_seed(step)
    return Batch(
        torch.arange(16), tuple(torch.randn(16, 3, 8, 8, generator=gen) for _ in range(2)), 0, step
    )


@pytest.fixture
def folder(tmp_path: Path):
    save_cluster_model(
        tmp_path,
        ClusterModel(build_backbone(CONFIG), FeatureNorm("none", 16), nn.Linear(16, 4), CONFIG),
    )
    return tmp_path


def test_held_out_loss_has_weight_one() -> None:
    logits, neighbours = torch.randn(6, 3), torch.tensor([[3, 4], [5, 0]])
    expected = sum(reference.scan(logits[:2], logits[neighbours[:, k]], 1.0) for k in (0, 1)) / 2
    torch.testing.assert_close(held_out_loss(logits, neighbours), expected)


def test_scan_keeps_the_best_epoch_and_head_and_publishes_it(tmp_path: Path) -> None:
    method = make("scan", dict(num_clusters=4, num_heads=3, normalise="none"), on_features=True)
    x = torch.randn(8, 16)
    held = HeldOut(lambda: iter([Batch(torch.arange(8), (x,), 0, 0)]), np.arange(8)[:, None])
    with torch.no_grad():
        at = method.heads.rows(1)
        method.heads.weight[at] *= 20  # sharper: agrees with itself
        logged = method.end_epoch(0, held)
        kept = method.heads.weight[at].clone()
        assert logged["best_head"] == 1
        method.heads.weight.zero_()
        method.end_epoch(1, held)
    method.publish(tmp_path)
    model = load_cluster_model(tmp_path).eval()
    assert torch.equal(model.head.weight, kept) and model(batch().views[0]).shape == (16, 4)
    facts = json.loads((tmp_path / "heads.json").read_text())
    assert facts["best_epoch"] == 0 and len(facts["heads"]) == 3


def test_released_ema_is_sgd_at_a_smaller_rate_with_frozen_buffers(folder) -> None:
    released = make(
        "selflabel",
        dict(threshold=0.1, ema=0.9, ema_meaning="released"),
        input_folders={"model": folder},
    ).train()
    plain = make("selflabel", dict(threshold=0.1), input_folders={"model": folder}).train()
    buffers = {k: v.clone() for k, v in released.model.named_buffers()}
    for method, lr in ((released, 0.1), (plain, 0.01)):
        optimizer = torch.optim.SGD(method.model.parameters(), lr=lr, momentum=0.9)
        for s in range(3):
            step = method(batch(s))
            step.loss.backward()
            optimizer.step()
            method.end_step(batch(s), step)
            optimizer.zero_grad()
    for a, b in zip(released.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, buffers[k]) for k, v in released.model.named_buffers())


def test_selflabel_skips_and_warns_when_nobody_is_confident(folder) -> None:
    method = make("selflabel", dict(threshold=0.999999), input_folders={"model": folder}).train()
    step = method(batch())
    assert step.skip and step.loss == 0
    assert method.end_epoch(0, None)["clusters_used"] == 0
    assert (
        "lower method.threshold, or set method.ema" in method.warning()
        and "epoch 1: 0% of the clusters" in method.warning()
    )


def confident(method, counts, seen=100):
    """An epoch with these confident images per cluster."""
    method.confident.copy_(torch.tensor(counts))
    method.seen.fill_(seen)
    return method.end_epoch(0, None)


def test_selflabel_ends_when_the_number_of_confident_images_is_flat(folder) -> None:
    method = make(
        "selflabel", dict(plateau_epochs=2, plateau_gain=0.02), input_folders={"model": folder}
    )
    for counts in (
        [10, 10, 10, 10],
        [11, 11, 11, 11],
        [12, 11, 11, 11],
        [12, 12, 12, 12],
        [12, 12, 12, 12],
    ):
        assert (
            confident(method, counts)["confident_share"] == sum(counts) / 100
            and not method.early_stop_reason()
            and not method.warning()
        )
    again = make(
        "selflabel", dict(plateau_epochs=2, plateau_gain=0.02), input_folders={"model": folder}
    )
    again.load_state_dict(method.state_dict())  # as after a restart
    confident(again, [12, 12, 13, 12])
    assert "has stayed at 49.0% (best 48.0%) for 2 epochs" in again.early_stop_reason()
    released = make("selflabel", dict(plateau_epochs=None), input_folders={"model": folder})
    for _ in range(9):
        confident(released, [5, 5, 5, 5])
    assert released.early_stop_reason() == ""


def test_selflabel_publishes_the_average_and_the_counts_of_the_last_epoch(
    folder, tmp_path: Path
) -> None:
    method = make(
        "selflabel", dict(threshold=0.1, ema=0.5), input_folders={"model": folder}
    ).train()
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.5)
    step = method(batch())
    step.loss.backward()
    optimizer.step()
    method.end_step(batch(), step)
    counted = method.confident.clone()
    assert counted.sum() == 16 == method.seen
    method.end_epoch(0, None)
    method.publish(tmp_path / "out")
    published, trained = load_cluster_model(tmp_path / "out"), method.model.head.weight
    assert torch.equal(
        published.head.weight, method.teacher.module.head.weight
    ) and not torch.equal(published.head.weight, trained)
    facts = json.loads((tmp_path / "out" / "confident.json").read_text())
    assert (
        facts["per_cluster"] == counted.tolist()
        and facts["images"] == 16
        and facts["confident_share"] == 1.0
    )


class TwoSteps:
    """A feed of two batches an epoch."""

    steps_per_epoch = 2
    rows = np.arange(2)

    def batches(
        self,
        epoch: int,
        first_step: int = 0,
        views: tuple[int, ...] | None = None,
        order: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        return iter([batch(0), batch(1)][first_step:])


def test_training_logs_warnings_and_ends_at_a_plateau(folder: Path, tmp_path: Path) -> None:
    settings = {"threshold": 0.999999, "plateau_epochs": 2}
    log: list[str] = []
    state = train(
        TrainJob(
            method=make("selflabel", settings, input_folders={"model": folder}),
            feed=TwoSteps(),
            settings=TrainSettings(
                OptimizerConfig(kind="sgd", lr=0.1), ScheduleConfig(), epochs=9, seed=0
            ),
            run_dir=tmp_path,
            out=tmp_path,
            setup=TrainingSetup(global_batch=16),
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


def test_under_bf16_the_backbone_is_bf16_and_logits_are_fp32(folder) -> None:
    from dist_scan.engine.precision import autocast

    method = make(
        "selflabel", dict(threshold=0.1, ema=0.9), input_folders={"model": folder}
    ).train()
    seen = []
    method.model.backbone.conv1.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    method.model.head.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with autocast("bf16", torch.device("cpu")):
        step = method(batch())
    step.loss.backward()
    assert seen == [torch.bfloat16, torch.float32] and step.loss.dtype == torch.float32
    assert all(
        torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32
        for p in method.model.parameters()
    )


def test_moco_shuffle_is_a_function_of_seed_and_step() -> None:
    assert torch.equal(permutation(8, 1, 2), permutation(8, 1, 2)) and not torch.equal(
        permutation(64, 1, 2), permutation(64, 1, 3)
    )
    assert sorted(permutation(8, 1, 2).tolist()) == list(range(8))


def test_rotnet_turns_every_image_four_times() -> None:
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    turned, turns = rotate_by_quarter_turns(images)
    assert (
        turns.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
        and torch.equal(turned[0], images[0])
        and torch.equal(turned[6], images[1].flip((1, 2)))
    )
    assert torch.equal(
        turned[5][:, 0], images[1][:, :, -1]
    )  # counter-clockwise: the last column becomes the first row


def test_instance_loss_is_a_softmax_over_the_memory() -> None:
    z, memory = (
        F.normalize(torch.randn(5, 8), dim=1).requires_grad_(),
        F.normalize(torch.randn(20, 8), dim=1),
    )
    own = torch.tensor([3, 0, 7, 7, 19])
    expected = F.cross_entropy(z @ memory.T / 0.1, own)
    loss = instance_loss(z, memory[own], memory, 0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0])


def test_nce_remembers_a_moving_average_of_unit_length() -> None:
    method = make("nce", dict(projection_dim=4, momentum=0.25)).train()
    before = method.memory.read(torch.arange(64))
    torch.testing.assert_close(before.norm(dim=1), torch.ones(64))
    step = method(batch())
    method.end_step(batch(), step)
    after = method.memory.read(torch.arange(64))
    torch.testing.assert_close(
        after[:16], F.normalize(0.25 * before[:16] + 0.75 * step.for_end_step["projections"], dim=1)
    )
    assert torch.equal(after[16:], before[16:])


def test_moco_enqueues_the_keys_and_follows_slowly() -> None:
    method = make("moco", dict(queue_size=32, projection_dim=4, momentum=0.5, bn_groups=4)).train()
    step = method(batch())
    before = method.key.module[0].conv1.weight.clone()
    with torch.no_grad():
        method.backbone.conv1.weight += 1
    method.end_step(batch(), step)
    torch.testing.assert_close(method.queue.rows[:16], step.for_end_step["keys"])
    torch.testing.assert_close(method.key.module[0].conv1.weight, before + 0.5)


def test_simclr_pairs_the_two_views_of_an_image() -> None:
    """Whatever the order in which they go through the network: the positive of row i's first view is its second."""
    method, b = make("simclr", dict(temperature=0.2, projection_dim=8)).double().eval(), batch()
    views = [v.double() for v in b.views]
    with torch.no_grad():
        z = [F.normalize(method.projector(method.backbone(v)), dim=1) for v in views]
        loss = method(Batch(b.index, tuple(views), 0, 0)).loss
    torch.testing.assert_close(loss, reference.nt_xent(z[0], z[1], 0.2, False))
    swapped = reference.nt_xent(z[0], z[1].roll(1, 0), 0.2, False)
    assert abs(float(loss - swapped)) > 1e-4
