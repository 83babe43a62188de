"""A generator that runs ahead of its reader in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")


def in_background(items: Generator[_T, None, None], ahead: int) -> Generator[_T, None, None]:
    """Yield ``items``, computed in a thread up to ``ahead`` items early; closing the generator ends the thread."""
    ready: queue.Queue[tuple[_T | None, BaseException | None]] = queue.Queue(max(1, ahead))
    stop = threading.Event()

    def put(item: _T | None, error: BaseException | None) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    if not put(item, None):
                        return
            put(None, StopIteration())
        except BaseException as error:  # handed to the reader
            put(None, error)

    thread = threading.Thread(target=work, name="mim-refiner-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
