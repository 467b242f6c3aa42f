"""The sections of a recipe that say how student and discriminator are trained, stage by stage."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict

from gadfly.config.section import Count, Name, PositiveRate, Schedule, Section, Steps, Text

DISCRIMINATOR_REWARD = "discriminator"
"""What the discriminator's own reward is called beside others, as in `detail/reward_share/discriminator`."""


def _function(text: str) -> str:
    if not re.fullmatch(r".+\.py:[^\W\d]\w*", text):
        raise ValueError("give a file and a function in it, as in rewards.py:brevity")
    return text


def _names_are_free(rewards: "dict[str, RewardConfig]") -> "dict[str, RewardConfig]":
    if DISCRIMINATOR_REWARD in rewards:
        raise ValueError(f"'{DISCRIMINATOR_REWARD}' is the name of the discriminator's own; take another")
    return rewards


_Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW for one role. The learning rate is the stage's, since it differs from stage to stage."""

    adam_betas: Annotated[tuple[_Decay, _Decay], Strict(False)] = (0.9, 0.999)
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
    centring: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean square of the raw scores in the loss, which keeps them from growing without end."""
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
    """Also train `seqkd-equal-time`, a baseline with as many seconds as warmup and gad took together
    (gad alone, if it starts from a path: what came before is not counted then, in its favour)."""
    equal_time_learning_rate: PositiveRate | None = None
    """Its learning rate, best chosen on validation data. Default: `learning_rate`."""


class WarmupConfig(Training):
    """SFT of the student while the discriminator learns to tell its samples from the teacher's responses."""

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


class RewardConfig(Section):
    """A reward of the user's own beside the discriminator's score."""

    function: Annotated[Text, AfterValidator(_function)]
    """`FILE.py:NAME`, relative to the recipe. It is given a prompt, its sampled responses and the teacher's
    responses, all as text, and returns a number for each sample: see docs/algorithm.md. It is code, which
    runs only with `--allow-code`, and a run goes on with the same result only if it has no memory."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """What it counts beside the discriminator's 1, once both are normalised within the group."""


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
    reward: Literal["score", "log_sigmoid"] = "score"
    """The discriminator's score (paper, eq. 5), or its log sigmoid, which has an upper bound: beyond a score
    of a few, more earns nothing. Where 0 lies then matters, so use it with `discriminator.centring`."""
    rewards: Annotated[dict[Name, RewardConfig], AfterValidator(_names_are_free)] = {}
    """Further rewards by name, each normalised on its own within the group."""
    discriminator_learning_rate: PositiveRate | None = None
    """The discriminator's in this stage. Default: `discriminator.learning_rate`."""
    discriminator_every: Count = 1
    """The discriminator takes a step at every n-th step of the student, but scores at all of them."""
    discriminator_rests_above: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    """The discriminator takes no step while its mean fresh accuracy over the last 5 steps is above this."""
    replay: Steps = 0
    """Groups of earlier steps put beside the fresh ones in the discriminator's batch: what it has learnt to
    tell it then does not forget. Each costs as much as a fresh one. As many of each step are kept in memory
    and in the checkpoints."""
    replay_steps: Count = 100
    """How many steps back they may come from."""
    start_from: Literal["latest"] | Steps | Text = "latest"
    """`latest`: go on where this stage stopped, or else from warmup's end. A step: go back to that
    checkpoint of this stage. A path: a checkpoint folder whose student and discriminator are taken
    instead of warmup's, which is then not run."""

    @property
    def starts_elsewhere(self) -> bool:
        """Whether `start_from` is a path."""
        return isinstance(self.start_from, str) and self.start_from != "latest"
