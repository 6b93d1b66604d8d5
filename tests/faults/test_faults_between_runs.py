"""Stop requests in long work, no confident image, and another number of ranks in every start."""

from __future__ import annotations

import copy
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_scan.data.batch import Batch
from dist_scan.world.collectives import all_mean, gather_rows
from dist_scan.world.world import wrap_ddp
from tests.distributed.test_methods_over_ranks import GLOBAL_BATCH, make
from tests.support.fault_checks import assert_equal_runs, finished_shards
from tests.support.faulted_run import LONG, PRETEXT, LaunchResult, TinyRun
from tests.support.methods import assert_close, gradients, local_slice, write_cluster_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(900)
REQUEUED = 128 + signal.SIGUSR2
STAGES = PRETEXT + LONG
SAVE_EVERY_STEP = "runtime.checkpoint_s=1e-9"
FLOAT64 = "stages.pretext.precision=fp64"


def stage_shards(run: TinyRun, stage: str, inside: str = ".") -> dict[str, int]:
    """The finished shards of a stage's table; see `finished_shards`."""
    folder = next(run.folder.glob(f"stages/{stage}/*"))
    return finished_shards(folder / inside)


def tables(result: LaunchResult) -> dict[str, bytes]:
    """The content of all features, neighbours, clusters and centroids."""
    found = {}
    for stage in ("features", "neighbours", "kmeans"):
        for path in sorted(result.folder.glob(f"stages/{stage}/*/*.np[yz]")):
            if path.suffix == ".npy":
                found[path.name] = path.read_bytes()
            else:  # the time of writing is part of an archive
                with np.load(path) as arrays:
                    found[path.name] = b"".join(arrays[k].tobytes() for k in sorted(arrays))
    return found


def test_stop_requests_inside_begin_epoch_embed_and_kmeans(tmp_path: Path) -> None:
    expected = TinyRun(tmp_path / "undisturbed", STAGES)(SAVE_EVERY_STEP, refreshes=True)
    assert expected.code == 0, expected.output
    assert len(expected.losses()) == 20
    run = TinyRun(tmp_path / "stopped", STAGES)

    def stopped_run(**fault: str | int) -> None:
        result = run(SAVE_EVERY_STEP, refreshes=True, faults=[{"kind": "signal", **fault}])
        assert result.code == REQUEUED, result.output

    # The first epoch's begin_epoch writes 8 shards on each rank; the stop is in the second's.
    stopped_run(rank=1, at="shard", step=9)
    shards = stage_shards(run, "pretext", "work/embed")
    assert len(shards) == 4, "of 16: the round of the request is finished"
    # 6 shards on each rank are missing there; then follow those of the embed stage.
    stopped_run(rank=1, at="shard", step=7)
    embedded = stage_shards(run, "features")
    assert len(embedded) == 4, "of 6; fewer, if shards of begin_epoch had been written again"
    stopped_run(rank=0, at="iteration", step=1)
    assert list(run.folder.glob("stages/kmeans/*/work/kmeans.npz"))
    assert embedded.items() <= stage_shards(run, "features").items()

    result = run(SAVE_EVERY_STEP, refreshes=True)
    assert_equal_runs(result, expected)
    assert tables(result) == tables(expected)


def test_four_ranks_then_two_then_three(tmp_path: Path) -> None:
    """In float64, the losses are those of one rank: every step has the same images."""
    expected = TinyRun(tmp_path / "undisturbed", PRETEXT)(FLOAT64, processes=1)
    assert expected.code == 0, expected.output
    run = TinyRun(tmp_path / "elastic", STAGES)
    stops = (
        (4, {"rank": 3, "step": 5}),
        (2, {"rank": 1, "step": 12}),
        (3, {"rank": 2, "at": "shard"}),
    )
    for processes, fault in stops:
        result = run(FLOAT64, processes=processes, faults=[{"kind": "signal", **fault}])
        assert result.code == REQUEUED, result.output
    losses, expected_losses = result.losses(), expected.losses()
    assert list(losses) == list(expected_losses)
    assert len({round(loss, 3) for loss in losses.values()}) > 10
    assert max(abs(losses[step] - expected_losses[step]) for step in losses) < 1e-5

    shards = stage_shards(run, "features")
    result = run(FLOAT64, processes=2)
    assert result.code == 0, result.output
    assert shards
    assert shards.items() < stage_shards(run, "features").items()


def step_with_few_confident(
    name: str, model_folder: Path, num_confident: int
) -> tuple[float, bool, dict[str, np.ndarray], bool]:
    """A step in which only the first images of the global batch are confident.

    Returns the loss, whether the step is skipped, the gradients, and whether this rank has none of
    the confident images.
    """
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
def test_no_confident_image_on_some_ranks_and_on_all(name: str, tmp_path: Path) -> None:
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
