"""Prediction with a finished run: equal to evaluation in the run, for every kind of source."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dist_scan.__main__ import main
from tests.support.launches import LOCAL, ROOT, environment
from tests.support.pipelines import run_pipeline

CONFIG = """
name: tiny
data:
  train: {source: "sklearn:digits", limit: 240}
  size: 32
  stored: raw
  resolution: 32
  max_bad_share: 0.5
  mean: [0.3, 0.3, 0.3]
  std: [0.35, 0.35, 0.35]
stages:
  pretext:
    kind: train
    images: train
    network: {name: resnet_small, width: 8}
    method: {kind: simclr, temperature: 0.5, projection_dim: 16}
    recipes: [digits, digits]
    optimizer: {kind: adam, lr: 5e-3}
    epochs: 1
    global_batch: 48
  features: {kind: embed, backbone: pretext, num_shards: 3}
  neighbours: {kind: neighbours, features: features, num_neighbours: 5}
  heads:
    kind: train
    features: features
    backbone: pretext
    neighbours: neighbours
    method: {kind: scan, num_clusters: 10, num_heads: 2}
    optimizer: {kind: sgd, lr: 0.05}
    epochs: 2
    global_batch: 48
    held_out_share: 0.1
  scan: {kind: assign, model: heads, images: train}
  selflabelling:
    kind: train
    images: train
    model: heads
    method: {kind: selflabel, threshold: 0.2, ema: 0.9}
    recipes: [center, digits_strong]
    optimizer: {kind: adam, lr: 1e-3}
    epochs: 1
    global_batch: 48
  selflabel: {kind: assign, model: selflabelling, images: train, batch: 64}
  doomed:
    kind: train
    images: train
    model: heads
    method: {kind: selflabel, threshold: 0.99999, plateau_epochs: 1}
    recipes: [center, digits_strong]
    optimizer: {kind: adam, lr: 1e-3}
    epochs: 5
    global_batch: 96
  evaluate: {kind: evaluate, images: train, subjects: {scan: scan, selflabel: selflabel}}
  report: {kind: report, images: train, evaluate: evaluate, best: selflabel}
"""
NUM_TRAIN, NUM_DIGITS, NUM_NEW = 240, 1797, 150
BROKEN = {7: b"", 90: b"\x89PNG\r\n\x1a\n and no more"}


def digit_image(index: int) -> np.ndarray:
    """A digit of scikit-learn [8, 8] with values up to 255."""
    return np.round(load_digits().images[index] * (255 / 16)).astype(np.uint8)


def new_digits() -> list[bytes]:
    """Files of digits that the run has not seen, two of them broken."""
    seen = set(np.arange(NUM_TRAIN) * NUM_DIGITS // NUM_TRAIN)
    unseen = [index for index in range(NUM_DIGITS) if index not in seen]
    files = []
    for index in unseen[:NUM_NEW]:
        buffer = io.BytesIO()
        Image.fromarray(digit_image(index)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return [BROKEN.get(i, data) for i, data in enumerate(files)]


def write_images(folder: Path) -> Path:
    """The new digits as image files."""
    folder.mkdir(exist_ok=True)
    for i, data in enumerate(new_digits()):
        (folder / f"{i:04d}.png").write_bytes(data)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One thread, as in the run's processes: sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its config lies beside it."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    config = folder.parent / "tiny.yaml"
    config.write_text(CONFIG)
    done = subprocess.run(
        [*LOCAL, str(config), f"runtime.run_dir={folder}"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that the run has not seen."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def prediction(tiny_run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT.parquet for these images."""
    out = tmp_path_factory.mktemp("out") / "new.parquet"
    assert predict(tiny_run, images, out) == 0
    assert [path.name for path in sorted(out.parent.iterdir())] == ["new.bad.csv", "new.parquet"]
    return out


def predict(run: Path, source: Path | str, out: Path, *arguments: str) -> int:
    """`python -m dist_scan predict` on the CPU; returns the exit code."""
    return main(["predict", str(run), str(source), "-o", str(out), "--device", "cpu", *arguments])


def test_prediction_equals_evaluation_in_the_run_bit_for_bit(
    tiny_run: Path, images: Path, prediction: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    folders, lines = run_pipeline(
        tiny_run.parent / "tiny.yaml",
        folder,
        f"data.val.source={images}",
        "stages.unseen={kind: assign, model: selflabelling, images: val, batch: 64}",
    )
    started = [line.partition(":")[0] for line in lines if ": starts (" in line]
    assert started == ["beton_val", "unseen"]
    table = pq.read_table(prediction)
    with np.load(folders["unseen"] / "assignments.npz") as assignments:
        assert len(np.unique(assignments["cluster"])) > 1
        assert np.array_equal(table["cluster"].to_numpy(), assignments["cluster"])
        probability = table["probability"].to_numpy()
        assert probability.tobytes() == assignments["probability"].tobytes()
        assert np.array_equal(np.stack(table["top_clusters"].to_numpy()), assignments["top"])


def test_a_collapse_is_warned_of_and_a_plateau_ends_the_training(tiny_run: Path) -> None:
    doomed = next(tiny_run.glob("stages/doomed/*"))
    warnings = json.loads((doomed / "warnings.json").read_text())
    assert len(warnings) == 1
    assert "0% of the clusters have confident images" in warnings[0]
    confident = json.loads((doomed / "confident.json").read_text())
    assert confident["per_cluster"] == [0] * 10
    assert confident["epoch"] == 1
    assert confident["images"] == 192
    assert "has stayed at 0.0%" in confident["ended"]
    log = (tiny_run / "logs" / "run.log").read_text()
    assert "warning: doomed: self-labelling, epoch 1" in log
    assert "doomed: ended after epoch 1 of 5" in log
    page = (tiny_run / "report.html").read_text()
    assert "doomed: self-labelling, epoch 1: 0% of the clusters" in page
    assert "confident in selflabelling" in page


def test_unreadable_images_are_listed_and_the_others_have_rows(prediction: Path) -> None:
    table = pq.read_table(prediction).to_pydict()
    assert table["index"] == [i for i in range(NUM_NEW) if i not in BROKEN]
    assert table["name"] == [f"{i:04d}.png" for i in table["index"]]
    with open(prediction.with_suffix(".bad.csv"), newline="") as file:
        bad = list(csv.DictReader(file))
    assert [(int(row["row"]), row["name"]) for row in bad] == [(7, "0007.png"), (90, "0090.png")]
    assert "empty or not readable" in bad[0]["reason"]
    assert bad[1]["reason"]


def test_rows_have_clusters_in_order_of_probability_and_novelty(prediction: Path) -> None:
    table = pq.read_table(prediction)
    top = np.stack(table["top_clusters"].to_numpy())
    probability = np.stack(table["top_probabilities"].to_numpy())
    assert top.shape == probability.shape == (NUM_NEW - 2, 5)
    assert (np.diff(probability) <= 0).all()
    assert np.array_equal(top[:, 0], table["cluster"].to_numpy())
    assert np.array_equal(probability[:, 0], table["probability"].to_numpy())
    novelty, share = table["novelty"].to_numpy(), table["novelty_share"].to_numpy()
    assert (novelty >= 0).all()
    assert ((share >= 0) & (share <= 1)).all()
    assert set(table["nearest"].to_numpy()) <= set(range(NUM_TRAIN))


def write_parquet(path: Path) -> None:
    """The new digits as a parquet file."""
    column = [{"bytes": data, "path": f"{i:04d}.png"} for i, data in enumerate(new_digits())]
    pq.write_table(pa.table({"image": column}), path)


def write_tar(path: Path) -> None:
    """The new digits as a tar shard."""
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(new_digits()):
            member = tarfile.TarInfo(f"{i:04d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_beton(path: Path) -> None:
    """The new digits as a .beton, stored as the run's images."""
    files = write_images(path.parent / "files")
    storage = ["--stored", "raw", "--resolution", "32", "--max-bad-share", "1"]
    assert main(["beton", str(files), str(path), *storage]) == 0


@pytest.mark.parametrize("write", [write_parquet, write_tar, write_beton])
def test_other_sources_of_the_same_images_give_the_same_prediction(
    write: Callable[[Path], None], tiny_run: Path, prediction: Path, tmp_path: Path
) -> None:
    source = tmp_path / f"new.{write.__name__.removeprefix('write_')}"
    write(source)
    out = tmp_path / "out" / "new.parquet"
    assert predict(tiny_run, source, out) == 0
    assert pq.read_table(out).equals(pq.read_table(prediction))
    bad, expected_bad = out.with_suffix(".bad.csv"), prediction.with_suffix(".bad.csv")
    assert bad.read_bytes() == expected_bad.read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_an_interrupted_prediction_leaves_no_output_and_the_same_command_resumes_it(
    number: signal.Signals,
    code: int,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, work = tmp_path / "new.parquet", tmp_path / "new.parquet.work"
    line = ["predict", str(tiny_run), "sklearn:digits", "-o", str(out), "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-m", "dist_scan", *line, "--batch", "1"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert any(text.startswith("predict: ") for text in process.stdout), "never began"
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == code
    assert ("the same command resumes it" in rest) == (number == signal.SIGTERM)
    assert not out.exists()
    assert not out.with_suffix(".bad.csv").exists()
    assert (work / "images.beton").is_file()

    assert predict(tiny_run, "sklearn:digits", out) == 0
    assert "images.beton: " not in capsys.readouterr().err, "the images were encoded again"
    whole = tmp_path / "whole.parquet"
    assert predict(tiny_run, "sklearn:digits", whole) == 0
    assert "images.beton: " in capsys.readouterr().err
    assert not work.exists()
    assert pq.read_table(out).equals(pq.read_table(whole))


def test_a_training_image_is_not_novel_and_noise_is(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    Image.fromarray(digit_image(0)).save(folder / "a.png")  # row 0 of the run
    Image.fromarray(noise).save(folder / "b.png")
    out = tmp_path / "out.parquet"
    assert predict(tiny_run, folder, out, "--stage", "scan") == 0
    assert "by stage heads" in capsys.readouterr().out
    table = pq.read_table(out).to_pydict()
    assert table["nearest"][0] == 0
    assert table["novelty"][0] < 1e-3 < table["novelty"][1]
    assert table["novelty_share"][1] > 0.9


ERRORS = {
    "no run": ("{tmp}/none", "{images}", "o.parquet", [], "is not a run folder"),
    "not finished": ("{tmp}/half", "{images}", "o.parquet", [], "is not finished"),
    "no images": (
        "{run}",
        "{tmp}/nowhere",
        "o.parquet",
        [],
        "nowhere' does not exist; give an image folder",
    ),
    "empty folder": ("{run}", "{tmp}/empty", "o.parquet", [], "has no images"),
    "all broken": ("{run}", "{tmp}/broken", "o.parquet", [], "none of the 1 images of"),
    "out exists": (
        "{run}",
        "{images}",
        "there.parquet",
        [],
        "there.parquet exists; give another name, or --overwrite",
    ),
    "out is the source": (
        "{run}",
        "{tmp}/there.parquet",
        "there.parquet",
        ["--overwrite"],
        "would be read as images",
    ),
    "out in the source": ("{run}", "{tmp}", "o.parquet", [], "would be read as images"),
    "out matches the source": (
        "{run}",
        "{tmp}/*.parquet",
        "o.parquet",
        [],
        "would be read as images",
    ),
    "out is a folder": (
        "{run}",
        "{images}",
        "folder.parquet",
        ["--overwrite"],
        "is a folder; give another name",
    ),
    "no GPU": ("{run}", "{images}", "o.parquet", ["--device", "cuda"], "this machine has no GPU"),
    "suffix": ("{run}", "{images}", "o.csv", [], "must end in .parquet"),
    "stage": (
        "{run}",
        "{images}",
        "o.parquet",
        ["--stage", "pretext"],
        "allowed: --stage heads, selflabelling, doomed",
    ),
    "features": (
        "{run}",
        "{images}",
        "o.parquet",
        ["--features", "pretext"],
        "allowed: features, none",
    ),
    "batch": ("{run}", "{images}", "o.parquet", ["--batch", "0"], "--batch: 0; allowed: 1 or more"),
    "beton": (
        "{run}",
        "{tmp}/other.beton",
        "o.parquet",
        [],
        "has other storage settings than the run's images (resolution 24 instead of 32",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_before_images_are_encoded(
    name: str,
    tiny_run: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for folder in ("empty", "broken", "half", "folder.parquet"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"x")
    (tmp_path / "there.parquet").write_bytes(b"unchanged")
    (tmp_path / "half" / "config.yaml").write_text(CONFIG)
    if name == "beton":
        storage = ["--limit", "5", "--stored", "raw", "--resolution", "24"]
        assert main(["beton", "sklearn:digits", str(tmp_path / "other.beton"), *storage]) == 0
        capsys.readouterr()
    run, source, out, arguments, message = ERRORS[name]
    places = {"run": tiny_run, "images": images, "tmp": tmp_path}
    code = predict(Path(run.format(**places)), source.format(**places), tmp_path / out, *arguments)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error and "Traceback" not in error
    assert name == "all broken" or not list(tmp_path.glob("*.work"))
    assert not (tmp_path / "o.parquet").exists()
    assert (tmp_path / "there.parquet").read_bytes() == b"unchanged"


def test_a_moved_run_without_betons_still_predicts(
    tiny_run: Path, prediction: Path, images: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "elsewhere", tmp_path / "out.parquet"
    shutil.copytree(tiny_run, folder)
    shutil.rmtree(folder / "stages" / "beton_train")
    assert predict(folder, images, out) == 0
    assert pq.read_table(out).equals(pq.read_table(prediction))


def test_a_cluster_model_describes_the_images_that_it_takes(tiny_run: Path) -> None:
    file = next(tiny_run.glob("stages/selflabelling/*/cluster.json"))
    description = json.loads(file.read_text())
    assert description["input"]["size"] == 32
    assert description["input"]["mean"] == [0.3, 0.3, 0.3]
    assert description["input"]["resize_shorter_side"] == 32
    assert description["provenance"]["stage"] == "selflabelling"
    assert description["provenance"]["run"] == "tiny"
