"""The classifier scorer against transformers called by hand, one pair at a time."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from harness.contracts.scorer import ScoreJob, ScorerContext, ScorerSession
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.core.records import Answer, Output, Sample
from harness.testing import check_scorer
from harness_plugins.scorers.classifier import ClassifierScorer, plan_batches
from harness_plugins.scorers.toxicity import ToxicityScorer

WORDS = ["good", "bad", "kind", "cruel", "the", "a", "is", "you", "are", "it", "and", "not", "very", "so", "we", "they"]
LABELS = ("NEUTRAL", "TOXIC")


def make_checkpoint(folder: Path, *, labels: int = 1, seed: int = 0, pad: bool = True) -> Path:
    """A RoBERTa with random weights and a word-level tokenizer whose pairs look like RoBERTa's."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    padding = {"pad_token": "<pad>"} if pad else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        **padding,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=514,
        pad_token_id=1,
        # Wide, so that logits differ by far more than rounding.
        initializer_range=0.5,
        id2label={i: LABELS[i] for i in range(labels)},
        label2id={LABELS[i]: i for i in range(labels)},
        num_labels=labels,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_logit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("classifier") / "one")


@pytest.fixture(scope="module")
def two_logits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("classifier") / "two", labels=2)


def by_hand(folder: Path, pairs: Sequence[tuple[str, str]], label: int = 0) -> list[float]:
    """The peer: no batch, no padding, nothing sorted."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    logits = []
    for prompt, response in pairs:
        # Lists of one: given two bare texts, transformers takes an empty second one for none at all.
        encoded = tokenizer(
            [prompt], [response], truncation=True, max_length=512, return_token_type_ids=False, return_tensors="pt"
        )
        with torch.no_grad():
            logits.append(model(**encoded).logits[0, label].item())
    return logits


def some_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [(" ".join(rng.choices(WORDS, k=rng.randint(1, 30))), " ".join(rng.choices(WORDS, k=rng.randint(0, 60))))
            for _ in range(count)]  # fmt: skip


def opened(scorer: ClassifierScorer, **options: Any) -> ScorerSession:
    return scorer.open(parse_options(scorer.Config, options, "test"), ScorerContext())


def run(session: ScorerSession, pairs: Sequence[tuple[str, str]], metric: str = "toxicity_reward") -> list[Any]:
    samples = [Sample(str(i), (), prompt=prompt) for i, (prompt, _) in enumerate(pairs)]
    answers = [Answer(str(i), (Output(text=response),)) for i, (_, response) in enumerate(pairs)]
    scores = session.score(samples, answers, ScoreJob())
    return [one.values[metric] for one in scores]


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_equals_transformers_by_hand_however_it_is_batched(one_logit: Path, batch_tokens: int) -> None:
    pairs = [*some_pairs(40), ("you are", "")]
    expected = by_hand(one_logit, pairs)
    assert max(expected) - min(expected) > 0.1
    assert run(opened(ToxicityScorer(), model=str(one_logit), batch_tokens=batch_tokens), pairs) == pytest.approx(
        expected, abs=1e-5
    )


def test_the_order_of_the_samples_does_not_matter(one_logit: Path) -> None:
    pairs = some_pairs(30)
    shuffled = random.Random(3).sample(range(30), 30)
    straight = run(opened(ToxicityScorer(), model=str(one_logit)), pairs)
    mixed = run(opened(ToxicityScorer(), model=str(one_logit)), [pairs[i] for i in shuffled])
    assert mixed == pytest.approx([straight[i] for i in shuffled], abs=1e-5)


def test_long_pairs_are_cut_at_512_tokens(one_logit: Path) -> None:
    rng = random.Random(5)
    long = [(" ".join(rng.choices(WORDS, k=40)), " ".join(rng.choices(WORDS, k=900))) for _ in range(3)]
    expected = by_hand(one_logit, long)
    assert run(opened(ToxicityScorer(), model=str(one_logit)), long) == pytest.approx(expected, abs=1e-5)
    # Four specials and 40 words of prompt leave 468 words of the response; what comes later is not seen.
    cut = [(prompt, " ".join(response.split()[:468])) for prompt, response in long]
    assert by_hand(one_logit, cut) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(AssertionError):
        assert by_hand(one_logit, [(p, " ".join(r.split()[:400])) for p, r in long]) == pytest.approx(
            expected, abs=1e-5
        )


def test_a_tokenizer_without_padding_is_asked_one_by_one(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "no-pad", pad=False)
    pairs = some_pairs(6)
    assert run(opened(ToxicityScorer(), model=str(folder)), pairs) == pytest.approx(by_hand(folder, pairs), abs=1e-5)


def test_the_label_chooses_the_logit(two_logits: Path) -> None:
    pairs = some_pairs(10)
    for label, index in (("TOXIC", 1), (1, 1), ("NEUTRAL", 0)):
        session = opened(ClassifierScorer(), model=str(two_logits), label=label, metric="hate")
        assert run(session, pairs, "hate") == pytest.approx(by_hand(two_logits, pairs, index), abs=1e-5)


def test_toxic_share_counts_the_toxic_side_of_zero(two_logits: Path) -> None:
    pairs = some_pairs(30)
    logits = by_hand(two_logits, pairs, 1)
    negative = opened(ToxicityScorer(), model=str(two_logits), label="TOXIC")
    positive = opened(ToxicityScorer(), model=str(two_logits), label="TOXIC", toxic="positive")
    assert run(negative, pairs, "toxic_share") == [float(x < 0) for x in logits]
    assert run(positive, pairs, "toxic_share") == [float(x > 0) for x in logits]
    assert run(positive, pairs) == pytest.approx([-x for x in logits], abs=1e-5)


def test_an_answer_that_failed_has_no_score_and_progress_counts_all(one_logit: Path) -> None:
    session = opened(ToxicityScorer(), model=str(one_logit), batch_tokens=1)
    seen: list[int] = []
    samples = [Sample(str(i), (), prompt="you are") for i in range(3)]
    answers = [Answer("0", (Output(text="kind"),)), Answer("1", (Output(error="refused"),)), Answer("2", (Output(),))]
    scores = session.score(samples, answers, ScoreJob(progress=seen.append))
    assert scores[1].values == {"toxicity_reward": None, "toxic_share": None} and scores[1].reason == "refused"
    expected = by_hand(one_logit, [("you are", "kind"), ("you are", "")])
    assert [scores[0].values["toxicity_reward"], scores[2].values["toxicity_reward"]] == pytest.approx(
        expected, abs=1e-5
    )
    assert sum(seen) == 3 and len(seen) > 2


def test_an_empty_response_is_not_the_prompt_scored_alone(one_logit: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(one_logit, dtype=torch.float32).eval()
    you, are = 4 + WORDS.index("you"), 4 + WORDS.index("are")
    with torch.no_grad():
        pair = model(input_ids=torch.tensor([[0, you, are, 2, 2, 2]])).logits.item()
        alone = model(input_ids=torch.tensor([[0, you, are, 2]])).logits.item()
    assert abs(pair - alone) > 1e-3
    assert run(opened(ToxicityScorer(), model=str(one_logit)), [("you are", "")]) == pytest.approx([pair], abs=1e-5)


def test_a_session_lets_go_of_its_checkpoint(one_logit: Path) -> None:
    import weakref

    session = opened(ToxicityScorer(), model=str(one_logit))
    held = weakref.ref(session.__dict__["_opened"].model)
    assert run(session, some_pairs(1)) == pytest.approx(by_hand(one_logit, some_pairs(1)), abs=1e-5)
    session.close()
    session.close()
    assert held() is None


def test_the_contract(one_logit: Path) -> None:
    """The last bits of a logit depend on what it is padded with."""
    check_scorer(ToxicityScorer(), options={"model": str(one_logit)}, tolerance=1e-5)


def test_a_logit_that_is_no_number_is_no_score(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.out_proj.bias"] = torch.full((1,), float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    session = opened(ToxicityScorer(), model=str(folder))
    (one,) = session.score([Sample("0", (), prompt="a")], [Answer("0", (Output(text="b"),))], ScoreJob())
    assert one.values == {"toxicity_reward": None, "toxic_share": None}
    assert one.reason == "the classifier returned nan"


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 5000))
def test_batches_hold_every_row_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True)


# ----------------------------------------------------------------------------------------------- identity and mistakes


def test_identity_is_the_weights_and_never_the_path(one_logit: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(one_logit, tmp_path / "elsewhere"))
    scorer = ToxicityScorer()
    options = [parse_options(scorer.Config, {"model": str(m), "device": d}, "t") for m, d in
               ((one_logit, "auto"), (copy, "cpu"))]  # fmt: skip
    here, there = (scorer.identity(o) for o in options)
    assert here == there
    assert str(tmp_path) not in json.dumps(there) and str(one_logit) not in json.dumps(here)
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert scorer.identity(parse_options(scorer.Config, {"model": str(other)}, "t")) != here
    shorter = {"model": str(one_logit), "max_length": 256}
    assert scorer.identity(parse_options(scorer.Config, shorter, "t")) != here


def test_identity_of_a_hub_checkpoint_is_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    identity = ToxicityScorer().identity(ToxicityScorer.Config())
    assert identity["model"] == "nicholasKluge/ToxicityModel"
    assert identity["revision"] == ToxicityScorer.default_revision


def test_a_cached_hub_checkpoint_is_checked_and_scored_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_logit: Path
) -> None:
    commit = "c" * 40
    repository = tmp_path / "models--some--classifier"
    shutil.copytree(one_logit, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scorer, config = ToxicityScorer(), parse_options(ToxicityScorer.Config, {"model": "some/classifier"}, "test")
    scorer.check(config)
    assert scorer.identity(config)["revision"] == commit
    pairs = some_pairs(4)
    assert run(opened(scorer, model="some/classifier"), pairs) == pytest.approx(by_hand(one_logit, pairs), abs=1e-5)


def check(scorer: ClassifierScorer, **options: Any) -> None:
    scorer.check(parse_options(scorer.Config, options, "test"))


def test_offline_without_the_default_names_the_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        check(ToxicityScorer())
    message = str(error.value)
    assert message.startswith("scorer toxicity, model: nicholasKluge/ToxicityModel is not in the hub cache")
    assert "the network is switched off (HF_HUB_OFFLINE)" in message
    assert "--set TASK.scorer.model=PATH" in message
    assert f"`hf download nicholasKluge/ToxicityModel --revision {ToxicityScorer.default_revision}`" in message


def test_the_pinned_revision_belongs_to_the_default_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        check(ToxicityScorer(), model="some/other")
    assert "some/other is not in the hub cache" in str(error.value)
    assert " at revision" not in str(error.value) and "--revision" not in str(error.value)


def test_no_checkpoint_and_no_such_folder(one_logit: Path) -> None:
    with pytest.raises(UserError, match=r"scorer classifier, model: no checkpoint is named\n  Give one: --set TASK"):
        check(ClassifierScorer())
    with pytest.raises(UserError, match=r"no such folder: .*/onee\n  Did you mean .*/one\? Give a folder"):
        check(ToxicityScorer(), model=str(one_logit.parent / "onee"))


def test_several_logits_need_a_label(two_logits: Path) -> None:
    with pytest.raises(UserError, match=r"label: the checkpoint has 2 logits \(0: NEUTRAL, 1: TOXIC\)\n  Set TASK"):
        check(ToxicityScorer(), model=str(two_logits))
    with pytest.raises(UserError, match=r"no label 'RUDE'\n  The checkpoint has: 0: NEUTRAL, 1: TOXIC\."):
        check(ToxicityScorer(), model=str(two_logits), label="RUDE")
    with pytest.raises(UserError, match="no label 2"):
        check(ToxicityScorer(), model=str(two_logits), label=2)
    check(ToxicityScorer(), model=str(two_logits), label="TOXIC")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_pickles_code_and_other_models_are_refused(one_logit: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    pickled = Path(shutil.copytree(one_logit, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"only pickled weights.*\n.*TASK\.scorer\.allow_pickle=true"):
        check(ToxicityScorer(), model=str(pickled))
    pairs = some_pairs(3)
    allowed = opened(ToxicityScorer(), model=str(pickled), allow_pickle=True)
    assert run(allowed, pairs) == pytest.approx(by_hand(one_logit, pairs), abs=1e-5)

    coded = Path(shutil.copytree(one_logit, tmp_path / "coded"))
    edit_config(coded, auto_map={"AutoModelForSequenceClassification": "m.M"})
    with pytest.raises(UserError, match=r"asks to run code.*\n.*TASK\.scorer\.trust_remote_code=true"):
        check(ToxicityScorer(), model=str(coded))

    causal = Path(shutil.copytree(one_logit, tmp_path / "causal"))
    edit_config(causal, architectures=["RobertaForCausalLM"])
    with pytest.raises(UserError, match=r"RobertaForCausalLM is no sequence classifier\n  Give a"):
        check(ToxicityScorer(), model=str(causal))


def test_a_head_without_weights_is_refused_instead_of_drawn_at_random(one_logit: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(one_logit, tmp_path / "headless"))
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("classifier")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack classifier\.dense\.bias.*\n  Give a checkpoint that was"):
        run(opened(ToxicityScorer(), model=str(folder)), [("a", "b")])


# ------------------------------------------------------------------------------------------------------- the real one

SHARED = os.environ.get("HARNESS_SHARED")
shared = pytest.mark.skipif(SHARED is None, reason="HARNESS_SHARED is not set")


@pytest.mark.shared
@shared
def test_real_checkpoint_equals_transformers_by_hand() -> None:
    assert SHARED is not None
    folder = Path(SHARED, "models", "tiny-toxicity")
    with gzip.open(Path(SHARED, "data", "toxicity", "toxicity_labelled.jsonl.gz"), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    chosen = random.Random(7).sample(texts, 32)
    pairs = [*zip(chosen[:16], chosen[16:], strict=True), (chosen[0], ""), ("", chosen[1]), (chosen[2], chosen[3] * 40)]
    check(ToxicityScorer(), model=str(folder))
    session = opened(ToxicityScorer(), model=str(folder), batch_tokens=600)
    assert run(session, pairs) == pytest.approx(by_hand(folder, pairs), abs=1e-5)


@pytest.mark.shared
@shared
def test_real_checkpoint_scores_toxic_text_lower() -> None:
    """The area under the curve is the share of (non-toxic, toxic) pairs in order: Mann-Whitney's U / (m n)."""
    from scipy.stats import mannwhitneyu

    assert SHARED is not None
    with gzip.open(Path(SHARED, "data", "toxicity", "toxicity_labelled.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    chosen = random.Random(0).sample(rows, 400)
    session = opened(ToxicityScorer(), model=str(Path(SHARED, "models", "tiny-toxicity")))
    rewards = run(session, [("", row["text"]) for row in chosen])
    toxic = [reward for reward, row in zip(rewards, chosen, strict=True) if row["label"] == 1]
    other = [reward for reward, row in zip(rewards, chosen, strict=True) if row["label"] == 0]
    assert len(toxic) + len(other) == 400 and min(len(toxic), len(other)) > 50
    assert mannwhitneyu(other, toxic).statistic / (len(other) * len(toxic)) > 0.8
