"""RELIABILITY.md's rows 12, 17 and 18: asked to leave inside long work, nobody confident, another number of ranks at every start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_methods_over_ranks import GLOBAL_BATCH, make
from tests.support.faulted_run import LONG, PRETEXT, LaunchResult, TinyRun
from tests.support.methods import assert_close, gradients, local_slice, write_cluster_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(900)
STOPPED = 128 + 12
STAGES = PRETEXT + LONG


def shards(run: TinyRun, stage: str, inside: str = ".") -> dict[str, int]:
    """The finished shards of a stage's table, each with the moment it was written."""
    return {
        p.name: p.stat().st_mtime_ns
        for p in run.folder.glob(f"stages/{stage}/*/{inside}/*-[0-9]*.npy")
        if not p.name.startswith(".tmp")
    }


def tables(done: LaunchResult) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes()
        for stage in ("features", "neighbours")
        for p in sorted(done.folder.glob(f"stages/{stage}/*/*.npy"))
    } | {
        p.name: b"".join(np.load(p)[k].tobytes() for k in sorted(np.load(p).files))
        if p.suffix == ".npz"
        else p.read_bytes()
        for p in sorted(done.folder.glob("stages/kmeans/*/*.np[yz]"))
    }


def test_row_12_asked_to_leave_inside_begin_epoch_embed_and_kmeans(tmp_path: Path) -> None:
    more = {"refreshes": True}
    step = "runtime.checkpoint_s=1e-9"  # what is done again after each stop is then known
    whole = TinyRun(tmp_path / "whole", STAGES)(step, **more)
    assert whole.code == 0 and len(whole.losses()) == 20, whole.output

    run = TinyRun(tmp_path / "asked", STAGES)
    assert (
        run(step, **more, faults=[{"kind": "signal", "rank": 1, "at": "shard", "step": 4}]).code
        == STOPPED
    )  # the second epoch's begin_epoch
    assert len(shards(run, "pretext", "work/embed")) == 4, (
        "of six: the round in which it was asked is finished"
    )
    assert (
        run(step, **more, faults=[{"kind": "signal", "rank": 1, "at": "shard", "step": 2}]).code
        == STOPPED
    )  # one left of that, then the embed stage
    embedded = shards(run, "features")
    assert len(embedded) == 4, "of six; fewer, if shards of begin_epoch had been made again"
    assert (
        run(step, **more, faults=[{"kind": "signal", "rank": 0, "at": "iteration", "step": 1}]).code
        == STOPPED
    )
    assert list(run.folder.glob("stages/kmeans/*/work/kmeans.npz")), "how far k-means was"
    assert embedded.items() <= shards(run, "features").items(), "a finished shard was made again"
    done = run(step, **more)
    assert done.code == 0, done.output
    assert (
        done.losses() == whole.losses()
        and done.weights() == whole.weights()
        and tables(done) == tables(whole)
    )


def test_row_18_four_ranks_then_two_then_three(tmp_path: Path) -> None:
    """In float64 a run that changes its number of ranks twice has the losses of one that never did: the same images in every step."""
    whole = TinyRun(tmp_path / "whole", PRETEXT)("stages.pretext.precision=fp64", processes=1)
    assert whole.code == 0, whole.output
    run = TinyRun(tmp_path / "elastic", STAGES)
    for processes, fault in (
        (4, {"rank": 3, "step": 5}),
        (2, {"rank": 1, "step": 12}),
        (3, {"rank": 2, "at": "shard"}),
    ):
        done = run(
            "stages.pretext.precision=fp64",
            processes=processes,
            faults=[{"kind": "signal", **fault}],
        )
        assert done.code == STOPPED, done.output
    expected, found = whole.losses(), done.losses()
    assert list(found) == list(expected) and len({round(v, 3) for v in found.values()}) > 10
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-5
    kept = shards(run, "features")
    done = run("stages.pretext.precision=fp64", processes=2)
    after = shards(run, "features")
    assert done.code == 0 and kept and kept.items() < after.items(), (
        f"finished shards are kept, the others made\n{done.output}"
    )


def step_with_few_confident(
    name: str, model_folder: Path, num_confident: int
) -> tuple[float, bool, dict[str, np.ndarray], bool]:
    """A step in which only the first images of the global batch are confident.

    Returns the loss, whether the step is skipped, the gradients, and whether this rank has none of
    the confident images.
    """
    import copy

    import torch

    from dist_scan.data.batch import Batch
    from dist_scan.world.collectives import all_mean, gather_rows
    from dist_scan.world.world import wrap_ddp

    method = make(name, model_folder).train()
    generator = torch.Generator().manual_seed(2)
    shape = (GLOBAL_BATCH, 3, 8, 8)
    weak = torch.randn(shape, generator=generator, dtype=torch.float64)
    strong = torch.randn(shape, generator=generator, dtype=torch.float64)
    local = local_slice(GLOBAL_BATCH)
    labeller = copy.deepcopy(method.teacher or method.model).train()
    with torch.no_grad():
        logits = gather_rows(labeller(weak[local]))
    highest, order = logits.softmax(1).max(1).values.sort(descending=True)
    threshold = 0.9999999
    if num_confident:
        threshold = float(highest[num_confident - 1] + highest[num_confident]) / 2
    method.config = method.config.model_copy(update={"threshold": threshold})
    # Keep the wrapper until after the backward pass: its hooks average the gradients.
    network = wrap_ddp(method)
    views = (weak[order][local], strong[order][local])
    step = network(Batch(torch.arange(GLOBAL_BATCH)[local], views, 0, 0))
    if not step.skip:
        step.loss.backward()
    loss = float(all_mean(step.loss.detach()))
    return loss, step.skip, gradients(method), local.start >= num_confident


@pytest.mark.parametrize("name", ["selflabel", "selflabel-teacher"])
def test_row_17_no_confident_image_on_some_ranks_and_on_all(name: str, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(7)
    folder = write_cluster_model(tmp_path)
    loss, is_skipped, expected, _ = step_with_few_confident(name, folder, 5)
    assert not is_skipped
    assert any(np.abs(gradient).max() > 0 for gradient in expected.values())
    ranks = run_ranks(step_with_few_confident, 3, name, folder, 5)
    assert [has_none for *_, has_none in ranks] == [False, True, True]
    for rank_loss, rank_is_skipped, rank_gradients, _ in ranks:
        assert not rank_is_skipped
        assert rank_gradients.keys() == expected.keys()
        assert_close(rank_loss, loss, "loss")
        for parameter, gradient in expected.items():
            assert_close(rank_gradients[parameter], gradient, parameter)
    ranks = run_ranks(step_with_few_confident, 3, name, folder, 0)
    assert all(rank_is_skipped for _, rank_is_skipped, *_ in ranks)
