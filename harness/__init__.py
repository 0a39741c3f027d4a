"""harness: a plugin-based, evaluation-first harness for preference alignment of language models.

Every public name can be imported from here; each is loaded when it is first used: ``import harness`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.alignment.packing import (
        PackingCollator as PackingCollator,
    )
    from harness.alignment.pairwise import (
        PairwiseLoss as PairwiseLoss,
        PairwiseRecipe as PairwiseRecipe,
    )
    from harness.alignment.run import (
        Alignment as Alignment,
        align as align,
    )
    from harness.contracts.adapter import (
        Adapter as Adapter,
        ParameterGroup as ParameterGroup,
    )
    from harness.contracts.aligner import (
        Aligner as Aligner,
        ArtifactFiles as ArtifactFiles,
        PairLogps as PairLogps,
        Stage as Stage,
        TrainerCall as TrainerCall,
        TrainingJob as TrainingJob,
    )
    from harness.contracts.converter import (
        Converter as Converter,
    )
    from harness.contracts.dataset import (
        Dataset as Dataset,
        DatasetJob as DatasetJob,
        DatasetRow as DatasetRow,
        RowSchema as RowSchema,
        TrainingRow as TrainingRow,
    )
    from harness.contracts.engine import (
        Availability as Availability,
        Capabilities as Capabilities,
        Engine as Engine,
        ServerCommand as ServerCommand,
        Serving as Serving,
        Session as Session,
    )
    from harness.contracts.executor import (
        Event as Event,
        Executor as Executor,
        ExecutorContext as ExecutorContext,
        Failure as Failure,
        Needs as Needs,
        Order as Order,
        Pool as Pool,
        WorkerContext as WorkerContext,
    )
    from harness.contracts.hookspecs import (
        hookimpl as hookimpl,
    )
    from harness.contracts.hub_files import (
        HubFiles as HubFiles,
        is_hub_id as is_hub_id,
        model_files as model_files,
    )
    from harness.contracts.merger import (
        Factors as Factors,
        Merged as Merged,
        Merger as Merger,
    )
    from harness.contracts.plugin import (
        CONTRACT_VERSION as CONTRACT_VERSION,
        Plugin as Plugin,
    )
    from harness.contracts.recipe import (
        Recipe as Recipe,
    )
    from harness.contracts.registry import (
        Registry as Registry,
        load_plugins as load_plugins,
    )
    from harness.contracts.report_section import (
        Mark as Mark,
        ReportSection as ReportSection,
        SectionBlock as SectionBlock,
        SectionCell as SectionCell,
        SectionColumn as SectionColumn,
        SectionFigure as SectionFigure,
        SectionTable as SectionTable,
        SectionText as SectionText,
    )
    from harness.contracts.scorer import (
        AnswerScorer as AnswerScorer,
        ScoreJob as ScoreJob,
        Scorer as Scorer,
        ScorerContext as ScorerContext,
        ScorerSession as ScorerSession,
        Wording as Wording,
    )
    from harness.core.caches import (
        hub_cache as hub_cache,
        offline as offline,
    )
    from harness.core.conditioning import (
        Conditioning as Conditioning,
        ControlValue as ControlValue,
        control_place as control_place,
        insert_control as insert_control,
    )
    from harness.core.config import (
        Config as Config,
    )
    from harness.core.costs import (
        Costs as Costs,
        JudgeCosts as JudgeCosts,
    )
    from harness.core.errors import (
        HarnessError as HarnessError,
        StepError as StepError,
        UserError as UserError,
        nearest as nearest,
        unknown as unknown,
    )
    from harness.core.machine import (
        torch_device as torch_device,
    )
    from harness.core.records import (
        LOGIT_RESOLUTION as LOGIT_RESOLUTION,
        LOGPROB_ROUNDING as LOGPROB_ROUNDING,
        SHARE_RESOLUTION as SHARE_RESOLUTION,
        AdapterInfo as AdapterInfo,
        Answer as Answer,
        Finish as Finish,
        Message as Message,
        Metric as Metric,
        ModelInfo as ModelInfo,
        Output as Output,
        Request as Request,
        Row as Row,
        Sample as Sample,
        Score as Score,
        StepInfo as StepInfo,
        StepRecord as StepRecord,
        digest_of as digest_of,
    )
    from harness.core.secrecy import (
        check_variable as check_variable,
        cleaned as cleaned,
        read_secret as read_secret,
        refuse_credentials as refuse_credentials,
    )
    from harness.core.specs import (
        DatasetRef as DatasetRef,
        Decoding as Decoding,
        EvalSpec as EvalSpec,
        LmEvalRef as LmEvalRef,
        MergeInput as MergeInput,
        MergeSpec as MergeSpec,
        ModelSpec as ModelSpec,
        ScorerRef as ScorerRef,
        SuiteSpec as SuiteSpec,
        TaskSpec as TaskSpec,
    )
    from harness.core.stats import (
        cohen_kappa as cohen_kappa,
    )
    from harness.core.version import (
        __version__ as __version__,
    )
    from harness.data.hub import (
        hub_errors as hub_errors,
        load_hub_dataset as load_hub_dataset,
        pinned_commit as pinned_commit,
        resolve_revision as resolve_revision,
        revision_note as revision_note,
    )
    from harness.evaluation.run import (
        Evaluation as Evaluation,
        evaluate as evaluate,
    )
    from harness.judges.alpaca import (
        LengthControl as LengthControl,
        fit_length_control as fit_length_control,
        quiet_alpaca_eval as quiet_alpaca_eval,
        read_alpaca_difficulties as read_alpaca_difficulties,
        read_alpaca_gamed as read_alpaca_gamed,
    )
    from harness.judges.lengths import (
        WinsByLength as WinsByLength,
        wins_by_length as wins_by_length,
    )
    from harness.merging.run import (
        Merging as Merging,
        merge as merge,
    )
    from harness.models.attaching import (
        attach_adapter as attach_adapter,
    )
    from harness.models.conditioning import (
        AdapterControl as AdapterControl,
        control_tokens as control_tokens,
        soft_prompt as soft_prompt,
        write_conditioning as write_conditioning,
    )
    from harness.models.generation_config import (
        end_tokens as end_tokens,
        generation_identity as generation_identity,
    )
    from harness.models.inspect import (
        adapter_modules as adapter_modules,
        inspect_model as inspect_model,
        with_tokenizer as with_tokenizer,
    )
    from harness.models.locate import (
        is_url as is_url,
    )
    from harness.models.precision import (
        settle_dtype as settle_dtype,
    )
    from harness.report.external.annotations import (
        JudgedPair as JudgedPair,
    )
    from harness.report.outputs import (
        StoredOutput as StoredOutput,
        StoredOutputs as StoredOutputs,
        read_outputs as read_outputs,
    )
    from harness.steps.children import (
        WorkerProcess as WorkerProcess,
    )
    from harness.steps.execute import (
        Execution as Execution,
    )
    from harness.steps.journal import (
        Journal as Journal,
    )
    from harness.steps.orders import (
        InProcessPool as InProcessPool,
        carry_out_order as carry_out_order,
        stopping_at_signals as stopping_at_signals,
    )
    from harness.steps.provenance import (
        NUMERICS as NUMERICS,
        code_versions as code_versions,
        file_digest as file_digest,
        files_digest as files_digest,
    )
    from harness.steps.warm import (
        WarmParent as WarmParent,
    )
    from harness.tasks.lm_eval.task import (
        LmEvalRuntime as LmEvalRuntime,
        LmEvalVerdict as LmEvalVerdict,
        lm_eval_metric as lm_eval_metric,
    )

_HOME = {
    "harness.alignment.packing": "PackingCollator",
    "harness.alignment.pairwise": "PairwiseLoss PairwiseRecipe",
    "harness.alignment.run": "Alignment align",
    "harness.contracts.adapter": "Adapter ParameterGroup",
    "harness.contracts.aligner": "Aligner ArtifactFiles PairLogps Stage TrainerCall TrainingJob",
    "harness.contracts.converter": "Converter",
    "harness.contracts.dataset": "Dataset DatasetJob DatasetRow RowSchema TrainingRow",
    "harness.contracts.engine": "Availability Capabilities Engine ServerCommand Serving Session",
    "harness.contracts.executor": "Event Executor ExecutorContext Failure Needs Order Pool WorkerContext",
    "harness.contracts.hookspecs": "hookimpl",
    "harness.contracts.hub_files": "HubFiles is_hub_id model_files",
    "harness.contracts.merger": "Factors Merged Merger",
    "harness.contracts.plugin": "CONTRACT_VERSION Plugin",
    "harness.contracts.recipe": "Recipe",
    "harness.contracts.registry": "Registry load_plugins",
    "harness.contracts.report_section": (
        "Mark ReportSection SectionBlock SectionCell SectionColumn SectionFigure SectionTable SectionText"
    ),
    "harness.contracts.scorer": "AnswerScorer ScoreJob Scorer ScorerContext ScorerSession Wording",
    "harness.core.caches": "hub_cache offline",
    "harness.core.conditioning": "Conditioning ControlValue control_place insert_control",
    "harness.core.config": "Config",
    "harness.core.costs": "Costs JudgeCosts",
    "harness.core.errors": "HarnessError StepError UserError nearest unknown",
    "harness.core.machine": "torch_device",
    "harness.core.records": (
        "AdapterInfo Answer Finish LOGIT_RESOLUTION LOGPROB_ROUNDING Message Metric ModelInfo Output Request "
        "Row SHARE_RESOLUTION Sample Score StepInfo StepRecord digest_of"
    ),
    "harness.core.secrecy": "check_variable cleaned read_secret refuse_credentials",
    "harness.core.specs": (
        "DatasetRef Decoding EvalSpec LmEvalRef MergeInput MergeSpec ModelSpec ScorerRef SuiteSpec TaskSpec"
    ),
    "harness.core.stats": "cohen_kappa",
    "harness.core.version": "__version__",
    "harness.data.hub": "hub_errors load_hub_dataset pinned_commit resolve_revision revision_note",
    "harness.evaluation.run": "Evaluation evaluate",
    "harness.judges.alpaca": (
        "LengthControl fit_length_control quiet_alpaca_eval read_alpaca_difficulties read_alpaca_gamed"
    ),
    "harness.judges.lengths": "WinsByLength wins_by_length",
    "harness.report.external.annotations": "JudgedPair",
    "harness.report.outputs": "StoredOutput StoredOutputs read_outputs",
    "harness.merging.run": "Merging merge",
    "harness.models.attaching": "attach_adapter",
    "harness.models.conditioning": "AdapterControl control_tokens soft_prompt write_conditioning",
    "harness.models.generation_config": "end_tokens generation_identity",
    "harness.models.inspect": "adapter_modules inspect_model with_tokenizer",
    "harness.models.locate": "is_url",
    "harness.models.precision": "settle_dtype",
    "harness.steps.children": "WorkerProcess",
    "harness.steps.execute": "Execution",
    "harness.steps.journal": "Journal",
    "harness.steps.orders": "InProcessPool carry_out_order stopping_at_signals",
    "harness.steps.provenance": "NUMERICS code_versions file_digest files_digest",
    "harness.steps.warm": "WarmParent",
    "harness.tasks.lm_eval.task": "LmEvalRuntime LmEvalVerdict lm_eval_metric",
}
"""Module -> the public names that lie there; the imports above say the same to type checkers (a test compares)."""
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


if not TYPE_CHECKING:  # a name that is not there is a type checker's error

    def __getattr__(name: str) -> object:
        module = _MODULE_OF.get(name)
        if module is None:
            raise AttributeError(f"module 'harness' has no attribute {name!r}")
        value = getattr(import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
