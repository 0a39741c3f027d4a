"""What would be sent to a hub, and sending it: an adapter or a model with its card, or a report as a static Space."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.contracts.dataset import Dataset
from harness.contracts.registry import Registry, load_plugins
from harness.core.errors import CorruptionError, UserError
from harness.models.lineage import CONFIG, LINEAGE
from harness.publishing.card import published_card, results_of
from harness.report.build import write_all
from harness.steps.checksums import CHECKSUMS, differences
from harness.steps.files import read_json
from harness.steps.folder import RECORD
from harness.steps.store import RunStore

CARD = "README.md"
PLAIN = (".json", ".jsonl", ".md", ".txt", ".jinja", ".html", ".csv", ".tex")
"""Ends of files that are text: no path of this machine may stand in one."""
MADE_BY = ("align", "merge", "fold")


@dataclass(frozen=True)
class Parcel:
    """Files by their name on the hub; a file of this machine, or bytes."""

    kind: str
    """As the hub calls it: model or space."""
    files: Mapping[str, Path | bytes]

    @property
    def card(self) -> str:
        """README.md."""
        found = self.files[CARD]
        assert isinstance(found, bytes)
        return found.decode()

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Name and size (bytes) of every file."""
        for name, file in sorted(self.files.items()):
            yield name, len(file) if isinstance(file, bytes) else file.stat().st_size


def arm_folder(run: Path, arm: str) -> Path:
    """The folder of an arm that a study has made.

    Raises:
        UserError: no such arm, or it was not made here, or its weights were let go.
    """
    found = [step for kind in MADE_BY for step in run.glob(f"steps/{kind}-*") if _arm(step) == arm]
    if not found:
        made = sorted({name for kind in MADE_BY for step in run.glob(f"steps/{kind}-*") if (name := _arm(step))})
        listed = ", ".join(made) or "none"
        raise UserError(f"--arm {arm}", f"{run} has made no arm of this name", f"It has made: {listed}.")
    done = [step for step in found if (step / "status.json").is_file()]
    if len(done) != 1:
        what = "has not ended" if not done else f"was made {len(done)} times: {', '.join(step.name for step in done)}"
        raise UserError(f"--arm {arm}", what, "Give the folder of the one that is meant: RUN/steps/NAME/artifact.")
    return done[0] / "artifact"


def _arm(step: Path) -> str | None:
    try:
        return str(read_json(step / "step.json")["arm"])
    except (OSError, CorruptionError, KeyError, TypeError):
        return None


def pack_arm(
    folder: Path,
    *,
    results: Path | None = None,
    base_model: str | None = None,
    licence: str | None = None,
) -> Parcel:
    """An adapter or a model that the harness has made, its files as they are, its card with what the hub reads.

    Args:
        folder: of the adapter or model.
        results: a run that evaluated it.
        base_model: hub id of the base, where the base was a folder.
        licence: that it is published under.

    Raises:
        UserError: not such a folder, damaged, of a base that nobody can find, or a path of this machine is in a file.
    """
    if not (folder / LINEAGE).is_file() or not (folder / CHECKSUMS).is_file():
        what = "is no adapter or model that `harness align`, `merge` or `fold` has made"
        raise UserError(str(folder), what, "Give such a folder, or a study's run folder and --arm NAME.")
    if (wrong := differences(folder, everything=False)) != {}:
        name, how = next(iter(wrong.items()))
        raise UserError(str(folder), f"is not as it was made: {name} {how}", "Make it again, or give another.")
    lineage = read_json(folder / LINEAGE)
    base = base_model or (lineage["base"]["name"] if lineage["base"]["revision"] is not None else None)
    lost = f"the base, {lineage['base']['name']}, was a folder: nobody could open this adapter"
    _check_id("--base-model", base, lost)
    assert base is not None
    files = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in (CARD, CHECKSUMS)
    }
    datasets, unknown = datasets_of(folder, lineage, results, load_plugins())
    is_adapter = (folder / CONFIG).is_file()
    card = published_card(
        folder,
        base_model=base,
        datasets=datasets,
        licence=licence,
        results=results_of(folder, results) if results is not None else None,
        relation="adapter" if is_adapter else "merge" if lineage.get("inputs") else "finetune",
        unknown=unknown,
    )
    return _checked(Parcel("model", {**files, CHECKSUMS: folder / CHECKSUMS, CARD: card.encode()}))


def pack_report(run: Path, title: str) -> Parcel:
    """The report of a run, made anew from its records, as a static Space.

    Raises:
        UserError: the folder is no run.
        CorruptionError: a record is damaged.
    """
    write_all(run)
    folder = RunStore(run).report
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    # A page that only sends on: a Space begins with a file of this name.
    files["index.html"] = b'<!doctype html><meta http-equiv="refresh" content="0; url=report.html">\n'
    head = json.dumps(title)
    files[CARD] = f"---\ntitle: {head}\nsdk: static\napp_file: index.html\n---\n\nMade by `harness report`.\n".encode()
    return _checked(Parcel("space", files))


def datasets_of(
    folder: Path, lineage: Mapping[str, Any], run: Path | None, registry: Registry
) -> tuple[list[str], list[str]]:
    """Hub ids of what it and all that it was made from were trained on, as records have them.

    Args:
        folder: of the adapter or model.
        lineage: its lineage.json, which names by digest what it was made from.
        run: whose records tell of those; and the run that the folder lies in.

    Returns:
        the ids, and the names of what no record here tells of.
    """
    around = folder.resolve().parent.parent
    runs = {root.resolve() for root in (run, around.parent if around.name == "steps" else None) if root is not None}
    made = {
        str(read_json(file).get("digest")): file.parent
        for root in sorted(runs)
        for kind in MADE_BY
        for file in sorted(root.glob(f"steps/{kind}-*/status.json"))
    }
    own = next((one for one in (folder / RECORD, folder.parent) if (one / "step.json").is_file()), None)
    found: dict[str, None] = {}
    unknown: dict[str, None] = {}
    waiting: list[tuple[str, Path | None, Mapping[str, Any]]] = [(folder.name, own, lineage)]
    seen: set[Path] = set()
    while waiting:
        name, step, told = waiting.pop(0)
        if step in seen:
            continue
        before = [*told.get("inputs", ()), *told.get("adapters", ())]
        if step is None:
            unknown[name] = None
        else:
            seen.add(step)
            found |= dict.fromkeys(_trained_on(step, registry))
        for one in before:
            digest = str(one["digest"])
            if digest == lineage["base"].get("weights"):
                continue
            inner = made.get(digest)
            more = read_json(inner / "artifact" / LINEAGE) if inner is not None else {}
            waiting.append((f"{one['name']} ({digest[:12]})", inner, more))
    return list(found), list(unknown)


def _trained_on(step: Path, registry: Registry) -> Iterator[str]:
    data = read_json(step / "step.json").get("identity", {}).get("data", {})
    for part in (part["dataset"] for part in data.get("parts", ())):
        named = part.get("options", {}).get("path") or registry.find(Dataset, part["name"], "data").source
        if "digest" not in part and _is_id(str(named)):
            yield str(named)


def _is_id(text: str) -> bool:
    """Whether the hub takes this for a repository: OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", text) is not None


def _check_id(option: str, found: str | None, missing: str) -> None:
    if found is None:
        raise UserError(option, missing, f"Say where it is on the hub: {option} OWNER/NAME.")
    if not _is_id(found):
        raise UserError(option, f"{found!r} is no hub id", "Write OWNER/NAME.")


def _checked(parcel: Parcel) -> Parcel:
    """The parcel, when no file of it names a folder of this machine."""
    private = [str(path).encode() for path in {Path.home(), Path.cwd()} if len(path.parts) > 1]
    for name, file in parcel.files.items():
        if not name.endswith(PLAIN):
            continue
        text = file if isinstance(file, bytes) else file.read_bytes()
        for path in private:
            if path in text:
                what = f"names a folder of this machine, {path.decode()}"
                raise UserError(name, what, "Take it out of the file; nothing was sent.")
    return parcel


def send(parcel: Parcel, to: str, *, private: bool = False) -> str:
    """Send everything in one commit; returns its address.

    Raises:
        UserError: not logged in, not allowed, offline, or out of reach.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    _check_id("--to", to, "nowhere to send it")
    adds = [CommitOperationAdd(name, file) for name, file in sorted(parcel.files.items())]
    api, sdk = HfApi(), "static" if parcel.kind == "space" else None
    try:
        api.create_repo(to, repo_type=parcel.kind, private=private or None, exist_ok=True, space_sdk=sdk)
        found: Any = api.create_commit(to, adds, commit_message="harness push", repo_type=parcel.kind)
    except OfflineModeIsEnabled:
        raise UserError(f"--to {to}", "HF_HUB_OFFLINE is set", "Unset it where there is a network.") from None
    except LocalTokenNotFoundError:
        raise UserError(f"--to {to}", "no token of the hub is here", "Log in: `hf auth login`.") from None
    except HfHubHTTPError as error:
        raise UserError(f"--to {to}", f"the hub refused: {error}", "See `hf auth whoami` and the address.") from None
    except OSError as error:
        raise UserError(f"--to {to}", f"the hub is out of reach: {error}", "Try again.") from None
    return str(found.commit_url)
