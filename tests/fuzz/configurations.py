"""Mutated configurations: command lines, options and YAML files with something strange in one place."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from cases import CANARY, Case

LONG = "x" * 300
TOUCH = f"open({CANARY!r}, 'w')"
STRANGE = (
    "", " ", "-1", "0", "1", "4.5", "1e999", "-1e999", ".inf", "-.inf", ".nan", "nan", "inf", "true", "no", "null",
    "~", "[]", "{}", "{1: 2}", "{null: 1}", "[1, [2, {a: b}]]", "[true]", "{a: {b: {c: 1}}}", "!!int x", "!!int ''",
    "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}", "!unknown x", "!!null x", "2024-13-45",
    "2024-01-01", "1:30", "0x1F", "0b2", "1_000", "9" * 30, "9" * 5000, "-" + "9" * 400, "1" + "0" * 400 + ".5", "*a",
    "&a [*a]", "&a {b: *a}", "{" * 200, "[" * 2000, "}", "]", ":", ",", "=", "==", "a=b", ".", "..", "...", "a..b",
    "/", "//", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self/environ", "../..",
    "../../etc/passwd", "/root/x", "~nobody-here/x", LONG, f"a/{LONG}", "x/" * 2500, "\udcff", "caf\udce9/x",
    "\x1b[31mred\x1b[0m", "\x9b2J", "\u202egnp", "a\nb", "a\tb", "\r", "\u00e9\u4e2d\U0001f4a9", "%s %n {0} {x}",
    "$HOME", "`id`", "{{ 7 * 7 }}", "{{ x", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ 'a' * 10 ** 10 }}",
    "{{ 9 ** (9 ** 9) }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    f"{{{{ cycler.__init__.__globals__.os.system('touch {CANARY}') }}}}",
    f"!!python/object/apply:os.system ['touch {CANARY}']", "!function evil.run", "http://", "http://[::1",
    "http://127.0.0.1:1/v1", "http://127.0.0.1:99999/v1", "https://x.invalid/v1", "http://a b/", "jsonl:",
    "jsonl:/dev/null", "jsonl:.", "jsonl:rows.jsonl+", "lm_eval:", "lm_eval:..", "lm_eval:../x", "lm_eval:*",
    "lm_eval:[", ":chat", ":raw", "sums:chat:raw", "sums:", "a:b:c", "+", "*2", "jsonl:rows.jsonl*0",
    "jsonl:rows.jsonl*-1", "jsonl:rows.jsonl*nan", "@", "x@y", "hh-rlhf@", "hh-rlhf:", "evil.py", "--help", "-h", "-",
    "--", "a0:inf", "a0:nan", "a0:-1", "a0:", "5XB", "GB", "-1GB", "infGB", "1e999GB", "cuda:99", "meta",
)  # fmt: skip
"""What stands in the place of a value. One with a NUL cannot come by a command line; YAML can write it."""
IN_YAML = (
    *STRANGE,
    '"\\0"',
    '"\\ud800"',
    '"\\x1b[31mred"',
    "? [a]\n: b",
    "<<: 1",
    "- a\nb: c",
    "|",
    ">",
    "#",
    "---\n---",
    "%YAML 9.9",
)

ROWS = "".join(
    json.dumps({"id": f"r{i}", "a": i, "b": 2 * i, "prompt": f"Q{i}?", "chosen": "yes", "rejected": "no"}) + "\n"
    for i in range(6)
)
SUMS = """\
name: sums
version: 1
summary: sums
source: here
prompt: raw
template: "{{ a }}+{{ b }}="
target: "{{ a + b }}"
dataset:
  name: jsonl
  options: {path: rows.jsonl, id: id}
decoding: {max_new_tokens: 4, temperature: 0.0, stop: ["\\n"]}
scorers:
- {name: exact_match, options: {strip: true}}
"""
SUITE = "suite: both\nsummary: two\ntasks: [sums]\nlimit: 3\nlimits: {sums: 2}\nnotes: [a]\n"
THEIRS = """\
task: theirs
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{chosen}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
- {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
SETTINGS = "engine: slow\noptions:\n  sums: {limit: 3}\n  engine: {}\n"
MERGE = """\
merge_method: slerp
base_model: MODELS/base
models:
- {model: MODELS/base}
- {model: MODELS/base+MODELS/a1}
parameters:
  t: 0.3
dtype: float32
"""
TIES = """\
merge_method: ties
base_model: MODELS/base
slices:
- sources:
  - {model: MODELS/base, layer_range: [0, 2]}
  - model: MODELS/other
    layer_range: [0, 2]
    parameters: {weight: 0.5, density: [{filter: mlp, value: [0.1, 0.4]}, {value: 0.5}]}
parameters: {normalize: true}
dtype: bfloat16
"""
FILES = {"rows.jsonl": ROWS, "evil.py": f"{TOUCH}\ndef run(*_):\n    {TOUCH}\n"}
NEUTRAL = {
    "--out", "--fresh", "--plugin", "--tasks", "--workers", "--shard-size", "--device", "--host", "--port", "--name",
    "--log", "--api-key-env", "--ready-timeout", "--max-judge-cost", "--parity", "--parity-engine", "--engine",
    "--model", "--base", "--inputs", "--task", "--suite", "--template", "retries", "timeout", "--adapter", "--dtype",
    "--json", "--search", "--check", "summary", "notes", "source", "prompt",
}  # fmt: skip
"""What may be changed without another id: how something is carried out, and names of one and the same thing."""


@dataclass(frozen=True)
class Base:
    """A command that works, and the YAML files that it reads."""

    name: str
    arguments: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    """What `--set` knows here beside what is set."""


EVAL = "eval --model MODELS/base --plugin ENGINE --tasks tasks"
ALIGN = "align dpo --model MODELS/base --dataset jsonl:rows.jsonl --out out"
LINEAR = "merge linear --base MODELS/base --inputs MODELS/a0:0.5 MODELS/a1:0.5 --out out"
TASKS = {"tasks/sums.yaml": SUMS, "tasks/both.yaml": SUITE}
COMMANDS: dict[str, tuple[str, dict[str, str], str]] = {
    "eval": (
        f"{EVAL} --task sums --engine slow --limit 2 --seed 0 --dtype auto --out out --set sums.leaf=x"
        " --set sums.decoding.temperature=0.0 --set sums.scorer.strip=true",
        TASKS,
        "task",
    ),
    "suite": (f"{EVAL} --suite both --engine slow --out out", TASKS, ""),
    "settings": (f"{EVAL} --task sums --out out", {**TASKS, "harness.yaml": SETTINGS}, ""),
    "adapters": (
        f"{EVAL} --task sums --engine transformers --adapter MODELS/a0 --adapter MODELS/a1 --limit 1",
        TASKS,
        "transformers",
    ),
    "theirs": ("tasks --tasks tasks", {**TASKS, "tasks/theirs.yaml": THEIRS}, ""),
    "endpoint": (
        "eval --model http://127.0.0.1:1/v1 --engine openai --tasks tasks --task sums:raw --set engine.retries=0"
        " --set engine.timeout=1.0 --set engine.model=m --out out",
        TASKS,
        "openai",
    ),
    "align": (
        f"{ALIGN} --adapter lora --steps 4 --samples 4 --seed 0 --data-seed 0 --checkpoints 2 --dtype auto"
        " --set beta=0.1 --set learning_rate=0.001 --set adapter.rank=4 --set batch_size=2 --set eval_rows=0",
        {},
        "dpo",
    ),
    "sft": (
        "align sft --model MODELS/base --dataset jsonl:rows.jsonl --out out --template vicuna --adapter none"
        " --set loss_on=last --set eval_rows=0",
        {},
        "sft",
    ),
    "search": (f"{ALIGN} --steps 4 --search rank=2,4 learning_rate=0.01,0.1 --set eval_rows=2", {}, ""),
    "merge": (f"{LINEAR} --seed 0 --dtype float32 --workers 1 --shard-size 1MB --device cpu", {}, "linear"),
    "as adapter": (f"{LINEAR} --as adapter --rank 4 --set normalize=true", {}, "linear"),
    "slerp yaml": ("merge --config merge.yaml --out out --seed 0", {"merge.yaml": MERGE}, ""),
    "ties yaml": ("merge --config merge.yaml --out out --seed 0", {"merge.yaml": TIES}, ""),
    "fold": ("fold MODELS/a0 --base MODELS/base --out out --probe-prompts 0 --dtype auto", {}, ""),
    "serve": ("serve --model MODELS/base --check --port 0 --name m --ready-timeout 5", {}, "vllm"),
    "data": (
        "data show jsonl:rows.jsonl --model MODELS/base --samples 1 --seed 0 --max-length 256 --template vicuna"
        " --schema pairs",
        {},
        "",
    ),
    "report": ("report MODELS/run", {}, ""),
    "compare": ("compare MODELS/run MODELS/run --seed 0 --alpha 0.05 --show 1", {}, ""),
    "plugins": ("plugins new scorer my_scorer --out new", {}, ""),
}


def bases(models: Path, engine: Path) -> list[Base]:
    """The commands that are mutated; each is well planned as it stands."""
    keys = keys_of()

    def placed(text: str) -> str:
        return text.replace("MODELS", str(models)).replace("ENGINE", str(engine))

    return [
        Base(
            name, tuple(placed(text).split()), {file: placed(said) for file, said in files.items()}, keys.get(kind, ())
        )
        for name, (text, files, kind) in COMMANDS.items()
    ]


def keys_of() -> dict[str, tuple[str, ...]]:
    """Every key that `--set` takes, by task, engine, method and merger."""
    from harness import TaskSpec, load_plugins
    from harness.contracts.adapter import Adapter
    from harness.contracts.aligner import Aligner
    from harness.contracts.dataset import Dataset
    from harness.contracts.engine import Engine
    from harness.contracts.merger import Merger
    from harness.contracts.scorer import Scorer
    from harness.core.specs import DatasetRef, Decoding, LmEvalRef

    registry = load_plugins()
    found = {
        "task": [f"sums.{key}" for key in TaskSpec.model_fields]
        + [f"sums.decoding.{key}" for key in Decoding.model_fields]
        + [f"sums.dataset.{key}" for key in DatasetRef.model_fields]
        + [f"sums.lm_eval.{key}" for key in LmEvalRef.model_fields]
        + [f"sums.dataset.options.{key}" for _, one in registry.of_kind(Dataset) for key in one.Config.model_fields]
        + [f"sums.scorer.{key}" for _, one in registry.of_kind(Scorer) for key in one.Config.model_fields]
    }
    adapters = [f"adapter.{key}" for _, one in registry.of_kind(Adapter) for key in one.Config.model_fields]
    data = [f"dataset.trl.{key}" for key in registry.find(Dataset, "trl", "fuzz").Config.model_fields]
    for name, aligner in registry.of_kind(Aligner):
        found[name] = [*aligner.Config.model_fields, *adapters, *data, "dataset", "adapter"]
    for name, engine in registry.of_kind(Engine):
        found[name] = [f"engine.{key}" for key in engine.Config.model_fields]
    for name, merger in registry.of_kind(Merger):
        found[name] = list(merger.Config.model_fields)
    return {name: tuple(keys) for name, keys in found.items()}


def mutated(number: int, seed: int, known: list[Base]) -> Case:
    """The case of that number: it depends on nothing but number and seed, so that it can be run alone."""
    draw = random.Random(f"{seed} {number}")
    base = known[number % len(known)]
    files, arguments, meant = dict(base.files), list(base.arguments), ""
    how = draw.random()
    if base.keys and how < 0.35:
        arguments += ["--set", f"{draw.choice(base.keys)}={draw.choice(STRANGE)}"]
        changed = f"{arguments[-1]!r} added"
    elif files and how < 0.7:
        name = draw.choice(sorted(files))
        files[name], changed = _mutated_yaml(files[name], draw)
        changed = f"{name}: {changed}"
    else:
        changed = _mutate_arguments(arguments, draw)
    if draw.random() < 0.2:  # one strange thing hides another: now and then there are two
        changed += f"; {_mutate_arguments(arguments, draw)}"
    else:
        meant = _meant(base.arguments, arguments) if files == base.files else ""
    return Case(f"{base.name}: {changed}", arguments, {**FILES, **files}, base=base.name, meant=meant)


def _meant(before: Sequence[str], after: Sequence[str]) -> str:
    """The option that was given another value; nothing where it may be the same in other words."""
    if len(before) != len(after):
        return ""
    place = next((at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new), 0)
    (old_key, _, old), (new_key, _, new) = before[place].partition("="), after[place].partition("=")
    option = before[place - 1]
    if option != "--set":
        old_key = new_key = option
        old, new = before[place], after[place]
    if not option.startswith("--") or old_key != new_key or {option, old_key.split(".")[-1]} & NEUTRAL:
        return ""
    return "" if _alike(old, new) else f"{old_key} {old} -> {new}"


def _alike(old: str, new: str) -> bool:
    try:
        values = [yaml.safe_load(text) for text in (old, new)]
        return bool(values[0] == values[1] or float(values[0]) == float(values[1]))
    except Exception:
        return False


def _mutate_arguments(arguments: list[str], draw: random.Random) -> str:
    """Put something strange in the place of an argument, or of a part of one; now and then of an option's name."""
    if len(arguments) == 1:
        arguments.append("")
    names = [at for at, one in enumerate(arguments) if one.startswith("--")]
    values = [at for at in range(1, len(arguments)) if at not in names] or names
    place = draw.choice(values if draw.random() < 0.93 or not names else names)
    old, strange, how = arguments[place], draw.choice(STRANGE), draw.random()
    if how < 0.05:
        del arguments[place]
        return f"without {old!r}"
    key, equals, value = old.partition("=")
    if how < 0.1:
        arguments.insert(place, strange)
        return f"{strange!r} before {old!r}"
    if how < 0.2:
        arguments[place] = old + strange
    elif equals and how < 0.3:
        arguments[place] = f"{draw.choice((strange, key + '.' + strange, key + '.x'))}={value}"
    else:
        arguments[place] = f"{key}={strange}" if equals else strange
    return f"{old!r} -> {arguments[place]!r}"


def _mutated_yaml(text: str, draw: random.Random) -> tuple[str, str]:
    how = draw.random()
    if how < 0.2:  # the text itself
        place = draw.randrange(len(text))
        strange = draw.choice(IN_YAML)
        return text[:place] + strange + text[place + draw.randrange(3) :], f"{strange!r} at {place}"
    data = yaml.safe_load(text)
    holder, key = draw.choice(list(_places(data)))
    path = f"{key!r}"
    if how < 0.3:
        del holder[key]
        return _dumped(data), f"without {path}"
    if how < 0.4 and isinstance(holder, dict):
        new: Any = draw.choice([1, None, True, LONG, "\0", "\x1b[31m", "", "x", 1.5])
        holder[new] = holder.pop(key)
        return _dumped(data), f"{path} -> key {new!r}"
    mark = "MUTATED-HERE"
    holder[key] = mark
    strange = draw.choice(IN_YAML)
    return _dumped(data).replace(mark, strange, 1), f"{path} -> {strange!r}"


def _dumped(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every key and index of nested data, with what holds it."""
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    return [place for key, value in items for place in [(data, key), *_places(value)]]
