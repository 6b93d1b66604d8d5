"""The plan of a run, compared with numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_scan.models.backbone import BackboneConfig
from dist_scan.run_config import load_config
from launch import plan, slurm
from tests.support.launches import ROOT

CONFIG = str(ROOT / "configs" / "imagenet1k.yaml")
QUICK = str(ROOT / "configs" / "quickstart.yaml")
IMAGES = {"train": 1_281_167, "val": 50_000}


def test_resnet50_is_measured_without_running_it() -> None:
    network = plan.measure_network(BackboneConfig(name="resnet50"), 224)
    assert network.parameters == 23_508_032
    assert network.dim == 2048
    # torchvision's table: 4.09 G multiply-adds, with the classifier.
    assert network.flops == pytest.approx(2 * 4.09e9, rel=0.01)


def test_the_imagenet_plan() -> None:
    run = load_config(CONFIG, ["slurm.nodes=4", "slurm.gpus_per_node=8"])
    text = plan.plan(run, 100.0, IMAGES)
    rows = {line.split()[0]: line for line in text.splitlines()}
    pretext, bank = run.stages["pretext"], run.stages["bank"]
    steps = IMAGES["train"] // pretext.global_batch * pretext.epochs
    assert f"{steps:,} steps of {pretext.global_batch:,}" in rows["pretext"]
    assert f"{IMAGES['train'] * bank.views * 2048 * 2 / 1e9:.3g} GB" in rows["bank"]
    assert "100 (stated) TFLOP/s" in text
    assert "plan: 4 nodes x 8 processes" in text
    assert hours(plan.plan(run, 50.0, IMAGES)) >= 1.8 * hours(text) > 0


def hours(text: str) -> float:
    """The hours in the line of totals."""
    total = next(line for line in text.splitlines() if line.startswith("in all"))
    return float(total.split("about ")[1].split("h")[0])


def test_memory_of_a_training_falls_with_the_number_of_ranks() -> None:
    one, four = (
        plan.training_memory(load_config(CONFIG, [f"slurm.nodes={nodes}", "slurm.gpus_per_node=8"]))
        for nodes in (1, 4)
    )
    assert one.keys() == {"pretext", "selflabelling"}
    assert all(one[name] > four[name] > 0 for name in one)
    network = plan.measure_network(BackboneConfig(name="resnet50"), 224)
    parameters, activations = network.parameters * 12, network.activations * 32 * 2 * 2
    assert one["pretext"] == parameters + activations + 65536 * 128 * 4


def test_a_dry_run_prints_script_and_plan_and_submits_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--dry-run", "--nodes", "2", "--gpus-per-node", "4", "--time", "60"]
    words += ["--sbatch", "exclusive", "--setup", "module load x", "--images", "1281167,50000"]
    assert slurm.main([*words, CONFIG, f"runtime.run_dir={tmp_path}/r"]) == 0
    output = capsys.readouterr().out
    assert "#SBATCH --time=60" in output
    assert "#SBATCH --exclusive" in output
    assert "module load x" in output
    assert "plan: 2 nodes x 4" in output
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--nodes", "3"], "is not divisible by 3 processes"),
        (["--nodes", "four"], "slurm.nodes"),
        (["--time", "soon"], "slurm.time"),
        (["--images", "many"], "--images"),
        (["data.train.source=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_invalid_settings_are_reported_before_submission(
    capsys: pytest.CaptureFixture[str], flags: list[str], error: str
) -> None:
    assert slurm.main(["--dry-run", QUICK, *flags]) == 2
    assert error in capsys.readouterr().err
