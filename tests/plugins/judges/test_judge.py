"""The judge: against a real HTTP server in this process, and in an engine, with replies known by hand."""

from __future__ import annotations

import functools
import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness import StepError, UserError
from harness.steps.journal import read_rows
from harness_plugins.judges.judge import Judge, JudgeOptions, check_judge, judge_identity, judge_label
from harness_plugins.judges.words import Judged, Question, Reply, Unparsable

TESTS = Path(__file__).parents[2]
sys.path.insert(0, str(TESTS))
fake: ModuleType = importlib.import_module("judge_server")
completion, first_token = fake.completion, fake.first_token
KEY = "sk-not-for-anyone-42"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake.judge_server() as server:
        yield server


def options(url: str, **more: Any) -> JudgeOptions:
    quick = {"backoff": 0.001, "max_wait": 0.01, "http_retries": 2, "timeout": 5.0}
    return JudgeOptions(model=url, **{**quick, **more})


def question(text: str, **more: Any) -> Question:
    return Question(({"role": "user", "content": text},), **more)


def text_of(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def yes_or_no(reply: Reply) -> bool:
    if reply.finish == "length":
        raise Unparsable("cut off")
    if reply.text not in ("yes", "no"):
        raise Unparsable(f"neither yes nor no: {reply.text}")
    return reply.text == "yes"


def ask(judge: Judge, *texts: str) -> list[Judged[bool]]:
    try:
        return judge.ask([question(text) for text in texts], yes_or_no)
    finally:
        judge.close()


# ------------------------------------------------------------------------------------------------ replies and retries


def test_values_come_in_the_order_of_the_questions_and_equal_questions_are_asked_once(judge: Any) -> None:
    judge.say = lambda body, attempt: "yes" if text_of(body) == "good?" else "no"
    asker = Judge(options(judge.url), "test")
    done: list[int] = []
    found = asker.ask([question(t) for t in ("good?", "bad?", "good?", "good?")], yes_or_no, done.append)
    assert [one.value for one in found] == [True, False, True, True]
    assert len(judge.asked) == 2
    assert sum(done) == 4
    assert (asker.usage.calls, asker.usage.prompt_tokens, asker.usage.reply_tokens) == (2, 20, 4)


def test_progress_comes_with_the_replies_and_stored_ones_apart(judge: Any, tmp_path: Path) -> None:
    """The stored question is asked twice; of the others one is unreadable and settled by its last attempt."""
    judge.say = lambda body, attempt: "maybe" if text_of(body) == "unclear" else "yes"
    ask(Judge(options(judge.url, retries=1), "test", tmp_path), "known")
    now: list[int] = []
    before: list[int] = []
    asking = Judge(options(judge.url, retries=1), "test", tmp_path)
    texts = ("known", "known", "new", "other", "unclear")
    found = asking.ask([question(text) for text in texts], yes_or_no, now.append, before.append)
    asking.close()
    assert [one.value for one in found] == [True, True, True, True, None]
    assert sum(before) == 2 and sum(now) == 3 and len([n for n in now if n]) > 1


def test_first_attempt_is_greedy_later_ones_are_sampled_with_other_seeds(judge: Any) -> None:
    judge.say = lambda body, attempt: "yes" if body.get("seed") == 12 else "perhaps"
    found = ask(Judge(options(judge.url, seed=10, retry_temperature=0.6), "test"), "good?")
    assert (found[0].value, found[0].attempts) == (True, 3)
    sent = [(body["temperature"], body.get("seed")) for body in judge.asked]
    assert sent == [(0.0, None), (0.6, 11), (0.6, 12)]


def test_nonsense_ends_unscored_after_every_retry(judge: Any) -> None:
    judge.say = lambda body, attempt: "yes" if text_of(body) == "clear" else "perhaps"
    asker = Judge(options(judge.url, retries=5), "test")
    clear, dim = ask(asker, "clear", "dim")
    assert clear.value is True and dim.value is None
    assert dim.reason == "neither yes nor no: perhaps (6 attempts)"
    assert not dim.again
    assert len(judge.asked) == 1 + 6
    assert (asker.usage.unparsable, asker.usage.failed) == (1, 0)


def test_a_reply_that_is_cut_off_is_asked_for_again(judge: Any) -> None:
    judge.say = lambda body, attempt: completion("yes", finish="length") if body["temperature"] == 0 else "yes"
    assert ask(Judge(options(judge.url), "test"), "good?")[0].attempts == 2


def test_repeat_asks_anew(judge: Any) -> None:
    judge.say = lambda body, attempt: "yes"
    asker = Judge(options(judge.url), "test")
    asker.ask([question("good?"), question("good?", repeat=1)], yes_or_no)
    assert len(judge.asked) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(judge: Any, status: int) -> None:
    judge.say = lambda body, attempt: "yes" if attempt > 1 else (status, {"error": {"message": "busy"}})
    assert ask(Judge(options(judge.url), "test"), "good?")[0].value is True
    assert len(judge.asked) == 2


def test_a_server_that_stays_in_trouble_leaves_the_item_unscored_and_the_others_judged(
    judge: Any, tmp_path: Path
) -> None:
    judge.say = lambda body, attempt: (500, {"error": {"message": "down"}}) if text_of(body) == "bad" else "yes"
    found = ask(Judge(options(judge.url), "test", tmp_path), "good", "bad")
    assert found[0].value is True
    assert found[1].value is None and found[1].again
    assert found[1].reason == "the judge did not reply: HTTP 500: down (3 attempts)"
    assert len(judge.asked) == 1 + 3
    # The call that failed is made again, the other is not.
    judge.say = lambda body, attempt: "no"
    again = ask(Judge(options(judge.url), "test", tmp_path), "good", "bad")
    assert [one.value for one in again] == [True, False]
    assert len(judge.asked) == 4 + 1


def test_a_silent_server_leaves_the_item_unscored(judge: Any) -> None:
    answered = threading.Event()
    judge.say = lambda body, attempt: (text_of(body) == "good?" and answered.wait(5) and "yes") or "yes"
    found = ask(Judge(options(judge.url, timeout=0.5, http_retries=1), "test"), "good?", "bad?")
    answered.set()
    assert found[0].reason == "the judge did not reply: no answer within 0.5 s (2 attempts)"
    assert found[0].again


@pytest.mark.parametrize(
    ("said", "reason", "again"),
    [
        ({"choices": []}, "the server's answer has no choices", True),
        ({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, "has no text (finish_reason", True),
        # These would end in the same way another time.
        (completion("", finish="content_filter"), "withheld the judge's reply (content_filter)", False),
        ((400, {"error": {"message": "too long"}}), "HTTP 400: too long", False),
    ],
)
def test_no_reply_is_an_unscored_item(judge: Any, said: Any, reason: str, again: bool) -> None:
    judge.say = lambda body, attempt: said if text_of(body) == "good?" else "yes"
    found, other = ask(Judge(options(judge.url), "test"), "good?", "bad?")
    assert found.value is None and found.reason is not None and reason in found.reason
    assert found.again is again
    assert other.value is True


def test_a_judge_that_replies_to_nothing_fails_the_step_and_is_asked_again(judge: Any, tmp_path: Path) -> None:
    judge.say = lambda body, attempt: (500, {"error": {"message": "down"}})
    with pytest.raises(StepError) as caught:
        ask(Judge(options(judge.url), "scorer s", tmp_path), "a", "b", "b")
    why = "none of 2 questions got a reply, most often because: the judge did not reply: HTTP 500: down (3 attempts)"
    assert str(caught.value) == f"scorer s: {why}\n  The same command asks again."
    judge.say = lambda body, attempt: "yes"
    assert [one.value for one in ask(Judge(options(judge.url), "scorer s", tmp_path), "a", "b", "b")] == [True] * 3


def test_a_reply_of_another_model_is_none(judge: Any) -> None:
    names = {"good?": "stub-judge", "bad?": "other"}
    judge.say = lambda body, attempt: {**completion("yes"), "model": names[text_of(body)]}
    good, bad = ask(Judge(options(judge.url), "test"), "good?", "bad?")
    assert good.value is True and bad.again
    seen = "the judge did not reply: 'stub-judge' was asked and 'other' answered"
    assert bad.reason == f"{seen} (if they are the same, set answers_as of this scorer to the latter)"
    assert ask(Judge(options(judge.url, answers_as="other"), "test"), "bad?")[0].value is True


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.7])
def test_a_log_probability_that_is_none_leaves_the_item_unscored(judge: Any, tmp_path: Path, value: float) -> None:
    judge.say = lambda body, attempt: first_token({"m": value if text_of(body) == "bad?" else -0.5, "M": -1.0})
    asked = [question(text, alternatives=("m", "M")) for text in ("good?", "bad?")]
    good, bad = Judge(options(judge.url), "test", tmp_path).ask(asked, lambda reply: dict(reply.logprobs or {}))
    assert good.value == {"m": -0.5, "M": -1.0}
    assert bad.reason == f"the judge did not reply: the server gave {value} as a log-probability" and bad.again


def test_credentials_are_refused_and_not_shown(judge: Any) -> None:
    for address in ("http://user:hunter2xyz@host/v1", f"{judge.url}?api_key=hunter2xyz"):
        with pytest.raises(UserError, match="test, model: the address holds a user, a password or a query") as caught:
            check_judge(options(address), "test")
        assert "hunter2xyz" not in str(caught.value) and "export OPENAI_API_KEY" in caught.value.fix
    with pytest.raises(UserError, match="test, api_key_env: takes the name of an environment variable") as caught:
        check_judge(options(judge.url, api_key_env="sk-hunter2xyz"), "test")
    assert "hunter2xyz" not in str(caught.value)


def test_a_judge_that_says_the_key_again_is_not_quoted(
    judge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge.say = lambda body, attempt: f"yes, Bearer {KEY}" if text_of(body) == "good?" else (400, {"error": KEY})
    good, bad = ask(Judge(options(judge.url, retries=0), "test", tmp_path), "good?", "bad?")
    assert good.reason == "neither yes nor no: yes, Bearer [secret]"
    assert bad.reason == "the judge did not reply: HTTP 400: [secret]"
    (journal,) = tmp_path.glob("*.jsonl.gz")
    assert KEY not in str(read_rows(journal))


@pytest.mark.parametrize("text", ["", "\ud800 half a pair", "\x00\u202e", "문" * 100_000])
def test_any_text_can_be_asked(judge: Any, tmp_path: Path, text: str) -> None:
    judge.say = lambda body, attempt: "yes"
    for _ in range(2):
        assert ask(Judge(options(judge.url), "test", tmp_path), text)[0].value is True
    assert [text_of(body) for body in judge.asked] == [text.replace("\ud800", "?")]


def test_a_server_that_wants_other_words_gets_them(judge: Any) -> None:
    def say(body: dict[str, Any], attempt: int) -> Any:
        if "max_tokens" in body:
            return 400, {"error": {"message": "use 'max_completion_tokens' instead"}}
        if "temperature" in body:
            return 400, {"error": {"message": "'temperature' does not support 0.0"}}
        return "yes"

    judge.say = say
    asker = Judge(options(judge.url), "test")
    assert ask(asker, "good?")[0].value is True
    assert asker.facts["not sent, as the server refuses it"] == ["temperature"]
    assert judge.asked[-1]["max_completion_tokens"] == 1024


# ---------------------------------------------------------------------------------------------------- journal and cost


def test_another_judge_and_other_decoding_are_other_questions(judge: Any, tmp_path: Path) -> None:
    judge.say = lambda body, attempt: "yes"
    for more in ({}, {}, {"max_new_tokens": 9}, {"served_model": "stub-judge"}):
        ask(Judge(options(judge.url, **more), "test", tmp_path), "good?")
    # The third alone is new: the server's only model is the one that is named in the fourth.
    assert len(judge.asked) == 2


def test_unreadable_replies_are_not_paid_for_twice(judge: Any, tmp_path: Path) -> None:
    judge.say = lambda body, attempt: "perhaps"
    first = ask(Judge(options(judge.url, retries=2), "test", tmp_path), "good?")
    second = ask(Judge(options(judge.url, retries=2), "test", tmp_path), "good?")
    assert first == second and len(judge.asked) == 3


def test_the_journal_holds_no_key(judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge.key = KEY
    judge.say = lambda body, attempt: "yes"
    assert ask(Judge(options(judge.url), "test", tmp_path), "good?")[0].value is True
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("stub-judge-")
    assert KEY not in str(read_rows(file))


PRICES = {"price_input": 10_000.0, "price_output": 100_000.0, "concurrency": 1, "max_new_tokens": 2}
"""Every reply has 10 prompt tokens and 2 of its own: 10 x 0.01 + 2 x 0.1 = 0.30 USD. A question of 4 letters may have
4 + 16 prompt tokens: before it is asked, 20 x 0.01 + 2 x 0.1 = 0.40 USD must be left."""


def test_the_limit_stops_before_it_is_passed_and_a_higher_one_goes_on(judge: Any, tmp_path: Path) -> None:
    judge.say = lambda body, attempt: "yes"
    texts = [f"q{i:03}" for i in range(10)]
    limited = Judge(options(judge.url, **PRICES, max_cost=1.25), "scorer x", tmp_path)
    with pytest.raises(StepError) as stopped:
        ask(limited, *texts)
    # 0, 0.3 and 0.6 leave 0.4 and more; 0.9 leaves 0.35.
    assert len(judge.asked) == 3
    assert limited.spent == pytest.approx(0.9)
    assert str(stopped.value) == (
        "scorer x, max_cost: judging has cost 0.9000 USD in this run, and the next question could go beyond 1.25 USD; "
        "7 are not asked\n  What is judged is kept: raise max_cost and run the same command again to go on."
    )
    with pytest.raises(StepError, match="7 are not asked"):
        ask(Judge(options(judge.url, **PRICES, max_cost=1.25), "scorer x", tmp_path), *texts)
    assert len(judge.asked) == 3
    more = Judge(options(judge.url, **PRICES, max_cost=4.0), "scorer x", tmp_path)
    assert [one.value for one in ask(more, *texts)] == [True] * 10
    assert [text_of(body) for body in judge.asked] == texts
    assert more.spent == pytest.approx(3.0)
    assert (more.usage.calls, more.usage.reused) == (7, 3)


def test_calls_in_flight_count_at_their_greatest_price(judge: Any) -> None:
    judge.say = lambda body, attempt: "yes"
    many = Judge(options(judge.url, **{**PRICES, "concurrency": 8}, max_cost=1.25), "scorer x")
    with pytest.raises(StepError):
        ask(many, *[f"q{i:03}" for i in range(20)])
    assert many.spent <= 1.25
    assert len(judge.asked) >= 3


def test_tokens_that_a_server_does_not_count_are_bounded(judge: Any) -> None:
    judge.say = lambda body, attempt: completion("yes", usage=None)
    asker = Judge(options(judge.url, price_input=1_000_000.0), "test")
    ask(asker, "good")
    # 4 bytes + 16 of a turn; 3 bytes + the end.
    assert (asker.usage.prompt_tokens, asker.usage.reply_tokens, asker.usage.estimated) == (20, 4, 1)
    assert "20.0000 USD, 1 replies without token counts" in str(asker.usage)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from harness_plugins.judges.judge import Judge, JudgeOptions
from harness_plugins.judges.words import Question
judge = Judge(JudgeOptions(model={url!r}, concurrency=2), "test", Path({folder!r}))
judge.ask([Question(({{"role": "user", "content": f"q{{i}}"}},)) for i in range(30)], lambda reply: reply.text)
"""


def test_killed_in_the_middle_asks_only_what_is_missing(judge: Any, tmp_path: Path) -> None:
    tenth = threading.Event()

    def slow(body: dict[str, Any], attempt: int) -> str:
        if len(judge.asked) > 10:
            tenth.set()
            time.sleep(60)
        return "yes"

    judge.say = slow
    script = KILLED.format(tests=str(TESTS), url=judge.url, folder=str(tmp_path))
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    assert tenth.wait(60)
    (file,) = wait_for_replies(tmp_path, 9)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = len(read_rows(file))
    before = len(judge.asked)
    judge.say = lambda body, attempt: "no"
    asker = Judge(options(judge.url), "test", tmp_path)
    found = asker.ask([question(f"q{i}") for i in range(30)], yes_or_no)
    assert len(judge.asked) - before == 30 - kept == asker.usage.calls
    assert sum(one.value is True for one in found) == kept
    assert all(one.reason is None for one in found)


def wait_for_replies(folder: Path, count: int) -> list[Path]:
    """Until so many replies are in the journal: they get there when they come."""
    for _ in range(1000):
        files = list(folder.iterdir())
        if files and len(read_rows(files[0])) >= count:
            return files
        time.sleep(0.01)
    raise AssertionError(f"fewer than {count} replies were kept")


def test_a_torn_journal_costs_only_what_was_torn(judge: Any, tmp_path: Path) -> None:
    judge.say = lambda body, attempt: "yes"
    ask(Judge(options(judge.url, concurrency=1), "test", tmp_path), "a", "b", "c")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert [one.value for one in ask(Judge(options(judge.url), "test", tmp_path), "a", "b", "c")] == [True] * 3
    assert [text_of(body) for body in judge.asked] == ["a", "b", "c", "c"]


def test_two_scorers_of_a_run_share_replies_and_limit(judge: Any, tmp_path: Path) -> None:
    judge.say = lambda body, attempt: "yes"
    one = Judge(options(judge.url, **PRICES, max_cost=1.25), "scorer one", tmp_path)
    two = Judge(options(judge.url, **PRICES, max_cost=1.25), "scorer two", tmp_path)
    ask(one, "aaaa", "bbbb")
    # 0.6 are spent: one more.
    with pytest.raises(StepError, match=r"scorer two, max_cost: judging has cost 0\.9000 USD"):
        ask(two, "aaaa", "bbbb", "cccc", "dddd")
    assert [text_of(body) for body in judge.asked] == ["aaaa", "bbbb", "cccc"]


# --------------------------------------------------------------------------------------------------- log-probabilities


def logprobs(reply: Reply) -> dict[str, float]:
    return dict(reply.logprobs or {})


def test_log_probabilities_of_a_server(judge: Any) -> None:
    judge.say = lambda body, attempt: first_token({"m": -0.25, " M": -1.5, "x": -4.0, "M.": -9.0})
    asker = Judge(options(judge.url, top_logprobs=4), "test")
    (found,) = asker.ask([question("which?", alternatives=("m", "M", "k"))], logprobs)
    # " M" is M with a space; k is not among the tokens.
    assert found.value == {"m": -0.25, "M": -1.5}
    assert (judge.asked[0]["logprobs"], judge.asked[0]["top_logprobs"], judge.asked[0]["max_tokens"]) == (True, 4, 1)


def test_log_probabilities_are_asked_for_once(judge: Any) -> None:
    def parse(reply: Reply) -> float:
        raise Unparsable("neither m nor M among the first tokens")

    judge.say = lambda body, attempt: first_token({"x": -1.0})
    (found,) = Judge(options(judge.url), "test").ask([question("which?", alternatives=("m", "M"))], parse)
    assert found.reason == "neither m nor M among the first tokens"
    assert len(judge.asked) == 1


@pytest.mark.parametrize("said", [completion("m"), (400, {"error": {"message": "logprobs are not supported"}})])
def test_a_server_without_log_probabilities(judge: Any, said: Any) -> None:
    judge.say = lambda body, attempt: said
    with pytest.raises(UserError) as refused:
        Judge(options(judge.url), "scorer x").ask([question("which?", alternatives=("m", "M"))], logprobs)
    assert refused.value.where == f"scorer x, {judge.url}"
    assert "the judge must be asked for log-probabilities, and the server gives none" in refused.value.what
    assert "a local judge" in refused.value.fix


def test_one_answer_without_log_probabilities_is_one_item(judge: Any) -> None:
    judge.say = lambda body, attempt: completion("m") if text_of(body) == "bad" else first_token({"m": -1.0})
    asker = Judge(options(judge.url, concurrency=1), "test")
    good, bad = asker.ask([question(t, alternatives=("m", "M")) for t in ("good", "bad")], logprobs)
    assert good.value == {"m": -1.0}
    assert bad.reason == "the judge did not reply: the server left out the log-probabilities"


# --------------------------------------------------------------------------------------------------------- local judge


def opener() -> Any:
    from harness import load_plugins
    from harness.evaluation.engines import open_engine

    return functools.partial(open_engine, load_plugins())


def test_a_local_judge_replies_and_is_not_opened_again(tiny: Path, cache: Path, tmp_path: Path) -> None:
    asked = JudgeOptions(model=str(tiny), engine="transformers", max_new_tokens=4, dtype="float32", retries=0)
    texts = ["Which one?", "What is it?", "Which one?"]
    judge = Judge(asked, "test", tmp_path, opener())
    first = judge.ask([question(text) for text in texts], lambda reply: reply.text)
    judge.close()
    assert first[0] == first[2] and all(one.value is not None for one in first)
    assert judge.usage.calls == 2 and judge.usage.cost == 0.0
    assert judge.facts["judge"] == "tiny"

    def never(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("opened again")

    second = Judge(asked, "test", tmp_path, never).ask([question(text) for text in texts], lambda reply: reply.text)
    assert [one.value for one in second] == [one.value for one in first]


def test_local_log_probabilities_are_those_of_the_forward_pass(tiny: Path, cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = JudgeOptions(model=str(tiny), engine="transformers", dtype="float32")
    judge = Judge(asked, "test", None, opener())
    (found,) = judge.ask([question("Which one?", alternatives=("m", "M"))], logprobs)
    judge.close()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    prompt = tokenizer("USER: Which one?\nASSISTANT:", add_special_tokens=False).input_ids
    for letter in ("m", "M"):
        more = tokenizer("USER: Which one?\nASSISTANT:" + letter, add_special_tokens=False).input_ids[len(prompt) :]
        with torch.inference_mode():
            logits_LV = model(torch.tensor([prompt + more])).logits[0].log_softmax(-1)
        expected = sum(float(logits_LV[len(prompt) - 1 + i, token]) for i, token in enumerate(more))
        assert found.value is not None and math.isclose(found.value[letter], expected, abs_tol=1e-4)


def test_a_question_beyond_the_context_is_an_unscored_item(tiny: Path, cache: Path) -> None:
    judge = Judge(JudgeOptions(model=str(tiny), max_new_tokens=16, retries=0), "test", None, opener())
    long, short = judge.ask([question("word " * 600), question("word")], lambda reply: reply.text)
    judge.close()
    assert short.value is not None
    # The tiny model's context is 512 tokens, of which 16 are for the reply.
    assert long.reason is not None and "the judge's context leaves room for 496" in long.reason
    assert not long.again


# ------------------------------------------------------------------------------------------------------------ messages


def refusal(asked: JudgeOptions, where: str = "scorer x") -> UserError:
    with pytest.raises(UserError) as refused:
        check_judge(asked, where)
    return refused.value


def test_no_judge_is_named() -> None:
    error = refusal(JudgeOptions())
    assert (error.where, error.what) == ("scorer x, model", "no judge is named")
    assert "--set TASK.scorer.model=" in error.fix


def test_no_such_folder(tmp_path: Path) -> None:
    error = refusal(JudgeOptions(model=str(tmp_path / "nothing")))
    assert error.where == f"scorer x, model {tmp_path / 'nothing'}" and error.what == "no such folder"


def test_a_missing_key_is_seen_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    asked = JudgeOptions(model="https://judge.example/v1", api_key_env="JUDGE_KEY")
    error = refusal(asked)
    assert error.where == "scorer x, api_key_env"
    assert error.what == "the environment variable JUDGE_KEY holds no key for https://judge.example/v1"
    assert "Export it" in error.fix
    check_judge(asked.model_copy(update={"api_key_env": ""}), "scorer x")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    check_judge(asked, "scorer x")


def test_a_limit_needs_prices() -> None:
    error = refusal(JudgeOptions(model="http://localhost:1/v1", max_cost=2.5))
    assert (error.where, error.what) == ("scorer x, max_cost", "at most 2.5 USD, and no prices to count them by")
    assert "price_input" in error.fix


def test_a_key_that_is_refused_stops_everything(judge: Any) -> None:
    judge.key = KEY
    with pytest.raises(UserError) as refused:
        ask(Judge(options(judge.url), "scorer x"), "a", "b", "c")
    assert refused.value.where == f"scorer x, {judge.url}"
    assert "OPENAI_API_KEY holds no key; set it, or api_key_env of this scorer." in refused.value.fix


def test_nobody_listens() -> None:
    with pytest.raises(UserError) as refused:
        Judge(options("http://127.0.0.1:9/v1"), "scorer x")
    assert "cannot be reached" in refused.value.what
    fix = (
        "Start it, or mend the judge's address (scorer x, model). With served_model set, it is asked nothing before it"
    )
    assert refused.value.fix == f"{fix} judges."


def test_which_model_of_several(judge: Any) -> None:
    judge.models = ("one", "two")
    with pytest.raises(UserError) as refused:
        Judge(options(judge.url), "scorer x")
    assert refused.value.fix.startswith("Set served_model to its name.")
    assert "it lists one, two" in refused.value.what


def test_a_model_without_a_chat_template(tmp_path: Path, cache: Path) -> None:
    from harness.testing import tiny_model

    base = tiny_model(tmp_path / "base", chat_template=False)
    judge = Judge(JudgeOptions(model=str(base)), "scorer x", None, opener())
    with pytest.raises(UserError, match="has no chat template, and is asked in conversations"):
        ask(judge, "a")


def test_an_engine_that_does_not_exist(tiny: Path, cache: Path) -> None:
    judge = Judge(JudgeOptions(model=str(tiny), engine="transfomers"), "scorer x", None, opener())
    with pytest.raises(UserError) as refused:
        ask(judge, "a")
    assert refused.value.where == "scorer x, engine" and "transformers" in refused.value.fix


def test_identity_is_who_judges_and_how_not_what_it_costs(judge: Any) -> None:
    plain = judge_identity(options(judge.url), "test")
    assert plain["model"] == "stub-judge" and plain["url"] == judge.url
    same = {"price_input": 5.0, "max_cost": 1.0, "concurrency": 3, "api_key_env": "OTHER", "timeout": 1.0}
    assert judge_identity(options(judge.url, **same), "test") == plain
    assert judge_identity(options(judge.url, temperature=0.5), "test") != plain
    signed = judge.url.replace("http://", "http://user:secret@")
    assert judge_identity(options(signed, served_model="stub-judge"), "test") == plain


def test_labels(tiny: Path) -> None:
    assert judge_label(JudgeOptions(model=str(tiny) + "/")) == "tiny"
    assert judge_label(JudgeOptions(model="http://h/v1", served_model="org/gpt-x")) == "gpt-x"


def test_where_a_local_judge_ends_its_replies_is_part_of_it(tiny: Path, cache: Path, tmp_path: Path) -> None:
    from harness_plugins.judges.options import judge_identity

    folder = tmp_path / "judge"
    shutil.copytree(tiny, folder)
    options_ = JudgeOptions(model=str(folder), engine="transformers")
    before = judge_identity(options_, "test")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}', encoding="utf-8")
    assert judge_identity(options_, "test") == {**before, "end_tokens": [1, 7]}
