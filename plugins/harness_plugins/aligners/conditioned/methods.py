"""MEET and control tokens: a model is trained under what stands for the value of each rated answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness import Aligner, ArtifactFiles, Stage, TrainerCall, TrainingJob, write_conditioning
from harness_plugins.aligners.conditioned.values import (
    ConditionedRecipe,
    default_control,
    exported_preferences,
    value_keys,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER: dict[str, Any] = {"rank": 64, "alpha": 16, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}
_RATES = {"prompt": 3e-2, "lora": 1e-3}
_ORDERS = (("control",), ("model",), ("control", "model"))


class Meet(Aligner["Meet.Config"]):
    """Control is optimised alone with the language model frozen, then the model is tuned under it."""

    name = "meet"
    summary = "MEET: control prompts or adapters trained alone, then the model under them (arXiv 2310.00819)"
    consumes = "rated"

    class Config(ConditionedRecipe):
        """The recipe's settings are those of the stage ``model``; of Xue, Wang and Ji's lengths 20 is the default."""

        control: Literal["prompt", "lora"] = Field(
            "prompt", description="what stands for a value: virtual tokens, or a low-rank update"
        )
        tokens: int = Field(20, ge=1, le=100, description="virtual tokens per value (tokens; control: prompt)")
        control_rank: int = Field(16, ge=1, le=64, description="rank of the update (control: lora)")
        control_alpha: int = Field(32, ge=1, description="the update is scaled by control_alpha / control_rank")
        control_targets: tuple[str, ...] = Field(
            ("q_proj", "v_proj"), min_length=1, description="names of linear layers (control: lora)"
        )
        stages: tuple[Literal["control", "model"], ...] = Field(
            ("control", "model"),
            description="what is trained: [control] alone, [model] with its control in one go, or one after the other",
        )
        control_steps: int = Field(300, ge=1, description="optimiser steps of the stage control")
        control_rate: float | None = Field(
            None,
            gt=0,
            description="learning rate of the stage control (no unit); null: 0.03 for prompt, 0.001 for lora",
        )
        freeze_control: bool = Field(False, description="keep the control as the first stage left it")

        adapter_defaults: ClassVar[dict[str, Any]] = ADAPTER

        @model_validator(mode="after")
        def _in_order(self) -> Meet.Config:
            if self.stages not in _ORDERS:
                raise ValueError(f"stages is {list(self.stages)}; write [control], [model] or [control, model]")
            if self.freeze_control and self.stages != ("control", "model"):
                raise ValueError("freeze_control keeps what the stage control has trained: stages=[control, model]")
            return self

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """Those that the recipe names; the first with a length and a rate of its own."""
        rate = config.control_rate or _RATES[config.control]
        known = {
            "control": Stage("control", "rated", config.control_steps, {"learning_rate": rate}),
            "model": Stage("model", "rated"),
        }
        return tuple(known[name] for name in config.stages)

    def controls(self, config: Config) -> dict[str, tuple[str, ...]]:
        """The values of the recipe."""
        return config.preferences

    def attach(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        """Add the control of every value."""
        from harness_plugins.aligners.conditioned.controls import LoraControl, SoftControl

        keys = value_keys(config.preferences)
        if config.control == "prompt":
            model.control = SoftControl(keys, config.tokens, model.get_input_embeddings())
        else:
            shape = (config.control_rank, config.control_alpha, config.control_targets)
            model.control = LoraControl(keys, *shape, model)

    def trainer(self, job: TrainingJob[Config]) -> TrainerCall:
        """The same trainer for both stages, on other weights."""
        from harness_plugins.aligners.conditioned.trainer import hold_still, trainer_call

        alone = job.stage.name == "control"
        hold_still(job.model, control=alone or not job.config.freeze_control, rest=not alone)
        return trainer_call(job, self.name)

    def export(self, job: TrainingJob[Config], model: Any, files: ArtifactFiles) -> None:
        """Vectors or adapters of every value; the default is the first."""
        export_control(job, model, files)


class ControlToken(Aligner["ControlToken.Config"]):
    """One phrase or one trained embedding per value, in the prompt while the model is trained."""

    name = "control-token"
    summary = "the model trained under one phrase, or one trained embedding, per value"
    consumes = "rated"

    class Config(ConditionedRecipe):
        """A written phrase by default; no vocabulary grows, so the base stays servable."""

        control: Literal["text", "embedding"] = Field(
            "text", description="a written phrase per value, or one embedding that is trained with the model"
        )
        phrases: dict[str, str] = Field(
            default_factory=dict,
            description="value (PREFERENCE=VALUE with several preferences) -> its phrase; left out: <VALUE>, a space",
        )

        adapter_defaults: ClassVar[dict[str, Any]] = ADAPTER

        @model_validator(mode="after")
        def _told_apart(self) -> ControlToken.Config:
            keys = value_keys(self.preferences)
            if strange := [key for key in self.phrases if key not in keys]:
                raise ValueError(f"phrases names {strange[0]!r}, and the values are: {', '.join(keys)}")
            texts = list(self.texts().values())
            if len(set(texts)) < len(texts) or not all(texts):
                raise ValueError(f"phrases must differ, and none be empty: {texts}")
            return self

        def texts(self) -> dict[str, str]:
            """The phrase of every value."""
            return {key: self.phrases.get(key, f"<{key}> ") for key in value_keys(self.preferences)}

    def controls(self, config: Config) -> dict[str, tuple[str, ...]]:
        """The values of the recipe."""
        return config.preferences

    def attach(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        """Add the phrases, or the embeddings."""
        from harness_plugins.aligners.conditioned.controls import SoftControl, TextControl

        if config.control == "text":
            model.control = TextControl(config.texts(), tokenizer)
        else:
            model.control = SoftControl(value_keys(config.preferences), 1, model.get_input_embeddings())

    def trainer(self, job: TrainingJob[Config]) -> TrainerCall:
        """The model and its control in one go."""
        from harness_plugins.aligners.conditioned.trainer import trainer_call

        return trainer_call(job, self.name)

    def export(self, job: TrainingJob[Config], model: Any, files: ArtifactFiles) -> None:
        """The phrase or the vector of every value; the default is the first."""
        export_control(job, model, files)


def export_control(job: TrainingJob[Any], model: Any, files: ArtifactFiles) -> None:
    """Write a model's control as the conditioning of its adapter."""
    config: ConditionedRecipe = job.config
    write_conditioning(
        files,
        model.control.exported(),
        default=default_control(config.preferences),
        position=config.position,
        preferences=exported_preferences(config.preferences),
    )
