"""What asking an API has cost, and the budget that is never crossed."""

import asyncio
import math
from dataclasses import dataclass
from typing import TypeGuard

from gadfly.config import ApiConfig


class BudgetSpent(Exception):
    """This request might cross the budget, and none is in flight that could turn out cheaper."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer as the server counted them.

    Example:
        >>> Usage(10, 5) + Usage(1, 1)
        Usage(prompt_tokens=11, completion_tokens=6)
        >>> Usage(10, 5).total
        15
    """

    prompt_tokens: int
    completion_tokens: int

    @property
    def total(self) -> int:
        """Tokens of question and answer together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        """Both together."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens
        )

    def __sub__(self, other: "Usage") -> "Usage":
        """By how much this is more; may be negative."""
        return Usage(
            self.prompt_tokens - other.prompt_tokens, self.completion_tokens - other.completion_tokens
        )


NOTHING = Usage(0, 0)

# More tokens than all the text there is: no count of one answer.
_MOST_TOKENS = 2**53


def is_count(value: object) -> TypeGuard[int]:
    """Whether this is a number of tokens: a server or a file may say anything.

    Example:
        >>> [is_count(value) for value in (3, -1, True, 10**400, "3")]
        [True, False, False, False, False]
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS


def spell_dollars(dollars: float) -> str:
    """An amount to show, in enough digits to see that it is not nothing.

    Example:
        >>> [spell_dollars(amount) for amount in (0.0, 0.00123, 1234.5)]
        ['$0.00', '$0.0012', '$1,234.50']
    """
    return f"${dollars:,.2f}" if dollars >= 0.1 or dollars == 0 else f"${dollars:.2g}"


class Spending:
    """Counts requests, tokens and dollars; a request is reserved at its upper bound before it is sent.

    Example:
        >>> from gadfly.config import ApiConfig
        >>> spending = Spending(ApiConfig(price={"input": 1.0, "output": 2.0}))
        >>> spending.add(Usage(1_000_000, 500_000))
        >>> spending.dollars
        2.0
    """

    def __init__(self, config: ApiConfig):
        """Price and budget as in the recipe."""
        self._price, self._budget = config.price, config.budget
        self.requests = 0
        """Sent so far, repeated ones included."""
        self.used = NOTHING
        """Tokens paid for so far. What broke off counts at its upper bound, since it may have been paid."""
        self._reserved = NOTHING
        self._num_in_flight = 0
        # By how much any answer exceeded what was held to be its bound: the next ones may do so as well.
        self._excess = NOTHING
        self._settled = asyncio.Event()

    @property
    def dollars(self) -> float | None:
        """What the answers cost so far; None without a price."""
        return self.cost(self.used)

    def cost(self, usage: Usage) -> float | None:
        """Dollars of so many tokens; None without a price."""
        if self._price is None:
            return None
        cost = usage.prompt_tokens * self._price.input + usage.completion_tokens * self._price.output
        return cost / 1e6

    def add(self, usage: Usage) -> None:
        """Count the tokens of an answer."""
        self.used += usage

    async def reserve(self, bound: Usage) -> None:
        """Wait until a request of at most so many tokens fits into the budget, and count it as sent.

        Raises:
            BudgetSpent: it does not fit, and nothing in flight can change that.
        """
        while not self.fits(bound):
            if not self._num_in_flight:
                raise BudgetSpent
            self._settled.clear()
            await self._settled.wait()
        self.hold(bound)

    def hold(self, bound: Usage) -> None:
        """Count a request of at most so many tokens as sent; `fits` has been asked."""
        self._reserved += bound
        self._num_in_flight += 1
        self.requests += 1

    def release(self, bound: Usage, used: Usage | None) -> None:
        """Replace a reservation by what was used: nothing if there was no answer."""
        self._free(bound)
        if used is None:
            return
        self.add(used)
        more = used - bound
        self._excess = Usage(
            max(self._excess.prompt_tokens, more.prompt_tokens),
            max(self._excess.completion_tokens, more.completion_tokens),
        )

    def withdraw(self, bound: Usage) -> None:
        """Take back a reservation: the request was not sent after all."""
        self._free(bound)
        self.requests -= 1

    def _free(self, bound: Usage) -> None:
        self._reserved -= bound
        self._num_in_flight -= 1
        self._settled.set()

    def fits(self, bound: Usage) -> bool:
        """Whether one more request of at most so many tokens cannot cross the budget."""
        budget, num_open = self._budget, self._num_in_flight + 1
        if budget.requests is not None and self.requests + 1 > budget.requests:
            return False
        if budget.tokens is None and budget.dollars is None:
            return True
        excess = Usage(self._excess.prompt_tokens * num_open, self._excess.completion_tokens * num_open)
        at_most = self.used + self._reserved + bound + excess
        return at_most.total <= (math.inf if budget.tokens is None else budget.tokens) and (
            self.cost(at_most) or 0.0
        ) <= (math.inf if budget.dollars is None else budget.dollars)
