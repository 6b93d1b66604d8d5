"""Sections of a step: exclusive times that add up, on the host and from events of a device."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from dist_scan.monitoring.step_timer import (
    SECTIONS,
    StepTimer,
    time_data_wait,
    timed,
    use_timer,
)


@pytest.fixture
def timer() -> Iterator[StepTimer]:
    timer = StepTimer()
    use_timer(timer)
    yield timer
    use_timer(None)


def test_a_section_excludes_its_inner_ones_and_all_add_up(timer: StepTimer) -> None:
    began = time.perf_counter()
    timer.reset()
    with timed("forward"):
        time.sleep(0.03)
        with timed("all_reduce"):
            time.sleep(0.06)
    time.sleep(0.02)
    seconds = timer.read()
    elapsed_s = time.perf_counter() - began
    assert seconds["forward"] >= 0.03
    assert seconds["all_reduce"] >= 0.06
    assert seconds["other"] >= 0.02
    assert set(seconds) == set(SECTIONS)
    assert sum(seconds.values()) == pytest.approx(elapsed_s, abs=0.01)
    assert sum(timer.read().values()) < 0.01  # a second reading starts at zero


def test_communication_during_a_save_counts_as_the_save(timer: StepTimer) -> None:
    with timed("save"), timed("all_reduce"):
        time.sleep(0.02)
    seconds = timer.read()
    assert seconds["save"] >= 0.02
    assert seconds["all_reduce"] == 0


def test_backward_after_the_last_gradient_counts_as_all_reduce(timer: StepTimer) -> None:
    with timed("backward"):
        time.sleep(0.02)
        timer.gradient_ready()
        time.sleep(0.05)
        timer.split_at_last_gradient("all_reduce")
    seconds = timer.read()
    assert 0.02 <= seconds["backward"] < seconds["all_reduce"]
    assert seconds["all_reduce"] >= 0.05


def test_an_exception_ends_all_sections(timer: StepTimer) -> None:
    with pytest.raises(KeyError), timed("forward"), timed("all_reduce"):
        raise KeyError
    assert timer.stack == ["other"]
    assert not timer.spans


def test_waiting_for_items_is_data_wait_without_the_sections_inside(timer: StepTimer) -> None:
    def items() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.01)
            with timed("augmentation"):
                time.sleep(0.02)
            yield i

    assert list(time_data_wait(items())) == [0, 1, 2]
    seconds = timer.read()
    assert seconds["data_wait"] >= 0.03
    assert seconds["augmentation"] >= 0.06
    assert seconds["other"] < 0.01


def test_sections_work_without_a_timer() -> None:
    use_timer(None)
    with timed("forward"):
        pass
    assert list(time_data_wait([1])) == [1]


class Device:
    """A simulated device: an event recorded at ``launched`` has happened at ``executed``."""

    def __init__(self) -> None:
        self.launched = 0.0
        self.executed = 0.0

    def record_event(self) -> Event:
        return Event(self, self.launched)


class Event:
    """An event in the stream of a `Device`, with the methods of torch.cuda.Event."""

    def __init__(self, device: Device, time: float) -> None:
        self.device = device
        self.time = time

    def query(self) -> bool:
        return self.device.executed >= self.time

    def synchronize(self) -> None:
        self.device.executed = max(self.device.executed, self.time)

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "an event was read before the device reached it"
        return 1000 * (end.time - self.time)


def test_sections_on_a_device_are_times_between_events_without_synchronisation() -> None:
    device = Device()
    timer = StepTimer(device.record_event)
    use_timer(timer)
    try:
        with timed("forward"):
            device.launched = 3.0
        with timed("backward"):
            device.launched = 7.0
            timer.gradient_ready()
            device.launched = 8.0
            timer.split_at_last_gradient("all_reduce")
        device.executed = 3.0
        timer.collect_events()
        assert timer.seconds["forward"] == 3.0
        assert timer.seconds["backward"] == 0.0
        assert device.executed == 3.0
        seconds = timer.read()
        assert seconds["forward"] == 3.0
        assert seconds["backward"] == 4.0
        assert seconds["all_reduce"] == 1.0
        assert sum(seconds.values()) == 8.0
    finally:
        use_timer(None)
