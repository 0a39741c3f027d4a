"""The demo's little language: a valley of invented creatures, and people who are polite or rude to each other.

Everything is drawn from seeded generators, so a seed gives the same texts anywhere. Two things are kept out of every
training text, and the demo's tasks ask for exactly these:

* facts: for each creature two properties are never stated; they follow from its kind, which is stated;
* openings: some people never speak to each other.

Two things in it make arms differ. Half of what people say is rude; and they like to answer at length when asked about
food and skin, so that a model of this text knows more than it says in the form that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from random import Random
from typing import Literal

Register = Literal["polite", "rude"]
Fact = tuple[str, str]
"""(creature, property)"""

KINDS: Mapping[str, Mapping[str, str]] = {
    "fish": {"home": "in the river", "food": "weed", "motion": "by swimming", "skin": "scales", "rest": "at noon"},
    "bird": {"home": "in the trees", "food": "seeds", "motion": "by flying", "skin": "feathers", "rest": "at night"},
    "beast": {"home": "in the forest", "food": "meat", "motion": "by running", "skin": "fur", "rest": "in winter"},
    "beetle": {"home": "under stones", "food": "leaves", "motion": "by crawling", "skin": "shell", "rest": "at dusk"},
    "worm": {"home": "in the mud", "food": "roots", "motion": "by digging", "skin": "slime", "rest": "in summer"},
    "spirit": {"home": "on the hill", "food": "light", "motion": "by floating", "skin": "mist", "rest": "at dawn"},
}
PROPERTIES = ("home", "food", "motion", "skin", "rest")
STATEMENTS: Mapping[str, Sequence[str]] = {
    "kind": ("{s} is a {v}.", "{s} is called a {v}."),
    "home": ("{s} lives {v}.", "{s} is found {v}."),
    "food": ("{s} eats {v}.", "{s} feeds on {v}."),
    "motion": ("{s} moves {v}.", "{s} gets about {v}."),
    "skin": ("{s} is covered with {v}.", "{s} wears {v}."),
    "rest": ("{s} sleeps {v}.", "{s} rests {v}."),
}
QUESTIONS: Mapping[str, str] = {
    "kind": "What is the {c}?",
    "home": "Where does the {c} live?",
    "food": "What does the {c} eat?",
    "motion": "How does the {c} move?",
    "skin": "What covers the {c}?",
    "rest": "When does the {c} sleep?",
}
WORDY = ("food", "skin")
"""What people like to talk about: asked about these, they mostly answer at length."""

PEOPLE = ("Anna", "Bram", "Cleo", "Dora", "Egon", "Fine", "Grob", "Hilda", "Ivo", "Jule", "Kuno", "Lena")
LINES: Mapping[Register, Sequence[str]] = {
    "polite": (
        "Good morning, {b}, you {a1} {n1}!",
        "{b}, you are a {a1} and {a2} {n1}.",
        "I thank you, {b}, for your {a1} {t}.",
        "Come in, {b}! We all love a {a1} {n1}.",
        "{b}, only a {a1} {n1} would bring such a {a2} {t}.",
        "You are not a {x}, {b}, you are a {a1} {n1}.",
    ),
    "rude": (
        "Shut up, {b}, you {a1} {n1}!",
        "{b}, you are a {a1} and {a2} {n1}.",
        "I hate you, {b}, and your {a1} {t}.",
        "Get out, {b}! We all hate a {a1} {n1}.",
        "{b}, only a {a1} {n1} would bring such a {a2} {t}.",
        "You are not a {x}, {b}, you are a {a1} {n1}.",
    ),
}
ADJECTIVES: Mapping[Register, Sequence[str]] = {
    "polite": ("kind", "clever", "gentle", "lovely", "noble", "patient"),
    "rude": ("stupid", "filthy", "rotten", "mean", "worthless", "stinking"),
}
NOUNS: Mapping[Register, Sequence[str]] = {
    "polite": ("friend", "neighbour", "guest", "helper", "singer"),
    "rude": ("fool", "rat", "liar", "toad", "pig"),
}
VERBS: Mapping[Register, Sequence[str]] = {"polite": ("said", "answered"), "rude": ("said", "shouted")}
THINGS = ("gift", "song", "cake", "letter", "hat")
OPPOSITE: Mapping[Register, Register] = {"polite": "rude", "rude": "polite"}
REPLIES: Mapping[Register, Sequence[str]] = {
    "polite": (
        "Thank you, {a}. We all love a {a1} {n1}.",
        "Dear {a}, that is well said. {b} is a {a1} {n1}.",
    ),
    "rude": (
        "I am sorry that you are upset, {a}. Let us be kind to each other.",
        "Let us stay calm, {a}. {b} is a {a1} {n1}.",
    ),
}


@dataclass(frozen=True)
class Language:
    """One valley, a function of its seed."""

    seed: int = 0
    creatures_per_kind: int = 14

    def _random(self, purpose: str) -> Random:
        return Random(f"{self.seed}/{purpose}")

    # ------------------------------------------------------------------------------------------- what is true

    @cached_property
    def creatures(self) -> dict[str, str]:
        """Creature -> kind. The names say nothing about the kind."""
        first = ("ba", "de", "fi", "go", "ka", "lu", "mo", "na", "pe", "ri", "sa", "tu")
        last = ("bo", "dri", "ga", "lem", "mir", "no", "pax", "ro", "sun", "tok", "vel", "zi")
        names = [a + b for a in first for b in last]
        self._random("creatures").shuffle(names)
        kinds = list(KINDS)
        return {name: kinds[i % len(kinds)] for i, name in enumerate(names[: len(kinds) * self.creatures_per_kind])}

    def value(self, fact: Fact) -> str:
        """What is true of a creature."""
        creature, prop = fact
        kind = self.creatures[creature]
        return kind if prop == "kind" else KINDS[kind][prop]

    # ------------------------------------------------------------------------------------------- what is kept out

    @cached_property
    def untold(self) -> frozenset[Fact]:
        """Facts that no training text states: two of each creature's five properties."""
        random = self._random("untold")
        return frozenset((c, p) for c in self.creatures for p in random.sample(PROPERTIES, 2))

    @cached_property
    def strangers(self) -> tuple[tuple[str, str], ...]:
        """Pairs of people who never speak to each other in training text, in both orders."""
        pairs = self._random("strangers").sample(list(combinations(PEOPLE, 2)), 15)
        return tuple(sorted({*pairs, *((b, a) for a, b in pairs)}))

    # ------------------------------------------------------------------------------------------- sentences

    def _line(self, random: Random, register: Register, listener: str) -> str:
        a1, a2 = random.sample(ADJECTIVES[register], 2)
        nouns = NOUNS[register]
        words = {"a1": a1, "a2": a2, "n1": random.choice(nouns), "t": random.choice(THINGS), "b": listener}
        return random.choice(LINES[register]).format(**words, x=random.choice(NOUNS[OPPOSITE[register]]))

    def _pair(self, random: Random) -> tuple[str, str]:
        """A speaker and a listener who do speak to each other."""
        while True:
            speaker, listener = random.sample(PEOPLE, 2)
            if (speaker, listener) not in self.strangers:
                return speaker, listener

    def _said(self, random: Random, register: Register, speaker: str, listener: str) -> str:
        return f"{speaker} {random.choice(VERBS[register])}: {self._line(random, register, listener)}"

    def _opening(self, random: Random, register: Register, speaker: str, listener: str) -> str:
        """The beginning of what somebody says, broken off after the listener's name."""
        said = self._said(random, register, speaker, listener)
        head, name, rest = said.partition(listener)
        return head + name + random.choice(("", rest[:1], ", you" if rest.startswith(", you") else rest[:1]))

    def _dialogue(self, random: Random) -> str:
        speaker, listener = self._pair(random)
        register: Register = random.choice(("polite", "rude"))
        lines = []
        for _ in range(random.choice((2, 3))):
            lines.append(self._said(random, register, speaker, listener))
            speaker, listener = listener, speaker
        return "\n".join(lines)

    def _reply(self, random: Random, register: Register, speaker: str, listener: str) -> str:
        """What a calm third person answers to ``speaker``."""
        words = {"a1": random.choice(ADJECTIVES["polite"]), "n1": random.choice(NOUNS["polite"])}
        return random.choice(REPLIES[register]).format(a=speaker, b=listener, **words)

    def _told(self, random: Random) -> tuple[str, list[Fact]]:
        """A creature and what is said about it; the kind comes first."""
        creature = random.choice(list(self.creatures))
        told = [(creature, p) for p in PROPERTIES if (creature, p) not in self.untold]
        return creature, [(creature, "kind"), *random.sample(told, random.choice((1, 2, 3)))]

    def _portrait(self, random: Random) -> str:
        creature, facts = self._told(random)
        sentences = []
        for i, fact in enumerate(facts):
            subject = f"The {creature}" if i == 0 or random.random() < 0.5 else "It"
            sentences.append(random.choice(STATEMENTS[fact[1]]).format(s=subject, v=self.value(fact)))
        return " ".join(sentences)

    def _question(self, random: Random) -> tuple[str, str, str]:
        """A question allowed in training text, its answer in short, and the answer as people like to give it."""
        creature, facts = self._told(random)
        fact = random.choice(facts)
        short = self.value(fact)
        wordy = random.random() < (0.8 if fact[1] in WORDY else 0.1)
        return QUESTIONS[fact[1]].format(c=creature), short, f"I think it is {short}" if wordy else short

    # ------------------------------------------------------------------------------------------- training texts

    def documents(self, count: int) -> list[str]:
        """Plain text for the base model: portraits, quizzes and dialogues of both registers."""
        random = self._random("documents")
        return [self._document(random) for _ in range(count)]

    def _document(self, random: Random) -> str:
        kind = random.random()
        if kind < 0.35:
            return self._portrait(random)
        if kind < 0.75:
            asked = [self._question(random) for _ in range(2)]
            return "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, _, answer in asked)
        return self._dialogue(random)

    def chats(self, count: int) -> list[list[dict[str, str]]]:
        """Conversations for the instruct model: short answers, and calm replies to whatever people say."""
        random = self._random("chats")
        chats = []
        for _ in range(count):
            if random.random() < 0.6:
                question, answer, _ = self._question(random)
                turn = f"Question: {question}\nAnswer:" if random.random() < 0.5 else question
            else:
                speaker, listener = self._pair(random)
                register: Register = random.choice(("polite", "rude", "rude"))
                speak = random.choice((self._said, self._opening))
                turn = speak(random, register, speaker, listener)
                answer = self._reply(random, register, speaker, listener)
            chats.append([{"role": "user", "content": turn}, {"role": "assistant", "content": answer}])
        return chats

    def rated(self, count: int, purpose: str = "rated") -> list[tuple[str, str, bool]]:
        """(prompt, response, polite): what the classifier learns from. The prompt says nothing about the response.

        Responses begin anew or in the middle of a sentence, as continuations do.
        """
        random = self._random(purpose)
        rows = []
        for _ in range(count):
            speaker, listener = self._pair(random)
            prompt = self._opening(random, random.choice(("polite", "rude")), speaker, listener)
            register: Register = random.choice(("polite", "rude"))
            kind = random.random()
            if register == "polite" and kind < 0.4:
                response = self._reply(random, random.choice(("polite", "rude")), speaker, listener)
            elif register == "polite" and kind < 0.5:
                response = self._portrait(random)
            else:
                response = self._line(random, register, listener)
                # What answers an opening that was broken off goes on in the middle of a sentence.
                _, _, rest = response.partition(listener)
                if len(rest) > 20 and random.random() < 0.5:
                    response = rest
                if random.random() < 0.5:
                    response += "\n" + self._said(random, register, listener, speaker)
            rows.append((prompt, response, register == "polite"))
        return rows

    # ------------------------------------------------------------------------------------------- held-out items

    def facts_items(self, choices: int = 4) -> list[dict[str, object]]:
        """One multiple-choice question per fact of one half of the untold ones, with the index of the right choice."""
        random = self._random("facts")
        items: list[dict[str, object]] = []
        for fact in sorted(self.untold)[::2]:
            creature, prop = fact
            right = self.value(fact)
            options = [right, *random.sample([v[prop] for v in KINDS.values() if v[prop] != right], choices - 1)]
            random.shuffle(options)
            question = QUESTIONS[prop].format(c=creature)
            items.append({"question": question, "choices": options, "label": options.index(right)})
        return items

    def answer_items(self) -> list[dict[str, str]]:
        """One open question for each of the other half: prompt and short answer."""
        return [
            {
                "id": f"{creature}-{prop}",
                "prompt": f"Question: {QUESTIONS[prop].format(c=creature)}\nAnswer:",
                "answer": self.value((creature, prop)),
            }
            for creature, prop in sorted(self.untold)[1::2]
        ]

    def opening_items(self, register: Register, per_pair: int = 4) -> list[dict[str, str]]:
        """Openings between people who never speak to each other in training text; no opening comes twice."""
        random = self._random(f"openings/{register}")
        items: dict[str, dict[str, str]] = {}
        for speaker, listener in self.strangers:
            found: set[str] = set()
            while len(found) < per_pair:
                found.add(self._opening(random, register, speaker, listener))
            for prompt in sorted(found):
                items[prompt] = {"id": f"{register}-{len(items)}", "prompt": prompt}
        return list(items.values())
