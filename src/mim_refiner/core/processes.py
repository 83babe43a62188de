"""Which of several processes this one is, by the environment that torchrun sets. Nothing here imports torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mim_refiner.errors import InputError

TIMEOUT_VARIABLE = "MIM_REFINER_PROCESS_TIMEOUT"
DEFAULT_TIMEOUT = 50.0  # seconds: a run without one of its processes ends within a minute


@dataclass(frozen=True)
class Place:
    """``rank`` of ``world_size`` processes, the ``local_rank``-th of its machine; they meet at ``host``:``port``."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: str = ""
    port: int = 0


def started_as() -> Place:
    """The place that the environment gives this process; alone without WORLD_SIZE. InputError when it is torn."""
    world_size = _number("WORLD_SIZE", 1, smallest=1)
    if world_size == 1:
        return Place()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={world_size} says that several processes run, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; start them with torchrun, or unset WORLD_SIZE"
        )
    rank = _number("RANK", 0)
    if rank >= world_size:
        raise InputError(f"RANK={rank} is no process of WORLD_SIZE={world_size}; give each a rank from 0 on")
    port = _number("MASTER_PORT", 0)
    if port > 65535 or world_size > 2**20:
        raise InputError(
            f"MASTER_PORT={port} or WORLD_SIZE={world_size} is too large; start the processes with torchrun"
        )
    return Place(rank, world_size, _number("LOCAL_RANK", 0), os.environ["MASTER_ADDR"], port)


def silence_timeout() -> float:
    """Seconds after which a process that gives no sign of life is given up; joining may take twice as long."""
    text = os.environ.get(TIMEOUT_VARIABLE) or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 10**6:
        raise InputError(f"{TIMEOUT_VARIABLE}={text}: give a number of seconds, 1 or more")
    return seconds


def _number(name: str, default: int, *, smallest: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) < smallest:
        raise InputError(
            f"the environment variable {name} is {text!r}; give a number of {smallest} or more, or unset it"
        )
    return int(text)
