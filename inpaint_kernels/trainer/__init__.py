"""Training from a configuration: ``train(read_config("deepfill_v1", {"photos": "photos"}), "run")``.

Needs the packages of the extra ``train``.
"""

from inpaint_kernels.trainer.config import TrainingConfig, parse_overrides, read_config, recipes, write_config
from inpaint_kernels.trainer.run import TrainingError, train

__all__ = ["TrainingConfig", "TrainingError", "parse_overrides", "read_config", "recipes", "train", "write_config"]
