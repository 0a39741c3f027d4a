"""How AlpacaEval asks a judge: prompt templates and parsers of the installed alpaca-eval package, read by path.

The package fills a template and then takes it apart at its chat markers, so that an output which holds such a marker
writes turns of its own, and one which holds ``{output_2}`` is filled again. Here the template is taken apart first and
filled in one pass; and what would end a quotation, or is a control token of a common chat template, is written in a
harmless way in the outputs.
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from harness import UserError, digest_of, nearest, quiet_alpaca_eval
from harness_plugins.judges.text import without_control
from harness_plugins.judges.words import Question, Reply, Unparsable

_TURN = re.compile(r"<\|im_start\|>(\w+)[^\n]*\n(.*?)<\|im_end\|>", re.DOTALL)
_PLACE = re.compile(r"\{(instruction|output_1|output_2)\}")


@dataclass(frozen=True)
class Annotator:
    """One of the package's judge configurations."""

    name: str
    turns: tuple[tuple[str, str], ...]
    """Role and template of every message."""
    parser: str
    parser_options: Mapping[str, Any]
    max_tokens: int

    @property
    def alternatives(self) -> tuple[str, ...]:
        """First tokens whose log-probabilities are the verdict; none where the judge's words are."""
        return tuple(self.parser_options["denominator_tokens"]) if self.parser == "logprob_parser" else ()

    def identity(self) -> dict[str, Any]:
        """What of it moves a verdict."""
        described = [[list(turn) for turn in self.turns], self.parser, dict(self.parser_options)]
        return {"name": self.name, "digest": digest_of(described)[:16]}

    def question(self, instruction: str, first: str, second: str, repeat: int = 0) -> Question:
        """The question about two outputs in this order."""
        # Lone surrogates, of a tokenizer say, cannot be sent.
        given = {"instruction": instruction, "output_1": first, "output_2": second}
        texts = {place: text.encode(errors="replace").decode() for place, text in given.items()}
        messages = tuple(
            {"role": role, "content": _PLACE.sub(lambda found: texts[found[1]], content)}
            for role, content in self.turns
        )
        return Question(messages, self.alternatives, repeat)

    def preference(self, reply: Reply) -> float:
        """The judge's preference, 1 (the first shown) to 2 (the second).

        Raises:
            Unparsable: the reply names neither.
        """
        if self.alternatives:
            return self._weighted(reply.logprobs or {})
        if reply.finish == "length":
            raise Unparsable("the judge's reply was cut off")
        with quiet_alpaca_eval():
            from alpaca_eval import completion_parsers

            try:
                values = getattr(completion_parsers, self.parser)(reply.text, **dict(self.parser_options))
            except Exception as error:  # the package's parsers fail in many ways on odd replies
                raise Unparsable(
                    f"the package's {self.parser} cannot read the reply ({type(error).__name__})"
                ) from None
        value = values[0] if isinstance(values, list) and len(values) == 1 else None
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise Unparsable(f"the package's {self.parser} finds no verdict in the reply")
        if value != 0 and not 1 <= value <= 2:
            raise Unparsable(f"the package's {self.parser} reads {value}, which is outside 1 to 2")
        return float(value) or 1.5

    def _weighted(self, logprobs: Mapping[str, float]) -> float:
        """As the package's ``logprob_parser``: a token that is not among the likeliest has probability 0."""
        found = {token: logprobs[token] for token in self.alternatives if token in logprobs}
        if not found:
            raise Unparsable(f"neither {' nor '.join(self.alternatives)} is among the judge's likeliest first tokens")
        numerator = found.get(self.parser_options["numerator_token"], -math.inf)
        if self.parser_options.get("is_binarize", True):
            others = [value for token, value in found.items() if token != self.parser_options["numerator_token"]]
            return 1.0 if all(numerator > value for value in others) else 2.0
        top = max(found.values())
        total = math.fsum(math.exp(value - top) for value in found.values())
        return 2.0 - math.exp(numerator - top) / total


def harmless(text: str) -> str:
    """An output that cannot end its quotation, nor open a turn of its own in a chat template that parses content."""
    return without_control(text.replace('"""', r"\"\"\""))


def switched(instruction: str, seed: int) -> bool:
    """Whether the two outputs change places: the package's own draw, whose seed is 0, for this instruction."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True], k=1)[0]


def annotators_folder() -> Path:
    """Where the installed package keeps its judge configurations; nothing of it is imported."""
    found = importlib.util.find_spec("alpaca_eval")
    if found is None or not found.submodule_search_locations:
        raise UserError("scorer alpaca_eval", "the alpaca-eval package is not installed", "pip install 'alpaca-eval'.")
    return Path(found.submodule_search_locations[0]) / "evaluators_configs"


@lru_cache(maxsize=32)
def load_annotator(name: str) -> Annotator:
    """One judge configuration, by the name of its folder.

    Raises:
        UserError: no such name; a kind of judge that is not asked in one question with one verdict.
    """
    where, folder = "scorer alpaca_eval, annotator", annotators_folder()
    known = sorted(entry.parent.name for entry in folder.glob("*/configs.yaml"))
    if name not in known:
        close = nearest(name, known)
        fix = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        what = f"the alpaca-eval package has no judge configuration {name!r}"
        raise UserError(where, what, f"{fix}For example alpaca_eval_gpt4, weighted_alpaca_eval_gpt4_turbo.")
    found = yaml.safe_load((folder / name / "configs.yaml").read_text(encoding="utf-8"))
    config = found[name] if isinstance(found, dict) and name in found else {}
    kwargs = dict(config.get("completions_kwargs") or {})
    parser = str(config.get("fn_completion_parser") or "")
    options = dict(config.get("completion_parser_kwargs") or {})
    problem = _unfit(config, kwargs, parser, options)
    template = config.get("prompt_template")
    text = (folder / str(template)).read_text(encoding="utf-8") if template and not problem else ""
    turns = tuple((role, content.strip()) for role, content in _TURN.findall(text)) or (("user", text.strip()),)
    places = sorted(place for _, content in turns for place in _PLACE.findall(content))
    if not problem and places != ["instruction", "output_1", "output_2"]:
        problem = "its template does not show one instruction and two outputs once each"
    if problem:
        fix = "Take another, for example alpaca_eval_gpt4 or weighted_alpaca_eval_gpt4_turbo."
        raise UserError(where, f"{name} cannot be used here: {problem}", fix)
    return Annotator(name, turns, parser, options, int(kwargs.get("max_tokens") or 100))


def _unfit(config: Mapping[str, Any], kwargs: Mapping[str, Any], parser: str, options: Mapping[str, Any]) -> str | None:
    """Why a configuration cannot be asked in one question."""
    if config.get("batch_size", 1) != 1:
        return "it shows several pairs in one question"
    if {"function_call", "functions", "tools", "tool_choice"} & set(kwargs):
        return "it asks through function calls"
    if parser == "logprob_parser":
        single = config.get("completion_key") == "completions_all" and options.get("log_prob_index", "batch") == "batch"
        return None if single else "its verdict is not the first token"
    supported = {"regex_parser", "ranking_parser", "lmsys_parser", "json_parser", "eval_parser", "pipeline_meta_parser"}
    if parser not in supported or config.get("completion_key", "text") not in ("text", "raw_completion"):
        return f"it reads replies with {parser or 'no parser'}"
    return None
