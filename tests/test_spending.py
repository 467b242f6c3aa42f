"""What is spent, and that no order of sending and answering crosses a budget."""

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gadfly.api.spending import BudgetSpent, Spending, Usage
from gadfly.config import ApiConfig

PRICE = {"input": 2e5, "output": 1e6}  # 0.2 and 1 dollar a token


def spending(**budget: Any) -> Spending:
    return Spending(ApiConfig(price=PRICE, max_response_tokens=10, budget=budget))  # type: ignore[arg-type]


def test_without_a_price_there_is_no_cost() -> None:
    free = Spending(ApiConfig())
    free.add(Usage(10, 10))
    assert free.dollars is None


def test_what_a_request_did_not_use_can_be_used_by_another() -> None:
    async def ask() -> None:
        kept = spending(tokens=30)
        bound = Usage(10, 10)
        await kept.reserve(bound)
        waiting = asyncio.create_task(kept.reserve(bound))
        await asyncio.sleep(0)
        assert not waiting.done()
        kept.release(bound, Usage(5, 5))
        await waiting
        assert kept.requests == 2
        kept.release(bound, Usage(10, 10))
        with pytest.raises(BudgetSpent):
            await kept.reserve(Usage(1, 0))

    asyncio.run(ask())


def test_a_request_that_was_not_sent_is_not_counted() -> None:
    async def ask() -> None:
        kept = spending(requests=1)
        await kept.reserve(Usage(1, 1))
        kept.withdraw(Usage(1, 1))
        await kept.reserve(Usage(1, 1))
        assert kept.requests == 1

    asyncio.run(ask())


def test_one_answer_over_its_bound_makes_the_next_bounds_larger() -> None:
    kept = spending(tokens=100)
    kept.hold(Usage(10, 10))
    kept.release(Usage(10, 10), Usage(40, 10))
    assert kept.fits(Usage(10, 10))
    assert not kept.fits(Usage(10, 11))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    limit=st.integers(0, 400),
    kind=st.sampled_from(["tokens", "dollars", "requests"]),
)
def test_no_order_of_answers_crosses_a_budget_and_what_is_left_fits_no_question(
    seed: int, limit: int, kind: str
) -> None:
    rng = random.Random(seed)
    if kind == "requests":
        limit = 1 + limit // 20
    kept = spending(**{kind: max(limit, 1) if kind != "dollars" else float(limit)})
    bounds = [Usage(rng.randint(1, 20), rng.randint(1, 20)) for _ in range(40)]
    spent: list[Usage] = []
    refused: list[Usage] = []

    async def ask(bound: Usage) -> None:
        for _ in range(3):
            try:
                await kept.reserve(bound)
            except BudgetSpent:
                refused.append(bound)
                return
            for _ in range(rng.randint(0, 5)):
                await asyncio.sleep(0)
            if rng.random() < 0.3:
                kept.release(bound, None)
                continue
            used = Usage(rng.randint(0, bound.prompt_tokens), rng.randint(0, bound.completion_tokens))
            spent.append(used)
            kept.release(bound, used)
            return

    async def ask_all() -> None:
        await asyncio.gather(*map(ask, bounds))

    asyncio.run(ask_all())
    total = sum(spent, Usage(0, 0))
    assert kept.used == total
    if kind == "tokens":
        assert total.total <= limit or limit == 0
    elif kind == "dollars":
        assert 0.2 * total.prompt_tokens + total.completion_tokens <= limit + 1e-9
    else:
        assert kept.requests <= limit
    assert not any(kept.fits(bound) for bound in refused)
