"""Processes that join and end together: each case starts real ones, which meet by gloo on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim_refiner.core.processes import Place, silence_timeout, started_as
from mim_refiner.errors import InputError

TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MIM_REFINER_PROCESS_TIMEOUT")
SILENCE = 8  # seconds

Outcomes = list[tuple[int, str, str]]  # exit code, stdout, stderr by rank


def case(what: str, count: int = 2, name: str = "", ranks: tuple[int, ...] = (), **changed: object) -> dict[str, Any]:
    """``ranks``: those that are started, if not all ``count``."""
    environment = {"WORLD_SIZE": count, "MIM_REFINER_PROCESS_TIMEOUT": SILENCE, **changed}
    return {"what": what, "name": name or what, "ranks": ranks or tuple(range(count)), "environment": environment}


PATIENT = {"MIM_REFINER_PROCESS_TIMEOUT": 1000}  # what ends such a run is not silence
CASES = [
    case("kill while writing", MIM_REFINER_PROCESS_TIMEOUT=3),
    *(case(f"stop {rank}") for rank in range(2)),
    *(case(f"kill {rank}", 3, **PATIENT) for rank in range(2)),
    case("error", 3, "missing", (0, 1), MIM_REFINER_PROCESS_TIMEOUT=6),
    case("error", 2, "missing 0", (1,), MIM_REFINER_PROCESS_TIMEOUT=1),
    case("error", 3, "twice", (0, 1, 2), MIM_REFINER_PROCESS_TIMEOUT=6, RANK_OF_2=1),
    *(case(f"{what} {rank}", **PATIENT) for what in ("leave", "interrupt") for rank in range(2)),
    *(case(what, **PATIENT) for what in ("error", "agreed error", "refusal", "bug", "stop", "version", "recipe")),
]


@pytest.fixture(scope="module")
def ended(forked_file: Callable[..., Any]) -> dict[str, Outcomes]:
    """What became of the processes of every case."""
    ((code, said, errors),) = forked_file(Path(__file__).with_name("launch_worker.py"), [json.dumps(CASES)])
    assert code == 0, errors
    return json.loads(said)


def one_line(outcomes: Outcomes) -> tuple[int, str]:
    """The exit code and the line that all processes ended with."""
    (same,) = {(code, err) for code, _, err in outcomes}
    assert same[1].count("\n") == 1
    return same[0], same[1].rstrip("\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("error", "the pictures of process 1 are gone; mount the disk"),
        ("agreed error", "no picture 1; mount the disk"),
        ("refusal", "the disk of process 0 is full; free space"),
        (
            "recipe",
            "the processes differ (epochs: 1 on process 0, 2 on process 1); start all of them with the same command",
        ),
    ],
)
def test_an_error_of_one_process_ends_all_with_its_line(ended: dict[str, Outcomes], name: str, words: str) -> None:
    assert one_line(ended[name]) == (2, f"error: {words}")


def test_a_bug_in_one_process_ends_the_other_too(ended: dict[str, Outcomes]) -> None:
    first, second = ended["bug"]
    assert (first[0], first[2]) == (1, "bug: out of cheese\n")
    assert (second[0], second[2]) == (1, "error: process 0 failed: ValueError: out of cheese\n")


def test_a_stop_of_one_is_a_stop_of_all(ended: dict[str, Outcomes]) -> None:
    assert [(code, out.splitlines()[1:], err) for code, out, err in ended["stop"]] == [
        (0, ["nobody stops", "all stop"], "")
    ] * 2
    for rank in range(2):
        assert [code for code, _, _ in ended[f"interrupt {rank}"]] == [130, 130]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_before_silence_does(ended: dict[str, Outcomes], rank: int) -> None:
    """The broken connection is noticed."""
    outcomes = list(ended[f"kill {rank}"])
    assert outcomes.pop(rank)[0] == -9
    code, line = one_line(outcomes)
    assert code == 2
    assert line.startswith(f"error: process {rank} of 3 (")
    assert "is gone or gives no sign of life" in line
    assert "start the same command again, a training run (without --overwrite) resumes" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_other(ended: dict[str, Outcomes], rank: int) -> None:
    outcomes = list(ended[f"stop {rank}"])
    outcomes.pop(rank)
    code, line = one_line(outcomes)
    assert code == 2
    assert line.startswith(f"error: process {rank} of 2 (")
    assert f"gives no sign of life for {SILENCE} s (MIM_REFINER_PROCESS_TIMEOUT)" in outcomes[0][1]  # told at the start


def test_what_is_being_written_is_finished_first(ended: dict[str, Outcomes]) -> None:
    first, second = ended["kill while writing"]
    assert second[0] == -9
    assert first[0] == 2
    assert first[1].endswith("written\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_whoever_is_done_first_disturbs_nobody(ended: dict[str, Outcomes], rank: int) -> None:
    assert [(code, err) for code, _, err in ended[f"leave {rank}"]] == [(0, "")] * 2


def test_processes_of_another_version_are_refused(ended: dict[str, Outcomes]) -> None:
    code, line = one_line(ended["version"])
    assert code == 2
    assert line.startswith("error: the processes differ (mim-refiner: ")
    assert "9.9 on process 1)" in line


def test_a_process_that_never_comes_is_named(ended: dict[str, Outcomes]) -> None:
    code, line = one_line(ended["missing"])
    assert code == 2
    assert line.startswith("error: 1 of 3 processes did not join in time (RANK 2)")
    code, line = one_line(ended["missing 0"])
    assert code == 2
    assert line.startswith("error: process 1 of 2 met no other at 127.0.0.1:")


def test_a_place_that_was_given_twice_is_named(ended: dict[str, Outcomes]) -> None:
    code, line = one_line(ended["twice"])
    assert code == 2
    assert line.startswith("error: 1 of 3 processes did not join in time (RANK 2; 1 twice came)")


def test_alone_without_a_word_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert started_as() == Place()
    monkeypatch.setenv("RANK", "3")  # of a scheduler that says nothing else
    assert started_as() == Place()
    assert silence_timeout() == 50


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": ""}, "RANK is not set"),
        ({"RANK": "", "MASTER_PORT": ""}, "RANK and MASTER_PORT are not set"),
        ({"RANK": "2"}, "RANK=2 is no process of WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 or WORLD_SIZE=2 is too large"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5'"),
    ],
)
def test_a_torn_environment_is_one_line(changed: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (whole | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        started_as()


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_the_timeout_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_REFINER_PROCESS_TIMEOUT", text)
    with pytest.raises(InputError, match="give a number of seconds"):
        silence_timeout()
