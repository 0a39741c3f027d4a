"""Preference pairs of the hub: HH-RLHF, BeaverTails (PKU-SafeRLHF) and the TL;DR comparisons, at pinned revisions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

import harness
from harness import (
    Dataset,
    DatasetJob,
    DatasetRow,
    HubFiles,
    RowSchema,
    UserError,
    load_hub_dataset,
    pinned_commit,
    revision_note,
    unknown,
)

Messages = list[dict[str, str]]


class Unusable(Exception):  # noqa: N818 - not an error of anybody's: a row that is left out, and why
    """A row that cannot be used; its text is the reason under which it is counted."""


def check_prompt(messages: Sequence[Mapping[str, str]]) -> None:
    """A prompt is user and assistant turns in alternation, none empty, the last the user's; one system turn may lead.

    Raises:
        Unusable: it is not.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if any(not message["content"].strip() for message in messages):
        raise Unusable("broken transcript: an empty turn")
    for index, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise Unusable(
                "broken transcript: does not start with the user"
                if index == 0
                else "broken transcript: turns do not alternate"
            )
    if len(turns) % 2 == 0:
        raise Unusable("broken transcript: the prompt does not end with the user")


def make_pair(prompt: Messages, chosen: str, rejected: str) -> dict[str, Any]:
    """One row of the schema ``pairs``.

    Raises:
        Unusable: a broken prompt, an empty answer, or two answers that are the same.
    """
    check_prompt(prompt)
    if not chosen.strip() or not rejected.strip():
        raise Unusable("empty answer")
    if chosen == rejected:
        raise Unusable("chosen and rejected are equal")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


_TURN = re.compile(r"\n\n(Human|Assistant):")
_ANSWER = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_transcript(text: str) -> tuple[Messages, str]:
    """Turns before the last ``"\\n\\nAssistant:"`` of a transcript, and the answer after it; edges stripped.

    The cut is never the common prefix of two transcripts: answers that begin alike would lose their beginning.

    Raises:
        Unusable: there is no answer, or the text does not start with a turn.
    """
    cut = text.rfind(_ANSWER)
    if cut < 0:
        raise Unusable("broken transcript: no assistant turn")
    answer = text[cut + len(_ANSWER) :]
    if _TURN.search(answer):
        raise Unusable("broken transcript: does not end with the assistant")
    parts = _TURN.split(text[:cut])
    if parts[0].strip():
        raise Unusable("broken transcript: does not start with the user")
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in turns], answer.strip()


def pair_of_transcripts(chosen: str, rejected: str) -> dict[str, Any]:
    """A row of two transcripts that share their prompt.

    Raises:
        Unusable: broken, or their prompts differ.
    """
    prompt, good = split_transcript(chosen)
    other, bad = split_transcript(rejected)
    if prompt != other:
        # A broken one of the two says more than that they differ.
        check_prompt(prompt)
        check_prompt(other)
        raise Unusable("the prompts of chosen and rejected differ")
    return make_pair(prompt, good, bad)


def need_columns(where: str, loaded: Any, needed: Sequence[str]) -> None:
    """Refuse a table without the columns that are needed; the message names them and shows a row.

    Args:
        where: for the message.
        loaded: a ``datasets.Dataset``.
        needed: names of columns.
    """
    missing = [name for name in needed if name not in loaded.column_names]
    if missing:
        raise UserError(where, f"no column {', '.join(missing)}", f"Its rows look so: {sketch(loaded)}")


def sketch(rows: Any) -> str:
    """The first row, shortened and in one line, for a message."""
    row = next(iter(rows), None)
    if row is None:
        return "there are no rows"
    short = {key: text if len(text := str(value)) <= 60 else f"{text[:57]}..." for key, value in row.items()}
    return json.dumps(short, ensure_ascii=True)


class _HubPairs(Dataset):
    """What the data sets here share: a pinned revision, subsets, and counting."""

    schema: ClassVar[RowSchema] = "pairs"
    revision: ClassVar[str]
    heldout: ClassVar[str] = "test"

    def heldout_split(self, job: DatasetJob) -> str | None:
        """The official one."""
        return self.heldout

    def commit(self, job: DatasetJob) -> str:
        """The user's revision, else the pinned one; never whatever is cached."""
        return pinned_commit(self.source, self.revision, job.revision)

    def identity(self, job: DatasetJob) -> dict[str, Any]:
        """As for any data set, with the commit that will really be read."""
        return {**super().identity(job), "revision": self.commit(job)}

    def hub_files(self, job: DatasetJob) -> tuple[HubFiles, ...]:
        """The whole repository."""
        return (HubFiles(self.source, "dataset", job.revision or self.revision),)

    def load(self, job: DatasetJob, **how: Any) -> Any:
        """One split at the commit in force; a note where that is not the pinned one."""
        commit = self.commit(job)
        job.notes += revision_note(self.source, self.revision, commit)
        return load_hub_dataset(self.source, split=job.split or "train", revision=commit, **how)

    def chosen_subset(self, job: DatasetJob) -> str:
        """The subset asked for.

        Raises:
            UserError: none, or an unknown one.
        """
        if job.subset is None:
            examples = " or ".join(f"{self.name}:{subset}" for subset in self.subsets)
            raise UserError(f"--dataset {self.name}", "it has several subsets, and none is named", f"Write {examples}.")
        if job.subset not in self.subsets:
            raise unknown(
                f"--dataset {self.name}:{job.subset}", "subset", job.subset, self.subsets, "harness data list"
            )
        return job.subset


class HhRlhf(_HubPairs):
    """HH-RLHF (Bai et al., arXiv 2204.05862): pairs of transcripts, several turns long, that end differently."""

    name = "hh-rlhf"
    summary = "Anthropic's HH-RLHF, folders harmless-base and helpful-base"
    subsets = ("harmless", "helpful")
    source = "Anthropic/hh-rlhf"
    licence = "MIT"
    revision = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"

    def rows(self, job: DatasetJob) -> Iterator[DatasetRow]:
        """Rows in the file's order; their ids are split and position in the file."""
        subset = self.chosen_subset(job)
        loaded = self.load(job, data_dir=f"{subset}-base")
        need_columns(f"dataset {self.name}", loaded, ("chosen", "rejected"))
        for position, row in enumerate(loaded):
            try:
                pair = pair_of_transcripts(row["chosen"] or "", row["rejected"] or "")
            except Unusable as reason:
                job.drop(str(reason))
                continue
            yield DatasetRow(f"{job.split or 'train'}/{position}", pair)


Rule = Literal["one_safe", "better_and_safe"]


class BeaverTails(_HubPairs):
    """PKU-SafeRLHF (Ji et al., arXiv 2307.04657, 2406.15513): two answers, safety of each, and which is the better.

    The default is its first release (330k rows, revision ``v0``), which the trade-offs paper (arXiv 2406.04879) counts.
    """

    name = "beavertails"
    summary = "PKU-SafeRLHF: helpful (the better answer) or harmless (the safe answer)"
    subsets = ("harmless", "helpful")
    source = "PKU-Alignment/PKU-SafeRLHF"
    licence = "CC-BY-NC-4.0"
    revision = "v0"

    class Config(harness.Config):
        """How the harmless subset is read."""

        rule: Rule = Field(
            "one_safe",
            description="harmless pairs: rows with exactly one safe answer, or those whose better answer is also the "
            "only safe one",
        )

    def rows(self, job: DatasetJob) -> Iterator[DatasetRow]:
        """Rows in the file's order; a note says how many rows each reading of the harmless rule keeps."""
        subset = self.chosen_subset(job)
        loaded = self.load(job)
        needed = {"helpful": ["better_response_id"], "harmless": ["is_response_0_safe", "is_response_1_safe"]}[subset]
        if job.options.rule == "better_and_safe" and subset == "harmless":
            needed.append("better_response_id")
        need_columns(f"dataset {self.name}:{subset}", loaded, ("prompt", "response_0", "response_1", *needed))
        kept: dict[Rule, int] = dict.fromkeys(get_args(Rule), 0)
        for position, row in enumerate(loaded):
            for rule in kept if subset == "harmless" else ():
                try:
                    _answers(row, _safe(row, rule))
                    kept[rule] += 1
                except Unusable:
                    pass
            try:
                pair = _answers(row, _safe(row, job.options.rule) if subset == "harmless" else _better(row))
            except Unusable as reason:
                job.drop(str(reason))
                continue
            yield DatasetRow(f"{job.split or 'train'}/{position}", pair)
        if subset == "harmless":
            counts = ", ".join(f"{rule} keeps {count:,} rows" for rule, count in kept.items())
            split = job.split or "train"
            job.note(f"{self.name}:harmless, {split}: {counts} of {len(loaded):,}; in force: {job.options.rule}")


def _better(row: Mapping[str, Any]) -> int:
    better = row.get("better_response_id")
    if better is None:
        raise Unusable("better_response_id is null")
    if better not in (0, 1):
        raise Unusable("better_response_id is neither 0 nor 1")
    return int(better)


def _safe(row: Mapping[str, Any], rule: Rule) -> int:
    labels = [row[f"is_response_{which}_safe"] for which in (0, 1)]
    if None in labels:
        raise Unusable("is_response_0_safe or is_response_1_safe is null")
    if bool(labels[0]) == bool(labels[1]):
        raise Unusable("both answers are safe" if labels[0] else "both answers are unsafe")
    safe = 0 if labels[0] else 1
    if rule == "better_and_safe" and _better(row) != safe:
        raise Unusable("the better answer is the unsafe one")
    return safe


def _answers(row: Mapping[str, Any], chosen: int) -> dict[str, Any]:
    prompt = [{"role": "user", "content": (row["prompt"] or "").strip()}]
    good, bad = ((row[f"response_{which}"] or "").strip() for which in (chosen, 1 - chosen))
    return make_pair(prompt, good, bad)


class Summarize(_HubPairs):
    """TL;DR comparisons (Stiennon et al., arXiv 2009.01325): two summaries of one post, and which a labeller chose.

    The hub's main branch holds a loading script, which ``datasets`` no longer runs; read is the hub's own Parquet copy.
    """

    name = "summarize"
    summary = "TL;DR summaries compared by people (openai/summarize_from_feedback)"
    source = "openai/summarize_from_feedback"
    licence = "MIT"
    revision = "refs/convert/parquet"
    heldout = "validation"

    def rows(self, job: DatasetJob) -> Iterator[DatasetRow]:
        """Rows in the file's order."""
        loaded = self._comparisons(job)
        need_columns(f"dataset {self.name}", loaded, ("info", "summaries", "choice"))
        for position, row in enumerate(loaded):
            try:
                pair = _summaries(row)
            except Unusable as reason:
                job.drop(str(reason))
                continue
            yield DatasetRow(f"{job.split or 'train'}/{position}", pair)

    def _comparisons(self, job: DatasetJob) -> Any:
        """A configuration where the repository declares one, else the folder of that name."""
        try:
            return self.load(job, name="comparisons")
        except UserError as first:
            if first.where.endswith(", split"):
                raise
            try:
                return self.load(job, data_dir="comparisons")
            except UserError as second:
                # With a folder that holds nothing, the first message is the one about the cause.
                raise second if second.where.endswith(", split") else first from None


def _summaries(row: Mapping[str, Any]) -> dict[str, Any]:
    info, summaries, choice = row["info"] or {}, row["summaries"] or [], row["choice"]
    if len(summaries) != 2:
        raise Unusable("not two summaries")
    if choice is None:
        raise Unusable("choice is null")
    if choice not in (0, 1):
        raise Unusable("choice is neither 0 nor 1")
    post, article = ((info.get(key) or "").strip() for key in ("post", "article"))
    if post:
        heads = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"))
        lines = [f"{head}{info[key].strip()}" for head, key in heads if (info.get(key) or "").strip()]
        text = "\n".join([*lines, f"POST: {post}", "TL;DR:"])
    elif article:
        text = f"ARTICLE: {article}\nTL;DR:"
    else:
        raise Unusable("neither post nor article")
    good, bad = ((summaries[which]["text"] or "").strip() for which in (choice, 1 - choice))
    return make_pair([{"role": "user", "content": text}], good, bad)
