"""The recipe: every setting of a run, its bounds and its meaning (a docstring under each field)."""

from gadfly.config.api import ApiConfig, JudgeConfig, TeacherConfig
from gadfly.config.recipe import TRAINING_STAGES, Optimizer, Recipe, Training, WarmupConfig
from gadfly.config.section import Schedule

__all__ = [
    "TRAINING_STAGES",
    "ApiConfig",
    "JudgeConfig",
    "Optimizer",
    "Recipe",
    "Schedule",
    "TeacherConfig",
    "Training",
    "WarmupConfig",
]
