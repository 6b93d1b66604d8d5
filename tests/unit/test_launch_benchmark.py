"""`launch/slurm.py --benchmark`: validation, each job's script, the page. No Slurm is needed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.runs import problems, stage_rows
from benchmarks.scaling import collect, curves, draw, lost
from dist_scan.config import ConfigError, dump
from dist_scan.monitoring.bottleneck import TrainingSetup, find_bottleneck
from dist_scan.monitoring.step_timer import SECTIONS
from dist_scan.run_config import load_config
from launch import benchmark, slurm, watch
from launch.benchmark import Suite
from launch.command_line import insert_benchmark_name, parse_slurm_arguments
from tests.support.commands import write_commands
from tests.support.launches import ROOT

QUICK = str(ROOT / "configs" / "quickstart.yaml")
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--benchmark", QUICK, "a=1"], ["--benchmark", "run", QUICK, "a=1"]),
        (["--benchmark", "--steps", "9"], ["--benchmark", "run", "--steps", "9"]),
        (["--benchmark", "step,run", QUICK], ["--benchmark", "step,run", QUICK]),
        ([QUICK, "--benchmark"], [QUICK, "--benchmark", "run"]),
        ([QUICK], [QUICK]),
    ],
)
def test_benchmark_is_followed_by_names_or_by_the_config(
    words: list[str], expected: list[str]
) -> None:
    assert insert_benchmark_name(words) == expected


def test_benchmarks_over_nodes() -> None:
    assert benchmark.parse_node_counts("4,1,2") == [1, 2, 4]
    names = benchmark.node_benchmarks().keys()
    assert {"step", "loader", "allreduce", "neighbours", "kmeans", "heads"} <= names


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--nodes", "1,2", QUICK], "a run takes one number"),
        (
            ["--nodes", "1,2", "--benchmark", "stepp", QUICK],
            "'stepp' cannot be measured over nodes; allowed: run, ",
        ),
        (["--nodes", "1,1", "--benchmark", QUICK], "each once"),
        (["--benchmark", QUICK], "--nodes 1,2,4"),
        (["--nodes", "1,3", "--benchmark", QUICK], "is not divisible by 3"),
        (["--nodes", "2,3", "--weak", "--benchmark", QUICK], "3 is no multiple of 2"),
        (["--nodes", "1,2", "--steps", "1", "--benchmark", QUICK], "2 or more"),
        (
            ["--nodes", "1,2", "--benchmark", QUICK, "data.train.source=/nowhere/at/all"],
            "--images 1281167,50000",
        ),
    ],
)
def test_invalid_settings_are_reported_before_submission(
    capsys: Capture, words: list[str], error: str, tmp_path: Path
) -> None:
    assert slurm.main([*words, f"runtime.run_dir={tmp_path}/b"]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_trainings_end_after_about_the_requested_steps() -> None:
    run = load_config(QUICK)
    overrides = benchmark.shorten_trainings(run, 100, {"train": 1797})
    assert f"stages.pretext.steps_per_epoch={1797 // 128}" in overrides
    assert "stages.pretext.epochs=8" in overrides
    assert f"stages.heads.steps_per_epoch={int(1797 * 0.9) // 512}" in overrides
    assert "stages.heads.epochs=34" in overrides

    unknown_size = benchmark.shorten_trainings(run, 10, {})
    assert unknown_size[:2] == ["stages.pretext.steps_per_epoch=10", "stages.pretext.epochs=1"]
    larger_batch = benchmark.shorten_trainings(run, 100, {"train": 1797}, growth=2)
    assert "stages.pretext.steps_per_epoch=7" in larger_batch
    never_longer = benchmark.shorten_trainings(run, 10**6, {"train": 1797})
    assert f"stages.pretext.epochs={run.stages['pretext'].epochs}" in never_longer


def is_shell(text: str) -> bool:
    return subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_every_number_of_nodes_gets_its_own_job(capsys: Capture, tmp_path: Path) -> None:
    """Batches grow with --weak, the user's overrides take precedence, sizes are the config's."""
    folder = f"{tmp_path}/b c"
    words = ["--nodes", "1,2", "--gpus-per-node", "2", "--weak"]
    words += ["--benchmark", "run,step,kmeans,allreduce", "--images", "50000", QUICK]
    words += ["stages.pretext.epochs=2", f"runtime.run_dir={folder}"]
    assert slurm.main(["--dry-run", *words]) == 0
    scripts = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert len(scripts) == 2
    for nodes, text in enumerate(scripts, 1):
        assert is_shell(text)
        assert f"#SBATCH --nodes={nodes}\n" in text
        assert f"export RUN='{folder}/nodes-{nodes}'" in text
        assert (
            "measure step --model resnet_small --stem imagenet --width 32 --size 32 --batch 64 "
            "--variants fp32\n" in text
        )
        assert (
            f"measure kmeans --folder '{folder}/nodes-{nodes}/work' --rows 50000 --dim 128 "
            "--clusters 10\n" in text
        )
        assert "benchmarks.scaling" in text
        assert "while :; do" in text

    args = parse_slurm_arguments(words, "")
    base = load_config(args.config, args.overrides)
    runs = benchmark.load_runs(args, base, [1, 2], {"train": 50000})
    pretexts = [run.stages["pretext"] for run in runs]
    assert [stage.global_batch for stage in pretexts] == [128, 256]
    assert [stage.epochs for stage in pretexts] == [2, 2]
    assert {run.runtime.cache_dir for run in runs} == {f"{folder}/cache"}
    text = Suite(tmp_path, with_run=False, commands={1: [["step"]]}).build_script(runs[0])
    assert '>"$RUN/DONE"\nexit 0' in text
    assert is_shell(text)


@pytest.fixture
def benchmark_script(tmp_path: Path) -> Path:
    """A job's script whose benchmark `step` succeeds and `heads` fails, and Slurm's commands."""
    count = f"echo x >>{tmp_path}/sruns"
    lines = {
        "srun": f'{count}; [ "${{@: -1}}" = broken ] && exit 3; echo "{{}}"',
        "scontrol": "true",
        "flock": "true",
        "env": "true",
    }
    write_commands(tmp_path / "bin", lines)
    run = load_config(QUICK, [f"runtime.run_dir={tmp_path}/nodes-1"])
    commands = {1: [["step", "x"], ["heads", "broken"]]}
    text = Suite(tmp_path / "it's $HOME", with_run=False, commands=commands).build_script(run)
    (tmp_path / "nodes-1" / "slurm").mkdir(parents=True)
    path = tmp_path / "script.sh"
    path.write_text(text.replace("python", "true"))
    return path


def test_every_srun_of_a_benchmark_job_is_counted(tmp_path: Path, benchmark_script: Path) -> None:
    """A requeued job must skip the numbers of all its old steps, those of benchmarks too.

    Benchmarks that failed are measured again, rows of the others are kept.
    """
    folder = tmp_path / "nodes-1"
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
    }
    for expected_steps in (4, 2):
        (folder / "work" / "half").mkdir(parents=True)
        (tmp_path / "sruns").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", benchmark_script],
            text=True,
            capture_output=True,
            timeout=60,
            env=environment,
        )
        assert done.returncode == 0, done
        assert "benchmark heads: failed" in done.stdout
        assert int((folder / "slurm" / "steps-7").read_text()) == expected_steps
        assert len((tmp_path / "sruns").read_text().split()) == expected_steps
        assert [path.name for path in (folder / "rows").glob("*.jsonl")] == ["step.jsonl"]
        assert (folder / "DONE").exists()
        assert not (folder / "work").exists()
        assert json.loads((folder / "facts.json").read_text()) == {}


def write_run(folder: Path, nodes: int, s_per_image: dict[str, float], late_s: float = 0.0) -> Path:
    """A run folder as a job leaves it: 300 steps of 256 images, the last rank late by `late_s`."""
    run_dir = folder / f"nodes-{nodes}"
    seconds = np.zeros((nodes, len(SECTIONS)))
    for name, s in s_per_image.items():
        seconds[:, SECTIONS.index(name)] = s * 256 * 300
    if nodes > 1:
        seconds[-1, SECTIONS.index("forward")] += late_s
        seconds[:-1, SECTIONS.index("all_reduce")] += late_s
    hosts = tuple(f"<n{i}>" for i in range(nodes))
    setup = TrainingSetup(256, nodes, "cuda", 8, 8, "jpeg", 256, 224, hosts)
    bottleneck = find_bottleneck(seconds, 300, setup)
    timing = {
        "steps": 300,
        "first_step_s": 3.25,
        "setup": dataclasses.asdict(setup),
        "waits_for": bottleneck.waits_for,
        "bottleneck": bottleneck.text,
        "images_per_s": round(256 * 300 / float(seconds.sum(1).mean()), 1),
        "seconds_by_rank": {name: seconds[:, i].tolist() for i, name in enumerate(SECTIONS)},
    }
    stages = {"beton_train": "beton", "pretext": "train", "neighbours": "neighbours"}
    for stage, kind in stages.items():
        manifest = {
            "kind": kind,
            "world_size": nodes,
            "seconds": 30.0 / nodes,
            "peak_host_bytes": 2**30,
            "peak_gpu_bytes": 2**33,
        }
        stage_dir = run_dir / "stages" / stage / "fingerprint"
        stage_dir.mkdir(parents=True)
        (stage_dir / "manifest.json").write_text(json.dumps(manifest))
        if kind == "train":
            (stage_dir / "timing.json").write_text(json.dumps(timing))
    machine = {
        "machine": "8 cores",
        "device": "GPU",
        "commit": "abc",
        "date": f"2026-01-0{nodes}",
        "configuration": "",
        "load": 1,
    }
    (run_dir / "slurm").mkdir()
    (run_dir / "slurm" / "job.json").write_text(json.dumps({"job_id": "7", "nodes": nodes}))
    (run_dir / "facts.json").write_text(json.dumps(machine))
    (run_dir / "config.yaml").write_text("name: x\n")
    (run_dir / "plan.json").write_text(json.dumps({"pretext": 9 * 2**30}))
    (run_dir / "DONE").write_text("now")
    (run_dir / "lock").write_text("job 7")
    return run_dir


MODEL = {"data_wait": 0.0001, "forward": 0.0008, "backward": 0.0016}


def test_rows_of_a_run_hold_its_figures(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, 2, MODEL | {"all_reduce": 0.0002}, late_s=10.0)
    rows = {row["row"]: row for row in stage_rows(run_dir)}
    assert set(rows) == {"pretext", "neighbours"}, "building the .beton is shared between runs"
    pretext = rows["pretext"]
    assert sum(pretext["sections"].values()) == pytest.approx(1.0, abs=1e-3)
    assert pretext["sections"]["waiting"] == pytest.approx(5 / 217.4, abs=0.01)
    assert pretext["nodes"] == 2
    assert (pretext["worst_rank"], pretext["worst_host"]) == (1, "<n1>")
    assert (pretext["peak_gpu_mib"], pretext["device"]) == (8192, "GPU")
    assert pretext["bottleneck"]
    assert rows["neighbours"]["wall_s"] == 15.0
    assert "sections" not in rows["neighbours"]


def test_lost_efficiency_is_attributed_to_sections() -> None:
    """Half the time on two nodes for what scales; all-reduce is a fifth of the step."""
    one = {
        "benchmark": "trainings",
        "row": "pretext",
        "nodes": 1,
        "images_per_s": 100.0,
        "sections": {"forward": 1.0},
    }
    two = one | {
        "nodes": 2,
        "images_per_s": 160.0,
        "sections": {"forward": 0.8, "all_reduce": 0.2},
    }
    (curve,) = curves([one, two])
    assert curve.points[1].efficiency == 0.8
    assert lost(curve) == (
        "2 nodes give 1.60 times the images per second of 1: 80% of linear. "
        "Percentage points lost, by section: all-reduce on every rank 20."
    )
    (alone,) = curves([one])
    assert lost(alone) == ""


@pytest.fixture
def benchmark_folder(tmp_path: Path) -> Path:
    """Figures of 1 and 2 nodes, a failed run on 4, none on 8."""
    write_run(tmp_path, 1, MODEL)
    halves = {name: s / 2 for name, s in MODEL.items()}
    write_run(tmp_path, 2, halves | {"all_reduce": 0.0003})
    (write_run(tmp_path, 4, MODEL) / "DONE").unlink()
    (tmp_path / "nodes-4" / "FATAL_ERROR").write_text("no such <images>\n")
    (tmp_path / "nodes-2" / "rows").mkdir()
    (tmp_path / "nodes-2" / "rows" / "step.err").write_text("Traceback\nMemoryError: all of it\n")
    (tmp_path / "nodes-1" / "logs").mkdir()
    not_a_row = {"benchmark": "no row", "nodes": 1, "wall_s": 1}
    (tmp_path / "nodes-1" / "logs" / "pretext.metrics.jsonl").write_text(json.dumps(not_a_row))
    description = {
        "config": "c.yaml",
        "overrides": [],
        "benchmarks": ["run", "step"],
        "nodes": [1, 2, 4, 8],
        "steps": 300,
        "weak": False,
    }
    (tmp_path / "benchmark.json").write_text(json.dumps(description))
    return tmp_path


def test_page_and_json_hold_all_figures_and_name_the_missing_ones(benchmark_folder: Path) -> None:
    assert problems(benchmark_folder / "nodes-1") == []
    assert problems(benchmark_folder / "nodes-2") == ["step: MemoryError: all of it"]
    assert draw(benchmark_folder) == len(collect(benchmark_folder)) == 6
    page = (benchmark_folder / "scaling.html").read_text()
    for words in (
        "trainings",
        "other stages",
        "data wait",
        "8,192 MiB",
        "9,216 MiB",
        "ended by a fatal error: no such &lt;images&gt;",
        "8 nodes: not submitted",
        "MemoryError",
        "--nodes 1,2,4,8 --benchmark run,step",
        "all-reduce is",
        "1 node: ",
    ):
        assert words in page, words
    assert "http" not in page

    content = json.loads((benchmark_folder / "scaling.json").read_text())
    assert content["missing"].keys() == {"2", "4", "8"}
    first = content["curves"][0]
    assert first["benchmark"] == "trainings"
    assert [point["nodes"] for point in first["points"]] == [1, 2, 4]
    assert first["lost"]
    names = [run_dir.name for run_dir in watch.run_dirs(benchmark_folder)]
    assert names == ["nodes-1", "nodes-2", "nodes-4"]


def test_figures_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    run_dir = tmp_path / "nodes-1"
    run = load_config(QUICK, [f"runtime.run_dir={run_dir}"])
    assert not benchmark.has_all_figures(run, ["run"])
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump(run))
    assert not benchmark.has_all_figures(run, ["run"])
    (run_dir / "DONE").write_text("now")
    assert benchmark.has_all_figures(run, ["run"])
    assert not benchmark.has_all_figures(run, ["run", "step"])
    for override, changed in (
        ("slurm.cpus_per_task=8", "slurm.cpus_per_task"),
        ("stages.pretext.epochs=3", "stages"),
    ):
        other = load_config(QUICK, [f"runtime.run_dir={run_dir}", override])
        with pytest.raises(ConfigError, match=f"other {changed}"):
            benchmark.has_all_figures(other, ["run"])
