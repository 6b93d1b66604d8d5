"""Rows 12, 17 and 18 of docs/reliability.md: stop requests inside long work, steps without
confident images, and another number of ranks at every start.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.test_methods_over_ranks import GLOBAL_BATCH, make
from tests.support.faulted_run import LONG, PRETEXT, LaunchResult, TinyRun
from tests.support.methods import assert_close, gradients, local_slice, write_cluster_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(900)
STOPPED = 128 + signal.SIGUSR2
STAGES = PRETEXT + LONG


def shards(run: TinyRun, stage: str, subfolder: str = ".") -> dict[str, int]:
    """Finished shards of a stage's table, with the time at which each was written."""
    return {
        path.name: path.stat().st_mtime_ns
        for path in run.folder.glob(f"stages/{stage}/*/{subfolder}/*-[0-9]*.npy")
        if not path.name.startswith(".tmp")
    }


def tables(done: LaunchResult) -> dict[str, bytes]:
    """Content of the files of the stages after the training."""
    contents = {}
    for stage in ("features", "neighbours", "kmeans"):
        for path in sorted(done.folder.glob(f"stages/{stage}/*/*.np[yz]")):
            contents[path.name] = path.read_bytes()
            if path.suffix == ".npz":  # holds the time at which it was written
                with np.load(path) as arrays:
                    contents[path.name] = b"".join(arrays[k].tobytes() for k in sorted(arrays))
    return contents


def test_row_12_stop_requests_inside_begin_epoch_embed_and_kmeans(tmp_path: Path) -> None:
    # With a checkpoint after every step it is known what is repeated after each stop.
    save_every_step = "runtime.checkpoint_s=1e-9"
    undisturbed = TinyRun(tmp_path / "undisturbed", STAGES)(save_every_step, refreshes=True)
    assert undisturbed.code == 0, undisturbed.output
    assert len(undisturbed.losses()) == 20

    run = TinyRun(tmp_path / "stopped", STAGES)

    def run_with_signal(**fault: Any) -> None:
        done = run(save_every_step, refreshes=True, faults=[{"kind": "signal", **fault}])
        assert done.code == STOPPED, done.output

    # In begin_epoch of the second epoch: the current round of shards is finished.
    run_with_signal(rank=1, at="shard", step=4)
    assert len(shards(run, "pretext", "work/embed")) == 4
    # One shard later is the embed stage; with fewer shards begin_epoch would have repeated some.
    run_with_signal(rank=1, at="shard", step=2)
    embedded = shards(run, "features")
    assert len(embedded) == 4
    run_with_signal(rank=0, at="iteration", step=1)
    assert list(run.folder.glob("stages/kmeans/*/work/kmeans.npz"))
    assert embedded.items() <= shards(run, "features").items(), "a finished shard was repeated"
    done = run(save_every_step, refreshes=True)
    assert done.code == 0, done.output
    assert done.losses() == undisturbed.losses()
    assert done.weights() == undisturbed.weights()
    assert tables(done) == tables(undisturbed)


def test_row_18_four_ranks_then_two_then_three(tmp_path: Path) -> None:
    """In float64 the losses are those of a run on one rank: every step has the same images."""
    fp64 = "stages.pretext.precision=fp64"
    undisturbed = TinyRun(tmp_path / "undisturbed", PRETEXT)(fp64, processes=1)
    assert undisturbed.code == 0, undisturbed.output
    run = TinyRun(tmp_path / "elastic", STAGES)
    for processes, fault in (
        (4, {"rank": 3, "step": 5}),
        (2, {"rank": 1, "step": 12}),
        (3, {"rank": 2, "at": "shard"}),
    ):
        stopped = run(fp64, processes=processes, faults=[{"kind": "signal", **fault}])
        assert stopped.code == STOPPED, stopped.output
    expected = undisturbed.losses()
    losses = stopped.losses()
    assert list(losses) == list(expected)
    assert len({round(loss, 3) for loss in losses.values()}) > 10
    assert max(abs(losses[step] - expected[step]) for step in losses) < 1e-5
    before = shards(run, "features")
    done = run(fp64, processes=2)
    assert done.code == 0, done.output
    # Finished shards are not written again, the missing ones are.
    assert before
    assert before.items() < shards(run, "features").items()


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
