"""Joining the processes that torchrun (or SLURM through it) started, and ending them together."""

from __future__ import annotations

import atexit
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mim_refiner._version import __version__
from mim_refiner.core.collectives import from_ranks, is_distributed
from mim_refiner.core.processes import TIMEOUT_VARIABLE, Place, silence_timeout, started_as
from mim_refiner.core.watch import ANSWER, INTERRUPTED, Trouble, Watch, life
from mim_refiner.errors import InputError, MimRefinerError, OtherProcessError, one_line
from mim_refiner.reporting import Reporter, number_of

LISTED = 5  # differences named in a message
STUCK = timedelta(minutes=30)  # an exchange among processes that are all alive

_watch: Watch | None = None


def join_processes(device: torch.device, reporter: Reporter) -> torch.device:
    """Join the process group that torchrun's environment describes, and return this process's own device.

    Changes nothing in a process alone, and little where a process group runs already. Raises InputError, on all with
    the same line, when one is missing or has another version, or a machine has fewer GPUs than processes.
    """
    global _watch
    place = started_as()
    if place.world_size == 1:
        return device
    if dist.is_initialized():
        return _own_device(device, place)
    timeout = silence_timeout()
    reporter.message(
        f"{place.world_size} processes: all are to join within {2 * timeout:g} s; then the run ends when one "
        f"gives no sign of life for {timeout:g} s ({TIMEOUT_VARIABLE})"
    )
    store, names = _meet(place, 2 * timeout)
    _watch = Watch(store, place, names, timeout)
    atexit.register(_leave)
    own = _own_device(device, place)
    # CPU tensors by gloo: flags are agreed on without waiting for the GPU
    backend, group = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=place.rank, world_size=place.world_size, timeout=STUCK)
    return own


@contextmanager
def together() -> Iterator[None]:
    """Around a verb that several processes run as one: an error of one ends all, with its line and exit code."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        reason = _agreed(error)
        if reason is error:
            raise
        raise reason from None


def refuse_difference(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raise InputError on all processes, with the differences, unless all were started for the same work. ``facts``
    gives {name: value}, such as settings and the fingerprint of the data; not asked for in a process alone.
    """
    if is_distributed():
        everyone = from_ranks({name: str(value) for name, value in facts().items()})
        if problem := _difference(dict(enumerate(everyone))):
            raise InputError(problem)


def _difference(everyone: Mapping[int, Mapping[str, str]]) -> str:
    first, said = everyone[0], dict[str, str]()  # each difference once, of the lowest rank
    for rank, facts in everyone.items():
        for name in first.keys() | facts.keys():
            ours, theirs = first.get(name, "none"), facts.get(name, "none")
            if ours != theirs:
                said.setdefault(name, f"{name}: {ours} on process 0, {theirs} on process {rank}")
    if not said:
        return ""
    shown = sorted(said.values())
    more = f" and {len(shown) - LISTED} more" if len(shown) > LISTED else ""
    return f"the processes differ ({'; '.join(shown[:LISTED])}{more}); start all of them with the same command"


# --- joining


def _meet(place: Place, timeout: float) -> tuple[Store, dict[int, str]]:
    """The store that all processes know, and {rank: host and pid} once all are there. Raises InputError."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store itself
    end = time.monotonic() + timeout
    try:
        if place.rank > 0 or agent:
            _reach(place, end)
        store: Store = TCPStore(
            place.host,
            place.port,
            place.world_size,
            place.rank == 0 and not agent,
            timedelta(seconds=timeout + ANSWER),  # rank 0 has the word until then
            wait_for_workers=False,
        )
        store = PrefixStore(f"mim-refiner/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set(life(place.rank), "0")
        twice = f"{place.rank} twice" if store.add(f"seat/{place.rank}", 1) > 1 else ""
        facts = {  # all but the name must be the same everywhere
            "name": f"{platform.node()}, pid {os.getpid()}",
            "mim-refiner": __version__,
            "torch": torch.__version__,
            "verb": " ".join(sys.argv[1:2]),
            "WORLD_SIZE": str(place.world_size),
            "RANK": twice,
        }
        store.set(f"hello/{place.rank}", json.dumps(facts))
        if place.rank == 0:
            store.set("welcome", json.dumps(_welcome(store, place, end)))
        problem, names = json.loads(store.get("welcome"))
        reader = store.add("readers of the welcome", 1)
        until = time.monotonic() + ANSWER
        while problem and place.rank == 0 and reader < len(names) and time.monotonic() < until:
            time.sleep(0.05)
            reader = store.add("readers of the welcome", 0)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"process {place.rank} of {place.world_size} met no other at {place.host}:{place.port} "
            f"({one_line(error, 120)}); see that process 0 runs, that MASTER_ADDR is its machine, and that no other "
            "program uses MASTER_PORT"
        ) from None
    if problem:
        raise InputError(problem)
    return store, dict(enumerate(names))


def _reach(place: Place, end: float) -> None:
    """Wait until something listens where the processes meet; torch itself would log every try."""
    while True:
        try:
            with socket.create_connection((place.host, place.port), max(0.1, end - time.monotonic())):
                return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _welcome(store: Store, place: Place, end: float) -> tuple[str, list[str]]:
    """Rank 0 waits for all: the reason not to begin, or an empty text, and the names of those that came."""
    missing = list(range(place.world_size))
    while (missing := [rank for rank in missing if not store.check([f"hello/{rank}"])]) and time.monotonic() < end:
        time.sleep(0.05)
    everyone = {rank: json.loads(store.get(f"hello/{rank}")) for rank in range(place.world_size) if rank not in missing}
    names = [facts.pop("name") for facts in everyone.values()]
    if not missing:
        return _difference(everyone), names
    which = ", ".join(map(str, missing[:LISTED])) + (", ..." if len(missing) > LISTED else "")
    twice = "".join(f"; {facts['RANK']} came" for facts in everyone.values() if facts["RANK"])
    return (
        f"{len(missing)} of {place.world_size} processes did not join in time (RANK {which}{twice}); see why they did "
        f"not start, or give them more time with {TIMEOUT_VARIABLE}",
        names,
    )


def _own_device(device: torch.device, place: Place) -> torch.device:
    if device.type != "cuda":
        return device
    if str(device) != "cuda":
        raise InputError(f"--device {device}: each of several processes has a GPU of its own; use --device cuda")
    if place.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"a machine with {number_of(torch.cuda.device_count(), 'GPUs')} was given process {place.local_rank + 1}; "
            "lower torchrun's --nproc-per-node, or use --device cpu"
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


# --- ending


def _agreed(error: BaseException) -> BaseException:
    """The error that all processes end with: the first that was posted, or ``error`` itself."""
    if _watch is None:
        return error
    text, broken = str(error).lower(), isinstance(error, dist.DistError)
    broken |= isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection"))
    if broken:  # the effect of another's end: its reason is what the user wants to read
        _watch.suspect()
        cause = _watch.wait_for_trouble(_watch.timeout + 1)
    else:
        cause = _watch.post(_trouble(error))
    _watch.settled.set()
    if cause is None or cause == _trouble(error):
        return error
    return KeyboardInterrupt() if cause.code == INTERRUPTED else OtherProcessError(cause.text, cause.code)


def _trouble(error: BaseException) -> Trouble:
    if isinstance(error, MimRefinerError):
        return Trouble(error.exit_code, str(error))
    if isinstance(error, KeyboardInterrupt):
        return Trouble(INTERRUPTED, "interrupted")
    rank = 0 if _watch is None else _watch.place.rank
    code = 2 if isinstance(error, OSError | torch.OutOfMemoryError) else 1
    return Trouble(code, f"process {rank} failed: {type(error).__name__}: {error}")


def _leave() -> None:
    assert _watch is not None
    _watch.leave()
    if dist.is_initialized() and _watch.trouble is None:  # else it may wait for a process that is gone
        dist.destroy_process_group()
