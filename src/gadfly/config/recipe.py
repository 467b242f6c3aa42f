"""The recipe: every setting of a run, its bounds and its meaning (a docstring under each field).

Values come from the paper (arXiv 2511.10643) or its released scripts unless the docstring says
otherwise. Reading a file, `key=value` and error messages are `recipe_file.py`; this file only says
what a recipe may hold.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from gadfly.config.alarms import AlarmsConfig
from gadfly.config.api import JudgeConfig, TeacherConfig
from gadfly.config.audit import AuditConfig
from gadfly.config.sampling import SamplingConfig
from gadfly.config.section import Count, Files, Name, Section, Text
from gadfly.config.training import (
    DiscriminatorConfig,
    GadConfig,
    SeqkdConfig,
    StudentConfig,
    WarmupConfig,
)

TRAINING_STAGES = ("seqkd", "discriminator-lm", "warmup", "gad", "seqkd-equal-time")
"""Stages with checkpoints, each in the folder of its name."""

# The best rate of LoRA is about ten times that of full fine-tuning, whatever the rank (Schulman et al., 2025,
# "LoRA Without Regret").
_LORA_RATE_FACTOR = 10


# What files of a test set's name hold in `generations` and `verdicts`.
_TAKEN = {"valid": "the held-out prompts", "answers": "what a judge was paid for"}


def _names_are_free(tests: dict[str, Any]) -> dict[str, Any]:
    for name in tests:
        if name in _TAKEN:
            raise ValueError(f"files named {name!r} hold {_TAKEN[name]}; rename the test set")
    return tests


class DataConfig(Section):
    """Where prompts and teacher responses come from. A value is a file, a list of files, or a hub name."""

    prompts: Files | None = None
    """Prompts for `collect` to put to the teacher; responses they may carry are not read."""
    train: Files | None = None
    """Prompts with teacher responses: JSONL, Parquet, or a Hugging Face data set (`name` or `name:split`).
    Default: what `collect` has gathered."""
    valid: Files | None = None
    """Held-out prompts with teacher responses. Without it, `valid_share` of `train` is held out."""
    test: Annotated[dict[Name, Files], AfterValidator(_names_are_free)] = {}
    """Test sets by name, for `generate`; teacher responses are optional there."""
    over_long_responses: Literal["cut", "drop"] = "cut"
    """Training responses over `sampling.max_response_tokens`: cut and marked unfinished, or left out."""
    teachers: dict[Text, Annotated[float, Field(gt=0)]] = {}
    """Whose responses of `train` and `valid` are used, and what each counts in the losses, as in
    `{ "gpt-4o" = 1.0, "mistral" = 0.5 }`; a row's `teacher` says whose they are. Default: all alike."""
    valid_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of `train` held out when `valid` is not given: chosen by a hash of the prompt, so it stays."""


class EvaluationConfig(Section):
    """Greedy answers on held-out prompts while training."""

    prompts: Count = 64
    """Number of held-out prompts; also of the frozen probe of the discriminator."""


class GenerateConfig(Section):
    """Responses of checkpoints to the test prompts."""

    checkpoints: list[Text] = []
    """Stages (their latest checkpoint), `STAGE/step-000400`, `STAGE/best`, `base`, or paths of
    model folders. Default: `base` and every training stage that is done."""
    temperatures: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [0.0]
    """0 is greedy and writes `generations/SET.jsonl`; another value T writes `generations/SET-tT.jsonl`."""
    max_response_tokens: Count | None = None
    """Cap of these responses. Default: `sampling.max_response_tokens`."""


class CheckpointsConfig(Section):
    """What is kept of a training stage."""

    keep_last: Count = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the best held-out ROUGE-L: a diagnostic, not a verdict on quality."""
    in_background: bool = False
    """Write checkpoints while training goes on, from a copy in memory: weights and optimisers once more."""
    best_by: Literal["rouge_l", "score", "tell"] = "rouge_l"
    """How `gad/best` is chosen. `score` and `tell` judge answers to the held-out prompts by every checkpoint
    that is kept (so keep more with `keep_last`): the highest score, or the hardest to tell at
    equal length."""


class EngineConfig(Section):
    """How the work is done on this machine: speed and memory, and results only by rounding."""

    micro_batch_tokens: Count = 16384
    """Tokens in one forward and backward pass; a single group may exceed it."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """`bfloat16`: matrix products of training under autocast, faster on processors that have it, many times
    slower on others; `auto` takes the faster one, measured once a run. Weights stay in `student.dtype`;
    scores, log-probabilities and losses are at least float32. The local sampler of one process rounds as
    training does, with LoRA excepted; elsewhere sampled and trained log-probabilities differ by that rounding
    (`detail/sampler_gap_nats`)."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads; default: torch's own choice. Tiny models run best on one or two."""
    activation_checkpointing: bool = False
    """Keep no activations inside a layer for the backward pass, but compute them again there: a third more
    work, for memory that hardly grows with the number of layers."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Of several processes: how long one may keep the others waiting, without any progress of its own, before
    the run ends, naming it. Also how long an answer of one of `sampling.servers` may take."""


class TrackersConfig(Section):
    """Where metrics go besides `metrics.jsonl`. Needs `pip install 'gadfly[trackers]'`."""

    names: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Which trackers."""
    project: str = "gadfly"
    """Project name shown there."""


class Recipe(Section):
    """All settings of a run, one section a part."""

    name: Name
    """Names the run folder: `runs/NAME` beside the recipe."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random number follows from it."""
    run_folder: Text | None = None
    """Overrides `runs/NAME`; `{name}` in it is the name of the run."""
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    sampling: SamplingConfig = SamplingConfig()
    seqkd: SeqkdConfig = SeqkdConfig()
    warmup: WarmupConfig = WarmupConfig()
    gad: GadConfig = GadConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    generate: GenerateConfig = GenerateConfig()
    judge: JudgeConfig = JudgeConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    engine: EngineConfig = EngineConfig()
    trackers: TrackersConfig = TrackersConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _adapters_are_of_one_model(self) -> "Recipe":
        if self.student.lora_rank > 0 and self.discriminator.model not in (None, self.student.model):
            raise ValueError(
                f"student.lora_rank = {self.student.lora_rank}: all roles are adapters of one model, so "
                f"discriminator.model must be the student's; leave it out, or set student.lora_rank = 0"
            )
        return self

    @model_validator(mode="after")
    def _alpha_is_of_an_adapter(self) -> "Recipe":
        if self.student.lora_alpha is not None and self.student.lora_rank == 0:
            raise ValueError(
                f"student.lora_alpha = {self.student.lora_alpha}: with student.lora_rank = 0 every weight is "
                f"trained and there is no adapter; leave it out, or give student.lora_rank"
            )
        return self

    @model_validator(mode="after")
    def _double_precision_is_not_mixed(self) -> "Recipe":
        if self.student.dtype == "float64" and self.engine.precision != "float32":
            raise ValueError(
                f'engine.precision = "{self.engine.precision}": autocast cannot round weights of '
                f'student.dtype = "float64"; set engine.precision = "float32", which leaves them as they are'
            )
        return self

    @model_validator(mode="after")
    def _adapters_learn_at_higher_rates(self) -> "Recipe":
        if self.student.lora_rank > 0:
            for name in ("discriminator", "seqkd", "warmup", "gad"):
                section = getattr(self, name)
                raised = {
                    # Rounded, so that 1e-6 becomes 1e-5 and not 9.999999999999999e-06.
                    rate: round(_LORA_RATE_FACTOR * getattr(section, rate), 12)
                    for rate in ("learning_rate", "lm_learning_rate")
                    if rate in type(section).model_fields and rate not in section.model_fields_set
                }
                # A recipe is frozen once it is made, which it is not yet.
                object.__setattr__(self, name, section.model_copy(update=raised))
        return self

    @model_validator(mode="after")
    def _vllm_takes_no_adapters(self) -> "Recipe":
        setting = "servers" if self.sampling.servers else 'backend = "vllm"'
        if self.student.lora_rank > 0 and (self.sampling.servers or self.sampling.backend == "vllm"):
            raise ValueError(
                f"sampling.{setting}: vLLM is given whole weights, and student.lora_rank = "
                f'{self.student.lora_rank} trains adapters; set sampling.backend = "local", without servers'
            )
        return self

    @model_validator(mode="after")
    def _servers_serve_one_model(self) -> "Recipe":
        other = self.discriminator.model not in (None, self.student.model)
        if self.sampling.servers and self.discriminator.lm_steps > 0 and other:
            raise ValueError(
                f"sampling.servers: they serve the student's model, while discriminator.lm_steps = "
                f"{self.discriminator.lm_steps} trains and samples {self.discriminator.model!r}; set "
                f"discriminator.lm_steps = 0, or leave sampling.servers out"
            )
        return self

    @model_validator(mode="after")
    def _tokens_need_one_tokenizer(self) -> "Recipe":
        other = self.discriminator.model not in (None, self.student.model)
        if self.discriminator.reads == "tokens" and other:
            raise ValueError(
                'discriminator.reads = "tokens": they are the student\'s, so discriminator.model must be too'
            )
        return self
