"""Token ids of rows: prefixes, BOS, EOS, loss masks, truncation, and parity with what evaluation sends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from harness.contracts.dataset import DatasetRow, TrainingRow
from harness.contracts.registry import load_plugins
from harness.core.errors import UserError
from harness.core.records import ModelInfo
from harness.core.specs import ModelSpec
from harness.data.convert import convert
from harness.data.expression import at_revisions
from harness.data.selection import select
from harness.data.tokenise import Tokeniser, tokenise_demonstrations, tokenise_pairs
from harness.models.chat_templates import ChatTemplate, resolve_template
from harness.models.inspect import inspect_model, open_tokenizer
from harness.models.prompts import encode_chat
from harness.testing import tiny_model
from tests.conftest import shared_revisions

shared = pytest.mark.skipif("HARNESS_SHARED" not in os.environ, reason="HARNESS_SHARED is unset")
LENGTH = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return open_tokenizer(inspect_model(ModelSpec(model=str(tiny_model(tmp_path_factory.mktemp("tiny"))))))


def named(name: str) -> ChatTemplate:
    """A bundled template; a name needs nothing of the model."""
    return resolve_template(ModelInfo(ref="m", path="", name="m", weights_digest="w", tokenizer_digest="t"), name)


VICUNA = named("vicuna")


def row(*turns: str, row_id: str = "r", **answers: Any) -> DatasetRow:
    prompt = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    return DatasetRow(row_id, {"prompt": prompt, **answers})


def pair(*turns: str, chosen: str = "yes it is", rejected: str = "no", row_id: str = "r") -> DatasetRow:
    return row(*turns, row_id=row_id, chosen=chosen, rejected=rejected)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


# --------------------------------------------------------------------------------------------------------------- pairs


def test_prompt_and_answers_are_the_rendered_text(tokenizer: PreTrainedTokenizerBase) -> None:
    done = tokenise_pairs([pair("hello", "well", "and then?")], tokenizer, VICUNA, max_length=LENGTH)
    (one,) = done.rows
    assert text_of(tokenizer, one["prompt_ids"]).endswith("USER: hello ASSISTANT: well</s>USER: and then? ASSISTANT:")
    assert text_of(tokenizer, one["chosen_ids"]) == " yes it is</s>"
    assert text_of(tokenizer, one["rejected_ids"]) == " no</s>"
    for key in ("chosen_ids", "rejected_ids"):
        assert one[key][-1] == tokenizer.eos_token_id
        assert one[key].count(tokenizer.eos_token_id) == 1
    assert one["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert one["prompt_ids"][0] == tokenizer.bos_token_id
    assert done.rejected == {}
    prompt, chosen, rejected = (len(one[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
    assert done.stats == {
        "rows": 1,
        "kept": 1,
        "truncated answers": 0,
        "end-of-sequence added": 0,
        "prompt tokens": prompt,
        "answer tokens": chosen + rejected,
        "longest": prompt + max(chosen, rejected),
    }


@pytest.mark.parametrize("name", ["vicuna", "mistral"])
@pytest.mark.parametrize("turns", [("hello",), ("hi", "well", "and?"), ("",)])
def test_training_sees_the_prompt_that_evaluation_sends(
    name: str, turns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    template = named(name)
    one = pair(*turns)
    trained = tokenise_pairs([one], tokenizer, template, max_length=LENGTH).rows[0]["prompt_ids"]
    before = tokenizer.chat_template
    tokenizer.chat_template = template.source
    try:
        sent, _ = encode_chat(tokenizer, one.data["prompt"])
        library = tokenizer.apply_chat_template(
            one.data["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
    finally:
        tokenizer.chat_template = before
    assert trained == sent == library


def test_a_prompt_longer_than_the_context_is_dropped_and_a_long_answer_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    long = pair("word " * 300, row_id="long")
    wordy = pair("hello", chosen="much " * 300, row_id="wordy")
    done = tokenise_pairs([long, wordy, pair("hello")], tokenizer, VICUNA, max_length=LENGTH)
    assert [one["id"] for one in done.rows] == ["wordy", "r"]
    assert done.rejected == {"prompt longer than the context (400 tokens)": 1}
    assert done.stats["truncated answers"] == 1
    cut = done.rows[0]
    assert len(cut["prompt_ids"]) + len(cut["chosen_ids"]) == LENGTH == done.stats["longest"]
    assert cut["chosen_ids"][-1] != tokenizer.eos_token_id
    assert cut["rejected_ids"][-1] == tokenizer.eos_token_id


def test_an_answer_that_just_fits_is_whole_and_one_token_less_cuts_it(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = tokenise_pairs([pair("hello")], tokenizer, VICUNA, max_length=LENGTH).stats["longest"]
    assert tokenise_pairs([pair("hello")], tokenizer, VICUNA, max_length=whole).stats["truncated answers"] == 0
    assert tokenise_pairs([pair("hello")], tokenizer, VICUNA, max_length=whole - 1).stats["truncated answers"] == 1


def test_a_prompt_needs_room_for_one_token_of_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    one = row("hello", completion="well")
    prompt = len(tokenise_demonstrations([one], tokenizer, VICUNA, max_length=LENGTH).rows[0]["prompt_ids"])
    (kept,) = tokenise_demonstrations([one], tokenizer, VICUNA, max_length=prompt + 1).rows
    assert len(kept["completion_ids"]) == 1
    assert kept["labels_mask"] == [0] * prompt + [1]
    with pytest.raises(UserError, match="prompt longer than the context"):
        tokenise_demonstrations([one], tokenizer, VICUNA, max_length=prompt)


def test_answers_that_differ_only_beyond_the_cut_are_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    same = pair("hello", chosen="much " * 300 + "a", rejected="much " * 300 + "b")
    done = tokenise_pairs([same, pair("hello")], tokenizer, VICUNA, max_length=LENGTH)
    assert done.rejected == {"chosen and rejected are equal once tokenised and cut": 1}


@pytest.mark.parametrize("text", ["an </s> within", "<s>"])
@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_text_that_holds_a_special_token_is_dropped(text: str, where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    bad = pair(text) if where == "prompt" else pair("hello", **{where: text})
    done = tokenise_pairs([bad, pair("hello")], tokenizer, VICUNA, max_length=LENGTH)
    assert done.rejected == {"its text holds a special token of the tokenizer": 1}


def test_a_prompt_whose_tokens_change_under_the_answer_is_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    """`e` + `r` becomes one token: the prompt on its own would end in a token that training never sees."""
    glued = ChatTemplate(
        "glued",
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}",
    )
    merged = tokenizer.tokenize("other")
    assert len(merged) < len(tokenizer.tokenize("othe")) + len(tokenizer.tokenize("r"))
    bad = row("othe", completion="r", row_id="bad")
    good = row("the other.", completion=" Yes", row_id="good")
    done = tokenise_demonstrations([bad, good], tokenizer, glued, max_length=LENGTH)
    assert [one["id"] for one in done.rows] == ["good"]
    assert done.rejected == {"the prompt's tokens change when the answer follows": 1}


def test_rows_that_the_template_refuses_are_counted_and_the_others_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    bad = DatasetRow("bad", {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"})
    done = tokenise_pairs([pair("hello"), bad, pair("hi", row_id="s")], tokenizer, VICUNA, max_length=LENGTH)
    assert [one["id"] for one in done.rows] == ["r", "s"]
    (reason,) = done.rejected
    assert reason.startswith("the chat template refuses the conversation: turns must alternate")


def test_templates_that_cannot_be_used_are_errors(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="chat template broken:1"):
        tokenise_pairs([pair("hello")], tokenizer, ChatTemplate("broken", "{% if %}"), max_length=LENGTH)
    twice = ChatTemplate("twice", "{{ bos_token }}" + VICUNA.source)
    with pytest.raises(UserError, match=r"chat template twice, row r: the prompt starts with two BOS tokens"):
        tokenise_pairs([pair("hello")], tokenizer, twice, max_length=LENGTH)
    with pytest.raises(UserError) as none:
        tokenise_pairs([pair("word " * 500)], tokenizer, VICUNA, max_length=LENGTH)
    assert "no row is left once tokenised: prompt longer than the context (400 tokens): 1" in str(none.value)
    with pytest.raises(UserError, match="hold no prompt and answer"):
        tokenise_pairs([pair("hello")], tokenizer, VICUNA, max_length=1)
    with pytest.raises(UserError, match="whose log-probabilities cancel"):
        tokenise_pairs([pair("hello")], tokenizer, VICUNA, max_length=LENGTH, loss_on="all_answers")
    with pytest.raises(UserError, match="Known: last, all_answers, everything"):
        tokenise_demonstrations([], tokenizer, VICUNA, max_length=LENGTH, loss_on="some")  # type: ignore[arg-type]


def test_eos_is_added_where_the_template_writes_none(tokenizer: PreTrainedTokenizerBase) -> None:
    endless = ChatTemplate("endless", VICUNA.source.replace(" + eos_token", ""))
    done = tokenise_pairs([pair("hello")], tokenizer, endless, max_length=LENGTH)
    assert text_of(tokenizer, done.rows[0]["chosen_ids"]) == " yes it is</s>"
    assert done.stats["end-of-sequence added"] == 2
    assert any("writes no end-of-sequence token after an answer" in note for note in done.notes)


def test_what_follows_the_token_that_ends_the_answer_is_not_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    feeding = ChatTemplate("feeding", VICUNA.source.replace(" + eos_token", " + eos_token + '\\n'"))
    done = tokenise_pairs([pair("hello")], tokenizer, feeding, max_length=LENGTH)
    assert text_of(tokenizer, done.rows[0]["chosen_ids"]) == " yes it is</s>"
    assert done.stats["end-of-sequence added"] == 0


def test_a_template_without_bos_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = ChatTemplate("bare", VICUNA.source.replace("{{- bos_token }}", ""))
    done = tokenise_pairs([pair("hello")], tokenizer, bare, max_length=LENGTH)
    adds = tokenizer("").input_ids == [tokenizer.bos_token_id]
    said = [note for note in done.notes if "writes no BOS, which the tokenizer adds to raw text" in note]
    assert adds
    assert len(said) == 1
    assert tokenise_pairs([pair("hello")], tokenizer, VICUNA, max_length=LENGTH).notes == []


# ------------------------------------------------------------------------------------------------------ demonstrations


def carried(tokenizer: PreTrainedTokenizerBase, done: dict[str, Any]) -> list[str]:
    """Text of each run of tokens that carries loss."""
    ids, mask = done["prompt_ids"] + done["completion_ids"], done["labels_mask"]
    assert len(ids) == len(mask)
    assert set(mask) <= {0, 1}
    runs: list[list[int]] = []
    for index, (token, carries) in enumerate(zip(ids, mask, strict=True)):
        if carries:
            if index == 0 or not mask[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return [text_of(tokenizer, run) for run in runs]


def test_loss_masks(tokenizer: PreTrainedTokenizerBase) -> None:
    one = row("hello", "well", "and then?", "so so", "why?", completion="because")

    def runs(loss_on: Any) -> list[str]:
        done = tokenise_demonstrations([one], tokenizer, VICUNA, max_length=LENGTH, loss_on=loss_on)
        return carried(tokenizer, done.rows[0])

    assert runs("last") == [" because</s>"]
    assert runs("all_answers") == [" well</s>", " so so</s>", " because</s>"]
    (whole,) = runs("everything")
    opened = VICUNA.render([*one.data["prompt"], {"role": "assistant", "content": "because"}], bos="<s>")
    assert whole == opened


def test_ratings_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    rated = row("hello", completion="well", ratings={"helpful": 0.5})
    tokeniser = Tokeniser(tokenizer, VICUNA, max_length=LENGTH, schema="rated")
    assert tokeniser.keep([rated]) == {"r"}
    assert tokeniser.finish().rows[0]["ratings"] == {"helpful": 0.5}


class Marked(TrainingRow):
    """An answer with a mark before the prompt, and a weight that its trainer wants."""

    answer: str
    weight: float
    hidden: str = ""
    columns = ("weight",)

    def render(self) -> dict[str, Any]:
        return {"prompt": f"[good] {self.prompt}", "completion": self.answer}


def test_own_rows_are_rendered_and_their_columns_stand_beside_the_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    own = DatasetRow("r", {"prompt": "hello", "answer": "well", "weight": 0.25, "hidden": "not named"})
    tokeniser = Tokeniser(tokenizer, VICUNA, max_length=LENGTH, schema=Marked)
    tokeniser.keep([own])
    plain = tokenise_demonstrations([row("[good] hello", completion="well")], tokenizer, VICUNA, max_length=LENGTH)
    assert tokeniser.finish().rows == [{**plain.rows[0], "weight": 0.25}]


class Two(Marked):
    """The same rows as pairs, by the default rendering."""

    chosen: str = "yes"
    rejected: str = "no"
    form = "pairs"
    columns = ("weight", "hidden")

    def render(self) -> Mapping[str, Any]:
        return TrainingRow.render(self)


def test_own_rows_can_be_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    own = DatasetRow("r", Two(prompt="hello", answer="", weight=1.0).model_dump())
    tokeniser = Tokeniser(tokenizer, VICUNA, max_length=LENGTH, schema=Two)
    tokeniser.keep([own])
    plain = tokenise_pairs([row("hello", chosen="yes", rejected="no")], tokenizer, VICUNA, max_length=LENGTH)
    assert tokeniser.finish().rows == [{**plain.rows[0], "weight": 1.0, "hidden": ""}]


class Mute(Marked):
    def render(self) -> dict[str, Any]:
        return {"prompt": self.prompt}


def test_rows_that_render_to_nothing_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    own = DatasetRow("r7", {"prompt": "hello", "answer": "well", "weight": 0.25})
    with pytest.raises(UserError) as caught:
        Tokeniser(tokenizer, VICUNA, max_length=LENGTH, schema=Mute).keep([own])
    assert str(caught.value) == (
        "rows Mute: `render` of row r7 returned none of 'demonstrations': there is no 'completion'\n"
        "  Return prompt, completion."
    )


# ------------------------------------------------------------------------------------------------------------ real rows


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[PreTrainedTokenizerBase, list[DatasetRow]]:
    """tiny-instruct's tokenizer, and the first 500 pairs of the real HH-RLHF."""
    root = Path(os.environ["HARNESS_SHARED"])
    monkeypatch.setenv("HF_HUB_CACHE", str(root / "data" / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    registry = load_plugins()
    expression = at_revisions("hh-rlhf:harmless+helpful", registry, shared_revisions())
    rows = select(expression, schema="pairs", registry=registry, samples=500).train
    return open_tokenizer(inspect_model(ModelSpec(model=str(root / "models" / "tiny-instruct")))), rows


@shared
@pytest.mark.parametrize("name", ["vicuna", "mistral"])
def test_500_real_pairs(name: str, real: tuple[PreTrainedTokenizerBase, list[DatasetRow]]) -> None:
    """Each property against the library's own apply_chat_template, row by row; none is rejected."""
    tokenizer, rows = real
    template = named(name)
    done = tokenise_pairs(rows, tokenizer, template, max_length=2048)
    assert done.rejected == {}
    assert len(done.rows) == 500
    tokenizer.chat_template = template.source
    for one, source in zip(done.rows, rows, strict=True):
        assert one["id"] == source.id
        prompt = list(source.data["prompt"])
        assert encode_chat(tokenizer, prompt)[0] == one["prompt_ids"]
        for key in ("chosen", "rejected"):
            chat = [*prompt, {"role": "assistant", "content": source.data[key]}]
            whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            assert one["prompt_ids"] + one[f"{key}_ids"] == whole
            assert whole.count(tokenizer.bos_token_id) == 1
            assert one[f"{key}_ids"][-1] == tokenizer.eos_token_id
            assert one[f"{key}_ids"].count(tokenizer.eos_token_id) == 1


@shared
def test_masks_of_real_rows_are_those_of_the_templates_own_markers(
    real: tuple[PreTrainedTokenizerBase, list[DatasetRow]],
) -> None:
    """tiny-instruct's template marks answers for transformers; its marks begin after the space before an answer."""
    tokenizer, rows = real
    template = ChatTemplate("model", str(tokenizer.chat_template))
    shown = list(convert(rows[:60], "pairs", "demonstrations", load_plugins()))
    done = tokenise_demonstrations(shown, tokenizer, template, max_length=2048, loss_on="all_answers")
    assert len(done.rows) == 60
    for one, source in zip(done.rows, shown, strict=True):
        chat = [*source.data["prompt"], {"role": "assistant", "content": source.data["completion"]}]
        marked = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert one["prompt_ids"] + one["completion_ids"] == marked["input_ids"]
        assert one["labels_mask"] == marked["assistant_masks"]
