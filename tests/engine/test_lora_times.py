"""Times of updates from marks of a device that runs behind its host."""

from typing import Any

import pytest

from rekindle.clock import ManualClock
from rekindle.engine.lora_times import ClockMark, LoraTimer, elapsed_s


class Device:
    """Its own time moves on only when it works off what was submitted, in which a mark may occur again and again."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.submitted: list[Any] = []

    def work_off(self) -> None:
        for item in self.submitted:
            if isinstance(item, DeviceMark):
                item.at_ms = self.now_ms
            else:
                self.now_ms += item
        self.submitted.clear()


class DeviceMark:
    def __init__(self, device: Device) -> None:
        self._device, self.at_ms = device, 0.0

    def record(self) -> None:
        self._device.submitted.append(self)

    def query(self) -> bool:
        return self not in self._device.submitted

    def elapsed_time(self, end: "DeviceMark", /) -> float:
        assert self.query() and end.query(), "the host would wait"
        return end.at_ms - self.at_ms


def submit(device: Device, timer: LoraTimer, num_layers: int, call_ms: float) -> None:
    """A step with one call in each layer and one for the head, and other work between."""
    for layer in range(num_layers + 1):
        device.submitted.append(7.0)
        timer.run(layer, lambda: device.submitted.append(call_ms))


@pytest.mark.parametrize(("num_layers", "max_layers"), [(1, 1), (3, 4), (8, 4), (10, 4), (32, 4), (5, 5)])
def test_marked_layers_stand_for_all_and_the_head_for_itself(num_layers: int, max_layers: int) -> None:
    device = Device()
    timer = LoraTimer(lambda: DeviceMark(device), num_layers, max_layers)
    submit(device, timer, num_layers, call_ms=2.0)
    spans = timer.take()
    assert len(spans) <= max_layers + 1
    device.work_off()
    assert elapsed_s(spans) == pytest.approx((num_layers + 1) * 2e-3)


def test_nothing_is_read_before_the_device_has_made_all_calls() -> None:
    device = Device()
    timer = LoraTimer(lambda: DeviceMark(device), 2, 2)
    submit(device, timer, 2, call_ms=1.0)
    spans = timer.take()
    assert elapsed_s(spans) is None
    device.work_off()
    assert elapsed_s(spans) == pytest.approx(3e-3)
    assert timer.take() == ()
    assert elapsed_s(()) == 0.0


def test_a_recorded_step_has_new_times_whenever_it_is_replayed() -> None:
    device = Device()
    timer = LoraTimer(lambda: DeviceMark(device), 2, 2)
    submit(device, timer, 1, call_ms=1.0)
    spans, recorded = timer.take(), list(device.submitted)
    for call_ms in (3.0, 5.0):
        device.submitted += [call_ms if item == 1.0 else item for item in recorded]
        timer.add(spans)
        taken = timer.take()
        assert elapsed_s(taken) is None
        device.work_off()
        assert elapsed_s(taken) == pytest.approx(2 * call_ms * 1e-3)


def test_a_clock_marks_a_device_on_which_the_host_has_waited_for_its_work() -> None:
    clock = ManualClock()
    timer = LoraTimer(lambda: ClockMark(clock), 3, 3)
    for layer in range(4):
        clock.advance(10.0)
        timer.run(layer, lambda: clock.advance(0.5))
    assert elapsed_s(timer.take()) == pytest.approx(2.0)
