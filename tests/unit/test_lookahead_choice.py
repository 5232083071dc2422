"""Whether tokens look ahead is measured, on a clock that the test has."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest

from fomoe_io import EngineConfig
from fomoe_io.cli.options import add_engine_options
from fomoe_io.cli.parser import Parser
from fomoe_io.errors import UsageError
from fomoe_io.experts import lookahead
from fomoe_io.experts.lookahead import Lookahead, spare_buffers

STRETCH, TRIAL = lookahead.STRETCH_TOKENS, lookahead.STRETCHES * lookahead.STRETCH_TOKENS
LONG_TRIAL = lookahead.LONG_STRETCHES * lookahead.STRETCH_TOKENS
MS = 1_000_000


class Clock:
    """Tokens take so many milliseconds with lookahead and without, times `factor(number, is_on)`."""

    def __init__(self, on: float, off: float, factor: Callable[[int, bool], float] = lambda number, is_on: 1.0) -> None:
        self.now, self.count, self._times, self._factor = 1 << 40, 0, {True: on, False: off}, factor

    def __call__(self) -> int:
        return self.now

    def token(self, choice: Lookahead) -> bool:
        is_on = choice.begin()
        self.now += int(MS * self._times[is_on] * self._factor(self.count, is_on))
        self.count += 1
        choice.end()
        return is_on

    def tokens(self, choice: Lookahead, count: int) -> list[bool]:
        return [self.token(choice) for _ in range(count)]


def noise(seed: int, part: float = 0.2) -> Callable[[int, bool], float]:
    random = np.random.default_rng(seed)
    return lambda number, is_on: random.uniform(1 - part, 1 + part)


@pytest.mark.parametrize(("on", "off"), [(90, 100), (100, 100), (99, 98)])
def test_it_begins_with_it_and_a_short_trial_is_enough(on: float, off: float) -> None:
    clock = Clock(on, off)
    choice = Lookahead("auto", clock)
    assert all(clock.tokens(choice, lookahead.WARM_TOKENS)) and choice.is_on
    trial = clock.tokens(choice, TRIAL)
    assert trial == trial[::-1] and trial.count(False) == TRIAL // 2 <= 8  # what changes steadily adds to both alike
    assert choice.trials == 1 and choice.is_on
    assert all(clock.tokens(choice, lookahead.SETTLED_TOKENS))
    assert not all(clock.tokens(choice, TRIAL)) and choice.trials == 2


def test_what_is_in_force_loses_a_long_trial_only_and_may_come_back() -> None:
    clock = Clock(110, 100)
    choice = Lookahead("auto", clock)
    clock.tokens(choice, lookahead.WARM_TOKENS + TRIAL)
    assert choice.is_on and choice.trials == 0  # it has lost a short one
    clock.tokens(choice, LONG_TRIAL - TRIAL)
    assert not choice.is_on and choice.trials == 1
    assert not any(clock.tokens(choice, lookahead.SETTLED_TOKENS))
    later = Clock(90, 100)  # the text has changed
    later.now, choice._clock = clock.now, later
    later.tokens(choice, LONG_TRIAL)
    assert choice.is_on and choice.trials == 2 and all(later.tokens(choice, lookahead.SETTLED_TOKENS))


def ended(clock: Clock, tokens: int = lookahead.WARM_TOKENS + LONG_TRIAL) -> bool:
    """What is in force after a first trial."""
    choice = Lookahead("auto", clock)
    clock.tokens(choice, tokens)
    assert choice.trials == 1
    return choice.is_on


def test_noise_of_a_fifth() -> None:
    """A tenth is found in nearly every run, a fifth lost hardly ever kept, whatever a token's own reads take."""
    runs = range(200)
    assert sum(ended(Clock(90, 100, noise(seed))) for seed in runs) >= 190
    assert sum(ended(Clock(120, 100, noise(seed))) for seed in runs) <= 20


def test_the_first_tokens_after_a_cold_start() -> None:
    """Empty slots: the first tokens take three times as long, and no trial has begun when that was worst."""
    for on, off, tolerated in ((90, 100, 10), (120, 100, 20)):
        wrong = 0
        for seed in range(200):
            varies = noise(seed)
            clock = Clock(on, off, lambda number, is_on, varies=varies: varies(number, is_on) * (1 + 2 * 0.9**number))
            wrong += ended(clock) != (on < off)
        assert wrong <= tolerated


@pytest.mark.parametrize(("on", "off"), [(90, 100), (110, 100)])
@pytest.mark.parametrize("every", [1, 5, 7, 16])
def test_pauses_of_a_client_are_nobodys_time(on: float, off: float, every: int) -> None:
    """It thinks, or prompts are read, and the next tokens are slow: they are not counted; what is in force stays where
    hardly any is left."""
    clock = Clock(on, off, lambda number, is_on: 1 + 5 * 0.2 ** (number % every))
    choice = Lookahead("auto", clock)
    for number in range(lookahead.WARM_TOKENS + LONG_TRIAL):
        if number % every == 0:
            clock.now += 400 * MS
        clock.token(choice)
    assert choice.trials == 1 and choice.is_on == (on < off or every < 7)


def test_one_token_that_was_held_up_counts_as_one() -> None:
    for on, off in ((90, 100), (110, 100)):
        for slow in range(lookahead.WARM_TOKENS, lookahead.WARM_TOKENS + TRIAL):
            clock = Clock(on, off, lambda number, is_on, slow=slow: 1000.0 if number == slow else 1.0)
            assert ended(clock) == (on < off)


def test_what_was_asked_for_is_done_without_a_clock() -> None:
    def clock() -> int:
        raise AssertionError

    for mode, is_on in (("on", True), ("off", False)):
        choice = Lookahead(mode, clock)  # type: ignore[arg-type]
        for _ in range(LONG_TRIAL):
            assert choice.begin() is is_on is choice.is_on
            choice.end()


def test_a_token_that_failed_is_not_counted() -> None:
    clock = Clock(90, 100)
    choice = Lookahead("auto", clock)
    clock.tokens(choice, lookahead.WARM_TOKENS + 1)
    for _ in range(2 * LONG_TRIAL):
        choice.begin()
    assert choice.trials == 0
    clock.tokens(choice, TRIAL - 1)
    assert choice.trials == 1


def test_the_option() -> None:
    assert [EngineConfig(lookahead=v).lookahead_mode for v in ("off", 0, "on", "3", "auto")] == [  # type: ignore[arg-type]
        "off", "off", "on", "on", "auto"
    ]  # fmt: skip
    assert EngineConfig().lookahead == "auto"
    assert [EngineConfig(lookahead=v).guesses_of(8) for v in ("0", "on", 3, "12", "auto")] == [0, 8, 3, 8, 8]  # type: ignore[arg-type]
    assert EngineConfig(lookahead="on").guesses_of(32) == 16
    for wrong in ("yes", 17, "17", -1, "-1", "3.0", True):
        with pytest.raises(UsageError, match="lookahead"):
            EngineConfig(lookahead=wrong)  # type: ignore[arg-type]


def test_the_option_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("fomoe-test")
    add_engine_options(parser)
    given = [parser.parse_args(["--lookahead", v]).lookahead for v in ("on", "off", "auto", "6")]
    assert given == ["on", 0, "auto", 6] and parser.parse_args([]).lookahead == "auto"
    with pytest.raises(SystemExit):
        parser.parse_args(["--lookahead", "maybe"])
    assert "'maybe' is none of on, off, auto" in capsys.readouterr().err


# ---- buffers ----

LAYERS, EXPERT, USED = range(8), 1 << 20, 8


def buffers(
    slots: float, more: int = 0, *, least: int = USED, most: int = 64, layers: Collection[int] = LAYERS, **of: Any
) -> int:
    """Of "auto", where so many slots of each layer fit, and so many experts more."""
    row = len(LAYERS) * EXPERT
    how = {"least": least * row, "most": most * row, "is_all": most == 64} | of
    return spare_buffers("auto", USED, layers, EXPERT, int(slots * row) + more * EXPERT, **how)


def test_buffers_cost_nothing_that_matters() -> None:
    assert buffers(32) == USED  # of 256
    assert [buffers(slots) for slots in (28, 20, 16)] == [7, 5, 4]  # one in 32
    assert buffers(15.9) == buffers(12) == buffers(8) == 0  # or nothing, where that is less than half
    assert [buffers(20, more, least=20) for more in (-8, 0, 3, 4, 5, 64)] == [0, 0, 0, 4, 5, 7]  # slots come first
    assert [buffers(slots, layers_ahead=2) for slots in (63, 48, 32, 15)] == [15, 12, 8, 0]
    assert buffers(2, least=0, elsewhere=30 * len(LAYERS) * EXPERT) == USED  # what counts is what experts have in all


def test_no_buffers_where_nothing_is_missed_or_guessed() -> None:
    assert buffers(64) == buffers(80) == 0 and buffers(63, 7) == USED
    assert buffers(12, most=12, is_all=False) == 0 and buffers(13, most=12) == USED  # no use for more slots
    assert buffers(12, least=12, most=12) == 0 and buffers(12, 6, least=12, most=12) == 6  # --slots 12
    for alone in ((0,), (0, 2, 4, 6), ()):
        assert buffers(32, layers=alone) == 0


def test_buffers_that_were_asked_for_are_taken() -> None:
    assert spare_buffers("on", 5, (0,), EXPERT, 0, least=0, most=0, is_all=True) == 5
    assert spare_buffers("on", 5, (0,), EXPERT, 0, least=0, most=0, is_all=True, layers_ahead=2) == 10
    assert spare_buffers("off", 0, LAYERS, EXPERT, 1 << 40, least=0, most=0, is_all=False) == 0
