import itertools
import math
import random
import re
from pathlib import Path

import pytest
from planted import HEALTHY, Shape, raised, rows

from gadfly.alarms import ALARMS, KINDS, Circumstances, History, change_band, look, mean_band
from gadfly.alarms.alarm import Change
from gadfly.config import TRAINING_STAGES, AlarmsConfig
from gadfly.errors import ConfigError
from gadfly.recipe_file import load_recipe

ONSET = 60


def from_onset(bad: float, name: str, over: float = 5.0) -> Shape:
    """As healthy up to the onset, then within some steps as bad as said."""
    healthy = HEALTHY[name][0]

    def shape(step: int) -> float | None:
        good = healthy(step)
        assert good is not None
        return good if step < ONSET else bad + (good - bad) * math.exp(-(step - ONSET) / over)

    return shape


def always(value: float) -> Shape:
    return lambda step: value


def evaluated(*values: float) -> Shape:
    """Values of the evaluations in their order, the last for all that follow."""
    return lambda step: values[min(step // 20, len(values) - 1)]


# Held-out pairs that are told as well as those that are trained on.
ACCURATE_HELD_OUT: dict[str, Shape] = {
    "detail/held_out_accuracy": always(0.96),
    "probe/accuracy": always(0.96),
}
# By alarm: the stage, what is planted, when it sets in, and within how many steps it has to be found.
FAULTS: dict[str, tuple[str, dict[str, Shape], int, int]] = {
    "not-finite": ("gad", {"student/kl_nats": lambda step: math.nan if step == ONSET else 0.1}, ONSET, 0),
    "nothing-moves": ("gad", {"detail/still_fraction/student": always(1.0)}, 1, 2),
    "frozen-module": ("gad", {"detail/still_fraction/discriminator": always(0.4)}, 1, 9),
    "sampler-gap": ("gad", {"detail/sampler_gap_nats": always(0.02)}, 1, 2),
    "ends-differ": (
        "gad",
        {"rollout/finished_fraction": always(0.14), "rollout/length_ratio": always(1.3)},
        1,
        9,
    ),
    "length-runaway": (
        "gad",
        {"rollout/length_ratio": from_onset(2.5, "rollout/length_ratio", over=20)},
        ONSET,
        30,
    ),
    "collapse": (
        "gad",
        {
            "rollout/length_ratio": from_onset(0.02, "rollout/length_ratio"),
            "student/entropy_nats": from_onset(0.01, "student/entropy_nats"),
            "group/distinct_fraction": from_onset(0.13, "group/distinct_fraction"),
            "group/zero_variance_fraction": from_onset(0.95, "group/zero_variance_fraction"),
        },
        ONSET,
        20,
    ),
    "repetition": ("gad", {"evaluation/repetition": evaluated(0.05, 0.05, 0.05, 0.4)}, ONSET, 40),
    "drift": ("gad", {"student/kl_nats": from_onset(2.0, "student/kl_nats", over=15)}, ONSET, 30),
    "copies": (
        "gad",
        {
            "group/distinct_fraction": always(0.14),
            "group/zero_variance_fraction": always(0.9),
            "group/score_std": always(0.05),
        },
        1,
        4,
    ),
    "no-signal": ("gad", {"group/zero_variance_fraction": always(0.8)}, 1, 4),
    "score-ties": ("gad", {"detail/tied_fraction": always(0.05)}, 1, 4),
    "score-explosion": (
        "gad",
        {"detail/score_rms": lambda step: 2.0 if step < ONSET else 2.0 * 1.1 ** (step - ONSET)},
        ONSET,
        60,
    ),
    "separates-early": (
        "warmup",
        {
            "discriminator/accuracy": lambda step: (0.5, 0.9, 0.97, 0.98, 0.99)[min(step, 5) - 1],
            **ACCURATE_HELD_OUT,
        },
        3,
        3,
    ),
    "saturated": (
        "gad",
        {
            "discriminator/accuracy": from_onset(1.0, "discriminator/accuracy"),
            "discriminator/grad_norm": from_onset(1e-4, "discriminator/grad_norm"),
            **ACCURATE_HELD_OUT,
        },
        ONSET,
        50,
    ),
    "too-strong": (
        "gad",
        {
            "discriminator/accuracy": from_onset(0.995, "discriminator/accuracy"),
            "group/score_std": from_onset(0.05, "group/score_std"),
            **ACCURATE_HELD_OUT,
        },
        ONSET,
        40,
    ),
    "fooled": (
        "gad",
        {"discriminator/accuracy": from_onset(0.35, "discriminator/accuracy")},
        ONSET,
        40,
    ),
    "memorises": (
        "gad",
        {"discriminator/accuracy": always(0.9), "detail/held_out_accuracy": evaluated(0.9, 0.85, 0.55)},
        40,
        40,
    ),
    "surface-shortcut": ("gad", {"detail/surface_accuracy": always(0.95), **ACCURATE_HELD_OUT}, 0, 20),
    "format-sensitive": ("gad", {"detail/perturbation_share": always(0.9)}, 0, 20),
    "length-bias": (
        "gad",
        {"detail/length_score_correlation": always(0.8), "detail/length_matched_accuracy": always(0.55)},
        1,
        20,
    ),
    "cycling": (
        "gad",
        {
            "detail/snapshot_gap/warmup": evaluated(4.0, 3.0, 2.0, 1.8, 3.2, 3.4),
            "evaluation/tell_accuracy": always(0.75),
        },
        80,
        20,
    ),
    "hacking": (
        "gad",
        {
            "detail/snapshot_gap/warmup": evaluated(4.0, 2.5, 2.0),
            "evaluation/tell_accuracy": evaluated(0.75, 0.7, 0.7, 0.95, 0.95),
        },
        60,
        40,
    ),
    "reward-rules": ("gad", {"detail/reward_share/format": always(0.8)}, 1, 9),
    "no-learning": (
        "gad",
        {name: always(0.0 if "kl" in name else shape(1) or 0.0) for name, (shape, _) in HEALTHY.items()}
        | ACCURATE_HELD_OUT,
        1,
        99,
    ),
}


def test_every_alarm_has_a_planted_fault() -> None:
    assert FAULTS.keys() == KINDS.keys()
    assert len(ALARMS) == len(KINDS)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_raises_its_alarm_and_only_it(name: str, seed: int) -> None:
    stage, planted, onset, within = FAULTS[name]
    found = raised(rows(120, seed=seed, stage=stage, planted=planted))
    assert found.keys() == {name}
    assert onset <= found[name] <= onset + within


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_history_raises_none(seed: int) -> None:
    assert raised(rows(200, seed=seed)) == {}


def test_an_untrained_student_that_learns_to_end_raises_none() -> None:
    learning = {
        "rollout/finished_fraction": lambda step: 1 - 0.9 * math.exp(-step / 40),
        "rollout/length_ratio": lambda step: 1 + 1.5 * math.exp(-step / 40),
    }
    assert raised(rows(200, stage="warmup", planted=learning)) == {}


def test_a_student_that_training_does_not_teach_to_end_is_found_in_warmup() -> None:
    found = raised(rows(200, stage="warmup", planted={"rollout/finished_fraction": always(0.1)}))
    assert list(found) == ["ends-differ"]
    assert 20 < found["ends-differ"] <= 32


def test_a_role_that_rests_is_not_called_still() -> None:
    still: Shape = lambda step: None if step > 5 else 0.0  # noqa: E731
    assert raised(rows(60, planted={"detail/still_fraction/discriminator": still})) == {}


def test_the_end_of_a_schedule_is_no_standstill() -> None:
    steps = 200
    planted: dict[str, Shape] = {
        "detail/learning_rate": lambda step: 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)),
        "detail/still_fraction/student": lambda step: 1.0 if step > steps - 10 else 0.0,
    }
    assert raised(rows(steps, planted=planted)) == {}


def test_a_handful_of_held_out_prompts_says_nothing() -> None:
    _, planted, _, _ = FAULTS["surface-shortcut"]
    few = Circumstances(group_size=8, held_out=19)
    assert raised(rows(100, planted=planted), few) == {}


def test_one_wild_value_raises_nothing() -> None:
    wild = {
        "rollout/length_ratio": lambda step: 9.0 if step == 70 else 1.05,
        "student/kl_nats": lambda step: 50.0 if step == 75 else 0.1,
        "discriminator/accuracy": lambda step: 0.0 if step == 80 else 0.85,
    }
    assert raised(rows(120, planted=wild)) == {}


def test_loops_that_are_fewer_at_once_and_soon_gone_raise_nothing() -> None:
    assert (
        raised(rows(200, planted={"evaluation/repetition": evaluated(0.0, 0.0, 0.32, 0.23, 0.13, 0.0)})) == {}
    )


def test_loops_that_stay_for_three_evaluations_are_found_though_they_grow_fewer() -> None:
    planted = {"evaluation/repetition": evaluated(0.05, 0.05, 0.05, 0.6, 0.42, 0.4)}
    assert raised(rows(120, planted=planted)) == {"repetition": 100}


def test_loops_that_are_hardly_fewer_are_found_at_the_second_evaluation() -> None:
    planted = {"evaluation/repetition": evaluated(0.05, 0.05, 0.05, 0.6, 0.55)}
    assert raised(rows(80, planted=planted)) == {"repetition": 80}


@pytest.mark.parametrize(
    ("overlap", "is_progress"),
    [
        ((0.3, 0.3, 0.3, 0.34, 0.38), True),
        ((0.3, 0.3, 0.3, 0.28, 0.25), False),
        ((0.4, 0.3, 0.2, 0.34, 0.34), False),
    ],
    ids=["nearer", "farther", "back-at-the-start"],
)
def test_what_an_old_discriminator_praised_is_lost_in_a_circle_but_not_on_the_way_to_the_teacher(
    overlap: tuple[float, ...], is_progress: bool
) -> None:
    planted = {
        "detail/snapshot_gap/warmup": evaluated(4.0, 2.0, 1.8, 3.2, 3.4),
        "evaluation/tell_accuracy": evaluated(0.85, 0.95, 0.95, 0.85, 0.8),
        "evaluation/rouge_l": evaluated(*overlap),
    }
    assert ("cycling" in raised(rows(100, planted=planted))) != is_progress


def test_progress_that_was_seen_is_not_taken_back_while_nothing_changes() -> None:
    planted = {
        "detail/snapshot_gap/warmup": evaluated(4.0, 2.0, 3.3, 3.4),
        "evaluation/tell_accuracy": evaluated(0.85, 0.95, 0.85),
        "evaluation/rouge_l": evaluated(0.3, 0.3, 0.36),
    }
    assert raised(rows(200, planted=planted)) == {}


@pytest.mark.parametrize(
    "planted",
    [
        {"evaluation/tell_accuracy": evaluated(0.6, 0.6, 0.6, 0.6, 1.0, 0.6)},
        {
            "detail/snapshot_gap/warmup": evaluated(4.0, 4.0, 1.0, 4.0, 4.0),
            "evaluation/tell_accuracy": always(0.8),
        },
    ],
    ids=["told", "gap"],
)
def test_one_wild_evaluation_raises_nothing(planted: dict[str, Shape]) -> None:
    assert raised(rows(160, planted=planted)) == {}


@pytest.mark.parametrize(
    "planted",
    [
        {"evaluation/repetition": lambda step: 0.05 if step < 100 else 0.4},
        {
            "detail/snapshot_gap/warmup": lambda step: (4.0, 3.0, 2.0, 1.8)[step // 20] if step < 80 else 3.3,
            "evaluation/tell_accuracy": always(0.75),
        },
    ],
    ids=["repetition", "cycling"],
)
def test_the_last_evaluation_a_step_after_another_is_no_second_witness(planted: dict[str, Shape]) -> None:
    steps = 101 if "evaluation/repetition" in planted else 81
    assert raised(rows(steps, planted=planted)) == {}
    # At its usual distance it is.
    assert len(raised(rows(120, planted=planted))) == 1


def test_evaluations_that_come_more_often_than_before_are_all_looked_at() -> None:
    history = History("gad", Circumstances(held_out=64))
    for step, share in ((0, 0.0), (50, 0.0), (100, 0.0), (110, 0.4), (120, 0.0), (130, 0.4)):
        history.add({"stage": "gad", "step": step, "evaluation/repetition": share})
        assert look(history) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_grown_scores_is_no_circle(seed: int) -> None:
    rng = random.Random(seed)
    grown: Shape = lambda step: 1.2 if step < 100 else 4.8  # noqa: E731
    planted: dict[str, Shape] = {
        "group/score_std": grown,
        # A gap of next to nothing, as 64 answers measure it.
        "detail/snapshot_gap/gad-000100": lambda step: rng.gauss(1.0, 0.6) if step > 100 else None,
    }
    assert "cycling" not in raised(rows(300, planted=planted))


def test_a_student_that_repeats_itself_as_its_teacher_does_raises_nothing() -> None:
    planted = {
        "evaluation/repetition": evaluated(0.0, 0.3),
        "detail/teacher_repetition": lambda step: 0.3 if step % 20 == 0 else None,
    }
    assert raised(rows(100, planted=planted)) == {}
    del planted["detail/teacher_repetition"]
    assert raised(rows(100, planted=planted)).keys() == {"repetition"}


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_snapshot_that_is_no_longer_there_raises_nothing_later(is_alone: bool) -> None:
    def gap(step: int) -> float | None:
        return evaluated(4.0, 2.0, 1.8, 3.2, 3.4)(step) if step <= 80 else None

    planted: dict[str, Shape] = {
        "detail/snapshot_gap/gad-000010": gap,
        # What it praised was given up for the better, and what comes later it has not seen.
        "evaluation/tell_accuracy": evaluated(0.85, 0.95, 0.95, 0.85, 0.8, 0.8, 0.95, 0.95),
        "evaluation/rouge_l": evaluated(0.3, 0.3, 0.3, 0.34, 0.38, 0.38, 0.31, 0.31),
    }
    if is_alone:
        planted["detail/snapshot_gap/warmup"] = lambda step: None
    assert raised(rows(160, planted=planted)) == {}


@pytest.mark.parametrize("ratio", [1.4, 1.8, 2.2, 3.0])
@pytest.mark.parametrize("shrinks", [False, True])
def test_samples_that_are_long_and_do_not_grow_are_no_run_away(ratio: float, shrinks: bool) -> None:
    rng = random.Random(round(10 * ratio))

    def course(step: int) -> float:
        left = math.exp(-step / 60) if shrinks else 1.0
        return (1 + (ratio - 1) * left) * (1 + rng.gauss(0.0, 0.1))

    assert raised(rows(160, planted={"rollout/length_ratio": course})) == {}


def test_a_drift_is_since_the_step_that_took_the_student_half_a_nat_away() -> None:
    history, alarms = History("gad"), []
    for step in range(1, 60):
        # A tenth of a nat a step from step 20 on: of its row, the step before is the cause.
        history.add({"stage": "gad", "step": step, "student/kl_nats": 0.02 + 0.1 * max(0, step - 20)})
        alarms += [alarm for alarm in look(history) if alarm.name == "drift"]
    assert alarms[0].step > 30
    assert alarms[0].since == 24


def test_samples_that_were_long_from_the_start_run_away_once_they_grow() -> None:
    growing = from_onset(3.2, "rollout/length_ratio", over=20)
    planted: dict[str, Shape] = {"rollout/length_ratio": lambda step: max(1.6, growing(step) or 0.0)}
    found = raised(rows(120, planted=planted))
    assert found.keys() == {"length-runaway"}
    assert ONSET < found["length-runaway"] <= ONSET + 30


def test_half_precision_may_differ_by_more() -> None:
    planted = {"detail/sampler_gap_nats": always(0.02)}
    half = Circumstances(group_size=8, held_out=64, is_half=True)
    assert raised(rows(30, planted=planted), half) == {}


@pytest.mark.parametrize("name", ["collapse", "cycling", "no-learning"])
def test_what_was_logged_before_decides_and_nothing_else(name: str) -> None:
    stage, planted, _, _ = FAULTS[name]
    logged = list(rows(160, stage=stage, planted=planted))
    whole, again = History(stage), History(stage)
    for row in logged:
        whole.add(row)
    for row in logged[:77]:
        again.add(row)
        look(again)
    for row in logged[77:]:
        again.add(row)
    assert look(whole) == look(again)


def test_every_entry_says_what_and_what_to_do() -> None:
    for kind in ALARMS:
        texts = (kind.title, kind.meaning, kind.cause, kind.advice)
        assert all(texts)
        assert kind.advice_in("gad").endswith(".")
        assert not set(kind.hidden_by) - KINDS.keys()
        assert kind.reads or kind.name == "not-finite"


def test_an_alarm_that_a_stage_cannot_raise_hides_none_of_its_alarms() -> None:
    # In warmup, `separates-early` would say the same more exactly for the first twelve steps.
    planted: dict[str, Shape] = {
        "discriminator/accuracy": always(0.99),
        "discriminator/score_gap": always(8.0),
        "group/score_std": always(0.05),
    }
    short = Circumstances(window=8)
    assert raised(rows(12, planted=planted), short)["too-strong"] == 8
    assert "too-strong" not in raised(rows(12, planted=planted, stage="warmup"), short)


def test_a_bound_does_not_turn_a_remedy_round() -> None:
    assert Change(10.0, at_least=0.01, at_most=1.0).of(2.0) == 2.0
    assert Change(1.5, at_least=0.5, at_most=1.2).of(1.5) == 1.5
    assert Change(0.5, at_least=0.1).of(0.05) == 0.05
    assert Change(10.0, at_least=0.01, at_most=1.0).of(0.001) == 0.01


def test_remedies_are_settings_of_the_recipe(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    for kind, stage in itertools.product(ALARMS, ("warmup", "gad")):
        for key in kind.remedy:
            section, name = key.format(stage=stage).split(".")
            assert hasattr(getattr(recipe, section), name), key


def test_advice_names_settings_that_its_stage_reads(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    named = set()
    for kind in ALARMS:
        for stage in kind.stages or TRAINING_STAGES:
            for section, name in re.findall(r"\b([a-z][a-z-]*)\.([a-z_]+)", kind.advice_in(stage)):
                assert hasattr(getattr(recipe, section, None), name), (
                    f"{kind.name} in {stage}: {section}.{name}"
                )
                others = set(TRAINING_STAGES) - {stage, stage.removesuffix("-equal-time")}
                assert section not in others, f"{kind.name} in {stage}: {section}.{name}"
                named.add((stage, f"{section}.{name}"))
    assert {
        ("discriminator-lm", "discriminator.lm_learning_rate"),
        ("seqkd-equal-time", "seqkd.equal_time_learning_rate"),
        ("warmup", "warmup.discriminator_learning_rate"),
        ("gad", "gad.replay"),
        ("gad", "gad.discriminator_rests_above"),
    } <= named


def test_every_alarm_is_in_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "alarms.md").read_text(encoding="utf-8")
    catalogue = text[text.index("## The catalogue") :]
    assert re.findall(r"^\| `([a-z-]+)` \|", catalogue, flags=re.MULTILINE) == list(KINDS)


def test_a_band_holds_the_mean_of_what_it_was_drawn_from() -> None:
    rng = random.Random(0)
    outside = 0
    for _ in range(1000):
        band = mean_band([rng.gauss(1.0, 0.5) for _ in range(rng.randint(5, 40))])
        outside += not band.low <= 1.0 <= band.high
    assert outside < 10


def test_noise_that_follows_itself_is_no_trend() -> None:
    rng = random.Random(1)
    trends = 0
    for _ in range(500):
        value, walk = 0.0, []
        for _ in range(40):
            value = 0.6 * value + rng.gauss(0.0, 1.0)
            walk.append(value)
        band = change_band(walk)
        trends += band.is_above(0.0) or band.is_below(0.0)
    assert trends < 15


def test_a_slip_in_the_name_of_an_alarm_is_a_mistake_of_the_recipe(recipe_file: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'collapse'"):
        load_recipe(recipe_file, ["alarms.actions.colapse=stop"])
    with pytest.raises(ConfigError, match=r"skip_discriminator.*does not help there"):
        load_recipe(recipe_file, ["alarms.actions.drift=skip_discriminator"])


def test_resting_is_for_alarms_that_it_helps() -> None:
    config = AlarmsConfig(action="skip_discriminator", actions={"collapse": "stop"})
    assert config.action_on("too-strong") == "skip_discriminator"
    assert config.action_on("drift") == "warn"
    assert config.action_on("collapse") == "stop"
    # What is wrong with weights that rest stays wrong.
    assert config.action_on("score-explosion") == "warn"
    assert config.action_on("memorises") == "warn"
