"""The clock of sections: exclusive times that add up, on the host and on a device's events."""

from __future__ import annotations

import time
from typing import Never

import pytest

from dist_scan.monitoring.step_timer import SECTIONS, StepTimer, section, time_data_wait, use_timer


@pytest.fixture
def clock():
    made = StepTimer()
    use_timer(made)
    yield made
    use_timer(None)


def test_inner_sections_are_taken_from_outer_ones_and_all_add_up(clock) -> None:
    began = time.perf_counter()
    clock.reset()
    with section("forward"):
        time.sleep(0.03)
        with section("all_reduce"):
            time.sleep(0.06)
    time.sleep(0.02)
    found = clock.read()
    whole = time.perf_counter() - began
    assert found["forward"] >= 0.03 and found["all_reduce"] >= 0.06 and found["other"] >= 0.02
    assert sum(found.values()) == pytest.approx(whole, abs=0.01) and set(found) == set(SECTIONS)
    assert sum(clock.read().values()) < 0.01  # a second reading starts at zero


def test_what_ranks_say_while_saving_is_part_of_the_save(clock) -> None:
    with section("save"), section("all_reduce"):
        time.sleep(0.02)
    found = clock.read()
    assert found["save"] >= 0.02 and found["all_reduce"] == 0


def test_after_the_last_gradient_backward_only_waits(clock) -> None:
    with section("backward"):
        time.sleep(0.02)
        clock.gradient_ready()
        time.sleep(0.05)
        clock.split_at_last_gradient("all_reduce")
    found = clock.read()
    assert 0.02 <= found["backward"] < found["all_reduce"] and found["all_reduce"] >= 0.05


def test_an_error_leaves_the_clock_where_it_was(clock) -> Never:
    with pytest.raises(KeyError), section("forward"), section("all_reduce"):
        raise KeyError
    assert clock.stack == ["other"] and not clock.spans


def test_waiting_for_items_is_data_wait_less_what_is_named_inside(clock) -> None:
    def items():
        for i in range(3):
            time.sleep(0.01)
            with section("augmentation"):
                time.sleep(0.02)
            yield i

    assert list(time_data_wait(items())) == [0, 1, 2]
    found = clock.read()
    assert found["data_wait"] >= 0.03 and found["augmentation"] >= 0.06 and found["other"] < 0.01


def test_without_a_clock_nothing_is_counted() -> None:
    use_timer(None)
    with section("forward"):
        pass
    assert list(time_data_wait([1])) == [1]


class Device:
    """A device's stream by hand: events pass when `now` has reached them."""

    def __init__(self) -> None:
        self.issued, self.passed = 0.0, 0.0

    def mark(self):
        return Event(self, self.issued)


class Event:
    def __init__(self, device, at) -> None:
        self.device, self.at = device, at

    def query(self):
        return self.device.passed >= self.at

    def synchronize(self) -> None:
        self.device.passed = max(self.device.passed, self.at)

    def elapsed_time(self, other):
        assert self.query() and other.query(), "an event was read before the device reached it"
        return 1000 * (other.at - self.at)


def test_on_a_device_a_section_is_the_time_between_events_and_nothing_is_waited_for() -> None:
    device = Device()
    clock = StepTimer(device.mark)
    use_timer(clock)
    try:
        with section("forward"):
            device.issued = 3.0
        with section("backward"):
            device.issued = 7.0
            clock.gradient_ready()
            device.issued = 8.0
            clock.split_at_last_gradient("all_reduce")
        device.passed = 3.0
        clock.collect_events()
        assert (
            clock.seconds["forward"] == 3.0
            and clock.seconds["backward"] == 0.0
            and device.passed == 3.0
        )
        found = clock.read()
        assert (found["forward"], found["backward"], found["all_reduce"]) == (
            3.0,
            4.0,
            1.0,
        ) and sum(found.values()) == 8.0
    finally:
        use_timer(None)
