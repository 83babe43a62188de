"""The number of threads by the clock, on machines that are told how fast they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from mim_refiner.core.threads import CLEAR, RECENT, SMALL, Pace, paced, threads_for, threads_kept

QUIET, BESIDE_A_BUSY_PROCESS = {1: 0.5, 2: 0.32}, {1: 0.52, 2: 1.23}  # seconds a step, as measured (LOG.md)


def worked(pieces: int, seconds: Callable[[int, int], float], most: int = 2) -> tuple[Pace, list[int]]:
    """A pace after some pieces of work, and with how many threads each was done."""
    asked: list[int] = []
    pace = Pace(asked.append, most=most)
    done = []
    for piece in range(pieces):
        done.append(asked[-1])
        pace.note(seconds(piece, asked[-1]))
    return pace, done


def test_two_threads_on_a_quiet_machine_and_one_beside_a_busy_process() -> None:
    assert worked(20, lambda piece, threads: QUIET[threads])[0].threads == 2
    pace, done = worked(20, lambda piece, threads: BESIDE_A_BUSY_PROCESS[threads])
    assert pace.threads == 1
    assert done.count(2) == 2  # so slow that a third try is not needed


def test_a_slow_first_piece_does_not_decide() -> None:
    pace, _ = worked(20, lambda piece, threads: 5.0 if piece == 0 else QUIET[threads])
    assert pace.threads == 2


def test_a_load_that_begins_half_way_is_noticed_and_only_once_paid_for() -> None:
    pace, done = worked(60, lambda piece, threads: (QUIET if piece < 30 else BESIDE_A_BUSY_PROCESS)[threads])
    assert pace.threads == 1
    assert done[10:30] == [2] * 20
    assert done[30:].count(2) <= RECENT + 2


def test_one_slow_piece_such_as_a_checkpoint_changes_nothing() -> None:
    _, done = worked(60, lambda piece, threads: 9.0 if piece % 10 == 9 else QUIET[threads])
    assert done[10:] == [2] * 50


def test_a_machine_that_is_slow_with_any_number_of_threads_is_not_tried_for_ever() -> None:
    def half_as_fast_at_last(piece: int, threads: int) -> float:
        return QUIET[threads] * (1 if piece < 30 else 3)

    pace, done = worked(200, half_as_fast_at_last)
    assert pace.threads == 2
    assert done.count(1) <= 6


def test_many_cores_also_try_one_thread_less_and_half_and_one_core_tries_nothing() -> None:
    pace, done = worked(30, lambda piece, threads: 5.0 if threads == 8 else 8 / threads, most=8)
    assert (pace.threads, set(done)) == (7, {8, 7, 4})
    assert CLEAR < 2
    pace, done = worked(9, lambda piece, threads: 9.0 * piece, most=1)
    assert (pace.threads, set(done)) == (1, {1})


@pytest.mark.parametrize("limit", [None, 5.0])
def test_work_without_a_limit_keeps_its_threads(limit: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert list(paced(range(4), limit, torch.device("cpu"))) == [0, 1, 2, 3]
    assert asked[:2] == ([2, 1] if limit else [])
    assert list(paced(range(4), 5.0, torch.device("meta"))) == [0, 1, 2, 3]
    with threads_kept():
        assert True
    assert asked[-1] == 2  # what it was


def pools() -> set[int]:
    """Threads of NumPy's and scikit-learn's libraries."""
    import sklearn.cluster  # noqa: F401 - it brings its own

    return {pool["num_threads"] for pool in threadpool_info()}


def test_small_operations_take_one_thread_and_large_ones_what_there_is() -> None:
    with threadpool_limits(2):
        with threads_for(SMALL - 1):
            assert pools() == {1}
        assert 2 in pools()
        with threads_for(SMALL):
            assert 2 in pools()
        assert 2 in pools()
