"""Images in, report out, through the launcher, in real processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dist_scan.run_config import load_config
from tests.support.launches import ROOT, RunningLauncher, command, environment, read_report, run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder)
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def test_it_leaves_a_report_a_table_and_assignments(undisturbed) -> None:
    folder, out = undisturbed
    facts = json.loads((folder / "report.json").read_text())
    for subject in ("kmeans_pixels", "kmeans_features", "scan", "selflabel"):
        assert (
            0 <= facts[subject]["acc"] <= 1 and {"nmi", "ari", "seconds"} <= facts[subject].keys()
        )
    assert set(facts["stage_seconds"]) >= {"beton_train", "pretext", "heads", "report"}
    assert facts["stage_memory"]["pretext"]["peak_host_bytes"] > 50 * 2**20
    assert (
        facts["stage_timing"]["pretext"]["verdict"]
        and len(facts["stage_timing"]["pretext"]["seconds_by_rank"]["forward"]) == 1
    )
    page = (folder / "report.html").read_text()
    assert (
        "time per step" in page
        and page.count("<img") + page.count("<svg") > 5
        and "http://" not in page.replace("http://www.w3.org", "")
    )
    table = pq.read_table(folder / "assignments.parquet")
    assert table.num_rows == 400 and {"name", "index", "cluster", "probability", "label"} <= set(
        table.column_names
    )
    assert "report.html" in out and "ACC" in out
    assert (folder / "DONE").exists() and list((folder / "logs").glob("*.metrics.jsonl"))


def everything(folder):
    """The names of all stages of a run, in order."""
    return list(json.loads((folder / "stages.json").read_text()))


def stages(said, word):
    """The stages of which a start says this, in order."""
    return [line.split(":")[0] for line in said.splitlines() if f": {word} (" in line]


def test_a_second_start_skips_everything_quickly(undisturbed) -> None:
    folder, _ = undisturbed
    before = (folder / "report.json").read_bytes()
    began = time.monotonic()
    again = run(folder, new_interpreter=True)
    took = time.monotonic() - began
    assert (
        again.returncode == 0
        and stages(again.stdout, "already done") == everything(folder)
        and stages(again.stdout, "starts") == []
    )
    assert (folder / "report.json").read_bytes() == before
    assert took < 30, f"{took:.0f} s for doing nothing"


def test_a_runtime_edit_skips_all_a_meaning_edit_redoes_that_stage_and_what_follows(
    undisturbed, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(undisturbed[0], folder)
    assert stages(run(folder, "runtime.log_every=3").stdout, "already done") == everything(folder)
    edited, anew = (
        run(folder, "stages.heads.method.entropy_weight=4.0").stdout,
        ["heads", "scan", "consensus", "selflabelling", "selflabel", "evaluate", "report"],
    )
    assert stages(edited, "starts") == anew and stages(edited, "already done") == [
        name for name in everything(folder) if name not in anew
    ]
    assert_a_flipped_bit_is_noticed(folder)


def assert_a_flipped_bit_is_noticed(folder) -> None:
    """In the bank, which the heads read again because their setting changes: 1,600 rows would carry on with it in silence."""
    shard = sorted(folder.glob("stages/bank/*/*-*.npy"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = run(folder, "stages.heads.method.entropy_weight=3.0")
    assert (
        done.returncode == 2
        and f"{shard.name} has changed since it was written" in done.stdout
        and "Traceback" not in done.stdout
    ), done.stdout
    assert run(folder, "stages.heads.method.entropy_weight=4.0").returncode == 0, (
        "nobody reads it, nobody minds"
    )


def test_killed_three_times_the_same_command_ends_with_the_same_report(
    undisturbed, tmp_path: Path
) -> None:
    rng, folder, codes = random.Random(0), tmp_path / "run", []
    for _ in range(3):
        launcher = RunningLauncher(command(folder, "runtime.checkpoint_s=1"), tmp_path)
        wait_for = rng.choice(
            ["pretext: ", "neighbours: ", "heads: ", "selflabelling: "]
        )  # starts, resumes, or was already done
        launcher.wait_for_line(wait_for)
        time.sleep(rng.uniform(0, 1.5))
        codes.append(launcher.kill())
    assert codes.count(-signal.SIGKILL) >= 2, "killed, not ended"
    last = run(folder, "runtime.checkpoint_s=1")
    assert last.returncode == 0, last.stdout
    assert read_report(folder) == read_report(undisturbed[0])


@pytest.mark.parametrize("wish", [signal.SIGTERM, signal.SIGHUP])  # HUP: its terminal was closed
def test_asked_to_stop_it_saves_and_the_same_command_goes_on(
    undisturbed, tmp_path: Path, wish
) -> None:
    folder = tmp_path / "run"
    launcher, metrics = (
        RunningLauncher(command(folder, processes=2), tmp_path),
        folder / "logs" / "pretext.metrics.jsonl",
    )
    launcher.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    launcher.send_signal(wish)
    asked = launcher.wait(60)
    assert (
        asked.returncode == 128 + signal.SIGTERM
        and "everything is saved" in asked.stdout
        and (folder / "STOPPED").exists()
    )
    assert list(folder.glob("stages/pretext/*/work/checkpoints/step-*"))
    again = run(folder, processes=2)
    assert again.returncode == 0 and "pretext: resumes" in again.stdout


WHOLE_PRETEXT = [
    "data.train.limit=",
    "stages.pretext.epochs=2",
    "stages.pretext.steps_per_epoch=10",
    "stages.pretext.network.width=32",
    "stages.pretext.global_batch=128",
]
NOTHING_ELSE = [
    f"stages.{name}="
    for name in load_config(ROOT / "configs" / "quickstart.yaml").stages
    if name != "pretext"
]


@pytest.mark.parametrize(
    ("within", "overrides"),
    [(1e-9, ["stages.pretext.epochs=6", "stages.pretext.precision=fp64"]), (1e-5, WHOLE_PRETEXT)],
)
def test_two_processes_see_the_same_images_and_the_same_losses(
    tmp_path: Path, within, overrides
) -> None:
    """A small pretext in float64, and the first 20 steps of the quickstart's own in float32."""
    from dist_scan.monitoring.log import read_rows

    losses, betons = {}, {}
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        done = run(folder, *overrides, *NOTHING_ELSE, processes=processes)
        assert done.returncode == 0, done.stdout
        betons[processes] = next(folder.glob("stages/beton_train/*/*.beton")).read_bytes()
        losses[processes] = [
            r["loss"] for r in read_rows(folder / "logs" / "pretext.metrics.jsonl") if "loss" in r
        ][:20]
    assert len(losses[1]) == 20 and losses[1][0] != losses[1][19]
    assert max(abs(a - b) for a, b in zip(losses[1], losses[2])) < within
    assert betons[1] == betons[2]


def test_a_folder_in_use_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = RunningLauncher(command(folder), tmp_path)
    try:
        first.wait_until(lambda: "starts" in first.output())
        second = run(folder)
        assert (
            second.returncode == 2
            and f"process {first.pid}" in second.stdout
            and "Traceback" not in second.stdout
        )
    finally:
        first.kill()


METHOD = textwrap.dedent("""
    import torch
    from safetensors.torch import save_file
    from dist_scan.methods.base import Method, MethodConfig, Step
    from typing import Literal
    class Mine(Method):
        class Config(MethodConfig):
            kind: Literal["mine"] = "mine"
        recipes = ("digits", "digits")
        def __init__(self, config, inputs):
            super().__init__(config, inputs)
            self.backbone = inputs.backbone
        def forward(self, batch):
            a, b = (self.backbone(v) for v in batch.views)
            return Step(((a - b) ** 2).mean() + (a.std(0) - 1).abs().mean())
        def publish(self, out):
            save_file({k: v.contiguous() for k, v in self.backbone.state_dict().items()}, out / "mine.safetensors")
""")
MINE = """
name: mine
data: {train: {source: "sklearn:digits", limit: 200}, size: 32, stored: raw, resolution: 32}
stages:
  pretext: {kind: train, images: train, network: {name: resnet_small, width: 8}, method: {kind: mine}, optimizer: {lr: 0.1}, epochs: 3, global_batch: 64}
runtime: {checkpoint_s: 0.001}
"""


def test_a_method_is_one_file_and_resumes(tmp_path: Path) -> None:
    """The abstraction, proved: fifteen lines in a file of their own train two steps, are killed, and go on, bit for bit."""
    from safetensors.torch import load_file

    from tests.support.launches import LOCAL

    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "mine.py").write_text(METHOD)
    (tmp_path / "sitecustomize.py").write_text(
        f"import dist_scan.methods as m; m.__path__.append({str(plugin)!r})"
    )
    (tmp_path / "mine.yaml").write_text(MINE)
    weights = []
    for name, kill in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        line = [*LOCAL, str(tmp_path / "mine.yaml"), f"runtime.run_dir={folder}"]
        env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
        if kill:
            first = subprocess.Popen(
                line,
                env=env,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while not list(folder.glob("stages/pretext/*/work/checkpoints/step-00000000[2-8]")):
                assert first.poll() is None, "ended before it was killed"
                time.sleep(0.01)
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
        done = subprocess.run(
            line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout
        assert not kill or "pretext: resumes" in done.stdout
        weights.append(load_file(next(folder.glob("stages/pretext/*/mine.safetensors"))))
    assert all((weights[0][k] == weights[1][k]).all() for k in weights[0])
