"""What tools put beside weights: every protocol and kind of object is read as data, and none of it runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import functools
import io
import os
import pathlib
import pickle
import re
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mim_refiner.checkpoints import pickles
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.checkpoints.pickles import BrokenPickleError, UnsafePickleError, read_pickle
from mim_refiner.checkpoints.store import read_checkpoint
from mim_refiner.errors import CheckpointError

State = dict[str, Tensor]


def fake(monkeypatch: pytest.MonkeyPatch, full: str, *bases: type, **members: Any) -> Any:
    """A class under the name of a library that need not be here."""
    module, _, name = full.rpartition(".")
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    kind = type(name, bases or (object,), {"__module__": module, **members})
    monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
    return kind


def with_state(kind: Any, **state: Any) -> Any:
    made = kind()
    made.__dict__.update(state)
    return made


def companions(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Objects that training tools keep in checkpoints."""
    node = fake(patch, "omegaconf.nodes.IntegerNode")
    config = with_state(fake(patch, "omegaconf.dictconfig.DictConfig"))
    listed = with_state(fake(patch, "omegaconf.listconfig.ListConfig"), _content=[with_state(node, _val=32)])
    config.__dict__ |= {
        "_parent": None,
        "_content": {"num_heads": with_state(node, _val=4, _parent=config), "l": listed},
    }
    wrapped: dict[str, Any] = {}
    for name in ("yacs.config.CfgNode", "mmengine.config.config.ConfigDict", "easydict.EasyDict", "addict.addict.Dict",
                 "lightning.fabric.utilities.data.AttributeDict"):  # fmt: skip
        wrapped[name] = fake(patch, name, dict)(num_heads=4, deep={"lr": 0.1})
    return wrapped | {
        "omegaconf": config,
        "history": with_state(fake(patch, "mmengine.logging.history_buffer.HistoryBuffer"), _log=np.array([0.5, 0.4])),
        "scaler": with_state(fake(patch, "deepspeed.runtime.fp16.loss_scaler.LossScaler"), cur_scale=1.0),
        "path": pathlib.PurePosixPath("/data/run"), "windows": pathlib.PureWindowsPath("c:/run"),
        "namespace": argparse.Namespace(num_heads=4, size=[32, 32]), "simple": types.SimpleNamespace(num_heads=4),
        "set": {1, 2}, "frozen set": frozenset({"a"}), "complex": 1 + 2j, "tuple keys": {("a", 1): 2, (0, (1, 2)): 3},
        "deque": collections.deque([1, 2], maxlen=5), "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict(a=1), "default": collections.defaultdict(list, {"a": [1]}),
        "date": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), "delta": datetime.timedelta(1),
        "decimal": decimal.Decimal("0.1"), "fraction": fractions.Fraction(1, 3), "uuid": uuid.UUID(int=1),
        "bytes": b"\x00\xff", "bytearray": bytearray(b"ab"), "big": 2**70, "slice": slice(1, 2), "none": None,
        "size": torch.Size([1, 2]), "device": torch.device("cpu"), "dtype": torch.bfloat16,
        "version": torch.torch_version.TorchVersion("2.1"), "generator": np.random.default_rng(0).bit_generator.state,
        "rng": np.random.default_rng(0), "masked": np.ma.masked_array([1, 2], [0, 1]), "range": range(3),
        "ellipsis": (..., NotImplemented), "records": np.array([1.5]).view(np.recarray),
        "transform": fake(patch, "torchvision.transforms.transforms.Resize")(),
        "classes": [type(None), torch.nn.GELU, re.compile("x.*")],
        "partial": functools.partial(torch.nn.LayerNorm, eps=1e-6),
        "random state": np.random.RandomState(0), "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip


NUMBERS = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint64", "bool_")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:.*align should be passed")  # numpy's own pickles read back by the test
def test_companions_of_weights_do_not_matter(
    tmp_path: Path, vit_state: State, monkeypatch: pytest.MonkeyPatch, protocol: int, legacy: bool
) -> None:
    path = tmp_path / "run.pth"
    scalars = {name: getattr(np, name)(1) for name in NUMBERS}
    scalars |= {
        "text": np.str_("a"),
        "raw": np.bytes_(b"a"),
        "time": np.datetime64("2024-01-01"),
        "c": np.complex64(1j),
    }
    extra = companions(monkeypatch) | {"scalars": scalars, "long": np.longdouble(1)}
    extra |= {"arrays": [np.arange(6).reshape(2, 3), np.array(["a"]), np.asfortranarray(np.eye(3, 2))]}
    with path.open("wb") as file:
        torch.save(
            {"model": vit_state, **extra}, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
        )
    contents = read_checkpoint(path)
    facts = contents.facts
    assert {facts[f"scalars.{name}"] for name in NUMBERS} == {1}
    assert (facts["omegaconf.num_heads"], facts["omegaconf.l"], facts["yacs.config.CfgNode.deep.lr"]) == (4, (32,), 0.1)
    assert (facts["namespace.size"], facts["simple.num_heads"], contents.fact("num_heads")) == ((32, 32), 4, 4)
    assert facts["partial.eps"] == 1e-6
    assert contents.sections["arrays"]["0"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(contents.sections["arrays"]["2"], torch.eye(3, 2, dtype=torch.float64))
    backbone = load_backbone(path)  # the heads are in the options
    assert all(torch.equal(tensor, vit_state[name]) for name, tensor in backbone.model.state_dict().items())


def test_views_strides_and_kinds_of_numbers(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {
        "view": base[4:16].view(3, 4).T, "step": base[::5], "whole": base, "scalar": torch.tensor(3), "none": base[:0],
        "bf16": base.bfloat16(), "bool": base > 3, "fp8": base.to(torch.float8_e4m3fn),
        "complex": base.to(torch.complex64),
    }  # fmt: skip
    for legacy in (False, True):
        torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        found = read_checkpoint(tmp_path / "x.pth").sections[""]
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].to(torch.complex64), tensor.to(torch.complex64)), name


def test_a_pickle_of_arrays_is_read(tmp_path: Path, vit_state: State) -> None:
    arrays = {name: tensor.numpy() for name, tensor in vit_state.items()}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "converted"}))
    backbone = load_backbone(tmp_path / "model.pkl", num_heads=4)
    assert torch.equal(backbone.model.norm.weight, vit_state["norm.weight"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_state_dict_written_by_pickle_is_read(tmp_path: Path, vit_state: State, protocol: int) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": vit_state}, protocol=protocol))
    held = load_backbone(path, num_heads=4).model.state_dict()
    assert all(torch.equal(held[name], vit_state[name]) for name in held)
    path.write_bytes(pickle.dumps({"model": vit_state, "own": collections.namedtuple}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"could run code.*__import__\('pickle'\)\.load"):
        load_backbone(path, num_heads=4)
    inner = pickle.dumps(Runs(torch.storage._load_from_bytes, b"x"), protocol=protocol)
    for item in (Runs(torch.storage._load_from_bytes, inner), Runs(torch.storage._load_from_bytes, b"\x80\x02K\x01.")):
        path.write_bytes(pickle.dumps({"model": item}, protocol=protocol))
        with pytest.raises(CheckpointError, match=r"could run code|damaged"):
            read_checkpoint(path)


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_hidden_in_stubs_is_named_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    proof = tmp_path / "executed"
    bad = Runs(os.system, f"touch {proof}")
    kinds = [
        fake(monkeypatch, name)
        for name in ("omegaconf.dictconfig.DictConfig", "mmengine.logging.HistoryBuffer", "yacs.config.CfgNode",
                     "easydict.EasyDict", "pytorch_lightning.callbacks.Checkpoint")
    ]  # fmt: skip
    hidden: list[Any] = [with_state(kind, inner={"deep": [bad]}) for kind in kinds]
    hidden += [argparse.Namespace(x=bad), {("key",): bad}, collections.OrderedDict(a=bad), [{1: (bad,)}], {"s": [bad]}]
    hidden += [Runs(pathlib.PurePosixPath, bad), Runs(datetime.timedelta, bad), Runs(complex, bad), Runs(set, [bad])]
    for item in hidden:
        with pytest.raises(UnsafePickleError, match=r"posix\.system|nt\.system"):
            read_pickle(pickle.dumps(item, protocol=protocol))
    assert not proof.exists()


def test_functions_of_data_packages_stay_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mmengine.fileio.load", "omegaconf.resolvers.run", "numpy.load", "transformers.utils.import_it",
                 "torch.distributed.run.main", "types.CodeType", "typing.get_type_hints"):  # fmt: skip
        module, _, last = name.rpartition(".")
        with pytest.raises(UnsafePickleError, match=name):
            read_pickle(f"c{module}\n{last}\n)R.".encode())


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02cbuiltins\nset\n]r\xff\xff\xff\x7f\x85R.",  # a memo entry of two billion
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a bytearray of 2^63 bytes
        b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2^63
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 2^63
        b"\x80\x02cbuiltins\nset\nJ\xff\xff\xff\x7f\x85R.",  # a set of a number
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",  # two billion zeros
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0base64\x86R.",
        b"\x80\x02}cargparse\nNamespace\n)R}b0" + b"K\x01K\x01\x86" + b"q\x01h\x01\x86" * 70 + b"K\x01s.",
        b"\x80\x02}\x8a\xff" + b"\x7f" * 255 + b"K\x01s.",  # a number of 2000 bits as key
        b"\x80\x02cargparse\nNamespace\nN}\x86b.",  # state of a class
        b"\x80\x02Nb.", b"\x80\x02NNb.", b"\x80\x02X\x01\0\0\0a)R.",  # a call of a text
        b"\x80\x04\x8f(K\x01\x90\x93.",
    ],
)  # fmt: skip
def test_bombs(code: bytes) -> None:
    before = torch.ones(1)
    try:
        value, _ = read_pickle(code)
    except BrokenPickleError:
        value = None
    assert value is None or value == [], (value, before)


def test_the_number_of_operations_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_READS", 1000)
    with pytest.raises(BrokenPickleError, match="more operations than any checkpoint needs"):
        read_pickle(b"\x80\x02" + b"}" * 2000 + b".")


def test_the_command_in_the_message_saves_the_weights(tmp_path: Path, vit_state: State, monkeypatch: Any) -> None:
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": vit_state, "own": Runs(collections.namedtuple, "Own", "a")}, path)
    with pytest.raises(CheckpointError, match=r"namedtuple.*could run code.*python -c") as caught:
        load_backbone(path, num_heads=4)
    code = str(caught.value).partition('python -c "')[2].rstrip('"')
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert load_backbone(tmp_path / "weights.pth", num_heads=4).info.coverage == 1


def test_whole_programs_name_their_state_dict(tmp_path: Path) -> None:
    for payload, taken in (
        (torch.nn.Linear(2, 2), r"x\.state_dict"),
        ({"net": torch.nn.Linear(2, 2)}, r"x\['net'\]\.s"),
    ):
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(payload, buffer, _use_new_zipfile_serialization=new)
            (tmp_path / "x.pth").write_bytes(buffer.getvalue())
            with pytest.raises(CheckpointError, match=taken):
                read_checkpoint(tmp_path / "x.pth")
