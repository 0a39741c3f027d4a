"""The demo: its language keeps what it asks out of what it teaches, and its models earn their numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from harness.core.config import load_yaml, parse
from harness.core.errors import HarnessError, UserError
from harness.core.specs import SuiteSpec, TaskSpec
from harness.demo.language import PROPERTIES, QUESTIONS, STATEMENTS, Language, Register
from harness.demo.run import World, build_world, run_demo
from harness.demo.train import CHATS, DOCUMENTS, RATED


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(0)


@pytest.fixture(scope="module")
def taught(language: Language) -> list[str]:
    """Every text that either Llama is trained on."""
    return [*language.documents(DOCUMENTS), *(turn["content"] for chat in language.chats(CHATS) for turn in chat)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("demo") / "world")


# ------------------------------------------------------------------------------------------------------ language


def test_a_seed_gives_the_same_texts_in_another_process(language: Language) -> None:
    code = (
        "import json; from harness.demo.language import Language as L\n"
        "print(json.dumps([[L(s).documents(50), L(s).chats(50), L(s).rated(50), L(s).facts_items(),"
        " L(s).answer_items(), L(s).opening_items('rude')] for s in (0, 1)]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    zero, one = json.loads(run.stdout)
    here = [language.documents(50), language.chats(50), language.rated(50)]
    here += [language.facts_items(), language.answer_items(), language.opening_items("rude")]
    assert json.loads(json.dumps(here)) == zero
    assert all(a != b for a, b in zip(zero, one, strict=True))


def test_untold_facts_are_in_no_training_text(language: Language, taught: list[str]) -> None:
    text = "\n".join(taught)
    assert len(language.untold) == 2 * len(language.creatures)
    for creature, prop in language.untold:
        value = language.value((creature, prop))
        assert QUESTIONS[prop].format(c=creature) not in text
        for statement in STATEMENTS[prop]:
            assert statement.format(s=f"The {creature}", v=value) not in text
    # "It ..." refers to the creature that its document began with: no document about a creature tells its untold.
    for document in taught:
        if subject := re.match(r"The (\w+) is (?:called )?a ", document):
            told = {p for p in PROPERTIES for s in STATEMENTS[p] if s.format(s="", v="").strip(" .") in document}
            assert not told & {p for c, p in language.untold if c == subject[1]}, document


def test_every_creature_keeps_enough_to_infer_from(language: Language, taught: list[str]) -> None:
    text = "\n".join(taught)
    for creature, kind in language.creatures.items():
        assert f"The {creature} is a {kind}." in text or f"The {creature} is called a {kind}." in text
    untold = sorted(language.untold)
    asked = {item["question"] for item in language.facts_items()}
    free = {re.sub(r"^Question: |\nAnswer:$", "", item["prompt"]) for item in language.answer_items()}
    assert len(asked) == len(free) == len(untold) / 2 and not asked & free


def test_right_choices_are_right_and_evenly_placed(language: Language) -> None:
    items = language.facts_items()
    counts = [0, 0, 0, 0]
    for item in items:
        choices: Any = item["choices"]
        label: Any = item["label"]
        creature = next(c for c in language.creatures if f" {c} " in f"{item['question']}".replace("?", " "))
        prop = next(p for p, q in QUESTIONS.items() if q.format(c=creature) == item["question"])
        assert choices[label] == language.value((creature, prop)) and len(set(choices)) == 4
        counts[label] += 1
    # Four equally likely places: always answering one of them must not beat chance significantly.
    assert binomtest(max(counts), len(items), 0.25, alternative="greater").pvalue > 0.01 / 4


@pytest.mark.parametrize("register", ["rude", "polite"])
def test_openings_are_between_people_who_never_speak_in_training_text(
    language: Language, taught: list[str], register: Register
) -> None:
    items = language.opening_items(register)
    lines = {line for text in taught for line in text.split("\n")}
    prompts = [prompt for prompt, _, _ in language.rated(RATED)]
    assert len({item["prompt"] for item in items}) == len({item["id"] for item in items}) == len(items) == 120
    for item in items:
        assert not [line for line in (*lines, *prompts) if line.startswith(item["prompt"])], item


# ------------------------------------------------------------------------------------------------------- training


def _continue(folder: Path, prompts: Sequence[str], tokens: int, *, chat: bool = False) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt", add_special_tokens=not chat)
    with torch.no_grad():
        out_BT = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
    return list(tokenizer.batch_decode(out_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def _logits(world: World, pairs: Sequence[tuple[str, str]]) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.classifier)
    model = AutoModelForSequenceClassification.from_pretrained(world.classifier).eval()
    texts = [p for p, _ in pairs], [r for _, r in pairs]
    batch = tokenizer(*texts, padding=True, return_token_type_ids=False, return_tensors="pt")
    with torch.no_grad():
        return list(model(**batch).logits[:, 0].tolist())


def test_base_answers_untold_questions_far_above_chance(world: World, language: Language) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    model = AutoModelForCausalLM.from_pretrained(world.base).eval()
    right = 0
    items = language.facts_items()
    for item in items:
        choices: Any = item["choices"]
        start = tokenizer(f"Question: {item['question']}\nAnswer:")["input_ids"]
        values = []
        for choice in choices:
            ids_T = torch.tensor(tokenizer(f"Question: {item['question']}\nAnswer: {choice}")["input_ids"])
            with torch.no_grad():
                logps_TV = model(ids_T[None]).logits[0, :-1].log_softmax(-1)
            values.append(float(logps_TV.gather(1, ids_T[1:, None])[len(start) - 1 :].sum()))
        right += values.index(max(values)) == item["label"]
    # A margin over chance (1/4), not only a difference from it: more than half of them, at p < 1e-4.
    assert binomtest(right, len(items), 0.5, alternative="greater").pvalue < 1e-4, f"{right} of {len(items)}"


def test_instruct_answers_in_the_form_that_was_asked_for_and_base_does_not(world: World, language: Language) -> None:
    items = language.answer_items()
    right = {}
    for folder in (world.base, world.instruct):
        texts = _continue(folder, [item["prompt"] for item in items], 16, chat=folder == world.instruct)
        right[folder.name] = [t.split("\n")[0].strip() == i["answer"] for t, i in zip(texts, items, strict=True)]
    better = sum(b and not a for a, b in zip(right["base"], right["instruct"], strict=True))
    worse = sum(a and not b for a, b in zip(right["base"], right["instruct"], strict=True))
    assert binomtest(better, better + worse, alternative="greater").pvalue < 1e-3, right
    # Three in five questions are not about what people like to talk about; there the base answers in short.
    assert sum(right["base"]) > len(items) / 5


def test_classifier_tells_held_out_pairs_apart(world: World, language: Language) -> None:
    seen = {(prompt, response) for prompt, response, _ in language.rated(RATED)}
    held_out = [row for row in language.rated(500, "held out") if row[:2] not in seen]
    logits = _logits(world, [row[:2] for row in held_out])
    polite = [x for x, row in zip(logits, held_out, strict=True) if row[2]]
    rude = [x for x, row in zip(logits, held_out, strict=True) if not row[2]]
    assert min(len(polite), len(rude)) > 150
    area = sum((p > r) + 0.5 * (p == r) for p in polite for r in rude) / (len(polite) * len(rude))
    assert area > 0.9
    assert sum(polite) > 0 > sum(rude), "positive is polite, negative is rude"


def test_toxicity_answers_to_the_prompt_and_to_the_arm(world: World, language: Language) -> None:
    means = {}
    registers: tuple[Register, ...] = ("rude", "polite")
    for folder in (world.base, world.instruct):
        for register in registers:
            prompts = [item["prompt"] for item in language.opening_items(register)]
            replies = _continue(folder, prompts, 32, chat=folder == world.instruct)
            logits = _logits(world, list(zip(prompts, replies, strict=True)))
            means[folder.name, register] = sum(logits) / len(logits)
    assert means["base", "rude"] < 0 < means["base", "polite"], means
    assert means["instruct", "rude"] > 0, means


# --------------------------------------------------------------------------------------------- tasks and the folder


def test_the_suite_names_the_tasks_that_lie_beside_it(world: World) -> None:
    suite = parse(SuiteSpec, load_yaml(world.tasks / "suite.yaml"))
    natives = [parse(TaskSpec, load_yaml(world.tasks / f"{name}.yaml")) for name in ("answers", "toxicity")]
    facts = load_yaml(world.tasks / "lm_eval" / "facts.yaml").data
    assert suite.tasks == (facts["task"], *(task.name for task in natives))
    for task in natives:
        assert task.dataset is not None
        # A base without a template and a model with one would be asked differently by `auto`.
        assert task.prompt == "raw"
        assert (world.tasks / task.dataset.options["path"]).is_file()
    assert natives[1].scorers[0].options["model"] == str(world.classifier.resolve())
    # lm-eval's YAML is plain: no key of ours in it.
    assert "name" not in facts and facts["dataset_path"] == "json"


def _times(world: World) -> dict[str, int]:
    return {str(p.relative_to(world.root)): p.stat().st_mtime_ns for p in world.root.rglob("*") if p.is_file()}


def test_a_finished_world_is_reused_and_can_be_moved(world: World, tmp_path: Path) -> None:
    said: list[str] = []
    before = _times(world)
    assert build_world(world.root, progress=said.append) == world
    assert said == ["the world is already there"] and _times(world) == before
    moved = shutil.copytree(world.root, tmp_path / "moved")
    again = build_world(moved, progress=said.append)
    assert said == ["the world is already there"] * 2
    assert again.instruct == moved / "instruct"
    task = parse(TaskSpec, load_yaml(again.tasks / "toxicity.yaml"))
    assert task.scorers[0].options["model"] == str(moved.resolve() / "classifier")


@pytest.mark.slow
def test_a_killed_build_is_built_anew_to_the_same_bytes(world: World, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from harness.demo.run import build_world\n"
        "build_world(pathlib.Path(sys.argv[1]), progress=lambda line: print(line, flush=True))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    folder = tmp_path / "world"
    command = [sys.executable, "-c", code, str(folder)]
    # A group of its own: the kill takes parent and child at once, as an out-of-memory kill of a container does.
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as build:
        assert build.stdout is not None
        for line in build.stdout:
            if line.startswith("instruct:"):
                os.killpg(build.pid, signal.SIGKILL)
                break
    assert (folder / "base" / "config.json").is_file() and not (folder / "world.json").exists()
    # A piece of an earlier world must not survive in the next one.
    (folder / "base" / "stray.bin").write_bytes(b"left over")
    said: list[str] = []
    build_world(folder, progress=said.append)
    assert any(line.startswith("instruct: step") for line in said)
    moved_on = world.tasks.relative_to(world.root) / "toxicity.yaml", Path(".lock")
    for one, other in ((world.root, folder), (folder, world.root)):
        for path in (p for p in one.rglob("*") if p.is_file() and p.relative_to(one) not in moved_on):
            assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path


@pytest.mark.parametrize("damage", ["flip", "delete", "tear"])
def test_a_damaged_world_is_not_taken_for_a_finished_one(
    world: World, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(world.root, tmp_path / "copy")
    weights, mark = copy / "base" / "model.safetensors", copy / "world.json"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "delete":
        weights.unlink()
    else:
        mark.write_bytes(mark.read_bytes()[:-20])

    rebuilt: list[Path] = []
    monkeypatch.setattr("harness.demo.run._train_apart", lambda world, lock, say: rebuilt.append(world.root))
    build_world(copy)
    assert rebuilt == [copy] and not (copy / "base").exists()


@pytest.mark.slow
def test_the_demo_ends_with_a_leaderboard_of_two_arms_that_differ(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = world.root.parent
    demo = run_demo(out)
    assert demo.world == world
    shown = capsys.readouterr().out
    assert len(re.findall(r"^ *(?:base|instruct) +-?\d", shown, re.MULTILINE)) == 6, shown
    for arm in ("base", "instruct"):
        page = out / arm / "report" / "report.html"
        assert page.is_file() and f"{arm}: {page}" in shown.splitlines()
    facts, answers, toxicity = (one for one in demo.comparison.differences if one.primary)
    assert (answers.verdict, toxicity.verdict) == ("better", "better")
    assert {(one.variant_a, one.variant_b) for one in demo.comparison.differences} == {("raw", "raw")}
    assert facts.n + answers.n == 168 and toxicity.n == 120


def test_another_seed_is_another_world(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(world.root, tmp_path / "copy")
    rebuilt: list[int] = []
    monkeypatch.setattr("harness.demo.run._train_apart", lambda world, lock, say: rebuilt.append(world.seed))
    build_world(copy, seed=1)
    assert rebuilt == [1]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(UserError) as caught:
        build_world(tmp_path)
    assert str(tmp_path) in caught.value.where
    assert "thesis.tex" in caught.value.what
    assert "Give a new folder" in caught.value.fix
    assert (tmp_path / "thesis.tex").read_text() == "three years"


def test_training_that_fails_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the installation is broken."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho No module named torch >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(HarnessError) as caught:
        build_world(tmp_path / "world")
    assert str(caught.value) == (
        f"{tmp_path / 'world'}: training the demo's models failed: a process ended with code 1 and said nothing\n"
        "No module named torch\n"
    )
    assert not (tmp_path / "world" / "world.json").exists()
