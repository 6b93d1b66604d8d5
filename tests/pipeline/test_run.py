"""The quickstart from images to report, through the launcher, in real processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from dist_scan.monitoring.log import read_rows
from dist_scan.run_config import load_config
from tests.support.launches import (
    LOCAL,
    ROOT,
    RunningLauncher,
    command,
    environment,
    read_report,
    run,
)

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished quickstart, made small, and its output."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder)
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def all_stages(folder: Path) -> list[str]:
    """The names of the stages of a run, in order."""
    return list(json.loads((folder / "stages.json").read_text()))


def stages_that(word: str, output: str) -> list[str]:
    """The stages that, by the output of a start, `starts`, `resumes` or are `already done`."""
    return [line.partition(":")[0] for line in output.splitlines() if f": {word} (" in line]


def test_a_run_leaves_a_report_a_table_and_assignments(finished: tuple[Path, str]) -> None:
    folder, output = finished
    found = json.loads((folder / "report.json").read_text())
    for subject in ("kmeans_pixels", "kmeans_features", "scan", "selflabel"):
        assert 0 <= found[subject]["acc"] <= 1
        assert {"nmi", "ari", "seconds"} <= found[subject].keys()
    assert {"beton_train", "pretext", "heads", "report"} <= found["stage_seconds"].keys()
    assert found["stage_memory"]["pretext"]["peak_host_bytes"] > 50 * 2**20
    timing = found["stage_timing"]["pretext"]
    assert timing["bottleneck"]
    assert len(timing["seconds_by_rank"]["forward"]) == 1
    page = (folder / "report.html").read_text()
    assert "time per step" in page
    assert page.count("<img") + page.count("<svg") > 5
    assert "http://" not in page.replace("http://www.w3.org", "")
    table = pq.read_table(folder / "assignments.parquet")
    assert table.num_rows == 400
    assert {"name", "index", "cluster", "probability", "label"} <= set(table.column_names)
    assert "report.html" in output and "ACC" in output
    assert (folder / "DONE").exists()
    assert list((folder / "logs").glob("*.metrics.jsonl"))


def test_a_second_start_skips_everything_quickly(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = (folder / "report.json").read_bytes()
    start = time.monotonic()
    again = run(folder, new_interpreter=True)
    seconds = time.monotonic() - start
    assert again.returncode == 0
    assert stages_that("already done", again.stdout) == all_stages(folder)
    assert stages_that("starts", again.stdout) == []
    assert (folder / "report.json").read_bytes() == before
    assert seconds < 30


def test_an_edited_setting_reruns_its_stage_and_those_that_depend_on_it(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    runtime_edit = run(folder, "runtime.log_every=3").stdout
    assert stages_that("already done", runtime_edit) == all_stages(folder)
    edit = run(folder, "stages.heads.method.entropy_weight=4.0").stdout
    rerun = ["heads", "scan", "consensus", "selflabelling", "selflabel", "evaluate", "report"]
    assert stages_that("starts", edit) == rerun
    skipped = [name for name in all_stages(folder) if name not in rerun]
    assert stages_that("already done", edit) == skipped
    check_that_a_flipped_bit_is_detected(folder)


def check_that_a_flipped_bit_is_detected(folder: Path) -> None:
    """A bit of the cached features, which other heads read again: nothing else would show it."""
    shard = sorted(folder.glob("stages/bank/*/*-*.npy"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = run(folder, "stages.heads.method.entropy_weight=3.0")
    assert done.returncode == 2
    assert f"{shard.name} has changed since it was written" in done.stdout
    assert "Traceback" not in done.stdout
    unread = run(folder, "stages.heads.method.entropy_weight=4.0")
    assert unread.returncode == 0, "no stage reads the features"


def test_killed_three_times_the_same_command_gives_the_same_report(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    generator, folder, codes = random.Random(0), tmp_path / "run", []
    for stage in ("pretext", "heads", "selflabelling"):
        launcher = RunningLauncher(command(folder, "runtime.checkpoint_s=1"), tmp_path)
        launcher.wait_for_line(f"{stage}: ")  # starts, resumes, or is already done
        time.sleep(generator.uniform(0, 1))
        codes.append(launcher.kill())
    assert codes.count(-signal.SIGKILL) >= 2, "the run had ended before it was killed"
    last = run(folder, "runtime.checkpoint_s=1")
    assert last.returncode == 0, last.stdout
    assert read_report(folder) == read_report(finished[0])


# SIGHUP is sent when the launcher's terminal is closed.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_saves_and_the_same_command_resumes_it(
    number: signal.Signals, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    metrics = folder / "logs" / "pretext.metrics.jsonl"
    launcher = RunningLauncher(command(folder, processes=2), tmp_path)
    launcher.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    launcher.send_signal(number)
    stopped = launcher.wait(60)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "everything is saved" in stopped.stdout
    assert (folder / "STOPPED").exists()
    assert list(folder.glob("stages/pretext/*/work/checkpoints/step-*"))
    again = run(folder, processes=2)
    assert again.returncode == 0
    assert "pretext: resumes" in again.stdout


SMALL_PRETEXT = ["stages.pretext.epochs=6", "stages.pretext.precision=fp64"]
WHOLE_PRETEXT = [
    "data.train.limit=",
    "stages.pretext.epochs=2",
    "stages.pretext.steps_per_epoch=10",
    "stages.pretext.network.width=32",
    "stages.pretext.global_batch=128",
]


@pytest.mark.parametrize(("tolerance", "overrides"), [(1e-9, SMALL_PRETEXT), (1e-5, WHOLE_PRETEXT)])
def test_two_processes_see_the_same_images_and_the_same_losses(
    tolerance: float, overrides: list[str], tmp_path: Path
) -> None:
    """A small pretext in float64, and 20 steps of the quickstart's own in float32."""
    others = [name for name in load_config(QUICKSTART).stages if name != "pretext"]
    without_others = [f"stages.{name}=" for name in others]
    losses, betons = {}, {}
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        done = run(folder, *overrides, *without_others, processes=processes)
        assert done.returncode == 0, done.stdout
        betons[processes] = next(folder.glob("stages/beton_train/*/*.beton")).read_bytes()
        rows = read_rows(folder / "logs" / "pretext.metrics.jsonl")
        losses[processes] = [row["loss"] for row in rows if "loss" in row][:20]
    assert betons[1] == betons[2]
    assert len(losses[1]) == 20
    assert losses[1][0] != losses[1][19]
    assert max(abs(one - two) for one, two in zip(losses[1], losses[2])) < tolerance


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = RunningLauncher(command(folder), tmp_path)
    try:
        first.wait_until(lambda: "starts" in first.output())
        second = run(folder)
        assert second.returncode == 2
        assert f"process {first.pid}" in second.stdout
        assert "Traceback" not in second.stdout
    finally:
        first.kill()


METHOD = textwrap.dedent("""
    from typing import Literal

    from safetensors.torch import save_file

    from dist_scan.methods.base import Method, MethodConfig, StepResult

    class MineConfig(MethodConfig):
        kind: Literal["mine"] = "mine"

    class MineMethod(Method):
        Config = MineConfig
        recipes = ("digits", "digits")

        def __init__(self, config, inputs):
            super().__init__(config, inputs)
            self.backbone = inputs.backbone

        def forward(self, batch):
            a, b = (self.backbone(view) for view in batch.views)
            return StepResult(((a - b) ** 2).mean() + (a.std(0) - 1).abs().mean())

        def publish(self, out):
            weights = {k: v.contiguous() for k, v in self.backbone.state_dict().items()}
            save_file(weights, out / "mine.safetensors")
""")
METHOD_CONFIG = """
name: mine
data: {train: {source: "sklearn:digits", limit: 200}, size: 32, stored: raw, resolution: 32}
stages:
  pretext:
    kind: train
    images: train
    network: {name: resnet_small, width: 8}
    method: {kind: mine}
    optimizer: {lr: 0.1}
    epochs: 3
    global_batch: 64
runtime: {checkpoint_s: 0.001}
"""


def test_a_method_in_one_file_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "mine.py").write_text(METHOD)
    (tmp_path / "sitecustomize.py").write_text(
        f"import dist_scan.methods\ndist_scan.methods.__path__.append({str(plugin)!r})\n"
    )
    (tmp_path / "mine.yaml").write_text(METHOD_CONFIG)
    env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    weights = {}
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        line = [*LOCAL, str(tmp_path / "mine.yaml"), f"runtime.run_dir={folder}"]
        if name == "killed":
            kill_after_two_steps(line, env, folder)
        done = subprocess.run(
            line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout
        assert ("pretext: resumes" in done.stdout) == (name == "killed")
        weights[name] = load_file(next(folder.glob("stages/pretext/*/mine.safetensors")))
    assert weights["undisturbed"].keys() == weights["killed"].keys()
    for key, value in weights["undisturbed"].items():
        assert (value == weights["killed"][key]).all(), key


def kill_after_two_steps(line: list[str], env: dict[str, str], folder: Path) -> None:
    """Start a run and kill it once it has a checkpoint of its second step or a later one."""
    process = subprocess.Popen(
        line,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(folder.glob("stages/pretext/*/work/checkpoints/step-00000000[2-8]")):
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
