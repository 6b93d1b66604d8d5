"""Clusters and novelty of new images, by a model of a finished run."""

from dist_scan.prediction.options import PredictOptions
from dist_scan.prediction.predict import Prediction, predict

__all__ = ["PredictOptions", "Prediction", "predict"]
