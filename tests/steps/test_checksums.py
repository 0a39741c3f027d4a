"""The record of a folder's files: what it covers, and that every command which reads a folder asks it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.specs import ModelSpec
from harness.evaluation.arms import adapters_in
from harness.models.inspect import inspect_adapter, inspect_model
from harness.steps import provenance
from harness.steps.checksums import differences, record_files, refuse_damaged
from harness.steps.provenance import digest_of_bytes
from harness.testing import tiny_adapter
from tests.damage import flip

sys.path.insert(0, str(Path(__file__).parents[1]))
import fake_vllm

ADAPTER_FILE, MODEL_FILE = "adapter_model.safetensors", "model.safetensors"


@pytest.fixture
def recorded(alone: Path, tiny: Path) -> Path:
    """A model `base` and an adapter `arm` on it, with their records."""
    shutil.copytree(tiny, alone / "base")
    tiny_adapter(alone / "arm", alone / "base")
    for folder in (alone / "base", alone / "arm"):
        record_files(folder, folder.iterdir())
    return alone


def test_the_record_holds_sha256_by_relative_name(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b", ".hidden", "checksums.json"):
        (tmp_path / name).write_text(name)
    record_files(tmp_path, tmp_path.rglob("*"))
    files = json.loads((tmp_path / "checksums.json").read_text())["files"]
    # echo -n a | sha256sum
    assert files["a"] == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert set(files) == {"a", "inner/b"}


def test_a_folder_is_used_without_its_pages_and_sub_folders(tmp_path: Path) -> None:
    """Who made it is told of them."""
    (tmp_path / "step").mkdir()
    for name in ("config.json", "README.md", "merge.html", "step/log.jsonl"):
        (tmp_path / name).write_text(name)
    record_files(tmp_path, tmp_path.rglob("*"))
    for name in ("README.md", "merge.html", "step/log.jsonl"):
        (tmp_path / name).unlink()
    refuse_damaged(tmp_path, "--adapter")
    assert set(differences(tmp_path, everything=True)) == {"README.md", "merge.html", "step/log.jsonl"}


def test_many_damaged_files_are_counted(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).write_text(name)
    record_files(tmp_path, tmp_path.iterdir())
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("")
    for name in "cde":
        (tmp_path / name).unlink()
    with pytest.raises(UserError) as caught:
        refuse_damaged(tmp_path, "--adapter it")
    seen, written = digest_of_bytes(b"x")[:12], digest_of_bytes(b"a")[:12]
    assert str(caught.value) == (
        f"--adapter it: a has SHA-256 {seen}, and {written} was written; b is empty; c is missing; and 2 more\n"
        "  Make or fetch it again; if the change is yours, delete checksums.json in it, and it is taken as it is."
    )


def test_an_outsider_s_folder_is_taken_as_it_is(recorded: Path) -> None:
    """Also one whose owner took the record away to change something."""
    base = inspect_model(ModelSpec(model="base"))
    (recorded / "arm" / "checksums.json").unlink()
    flip(recorded / "arm" / ADAPTER_FILE)
    assert inspect_adapter("arm", base).rank == 2


def test_a_folder_can_be_moved(recorded: Path) -> None:
    (recorded / "elsewhere").mkdir()
    shutil.move(recorded / "arm", recorded / "elsewhere" / "renamed")
    base = inspect_model(ModelSpec(model="base"))
    assert inspect_adapter("elsewhere/renamed", base).name == "renamed"


def test_weights_are_read_once_for_the_record_and_for_the_id(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest is remembered by what the file system says of a file that has settled, as any large one has."""
    read: list[str] = []
    plain = hashlib.file_digest

    def file_digest(stream: Any, kind: str) -> Any:
        read.append(Path(stream.name).name)
        return plain(stream, kind)

    monkeypatch.setattr(provenance, "_SETTLED_NS", 0)
    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    base = inspect_model(ModelSpec(model="base"))
    inspect_adapter("arm", base)
    assert (read.count(MODEL_FILE), read.count(ADAPTER_FILE)) == (1, 1)
    inspect_adapter("arm", inspect_model(ModelSpec(model="base")))
    assert (read.count(MODEL_FILE), read.count(ADAPTER_FILE)) == (1, 1)


EVAL = "eval --task sums.yaml --out out --model"
READERS = {
    "eval --adapter": (f"{EVAL} base --adapter arm", "arm", "--adapter arm"),
    "eval --model": (f"{EVAL} base", "base", "--model base"),
    "align --from": ("align sft --model base --dataset jsonl:rows --from arm --out out", "arm", "--from arm"),
    "align --model": ("align sft --model base --dataset jsonl:rows --out out", "base", "--model base"),
    "merge --inputs": ("merge ties --base base --inputs arm --out out", "arm", "--inputs [1] arm"),
    "merge --base": ("merge ties --base base --inputs arm --out out", "base", "--base base"),
    "fold": ("fold arm --base base --out out", "arm", "ADAPTER arm"),
    "fold --base": ("fold arm --base base --out out", "base", "--base base"),
    "serve --adapter": ("serve --model base --adapter arm --check", "arm", "--adapter arm"),
    "serve --model": ("serve --model base --check", "base", "--model base"),
}


@pytest.mark.parametrize("reader", READERS)
def test_one_flipped_bit_stops_every_command_that_reads_it(
    recorded: Path, sums: Path, cli: Any, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    monkeypatch.syspath_prepend(str(fake_vllm.write(recorded / "site")))
    shutil.copytree(sums, recorded, dirs_exist_ok=True)
    command, folder, where = READERS[reader]
    name = ADAPTER_FILE if folder == "arm" else MODEL_FILE
    flip(recorded / folder / name)
    ran = cli(*command.split())
    assert ran.code == 2, ran.err
    said = ran.out if "--check" in command else ran.err
    assert f"{where}: {name} has SHA-256 " in said
    assert not Path("out").exists()


def test_an_adapter_that_lost_its_configuration_is_not_passed_over(recorded: Path) -> None:
    """In a folder of several it would be an arm less; and of an alignment its kept checkpoint would be taken for it."""
    for name in ("x", "y"):
        shutil.copytree(recorded / "arm", recorded / "several" / name)
    (recorded / "several" / "x" / "adapter_config.json").unlink()
    assert adapters_in("several") == ["several/x", "several/y"]
    shutil.copytree(recorded / "arm", recorded / "arm" / "step-3")
    (recorded / "arm" / "adapter_config.json").unlink()
    assert adapters_in("arm") == ["arm"]
    base = inspect_model(ModelSpec(model="base"))
    with pytest.raises(UserError, match=r"--adapter arm: adapter_config\.json is missing"):
        inspect_adapter("arm", base)
