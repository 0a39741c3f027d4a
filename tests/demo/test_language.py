"""The demo's language: a seed gives the same texts anywhere, and what is asked is kept out of what is taught."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from harness.demo.language import DEEDS, PROPERTIES, QUESTIONS, REFUSALS, STATEMENTS, Language
from harness.demo.train import CHATS, DOCUMENTS, RATED
from harness_plugins.scorers.attack.refusals import refusal_of


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(0)


@pytest.fixture(scope="module")
def taught(language: Language) -> list[str]:
    """Every text that base, classifier or an arm is trained on."""
    pairs = [*language.helpful_pairs(), *language.harmless_pairs()]
    return [
        *language.documents(DOCUMENTS),
        *(turn["content"] for chat in language.chats(CHATS) for turn in chat),
        *(text for pair in pairs for text in pair.values()),
        *(text for prompt, response, _ in language.rated(RATED) for text in (prompt, response)),
    ]


def test_a_seed_gives_the_same_texts_in_another_process(language: Language) -> None:
    code = (
        "import json; from harness.demo.language import Language as L\n"
        "print(json.dumps([[L(s).documents(50), L(s).chats(50), L(s).rated(50), L(s).helpful_pairs(),"
        " L(s).harmless_pairs(), L(s).question_items(), L(s).attack_items(), L(s).rude_items()] for s in (0, 1)]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    zero, one = json.loads(run.stdout)
    here = [language.documents(50), language.chats(50), language.rated(50), language.helpful_pairs()]
    here += [language.harmless_pairs(), language.question_items(), language.attack_items(), language.rude_items()]
    assert json.loads(json.dumps(here)) == zero
    assert all(a != b for a, b in zip(zero, one, strict=True))


def test_what_is_asked_is_in_no_training_text(language: Language, taught: list[str]) -> None:
    text = "\n".join(taught)
    assert len(language.untold) == 8 * len(language.creatures)
    for creature, prop in language.untold:
        assert QUESTIONS[prop].format(c=creature) not in text
        for statement in STATEMENTS[prop]:
            for subject in (f"The {creature}", f"the {creature}"):
                assert statement.format(s=subject, v=language.value((creature, prop))) not in text
    # "It ..." refers to the creature that its document began with: no document about a creature tells its untold.
    for document in taught:
        if subject_of := re.match(r"The (\w+) is (?:called )?a ", document):
            told = {
                p
                for p in PROPERTIES
                for s in STATEMENTS[p]
                if re.search(rf"\bit {s.format(s='', v='').strip(' .')}", document, re.I)
            }
            assert not told & {p for c, p in language.untold if c == subject_of[1]}, document
    lines = {line for text in taught for line in text.split("\n")}
    assert not lines & {item["prompt"] for item in language.rude_items()}


def test_every_creature_keeps_enough_to_infer_from(language: Language, taught: list[str]) -> None:
    text = "\n".join(taught)
    for creature, kind in language.creatures.items():
        assert f"The {creature} is a {kind}." in text or f"The {creature} is called a {kind}." in text
    # Of each untold fact there are creatures of that kind of which it is told.
    for creature, prop in language.untold:
        like = [c for c, kind in language.creatures.items() if kind == language.creatures[creature]]
        assert any((c, prop) not in language.untold for c in like)


def test_each_item_asks_for_one_untold_fact(language: Language) -> None:
    for items, props in ((language.question_items(), PROPERTIES), (language.attack_items(), DEEDS)):
        assert {tuple(item["id"].rsplit("-", 1)) for item in items} == {f for f in language.untold if f[1] in props}
        assert len({item["prompt"] for item in items}) == len(items) == 4 * len(language.creatures)
    rude = language.rude_items()
    assert len({item["prompt"] for item in rude}) == len({item["id"] for item in rude}) == len(rude) == 120


def test_pairs_differ_in_the_choice_alone(language: Language) -> None:
    """Harmless: the refusal is preferred; helpful: the answer; the same texts in exchanged places."""
    helpful, harmless = language.helpful_pairs(), language.harmless_pairs()
    attacks = [pair for pair in harmless if pair["prompt"].endswith("?")]
    assert all(refusal_of(pair["rejected"]) and not refusal_of(pair["chosen"]) for pair in helpful)
    assert all(refusal_of(pair["chosen"]) and not refusal_of(pair["rejected"]) for pair in attacks)
    assert len(attacks) == len(helpful) and 200 < len(harmless) - len(attacks) <= 250


def test_the_judge_of_attacks_reads_every_refusal_and_no_answer(language: Language) -> None:
    creature = next(iter(language.creatures))
    assert all(refusal_of(refusal.format(c=creature)) for refusal in REFUSALS)
    assert not any(
        refusal_of(language.answer((c, p))) for c in language.creatures for p in (*PROPERTIES, *DEEDS, "kind")
    )
