"""Killed at bad moments: never half a model under the folder's name, and the next run ends with the same bytes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.core.progress import Reporter
from harness.merging import publish, run as merging
from harness.merging.write import Shards
from harness.steps.folder import StepFolder
from harness.steps.runner import Runner
from harness.steps.step import make_step
from tests.merging.conftest import tensor_bytes


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def at_the_third_tensor(patch: pytest.MonkeyPatch) -> None:
    written = iter((False, False))
    plain = Shards.write

    def write(self: Shards, *given: Any) -> None:
        plain(self, *given) if next(written, True) is False else die()

    patch.setattr(Shards, "write", write)


def before_the_index(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Shards, "finish", die)


def before_the_record(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(merging, "record_of", die)


def before_the_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publish, "fsync_folder", die)


def between_the_two_renames(patch: pytest.MonkeyPatch) -> None:
    """The old folder has gone aside, the new one has not got its name."""
    plain = Path.rename

    def rename(self: Path, target: Path) -> Path:
        return die() if self.name == "model" else plain(self, target)

    patch.setattr(Path, "rename", rename)


def run(made: Path, out: Path, seed: int = 0, fresh: bool = False) -> harness.Merging:
    arms = [made / "a0", made / "a1"]
    return harness.merge("dare_ties", arms, base=made / "base", out=out, workers=1, seed=seed, fresh=fresh)


def killed(prepare: Callable[[pytest.MonkeyPatch], None], made: Path, out: Path, **more: Any) -> None:
    """Merge in a forked process that kills itself."""
    child = os.fork()
    if child == 0:
        try:
            prepare(pytest.MonkeyPatch())
            run(made, out, **more)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture(scope="module")
def expected(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return tensor_bytes(run(made, tmp_path_factory.mktemp("whole") / "out").folder)


MOMENTS = (at_the_third_tensor, before_the_index, before_the_record, before_the_rename)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda one: one.__name__)
def test_a_killed_merge_leaves_nothing_under_its_name(
    moment: Callable[[pytest.MonkeyPatch], None], made: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    killed(moment, made, out)
    assert not out.exists()
    assert (tmp_path / ".out.merge").is_dir()
    done = run(made, out)
    assert not done.before
    assert tensor_bytes(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_to_be_replaced_comes_back(made: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    run(made, out, seed=1)
    before = tensor_bytes(out)
    killed(before_the_rename, made, out, fresh=True)
    assert tensor_bytes(out) == before
    killed(between_the_two_renames, made, out, fresh=True)
    assert not out.exists()
    # A refused command does not lose it, and the same one goes through.
    assert tensor_bytes(tmp_path / ".out.merge" / "replaced") == before
    run(made, out, fresh=True)
    assert tensor_bytes(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_stops_the_threads_and_cleans_up(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = threading.get_ident()
    plain = Shards.write
    count = 0

    def write(self: Shards, *given: Any) -> None:
        nonlocal count
        count += 1
        plain(self, *given)
        if count == 2:
            signal.pthread_kill(main, signal.SIGINT)

    monkeypatch.setattr(Shards, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "out")
    assert count < 21
    assert list(tmp_path.iterdir()) == []
    for one in threading.enumerate():
        if one.name.startswith(("merge", "flush")):
            one.join(timeout=5)
            assert not one.is_alive()


def test_two_at_once(made: Path, tmp_path: Path) -> None:
    from harness.core.errors import UserError

    def write(folder: Path) -> publish.Made:
        (folder / "half").write_text("")
        with pytest.raises(UserError, match="another harness process") as error:
            run(made, tmp_path / "out")
        assert error.value.where == f"--out {tmp_path / 'out'}"
        assert (folder / "half").exists()
        return publish.Made({}, {}, ())

    folder = StepFolder.within(tmp_path / "out", "id", "merge")
    publish.publish(make_step("merge", {}, arm="a"), folder, Runner(None, Reporter()), write)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"half", "checksums.json", "step"}
