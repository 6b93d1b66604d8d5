"""Prediction from start to end: check, store the images, load the model, write the table."""

from __future__ import annotations

import shutil
from typing import NamedTuple

from dist_scan.finished_run import open_finished_run
from dist_scan.prediction.images import store_images
from dist_scan.prediction.load import choose_features, load_predictor
from dist_scan.prediction.options import PredictOptions
from dist_scan.prediction.table import NoveltyColumns, write_table
from dist_scan.world.world import device_for


class Prediction(NamedTuple):
    """Numbers of rows written and of unreadable images, and the stage whose model was used."""

    num_images: int
    num_bad: int
    stage: str


def predict(options: PredictOptions) -> Prediction:
    """Predict clusters, and the novelty of each image, with a finished run.

    An interrupted call leaves the encoded images in `options.work_dir`; the same call uses them.
    Raises ConfigError before any work if the options cannot be fulfilled.
    """
    options.prepare_output()
    device_for(options.device)  # raises before images are encoded
    run = open_finished_run(options.run)
    choice = run.choose_model(options.stage)
    features = choose_features(run, options.features)
    images = store_images(options, run.config.data)
    predictor = load_predictor(run, choice, features, images, options)
    novelty = None if features is None else NoveltyColumns(run, features)
    fingerprint = run.artifacts[choice.stage].manifest["fingerprint"]
    source = (
        f"run {run.config.name}, stage {choice.stage} ({fingerprint}), "
        f"novelty against {features or 'nothing'}"
    )
    write_table(options.out, predictor, images, novelty, source)
    shutil.rmtree(options.work_dir, ignore_errors=True)
    return Prediction(len(images.index), images.num_bad, choice.stage)
