"""Whether training waits for cores is seen, said once, and never said of an idle machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from recbole_holo.training import contention
from recbole_holo.training.contention import Contention, Waiting, advice


class Machine:
    """Time, processor time and the queues of two threads, all made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path | None) -> None:
        self.now = self.ran = 0.0
        self.queued = {"1": 0.0, "2": 0.0}
        self.tasks = tmp_path
        monkeypatch.setattr(contention, "perf_counter", lambda: self.now)
        monkeypatch.setattr(contention, "process_time", lambda: self.ran)
        monkeypatch.setattr(contention, "TASKS", tmp_path or Path("/nowhere"))
        self.pass_time(0, 0, 0)

    def pass_time(self, seconds: float, ran: float, queued: float) -> None:
        self.now += seconds
        self.ran += ran
        for task in self.queued:
            self.queued[task] += queued / len(self.queued)
            if self.tasks is not None:
                folder = self.tasks / task
                folder.mkdir(exist_ok=True)
                (folder / "schedstat").write_text(f"1 {round(self.queued[task] * 1e9)} 9\n")


def trained(machine: Machine, steps: int, **each: float) -> list[str]:
    said: list[str] = []
    watch = Contention(said.append)
    for _ in range(4):  # epochs
        watch.begin()
        for _ in range(steps):
            machine.pass_time(**each)
            watch.step()
        watch.end()
        machine.pass_time(20, 0, 40)  # an evaluation, which is not looked at
    return said


@pytest.mark.parametrize("steps", [5, 200])  # epochs shorter than a window, and longer
def test_threads_in_the_queue_are_said_once(steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Though they spin, so that the process uses two cores' time while it runs."""
    said = trained(Machine(monkeypatch, tmp_path), steps, seconds=0.5, ran=0.5, queued=0.6)
    assert len(said) == 1
    assert "threads stood 6 s in the queue" in said[0]
    assert "in 5 s, 10 steps" in said[0]


def test_an_idle_machine_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert trained(Machine(monkeypatch, tmp_path), 100, seconds=0.5, ran=1.0, queued=0.02) == []


def test_one_busy_spell_is_no_busy_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine, said = Machine(monkeypatch, tmp_path), []
    watch = Contention(said.append)
    watch.begin()
    for step in range(40):
        machine.pass_time(0.5, 0.5, 0.9 if step % 10 == 3 else 0.0)
        watch.step()
    watch.end()
    assert said == []


@pytest.mark.parametrize(("ran", "times"), [(0.2, 1), (0.45, 0), (1.0, 0)])
def test_where_queues_are_not_counted(ran: float, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time counts in which no thread ran; a thread of two that waits is not seen."""
    assert len(trained(Machine(monkeypatch, None), 100, seconds=0.5, ran=ran, queued=0.9)) == times


def test_threads_come_and_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path)
    machine.pass_time(0, 0, 8)
    before = Waiting()
    machine.queued = {"2": 4.5, "3": 0.25}
    machine.pass_time(1, 1, 0)
    (tmp_path / "1" / "schedstat").unlink()
    (tmp_path / "1").rmdir()
    assert Waiting().since(before, 1) == pytest.approx(0.75)


def test_this_machines_own_counters() -> None:
    before = Waiting()
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.05:
        pass
    assert 0 <= Waiting().since(before, time.perf_counter() - begun) < 60


def test_what_is_set_already_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention.torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "OMP_WAIT_POLICY" not in advice(3, 5, 9)
    assert "OMP_NUM_THREADS=1" in advice(3, 5, 9)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(contention.torch, "get_num_threads", lambda: 1)
    assert "OMP_WAIT_POLICY=passive" in advice(3, 5, 9)
    assert "OMP_NUM_THREADS" not in advice(3, 5, 9)
