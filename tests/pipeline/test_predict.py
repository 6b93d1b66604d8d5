"""Prediction with a finished run: the same bits as evaluating the images in the run; every source; broken files; mistakes told."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dist_scan.__main__ import main
from tests.support.launches import LOCAL, ROOT, environment

CONFIG = """
name: tiny
data: {train: {source: "sklearn:digits", limit: 240}, size: 32, stored: raw, resolution: 32, max_bad_share: 0.5, mean: [0.3, 0.3, 0.3], std: [0.35, 0.35, 0.35]}
stages:
  pretext: {kind: train, images: train, network: {name: resnet_small, width: 8}, method: {kind: simclr, temperature: 0.5, projection_dim: 16},
            recipes: [digits, digits], optimizer: {kind: adam, lr: 5e-3}, epochs: 1, global_batch: 48}
  features: {kind: embed, backbone: pretext, num_shards: 3}
  neighbours: {kind: neighbours, features: features, num_neighbours: 5}
  heads: {kind: train, features: features, backbone: pretext, neighbours: neighbours, method: {kind: scan, num_clusters: 10, num_heads: 2},
          optimizer: {kind: sgd, lr: 0.05}, epochs: 2, global_batch: 48, held_out_share: 0.1}
  scan: {kind: assign, model: heads, images: train}
  selflabelling: {kind: train, images: train, model: heads, method: {kind: selflabel, threshold: 0.2, ema: 0.9}, recipes: [center, digits_strong],
                  optimizer: {kind: adam, lr: 1e-3}, epochs: 1, global_batch: 48}
  selflabel: {kind: assign, model: selflabelling, images: train, batch: 64}
  doomed: {kind: train, images: train, model: heads, method: {kind: selflabel, threshold: 0.99999, plateau_epochs: 1}, recipes: [center, digits_strong],
           optimizer: {kind: adam, lr: 1e-3}, epochs: 5, global_batch: 96}
  evaluate: {kind: evaluate, images: train, subjects: {scan: scan, selflabel: selflabel}}
  report: {kind: report, images: train, evaluate: evaluate, best: selflabel}
"""
NEW, BROKEN = 150, {7: b"", 90: b"\x89PNG\r\n\x1a\n and no more"}


def launch(folder, *overrides):
    line = [*LOCAL, str(folder.parent / "tiny.yaml"), f"runtime.run_dir={folder}", *overrides]
    return subprocess.run(
        line,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )


def digits() -> list[bytes]:
    """Files of digits that the run's 240 of 1,797 leave out, two of them broken."""
    from sklearn.datasets import load_digits

    images, seen = (
        np.round(load_digits().images * (255 / 16)).astype(np.uint8),
        set(np.arange(240) * 1797 // 240),
    )
    files = []
    for image in images[[i for i in range(1797) if i not in seen][:NEW]]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return [BROKEN.get(i, data) for i, data in enumerate(files)]


@contextlib.contextmanager
def one_thread():
    """As the run's processes have: sums keep their order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    (folder.parent / "tiny.yaml").write_text(CONFIG)
    done = launch(folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory):
    """A folder of images the run never saw."""
    folder = tmp_path_factory.mktemp("images")
    for i, data in enumerate(digits()):
        (folder / f"{i:04d}.png").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def predicted(tiny, images, tmp_path_factory: pytest.TempPathFactory):
    """OUT.parquet of these images."""
    out = tmp_path_factory.mktemp("out") / "new.parquet"
    with one_thread():
        assert main(["predict", str(tiny), str(images), "-o", str(out), "--device", "cpu"]) == 0
    assert [p.name for p in sorted(out.parent.iterdir())] == ["new.bad.csv", "new.parquet"]
    return out


def test_predicting_equals_evaluating_in_the_run_bit_for_bit(
    tiny, images, predicted, tmp_path: Path
) -> None:
    from dist_scan.engine.stop import StopFlag
    from dist_scan.pipeline import Pipeline
    from dist_scan.run_config import load_config
    from dist_scan.world.world import World

    folder, said = tmp_path / "run", []
    shutil.copytree(tiny, folder)
    with one_thread():
        Pipeline(
            load_config(
                tiny.parent / "tiny.yaml",
                [
                    f"runtime.run_dir={folder}",
                    f"data.val.source={images}",
                    "stages.unseen={kind: assign, model: selflabelling, images: val, batch: 64}",
                ],
            ),
            World(),
            StopFlag(),
            said.append,
        ).run()
    assert [line.split(":")[0] for line in said if ": starts (" in line] == ["beton_val", "unseen"]
    with np.load(next(folder.glob("stages/unseen/*/assignments.npz"))) as inside:
        table = pq.read_table(predicted)
        assert len(np.unique(inside["cluster"])) > 1
        assert np.array_equal(table["cluster"].to_numpy(), inside["cluster"])
        assert table["probability"].to_numpy().tobytes() == inside["probability"].tobytes()
        assert np.array_equal(np.stack(table["top_clusters"].to_numpy()), inside["top"])


def test_a_collapse_is_said_written_and_shown_and_a_plateau_ends_it(tiny) -> None:
    doomed = next(tiny.glob("stages/doomed/*"))
    warnings, facts = (
        json.loads((doomed / "warnings.json").read_text()),
        json.loads((doomed / "confident.json").read_text()),
    )
    assert len(warnings) == 1 and "0% of the clusters have confident images" in warnings[0]
    assert (
        facts["per_cluster"] == [0] * 10
        and facts["epoch"] == 1
        and "has stayed at 0.0%" in facts["ended"]
        and facts["images"] == 192
    )
    log, page = (tiny / "logs" / "run.log").read_text(), (tiny / "report.html").read_text()
    assert (
        "warning: doomed: self-labelling, epoch 1" in log
        and "doomed: ended after epoch 1 of 5" in log
    )
    assert (
        "doomed: self-labelling, epoch 1: 0% of the clusters" in page
        and "confident in selflabelling" in page
    )


def test_broken_files_are_listed_and_the_rest_has_rows(predicted) -> None:
    table = pq.read_table(predicted).to_pydict()
    assert table["index"] == [i for i in range(NEW) if i not in BROKEN] and table["name"] == [
        f"{i:04d}.png" for i in table["index"]
    ]
    with open(predicted.with_suffix(".bad.csv"), newline="") as f:
        bad = list(csv.DictReader(f))
    assert [(int(row["row"]), row["name"]) for row in bad] == [(7, "0007.png"), (90, "0090.png")]
    assert "zero bytes" in bad[0]["reason"] and bad[1]["reason"]


def test_every_row_is_whole(predicted) -> None:
    table = pq.read_table(predicted)
    top, probability = (
        np.stack(table["top_clusters"].to_numpy()),
        np.stack(table["top_probabilities"].to_numpy()),
    )
    assert top.shape == probability.shape == (NEW - 2, 5) and (np.diff(probability) <= 0).all()
    assert np.array_equal(top[:, 0], table["cluster"].to_numpy()) and np.array_equal(
        probability[:, 0], table["probability"].to_numpy()
    )
    novelty, share = table["novelty"].to_numpy(), table["novelty_share"].to_numpy()
    assert (
        (novelty >= 0).all()
        and ((share >= 0) & (share <= 1)).all()
        and set(table["nearest"].to_numpy()) <= set(range(240))
    )


@pytest.mark.parametrize("kind", ["parquet", "tar", "beton"])
def test_other_sources_give_the_same(
    kind, tiny, predicted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, files = tmp_path / f"new.{kind}", digits()
    if kind == "parquet":
        column = [{"bytes": data, "path": f"{i:04d}.png"} for i, data in enumerate(files)]
        pq.write_table(pa.table({"image": column}), source)
    elif kind == "tar":
        with tarfile.open(source, "w") as tar:
            for i, data in enumerate(files):
                member = tarfile.TarInfo(f"{i:04d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        (tmp_path / "files").mkdir()
        for i, data in enumerate(files):
            (tmp_path / "files" / f"{i:04d}.png").write_bytes(data)
        assert (
            main(
                [
                    "beton",
                    str(tmp_path / "files"),
                    str(source),
                    "--stored",
                    "raw",
                    "--resolution",
                    "32",
                    "--max-bad-share",
                    "1",
                ]
            )
            == 0
        )
    out = tmp_path / "out" / "new.parquet"
    with one_thread():
        assert main(["predict", str(tiny), str(source), "-o", str(out), "--device", "cpu"]) == 0
    assert pq.read_table(out).equals(pq.read_table(predicted))
    assert (
        out.with_suffix(".bad.csv").read_bytes() == predicted.with_suffix(".bad.csv").read_bytes()
    )


@pytest.mark.parametrize("wish, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_killed_or_stopped_it_leaves_no_half_answer_and_the_same_command_goes_on(
    wish, code, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "new.parquet", tmp_path / "new.parquet.work"
    line = ["predict", str(tiny), "sklearn:digits", "-o", str(out), "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-m", "dist_scan", *line, "--batch", "1"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert any(text.startswith("predict: ") for text in process.stdout), "it began to predict"
        process.send_signal(wish)
        rest = process.stdout.read()
    assert process.returncode == code and ("the same command resumes it" in rest) == (code == 130)
    assert not out.exists() and not out.with_suffix(".bad.csv").exists()
    assert (work / "images.beton").is_file()
    encoded = []
    for name in ("new", "whole"):
        with one_thread():
            assert main([*line[:4], str(tmp_path / f"{name}.parquet"), *line[5:]]) == 0
        encoded.append("images.beton: " in capsys.readouterr().err)
    assert encoded == [False, True] and not work.exists()
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "whole.parquet"))


def test_a_training_image_is_no_news_and_noise_is(
    tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.datasets import load_digits

    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.round(load_digits().images[0] * (255 / 16)).astype(np.uint8)).save(
        folder / "a.png"
    )  # row 0 of the run
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)).save(
        folder / "b.png"
    )
    assert (
        main(
            [
                "predict",
                str(tiny),
                str(folder),
                "-o",
                str(tmp_path / "o.parquet"),
                "--stage",
                "scan",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    table = pq.read_table(tmp_path / "o.parquet").to_pydict()
    assert (
        table["nearest"][0] == 0
        and table["novelty"][0] < 1e-3 < table["novelty"][1]
        and table["novelty_share"][1] > 0.9
    )
    assert "by stage heads" in capsys.readouterr().out


MISTAKES = {
    "no run": (["{tmp}/none", "{images}", "-o", "{tmp}/o.parquet"], "is not a run folder"),
    "not finished": (["{half}", "{images}", "-o", "{tmp}/o.parquet"], "is not finished"),
    "no images": (
        ["{run}", "{tmp}/nowhere", "-o", "{tmp}/o.parquet"],
        "nowhere' does not exist; give an image folder",
    ),
    "empty folder": (["{run}", "{tmp}/empty", "-o", "{tmp}/o.parquet"], "has no images"),
    "all broken": (
        ["{run}", "{tmp}/broken", "-o", "{tmp}/o.parquet"],
        "none of the 1 images of",
    ),
    "out exists": (
        ["{run}", "{images}", "-o", "{tmp}/there.parquet"],
        "there.parquet exists; give another name, or --overwrite",
    ),
    "out is the source": (
        ["{run}", "{tmp}/there.parquet", "-o", "{tmp}/there.parquet", "--overwrite"],
        "would be read as images",
    ),
    "out in the source": (["{run}", "{tmp}", "-o", "{tmp}/o.parquet"], "would be read as images"),
    "out met by the source": (
        ["{run}", "{tmp}/*.parquet", "-o", "{tmp}/o.parquet"],
        "would be read as images",
    ),
    "out is a folder": (
        ["{run}", "{images}", "-o", "{tmp}/folder.parquet", "--overwrite"],
        "is a folder; give another name",
    ),
    "no GPU": (
        ["{run}", "{images}", "-o", "{tmp}/o.parquet", "--device", "cuda"],
        "this machine has no GPU",
    ),
    "suffix": (["{run}", "{images}", "-o", "{tmp}/o.csv"], "must end in .parquet"),
    "stage": (
        ["{run}", "{images}", "-o", "{tmp}/o.parquet", "--stage", "pretext"],
        "allowed: --stage heads, selflabelling, doomed",
    ),
    "features": (
        ["{run}", "{images}", "-o", "{tmp}/o.parquet", "--features", "pretext"],
        "allowed: features, none",
    ),
    "batch": (
        ["{run}", "{images}", "-o", "{tmp}/o.parquet", "--batch", "0"],
        "--batch: 0; allowed: 1 or more",
    ),
    "beton": (
        ["{run}", "{tmp}/other.beton", "-o", "{tmp}/o.parquet"],
        "is stored otherwise than the run's images (resolution 24 instead of 32",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    name,
    tiny,
    images,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"x")
    (tmp_path / "there.parquet").write_bytes(b"mine")
    (tmp_path / "half").mkdir()
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "half" / "config.yaml").write_text(CONFIG)
    if name == "beton":
        assert (
            main(
                [
                    "beton",
                    "sklearn:digits",
                    str(tmp_path / "other.beton"),
                    "--limit",
                    "5",
                    "--stored",
                    "raw",
                    "--resolution",
                    "24",
                ]
            )
            == 0
        )
    words, expected = MISTAKES[name]
    capsys.readouterr()
    assert (
        main(
            [
                "predict",
                *(
                    w.format(run=tiny, images=images, tmp=tmp_path, half=tmp_path / "half")
                    for w in words
                ),
            ]
        )
        == 2
    )
    text = capsys.readouterr().err
    assert expected in text and "Traceback" not in text
    assert name == "all broken" or not list(tmp_path.glob("*.work")), (
        "said before anything is encoded"
    )
    assert (
        not (tmp_path / "o.parquet").exists()
        and (tmp_path / "there.parquet").read_bytes() == b"mine"
    )


def test_a_moved_run_and_one_from_before_stages_json_still_predict(
    tiny, predicted, images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(tiny, folder)
    (folder / "stages.json").unlink()
    shutil.rmtree(folder / "stages" / "beton_train")  # not needed any more
    with one_thread():
        assert (
            main(
                [
                    "predict",
                    str(folder),
                    str(images),
                    "-o",
                    str(tmp_path / "o.parquet"),
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
    assert pq.read_table(tmp_path / "o.parquet").equals(pq.read_table(predicted))


def test_the_stage_says_how_its_model_wants_images(tiny) -> None:
    facts = json.loads(next(tiny.glob("stages/selflabelling/*/cluster.json")).read_text())
    assert (
        facts["input"]["size"] == 32
        and facts["input"]["mean"] == [0.3, 0.3, 0.3]
        and facts["input"]["resize_shorter_side"] == 32
    )
    assert facts["provenance"]["stage"] == "selflabelling" and facts["provenance"]["run"] == "tiny"
