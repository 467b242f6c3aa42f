"""What a training stage says as it begins."""

import pytest

from gadfly.config import GadConfig
from gadfly.stages.stage_start import tell_begun


def test_few_steps_at_a_small_rate_are_said_to_teach_little(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gadfly")
    tell_begun("gad", 40, GadConfig(), held_out=64)
    assert "gad: 40 steps at a learning rate of 1e-06 move a weight by 4e-05 at most" in caplog.text
    caplog.clear()
    # The paper's, and the short run of docs/will-it-help.md.
    tell_begun("gad", 1500, GadConfig(), held_out=64)
    tell_begun("gad", 50, GadConfig(learning_rate=5e-6), held_out=64)
    assert caplog.text == ""


def test_alarms_that_too_few_held_out_prompts_silence_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gadfly")
    tell_begun("gad", 1500, GadConfig(), held_out=19)
    assert "gad: 19 held-out prompts an evaluation; below 20 these alarms stay silent: " in caplog.text
    assert "hacking" in caplog.text
    caplog.clear()
    tell_begun("gad", 1500, GadConfig(), held_out=20)
    assert caplog.text == ""
