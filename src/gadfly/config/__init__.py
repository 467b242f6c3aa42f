"""The recipe: every setting of a run, its bounds and its meaning (a docstring under each field)."""

from gadfly.config.alarms import Action, AlarmsConfig
from gadfly.config.api import ApiConfig, JudgeConfig, TeacherConfig
from gadfly.config.recipe import TRAINING_STAGES, DataConfig, Recipe
from gadfly.config.section import Schedule
from gadfly.config.training import (
    DiscriminatorConfig,
    GadConfig,
    Optimizer,
    RewardConfig,
    Training,
    WarmupConfig,
)

__all__ = [
    "TRAINING_STAGES",
    "Action",
    "AlarmsConfig",
    "ApiConfig",
    "DataConfig",
    "DiscriminatorConfig",
    "GadConfig",
    "JudgeConfig",
    "Optimizer",
    "Recipe",
    "RewardConfig",
    "Schedule",
    "TeacherConfig",
    "Training",
    "WarmupConfig",
]
