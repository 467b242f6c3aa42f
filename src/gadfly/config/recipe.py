"""The recipe: every setting of a run, its bounds and its meaning (a docstring under each field).

Values come from the paper (arXiv 2511.10643) or its released scripts unless the docstring says
otherwise. Reading a file, `key=value` and error messages are `recipe_file.py`; this file only says
what a recipe may hold.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gadfly.config.api import JudgeConfig, TeacherConfig
from gadfly.config.sampling import SamplingConfig
from gadfly.config.section import Count, Files, Name, PositiveRate, Schedule, Section, Steps, Text

TRAINING_STAGES = ("seqkd", "seqkd-equal-time", "discriminator-lm", "warmup", "gad")
"""Stages with checkpoints, each in the folder of its name."""

# The best rate of LoRA is about ten times that of full fine-tuning, whatever the rank (Schulman et al., 2025,
# "LoRA Without Regret").
_LORA_RATE_FACTOR = 10


class DataConfig(Section):
    """Where prompts and teacher responses come from. A value is a file, a list of files, or a hub name."""

    prompts: Files | None = None
    """Prompts for `collect` to put to the teacher; responses they may carry are not read."""
    train: Files | None = None
    """Prompts with teacher responses: JSONL, Parquet, or a Hugging Face data set (`name` or `name:split`).
    Default: what `collect` has gathered."""
    valid: Files | None = None
    """Held-out prompts with teacher responses. Without it, `valid_share` of `train` is held out."""
    test: dict[Name, Files] = {}
    """Test sets by name, for `generate`; teacher responses are optional there."""
    over_long_responses: Literal["cut", "drop"] = "cut"
    """Training responses over `sampling.max_response_tokens`: cut and marked unfinished, or left out."""
    valid_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of `train` held out when `valid` is not given: chosen by a hash of the prompt, so it stays."""


class Optimizer(Section):
    """AdamW for one role. The learning rate is the stage's, since it differs from stage to stage."""

    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay of AdamW's running mean and running square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay, on every parameter."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.2
    """Gradients are scaled down to this norm."""


class StudentConfig(Optimizer):
    """The model that learns."""

    model: Text
    """A Hugging Face name or a folder."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights of student, discriminator and reference. `bfloat16` halves the memory, but loses
    every step smaller than its rounding: rates near 1e-6 train nothing. For speed set `engine.precision`."""
    lora_rank: Steps = 0
    """0: every weight is trained. Above: student, discriminator and reference are LoRA adapters of this rank,
    in all linear layers of one frozen model (not in experts that are one tensor), which is in memory once and
    whose `dtype` may be `bfloat16`: adapters are finer. Learning rates that are not given are then ten times
    the defaults here."""
    lora_alpha: Count | None = None
    """An adapter counts `lora_alpha / lora_rank` times. Default: twice the rank."""


class DiscriminatorConfig(Optimizer):
    """The model that tells teacher from student; its score is the student's reward."""

    model: Text | None = None
    """A Hugging Face name or a folder. Default: the student's, in its original weights."""
    reads: Literal["text", "tokens"] = "text"
    """`text`: both roles' responses are decoded and tokenised afresh, so an odd tokenisation of a
    sample gives nothing away. `tokens`: the sampled ids, as in the reference."""
    loss: Literal["bradley_terry", "cross_entropy"] = "bradley_terry"
    """Paper eq. 3, or eq. 4 for the ablation."""
    learning_rate: PositiveRate = 1e-6
    """Constant. Used in `warmup` and `gad`, unless a stage gives its own `discriminator_learning_rate`."""
    lm_steps: Steps = 0
    """Steps of language modelling on the teacher's responses before everything else. Helps where
    the base model knows little of the teacher's language; a pretrained LLM needs none."""
    lm_learning_rate: PositiveRate = 1e-5
    """Learning rate of those steps, on the schedule of the warmup stage."""
    lm_batch_prompts: Count = 64
    """Prompts in a batch of those steps."""


class Training(Section):
    """What every training stage has."""

    learning_rate: PositiveRate = 1e-6
    """The student's learning rate."""
    learning_rate_schedule: Schedule = "constant"
    """`cosine` falls to zero, which it would reach one step after the last; it is the student's."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Passes over the training prompts."""
    max_steps: Count | None = None
    """Number of steps, whatever `epochs` says; in warmup, of the student's."""
    batch_prompts: Count = 256
    """Prompts in a batch."""
    save_every: Count = 50
    """Steps between checkpoints; the last step is always saved."""
    evaluate_every: Count = 50
    """Steps between evaluations on held-out prompts; always before the first and after the last."""


class SeqkdConfig(Training):
    """The baseline: supervised fine-tuning (SFT) on the teacher's responses."""

    learning_rate: PositiveRate = 5e-6
    """The student's learning rate (paper A.2: best of 1e-6 to 5e-6 for SeqKD)."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    """Passes over the training prompts: as many as warmup and gad make together in the paper."""
    equal_time: bool = False
    """Also train `seqkd-equal-time`, a baseline with as many seconds as warmup and gad took together."""
    equal_time_learning_rate: PositiveRate | None = None
    """Its learning rate, best chosen on validation data. Default: `learning_rate`."""


class WarmupConfig(Training):
    """SFT of the student while the discriminator learns to tell its fresh samples from the teacher."""

    group_size: Count = 8
    """Fresh samples a prompt for the discriminator."""
    discriminator_only_steps: Steps = 10
    """Steps of the discriminator alone, before the student moves."""
    discriminator_every: Steps = 1
    """The discriminator takes a step at every n-th step of the student; 0: it waits for the final steps."""
    discriminator_final_steps: Steps = 0
    """Steps of the discriminator alone on samples of the finished student, at the end."""
    discriminator_learning_rate: PositiveRate | None = None
    """The discriminator's in this stage. Default: `discriminator.learning_rate`."""


class GadConfig(Training):
    """GRPO against the live discriminator (paper, Algorithm 1)."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples a prompt (G). One alone would have no advantage."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 2.0
    """Passes over the training prompts."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the KL term (k3) to the frozen post-warmup student. 0: no reference model is loaded."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Half-width of the probability ratio's range around 1; idle at one update a batch."""
    discriminator_learning_rate: PositiveRate | None = None
    """The discriminator's in this stage. Default: `discriminator.learning_rate`."""
    start_from: Literal["latest"] | Steps | Text = "latest"
    """`latest`: go on where this stage stopped, or else from warmup's end. A step: go back to that
    checkpoint of this stage. A path: a checkpoint folder whose student and discriminator are taken
    instead of warmup's."""


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
    that is kept (so keep more with `keep_last`): the highest score, or the hardest to tell."""


class EngineConfig(Section):
    """How the work is done on this machine: speed and memory, and results only by rounding."""

    micro_batch_tokens: Count = 16384
    """Tokens in one forward and backward pass; a single group may exceed it."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """`bfloat16`: matrix products of training under autocast, faster on processors that have it, many times
    slower on others; `auto` takes the faster one, measured once a run. Weights, scores and losses stay in
    `student.dtype`, and so does sampling: sampled and trained log-probabilities then differ by rounding
    (`detail/sampler_gap_nats`)."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads; default: torch's own choice. Tiny models run best on one or two."""
    activation_checkpointing: bool = False
    """Keep no activations inside a layer for the backward pass, but compute them again there: a third more
    work, for memory that hardly grows with the number of layers."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Of several processes: how long one may keep the others waiting before the run ends, naming it."""


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
    """Overrides `runs/NAME`."""
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

    @model_validator(mode="after")
    def _adapters_are_of_one_model(self) -> "Recipe":
        if self.student.lora_rank > 0 and self.discriminator.model not in (None, self.student.model):
            raise ValueError(
                f"student.lora_rank = {self.student.lora_rank}: all roles are adapters of one model, so "
                f"discriminator.model must be the student's; leave it out, or set student.lora_rank = 0"
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
        asked = "servers" if self.sampling.servers else 'backend = "vllm"'
        if self.student.lora_rank > 0 and (self.sampling.servers or self.sampling.backend == "vllm"):
            raise ValueError(
                f"sampling.{asked}: vLLM is given whole weights, and student.lora_rank = "
                f'{self.student.lora_rank} trains adapters; set sampling.backend = "local", without servers'
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
