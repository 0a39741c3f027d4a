"""What a stranger may hand to somebody who works with harness: folders, YAML files, names, data and endpoints."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import endpoints
from cases import CANARY, Case
from configurations import FILES, MERGE, ROWS, SUMS, THEIRS, TOUCH

DEEP = "[" * 50_000 + "]" * 50_000
ESCAPE = "\x1b[31mred\x1b[0m\u202e"
SYSTEM = f"__import__('os').system('touch {CANARY}')"
IN_JINJA = f"{{{{ cycler.__init__.__globals__.os.system('touch {CANARY}') }}}}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
WRONG: tuple[Any, ...] = (
    None,
    5,
    -1,
    1.5,
    True,
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    10**7,
    10**400,
    float("nan"),
    float("inf"),
)


@contextmanager
def hostile_cases(models: Path, engine: Path) -> Iterator[list[Case]]:
    """All of them; the server of the endpoints lives as long."""
    with endpoints.bad_server() as url:
        make = _Hostile(models, engine, url)
        found = [*make.models_(), *make.weights(), *make.adapters(), *make.yamls(), *make.settings(), *make.names()]
        yield [*found, *make.data(), *make.runs(), *make.endpoints_()]


class _Hostile:
    def __init__(self, models: Path, engine: Path, url: str) -> None:
        self.base, self.a0, self.run, self.url = models / "base", models / "a0", models / "run", url
        self.engine = ["--plugin", str(engine), "--engine", "slow"]

    def models_(self) -> Iterator[Case]:
        """A model folder with one strange file: config, tokenizer, template."""
        for key in (
            "architectures",
            "auto_map",
            "text_config",
            "vocab_size",
            "hidden_size",
            "dtype",
            "num_hidden_layers",
        ):
            for value in WRONG[:: 2 if key in ("vocab_size", "hidden_size") else 1][:9]:
                yield self._with_model(f"config {key} {value!r:.20}", _changed_json("config.json", key, value))
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            for text in ("", "{", "[]", "null", '"x"', DEEP, '{"a": NaN}', "\x00", ESCAPE, '{"a": ' + "9" * 5000 + "}"):
                yield self._with_model(f"{name} {text[:10]!r}", _write(name, text), shown=name.startswith("tokenizer"))
        for template in (
            LOOP,
            "{% for i in range(10**9) %}{% endfor %}",
            "{{ 9 ** (9 ** 9) }}",
            IN_JINJA,
            "{{ 1 / 0 }}",
            "{{ x",
        ):
            yield self._with_model(f"template {template[:30]}", _write("chat_template.jinja", template), shown=True)
        for template in ([{"name": 1}], [5], {"a": 1}, 5, [{"name": "default", "template": LOOP}], ESCAPE):
            change = _changed_json("tokenizer_config.json", "chat_template", template)
            yield self._with_model(f"template {str(template)[:30]}", change, shown=True)

    def weights(self) -> Iterator[Case]:
        """An index that leads out of the folder, and files that are no weights."""
        out = (
            "../../secret.safetensors",
            "/etc/passwd",
            str(self.base / "model.safetensors"),
            ESCAPE,
            "",
            ".",
            "a/../../b",
            5,
            None,
            [1],
        )
        for name in out:
            index = {"weight_map": {"model.norm.weight": name}}
            yield self._with_model(f"index {name!r:.30}", _write("model.safetensors.index.json", json.dumps(index)))
        for value in ([], "x", {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}):
            yield self._with_model(f"index {value!r}", _write("model.safetensors.index.json", json.dumps(value)))
        headers: tuple[Any, ...] = (
            [],
            "x",
            5,
            None,
            {"a": 5},
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", 4]}},
            {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
            {"a": {"dtype": ESCAPE, "shape": [-1], "data_offsets": [4, 0]}},
            {ESCAPE: {"data_offsets": [0, 1]}},
            {"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 10**30]}},
            {"a": {"dtype": [], "shape": {}, "data_offsets": {}}},
        )
        for header in headers:
            yield self._with_model(f"header {header!r:.40}", _write("model.safetensors", _safetensors(header)))
        for data in (
            b"",
            b"\0" * 7,
            b"\xff" * 8,
            struct.pack("<Q", 2**62) + b"{}",
            struct.pack("<Q", len(DEEP)) + DEEP.encode(),
        ):
            yield self._with_model(f"weights {data[:9]!r}", _write("model.safetensors", data))
        for how in (_fifo, _loop, _folder, _dangling):
            for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
                yield self._with_model(
                    f"{name} {how.__name__}", partial(how, name), shown=name.startswith(("tok", "chat"))
                )

    def adapters(self) -> Iterator[Case]:
        """An adapter folder with one strange thing."""
        for key in (
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "target_modules",
            "peft_type",
            "base_model_name_or_path",
        ):
            for value in (*WRONG[:9], 10**400):
                yield self._with_adapter(f"{key} {value!r:.20}", _changed_json("adapter_config.json", key, value))
        for value in ({"(a+)+$": 8}, {ESCAPE: 8}, {"a": "x"}, {"[": 4}):
            yield self._with_adapter(f"pattern {value!r}", _changed_json("adapter_config.json", "rank_pattern", value))
        for name in ("lineage.json", "conditioning.json", "adapter_config.json", "adapter_model.safetensors"):
            for text in ("", "[]", '{"base": null, "values": null}', '{"base": "x", "values": [1]}', DEEP, ESCAPE):
                yield self._with_adapter(f"{name} {text[:20]!r}", _write(name, text))
            for how in (_fifo, _loop, _folder):
                yield self._with_adapter(f"{name} {how.__name__}", partial(how, name))

    def _with_model(self, name: str, change: Callable[[Path], None], *, shown: bool = False) -> Case:
        """The model is looked at, never run; shown: a conversation is rendered with its template."""
        command = ["data", "show", "jsonl:rows.jsonl", "--model", "model", "--samples", "1"]
        if not shown:
            command = ["fold", str(self.a0), "--base", "model", "--out", "out", "--probe-prompts", "0"]
        return Case(f"model, {name}", command, dict(FILES), partial(_copied, self.base, "model", change))

    def _with_adapter(self, name: str, change: Callable[[Path], None]) -> Case:
        command = ["fold", "adapter", "--base", str(self.base), "--out", "out", "--probe-prompts", "0"]
        return Case(f"adapter, {name}", command, {}, partial(_copied, self.a0, "adapter", change))

    def yamls(self) -> Iterator[Case]:
        """Task and merge YAML whose author means harm."""
        for name, bomb in _bombs().items():
            for file, rest in (
                ("tasks/sums.yaml", SUMS),
                ("tasks/theirs.yaml", THEIRS),
                ("tasks/both.yaml", "suite: both\n"),
            ):
                yield self._tasks(f"{name} in {file}", {file: f"{bomb}{rest}"}, "sums")
            yield Case(f"{name} in a merge", ["merge", "--config", "m.yaml", "--out", "out"], {"m.yaml": bomb + MERGE})
            yield Case(f"{name} in settings", ["tasks"], {"harness.yaml": f"{bomb}engine: auto\n"})
        function = "doc_to_target: !function evil.run\n"
        elsewhere = {
            "other/base.yaml": "include: deep/base.yaml\n",
            "other/deep/base.yaml": function,
            "other/deep/evil.py": FILES["evil.py"],
        }
        harm: dict[str, dict[str, str]] = {
            "function": {"tasks/t.yaml": f"{THEIRS}{function}"},
            "include": {"tasks/t.yaml": f"{THEIRS}include: ../other/base.yaml\n", **elsewhere},
            "class": {"tasks/t.yaml": "task: theirs\nclass: !function evil.run\n"},
            "builtin": {"tasks/t.yaml": THEIRS + "process_docs: !function os.system\n"},
            "metric": {"tasks/t.yaml": THEIRS.replace("metric: exact_match", "metric: ./evil, hf_evaluate: true")},
            "script": {"tasks/t.yaml": THEIRS.replace("dataset_path: json", "dataset_path: evil.py")},
            "group": {"tasks/t.yaml": f"{THEIRS}{function}", "tasks/g.yaml": "group: all\ntask: [theirs]\n"},
            "apply": {"tasks/t.yaml": f"{THEIRS}x: !!python/object/apply:os.system ['touch {CANARY}']\n"},
            "jinja": {"tasks/t.yaml": THEIRS.replace("{{prompt}}", IN_JINJA)},
            "jinja loop": {"tasks/t.yaml": THEIRS.replace("{{prompt}}", LOOP)},
            "literal": {
                "tasks/t.yaml": THEIRS.replace("generate_until", "multiple_choice") + f'doc_to_choice: "{SYSTEM}"\n'
            },
        }
        for name, files in harm.items():
            more = {"tasks/evil.py": FILES["evil.py"], "tasks/evil/evil.py": TOUCH}
            yield self._tasks(name, {**files, **more}, "all" if name == "group" else "theirs", answered=True)
        for template in (
            LOOP,
            "{% for i in range(10**9) %}{% endfor %}",
            "{{ 'a' * 10 ** 10 }}",
            "{{ 9 ** (9 ** 9) }}",
            IN_JINJA,
            "{{ 1 / 0 }}",
        ):
            for key in ('template: "{{ a }}+{{ b }}="', 'target: "{{ a + b }}"'):
                text = SUMS.replace(key, f"{key.partition(':')[0]}: {json.dumps(template)}")
                yield self._tasks(f"{key[:8]} {template[:25]}", {"tasks/sums.yaml": text}, "sums")
        for path in ("/dev/zero", "/dev/stdin", "../../../etc/passwd", "rows", "pipe", ".", ESCAPE, "x" * 300):
            text = SUMS.replace("path: rows.jsonl", f"path: {json.dumps(path)}")
            yield self._tasks(
                f"rows from {path[:20]!r}", {"tasks/sums.yaml": text}, "sums", prepare=partial(_fifo, "tasks/pipe")
            )

    def _tasks(
        self, name: str, files: dict[str, str], task: str, *, answered: bool = False, prepare: Any = None
    ) -> Case:
        # What lm-eval loads needs a tokenizer, and the plan alone would not load it.
        model = ["--model", f"{self.url}/good/v1", "--engine", "openai", "--set", f"engine.tokenizer={self.base}"]
        command = ["eval", *(model if answered else ["--model", str(self.base), *self.engine])]
        files = {"rows.jsonl": ROWS, "tasks/rows.jsonl": ROWS, **files}
        return Case(
            f"yaml, {name}",
            [*command, "--tasks", "tasks", "--task", task, "--limit", "1", "--out", "out"],
            files,
            prepare,
        )

    def settings(self) -> Iterator[Case]:
        """What a working folder brings along."""
        task = f"{THEIRS}doc_to_target: !function evil.run\n"
        for key, value in (
            ("plugins", "evil.py"),
            ("task_folders", "tasks"),
            ("plugins", "./evil.py"),
            ("plugins", "sub/evil.py"),
        ):
            for command in (
                ["tasks"],
                ["eval", "--model", str(self.base)],
                ["serve", "--model", str(self.base), "--check"],
            ):
                files = {"harness.yaml": f"{key}: [{value}]\n", **FILES, "sub/evil.py": TOUCH, "tasks/t.yaml": task}
                yield Case(f"settings, {key} {value}, {command[0]}", command, files)
        for module in (
            "torch.py",
            "json.py",
            "evil_plugin.py",
            "sitecustomize.py",
            "conftest.py",
            "lm_eval/__init__.py",
        ):
            yield Case(f"working folder, {module}", ["plugins"], {module: TOUCH})

    def names(self) -> Iterator[Case]:
        """Names that stand for what is there, and steer what shows them."""
        for name in (
            ESCAPE,
            "\x9b2J",
            "a\nerror: b",
            "x" * 255,
            "-",
            "--out",
            "%s{0}",
            "a b",
            "`id`",
            "$(id)",
            "\u202egnp",
            "é\u0301",
            "~x",
        ):
            link = partial(_linked, self.base, name)
            yield Case(
                f"name, model {name!r:.30}",
                ["fold", str(self.a0), "--base", f"./{name}", "--out", "out", "--probe-prompts", "0"],
                {},
                link,
            )
            yield Case(
                f"name, adapter {name!r:.30}",
                ["fold", f"./{name}", "--base", str(self.base), "--out", "out", "--probe-prompts", "0"],
                {},
                partial(_linked, self.a0, name),
            )
            yield Case(f"name, out {name!r:.30}", ["plugins", "new", "scorer", "mine", "--out", f"./{name}"])
            yield Case(
                f"name, run {name!r:.30}", ["report", f"./{name}"], {}, partial(_copied, self.run, name, _nothing)
            )
            command = [
                "eval",
                "--model",
                str(self.base),
                *self.engine,
                "--tasks",
                f"./{name}",
                "--task",
                "sums",
                "--out",
                "out",
            ]
            yield Case(f"name, tasks {name!r:.30}", command, {f"{name}/sums.yaml": SUMS, f"{name}/rows.jsonl": ROWS})

    def data(self) -> Iterator[Case]:
        """Rows that are none."""
        row = '{"id": "r", "prompt": "Q", "chosen": "y", "rejected": "n", "a": 1, "b": 2}\n'
        texts: tuple[str | bytes, ...] = (
            "",
            "\n\n",
            "{",
            "[]\n",
            "null\n",
            "5\n",
            DEEP,
            '{"id": NaN}\n',
            row * 2,
            row.replace('"Q"', "null"),
            row.replace('"Q"', "5"),
            row.replace('"Q"', "[]"),
            row.replace('"Q"', '[{"role": 5, "content": null}]'),
            row.replace('"Q"', '"\\ud800"'),
            row.replace('"Q"', '"\\u0000"'),
            row.replace('"r"', '"\\u001b[31m"'),
            row.replace('"Q"', '"' + "x" * 10**6 + '"'),
            row.replace('"a": 1', '"a": ' + "9" * 5000),
            row.replace('"chosen"', '"\\u001b[31mchosen"'),
            b"\xff\xfe\xfa",
            b"\x00" * 100,
            b"\xef\xbb\xbf" + row.encode(),
            row.replace("\n", "\r"),
            row.replace('"Q"', json.dumps(IN_JINJA)),
        )
        for number, text in enumerate(texts):
            tasks = {"tasks/sums.yaml": SUMS, "tasks/rows.jsonl": text, "rows.jsonl": text}
            command = [
                "eval",
                "--model",
                str(self.base),
                *self.engine,
                "--tasks",
                "tasks",
                "--task",
                "sums",
                "--out",
                "out",
            ]
            yield Case(f"data {number}, eval", command, tasks)
            show = ["data", "show", "jsonl:rows.jsonl", "--model", str(self.base), "--samples", "1"]
            yield Case(f"data {number}, show", show, {"rows.jsonl": text})
        for how in (_fifo, _loop, _folder, _dangling):
            show = ["data", "show", "jsonl:rows.jsonl", "--model", str(self.base)]
            yield Case(f"data, {how.__name__}", show, {}, partial(how, "rows.jsonl"))

    def runs(self) -> Iterator[Case]:
        """The folder of a run that somebody else has made."""
        for pattern in (
            "plan.json",
            "steps/answers-*/step.json",
            "steps/scores-*/status.json",
            "steps/scores-*/artifact/scores.json",
        ):
            for text in (
                "",
                "[]",
                "null",
                "{}",
                DEEP,
                '{"tasks": [5], "rows": 5, "requests": "../../x.gz"}',
                f'{{"arm": {json.dumps(ESCAPE)}}}',
            ):
                for command in (["report", "run"], ["compare", "run", "run"]):
                    change = partial(_damaged, pattern, text)
                    yield Case(f"run, {pattern} {text[:12]!r}", command, {}, partial(_copied, self.run, "run", change))

    def endpoints_(self) -> Iterator[Case]:
        """Servers that say anything, or nothing."""
        quick = ["--set", "engine.retries=0", "--set", "engine.timeout=1.0", "--set", "engine.max_wait=1.0"]
        ways = (*endpoints.BODIES, *endpoints.RAW, *endpoints.STATUS, *endpoints.WAYS, *endpoints.MODELS)
        for way in ways:
            for api in ("completions", "chat"):
                command = [
                    "eval",
                    "--model",
                    f"{self.url}/{way}/v1",
                    "--engine",
                    "openai",
                    *quick,
                    "--set",
                    f"engine.endpoint={api}",
                ]
                task = "sums:chat" if api == "chat" else "sums:raw"
                command += ["--tasks", "tasks", "--task", task, "--limit", "2", "--out", "out"]
                yield Case(f"endpoint {way}, {api}", command, {"tasks/sums.yaml": SUMS, "tasks/rows.jsonl": ROWS})


def _bombs() -> dict[str, str]:
    """Small texts that stand for very much; each is the value of a key that nobody asked for."""
    names = "abcdefghi"
    doubled = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names))
    merged = "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in itertools.pairwise(names))
    return {
        "multiplying": f"a: &a [x, x, x, x, x, x, x, x, x]\n{doubled}",
        "multiplying maps": f"a: &a {{x: 1}}\n{merged}",
        "self-referring": "x: &x [*x]\n",
        "self-referring map": "x: &x {y: *x}\n",
        "deep": f"x: {'[' * 3000}{']' * 3000}\n",
        "long": f"x: [{'1, ' * 400_000}1]\n",
        "number": f"x: {'9' * 5000}\n",
        "escape": '"\\x1b[31mred": 1\n',
    }


def _copied(source: Path, name: str, change: Callable[[Path], None], folder: Path) -> None:
    shutil.copytree(source, folder / name)
    change(folder / name)


def _nothing(folder: Path) -> None:
    """The copy stays as it is."""


def _linked(source: Path, name: str, folder: Path) -> None:
    (folder / name).symlink_to(source)


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    return lambda folder: _written(folder / name, data)


def _written(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def _changed_json(name: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**found, key: value}), encoding="utf-8")

    return change


def _damaged(pattern: str, text: str, folder: Path) -> None:
    for file in folder.glob(pattern):
        file.write_text(text, encoding="utf-8")


def _safetensors(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 4


def _fifo(name: str, folder: Path) -> None:
    _gone(folder / name)
    os.mkfifo(folder / name)


def _loop(name: str, folder: Path) -> None:
    _gone(folder / name)
    (folder / name).symlink_to(name)


def _dangling(name: str, folder: Path) -> None:
    _gone(folder / name)
    (folder / name).symlink_to("nowhere")


def _folder(name: str, folder: Path) -> None:
    _gone(folder / name)
    (folder / name).mkdir()


def _gone(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
