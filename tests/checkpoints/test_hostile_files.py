"""Damaged and hostile files (more than 200), made here: none runs, none loads in part, each gets one clear line."""

from __future__ import annotations

import argparse
import builtins
import functools
import io
import json
import os
import pickle
import resource
import socket
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.errors import MimRefinerError

Case = tuple[str, Path]  # what it is; what to load
State = dict[str, Tensor]
CONFIG = {"architecture": "vit_tiny_patch16_224", "model_args": {}}


class Runs:
    """Makes a file when it is unpickled, by calling ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Builds:
    """Runs code through the state of an object instead."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __reduce__(self) -> tuple[Any, ...]:
        return (argparse.Namespace, (), {"lr": self.inner})


@pytest.fixture
def config(vit_state: State) -> dict[str, Any]:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return {"architecture": "vit_tiny_patch16_224", "model_args": arguments}


def torch_bytes(payload: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def training_file(state: State) -> dict[str, Any]:
    moments = {number: {"step": torch.tensor(3.0), "exp_avg": item} for number, item in enumerate(state.values())}
    return {
        "model": state,
        "optimizer": {"state": moments},
        "epoch": 1,
        "args": argparse.Namespace(lr=1e-3, tags=["a"]),
    }


def formats(state: State) -> dict[str, bytes]:
    return {
        "encoder.pth": torch_bytes({"model": state}),
        "training.pth": torch_bytes(training_file(state)),
        "legacy.pth": torch_bytes({"model": state}, legacy=True),
        "timm.safetensors": save(state),
    }


def rezip(data: bytes, change: Callable[[dict[str, bytes]], dict[str, bytes]], **options: Any) -> bytes:
    """A torch file with other members."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)
    return buffer.getvalue()


def put(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


def model_folder(folder: Path, config: Any, weights: bytes) -> Path:
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    put(folder, "config.json", text)
    put(folder, "model.safetensors", weights)
    return folder


def refuse(cases: Iterator[Case], canary: Path, *, inspected: bool = False) -> None:
    """Every case is refused by name, in one line with an advice, and leaves no trace."""
    wrong = []
    for what, path in cases:
        for read in (load_backbone, inspect_checkpoint) if inspected else (load_backbone,):
            try:
                read(path)
            except MimRefinerError as error:
                text = str(error)
                clear = "\n" not in text and path.name in text and ";" in text and len(text) < 700
                wrong += [] if clear else [f"{what}: unclear: {text}"]
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                wrong.append(f"{what}: was loaded")
        if canary.exists():
            wrong.append(f"{what}: RAN CODE")
            canary.unlink()
    assert wrong == []


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile code would make; and a bound on the memory that reading may take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kilobytes


def test_the_files_load_before_they_are_changed(tmp_path: Path, vit_state: State, config: dict[str, Any]) -> None:
    for name, content in formats(vit_state).items():
        assert load_backbone(put(tmp_path, name, content), num_heads=4).info.coverage == 1
    assert load_backbone(model_folder(tmp_path / "folder", config, save(vit_state))).info.coverage == 1


def test_truncated(tmp_path: Path, vit_state: State, canary: Path) -> None:
    def cases() -> Iterator[Case]:
        for name, content in formats(vit_state).items():
            cuts = [1, 7, 8, 9, 30, *(int(len(content) * share / 16) for share in range(1, 16)), len(content) - 1]
            for cut in cuts:
                yield f"{name} cut at {cut}", put(tmp_path / str(cut), name, content[:cut])

    refuse(cases(), canary)


def test_bytes_changed(tmp_path: Path, vit_state: State, canary: Path) -> None:
    def cases() -> Iterator[Case]:
        tensors = save(vit_state)
        header = int.from_bytes(tensors[:8], "little")
        for position in range(8, 8 + header, header // 12):
            changed = tensors[:position] + b"\xff" + tensors[position + 1 :]
            yield f"header byte {position}", put(tmp_path / f"s{position}", "x.safetensors", changed)
        whole = torch_bytes({"model": vit_state})
        start = whole.index(b"\x80\x02")
        for step in range(12):
            position = start + 1 + 97 * step
            changed = whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]
            yield f"pickle byte {position}", put(tmp_path / f"p{position}", "x.pth", changed)
        for extra in (b"\0" * 64, b"more"):
            yield f"{len(extra)} bytes appended", put(tmp_path / f"a{len(extra)}", "x.safetensors", tensors + extra)

    refuse(cases(), canary)


def test_wrong_content(tmp_path: Path, vit_state: State, canary: Path, config: dict[str, Any]) -> None:
    names = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "blocks.1.norm1.weight"]
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "NaN": lambda t: torch.full_like(t, float("nan")),
        "infinite": lambda t: torch.cat([t.flatten()[:-1], torch.tensor([float("-inf")])]).reshape(t.shape),
        "one row less": lambda t: t[:-1].contiguous(),
        "one dimension more": lambda t: t[None],
        "int8": lambda t: t.to(torch.int8),
        "bool": lambda t: t > 0,
        "complex": lambda t: t.to(torch.complex64),
        "empty": lambda t: t[:0],
    }

    def cases() -> Iterator[Case]:
        for number, name in enumerate(names):
            for kind, change in changes.items():
                state = vit_state | {name: change(vit_state[name])}
                folder = tmp_path / f"{kind}-{number}"
                yield f"{kind} {name}", model_folder(folder / "m", config, save(state))
                if kind in ("NaN", "one row less"):
                    yield f"{kind} {name} torch", put(folder, "x.pth", torch_bytes({"model": state}))
            others = {key: item for key, item in vit_state.items() if key != name}
            renamed = {f"{name}x": vit_state[name]}
            yield f"without {name}", model_folder(tmp_path / f"w{number}/m", config, save(others))
            yield f"renamed {name}", model_folder(tmp_path / f"r{number}/m", config, save(others | renamed))
            yield (
                f"renamed {name} torch",
                put(tmp_path / f"t{number}", "x.pth", torch_bytes({"model": others | renamed})),
            )
        far = vit_state | {"blocks.999999999.norm1.weight": torch.ones(32)}
        yield "a block of a billion", put(tmp_path, "far.safetensors", save(far))
        yield (
            "only an optimizer",
            put(tmp_path, "o.pth", torch_bytes({"optimizer": training_file(vit_state)["optimizer"]})),
        )
        yield "no tensor", put(tmp_path, "none.pth", torch_bytes({"epoch": 3, "model": {}}))
        yield "tensors under numbers", put(tmp_path, "n.pth", torch_bytes(list(vit_state.values())))
        yield "sparse", put(tmp_path, "sparse.pth", torch_bytes({"model": {"w": torch.eye(3).to_sparse()}}))

    refuse(cases(), canary)


def test_configs(tmp_path: Path, vit_state: State, canary: Path, config: dict[str, Any]) -> None:
    arguments = config["model_args"]
    bad: dict[str, Any] = {
        "empty": b"", "half": b'{"architecture": "vit', "list": [], "text": "vit", "number": 3, "null": None,
        "nested": b"[" * 100_000, "binary": bytes(range(256)), "latin": '{"a": "é"}'.encode("latin-1"),
        "no architecture": {"model_args": arguments}, "architecture a number": config | {"architecture": 3},
        "unknown": config | {"architecture": "vit_nonsense"}, "hub": config | {"architecture": "hf-hub:some/thing"},
        "local": config | {"architecture": "local-dir:/tmp"}, "path": config | {"architecture": "../../etc"},
        "another": config | {"architecture": "vit_base_patch16_224", "model_args": {}},
        "arguments a list": config | {"model_args": [1]}, "unknown argument": config | {"model_args": {"bogus": 1}},
        "deep": config | {"model_args": arguments | {"depth": 10**9}},
        "negative": config | {"model_args": arguments | {"depth": -3}},
        "wide": config | {"model_args": arguments | {"embed_dim": 10**9}},
        "large": config | {"model_args": arguments | {"img_size": [10**7, 10**7]}},
        "infinite": b'{"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": Infinity}}',
        "no heads": config | {"model_args": arguments | {"num_heads": 0}},
        "text mean": config | {"mean": "abc"}, "mean a list": config | {"mean": [[1]]},
        "classifier a number": config | {"classifier": 3}, "pretrained_cfg a text": config | {"pretrained_cfg": "x"},
        "text width": config | {"model_args": arguments | {"embed_dim": "wide"}},
        "big file": b" " * (17 * 2**20),
    }  # fmt: skip

    def cases() -> Iterator[Case]:
        for what, text in bad.items():
            yield what, model_folder(tmp_path / what.replace(" ", "-") / "m", text, save(vit_state))

    refuse(cases(), canary)


def hostile_objects(proof: Path) -> dict[str, Any]:
    text = f"open({str(proof)!r}, 'w').close()"
    touch = f"touch {proof}"
    run = Runs(os.system, touch)
    return {
        "os.system": run, "subprocess": Runs(subprocess.call, ["touch", str(proof)]), "exec": Runs(exec, text),
        "eval": Runs(eval, f"open({str(proof)!r}, 'w')"), "open": Runs(open, str(proof), "w"),
        "import": Runs(builtins.__import__, "antigravity"), "getattr": Runs(getattr, "text", "upper"),
        "partial": Runs(functools.partial, os.system, touch), "map": Runs(map, os.system, [touch]),
        "torch.load": Runs(torch.load, str(proof)), "torch.hub": Runs(torch.hub.load, "a/b", "c"),
        "path": Runs(Path.touch, proof), "popen": Runs(os.popen, touch), "bytearray": Runs(bytearray, 2**40),
        "in a list": [1, [2, (run,)]], "as a value": {"deep": {"deeper": {"deepest": run}}},
        "in options": argparse.Namespace(lr=run), "as state": Builds(run), "a module": torch.nn.Linear(2, 2),
    }  # fmt: skip


def test_code_in_pickles(tmp_path: Path, vit_state: State, canary: Path) -> None:
    plain = {"model": Runs(os.system, f"touch {canary}")}

    def cases() -> Iterator[Case]:
        for number, (what, item) in enumerate(hostile_objects(canary).items()):
            payload = {"model": vit_state, "extra": item}
            for legacy in (False, True):
                content = torch_bytes(payload, legacy=legacy)
                yield f"{what} legacy={legacy}", put(tmp_path / f"{number}{legacy}", "x.pth", content)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            content = pickle.dumps(plain, protocol=protocol)
            yield f"plain pickle {protocol}", put(tmp_path / f"plain{protocol}", "x.bin", content)

    refuse(cases(), canary, inspected=True)
    pickle.loads(pickle.dumps(plain))
    canary.unlink()  # the trap does work; only our reading avoids it


def test_handmade_pickles(tmp_path: Path, vit_state: State, canary: Path) -> None:
    command = f"touch {canary}".encode()
    short = bytes([len(command)]) + command
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu%stQ"
    double = b"(" + b"K\x01" * 2 + b"t" + b"q\x01h\x01\x86" * 60
    made = {
        "global": b"\x80\x02cos\nsystem\nU" + short + b"\x85R.",
        "global through posix": b"\x80\x02cposix\nsystem\nU" + short + b"\x85R.",
        "builtin": b"\x80\x02c__builtin__\neval\nU" + short + b"\x85R.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + short + b"\x85R.",
        "inst": b"\x80\x02(S'" + command + b"'\nios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\nU" + short + b"o.",
        "new object": b"\x80\x02cos\nsystem\nU" + short + b"\x85\x81.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent text": b"\x80\x02Pos.system\n.",
        "persistent number": b"\x80\x02K\x01Q.",
        "module reference": b"\x80\x02(X\x06\0\0\0modulecos\nsystem\nK\x01K\x02K\x03tQ.",
        "storage of a terabyte": b"\x80\x02" + storage % b"\x8a\x06\0\0\0\0\0\x01" + b".",
        "storage below zero": b"\x80\x02" + storage % b"J\xff\xff\xff\xff" + b".",
        "storage by text": b"\x80\x02" + storage % b"X\x01\0\0\x009" + b".",
        "a long text that is not there": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "nothing": b"\x80\x02.", "no end": b"\x80\x02K\x01", "no operands": b"\x80\x02R.", "no mark": b"\x80\x02t.",
        "a memo that is not there": b"\x80\x02h\x07.",
        "a key that hashes for ever": b"\x80\x02}" + double + b"K\x01s.",
        "a codec": b"\x80\x02c_codecs\nencode\nX\x03\0\0\0abcX\x04\0\0\0zlib\x86R.",
        "a dtype of objects": b"\x80\x02cnumpy\ndtype\nX\x02\0\0\0O8\x89\x88\x87R.",
        "a scalar of objects": b"\x80\x02cnumpy.core.multiarray\nscalar\n"
        b"cnumpy\ndtype\nX\x02\0\0\0O8\x85RX\0\0\0\0\x86R.",
    }  # fmt: skip

    def cases() -> Iterator[Case]:
        base = torch_bytes({"model": vit_state})
        for number, (what, code) in enumerate(made.items()):
            yield what, put(tmp_path / f"z{number}", "x.pth", rezip(base, lambda m, c=code: swap(m, "data.pkl", c)))
        legacy = torch_bytes({"model": vit_state}, legacy=True)
        start = legacy.index(b"\x80\x02}", 60)
        for what in ("global", "stack global", "storage of a terabyte", "no end", "obj"):
            yield f"legacy {what}", put(tmp_path / f"l {what}", "x.pth", legacy[:start] + made[what] + legacy[start:])

    refuse(cases(), canary, inspected=True)


def swap(members: dict[str, bytes], ending: str, content: bytes) -> dict[str, bytes]:
    return {name: content if name.endswith(f"/{ending}") else old for name, old in members.items()}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_and_headers(tmp_path: Path, vit_state: State, canary: Path) -> None:
    base = torch_bytes({"model": vit_state})
    big = torch_bytes({"model": {"w": torch.zeros(2**22)}})  # 16 MiB of zeros
    nested: list[Any] = [torch.ones(1)]
    for _ in range(40):
        nested = [nested, nested]
    selfish: list[Any] = [torch.ones(1)]
    selfish.append(selfish)

    def zips() -> Iterator[tuple[str, bytes]]:
        yield "packed", rezip(big, lambda m: m, compression=zipfile.ZIP_DEFLATED)
        yield "pickle alone", rezip(base, lambda m: {n: c for n, c in m.items() if n.endswith("data.pkl")})
        yield "no pickle", rezip(base, lambda m: {n: c for n, c in m.items() if not n.endswith("data.pkl")})
        yield "a storage is missing", rezip(base, lambda m: {n: c for n, c in m.items() if not n.endswith("/data/3")})
        yield "a short storage", rezip(base, lambda m: swap(m, "data/3", b"1234"))
        yield "a long storage", rezip(base, lambda m: swap(m, "data/3", bytes(10**6)))
        for name in ("../../escaped", "/tmp/escaped", "archive/../../escaped", "c:\\escaped", "other/file"):
            yield f"member {name}", rezip(base, lambda m, n=name: m | {n: b"x"})
        yield "a program", rezip(base, lambda m: m | {"archive/constants.pkl": b"x"})
        for name in ("archive/data.pkl", "archive/data/0"):
            buffer = io.BytesIO(base)
            with zipfile.ZipFile(buffer, "a") as archive:
                archive.writestr(name, b"another")
            yield f"{name} twice", buffer.getvalue()
        hidden = base.replace(struct.pack("<I", 128), struct.pack("<I", 2**31))
        yield "a size that lies", hidden
        yield "not a torch zip", rezip(base, lambda m: {"hello.txt": b"hello"})
        yield "lists without end", torch_bytes(nested)
        yield "a list in itself", torch_bytes(selfish)
        yield "one number as a trillion", torch_bytes({"model": {"w": torch.ones(1).expand(10**6, 10**6)}})
        yield "the same many times", torch_bytes({"model": {"w": torch.zeros(2**20).expand(99, -1)}})

    def headers() -> Iterator[tuple[str, bytes]]:
        def header(text: bytes, data: bytes = bytes(16), length: int | None = None) -> bytes:
            return struct.pack("<Q", len(text) if length is None else length) + text + data

        def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> bytes:
            return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()

        yield "a header of 2^63", header(tensor([4], [0, 16]), length=2**63)
        yield "a header of a terabyte", header(tensor([4], [0, 16]), length=2**40)
        yield "a tensor of terabytes", header(tensor([2**40], [0, 2**42]))
        yield "offsets backwards", header(tensor([4], [16, 0]))
        yield "negative offsets", header(tensor([4], [-16, 0]))
        yield "a shape that overflows", header(tensor([2**33, 2**33], [0, 16]))
        yield "a shape too large", header(tensor([5], [0, 16]))
        yield "an unknown dtype", header(tensor([4], [0, 16], "F31"))
        yield "a hole", header(tensor([2], [8, 16]))
        twice = tensor([4], [0, 16])
        yield "a name twice", header(twice[:-1] + b", " + twice[1:])
        yield "no object", header(b"[1, 2, 3]")
        yield "empty object", header(b"{}", b"")
        yield "braces only", header(b"{" * 50_000)

    def cases() -> Iterator[Case]:
        for number, (what, content) in enumerate(zips()):
            yield what, put(tmp_path / f"z{number}", "x.pth", content)
        for number, (what, content) in enumerate(headers()):
            yield what, put(tmp_path / f"h{number}", "x.safetensors", content)

    refuse(cases(), canary)
    assert not (tmp_path / "escaped").exists()


def test_what_is_no_file(tmp_path: Path, vit_state: State, canary: Path, config: dict[str, Any]) -> None:
    outside = put(tmp_path / "outside", "secret.safetensors", save(vit_state))

    def linked(name: str, target: Path) -> Path:
        folder = model_folder(tmp_path / f"linked-{name}-{target.name}", config, save(vit_state))
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        return folder

    def cases() -> Iterator[Case]:
        for name, content in {
            "empty": b"", "one byte": b"\x80", "zip start": b"PK\x03\x04", "text": b"weights\n",
            "png": b"\x89PNG\r\n\x1a\n12",
            "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\0", "tar": bytes(1024), "html": b"<!DOCTYPE html><html>404</html>",
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "numpy": b"\x93NUMPY\x01\0",
        }.items():  # fmt: skip
            yield name, put(tmp_path / name, "x.pth", content)
        (tmp_path / "folder.pth").mkdir()
        yield "a folder", tmp_path / "folder.pth"
        os.mkfifo(tmp_path / "pipe.pth")
        yield "a pipe", tmp_path / "pipe.pth"
        for name, target in {"zero": "/dev/zero", "gone": "nowhere", "loop": "loop.pth"}.items():
            (tmp_path / f"{name}.pth").symlink_to(target)
            yield f"a link to {target}", tmp_path / f"{name}.pth"
        yield "weights outside", linked("model.safetensors", outside)
        yield "weights by a relative link", linked("model.safetensors", Path("../outside/secret.safetensors"))
        yield "config outside", linked("config.json", Path("/etc/hostname"))
        yield "config nowhere", linked("config.json", Path("nowhere"))
        yield "weights a device", linked("model.safetensors", Path("/dev/zero"))
        for name in ("model.safetensors", "config.json"):
            folder = model_folder(tmp_path / f"dir-{name}", config, save(vit_state))
            (folder / name).unlink()
            (folder / name).mkdir()
            yield f"{name} a folder", folder
        yield "no such file", tmp_path / "missing.pth"

    refuse(cases(), canary)
    with socket.socket(socket.AF_UNIX) as server:
        name = tmp_path / "s.pth"
        try:
            server.bind(str(name))
        except OSError:
            return  # the path is too long for a socket on this machine
        refuse(iter([("a socket", name)]), canary)


def test_links_within_a_folder_and_the_hub_cache_are_fine(
    tmp_path: Path, vit_state: State, config: dict[str, Any]
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blob = put(tmp_path / "models--a--b" / "blobs", "abc", save(vit_state))
    model_folder(snapshot, config, b"")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    assert load_backbone(snapshot).info.coverage == 1
    here = model_folder(tmp_path / "here", config, save(vit_state))
    (here / "model.safetensors").rename(here / "weights-1.safetensors")
    (here / "model.safetensors").symlink_to("weights-1.safetensors")
    assert load_backbone(here).info.coverage == 1


def test_hugging_face_folders(tmp_path: Path, shared_dir: Path, canary: Path) -> None:
    names = ["hf_beit_shared", "hf_vitmae_base", "hf_data2vec_vision_abspos", "hf_ijepa"]
    folders = {name: shared_dir / "golden/checkpoints" / name for name in names}

    def cases() -> Iterator[Case]:
        for number, (name, folder) in enumerate(folders.items()):
            config, weights = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()
            for share in range(1, 8):
                cut = weights[: len(weights) * share // 8]
                yield f"{name} cut", model_folder(tmp_path / f"{name}-{share}/m", config, cut)
            another = folders[names[number - 1]] / "config.json"
            state = load_file(folder / "model.safetensors")
            key = next(key for key in state if key.endswith("layer.1.output.dense.weight"))
            rest = {other: item for other, item in state.items() if other != key}
            nan = state | {key: torch.full_like(state[key], float("nan"))}
            bad = {
                "swapped": (another.read_bytes(), weights), "half": (config[: len(config) // 2], weights),
                "missing": (config, save(rest)), "NaN": (config, save(nan)),
                "shape": (config, save(state | {key: state[key][:-1].contiguous()})),
            }  # fmt: skip
            for what, (text, content) in bad.items():
                yield f"{name} {what}", model_folder(tmp_path / f"{name}-{what}/m", text, content)

    refuse(cases(), canary)
