"""Whose a folder is: nobody else's file is ever mixed in, taken for a result, or deleted."""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import CorruptionError, UserError
from harness.steps.checksums import is_recorded
from harness.steps.files import read_json
from harness.steps.lock import LOCK

_TEMPORARY = r"\.lock|\..+\.\d+\.tmp"
"""What a process that was killed may leave in any folder of ours."""


@dataclass(frozen=True)
class Guard:
    """What one sort of folder holds."""

    word: str
    """What messages call what lies there: an alignment, a merge, a run."""
    own: str
    """Regular expression of the names in such a folder."""
    sign: str
    """Relative name of the file that shows whose it is; without it, the names are somebody else's."""
    option: str = "--out"
    listed: str = ""
    """Relative name of a file whose ``files`` name what else belongs there."""

    def where(self, root: Path) -> str:
        """What messages call the folder."""
        return f"{self.option} {root}"

    def is_ours(self, root: Path) -> bool:
        """Whether such a folder was begun here; of one that has ended, the record of its files is as good a sign."""
        return (root / self.sign).exists() or is_recorded(root, self.sign)

    def refuse(self, root: Path, *, fresh: bool = False) -> None:
        """Stop before a folder that holds anything but what belongs there; writes nothing, so it needs no lock.

        Args:
            root: need not exist.
            fresh: what lies there is to be deleted; then hidden files of unknown names count too.

        Raises:
            UserError: naming what is somebody else's.
        """
        if root.is_symlink() and not root.exists():
            raise UserError(self.where(root), "is a link to nothing", "Give a new folder.")
        if root.exists() and not root.is_dir():
            raise UserError(self.where(root), "is no folder", "Give a new folder.")
        if strange := self.strangers(root, hidden=fresh):
            raise UserError(
                self.where(root),
                f"holds files that are no {self.word}'s ({', '.join(strange[:5])})",
                f"--fresh deletes only what {_article(self.word)} wrote. Give another folder, or move those files."
                if fresh
                else "Give a new folder.",
            )

    def strangers(self, root: Path, *, hidden: bool = False) -> list[str]:
        """Return the names that do not belong there, in order."""
        if not root.is_dir():
            return []
        ours, more = self.is_ours(root), self._more(root)
        return sorted(child.name for child in root.iterdir() if not self._belongs(child, ours, more, hidden))

    def _more(self, root: Path) -> set[str]:
        """First parts of the names that the list has; they were written down before the files were made."""
        with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError):
            return {str(name).partition("/")[0] for name in read_json(root / self.listed)["files"]}
        return set()

    def _belongs(self, child: Path, ours: bool, more: set[str], hidden: bool) -> bool:
        if re.fullmatch(_TEMPORARY, child.name):
            return True
        if ours and child.name in more:
            return True
        if re.fullmatch(self.own, child.name) and (ours or _hollow(child)):
            return True
        return child.name.startswith(".") and not hidden

    def clear(self, root: Path) -> None:
        """Delete what belongs there (``--fresh``), the lock excepted.

        Raises:
            UserError: the folder holds anything else; nothing has been deleted.
        """
        self.refuse(root, fresh=True)
        # The sign goes last, so that a clearing that is cut short can be taken up again.
        last = self.sign.partition("/")[0]
        for child in sorted(root.iterdir(), key=lambda path: path.name == last) if root.is_dir() else ():
            if child.name != LOCK:
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()


def _hollow(folder: Path) -> bool:
    """A kill just after folders were made leaves them without a file."""
    return folder.is_dir() and not any(path.is_file() and path.name[0] != "." for path in folder.rglob("*"))


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
