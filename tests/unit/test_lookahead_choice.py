"""Whether tokens look ahead is measured, on a clock that the test has."""

from __future__ import annotations

import pytest

from fomoe_io import EngineConfig
from fomoe_io.cli.options import add_engine_options
from fomoe_io.cli.parser import Parser
from fomoe_io.errors import UsageError
from fomoe_io.experts import lookahead
from fomoe_io.experts.lookahead import Lookahead

TRIAL = lookahead.WARM_TOKENS + lookahead.STRETCHES * lookahead.STRETCH_TOKENS


class Clock:
    """Tokens take so long with lookahead and without; the `nth` token takes a thousand times as long."""

    def __init__(self, on: int, off: int, slow: int = -1) -> None:
        self.now, self._times, self._slow, self._count = 0, {True: on, False: off}, slow, 0

    def __call__(self) -> int:
        return self.now

    def token(self, choice: Lookahead) -> bool:
        is_on = choice.begin()
        self.now += self._times[is_on] * (1000 if self._count == self._slow else 1)
        self._count += 1
        choice.end()
        return is_on


@pytest.mark.parametrize(
    ("on", "off", "slow", "expected"),
    [(90, 100, -1, True), (110, 100, -1, False), (100, 100, -1, False), (90, 100, 70, True), (110, 100, 50, False)],
)
def test_the_faster_one_is_kept_and_tried_again(on: int, off: int, slow: int, expected: bool) -> None:
    clock = Clock(on, off, slow)
    choice = Lookahead("auto", clock)
    assert not any(clock.token(choice) for _ in range(lookahead.WARM_TOKENS))
    trial = [clock.token(choice) for _ in range(TRIAL - lookahead.WARM_TOKENS)]
    assert trial.count(True) == trial.count(False) == len(trial) // 2 and choice.trials == 1
    assert trial == trial[::-1]  # what changes steadily adds to both alike
    kept = {clock.token(choice) for _ in range(lookahead.SETTLED_TOKENS)}
    assert kept == {expected}
    clock = Clock(off, on)  # the text has changed
    for _ in range(TRIAL - lookahead.WARM_TOKENS):
        choice._clock = clock
        clock.token(choice)
    assert choice.trials == 2 and choice.begin() == (off < 0.99 * on)


def test_what_was_asked_for_is_done_without_a_clock() -> None:
    def clock() -> int:
        raise AssertionError

    for mode, is_on in (("on", True), ("off", False)):
        choice = Lookahead(mode, clock)  # type: ignore[arg-type]
        for _ in range(TRIAL):
            assert choice.begin() is is_on
            choice.end()


def test_a_token_that_failed_is_not_counted() -> None:
    clock = Clock(90, 100)
    choice = Lookahead("auto", clock)
    for _ in range(TRIAL):
        choice.begin()
    assert choice.trials == 0
    for _ in range(TRIAL):
        clock.token(choice)
    assert choice.trials == 1


def test_the_option() -> None:
    assert [EngineConfig(lookahead=v).lookahead_mode for v in ("off", 0, "on", 3, "auto")] == [  # type: ignore[arg-type]
        "off", "off", "on", "on", "auto"
    ]  # fmt: skip
    assert [EngineConfig(lookahead=v).guesses_of(8) for v in (0, "on", 3, 12, "auto")] == [0, 8, 3, 8, 8]  # type: ignore[arg-type]
    assert EngineConfig(lookahead="on").guesses_of(32) == 16
    for wrong in ("yes", 17, -1, True, "3"):
        with pytest.raises(UsageError, match="lookahead"):
            EngineConfig(lookahead=wrong)  # type: ignore[arg-type]


def test_the_option_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("fomoe-test")
    add_engine_options(parser)
    assert [parser.parse_args(["--lookahead", v]).lookahead for v in ("on", "off", "auto", "6")] == [
        "on",
        "off",
        "auto",
        6,
    ]
    with pytest.raises(SystemExit):
        parser.parse_args(["--lookahead", "maybe"])
    assert "'maybe' is none of on, off, auto" in capsys.readouterr().err
