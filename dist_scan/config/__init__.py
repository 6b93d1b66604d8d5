"""Settings: strict models, YAML, validation errors; `kind:` names a class by its file.

Settings of one part (a method, a stage, an optimizer) are defined next to it. This package has the
settings of a whole run and the base classes of all settings.
"""

from dist_scan.config.base import FATAL_ERROR, ConfigError, Name, StrictModel, suggest
from dist_scan.config.data import DataConfig, SplitConfig
from dist_scan.config.errors import validate_settings
from dist_scan.config.run import RunConfig, RuntimeConfig
from dist_scan.config.slurm import SlurmConfig
from dist_scan.config.stage import StageConfig
from dist_scan.config.yaml import dump, override, read_settings, read_yaml

__all__ = [
    "FATAL_ERROR",
    "ConfigError",
    "DataConfig",
    "Name",
    "RunConfig",
    "RuntimeConfig",
    "SlurmConfig",
    "SplitConfig",
    "StageConfig",
    "StrictModel",
    "dump",
    "override",
    "read_settings",
    "read_yaml",
    "suggest",
    "validate_settings",
]
