"""What to predict, and the files of a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dist_scan.config import ConfigError


@dataclass(frozen=True)
class PredictOptions:
    """What to predict.

    Args:
        run: folder of a finished run.
        images: image folder, parquet file, folder or glob, tar shards, or a .beton with the run's
            storage settings.
        out: the parquet file to write, a row per image.
        stage: stage whose model is used (default: the one behind `best` of the report stage).
        features: the embed stage of training images for novelty; "none" for no novelty (default:
            the one whose neighbours were searched).
        batch: images per batch (default: the run's; less if memory is short, more on a GPU).
        device: auto, cpu or cuda.
        workers: number of processes that encode images, and of loader threads; 0: the number of
            cores.
        overwrite: replace `out` if it exists.
    """

    run: Path
    images: str
    out: Path
    stage: str | None = None
    features: str | None = None
    batch: int | None = None
    device: str = "auto"
    workers: int = 0
    overwrite: bool = False

    @property
    def bad_images(self) -> Path:
        """OUT.bad.csv, which lists the images that cannot be read."""
        return self.out.with_suffix(".bad.csv")

    @property
    def work_dir(self) -> Path:
        """Folder of the encoded images until the prediction is complete."""
        return self.out.with_name(self.out.name + ".work")

    def prepare_output(self) -> None:
        """Check `out` and create its folder.

        Raises ConfigError if `out` exists or would be read as images.
        """
        out = self.out
        if out.suffix != ".parquet":
            raise ConfigError(f"-o: '{out}' must end in .parquet")
        if out.is_dir():
            raise ConfigError(f"-o: '{out}' is a folder; give another name")
        if self._is_read_as_images():
            raise ConfigError(
                f"-o: '{out}' is, or lies among, the parquet files of '{self.images}' and "
                "would be read as images; give another folder"
            )
        existing = [str(path) for path in (out, self.bad_images) if path.exists()]
        if existing and not self.overwrite:
            verb = "exists" if len(existing) == 1 else "exist"
            raise ConfigError(
                f"-o: {' and '.join(existing)} {verb}; give another name, or --overwrite"
            )
        out.parent.mkdir(parents=True, exist_ok=True)

    def _is_read_as_images(self) -> bool:
        """Whether `images` names the file `out`, or a folder or glob of parquet files with it."""
        out, source = self.out.resolve(), Path(self.images)
        if source.is_dir():
            others = [file for file in source.glob("*.parquet") if file.resolve() != out]
            return out.parent == source.resolve() and len(others) > 0
        is_glob = any(character in self.images for character in "*?[")
        return out == source.resolve() or (is_glob and out.match(str(source.absolute())))
