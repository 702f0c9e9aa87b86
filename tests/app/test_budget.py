import time

import pytest

from vitrail.app.budget import Clock
from vitrail.runs import read_json


def test_stages_add_up_and_survive_a_restart(tmp_path):
    path = tmp_path / "clock.json"
    clock = Clock(path, 60.0, time.monotonic() - 5)
    with clock.stage("audit"):
        time.sleep(0.05)
    assert clock.stages["start"] == pytest.approx(5, abs=0.5)
    assert clock.stages["audit"] >= 0.05
    again = Clock(path, 60.0, time.monotonic())
    assert again.spent == pytest.approx(clock.spent, abs=0.5)
    assert again.deadline == pytest.approx(time.monotonic() + 55, abs=0.5)


def test_a_stage_that_fails_is_counted(tmp_path):
    clock = Clock(tmp_path / "clock.json", None, time.monotonic())
    with pytest.raises(ValueError), clock.stage("train"):
        raise ValueError
    assert "train" in read_json(tmp_path / "clock.json")
    assert clock.deadline is None


def test_a_damaged_clock_costs_only_the_count(tmp_path):
    (tmp_path / "clock.json").write_text("{")
    assert Clock(tmp_path / "clock.json", 60.0, time.monotonic()).spent < 1


def test_a_long_stage_saves_on_its_way(tmp_path):
    clock = Clock(tmp_path / "clock.json", None, time.monotonic())
    clock._saved -= 10
    clock.tick()
    assert (tmp_path / "clock.json").exists()
