"""AlpacaEval: a judge compares each answer with a reference's output (Dubois et al., arXiv 2305.14387, 2404.04475).

Which of the two is shown first is drawn per instruction, as the package draws it, and the verdict is turned back.
A pair has a preference between 0 (the reference's output is better) and 1 (the answer is); equal texts are a draw and
not asked about. A pair without a verdict has no score and a reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from harness import (
    SHARE_RESOLUTION,
    Answer,
    HubFiles,
    JudgeCosts,
    JudgedPair,
    LengthControl,
    Metric,
    Sample,
    Score,
    ScoreJob,
    Scorer,
    ScorerContext,
    ScorerSession,
    StoredOutputs,
    UserError,
    Wording,
    file_digest,
    fit_length_control,
    model_files,
    read_alpaca_difficulties,
    read_alpaca_gamed,
    read_outputs,
    wins_by_length,
)
from harness_plugins.judges.judge import Judge
from harness_plugins.judges.options import JudgeOptions, check_judge, judge_identity, judge_label, with_judge
from harness_plugins.judges.words import Judged, Question
from harness_plugins.scorers.alpaca.annotators import harmless, load_annotator, switched

WIN = Metric(name="win_rate", higher_is_better=True, unit="proportion", low=0.0, high=1.0, resolution=SHARE_RESOLUTION)
DISCRETE = WIN.model_copy(update={"name": "discrete_win_rate", "primary": False})
CONTROLLED = WIN.model_copy(update={"name": "length_controlled_win_rate"})
# Less than a character is a matter of rounding.
LENGTH = Metric(name="avg_length", higher_is_better=None, unit="characters", low=0.0, primary=False, resolution=1.0)
_WITHHELD = "length_control_withheld"
ANNOTATIONS = "annotations.json"
"""What a scores step leaves in the package's format: for `harness judge winrate`, or the package itself."""


class AlpacaOptions(JudgeOptions):
    """The judge, how it is asked, and what length control needs."""

    max_new_tokens: int = Field(0, ge=0, description="most tokens of a reply (tokens); 0: as the annotator has it")
    annotator: str = Field(
        "weighted_alpaca_eval_gpt4_turbo",
        description="the alpaca-eval package's judge configuration: its prompt and its parser",
    )
    order: Literal["random", "reference_first", "answer_first"] = Field(
        "random", description="which output is shown first; random: by the run's seed, with 0 as the package draws"
    )
    repeat: int = Field(0, ge=0, description="another number asks every question anew")
    neutralise: bool = Field(True, description="write quotation ends and control tokens in outputs in a harmless way")
    length_control: bool = Field(False, description="report the length-controlled win rate")
    difficulty: str | None = Field(None, description="published instruction_difficulty.csv: length control needs it")
    gamed: str | None = Field(None, description="published df_gamed.csv: regularises the fit as AlpacaEval 2 does")
    baseline: str | None = Field(
        None,
        description="folder of a run or study: answers are compared with those of one of its arms, instead of the data "
        "set's reference",
    )
    baseline_arm: str | None = Field(None, description="its arm, by name; the base, or the only arm, when absent")
    baseline_task: str | None = Field(None, description="task that it was asked; its only one when absent")


@dataclass(frozen=True)
class _Asked:
    """One pair as the judge sees it."""

    instruction: str
    reference: str
    answer: str
    switched: bool
    """Whether the answer is shown first."""
    neutralised: bool


class AlpacaEvalScorer(Scorer["AlpacaEvalScorer.Config"]):
    """Win rate against a reference, by a judge; the row's task carries the judge's name."""

    name = "alpaca_eval"
    summary = "AlpacaEval's win rates against a reference's outputs, by a judge model"

    class Config(AlpacaOptions):
        """The judge, how it is asked, and what length control needs."""

    def __init__(self) -> None:
        self._planned: dict[tuple[str | None, str | None, str | None], str] = {}

    def needs(self, config: Config) -> Literal["engine", "endpoint"]:
        """The judge's server, or an engine that opens it here."""
        return config.need

    def metrics(self, config: Config) -> tuple[Metric, ...]:
        """Proportions of wins (a draw is half a one), and the answers' mean length."""
        controlled = (CONTROLLED,) if config.length_control else ()
        return (WIN, *controlled, DISCRETE, LENGTH)

    def identity(self, config: Config) -> dict[str, Any]:
        """Judge, question, order, and the tables by their content; not what the judging may cost."""
        config = _complete(config)
        asked = config.model_dump(mode="json", include={"order", "repeat", "neutralise", "length_control"})
        tables = {name: path for name in ("difficulty", "gamed") if (path := getattr(config, name)) is not None}
        return {
            "name": self.name,
            "judge": judge_identity(config, self._where),
            "annotator": load_annotator(config.annotator).identity(),
            "tables": {name: file_digest(Path(path).expanduser()) for name, path in tables.items()},
            **asked,
            **({} if config.baseline is None else {"baseline": self._baseline_digest(config)}),
        }

    def judged_by(
        self, options: Mapping[str, Any], judge: Mapping[str, Any] | None, wording: Wording | None, where: str
    ) -> dict[str, Any]:
        """The judge's own options over those of the scorer; the words are the annotator's."""
        return with_judge(options, judge)

    def judge_name(self, config: Any) -> str:
        """The judge's own name; a server that was not given one is asked."""
        return judge_label(config)

    def _baseline_digest(self, config: Config) -> str:
        """Digest of the answers that are compared with; the folder may hold others once they are scored."""
        found = _baseline(config)
        assert found is not None
        self._planned[config.baseline, config.baseline_arm, config.baseline_task] = found.digest
        return found.digest

    def hub_files(self, config: Any) -> tuple[HubFiles, ...]:
        """The judge, where it is opened here."""
        return model_files(config.model, config.revision)

    def check(self, config: Config) -> None:
        """Whether judge and tables are there.

        Raises:
            UserError: no judge, or one that cannot be asked; an unknown annotator; a table that cannot be read.
        """
        load_annotator(config.annotator)
        check_judge(config, self._where)
        for name in ("difficulty", "gamed"):
            if getattr(config, name) is not None and not config.length_control:
                where = f"scorer {self.name}, {name}"
                raise UserError(where, "given without length control", "Set TASK.scorer.length_control=true.")
        for name in ("baseline_arm", "baseline_task"):
            if getattr(config, name) is not None and config.baseline is None:
                what, fix = "is of a run, and none is named", "Set TASK.scorer.baseline to the run's folder."
                raise UserError(f"scorer {self.name}, {name}", what, fix)
        _baseline(config)
        if config.difficulty is not None:
            read_alpaca_difficulties(Path(config.difficulty).expanduser())
        if config.gamed is not None:
            read_alpaca_gamed(Path(config.gamed).expanduser())

    @property
    def _where(self) -> str:
        return f"scorer {self.name}"

    def open(self, config: Config, context: ScorerContext) -> ScorerSession:
        """The judge, who is opened or called when the first question is put that nobody has answered yet."""
        baseline = _baseline(config)
        planned = self._planned.get((config.baseline, config.baseline_arm, config.baseline_task))
        if baseline is not None and planned is not None and planned != baseline.digest:
            what = f"the answers of arm {baseline.arm} in {config.baseline} have changed since this was planned"
            raise UserError(f"{self._where}, baseline", what, "Run the same command again.")
        judge = Judge(_complete(config), self._where, context.shared, context.open_engine)
        return AlpacaSession(judge, config, self.metrics(config), context.seed, baseline)


class AlpacaSession(ScorerSession):
    """A judge, and the pairs that it compares."""

    def __init__(
        self,
        judge: Judge,
        config: AlpacaOptions,
        metrics: tuple[Metric, ...],
        seed: int,
        baseline: StoredOutputs | None = None,
    ) -> None:
        """``baseline``: the answers that are compared with, in place of the data set's reference."""
        self._judge, self._config, self._metrics, self._seed = judge, config, metrics, seed
        self._baseline = baseline
        self._by_length: tuple[str, ...] = ()
        self._annotator = load_annotator(config.annotator)
        self._usage: str | None = None
        self._neutralised = 0
        self._glm: str | None = None

    def label(self) -> str:
        """The judge's short name, and the arm that is compared with."""
        name = judge_label(self._judge.options)
        return name if self._baseline is None else f"{name}-against-{self._baseline.arm}"

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        """One verdict for each pair that has two outputs.

        Raises:
            StepError: the limit of cost is reached; verdicts so far are kept for the next run.
        """
        pairs = [self._pair(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        asked = [(index, pair) for index, pair in enumerate(pairs) if isinstance(pair, _Asked)]
        asked = [(index, pair) for index, pair in asked if pair.reference != pair.answer]
        job.progress(len(pairs) - len(asked))
        questions = [self._question(pair) for _, pair in asked]
        verdicts: Mapping[int, Judged[float]] = {}
        self._usage = None
        self._judge.new_bill()
        if questions:
            found = self._judge.ask(questions, self._annotator.preference, job.progress, job.stored)
            self._usage = str(self._judge.usage)
            verdicts = {index: verdict for (index, _), verdict in zip(asked, found, strict=True)}
        scores = [
            self._score(pair, answer, verdicts.get(index))
            for index, (pair, answer) in enumerate(zip(pairs, answers, strict=True))
        ]
        whole = [_as_pair(pair, score) for pair, score in zip(pairs, scores, strict=True)]
        self._by_length = wins_by_length(whole, seed=self._seed).lines()
        if job.folder is not None and samples:
            self._export(job.folder / ANNOTATIONS, samples, answers, whole)
        return self._controlled(scores, whole, job.task)

    def withheld(self, metric: Metric, scores: Sequence[Score]) -> str | None:
        """Why there is no length-controlled win rate."""
        if metric.name != CONTROLLED.name:
            return None
        return next((str(why) for score in scores if (why := score.detail.get(_WITHHELD))), None)

    def notes(self) -> tuple[str, ...]:
        """Who judged, how, and what it took."""
        judge = judge_label(self._judge.options)
        notes = [f"judge {judge}, asked as {self._config.annotator} of the alpaca-eval package", *self._by_length]
        if self._baseline is not None:
            notes.append(f"compared with the answers of arm {self._baseline.arm} to {self._baseline.task}")
            if cut := sum(one.truncated for one in self._baseline.by_id.values()):
                notes.append(f"{cut} of the answers that were compared with had spent their token budget")
        if self._usage is not None:
            notes.append(f"judging: {self._usage}")
        if self._neutralised:
            count = self._neutralised
            notes.append(f"{count} pairs held text that would have ended its quotation; it was written harmlessly")
        if self._glm is not None:
            notes.append(f"{CONTROLLED.name}: {self._glm} of the alpaca-eval package, fitted to this run's verdicts")
        return tuple(notes)

    def paid(self) -> JudgeCosts:
        """The judge's bill."""
        return self._judge.bill

    def close(self) -> None:
        """Let go of the judge."""
        self._judge.close()

    # ------------------------------------------------------------------------------------------------------- pieces

    def _pair(self, sample: Sample, answer: Answer) -> _Asked | str:
        """What the judge is to see; or why there is nothing to see."""
        config, instruction = self._config, sample.data.get("instruction", sample.prompt)
        if answer.error is not None:
            return f"no answer: {answer.error}"
        reference = sample.data.get("reference")
        if self._baseline is not None:
            stored = self._baseline.by_id.get(sample.id)
            if stored is None or stored.instruction != instruction:
                other = "was not asked this" if stored is None else "was asked something else under this id"
                return f"arm {self._baseline.arm} {other}"
            if stored.text is None:
                return f"arm {self._baseline.arm} has no answer: {stored.reason}"
            reference = stored.text
        if not isinstance(reference, str):
            return "the reference has no output for this instruction"
        first = config.order == "answer_first"
        if config.order == "random":
            first = switched(str(instruction), self._seed)
        changed = config.neutralise and any(harmless(text) != text for text in (reference, answer.text))
        return _Asked(str(instruction), reference, answer.text, first, changed)

    def _question(self, pair: _Asked) -> Question:
        outputs = [pair.answer, pair.reference] if pair.switched else [pair.reference, pair.answer]
        first, second = (harmless(text) if self._config.neutralise else text for text in outputs)
        return self._annotator.question(pair.instruction, first, second, self._config.repeat)

    def _score(self, pair: _Asked | str, answer: Answer, verdict: Judged[float] | None) -> Score:
        metrics = self._metrics
        if isinstance(pair, str):
            return Score.absent(metrics, pair)
        length = float(len(answer.text))
        detail: dict[str, Any] = {"shown_first": "answer" if pair.switched else "reference"}
        if pair.neutralised:
            detail["neutralised"] = True
        if verdict is None:
            share = 0.5
            detail["equal_texts"] = True
        elif verdict.value is None:
            values = {metric.name: None for metric in metrics} | {LENGTH.name: length}
            return Score(values, verdict.reason, {**detail, **({"again": True} if verdict.again else {})})
        else:
            second = verdict.value - 1
            detail["preference_for_first"] = 1 - second
            share = 1 - second if pair.switched else second
        discrete = 0.5 if share == 0.5 else float(share > 0.5)
        known = {WIN.name: share, DISCRETE.name: discrete, LENGTH.name: length, CONTROLLED.name: None}
        return Score({metric.name: known[metric.name] for metric in metrics}, None, detail)

    def _controlled(self, scores: list[Score], pairs: Sequence[JudgedPair], task: str) -> list[Score]:
        """The scores with what the regression predicts for each at equal length; or why it is withheld."""
        self._neutralised = sum(bool(score.detail.get("neutralised")) for score in scores)
        self._glm = None
        if not self._config.length_control or not scores:
            return scores
        control = self._length_control(pairs, task)
        self._glm = control.glm
        if control.withheld is not None:
            return [_with(score, None, control.withheld) for score in scores]
        return [_with(score, share) for score, share in zip(scores, control.predictions, strict=True)]

    def _length_control(self, pairs: Sequence[JudgedPair], task: str) -> LengthControl:
        config = self._config
        if config.difficulty is None:
            return LengthControl.without_difficulty(f"--set {task}.scorer.difficulty=FILE")
        gamed = Path(config.gamed).expanduser() if config.gamed else None
        return fit_length_control(pairs, read_alpaca_difficulties(Path(config.difficulty).expanduser()), gamed)

    def _export(
        self, path: Path, samples: Sequence[Sample], answers: Sequence[Answer], pairs: Sequence[JudgedPair]
    ) -> None:
        rows = [
            {
                "instruction": sample.data.get("instruction", sample.prompt),
                "output_1": pair.output_1,
                "generator_1": self._generator(sample),
                "output_2": None if answer.error is not None else answer.text,
                "generator_2": "model",
                "annotator": f"{self._config.annotator}@{self.label()}",
                "preference": pair.preference,
                "reason": pair.reason,
            }
            for sample, answer, pair in zip(samples, answers, pairs, strict=True)
        ]
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        # Lone surrogates of a model's output cannot be written as UTF-8.
        path.write_bytes(text.encode(errors="replace"))

    def _generator(self, sample: Sample) -> str:
        if self._baseline is not None:
            return self._baseline.arm
        return str(sample.data.get("reference_generator") or "reference")


def _baseline(config: Any) -> StoredOutputs | None:
    """The answers of the arm that is named; None where none is.

    Raises:
        UserError: there is no such run, arm or task.
    """
    if config.baseline is None:
        return None
    return read_outputs(Path(config.baseline).expanduser(), arm=config.baseline_arm, task=config.baseline_task)


def _with(score: Score, controlled: float | None, withheld: str = "") -> Score:
    """The score with the length-controlled value: the preference predicted at equal length, or why there is none."""
    detail = {**score.detail, **({_WITHHELD: withheld} if withheld else {})}
    reason = score.reason
    if controlled is None and reason is None:
        reason = (
            f"length control is withheld: {withheld}" if withheld else "the instruction has no published difficulty"
        )
    return Score({**score.values, CONTROLLED.name: controlled}, reason, detail)


def _complete(config: Any) -> Any:
    """With the annotator's own length of a reply where none is given."""
    if config.max_new_tokens:
        return config
    return config.model_copy(update={"max_new_tokens": load_annotator(config.annotator).max_tokens})


def _as_pair(pair: _Asked | str, score: Score) -> JudgedPair:
    if isinstance(pair, str):
        return JudgedPair(None, None, None, None, pair)
    share = score.values[WIN.name]
    preference = None if share is None else 1 + share
    return JudgedPair(pair.instruction, pair.reference, pair.answer, preference, score.reason)
