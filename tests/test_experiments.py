"""The proving ground: verdicts by hand-worked numbers, and what is kept of results."""

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from experiments.experiment import FOLDER, Claim, load_experiment, names
from experiments.pages import page
from experiments.ranking import in_group_ranking, rank_share
from experiments.results import Results, Verdict
from gadfly.data.dataset import load_rows
from gadfly.discriminator import load_discriminator, read_scores
from gadfly.engine import Engine
from gadfly.errors import ConfigError
from gadfly.groups import Branch, reread, teacher_group
from gadfly.recipe_file import load_recipe
from gadfly.records import Row
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup

CLAIM = Claim(says="a is above b", better="a", worse="b")


def results(a: list[float], b: list[float]) -> Results:
    seeds = tuple(range(1, len(a) + 1))
    figures = {
        "a": {"s/f": dict(zip(seeds, a, strict=True))},
        "b": {"s/f": dict(zip(seeds, b, strict=False))},
    }
    return Results(seeds, figures, {}, {})


def verdict_of(a: list[float], b: list[float], claim: Claim = CLAIM) -> Verdict:
    (verdict,) = results(a, b).verdicts([claim], "s/f")
    return verdict


def test_a_claim_holds_where_the_interval_of_its_paired_difference_is_above_zero() -> None:
    verdict = verdict_of([0.5, 0.7, 0.6], [0.2, 0.4, 0.3])
    assert verdict.word == "holds"
    assert verdict.difference is not None
    assert verdict.difference.value == pytest.approx(0.3)


def test_a_claim_does_not_hold_where_the_interval_is_below_zero() -> None:
    assert verdict_of([0.2, 0.41, 0.3], [0.5, 0.7, 0.6]).word == "does not hold"


def test_where_lower_is_better_the_verdict_is_the_opposite() -> None:
    lower = CLAIM.model_copy(update={"lower_is_better": True})
    assert verdict_of([0.2, 0.41, 0.3], [0.5, 0.7, 0.6], lower).word == "holds"


def test_an_interval_around_zero_is_unclear() -> None:
    # Differences -0.3, 0.4, 0.2: mean 0.1, and t = 4.30 at two degrees of freedom makes it about +- 0.9.
    assert verdict_of([0.2, 0.8, 0.5], [0.5, 0.4, 0.3]).word == "unclear"


def test_one_seed_decides_nothing() -> None:
    assert verdict_of([0.9], [0.1]).word == "unclear"


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    difference = verdict_of([0.5, 0.7, 0.6], [0.2, 0.4]).difference
    assert difference is not None
    assert difference.n == 2


def test_an_arm_that_was_not_run_has_no_verdict() -> None:
    assert verdict_of([0.5], []).word == "not run"


def test_p_values_are_those_of_the_paired_t_test_corrected_by_holm() -> None:
    # Differences 0.3, 0.5, 0.4: t = 0.4 / (0.1 / sqrt 3) = 6.928, and p = 1 - t / sqrt(t^2 + 2) at two
    # degrees of freedom. The other way round has the same, and what was not run counts for nothing.
    other = CLAIM.model_copy(update={"better": "b", "worse": "a"})
    missing = CLAIM.model_copy(update={"better": "c"})
    alone = 1 - 6.928203 / (6.928203**2 + 2) ** 0.5
    good = results([0.5, 0.9, 0.7], [0.2, 0.4, 0.3])
    assert [v.p for v in good.verdicts([CLAIM], "s/f")] == [pytest.approx(alone)]
    corrected = [v.p for v in good.verdicts([CLAIM, missing, other], "s/f")]
    assert corrected == [pytest.approx(2 * alone), None, pytest.approx(2 * alone)]


def test_holm_multiplies_the_least_p_by_the_number_of_claims_and_the_others_by_fewer() -> None:
    figures = {
        "a": {"strong": {1: 0.5, 2: 0.9, 3: 0.7}, "weak": {1: 0.5, 2: 0.9, 3: 0.4}},
        "b": {"strong": {1: 0.2, 2: 0.4, 3: 0.3}, "weak": {1: 0.2, 2: 0.4, 3: 0.3}},
    }
    made = Results((1, 2, 3), figures, {}, {})
    strong, weak = (CLAIM.model_copy(update={"figure": f"{name}"}) for name in ("strong", "weak"))
    (alone,), (weak_alone,) = (made.verdicts([claim], "") for claim in (strong, weak))
    first, second = made.verdicts([weak, strong], "")
    assert alone.p is not None
    assert weak_alone.p is not None
    assert second.p == pytest.approx(2 * alone.p)
    assert first.p == pytest.approx(max(weak_alone.p, 2 * alone.p))


@pytest.mark.parametrize(("b", "p"), [([0.5, 0.5], 1.0), ([0.25, 0.25], 0.0)])
def test_differences_without_spread_need_no_test(b: list[float], p: float) -> None:
    assert verdict_of([0.5, 0.5], b).p == p
    assert verdict_of([0.5], b[:1]).p is None


def test_kept_results_of_a_seed_that_settings_were_chosen_on_are_left_out() -> None:
    left = Results((1, 2), {"a": {"f": {1: 0.1, 2: 0.2}}, "b": {"f": {1: 0.3}}}, {"a": {1: 9.0}}, {}).without(
        [1]
    )
    assert left == Results((2,), {"a": {"f": {2: 0.2}}}, {}, {})


def test_an_unknown_experiment_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigError, match=r"no experiment 'nothing'; there are .*mixture"):
        load_experiment("nothing")


@pytest.mark.parametrize("name", names())
def test_every_experiment_asks_only_of_arms_and_figures_it_has(name: str) -> None:
    experiment = load_experiment(name)
    for claim in experiment.claims:
        assert {claim.better, claim.worse} <= experiment.titles.keys()
        assert claim.figure is None or claim.figure in experiment.figures
    assert experiment.figure in experiment.figures


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_right_with_the_settings_of_every_arm(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    for settings in [experiment.quick, *(arm.settings for arm in experiment.arms.values())]:
        own = [setting.replace("{seed}", str(tmp_path)) for setting in settings]
        recipe = load_recipe(experiment.recipe_file, own)
        assert set(recipe.generate.checkpoints) in (set(experiment.models), {"gad/best"})


def test_an_experiment_like_another_differs_in_what_it_says_itself_and_has_claims_of_its_own() -> None:
    own, other = load_experiment("ten-classes"), load_experiment("mixture")
    assert (own.figures, own.models, own.recipe_file) == (other.figures, other.models, other.recipe_file)
    assert own.ground_settings["classes"] == 10
    assert other.arms
    assert not own.arms
    assert own.origins([], own.ground_settings)["gad"] != other.origins([], other.ground_settings)["gad"]


def test_every_claim_of_the_paper_is_listed_with_the_verdict_of_each_experiment() -> None:
    text = page()
    _, listed, *experiments = text.split("\n## ")
    rows = [line.split(" | ", 2) for line in listed.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len({(claim, where, said) for claim, where, said in rows}) > 8
    for _, where, said in rows:
        name = where.partition("]")[0].removeprefix("[")
        (block,) = (part for part in experiments if f"](../experiments/{name}/README.md)" in part)
        assert f"\n| {said}" in block


def test_the_page_of_results_is_as_the_experiments_have_it() -> None:
    assert (FOLDER.parent / "docs" / "results.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("name", names())
def test_every_readme_has_a_place_for_results(name: str) -> None:
    readme = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert re.search(r"<!-- results: .* -->\n.*<!-- end of results -->", readme, re.DOTALL)


def test_pairs_of_a_good_and_a_bad_sample_count_one_or_half_for_a_tie() -> None:
    # 2 > 1, 2 > 0, 1 = 1, 1 > 0: three and a half of four.
    assert rank_share([2.0, 1.0, 1.0, 0.0], [1, 1, 0, 0]) == 3.5 / 4


def test_pairs_of_equal_worth_count_nothing() -> None:
    # .9 over each of the others, and .5 over .2 twice: of these five, only -1 over 0 is not scored so.
    assert rank_share([2.0, 1.0, -1.0, 0.0], [0.9, 0.5, 0.5, 0.2]) == 4 / 5


def test_samples_are_ranked_by_their_own_scores(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file)) as run:
        warmup(run)
        checkpoint = (run.folder.stage("warmup") / "latest").resolve()
        model, renderer = load_discriminator(checkpoint / "discriminator", "float32")
        rows = load_rows(run.recipe.data.train or "", needs_response=True).rows[:6]

        def score(row: Row, branch: Branch) -> float:
            group = replace(teacher_group(row, renderer, 12), teachers=(), students=(branch,))
            engine = Engine(model, read_scores, micro_batch_tokens=1000)
            return float(engine.forward(reread([group], [row], renderer)).values)

        seen: list[float] = []
        assert in_group_ranking(run, checkpoint, rows, lambda *one: bool(seen.append(score(*one)))) is None
        middle = median(seen)
        above = in_group_ranking(run, checkpoint, rows, lambda *one: score(*one) > middle)
        below = in_group_ranking(run, checkpoint, rows, lambda *one: score(*one) <= middle)
    assert above is not None
    assert below is not None
    assert (above.value, below.value) == (1.0, 0.0)


def test_results_of_other_seeds_and_arms_are_kept_beside_new_ones() -> None:
    origins = {"gad": "1", "dpo": "2", "oracle": "3"}
    facts = {"experiment": "x", "command": "c", "packages": {}, "origins": origins}
    old = Results(
        (1, 2),
        {"gad": {"f": {1: 0.1, 2: 0.2}}, "dpo": {"f": {1: 0.5}}},
        {"gad": {1: 10.0, 2: 20.0}},
        facts | {"date": "2026-01-01", "machine": "a"},
    )
    new = Results(
        (2, 3),
        {"gad": {"f": {2: 0.3, 3: 0.4}, "g": {3: 1.0}}, "oracle": {"f": {3: 0.9}}},
        {"gad": {3: 30.0}},
        facts | {"date": "2026-02-02", "machine": "b"},
    )
    both = new.with_earlier(Results.of_record(json.loads(json.dumps(old.as_record()))))
    assert both.seeds == (1, 2, 3)
    assert both.figures["gad"] == {"f": {1: 0.1, 2: 0.3, 3: 0.4}, "g": {3: 1.0}}
    assert (both.figures["dpo"], both.figures["oracle"]) == ({"f": {1: 0.5}}, {"f": {3: 0.9}})
    assert both.seconds == {"gad": {1: 10.0, 2: 20.0, 3: 30.0}}
    assert both.facts == facts | {"date": "2026-02-02", "machine": "a; b"}
    other = replace(old, facts={**old.facts, "command": "c gad.group_size=2"})
    assert new.with_earlier(other) == new


def test_results_of_another_recipe_or_arm_of_that_name_are_not_kept() -> None:
    facts = {"experiment": "x", "command": "c", "packages": {}, "date": "2026-01-01", "machine": "a"}
    figures = {"gad": {"f": {1: 0.1}}, "dpo": {"f": {1: 0.5}}}

    def made_by(gad: str, dpo: str) -> Results:
        return Results((1,), figures, {}, facts | {"origins": {"gad": gad, "dpo": dpo}})

    now = replace(made_by("1", "2"), seeds=(2,), figures={"gad": {"f": {2: 0.3}}})
    assert now.with_earlier(made_by("1", "2")).figures["dpo"] == {"f": {1: 0.5}}
    assert now.with_earlier(made_by("1", "9")).figures == {"gad": {"f": {1: 0.1, 2: 0.3}}}
    assert now.with_earlier(made_by("9", "2")) == now


def test_what_is_kept_of_results_is_what_the_readmes_say() -> None:
    text = page()
    for file in FOLDER.glob("*/results.json"):
        readme = (file.parent / "README.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"<!-- results: .* -->\n\n(.*)\n<!-- end of results -->", readme, re.DOTALL)
        assert block.replace("](figure.svg)", f"](../experiments/{file.parent.name}/figure.svg)") in text
        record = json.loads(file.read_text(encoding="utf-8"))
        gad = record["figures"]["gad"][load_experiment(record["experiment"]).figure]
        assert sorted(map(int, gad)) == record["seeds"]
        assert f"{sum(gad.values()) / len(gad):.3f}" in block
