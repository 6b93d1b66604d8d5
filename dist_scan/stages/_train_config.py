"""Settings of the train stage, and the checks between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_scan import methods
from dist_scan.config import DataConfig
from dist_scan.config.kinds import AnyKind
from dist_scan.config.stage import Images, Ref, Stages
from dist_scan.data.augment.recipes import RecipeConfig, resolution_warnings
from dist_scan.methods.base import Method, MethodConfig, method_class
from dist_scan.models.backbone import BackboneConfig
from dist_scan.stages._training import TrainingStageConfig
from dist_scan.stages.neighbours import NeighboursConfig


class TrainConfig(TrainingStageConfig):
    """Settings of the training of one method."""

    kind: Literal["train"] = "train"
    method: Annotated[MethodConfig, AnyKind(methods)]
    images: Images | None = None
    """Train on the images of this split."""
    features: Ref | None = None
    """Train on the cached features of this embed stage."""
    network: BackboneConfig | None = None
    """A backbone built here: random weights (for a pretext task), or those of its `checkpoint`."""
    backbone: Ref | None = None
    """The backbone that a stage published; with features, the one that computed them."""
    model: Ref | None = None
    """The cluster model that a stage published (self-labelling starts with it)."""
    neighbours: Ref | None = None
    """The nearest neighbours of this neighbours stage."""
    num_neighbours: int | None = Field(default=None, ge=0)
    """Number K of neighbours to draw from (default: all in the table).

    0 pairs each image with another view of itself, as K = 0 in the paper.
    """
    self_as_candidate: bool = False
    """Draw the image itself with probability 1 / (K + 1), as SCAN's released code does."""
    recipes: tuple[RecipeConfig, ...] = ()
    """One augmentation recipe per view (default: the method's)."""
    held_out_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images that are not trained on but used for the selection of heads.

    Has no effect with held_out_neighbours, which names the images to select on.
    """
    held_out_features: Ref | None = None
    """Select heads on the features of this stage.

    It embeds the held-out images or, with held_out_neighbours, the images of that table.
    """
    held_out_neighbours: Ref | None = None
    """Neighbours among the images on which heads are selected."""
    held_out_images: Images | None = None
    """Select heads on centre crops of this split, with held_out_neighbours computed in it."""

    def publishes(self) -> tuple[str, ...]:
        """What the method publishes."""
        return self.method_class.publishes

    @property
    def method_class(self) -> type[Method]:
        """The class of the method."""
        return method_class(self.method.kind)

    def view_recipes(self) -> tuple[RecipeConfig, ...]:
        """One recipe per view of an image; none when training on features."""
        if self.images is None:
            return ()
        names = self.method_class.recipes_for(self.method)
        return self.recipes or tuple(RecipeConfig(name=name) for name in names)

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless the method gets each of its inputs exactly once."""
        stage = f"stages.{name}"
        self._check_sources(stage)
        self._check_needs(stage)
        self._check_recipes(stage)
        # Errors that do not depend on the number of ranks.
        self.check_ranks(name, 1)
        self._check_num_neighbours(stage, earlier)

    def _check_sources(self, stage: str) -> None:
        if (self.images is None) == (self.features is None):
            raise ValueError(
                f"{stage}: give exactly one of images (train or val) and features (a stage's name)"
            )
        networks = [self.network, self.backbone, self.model]
        if networks.count(None) != 2:
            raise ValueError(
                f"{stage}: give exactly one of network (built here), backbone and model "
                "(a stage's name)"
            )
        if self.features is not None and self.recipes:
            raise ValueError(
                f"{stage}.recipes: cached features are not augmented; set the recipe in the embed "
                f"stage '{self.features}', or give images"
            )
        if self.images is not None and self.held_out_features is not None:
            raise ValueError(
                f"{stage}.held_out_features: a method that trains on images selects heads on "
                "images too; give held_out_images, or held_out_share alone"
            )

    def _check_needs(self, stage: str) -> None:
        method, kind = self.method_class, self.method.kind
        missing = [f"`{need}:`" for need in method.needs if getattr(self, need) is None]
        if missing:
            raise ValueError(f"{stage}: method '{kind}' needs {' and '.join(missing)}")
        if self.model is not None and "model" not in method.needs:
            raise ValueError(
                f"{stage}: method '{kind}' starts from no cluster model; give `network:` or "
                "`backbone:` instead of `model:`"
            )
        if method.uses_neighbours and self.neighbours is None:
            raise ValueError(
                f"{stage}.neighbours: method '{kind}' needs neighbours; give the name of a "
                "neighbours stage"
            )

    def _check_recipes(self, stage: str) -> None:
        views = self.method_class.recipes_for(self.method)
        if self.recipes and len(self.recipes) != len(views):
            raise ValueError(
                f"{stage}.recipes: {len(self.recipes)} given, but method '{self.method.kind}' has "
                f"{len(views)} views; replace {', '.join(views)}"
            )

    def _check_num_neighbours(self, stage: str, earlier: Stages) -> None:
        source = earlier.get(self.neighbours or "")
        if not isinstance(source, NeighboursConfig) or self.num_neighbours is None:
            return
        if self.num_neighbours > source.num_neighbours:
            raise ValueError(
                f"{stage}.num_neighbours: {self.num_neighbours}, but stage '{self.neighbours}' "
                f"has {source.num_neighbours}; lower it"
            )

    def warnings(self, data: DataConfig) -> list[str]:
        """Warnings about recipes that do not suit the size of the stored images."""
        return resolution_warnings(self.view_recipes(), data)

    def check_ranks(self, name: str, world_size: int) -> None:
        """Raise ValueError unless the global batch can be split over ranks and suits the method."""
        super().check_ranks(name, world_size)
        try:
            self.method.check_batch(self.global_batch, world_size)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None

    def check_size(self, name: str, num_images: int) -> None:
        """Raise ValueError unless there are enough images for a batch, and for the clusters."""
        trained = num_images * (1 - self.held_out_share)
        if self.global_batch > trained:
            held_out = f", {self.held_out_share:.0%} held out" if self.held_out_share else ""
            raise ValueError(
                f"stages.{name}.global_batch: {self.global_batch} is larger than the data "
                f"({num_images} images{held_out}); allowed: at most {int(trained)}, minus the "
                "images that cannot be read. Lower it"
            )
        num_clusters = getattr(self.method, "num_clusters", 0)
        largest = num_clusters if isinstance(num_clusters, int) else max(num_clusters)
        if largest > num_images:
            raise ValueError(
                f"stages.{name}.method.num_clusters: {largest} clusters of {num_images} images; "
                f"allowed: at most {num_images}. Lower it"
            )
