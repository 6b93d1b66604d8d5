"""Loads the predictor: a cluster model of the run, and the network of its feature table."""

from __future__ import annotations

import torch

from dist_scan.config import ConfigError
from dist_scan.data.images import open_images
from dist_scan.engine.batch_size import bytes_per_image, fitting_batch
from dist_scan.engine.embed import require_finite_weights
from dist_scan.engine.precision import move_to_device, set_determinism
from dist_scan.engine.predictor import Embedder, Predictor
from dist_scan.finished_run import FinishedRun, ModelChoice
from dist_scan.models.backbone import load_embedder
from dist_scan.models.cluster_model import load_cluster_model
from dist_scan.monitoring.memory import free_memory
from dist_scan.prediction.images import StoredImages
from dist_scan.prediction.options import PredictOptions
from dist_scan.world.world import open_world

GPU_BATCH = 2048
"""Images per batch on a GPU, if they fit."""


def choose_features(run: FinishedRun, wanted: str | None) -> str | None:
    """The embed stage whose features novelty is measured against; None for no novelty.

    It must have features of centre crops of the training images. Raises ConfigError if the wanted
    one does not.
    """
    suitable = [name for name in run.stages_of_kind("embed") if _is_suitable(run, name)]
    if wanted == "none":
        return None
    if wanted is not None and wanted not in suitable:
        raise ConfigError(
            f"--features: '{wanted}' has no centre crops of the training images through a "
            f"backbone; allowed: {', '.join([*suitable, 'none'])}"
        )
    searched = [run.settings(name)["features"] for name in run.stages_of_kind("neighbours")]
    preferred = [name for name in searched if name in suitable] + suitable
    return wanted or next(iter(preferred), None)


def _is_suitable(run: FinishedRun, stage: str) -> bool:
    settings = run.settings(stage)
    is_center = settings["recipe"]["name"] == "center"
    return settings["images"] == "train" and settings["backbone"] is not None and is_center


def load_predictor(
    run: FinishedRun,
    choice: ModelChoice,
    features: str | None,
    images: StoredImages,
    options: PredictOptions,
) -> Predictor:
    """A Predictor for these images with the recipe and precision of the run.

    features: the embed stage whose network also embeds each image, for novelty.
    """
    set_determinism()
    world = open_world(options.device)
    settings = run.settings(choice.assign) if choice.assign else {}
    model = load_cluster_model(run.artifacts[choice.stage].path)
    require_finite_weights(model)
    move_to_device(model, world.device).eval()
    embedder = None if features is None else _load_embedder(run, features, world.device)
    runtime = run.config.runtime.model_copy(update={"loader_threads": options.workers})
    config = run.config.model_copy(update={"runtime": runtime})
    recipe = run.recipe(choice.assign)
    loader, recipes = open_images(images.beton, (recipe,), 1, config, world)
    precision = settings.get("precision", "fp32")
    predictor = Predictor(model, loader, recipes[0], world.device, precision, embedder)
    # On a CPU the run's own batch size: the same results to the bit.
    wanted = GPU_BATCH if world.device.type == "cuda" else settings.get("batch", 256)
    loader.batch_size = options.batch or _fitting_batch(
        predictor, run.config.data.size, wanted, len(images.index)
    )
    return predictor


def _load_embedder(run: FinishedRun, features: str, device: torch.device) -> Embedder:
    """The network that computed a run's feature table."""
    settings = run.settings(features)
    backbone = run.artifacts[run.inputs(features)["backbone"]].path
    network = load_embedder(backbone, settings["projection"])
    return Embedder(move_to_device(network, device).eval(), settings["precision"])


def _fitting_batch(predictor: Predictor, size: int, wanted: int, num_images: int) -> int:
    """The largest batch up to `wanted` for which memory suffices; prints if it is smaller."""
    sample = torch.zeros(1, 3, size, size, device=predictor.device)
    per_image = bytes_per_image(predictor.model, sample)
    if predictor.embedder is not None:
        per_image += bytes_per_image(predictor.embedder.network, sample)
    useful = min(wanted, num_images)
    batch = fitting_batch(useful, per_image, free_memory(predictor.device))
    if batch < useful:
        print(
            f"memory: batches of {batch} images instead of {wanted} "
            f"({per_image / 2**20:.1f} MiB per image)"
        )
    return batch
