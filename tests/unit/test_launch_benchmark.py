"""`launch/slurm.py --benchmark`: what is asked for, what each job does, what a folder of jobs says. No Slurm is needed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.runs import problems, stage_rows
from benchmarks.scaling import collect, curves, draw, lost
from dist_scan.config import ConfigError
from dist_scan.monitoring.bottleneck import TrainingSetup, find_bottleneck
from dist_scan.monitoring.step_timer import SECTIONS
from dist_scan.run_config import load_config
from launch import benchmark, slurm, watch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICK = str(CONFIGS / "quickstart.yaml")


def test_the_words_after_benchmark_are_names_or_the_config() -> None:
    assert slurm.named(["--benchmark", QUICK, "a=1"]) == ["--benchmark", "run", QUICK, "a=1"]
    assert slurm.named(["--benchmark", "--steps", "9"]) == ["--benchmark", "run", "--steps", "9"]
    assert slurm.named(["--benchmark", "step,run", QUICK]) == ["--benchmark", "step,run", QUICK]
    assert slurm.named([QUICK, "--benchmark"]) == [QUICK, "--benchmark", "run"] and slurm.named(
        [QUICK]
    ) == [QUICK]
    assert benchmark.node_counts("4,1,2") == [1, 2, 4]
    assert {
        "step",
        "loader",
        "allreduce",
        "neighbours",
        "kmeans",
        "heads",
    } <= benchmark.over_nodes().keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "1,2", QUICK], "a run takes one number"),
        (
            ["--nodes", "1,2", "--benchmark", "stepp", QUICK],
            "'stepp' cannot be measured over nodes; there are: run, ",
        ),
        (["--nodes", "1,1", "--benchmark", QUICK], "each once"),
        (["--benchmark", QUICK], "--nodes 1,2,4"),
        (["--nodes", "1,3", "--benchmark", QUICK], "is not divisible by 3"),
        (["--nodes", "2,3", "--weak", "--benchmark", QUICK], "3 is no multiple of 2"),
        (["--nodes", "1,2", "--steps", "1", "--benchmark", QUICK], "2 and more"),
        (
            ["--nodes", "1,2", "--benchmark", QUICK, "data.train.source=/nowhere/at/all"],
            "--images 1281167,50000",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(
    capsys: pytest.CaptureFixture[str], words, said, tmp_path: Path
) -> None:
    assert slurm.main([*words, f"runtime.run_dir={tmp_path}/b"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_trainings_end_after_about_so_many_steps() -> None:
    run = load_config(QUICK)
    pretext = run.stages["pretext"]
    short = benchmark.cut(run, 100, {"train": 1797})
    assert (
        f"stages.pretext.steps_per_epoch={1797 // 128}" in short
        and "stages.pretext.epochs=8" in short
    )
    assert (
        f"stages.heads.steps_per_epoch={int(1797 * 0.9) // 512}" in short
        and "stages.heads.epochs=34" in short
    )
    assert benchmark.cut(run, 10, {})[:2] == [
        "stages.pretext.steps_per_epoch=10",
        "stages.pretext.epochs=1",
    ]
    assert "stages.pretext.steps_per_epoch=7" in benchmark.cut(run, 100, {"train": 1797}, growth=2)
    assert f"stages.pretext.epochs={pretext.epochs}" in benchmark.cut(
        run, 10**6, {"train": 1797}
    ), "never longer than the config says"


def test_every_number_of_nodes_gets_a_job_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Batches grow with --weak, what the user sets wins over the cut, benchmarks are sized by the config, and it is all shell."""
    words = [
        "--nodes",
        "1,2",
        "--gpus-per-node",
        "2",
        "--weak",
        "--dry-run",
        "--benchmark",
        "run,step,kmeans,allreduce",
        "--images",
        "50000",
        QUICK,
        "stages.pretext.epochs=2",
        f"runtime.run_dir={tmp_path}/b c",
    ]
    assert slurm.main(words) == 0
    one, two = ("#!/bin/bash" + text for text in capsys.readouterr().out.split("#!/bin/bash")[1:])
    for nodes, text in ((1, one), (2, two)):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        assert (
            f"#SBATCH --nodes={nodes}\n" in text
            and f"export RUN='{tmp_path}/b c/nodes-{nodes}'" in text
        )
        assert (
            "measure step --model resnet_small --stem imagenet --width 32 --size 32 --batch 64 --variants fp32\n"
            in text
        )
        assert (
            f"measure kmeans --folder '{tmp_path}/b c/nodes-{nodes}/work' --rows 50000 --dim 128 --clusters 10\n"
            in text
        )
        assert "benchmarks.scaling" in text and "while :; do" in text
    args = slurm.arguments([w for w in words if w != "--dry-run"])
    runs = benchmark.plan(
        args, slurm.read, load_config(args.config, args.overrides), [1, 2], {"train": 50000}
    )
    assert [r.stages["pretext"].global_batch for r in runs] == [128, 256] and [
        r.stages["pretext"].epochs for r in runs
    ] == [2, 2]
    assert runs[0].runtime.cache_dir == runs[1].runtime.cache_dir == f"{tmp_path}/b c/cache"
    alone = benchmark.text(runs[0], [["step"]], False, tmp_path)
    assert (
        '>"$RUN/DONE"; exit 0' in alone
        and subprocess.run(["bash", "-n"], input=alone, text=True).returncode == 0
    )


def test_every_srun_of_a_benchmark_job_is_counted(tmp_path: Path) -> None:
    """A job that is queued again must begin behind all its old steps, also those that only measured (launch/sbatch_script.py). Rows of what failed
    are measured again, others are kept."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, line in {
        "srun": f'echo x >>{tmp_path}/sruns; [ "${{@: -1}}" = broken ] && exit 3; echo "{{}}"',
        "scontrol": "true",
        "flock": "true",
        "env": "true",
    }.items():
        tools.joinpath(name).write_text(f"#!/bin/bash\n{line}\n")
        tools.joinpath(name).chmod(0o755)
    run = load_config(QUICK, [f"runtime.run_dir={tmp_path}/nodes-1"])
    script = benchmark.text(
        run, [["step", "x"], ["heads", "broken"]], False, tmp_path / "it's $HOME"
    )
    folder = tmp_path / "nodes-1"
    (folder / "slurm").mkdir(parents=True)
    for again in (False, True):
        (folder / "work" / "half").mkdir(parents=True)
        (tmp_path / "sruns").unlink(missing_ok=True)
        said = subprocess.run(
            ["bash"],
            input=script.replace("python", "true"),
            text=True,
            capture_output=True,
            timeout=60,
            env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"},
        )
        assert said.returncode == 0 and "benchmark heads: failed" in said.stdout, said
        assert (
            int((folder / "slurm" / "steps-7").read_text())
            == len((tmp_path / "sruns").read_text().split())
            == (2 if again else 4)
        )
        assert (
            [p.name for p in sorted((folder / "rows").glob("*.jsonl"))] == ["step.jsonl"]
            and (folder / "DONE").exists()
            and not (folder / "work").exists()
        )
        assert json.loads((folder / "facts.json").read_text()) == {}


def left(folder: Path, nodes: int, per_image: dict[str, float], late_s: float = 0.0) -> Path:
    """A run folder as a job on so many nodes leaves it: 300 steps of 256 images, the last rank later than the others."""
    run_dir, seconds = folder / f"nodes-{nodes}", np.zeros((nodes, len(SECTIONS)))
    for name, s in per_image.items():
        seconds[:, SECTIONS.index(name)] = s * 256 * 300
    if nodes > 1:
        seconds[-1, SECTIONS.index("forward")] += late_s
        seconds[:-1, SECTIONS.index("all_reduce")] += late_s
    setting = TrainingSetup(
        256, nodes, "cuda", 8, 8, "jpeg", 256, 224, tuple(f"<n{i}>" for i in range(nodes))
    )
    verdict = find_bottleneck(seconds, 300, setting)
    timing = {
        "steps": 300,
        "first_step_s": 3.25,
        "setting": dataclasses.asdict(setting),
        "waits_for": verdict.waits_for,
        "verdict": verdict.text,
        "images_per_s": round(256 * 300 / float(seconds.sum(1).mean()), 1),
        "seconds_by_rank": {n: seconds[:, i].tolist() for i, n in enumerate(SECTIONS)},
    }
    for stage, kind, more in (
        ("beton_train", "beton", None),
        ("pretext", "train", timing),
        ("neighbours", "neighbours", None),
    ):
        out = run_dir / "stages" / stage / "mark"
        out.mkdir(parents=True)
        out.joinpath("manifest.json").write_text(
            json.dumps(
                {
                    "kind": kind,
                    "world_size": nodes,
                    "seconds": 30.0 / nodes,
                    "peak_host_bytes": 2**30,
                    "peak_gpu_bytes": 2**33,
                }
            )
        )
        if more:
            out.joinpath("timing.json").write_text(json.dumps(more))
    (run_dir / "slurm").mkdir()
    (run_dir / "slurm" / "job.json").write_text(json.dumps({"job_id": "7", "nodes": nodes}))
    (run_dir / "facts.json").write_text(
        json.dumps(
            {
                "machine": "8 cores",
                "device": "GPU",
                "commit": "abc",
                "date": f"2026-01-0{nodes}",
                "configuration": "",
                "load": 1,
            }
        )
    )
    (run_dir / "config.yaml").write_text("name: x\n")
    (run_dir / "plan.json").write_text(json.dumps({"pretext": 9 * 2**30}))
    (run_dir / "DONE").write_text("now")
    (run_dir / "lock").write_text("job 7")
    return run_dir


MODEL = {"data_wait": 0.0001, "forward": 0.0008, "backward": 0.0016}


def test_rows_of_a_run_hold_its_figures(tmp_path: Path) -> None:
    rows = {
        r["row"]: r
        for r in stage_rows(left(tmp_path, 2, MODEL | {"all_reduce": 0.0002}, late_s=10.0))
    }
    assert set(rows) == {"pretext", "neighbours"}, (
        "building the .beton is shared and says nothing of scaling"
    )
    pretext = rows["pretext"]
    assert sum(pretext["sections"].values()) == pytest.approx(1.0, abs=1e-3) and pretext[
        "sections"
    ]["waiting"] == pytest.approx(5 / 217.4, abs=0.01)
    assert (
        pretext["nodes"],
        pretext["worst_rank"],
        pretext["worst_host"],
        pretext["peak_gpu_mib"],
        pretext["device"],
    ) == (2, 1, "<n1>", 8192, "GPU")
    assert (
        pretext["verdict"]
        and rows["neighbours"]["wall_s"] == 15.0
        and "sections" not in rows["neighbours"]
    )


def test_the_words_say_where_the_efficiency_went() -> None:
    """Twice the nodes, half the time for what scales; all-reduce costs a fifth of the step and is all that is missing."""
    rows = [
        {
            "benchmark": "trainings",
            "row": "pretext",
            "nodes": 1,
            "images_per_s": 100.0,
            "sections": {"forward": 1.0},
        },
        {
            "benchmark": "trainings",
            "row": "pretext",
            "nodes": 2,
            "images_per_s": 160.0,
            "sections": {"forward": 0.8, "all_reduce": 0.2},
        },
    ]
    (curve,) = curves(rows)
    assert curve.points[1].efficiency == 0.8
    assert (
        lost(curve)
        == "2 nodes give 1.60 times the images per second of 1: 80% of linear. Where the missing points are: all-reduce on every rank 20."
    )
    (one,) = curves(rows[:1])
    assert lost(one) == ""


def test_the_page_and_the_json_hold_all_and_name_what_is_missing(tmp_path: Path) -> None:
    for nodes in (1, 2):
        left(
            tmp_path,
            nodes,
            {name: s / nodes for name, s in MODEL.items()}
            | ({"all_reduce": 0.0003} if nodes > 1 else {}),
        )
    left(tmp_path, 4, MODEL).joinpath("DONE").unlink()
    (tmp_path / "nodes-4" / "MISTAKE").write_text("no such <images>\n")
    (tmp_path / "nodes-2" / "rows").mkdir()
    (tmp_path / "nodes-2" / "rows" / "step.err").write_text("Traceback\nMemoryError: all of it\n")
    (tmp_path / "nodes-1" / "logs").mkdir()
    (tmp_path / "nodes-1" / "logs" / "pretext.metrics.jsonl").write_text(
        json.dumps({"benchmark": "no row", "nodes": 1, "wall_s": 1})
    )
    (tmp_path / "benchmark.json").write_text(
        json.dumps(
            {
                "config": "c.yaml",
                "overrides": [],
                "benchmarks": ["run", "step"],
                "nodes": [1, 2, 4, 8],
                "steps": 300,
                "weak": False,
            }
        )
    )
    assert problems(tmp_path / "nodes-1") == [] and problems(tmp_path / "nodes-2") == [
        "step: MemoryError: all of it"
    ]
    assert draw(tmp_path) == len(collect(tmp_path)) == 6
    text, facts = (
        (tmp_path / "scaling.html").read_text(),
        json.loads((tmp_path / "scaling.json").read_text()),
    )
    for words in (
        "trainings",
        "other stages",
        "data wait",
        "8,192 MiB",
        "9,216 MiB",
        "ended by a mistake in its settings: no such &lt;images&gt;",
        "8 nodes: not submitted",
        "MemoryError",
        "--nodes 1,2,4,8 --benchmark run,step",
        "all-reduce is",
        "1 node: ",
    ):
        assert words in text, words
    assert "http" not in text and facts["missing"].keys() == {"2", "4", "8"}
    first = facts["curves"][0]
    assert (first["benchmark"], [p["nodes"] for p in first["points"]]) == (
        "trainings",
        [1, 2, 4],
    ) and first["lost"]
    assert [p.name for p in watch.run_dirs(tmp_path)] == ["nodes-1", "nodes-2", "nodes-4"]


def test_figures_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    from dist_scan.config import dump

    run = load_config(QUICK, [f"runtime.run_dir={tmp_path}/nodes-1"])
    assert not benchmark.measured(run, ["run"])
    (tmp_path / "nodes-1").mkdir()
    (tmp_path / "nodes-1" / "config.yaml").write_text(dump(run))
    assert not benchmark.measured(run, ["run"])
    (tmp_path / "nodes-1" / "DONE").write_text("now")
    assert benchmark.measured(run, ["run"]) and not benchmark.measured(run, ["run", "step"])
    with pytest.raises(ConfigError, match="other slurm.cpus_per_task"):
        benchmark.measured(
            load_config(QUICK, [f"runtime.run_dir={tmp_path}/nodes-1", "slurm.cpus_per_task=8"]),
            ["run"],
        )
    with pytest.raises(ConfigError, match="other stages"):
        benchmark.measured(
            load_config(QUICK, [f"runtime.run_dir={tmp_path}/nodes-1", "stages.pretext.epochs=3"]),
            ["run"],
        )
