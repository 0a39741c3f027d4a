"""What a user writes: tasks, suites, and the request for one evaluation."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from harness.core.config import Config

PromptKind = Literal["raw", "chat"]


class Decoding(Config):
    """How an answer is drawn. The defaults are greedy."""

    max_new_tokens: int = Field(256, ge=1, description="most tokens of an answer (tokens)")
    temperature: float = Field(0.0, ge=0.0, description="softmax temperature; 0 is greedy (no unit)")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="nucleus mass kept when sampling (probability)")
    stop: tuple[str, ...] = Field((), description="texts that end an answer; not part of it")
    seed: int | None = Field(None, description="seed of sampling; unused when greedy")

    @property
    def greedy(self) -> bool:
        """Whether the answer is a function of the prompt alone."""
        return self.temperature == 0.0


class DatasetRef(Config):
    """Which rows: a dataset plugin by name, and its options."""

    name: str = Field(description="a registered dataset; `hub` and `jsonl` read any hub id or file")
    subset: str | None = Field(None, description="which preference or part, where the dataset has several")
    split: str | None = Field(None, description="train or held-out part, in the dataset's own words")
    revision: str | None = Field(None, description="commit to read; the dataset's pinned one when absent")
    options: dict[str, Any] = Field(default_factory=dict, description="the plugin's own Config")


class ScorerRef(Config):
    """Which scorer, and its options."""

    name: str = Field(description="a registered scorer")
    options: dict[str, Any] = Field(default_factory=dict, description="the plugin's own Config")


class LmEvalRef(Config):
    """A task or group of lm-eval, run by lm-eval's own code."""

    task: str = Field(description="name in lm-eval's index, or in `include`")
    num_fewshot: int | None = Field(None, ge=0, description="shots; the task's own number when absent")
    max_new_tokens: int | None = Field(None, ge=1, description="overrides the task's max_gen_toks (tokens)")
    data: str | None = Field(None, description="hub id of its data: its revision enters the step id")
    revision: str | None = Field(None, description="commit of `data` to read; what the caches or the hub have as main")
    include: str | None = Field(None, description="folder of lm-eval YAML files that holds the task")
    flexible: bool = Field(False, description="report flexible extraction and extraction failures besides exact_match")


class TaskSpec(Config):
    """Data + prompt + scorers: one YAML file, in anyone's folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.@+-]*(:[\w.@+/-]+)?$", description="what --task takes")
    version: int = Field(1, ge=1, description="raised whenever a prompt, a target or the data changes")
    summary: str = Field("", description="one line for `harness tasks`")
    source: str = Field("", description="where data and prompt come from")
    licence: str = Field("unknown", description="licence of the data")
    size: int | None = Field(None, description="number of samples, where known beforehand")
    leaves: int | None = Field(None, ge=1, description="number of leaf tasks (subjects, say), where known beforehand")
    notes: tuple[str, ...] = Field((), description="what is our choice rather than the source's")
    needs: tuple[Literal["generate", "loglikelihood"], ...] = Field(
        (), description="what it asks of an engine; by default `generate`, and both for an lm-eval task"
    )
    prompt: Literal["raw", "chat", "auto"] = Field(
        "raw", description="raw text, the tokenizer's chat template, or chat where the model has a template"
    )
    system: str | None = Field(None, description="system message of a chat prompt")
    template: str = Field("{{ prompt }}", description="Jinja template over the row: the raw prompt or the user turn")
    target: str | None = Field(None, description="Jinja template over the row: what scorers compare with")
    leaf: str | None = Field(
        None, description="Jinja template over the row: the leaf task it counts for, a category say; empty: none"
    )
    cluster: str | None = Field(
        None,
        description="Jinja template over the row: what samples that hang together share, a question asked in several"
        " wordings say; empty: the sample stands for itself",
    )
    subset: Literal["first", "seeded"] = Field(
        "first",
        description="which samples of each leaf task a limit takes: the first, or a draw by the evaluation's seed, the"
        " same for every arm",
    )
    generation_prompt: bool = Field(
        True, description="whether a chat prompt ends where the assistant answers; else with the user's turn"
    )
    decoding_of: Literal["task", "model"] = Field(
        "task",
        description="temperature and top_p of `decoding`, or of the model's generation_config.json; lengths and stops"
        " are the task's",
    )
    decoding: Decoding = Field(default_factory=lambda: Decoding(), description="how answers are drawn")
    dataset: DatasetRef | None = Field(None, description="where the rows come from")
    lm_eval: LmEvalRef | None = Field(None, description="instead of dataset and template: a task of lm-eval's")
    generative: str | None = Field(
        None, description="task that asks the same in words, for endpoints that take conversations alone"
    )
    scorers: tuple[ScorerRef, ...] = Field((), description="what turns answers into scores")
    judges: tuple[str | dict[str, Any], ...] = Field(
        (),
        description="judges that are asked one by one about the same answers, the first the one that counts: a model, a"
        " URL, `refusal`, or options of a judge with an optional `name`; the scorer's own when absent",
    )
    wordings: int | tuple[str | dict[str, Any], ...] = Field(
        1,
        description="wordings in which each judge is asked, the first the one that counts: how many of the scorer's,"
        " or names of these and wordings of yours",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.wordings == () or (isinstance(self.wordings, int) and self.wordings < 1):
            raise ValueError("`wordings` is a number from 1 on, or a list of wordings")
        if (self.dataset is None) == (self.lm_eval is None):
            raise ValueError("give either `dataset` (with `scorers`) or `lm_eval`")
        if self.dataset is not None and not self.scorers:
            raise ValueError("a task with a `dataset` needs at least one scorer under `scorers`")
        if self.lm_eval is not None and self.prompt == "auto":
            raise ValueError("an lm-eval task is `raw` or `chat`")
        if self.lm_eval is not None and (self.leaf or self.cluster or not self.generation_prompt):
            raise ValueError("leaf tasks, clusters and prompts of an lm-eval task are lm-eval's own")
        if self.lm_eval is not None and self.decoding_of == "model":
            raise ValueError("how an lm-eval task is decoded is lm-eval's own")
        return self


class SuiteSpec(Config):
    """A list of tasks under one name."""

    suite: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="what --suite takes")
    summary: str = Field("", description="one line for `harness tasks`")
    tasks: tuple[str, ...] = Field(min_length=1, description="task names")
    limit: int | None = Field(None, ge=1, description="samples per leaf task, unless --limit says otherwise")
    limits: dict[str, int] = Field(default_factory=dict, description="the same for single tasks")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="per task, as `--set TASK.KEY=VALUE`, which goes before: judges, decoding"
    )
    notes: tuple[str, ...] = Field((), description="what is inferred, where the source of the suite is silent")


class ModelSpec(Config):
    """Which model, and how far its files are trusted."""

    model: str = Field(description="folder, hub id, or URL of an OpenAI-compatible endpoint")
    revision: str | None = Field(None, description="hub revision")
    adapter: str | None = Field(None, description="folder or hub id of a peft adapter")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights' type in the engine; auto: float32 on a CPU, else as they are stored"
    )
    allow_pickle: bool = Field(False, description="load pickled weights (they can run code)")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    allow_template_mismatch: bool = Field(False, description="go on when adapter and model disagree on the template")


class EvalSpec(Config):
    """One evaluation: what `harness eval` and `harness.evaluate` take."""

    model: ModelSpec
    adapters: tuple[str, ...] = Field((), description="adapters of one base, or folders of such: an arm for each")
    with_base: bool | None = Field(
        None, description="whether the base is an arm too; absent: beside several adapters, not beside one"
    )
    control: tuple[str, ...] = Field(
        (), description="values of the conditioning, an arm for each; `all`: every one; absent: the default alone"
    )
    tasks: tuple[str, ...] = Field((), description="task names; every name may end in :raw or :chat")
    suite: str | None = Field(None, description="suite name; `quick` when neither tasks nor suite are given")
    engine: str = Field("auto", description="engine name, or auto")
    limit: int | None = Field(None, ge=1, description="samples per leaf task")
    seed: int = Field(0, ge=0, description="seed of few-shot choice, sampling and resampling")
    options: dict[str, Any] = Field(default_factory=dict, description="`engine`, and per task: limit, decoding, scorer")
    task_folders: tuple[str, ...] = Field((), description="folders of task YAML besides the registered ones")
    data_revisions: dict[str, str] = Field(
        default_factory=dict, description="hub id of a data set -> commit to read instead of the pinned revision"
    )
    trust_task_code: bool = Field(False, description="run the code that lm-eval YAML of `task_folders` names")
    max_judge_cost: float | None = Field(
        None, ge=0.0, description="`max_cost` of every scorer that has one (in the currency of its prices)"
    )
    parity: int | None = Field(None, ge=1, description="samples per task that a second engine answers too")
    parity_engine: str = Field("transformers", description="the second engine")


class ServeSpec(Config):
    """One server: what `harness serve` and `harness.serving.server.serve` take."""

    model: ModelSpec
    adapters: tuple[str, ...] = Field((), description="adapters of the model: PATH, NAME=PATH, or a folder of such")
    engine: str = Field("vllm", description="registered engine whose server is started")
    options: dict[str, Any] = Field(default_factory=dict, description="the engine's own options")
    name: str | None = Field(None, min_length=1, description="what requests call the model; its own name when absent")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: a free one")
    api_key_env: str | None = Field(None, description="environment variable with the API key that requests must bring")
    ready_timeout: float = Field(900.0, gt=0, description="longest wait until the server answers (seconds)")
    log: str | None = Field(None, description="file for the server's log; none is kept when absent")


class AlignSpec(Config):
    """One alignment: what `harness align` and `harness.align` take."""

    method: str = Field(description="registered aligner")
    model: ModelSpec
    start: str | None = Field(None, description="adapter to continue from: it stays frozen and active (--from)")
    dataset: str = Field(description="expression over data sets, e.g. hh-rlhf:harmless+helpful")
    adapter: str = Field("lora", description="registered way of attaching trainable weights")
    template: str | None = Field(
        None, description="chat template: bundled name or .jinja file; the model's when absent"
    )
    samples: int | None = Field(
        None, ge=1, description="rows to train on, counted after all drops: a prefix of one order"
    )
    checkpoints: tuple[int, ...] = Field((), description="steps whose adapters are kept")
    seed: int = Field(0, ge=0, description="seed of initialisation, batch order and dropout")
    data_seed: int = Field(0, ge=0, description="seed of the order that --samples takes a prefix of")
    processes: int = Field(1, ge=1, description="processes, each with a device of its own, that share every batch")
    options: dict[str, Any] = Field(default_factory=dict, description="recipe keys; `adapter` and `dataset` groups")
    data_revisions: dict[str, str] = Field(
        default_factory=dict, description="hub id of a data set -> commit to read instead of the pinned revision"
    )


class MergeInput(Config):
    """One model of a merge: an adapter, or a full checkpoint."""

    ref: str = Field(description="folder or hub id of an adapter or a checkpoint")
    base: str | None = Field(None, description="the checkpoint under an adapter, where it is not the merge's base")
    revision: str | None = Field(None, description="hub revision")
    weight: float | None = Field(None, allow_inf_nan=True, description="its weight, finite; 1/n when none is given")
    control: str | None = Field(None, description="value of its conditioning; the default when absent")


class MergeSpec(Config):
    """One merge: what `harness merge` and `harness.merge` take, and what mergekit's YAML is read into."""

    method: str = Field(description="registered merger")
    base: ModelSpec | None = Field(None, description="the model that deltas are taken from")
    inputs: tuple[MergeInput, ...] = Field(min_length=1, description="the models, in order")
    options: dict[str, Any] = Field(default_factory=dict, description="the merger's own Config, for every tensor")
    config: dict[str, Any] | None = Field(
        None, description="mergekit's YAML as data: per-tensor parameters and slices come from it, not from `options`"
    )
    seed: int = Field(0, ge=0, description="seed of random masks")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the written weights; auto: the base's"
    )
    form: Literal["model", "adapter"] = Field("model", description="what is written (--as)")
    rank: int | None = Field(None, ge=1, description="rank of a truncated adapter; the sum of the inputs' when absent")
