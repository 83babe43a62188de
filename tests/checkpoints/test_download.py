"""Downloads against a server on this machine: resumed, verified, complete or absent; and what to do without one."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_refiner.checkpoints import catalog, resolve
from mim_refiner.checkpoints.catalog import CATALOGUE, Entry, cached_path, family_licence, fetch
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.errors import CheckpointError

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        plan, content = self.server, self.server.content
        plan.requests.append(self.headers.get("Range"))
        if plan.refuse:
            self.send_error(plan.refuse.pop(0))
            return
        start, end = 0, len(content)
        asked = self.headers.get("Range")
        if asked and plan.ranges and self.headers.get("If-Range") == plan.tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            end = min(end, start + plan.at_most)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", plan.tag)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        stop = plan.cut.pop(0) if plan.cut else len(content)
        self.wfile.write(content[start : min(stop, end)])  # a shorter answer than announced: the connection breaks

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Any]:
    httpd: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    httpd.content, httpd.tag, httpd.cut, httpd.refuse, httpd.requests, httpd.ranges = CONTENT, '"v1"', [], [], [], True
    httpd.at_most = len(CONTENT)  # bytes of an answer to a range
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MIM_REFINER_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(catalog.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "_WAITS", (0.0,) * len(catalog._WAITS))
    return tmp_path / "cache"


def entry(server: Any, **known: str) -> Entry:
    address = f"http://127.0.0.1:{server.server_port}/some/encoder.pth"
    return Entry("toy", "mae", "ViT", 32, "none", "none", address, "https://example.org/page", **known)


def fails(which: Entry) -> str:
    with pytest.raises(CheckpointError) as caught:
        fetch(which)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_download_once_and_verified(server: Any, cache: Path) -> None:
    which = entry(
        server, sha256=hashlib.sha256(CONTENT).hexdigest(), hash_start="md5:" + hashlib.md5(CONTENT).hexdigest()[:6]
    )
    path = fetch(which)
    assert path == cached_path(which) == cache / "toy" / "encoder.pth"
    assert path.read_bytes() == CONTENT
    assert {file.name for file in path.parent.iterdir()} <= {"encoder.pth", "encoder.pth.lock"}
    fetch(which)
    assert server.requests == [None]  # the second call used the cache


def test_interrupted_transfer_goes_on_where_it_stopped(server: Any) -> None:
    server.cut = [300_000, 700_000]
    assert fetch(entry(server)).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=700000-"]


def test_an_answer_with_a_part_of_the_rest_is_not_the_end(server: Any) -> None:
    server.cut, server.at_most = [300_000], 400_000
    assert fetch(entry(server)).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=700000-"]


def test_a_later_call_goes_on_too(server: Any) -> None:
    server.cut = [100_000] * 5
    text = fails(entry(server))
    assert "100000 of 1048576 bytes" in text
    assert "100000 bytes are kept" in text
    assert not cached_path(entry(server)).exists()
    server.requests.clear()
    assert fetch(entry(server)).read_bytes() == CONTENT
    assert server.requests == ["bytes=100000-"]


def test_a_changed_file_is_begun_anew(server: Any) -> None:
    server.cut = [100_000] * 5
    fails(entry(server))
    server.content, server.tag = CONTENT[::-1], '"v2"'
    assert fetch(entry(server)).read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges(server: Any) -> None:
    server.cut, server.ranges = [100_000], False
    assert fetch(entry(server)).read_bytes() == CONTENT


def test_wrong_hash_is_refused_and_removed(server: Any) -> None:
    for known in ({"sha256": "0" * 64}, {"hash_start": "md5:000000"}, {"hash_start": "sha256:00000000"}):
        which = entry(server, **known)
        assert "removed" in fails(which)
        assert {file.name for file in cached_path(which).parent.iterdir()} == {"encoder.pth.lock"}


def test_busy_server_is_asked_again_and_a_missing_file_is_not(server: Any) -> None:
    server.refuse = [503, 429]
    assert fetch(entry(server)).read_bytes() == CONTENT
    server.requests.clear()
    server.refuse = [404]
    gone = replace(entry(server), name="gone")
    assert "404" in fails(gone)
    assert "download it elsewhere and pass its path, or put it at" in fails(
        replace(gone, address="http://127.0.0.1:1/x")
    )
    assert server.requests == [None]


def test_no_room_on_the_disk(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_SPARE_BYTES", 10**18)
    assert "make room" in fails(entry(server))


def test_offline_says_how_to_get_the_file(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_REFINER_OFFLINE", "1")
    text = fails(entry(server))
    assert "offline mode is on" in text
    assert str(cached_path(entry(server))) in text
    assert server.requests == []


def test_files_behind_a_web_page(server: Any) -> None:
    assert "https://example.org/page" in fails(replace(entry(server), address=""))


def test_a_cache_that_cannot_be_written(server: Any, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert catalog.CACHE_VARIABLE in fails(entry(server))


def test_load_backbone_by_catalogue_name(
    server: Any, tmp_path: Path, vit_state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": vit_state}, tmp_path / "w.pth")
    server.content = (tmp_path / "w.pth").read_bytes()
    monkeypatch.setitem(catalog.CATALOGUE, "toy", entry(server))
    backbone = load_backbone("toy", num_heads=4)
    assert backbone.info.family == "mae"
    assert resolve.read_source("toy").source == "toy"


# the catalogue itself


def test_catalogue_entries_are_whole() -> None:
    for name, each in CATALOGUE.items():
        assert each.name == name
        assert each.licence
        assert each.page.startswith("https://")
        assert each.address == "" or each.address.startswith(("https://", "hf-hub:"))
        assert "?" not in cached_path(each).name
        assert len(each.sha256) in (0, 64)
    families = {each.family for each in CATALOGUE.values()}
    assert families >= {
        "mae", "data2vec2", "dbot", "crossmae", "ijepa", "beit", "beit2", "simmim", "ibot", "capi", "mim_refiner",
        "bird_mae", "cae", "dinov2", "eva01", "mae_ct", "mae_pytorch", "mmpretrain", "mmpretrain_beit", "multimae",
        "prithvi", "scale_mae", "tinymim", "videomae", "vitpose",
    }  # fmt: skip
    assert all(re.fullmatch(r"(md5:[0-9a-f]{6}|sha256:[0-9a-f]{8})?", each.hash_start) for each in CATALOGUE.values())


def test_licences() -> None:
    nc, free, apache = "CC-BY-NC-4.0", "MIT", "Apache-2.0"
    known = dict.fromkeys(
        ("mae", "crossmae", "ijepa", "hf_vitmae", "hf_ijepa", "multimae", "scale_mae", "videomae"), nc
    )
    known |= dict.fromkeys(("beit", "beit2", "hf_beit", "eva01"), free) | {"data2vec2": "CC-BY-NC"}
    known |= dict.fromkeys(("dbot", "ibot", "capi", "dinov2", "mmpretrain", "mmpretrain_swin", "prithvi"), apache)
    known |= dict.fromkeys(("timm", "mim_refiner", "cae"), "unknown")
    assert {family: family_licence(family) for family in known} == known
    published = {"mm_milan_b16": "sha256:180922e8", "mm_mae_h16": "sha256:ff848775", "mae_b16": "md5:8cad7c"}
    assert {name: CATALOGUE[name].hash_start for name in published} == published
    assert CATALOGUE["mae_ct_aug_h16"].licence == "unknown"  # its repository has no licence
    assert CATALOGUE["mae_refined_l16"].licence.startswith("CC-BY-NC-4.0")
