"""Every mistake at `harness eval` gets one message (where, what, what to do), exit code 2, and leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness.testing import tiny_adapter, tiny_model

ALLOWED = (
    "Allowed keys: limit, scorer, name, version, summary, source, licence, size, leaves, notes, needs, prompt, "
    "system, template, target, leaf, cluster, subset, generation_prompt, decoding_of, decoding, dataset, "
    "lm_eval, generative, scorers, judges, wordings."
)
Refused = Callable[..., str]


@pytest.fixture
def refused(cli: Any, slow_eval: list[str], alone: Path) -> Refused:
    """Run `harness eval` with some arguments replaced (None: left out) or added; returns the error message."""

    def run(*more: str, **replaced: str | None) -> str:
        command = list(slow_eval)
        for name, value in replaced.items():
            option = f"--{name}"
            while option in command:
                at = command.index(option)
                del command[at : at + 2]
            if value is not None:
                command += [option, value]
        if "out" not in replaced:
            command += ["--out", "out"]
        before = sorted(alone.rglob("*"))
        ran = cli(*command, *more)
        assert ran.code == 2, ran.err
        assert "Traceback" not in ran.err and not ran.out
        assert sorted(alone.rglob("*")) == before, "a refused run left something behind"
        message: str = ran.err[ran.err.index("error: ") :]
        assert len(message.splitlines()) == 2, message
        return message

    return run


def says(message: str, where_and_what: str, fix: str) -> None:
    assert message == f"error: {where_and_what}\n  {fix}\n"


# ------------------------------------------------------------------------------------------------------------- model


def test_no_such_model(refused: Refused, alone: Path) -> None:
    (alone / "tiny-instruct").mkdir()
    says(refused(model="tiny-instrukt"), "--model tiny-instrukt: no such folder", "Did you mean tiny-instruct?")
    says(refused(model="./tiny-instrukt"), "--model ./tiny-instrukt: no such folder", "Did you mean tiny-instruct?")
    fix = f"The path exists as far as {alone}."
    says(refused(model="models/of/mine"), "--model models/of/mine: no such folder", fix)
    message = refused(model="someone/some-model")
    assert message.startswith(
        "error: --model someone/some-model: no such folder, and not in the hub cache (HF_HUB_OFFLINE is set; "
    )
    assert "Or fetch it where there is a network: `hf download someone/some-model`." in message


def test_not_a_model_folder(refused: Refused, alone: Path, tiny: Path) -> None:
    empty = alone / "empty"
    empty.mkdir()
    fix = "Give a folder in the format of transformers or peft."
    says(refused(model=str(empty)), f"--model {empty}: config.json is not in that folder (it holds: nothing)", fix)
    file = alone / "model.gguf"
    file.write_bytes(b"GGUF")
    says(refused(model=str(file)), f"--model {file}: is a file", f"Give the folder that holds it: {alone}.")
    adapter = tiny_adapter(alone / "adapter", tiny)
    message = refused(model=str(adapter))
    assert "It holds an adapter: give its base as --model and this folder as --adapter." in message
    message = refused(adapter=str(tiny))
    assert "adapter_config.json is not in that folder" in message
    assert "It holds a model: give it as --model." in message


def broken(folder: Path, harm: Callable[[Path], object]) -> str:
    tiny_model(folder)
    harm(folder)
    return str(folder)


def test_a_broken_model_folder(refused: Refused, alone: Path) -> None:
    model = broken(alone / "cut", lambda folder: os.truncate(folder / "model.safetensors", 500))
    message = refused(model=model)
    assert message.startswith(f"error: --model {model}/model.safetensors: not a whole safetensors file: its header")
    assert message.endswith("Fetch or save it again.\n")

    def lose_last_bytes(folder: Path) -> None:
        file = folder / "model.safetensors"
        os.truncate(file, file.stat().st_size - 10)

    model = broken(alone / "short", lose_last_bytes)
    size = (Path(model) / "model.safetensors").stat().st_size
    assert f"it should hold {size + 10} bytes and holds {size}" in refused(model=model)
    model = broken(alone / "config", lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"))
    assert f"--model {model}/config.json: not readable JSON: " in refused(model=model)
    model = broken(alone / "none", lambda folder: (folder / "model.safetensors").unlink())
    what = f"--model {model}: no weights (*.safetensors) in that folder"
    says(refused(model=model), what, "Give a folder that holds a model.")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}

    def shard(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    model = broken(alone / "shards", shard)
    what = "names shards that are not there: model-00002-of-00002.safetensors"
    says(refused(model=model), f"--model {model}/model.safetensors.index.json: {what}", "Fetch them again.")


def test_code_and_pickles_need_leave(refused: Refused, alone: Path) -> None:
    def only_pickled(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    model = broken(alone / "pickled", only_pickled)
    says(
        refused(model=model),
        f"--model {model}: only pickled weights (pytorch_model.bin), and unpickling can run any code",
        "Convert them to safetensors, or pass --allow-pickle if you trust where they come from.",
    )

    def with_code(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.EvilModel"}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    model = broken(alone / "coded", with_code)
    says(
        refused(model=model),
        f"--model {model}: config.json asks to run code that comes with the model (modeling_evil.EvilModel)",
        "Read that code first; then pass --trust-remote-code.",
    )


def test_a_model_without_a_tokenizer(refused: Refused, alone: Path) -> None:
    def no_tokenizer(folder: Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()

    model = broken(alone / "mute", no_tokenizer)
    says(
        refused(model=model, engine="transformers"),
        f"--model {model}: there is no tokenizer in that folder",
        "Put the base's tokenizer files (tokenizer.json, tokenizer_config.json) into that folder.",
    )


def test_a_chat_task_without_a_template(refused: Refused, alone: Path) -> None:
    model = tiny_model(alone / "base", chat_template=False)
    says(
        refused(model=str(model), task="sums:chat", engine="transformers"),
        f"--task sums: asks for a chat prompt, and {model} has no chat template",
        "Use sums:raw, or add a chat_template.jinja to the model's folder.",
    )


# ----------------------------------------------------------------------------------------------------------- adapter


def test_an_adapter_of_another_base(refused: Refused, alone: Path, tiny: Path) -> None:
    adapter = tiny_adapter(alone / "adapter", "somewhere/other-base")
    says(
        refused(adapter=str(adapter), engine="transformers"),
        f"--adapter {adapter}: its base is 'other-base', not '{tiny}'",
        "Give its own base as --model; if they are the same weights, mend base_model_name_or_path in "
        "adapter_config.json.",
    )
    adapter = tiny_adapter(alone / "wide", tiny)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: np.zeros((2, 128), np.float32)}, weights)
    message = refused(adapter=str(adapter), engine="transformers")
    assert "q_proj.lora_A.weight has shape [2, 128], and on this base it has to have [2, 64]" in message
    assert message.endswith("or give the base that it was trained on as --model.\n")


def test_an_adapter_without_weights(refused: Refused, alone: Path, tiny: Path) -> None:
    adapter = tiny_adapter(alone / "adapter", tiny)
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model.bin")
    message = refused(adapter=str(adapter))
    assert f"--adapter {adapter}: only pickled weights (adapter_model.bin)" in message
    (adapter / "adapter_model.bin").unlink()
    what = f"--adapter {adapter}: no adapter_model.safetensors in that folder"
    says(refused(adapter=str(adapter)), what, "Give a whole peft adapter.")
    message = refused(control="polite")
    says(message, "--control: 'polite' given, but there is nothing to steer", "Leave --control out.")


# ------------------------------------------------------------------------------------------------------------- names


def test_unknown_names_get_suggestions(refused: Refused, alone: Path) -> None:
    says(refused(task="sumz"), "--task sumz: unknown task 'sumz'", "Did you mean 'sums'? All: `harness tasks`.")
    says(refused(suite="quik"), "--suite quik: unknown suite 'quik'", "Did you mean 'quick'? All: `harness tasks`.")
    what = "--engine: unknown engine 'transformer'"
    says(refused(engine="transformer"), what, "Did you mean 'transformers'? All: `harness plugins`.")
    assert refused(plugin="slow_engin.py").startswith("error: --plugin slow_engin.py: no such file\n")
    what = f"--tasks {alone}/taskz: no such folder"
    says(refused(tasks="taskz"), what, "Give a folder that holds task YAML files.")
    what = "--task mine.yaml: no such file"
    says(refused(task="mine.yaml"), what, "Give the path of a task's YAML file.")
    message = refused(task="lm_eval:mmlu_anatom", engine="transformers")
    assert "--task lm_eval:mmlu_anatom: lm-eval has no task, group or tag of that name" in message
    assert "Did you mean mmlu_anatomy" in message


def test_limits(refused: Refused) -> None:
    fix = "Give 1 or more, or leave it out for all samples."
    says(refused("--limit", "0"), "--limit: 0 is no positive number", fix)
    says(refused("--limit", "-1"), "--limit: -1 is no positive number", fix)
    says(refused("--set", "sums.limit=0"), "--set sums.limit: 0 is no positive number", "Give 1 or more.")
    says(refused("--set", "sums.limit=many"), "--set sums.limit: 'many' is no positive number", "Give 1 or more.")
    says(refused("--set", "sums.limit=true"), "--set sums.limit: True is no positive number", "Give 1 or more.")


def test_options(refused: Refused) -> None:
    what = "--set: 'sums' is not key=value"
    says(refused("--set", "sums"), what, "Write for example --set real_toxicity.limit=10.")
    what = "--set mmlu@0: no task of that name runs here"
    says(refused("--set", "mmlu@0.limit=3"), what, "Running: sums; engine options: engine.KEY.")
    what = "--set sum: no task of that name runs here"
    message = refused("--set", "sum.limit=3")
    says(message, what, "Did you mean 'sums'? Running: sums; engine options: engine.KEY.")
    what = "--set sums: 3 is a value, not a group of options"
    says(refused("--set", "sums=3"), what, "Write --set sums.KEY=VALUE.")
    what = "--set sums.scorer: 3 is a value, not a group of options"
    says(refused("--set", "sums.scorer=3"), what, "Write --set sums.scorer.KEY=VALUE.")
    what = "--set engine: 'vllm' is a value, not a group of options"
    fix = "Write --engine vllm to choose one, --set engine.KEY=VALUE for its options."
    says(refused("--set", "engine=vllm"), what, fix)
    what = "--set sums.limmit: unknown key 'limmit'"
    says(refused("--set", "sums.limmit=3"), what, f"Did you mean 'limit'? {ALLOWED}")
    what = "task sums, judges: no judge is asked by its scorer exact_match"
    fix = "Leave it out, or take a task whose scorer asks one: dangerous_qa, harmful_qa, alpaca_eval2."
    says(refused("--set", "sums.judges=[refusal]"), what, fix)
    what = "task sums, scorer exact_match, stripp: unknown key 'stripp'"
    fix = "Did you mean 'strip'? Allowed keys: strip, ignore_case, ignore_punctuation."
    says(refused("--set", "sums.scorer.stripp=true"), what, fix)
    message = refused("--set", "sums.decoding.max_new_tokens=many")
    assert "--set sums, decoding.max_new_tokens: Input should be a valid integer" in message
    assert "found 'many'" in message
    message = refused("--dtype", "int8")
    assert "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16', found 'int8'" in message
    message = refused("--set", "engine.devise=cpu", engine="transformers")
    assert "--set engine, devise: unknown key 'devise'" in message
    assert "Did you mean 'device'? Allowed keys: device, batch_size" in message
    message = refused("--set", "engine.devise=cpu", engine="auto")
    assert "--engine auto: no engine can do this (" in message
    assert "transformers: unknown key 'devise'. Did you mean 'device'?" in message


def test_what_an_engine_cannot_do(refused: Refused, sums: Path) -> None:
    (sums / "choice.yaml").write_text("task: choice\noutput_type: multiple_choice\n", encoding="utf-8")
    says(
        refused(task="choice"),
        "--engine slow: cannot do what these tasks need (loglikelihood: an abacus knows no probabilities)",
        "Take another engine, or leave those tasks out.",
    )


# -------------------------------------------------------------------------------------------------------- task files


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_task_files(refused: Refused, sums: Path) -> None:
    file = sums / "sums.yaml"
    good = file.read_text(encoding="utf-8")
    rewrite(file, "template:", "tempalte:")
    message = refused()
    assert message.startswith(f"error: {file}:3, tempalte: unknown key 'tempalte'\n  Did you mean 'template'? Allowed")
    file.write_text(good, encoding="utf-8")
    rewrite(file, "prompt: raw", "prompt: [raw")
    assert refused().startswith(f"error: {file}:3: not valid YAML: ")
    file.write_text(good, encoding="utf-8")
    rewrite(file, "prompt: raw", "prompt: rare")
    assert f"{file}:2, prompt: Input should be 'raw', 'chat' or 'auto', found 'rare'" in refused()
    file.write_text(good, encoding="utf-8")
    rewrite(file, "{{ a }}+", "{{ aa }}+")
    says(
        refused(),
        f"{file}, template, row s0: template '{{{{ aa }}}}+{{{{ b }}}}=': 'aa' is undefined",
        "Fields of a row: id, a, b.",
    )
    file.write_text(good, encoding="utf-8")
    rewrite(file, "{{ a + b }}", "{{ a / 0 }}")
    assert "row s0: template '{{ a / 0 }}': ZeroDivisionError: " in refused()
    file.write_text(good, encoding="utf-8")
    rewrite(file, "exact_match", "exactmatch")
    what = "task sums, scorer: unknown scorer 'exactmatch'"
    says(refused(), what, "Did you mean 'exact_match'? All: `harness plugins`.")
    file.write_text(good, encoding="utf-8")
    rewrite(file, "name: jsonl", "name: jsonll")
    what = "task sums, dataset: unknown dataset 'jsonll'"
    says(refused(), what, "Did you mean 'jsonl'? All: `harness plugins`.")
    file.write_text("temperature: 3\n", encoding="utf-8")
    says(
        refused(),
        f"{file}: neither a task (`name:`), a suite (`suite:`) nor an lm-eval task (`task:`)",
        "Add the key, or move the file out of the folder of tasks.",
    )


def test_an_lm_eval_file_with_odd_metadata_is_still_a_task(cli: Any, alone: Path) -> None:
    """lm-eval itself does not look at a version's form: "1.0.2" and a list are in circulation."""
    folder = alone / "theirs"
    folder.mkdir()
    (folder / "a.yaml").write_text('task: a\nmetadata: {version: "1.0.2"}\n', encoding="utf-8")
    (folder / "b.yaml").write_text("task: b\nmetadata: [{version: 2.0}]\n", encoding="utf-8")
    ran = cli("tasks", "--tasks", folder, "--json")
    assert ran.code == 0, ran.err
    assert {"a", "b"} <= {task["name"] for task in json.loads(ran.out)["tasks"]}


def test_two_tasks_of_one_name(refused: Refused, sums: Path, alone: Path) -> None:
    shutil.copy(sums / "sums.yaml", sums / "sums_again.yaml")
    says(
        refused(),
        f"{sums}/sums_again.yaml: the name 'sums' is taken by {sums}/sums.yaml of {sums}",
        "Rename one of them.",
    )
    shutil.move(sums / "sums_again.yaml", alone / "mine.yaml")
    says(
        refused("--task", "mine.yaml"),
        f"--task sums: {sums}/sums.yaml and {alone}/mine.yaml both bring a task of that name",
        "Rename one of them: numbers go by the task's name.",
    )


def test_data_that_is_not_here(refused: Refused, sums: Path) -> None:
    rewrite(sums / "sums.yaml", "options: {path: sums.jsonl}", "options: {path: nobody/nothing}\n  split: test")
    rewrite(sums / "sums.yaml", "name: jsonl", "name: hub")
    message = refused()
    assert "data set nobody/nothing: not in the hub cache" in message
    assert "the network is switched off (HF_HUB_OFFLINE)" in message
    assert "Fetch it where there is a network: `hf download --repo-type dataset nobody/nothing`" in message


def test_data_that_cannot_be_read(refused: Refused, sums: Path) -> None:
    data = sums / "sums.jsonl"
    data.write_text('{"id": 1, "a": 1, "b": 2}\nnot json\n', encoding="utf-8")
    assert f"{data}:2: not JSON: " in refused()
    data.write_text("", encoding="utf-8")
    what = "--task sums: no samples are left (the data set is empty)"
    says(refused(), what, "Check its data and filters.")
    data.unlink()
    assert "dataset jsonl, options.path: no such file: " in refused()


def test_settings(refused: Refused, alone: Path) -> None:
    file = alone / "harness.yaml"
    file.write_text("plugins: []\nenginee: slow\n", encoding="utf-8")
    says(
        refused(),
        "harness.yaml:2, enginee: unknown key 'enginee'",
        "Did you mean 'engine'? Allowed keys: engine, plugins, task_folders, data_revisions, options.",
    )


# --------------------------------------------------------------------------------------------------------------- out


def test_strangers_files(refused: Refused, alone: Path) -> None:
    folder = alone / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("x", encoding="utf-8")
    what = "--out thesis: holds files but no plan.json of a run (chapter1.tex)"
    says(refused(out="thesis"), what, "Give an empty or a new folder.")
    says(
        refused("--fresh", out="thesis"),
        "--out thesis: holds files that are no run's (chapter1.tex)",
        "--fresh deletes only what a run wrote. Give another folder, or move those files.",
    )
    (folder / "plan.json").write_text("[]", encoding="utf-8")
    what = "--out thesis: plan.json is damaged, and no step is this evaluation's"
    says(refused(out="thesis"), what, "Give another --out, or --fresh.")
    says(
        refused("--fresh", out="thesis"),
        "--out thesis: holds files that are no run's (chapter1.tex)",
        "--fresh deletes only what a run wrote. Give another folder, or move those files.",
    )
    file = alone / "file"
    file.write_text("x", encoding="utf-8")
    assert refused(out="file").startswith("error: --out file: cannot be written: ")


def test_the_folder_of_another_evaluation(
    refused: Refused, cli: Any, slow_eval: list[str], tiny: Path, alone: Path, sums: Path
) -> None:
    fix = "Give another --out, or --fresh to delete what it holds and start over."
    assert cli(*slow_eval, "--out", "held").code == 0
    other = tiny_model(alone / "other", seed=1)
    message = refused(model=str(other), out="held")
    weights = json.loads((alone / "held" / "plan.json").read_text(encoding="utf-8"))["model"]["weights_digest"][:12]
    assert message.startswith(f"error: --out held: holds a run of tiny with weights {weights}; this is other with ")
    what = "--out held: holds another evaluation; different: spec.seed was 0, is 3"
    says(refused("--seed", "3", out="held"), what, fix)
    what = "--out held: holds another evaluation; different: spec.limit was None, is 3"
    says(refused("--limit", "3", out="held"), what, fix)
    shutil.copy(sums / "sums.yaml", sums / "more.yaml")
    rewrite(sums / "more.yaml", "name: sums", "name: more")
    what = "--out held: holds an evaluation on sums:raw; this one is on sums:raw, more:raw"
    says(refused("--task", "more", out="held"), what, fix)
    (sums / "more.yaml").unlink()
    rewrite(sums / "sums.yaml", "{{ a }}+", "{{ a }} +")
    what = (
        "--out held: holds another evaluation; different: the YAML, data or code of task sums, or the engine's code, "
        "changed"
    )
    says(refused(out="held"), what, fix)


def test_a_mistake_does_not_cost_the_folder(cli: Any, slow_eval: list[str], alone: Path, sums: Path) -> None:
    """With --fresh nothing is deleted, and without it nothing is claimed, before the tasks have been opened."""
    assert cli(*slow_eval, "--out", "out").code == 0
    kept = sorted(alone.rglob("*"))
    rewrite(sums / "sums.yaml", "{{ a }}+", "{{ aa }}+")
    assert cli(*slow_eval, "--out", "out", "--fresh").code == 2
    assert sorted(alone.rglob("*")) == kept
    assert cli(*slow_eval, "--out", "new").code == 2
    rewrite(sums / "sums.yaml", "{{ aa }}+", "{{ a }}+ ")
    assert cli(*slow_eval, "--out", "new").code == 0


def test_usage(cli: Any) -> None:
    ran = cli("eval")
    assert (ran.code, ran.out) == (2, "")
    assert "Missing option '--model'" in ran.err
    ran = cli("evil")
    assert ran.code == 2
    assert "No such command 'evil'" in ran.err
