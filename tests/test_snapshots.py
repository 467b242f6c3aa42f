"""Earlier discriminators score with their own weights, and leave the live one as it was, bit for bit."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from side_by_side import side_by_side
from tiny import random_groups
from torch import Tensor

from gadfly.config import DiscriminatorConfig
from gadfly.discriminator import load_discriminator, new_discriminator, read_scores, save_discriminator
from gadfly.distributed.processes import Processes
from gadfly.engine import Engine
from gadfly.groups import retokenised
from gadfly.lora import SharedBase
from gadfly.models import load_language_model
from gadfly.stages.snapshots import Snapshot, earlier_discriminators, with_snapshot

GROUPS = random_groups(3, 6)


def engine_of(model: torch.nn.Module, processes: Processes | None = None) -> Engine:
    return Engine(
        model,
        read_scores,
        micro_batch_tokens=4096,
        optimizer=DiscriminatorConfig(),
        processes=processes,
    )


def saved(model_folder: Path, folder: Path) -> Snapshot:
    """A discriminator with weights of its own, saved as one of a checkpoint."""
    model, renderer = new_discriminator(str(model_folder), "float32", seed=7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5).add_(0.01)
    save_discriminator(model, renderer, folder, retokenised(GROUPS[:1], renderer))
    return Snapshot("warmup-000001", folder)


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def live(tiny_model: Path) -> Engine:
    return engine_of(new_discriminator(str(tiny_model), "float32", seed=0)[0])


def test_it_scores_as_the_saved_discriminator_does(tiny_model: Path, tmp_path: Path, live: Engine) -> None:
    snapshot = saved(tiny_model, tmp_path / "d")
    own = live.forward(GROUPS).values
    scores = with_snapshot(snapshot, live.model, Processes(), lambda: live.forward(GROUPS))
    loaded, _ = load_discriminator(snapshot.folder)
    assert scores is not None
    assert torch.equal(scores.values, engine_of(loaded).forward(GROUPS).values)
    assert not torch.allclose(scores.values, own, rtol=0.1)


def test_afterwards_weights_optimiser_and_scores_are_those_from_before(
    tiny_model: Path, tmp_path: Path, live: Engine
) -> None:
    snapshot = saved(tiny_model, tmp_path / "d")
    before, scores, moments = state(live.model), live.forward(GROUPS).values, live.optimizer_state()
    moments = {name: value.clone() for name, value in moments.items()}
    with_snapshot(snapshot, live.model, Processes(), lambda: live.forward(GROUPS))
    assert same(state(live.model), before)
    assert torch.equal(live.forward(GROUPS).values, scores)
    assert same(live.optimizer_state(), moments)


def test_so_they_are_when_scoring_fails(tiny_model: Path, tmp_path: Path, live: Engine) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    before = state(live.model)
    with pytest.raises(RuntimeError, match="out of memory"):
        with_snapshot(saved(tiny_model, tmp_path / "d"), live.model, Processes(), fail)
    assert same(state(live.model), before)


def without_head(folder: Path) -> None:
    (folder / "score_head.safetensors").unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4000])


def gone(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize("damage", [without_head, cut, gone])
def test_one_that_cannot_be_read_is_left_out_with_a_warning(
    tiny_model: Path,
    tmp_path: Path,
    live: Engine,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    snapshot = saved(tiny_model, tmp_path / "d")
    damage(snapshot.folder)
    before = state(live.model)
    with caplog.at_level(logging.WARNING):
        assert with_snapshot(snapshot, live.model, Processes(), lambda: 1) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"warmup-000001 scores nothing: {snapshot.folder}: ")
    assert same(state(live.model), before)


def test_an_adapter_is_read_into_the_live_one(tiny_model: Path, tmp_path: Path) -> None:
    model, renderer = load_language_model(str(tiny_model), "float32")
    shared = SharedBase(model, renderer, str(tiny_model), rank=2, alpha=4, seed=0)
    earlier, _ = new_discriminator(str(tiny_model), "float32", 0, shared)
    with torch.no_grad():
        for weight in earlier.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    expected = engine_of(earlier).forward(GROUPS).values
    save_discriminator(earlier, renderer, tmp_path / "d", retokenised(GROUPS[:1], renderer))
    live = engine_of(new_discriminator(str(tiny_model), "float32", 0, shared)[0])
    before = state(live.model)
    scores = with_snapshot(
        Snapshot("warmup", tmp_path / "d"), live.model, Processes(), lambda: live.forward(GROUPS)
    )
    assert scores is not None
    assert torch.equal(scores.values, expected)
    assert same(state(live.model), before)


def scored_in_shards(processes: Processes, model: Path, folder: Path) -> tuple[list[float], bool]:
    engine = engine_of(new_discriminator(str(model), "float32", seed=0)[0], processes)
    # FSDP puts its shards together only after a pass.
    own = engine.forward(GROUPS).values
    shards = [weight.to_local().clone() for weight in engine.model.parameters()]
    scores = with_snapshot(
        Snapshot("warmup", folder), engine.model, processes, lambda: engine.forward(GROUPS)
    )
    assert scores is not None
    pairs = zip(shards, engine.model.parameters(), strict=True)
    is_same = all(torch.equal(before, weight.to_local()) for before, weight in pairs)
    return scores.values.tolist(), is_same and torch.equal(engine.forward(GROUPS).values, own)


@pytest.mark.slow
def test_on_two_processes_shards_are_filled_and_put_back(tiny_model: Path, tmp_path: Path) -> None:
    snapshot = saved(tiny_model, tmp_path / "d")
    loaded, _ = load_discriminator(snapshot.folder)
    expected = engine_of(loaded).forward(GROUPS).values.tolist()
    results = side_by_side(scored_in_shards, tiny_model, snapshot.folder)
    assert results == [(pytest.approx(expected, rel=1e-5), True)] * 2


def refused_by_one(processes: Processes, model: Path, folder: Path) -> bool:
    engine = engine_of(new_discriminator(str(model), "float32", seed=0)[0], processes)
    # As where a network disk shows one machine what it does not show the other yet.
    seen = folder if processes.rank == 0 else folder.with_name("elsewhere")
    return with_snapshot(Snapshot("warmup", seen), engine.model, processes, lambda: 1) is None


@pytest.mark.slow
def test_one_that_a_single_process_cannot_read_is_left_out_by_all(tiny_model: Path, tmp_path: Path) -> None:
    assert side_by_side(refused_by_one, tiny_model, saved(tiny_model, tmp_path / "d").folder) == [True, True]


def checkpoints(stage: Path, *steps: int) -> None:
    for step in steps:
        (stage / f"step-{step:06d}").mkdir(parents=True)


def test_gad_looks_back_on_what_it_began_with_and_on_the_newest_it_saved(tmp_path: Path) -> None:
    gad, warmup = tmp_path / "gad", tmp_path / "warmup"
    assert earlier_discriminators(gad) == []
    checkpoints(warmup, 100, 250)
    began = Snapshot("warmup", warmup / "step-000250" / "discriminator")
    assert earlier_discriminators(gad) == [began]
    checkpoints(gad, 50, 100)
    newest = Snapshot("gad-000100", gad / "step-000100" / "discriminator")
    assert earlier_discriminators(gad) == [began, newest]
    elsewhere = tmp_path / "other" / "step-000007"
    assert earlier_discriminators(gad, elsewhere) == [Snapshot("warmup", elsewhere / "discriminator"), newest]


def test_warmup_looks_back_on_itself(tmp_path: Path) -> None:
    checkpoints(tmp_path / "warmup", 100, 250)
    assert [one.name for one in earlier_discriminators(tmp_path / "warmup")] == ["warmup-000250"]
