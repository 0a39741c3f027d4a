"""The bundled plugins. They enter by the door that everybody else's plugins use, and import no more than those may.

Each hook imports the modules it needs, so that a broken one is named together with its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness import Adapter, Aligner, Converter, Dataset, Engine, Executor, Merger, Scorer, hookimpl


@hookimpl
def register_aligners() -> Iterator[Aligner]:
    """SFT, DPO, the preference losses that are one function each, and methods that condition a model."""
    from harness_plugins.aligners.conditioned.hindsight import Coh
    from harness_plugins.aligners.conditioned.methods import ControlToken, Meet
    from harness_plugins.aligners.kto import Kto
    from harness_plugins.aligners.preference import Cdpo, Dpo, Ipo, Orpo
    from harness_plugins.aligners.sft import Sft

    yield Sft()
    yield Dpo()
    yield Cdpo()
    yield Ipo()
    yield Orpo()
    yield Kto()
    yield Meet()
    yield ControlToken()
    yield Coh()


@hookimpl
def register_adapters() -> Iterator[Adapter]:
    """LoRA, QLoRA, and full fine-tuning."""
    from harness_plugins.adapters.lora import Full, Lora, Qlora

    yield Lora()
    yield Qlora()
    yield Full()


@hookimpl
def register_mergers() -> Iterator[Merger]:
    """Means and arcs of weights, and what is done to differences from a base."""
    from harness_plugins.mergers.deltas import DareLinear, DareTies, TaskArithmetic, Ties
    from harness_plugins.mergers.linear import Linear
    from harness_plugins.mergers.spherical import Nuslerp, Slerp, SlerpDelta

    yield Linear()
    yield Slerp()
    yield SlerpDelta()
    yield Nuslerp()
    yield TaskArithmetic()
    yield Ties()
    yield DareLinear()
    yield DareTies()


@hookimpl
def register_engines() -> Iterator[Engine]:
    """transformers, vLLM, and any OpenAI-compatible URL."""
    from harness_plugins.engines.openai.engine import OpenAIEngine
    from harness_plugins.engines.transformers.engine import TransformersEngine
    from harness_plugins.engines.vllm.engine import VllmEngine

    yield TransformersEngine()
    yield VllmEngine()
    yield OpenAIEngine()


@hookimpl
def register_scorers() -> Iterator[Scorer]:
    """Classifiers, plain text comparison, and lm-eval's own metrics."""
    from harness_plugins.scorers.alpaca.scorer import AlpacaEvalScorer
    from harness_plugins.scorers.attack.judges import AttackClassifier, AttackLlm, RefusalScorer
    from harness_plugins.scorers.attack.together import Attack
    from harness_plugins.scorers.classifier import ClassifierScorer
    from harness_plugins.scorers.lm_eval import LmEvalScorer
    from harness_plugins.scorers.text import ExactMatch, Includes, Regex
    from harness_plugins.scorers.toxicity import ToxicityScorer

    yield ToxicityScorer()
    yield ClassifierScorer()
    yield ExactMatch()
    yield Includes()
    yield Regex()
    yield LmEvalScorer()
    yield Attack()
    yield RefusalScorer()
    yield AttackClassifier()
    yield AttackLlm()
    yield AlpacaEvalScorer()


@hookimpl
def register_datasets() -> Iterator[Dataset]:
    """Rows of the hub, of a file, RealToxicityPrompts, Red-Instruct's questions, and preferences to align with."""
    from harness_plugins.datasets.alpaca import AlpacaEval
    from harness_plugins.datasets.files import HubDataset, JsonlDataset, RealToxicityPrompts
    from harness_plugins.datasets.preferences import BeaverTails, HhRlhf, Summarize
    from harness_plugins.datasets.rated import BeaverTailsRated
    from harness_plugins.datasets.red_instruct import CategoricalHarmfulQA, DangerousQA, HarmfulQA
    from harness_plugins.datasets.trl import TrlFormats

    yield HubDataset()
    yield JsonlDataset()
    yield RealToxicityPrompts()
    yield DangerousQA()
    yield HarmfulQA()
    yield CategoricalHarmfulQA()
    yield AlpacaEval()
    yield HhRlhf()
    yield BeaverTails()
    yield BeaverTailsRated()
    yield Summarize()
    yield TrlFormats()


@hookimpl
def register_converters() -> Iterator[Converter]:
    """Pairs as demonstrations, and as rated answers."""
    from harness_plugins.datasets.converters import PairsToDemonstrations, PairsToRated

    yield PairsToDemonstrations()
    yield PairsToRated()


@hookimpl
def register_executors() -> Iterator[Executor]:
    """This machine, and the nodes of a Ray cluster."""
    from harness_plugins.executors.local import LocalExecutor
    from harness_plugins.executors.ray.executor import RayExecutor

    yield LocalExecutor()
    yield RayExecutor()


@hookimpl
def register_tasks() -> Iterator[Path]:
    """The folder of bundled task and suite YAML."""
    import harness_tasks

    yield Path(harness_tasks.__path__[0])
