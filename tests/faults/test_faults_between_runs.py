"""RELIABILITY.md's rows 12, 17 and 18: asked to leave inside long work, nobody confident, another number of ranks at every start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_methods_over_ranks import B, close, folder, make  # noqa: F401  folder is a fixture
from tests.support.faulted_run import LONG, PRETEXT, LaunchResult, TinyRun
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


def unsure(name: str, folder: Path, confident: int):
    """A step in which only the first `confident` of B images are confident: (loss, skip, gradients, the ranks without any)."""
    import copy

    import torch

    from dist_scan.data.batch import Batch
    from dist_scan.world.collectives import all_mean, gather_rows
    from dist_scan.world.world import current, wrap_ddp

    method, world, gen = make(name, folder).train(), current(), torch.Generator().manual_seed(2)
    weak, strong = (torch.randn(B, 3, 8, 8, generator=gen, dtype=torch.float64) for _ in range(2))
    mine = slice(world.rank * B // world.world_size, (world.rank + 1) * B // world.world_size)
    with torch.no_grad():
        sure = gather_rows(copy.deepcopy(method.teacher or method.model).train()(weak[mine]))
    highest, order = sure.softmax(1).max(1).values.sort(descending=True)
    threshold = float(highest[confident - 1] + highest[confident]) / 2 if confident else 0.9999999
    method.config = method.config.model_copy(update={"threshold": threshold})
    network = wrap_ddp(
        method
    )  # held until after the backward pass: with it go the hooks that average gradients
    step = network(Batch(torch.arange(B)[mine], (weak[order][mine], strong[order][mine]), 0, 0))
    if not step.skip:
        step.loss.backward()
    gradients = {
        n: p.grad.numpy().copy() for n, p in method.named_parameters() if p.grad is not None
    }
    return float(all_mean(step.loss.detach())), step.skip, gradients, mine.start >= confident


@pytest.mark.parametrize("name", ["selflabel", "selflabel-teacher"])
def test_row_17_nobody_confident_on_some_ranks_and_on_all(name, folder) -> None:  # noqa: F811
    loss, skip, gradients, _ = unsure(name, folder, 5)
    assert not skip and any(np.abs(g).max() > 0 for g in gradients.values())
    ranks = run_ranks(unsure, 3, name, folder, 5)
    assert [r[3] for r in ranks] == [False, True, True], (
        "two of three ranks have no confident image"
    )
    for found in ranks:
        assert not found[1] and found[2].keys() == gradients.keys()
        close(found[0], loss, "loss")
        for parameter, expected in gradients.items():
            close(found[2][parameter], expected, parameter)
    assert [r[1] for r in run_ranks(unsure, 3, name, folder, 0)] == [True] * 3
