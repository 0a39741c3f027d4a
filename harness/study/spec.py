"""What a study's YAML says: its skeleton here; the options of plugins are read where steps are planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from harness.core.config import Config, Located, laid_over, load_yaml, parse, set_path
from harness.core.errors import UserError, unknown
from harness.core.specs import ModelSpec
from harness.report.claims import ClaimSpec


def _listed(value: Any) -> Any:
    """A single value is a list of one."""
    return value if isinstance(value, list | tuple) else (value,)


def _model(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def _nested(value: Any) -> Any:
    """``adapter.rank: 8`` is ``adapter: {rank: 8}``."""
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for key, inner in value.items():
        *groups, last = str(key).split(".")
        one: Any = {last: _nested(inner)}
        for group in reversed(groups):
            one = {group: one}
        found = laid_over(found, one)
    return found


def _asked(value: Any) -> Any:
    """``evaluation: none``, said in full: an empty key is a slip."""
    if value is None:
        raise ValueError("is empty; `none` asks nothing of any arm")
    return None if value == "none" else value


Natural = Annotated[int, Field(ge=0, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Options = Annotated[dict[str, Any], BeforeValidator(_nested)]
_CONTROL = "values to be asked under, each an arm NAME@VALUE, or all; as `evaluation` says when absent, []: the default"
_NAME = r"^[A-Za-z0-9][\w.@+-]*$"


class BaseSpec(ModelSpec):
    """A base: a folder or hub id, and how far its files are trusted."""

    template: str | None = Field(None, description="chat template: a bundled name or a file; the model's own if absent")


class GridBlock(Config):
    """Arms: every combination of the values given."""

    name: str | None = Field(None, pattern=_NAME, description="start of the arms' names; their factors when absent")
    method: Names = Field(description="registered aligners")
    data: Names = Field(description="short names of `data`, or expressions over data sets")
    base: Names | None = Field(None, description="names of `bases`; all of them when absent")
    adapter: Names = Field(("lora",), description="registered adapters")
    seed: Annotated[tuple[Natural, ...], BeforeValidator(_listed)] = Field((0,), description="training seeds")
    samples: Annotated[tuple[Count | None, ...], BeforeValidator(_listed)] = Field(
        (None,), description="rows to train on; all when absent"
    )
    start: str | None = Field(
        None, alias="from", description="an arm to go on from: its name, or its name without base and seed"
    )
    checkpoints: tuple[Count, ...] = Field((), description="optimiser steps whose adapter is an arm too")
    search: dict[str, Any] | None = Field(
        None,
        description="key -> values, over the method's own grid: cells of one `seed` (the first of the block when "
        "absent) are aligned, one is chosen on held-out rows, and all seeds take its values",
    )
    data_seed: Natural = Field(0, description="seed of the order that `samples` takes a prefix of")
    processes: Count = Field(1, description="processes, each with a device of its own, that share every batch")
    control: Names | None = Field(None, description=_CONTROL)
    set: Options = Field(default_factory=dict, description="the method's own options, and `adapter`, `dataset` groups")


class ArmSpec(Config):
    """One arm by name: trained like a grid of one, or an adapter made elsewhere."""

    name: str = Field(pattern=_NAME)
    base: str = Field(description="a name of `bases`")
    adapter: str = Field("lora", description="registered adapter; with no `method` the folder or hub id of an adapter")
    method: str | None = Field(None, description="registered aligner; absent: `adapter` was made elsewhere")
    data: str | None = Field(None, description="short name of `data`, or an expression over data sets")
    seed: int = Field(0, ge=0)
    samples: int | None = Field(None, ge=1)
    start: str | None = Field(None, alias="from", description="an arm to go on from")
    checkpoints: tuple[Count, ...] = ()
    search: dict[str, Any] | None = Field(
        None,
        description="key -> values, over the method's own grid: cells of one `seed` (the arm's when absent) are "
        "aligned, and the arm takes the values of the one that is chosen on held-out rows",
    )
    data_seed: Natural = Field(0, description="seed of the order that `samples` takes a prefix of")
    processes: Count = Field(1, description="processes, each with a device of its own, that share every batch")
    control: Names | None = Field(None, description=_CONTROL)
    set: Options = Field(default_factory=dict)

    @model_validator(mode="after")
    def _trained_on_something(self) -> ArmSpec:
        if (self.method is None) != (self.data is None):
            raise ValueError("an arm that is trained needs `method` and `data`; one made elsewhere has neither")
        if self.method is None and self.search is not None:
            raise ValueError("an arm made elsewhere has no recipe to search: it needs `method` and `data`")
        return self


class MergeBlock(Config):
    """Merges over arms: one for every base and seed that all inputs have."""

    name: str | None = Field(None, pattern=_NAME, description="start of the arms' names; method and inputs if absent")
    method: str = Field(description="registered merger")
    inputs: tuple[str | dict[str, Any], ...] = Field(
        min_length=1,
        description="each a pattern of arm names, or factors: {method: dpo, data: safe}; of what was trained under "
        "values PATTERN@VALUE, or `control: VALUE` among the factors",
    )
    weights: tuple[float, ...] = Field((), description="one for each input; equal when absent")
    base: Names | None = Field(None, description="names of `bases` to merge on; all that the inputs have when absent")
    join: Names = Field(("base", "seed"), description="factors that the inputs of one merge share")
    form: Literal["model", "adapter"] = Field("model", alias="as", description="what is written")
    rank: int | None = Field(None, ge=1, description="rank of a truncated adapter")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    set: Options = Field(default_factory=dict, description="the merger's own options")

    @model_validator(mode="after")
    def _weights_fit(self) -> MergeBlock:
        if self.weights and len(self.weights) != len(self.inputs):
            raise ValueError(f"{len(self.weights)} weights for {len(self.inputs)} inputs")
        return self


class EvaluationBlock(Config):
    """What every arm is asked; the same for all."""

    tasks: Names = Field((), description="task names")
    suite: str | None = Field(None, description="suite name; `quick` when neither is given")
    limit: int | None = Field(None, ge=1, description="samples per leaf task")
    engine: str = Field("auto", description="engine name, or auto")
    seed: int = Field(0, ge=0, description="seed of few-shot choice, sampling and resampling")
    control: Names = Field(
        (),
        description="values that arms trained under values are asked under, each an arm NAME@VALUE; all: every one. "
        "When absent the default of each",
    )
    set: Options = Field(default_factory=dict, description="`engine`, and per task: limit, decoding, scorer")
    task_folders: Names = Field((), description="folders of task YAML besides the registered ones")
    trust_task_code: bool = False
    max_judge_cost: float | None = Field(None, ge=0.0)


class ResourcesBlock(Config):
    """What a study is planned for, and what its worker processes of one machine may take."""

    card: str | None = Field(None, description="GPU, A100-40GB say: as --card")
    memory: str | None = Field(None, description="memory of one such GPU, 40GB say: as --memory")
    cores: int | None = Field(
        None, ge=1, description="processor cores: executor.cores of `local` where that is not given"
    )
    devices: int | None = Field(
        None, ge=1, description="GPUs, the first so many: executor.gpus of `local` where that is not given"
    )


class StudySpec(Config):
    """One study: bases, arms, merges, and what all of them are asked."""

    study: str = Field(pattern=_NAME, description="name of the study")
    summary: str = Field("", description="one line")
    bases: dict[str, Annotated[BaseSpec, BeforeValidator(_model)]] = Field(
        min_length=1, description="name -> folder or hub id"
    )
    data: dict[str, str] = Field(default_factory=dict, description="short name -> expression over data sets")
    rows: dict[str, int] = Field(default_factory=dict, description="short name of `data` -> rows that a paper counts")
    grid: tuple[GridBlock, ...] = ()
    arms: tuple[ArmSpec, ...] = ()
    merges: tuple[MergeBlock, ...] = ()
    evaluation: Annotated[
        EvaluationBlock | None,
        BeforeValidator(_asked, json_schema_input_type=EvaluationBlock | Literal["none"]),
    ] = Field(default_factory=lambda: EvaluationBlock(), description="what every arm is asked; none: nothing is")
    claims: tuple[ClaimSpec, ...] = Field((), description="what its numbers are meant to show; the report decides them")
    data_revisions: dict[str, str] = Field(default_factory=dict, description="hub id of a data set -> commit")
    plugins: Names = Field((), description="loose plugin files")
    keep: Annotated[tuple[Literal["merge"], ...], BeforeValidator(_listed)] = Field(
        (), description="merge: merged checkpoints stay once all that needs them has ended"
    )
    resources: ResourcesBlock | None = Field(None, description="the GPU that it is planned for, and what workers take")
    reuse: Names = Field((), description="run folders: what has ended there is taken over")
    trackers: Names = Field(
        (), description="tensorboard, wandb, mlflow, trackio: told of curves, live, and of final scores; moves no step"
    )


def is_study(file: Path) -> bool:
    """Whether this is a file, or the name of a shipped study."""
    return file.is_file() or str(file) in _shipped()


def _shipped() -> dict[str, Path]:
    folder = Path(find_spec("harness_tasks").submodule_search_locations[0]) / "studies"  # type: ignore[union-attr, index]
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_study(file: Path) -> Path:
    """The file of a study: as given, or a shipped one of that name.

    Raises:
        UserError: neither.
    """
    shipped = _shipped()
    if file.is_file():
        return file
    if str(file) in shipped:
        return shipped[str(file)]
    raise unknown(str(file), "study", str(file), shipped, "harness study --help")


def read_study(
    file: Path,
    *,
    models: Mapping[str, str] | None = None,
    changes: tuple[str, ...] = (),
    revisions: Mapping[str, str] | None = None,
    text: str | None = None,
) -> Read:
    """Read a study's file.

    Args:
        file: YAML.
        models: base name -> folder or hub id to take in place of the file's.
        changes: ``KEY=VALUE`` over keys of the file, as ``--set`` gives them.
        revisions: hub id of a data set -> commit, over the file's.
        text: what the file would hold, of a study that a command has written; then there need be no file.

    Raises:
        UserError: with file, line and key.
    """
    located = load_yaml(file, text)
    if isinstance(located.data, dict):
        for change in changes:
            set_path(located.data, change)
    spec = parse(StudySpec, located)
    if strange := sorted(set(models or {}) - set(spec.bases)):
        raise UserError(f"--model {strange[0]}", "no base of that name", f"The study has: {', '.join(spec.bases)}.")
    bases = {
        name: base.model_copy(update={"model": models[name]}) if models and name in models else base
        for name, base in spec.bases.items()
    }
    commits = {**spec.data_revisions, **(revisions or {})}
    source = {"file": str(file), "models": dict(models or {}), "changes": list(changes), "revisions": commits}
    source["chosen"] = {}
    if text is not None:
        source["text"] = text
    return Read(spec.model_copy(update={"bases": bases, "data_revisions": commits}), located, source)


class Read:
    """A study's spec and where each of its keys stands."""

    def __init__(self, spec: StudySpec, located: Located, source: dict[str, Any]) -> None:
        """``source``: what it was read from, as data: another process reads the same."""
        self.spec, self.located, self.source = spec, located, source
        text = source.get("text")
        self.bytes = Path(source["file"]).read_bytes() if text is None else str(text).encode()
        """Of the file."""

    @property
    def from_command(self) -> bool:
        """Whether a command has written it: what is wrong is said in the words of the command's options."""
        return "text" in self.source

    def where(self, *path: str | int) -> str:
        """``file:line, key``; of a command's own study the option."""
        if self.from_command and "search" in path:
            return " ".join(["--search", *map(str, path[path.index("search") + 1 :])])
        return self.located.where(path)

    def where_set(self, block: tuple[str | int, ...], keys: Sequence[str]) -> str:
        """``file:line, key`` of an option of a block, written as ``adapter: {rank: 8}`` or ``adapter.rank: 8``."""
        keys = [key for key in keys if key]
        if self.from_command:
            return f"--set {', '.join(keys)}"
        for cut in range(len(keys)):
            written = (*block, "set", *keys[:cut], ".".join(keys[cut:]))
            if self.located.has(written):
                return self.where(*written)
        return self.where(*block, "set", *keys)
