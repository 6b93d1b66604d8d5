"""The plan counts what it says: held against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_scan.models.backbone import BackboneConfig
from dist_scan.run_config import load_config
from launch import plan, slurm

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "imagenet1k.yaml")


def test_resnet50_is_measured_without_running_it() -> None:
    net = plan.measure(BackboneConfig(name="resnet50"), 224)
    assert net.parameters == 23_508_032 and net.dim == 2048
    assert net.flops == pytest.approx(
        2 * 4.09e9, rel=0.01
    )  # torchvision's table: 4.09 G multiply-adds, less the classifier


def test_the_imagenet_plan() -> None:
    run = load_config(CONFIG, ["slurm.nodes=4", "slurm.gpus_per_node=8"])
    text = plan.plan(run, 100.0, {"train": 1_281_167, "val": 50_000})
    rows = {line.split()[0]: line for line in text.splitlines()}
    epochs, batch = run.stages["pretext"].epochs, run.stages["pretext"].global_batch
    assert f"{1_281_167 // batch * epochs:,} steps of {batch:,}" in rows["pretext"]
    views = run.stages["bank"].views
    assert f"{1_281_167 * views * 2048 * 2 / 1e9:.3g} GB" in rows["bank"]
    assert "100 (stated) TFLOP/s" in text and "plan: 4 nodes x 8 processes" in text
    half = plan.plan(run, 50.0, {"train": 1_281_167, "val": 50_000})
    hours = [
        float(line.split("about ")[1].split("h")[0])
        for t in (text, half)
        for line in t.splitlines()
        if line.startswith("in all")
    ]
    assert hours[1] >= 1.8 * hours[0] > 0


def test_memory_of_a_training_is_the_plans_and_falls_with_the_ranks() -> None:
    found = [
        plan.memory(load_config(CONFIG, [f"slurm.nodes={n}", "slurm.gpus_per_node=8"]))
        for n in (1, 4)
    ]
    assert found[0].keys() == {"pretext", "selflabelling"} and all(
        found[0][name] > found[1][name] > 0 for name in found[0]
    )
    net = plan.measure(BackboneConfig(name="resnet50"), 224)
    assert found[0]["pretext"] == net.parameters * 12 + net.kept * 32 * 2 * 2 + 65536 * 128 * 4


def test_dry_run_submits_nothing_and_says_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        slurm.main(
            [
                "--dry-run",
                "--nodes",
                "2",
                "--gpus-per-node",
                "4",
                "--time",
                "60",
                "--sbatch",
                "exclusive",
                "--setup",
                "module load x",
                "--images",
                "1281167,50000",
                CONFIG,
                f"runtime.run_dir={tmp_path}/r",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "#SBATCH --time=60" in out
        and "#SBATCH --exclusive" in out
        and "module load x" in out
        and "plan: 2 nodes x 4" in out
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nodes", "3"], "is not divisible by 3 processes"),
        (["--nodes", "four"], "slurm.nodes"),
        (["--time", "soon"], "slurm.time"),
        (["--images", "many"], "--images"),
        (["data.train.source=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(
    capsys: pytest.CaptureFixture[str], flags, said
) -> None:
    quick = str(Path(CONFIG).parent / "quickstart.yaml")
    assert slurm.main(["--dry-run", quick, *flags]) == 2
    assert said in capsys.readouterr().err
