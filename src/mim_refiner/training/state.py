"""The run folder: recipe, environment, metrics and checkpoints, each complete or absent.

A checkpoint is a folder: safetensors per module, the optimizer's state, and state.json with position and hashes,
written beside its final name, synced and renamed; the link ``checkpoints/last`` is then moved onto it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mim_refiner.core.collectives import broadcast_state, decide_on_rank_0, rank
from mim_refiner.core.sharding import full_optimizer_state, full_state, load_full_state
from mim_refiner.core.watch import writing
from mim_refiner.errors import RunFolderError, reason_of, same_command
from mim_refiner.files import (
    atomic_folder,
    clear_leftovers,
    dotted,
    dump_yaml,
    errors_as,
    load_yaml,
    read_json,
    read_regular,
    read_yaml,
    reading,
    remove,
    sync,
    write_bytes,
    write_json,
)
from mim_refiner.reporting import number_of
from mim_refiner.training.lock import LOCK, hold
from mim_refiner.training.recipe import PretrainRecipe, RefineRecipe

SKIPS = "skipped_batches.json"
T = TypeVar("T")
State = dict[str, Any]  # of a module or an optimizer


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands: ``step`` steps of phase number ``phase`` are finished."""

    phase: int = 0
    step: int = 0
    total_step: int = 0


# Free to differ on resume: settings that change how a run is computed, watched or kept, and not what it computes, and
# paths, which are spelled in many ways: data and model are known by data_fingerprint and model_sha256.
FREE_SETTINGS = {
    "data", "data_images", "exclude", "model",
    "micro_batch", "kept_graphs", "checkpointing", "shard", "workers", "loader_timeout", "checkpoint_every",
    "keep_checkpoints", "log_every", "knn_every", "cuda_graphs", "expected", "export_weights",
    "warmup.max_seconds", "refinement.max_seconds",
}  # fmt: skip
FREE_PARTS = ("guard.",)


class RunFolder:
    """One run on disk: created, or gone on with where the recipe is the same. Raises RunFolderError for another recipe,
    foreign files, or no permission.

    In a distributed run rank 0 alone writes and reads; the others have its word.
    """

    def __init__(self, path: str | Path, recipe: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.keep_checkpoints = Path(path), recipe.get("keep_checkpoints", 2)
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last"
        self.writes = rank() == 0
        self.going_on = same_command(overwrite)
        self.notes: list[str] = []  # what was damaged and done without
        self.began = time.perf_counter()
        self._before: float | None = None  # seconds that earlier processes spent, up to the checkpoint gone on from
        # ``skipped``: (phase number, step) of batches left out after a loss of NaN
        self.resumed, self.skipped = decide_on_rank_0(lambda: self._open(recipe, overwrite))

    def _open(self, recipe: dict[str, Any], overwrite: bool) -> tuple[bool, list[tuple[int, int]]]:
        """Whether there is a run to go on with, and which batches it leaves out."""
        path, recipe_file = self.path, self.path / "recipe.yaml"
        with errors_as(RunFolderError, f"{path}: cannot write the run folder", "choose a writable --out", OSError):
            refuse_place(path)
            resumed = recipe_file.exists() and not overwrite
            if resumed:
                refuse_other_recipe(path, recipe)
            path.mkdir(parents=True, exist_ok=True)
            hold(path, self)
            if not resumed:
                for each in path.iterdir() if overwrite else ():  # never unasked: another may have begun a run here
                    if each.name != LOCK:
                        remove(each)
                # first of all files: a folder with others but without it is taken for a foreign one
                write_bytes(recipe_file, dump_yaml(recipe))
            self.checkpoints.mkdir(exist_ok=True)
            if not (path / "environment.json").exists():
                write_json(path / "environment.json", environment())
            for folder in (path, self.checkpoints, path / "evaluation"):  # of a run that was killed while writing
                clear_leftovers(folder)

        def skips(stored: Any) -> list[tuple[int, int]]:
            return [(operator.index(phase), operator.index(step)) for phase, step in stored]

        return resumed, self.recall(SKIPS, skips, [], "no batch is left out")

    def recall(self, name: str, read: Callable[[Any], T], nothing: T, so: str) -> T:
        """What the run noted for itself; ``nothing`` where it did not, or where that is damaged, which is told."""
        try:
            return read(read_json(self.path / name))
        except FileNotFoundError:
            pass
        except Exception as error:
            self.notes.append(f"{name} is damaged ({reason_of(error)}); {so}")
        return nothing

    def skip(self, phase: int, step: int) -> None:
        """Leave out this batch from now on, in this run and when it is resumed."""
        self.skipped.append((phase, step))
        if self.writes:
            write_json(self.path / SKIPS, self.skipped)

    @property
    def seconds(self) -> float:
        """What the run took until now, in all processes one after the other."""
        return (self._before or 0.0) + time.perf_counter() - self.began

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(
        self, position: Position, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None
    ) -> Path:
        """Write a checkpoint; it exists whole or not at all. Raises RunFolderError when the disk refuses. Every rank
        calls it, and returns when rank 0, which alone holds whole states, has written.
        """
        target = self.checkpoints / f"step-{position.total_step:06d}"
        states = {key: full_state(module) for key, module in modules.items()}
        optimizer_state = None if optimizer is None else full_optimizer_state(optimizer)
        decide_on_rank_0(lambda: self._write(target, position, states, optimizer_state))
        return target

    def _write(
        self, target: Path, position: Position, states: Mapping[str, State], optimizer_state: State | None
    ) -> None:
        remedy = f"free space or mend permissions, then {self.going_on} resumes from the checkpoint before"
        problem = f"{target}: cannot write the checkpoint"
        # torch and safetensors wrap the system's refusal
        with errors_as(RunFolderError, problem, remedy, OSError, SafetensorError, RuntimeError):
            with writing, atomic_folder(target) as folder:
                for key, state in states.items():
                    save_file(
                        {name: tensor.contiguous() for name, tensor in state.items()}, folder / f"{key}.safetensors"
                    )
                if optimizer_state is not None:
                    torch.save(optimizer_state, folder / "optimizer.pt")
                hashes = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
                stands = {**dataclasses.asdict(position), "seconds": self.seconds, "sha256": hashes}
                write_json(folder / "state.json", {**stands, "digest": _digest(stands)})
            link = self.checkpoints / ".last.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            link.replace(self.last)
            sync(self.checkpoints)
        for folder in self._saved()[: -self.keep_checkpoints]:
            shutil.rmtree(folder, ignore_errors=True)

    def restore(self, modules: Mapping[str, nn.Module]) -> tuple[Position, State | None]:
        """Load the newest whole checkpoint; without one all ranks go on from rank 0's modules.

        Returns its position and the optimizer's state (empty but on rank 0, see core.sharding; None where none was
        kept). Damaged checkpoints are passed over, with a note.
        """
        newest, position = decide_on_rank_0(self._newest)
        if newest is None:
            broadcast_state(modules.values())
            return position, None
        for key, module in modules.items():
            load_full_state(module, load_state(newest / f"{key}.safetensors", module) if self.writes else {})
        optimizer_file = newest / "optimizer.pt"
        if not decide_on_rank_0(optimizer_file.exists):
            return position, None
        return position, load_state(optimizer_file) if self.writes else {}

    def _newest(self) -> tuple[Path | None, Position]:
        """The newest whole checkpoint and its position; drops the log lines behind it."""
        newest, position, seconds = None, Position(), 0.0
        for folder in reversed(self._saved()):
            try:
                position, seconds = _whole(folder)
            except Exception as error:  # whatever is wrong with it, the one before may be whole
                problem = reason_of(error) if isinstance(error, ValueError) else "incomplete"
                self.notes.append(f"{folder.name} is damaged ({problem}); using the checkpoint before it")
            else:
                newest = folder
                break
        if self._before is None:  # going back later adds nothing
            self._before = seconds
        self._forget_metrics_after(position)
        return newest, position

    def _forget_metrics_after(self, position: Position) -> None:
        """Drop log lines of steps that will be run again, and damaged ones."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        with reading(path, "move the file away; the run goes on without it", RunFolderError):
            *lines, _torn = read_regular(path).split(b"\n")
        steps = list(map(_total_step, lines))
        if damaged := steps.count(math.inf):
            self.notes.append(f"metrics.jsonl: left out: {number_of(damaged, 'damaged lines')}")
        kept = [line + b"\n" for line, step in zip(lines, steps, strict=True) if step <= position.total_step]
        write_bytes(path, b"".join(kept))

    def _saved(self) -> list[Path]:
        """Folders of checkpoints, the newest last; names of a million steps and more are longer."""
        return sorted(self.checkpoints.glob("step-*"), key=lambda folder: (len(folder.name), folder.name))


def load_state(path: Path, module: nn.Module | None = None) -> State:
    """The state in a file, of this module; saved on whatever device, every process moves its own part to its own."""
    with reading(path.parent, "remove this checkpoint, or use --overwrite to start anew", RunFolderError):
        if module is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        state = load_file(path)
        if any(state[name].shape != tensor.shape for name, tensor in module.state_dict().items()):
            raise ValueError(f"{path.name} is of another encoder")
        return state


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def environment() -> dict[str, Any]:
    """What the run ran on: versions, machine, command."""
    import timm
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join(["mim-refiner", *sys.argv[1:]]),
    }


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _whole(folder: Path) -> tuple[Position, float]:
    """Where a checkpoint stands, and the seconds until there; raises anything for a damaged one."""
    state = read_json(folder / "state.json")
    if state.pop("digest") != _digest(state):
        raise ValueError("state.json was changed")
    for name, digest in state["sha256"].items():
        if file_sha256(folder / os.path.basename(name)) != digest:
            raise ValueError(f"hash of {name} differs")
    place = (operator.index(state[key]) for key in ("phase", "step", "total_step"))
    return Position(*place), float(state.get("seconds", 0.0))


def _total_step(line: bytes) -> float:
    """The step of a log line; infinity where the line is damaged."""
    try:
        return float(json.loads(line).get("total_step", 0))
    except Exception:  # a crashed file system leaves anything
        return math.inf


def refuse_place(out: str | Path) -> None:
    """Raise RunFolderError where no run folder can be, before anything slow is done: a path that no file can have, or
    a folder that cannot be looked into, or with the files of something else.
    """
    path = Path(out)
    with errors_as(RunFolderError, f"{path}: cannot write the run folder", "choose a writable --out", OSError):
        if "\0" in str(path) or re.search("[\udc80-\udcff]", str(path.resolve())):  # safetensors takes no other
            raise RunFolderError(f"{path}: the path is not valid UTF-8 text; choose another --out")
        resumed = (path / "recipe.yaml").exists()
        nearest = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        if nearest != path.absolute() and not nearest.is_dir():
            raise RunFolderError(f"{path}: {nearest} is a file; choose another --out")
        if not resumed and nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
            raise RunFolderError(f"{path}: {nearest} cannot be written; choose another --out")
        known = resumed or not path.exists()
        if not known and (not path.is_dir() or any(each.name != LOCK for each in path.iterdir())):
            raise RunFolderError(f"{path}: not empty and not a run folder; choose a new --out folder")


def refuse_other_recipe(path: Path, recipe: dict[str, Any], *, but: Collection[str] = ()) -> None:
    """Raise RunFolderError where ``path`` holds a run with another recipe, ``but`` for settings not settled yet.

    The same in other words is no other: settings without effect may differ.
    """
    if not (path / "recipe.yaml").exists():
        return
    with reading(path / "recipe.yaml", "use --overwrite to start anew", RunFolderError):
        stored = dotted(read_yaml(path / "recipe.yaml"))
    now = dotted(load_yaml(dump_yaml(recipe)))
    free, known = FREE_SETTINGS.union(but), stored.keys() | now.keys()
    rules = {*RefineRecipe.idle, *PretrainRecipe.idle}
    off = [r for r in rules if not r.beside and r.switch in now and r.rests(now[r.switch])]
    free |= {key for rule in off for key in known if rule.of(key)}  # without effect
    fixed = [key for key in known if key not in free and not key.startswith(FREE_PARTS)]
    keys = sorted(key for key in fixed if _plain(stored.get(key)) != _plain(now.get(key)))
    keys = ["command"] if "command" in keys else keys  # all the rest differs too
    if keys:
        said = [_change(key, stored, now) for key in keys[:5]]
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise RunFolderError(
            f"{path}: holds a run with another recipe ({'; '.join(said)}{more}); "
            "use another --out, or --overwrite to start anew"
        )


def _plain(value: Any) -> Any:
    """One value for a list of the same: 0.2 for that of each head, 16 for 16x16."""
    return value[0] if isinstance(value, list) and value and all(each == value[0] for each in value) else value


def _change(key: str, stored: dict[str, Any], now: dict[str, Any]) -> str:
    if key == "data_fingerprint":
        counts: list[Any] = [tree.get("data_images") for tree in (stored, now)]
        other = ", and they are not the same" if counts[0] == counts[1] else ""
        return f"the data has changed: {number_of(counts[0], 'images')} then, {counts[1]} now{other}"
    if key == "model_sha256":
        return f"the model has changed: {stored.get('model')} had other weights than {now.get('model')} has"
    none = "none" if key == "arch" else "no such setting"  # of another release
    words = [str(tree[key])[:80] if key in tree else none for tree in (stored, now)]
    return "{}: {} there, {} now".format(key, *words)
