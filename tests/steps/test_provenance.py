"""Digests notice every change that may move a number, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

from harness.contracts.plugin import Plugin
from harness.contracts.registry import Registered, load_plugins
from harness.steps import provenance
from harness.steps.provenance import code_digest, file_digest, files_digest

LOOSE = """
import {imports}
from harness import hookimpl, Executor

class Mine(Executor):
    name = "mine"
    summary = "mine"

    def open(self, config, context):
        raise NotImplementedError

@hookimpl
def register_executors():
    yield Mine()
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_digest_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_digest(tmp_path / "w") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_remembered_digest_is_used_until_the_file_changes(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_SETTLED_NS", 0)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 64)
    file_digest(weights)
    (note,) = (own_cache / "digests").iterdir()
    # That it is used at all can only be seen by telling it something else.
    note.write_text(json.dumps({**json.loads(note.read_text()), "sha256": "remembered"}))
    assert file_digest(weights) == "remembered"
    note.write_text("{torn")
    assert file_digest(weights) == hashlib.sha256(b"a" * 64).hexdigest()


def test_weights_that_change_under_one_path_with_size_and_mtime_kept_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_SETTLED_NS", 0)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 64)
    os.utime(weights, (1_000_000, 1_000_000))
    before = file_digest(weights)
    time.sleep(0.05)  # more than the granule of ctime on any kernel
    with weights.open("r+b") as stream:
        stream.write(b"b" * 64)
    os.utime(weights, (1_000_000, 1_000_000))
    assert weights.stat().st_size == 64
    assert weights.stat().st_mtime == 1_000_000
    assert file_digest(weights) == hashlib.sha256(b"b" * 64).hexdigest() != before


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path, own_cache: Path) -> None:
    weights = tmp_path / "w"
    weights.write_bytes(b"a")
    file_digest(weights)
    assert not (own_cache / "digests").exists()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_SETTLED_NS", 0)
    (tmp_path / "occupied").write_bytes(b"a file, not a folder")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "occupied"))
    (tmp_path / "w").write_bytes(b"abc")
    assert file_digest(tmp_path / "w").startswith("ba7816bf")


def test_a_folder_digest_covers_names_and_contents_but_not_the_place(tmp_path: Path) -> None:
    def digest(folder: str, **files: bytes) -> str:
        root = tmp_path / folder
        root.mkdir()
        for name, data in files.items():
            (root / name).write_bytes(data)
        return files_digest(root.iterdir(), root)

    assert digest("one", a=b"1", b=b"2") == digest("two", b=b"2", a=b"1")
    assert len({digest("three", a=b"1", c=b"2"), digest("four", a=b"2", b=b"1"), digest("five", a=b"1", b=b"2")}) == 3


def _entry(file: Path) -> Registered:
    return load_plugins([file]).entries["executor", "mine"]


def test_the_code_of_a_loose_file_is_itself_and_what_it_imports_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "loose"
    (folder / "prov_pack" / "deep").mkdir(parents=True)
    plugin = folder / "prov_plugin.py"
    plugin.write_text(LOOSE.format(imports="json, prov_near, prov_pack"))
    sources = {
        folder / "prov_near.py": "import prov_far\n",
        folder / "prov_far.py": "X = 1\n",
        folder / "prov_pack" / "__init__.py": "from . import inner\n",
        folder / "prov_pack" / "inner.py": "Y = 1\n",
        folder / "prov_pack" / "deep" / "part.py": "Z = 1\n",
    }
    for file, text in sources.items():
        file.write_text(text)
    (folder / "unrelated.py").write_text("A = 1\n")
    entry = _entry(plugin)
    before = code_digest(entry)
    (folder / "unrelated.py").write_text("A = 2\n")
    assert code_digest(entry) == before
    for file, text in {plugin: plugin.read_text(), **sources}.items():
        file.write_text(text + "# changed\n")
        assert code_digest(entry) != before, file.name
        file.write_text(text)
        assert code_digest(entry) == before


def test_the_code_of_a_bundled_plugin_is_the_numerics_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load_plugins()
    slerp, linear = (registry.entries["merger", name] for name in ("slerp", "linear"))
    before = code_digest(slerp)
    assert before != code_digest(linear)
    monkeypatch.setattr(provenance, "files_digest", lambda *_: pytest.fail("files were read"))
    assert code_digest(slerp) == before
    monkeypatch.setattr(type(slerp.plugin), "numerics", 2)
    assert code_digest(slerp) != before


def test_the_numerics_of_anybody_elses_plugin_hide_no_change(tmp_path: Path) -> None:
    plugin = tmp_path / "prov_numerics.py"
    plugin.write_text(LOOSE.format(imports="json").replace('name = "mine"', 'name = "mine"\n    numerics = 7'))
    before = code_digest(_entry(plugin))
    plugin.write_text(plugin.read_text() + "# changed\n")
    assert code_digest(_entry(plugin)) != before


def test_the_code_of_an_installed_package_is_all_its_python_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "prov_installed"
    package.mkdir()
    (package / "__init__.py").write_text(LOOSE.format(imports="json"))
    (package / "helper.py").write_text("X = 1\n")
    info = tmp_path / "prov_installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prov-installed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[harness]\nmine = prov_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = load_plugins().entries["executor", "mine"]
    before = code_digest(entry)
    (package / "helper.py").write_text("X = 2\n")
    assert code_digest(entry) != before
    assert isinstance(entry.plugin, Plugin)
    del sys.modules["prov_installed"]


def test_the_record_of_a_step_names_versions_and_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    record = provenance.provenance_record({"engine": "none"})
    assert record["numerics"] == provenance.NUMERICS
    assert record["engine"] == "none"
    assert record["libraries"]["python"] == ".".join(map(str, sys.version_info[:3]))
    text = json.dumps(record)
    assert os.uname().nodename not in text
    assert str(Path.home()) + "/" not in text
