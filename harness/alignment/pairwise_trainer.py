"""TRL's DPO trainer with a plugin's loss in place of its own.

TRL 1.16 computes its losses in one chain inside ``_compute_loss``, so what a subclass can hold on to are
``_prepare_dataset`` (rows come tokenised, with reference log-probabilities) and ``compute_loss``. Heavy: imported when
training starts.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar, Protocol

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer import add_fused_lm_head

from harness.alignment.heldout import ACCURACY, LOSS, MARGIN
from harness.alignment.prefix_sharing import PrefixCollator, refuse_unless_exact, shared_logps
from harness.contracts.aligner import PairLogps, TrainerCall, TrainingJob
from harness.core.errors import StepError


class Method(Protocol):
    """What the trainer asks of a :class:`harness.PairwiseLoss`."""

    name: ClassVar[str]
    needs_reference: ClassVar[bool]

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: Any) -> torch.Tensor:
        """The loss of each pair, (B,)."""

    def rewards(self, policy: PairLogps, reference: PairLogps | None, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Implicit rewards of the chosen and the rejected answers, each (B,)."""


class PairwiseTrainer(DPOTrainer):  # type: ignore[misc]  # mypy does not follow trl
    """Trains on tokenised pairs with the loss of a :class:`harness.PairwiseLoss`."""

    def __init__(self, method: Method, config: Any, **arguments: Any) -> None:
        self._method, self._method_config = method, config
        self._of_pairs: defaultdict[str, list[float]] = defaultdict(list)
        trainable = {n: p.data for n, p in arguments["model"].named_parameters() if p.requires_grad}
        super().__init__(**arguments)
        # TRL copies an adapter that is already there as its reference; ours is computed beforehand.
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")
        # TRL casts the trainable weights over a 4-bit base to bf16, where small updates round away.
        for name, parameter in self.model.named_parameters():
            if name in trainable:
                if parameter.dtype != trainable[name].dtype:
                    parameter.data = trainable[name].to(parameter.device)
                parameter.requires_grad_(True)
        # TRL's head computes entropies and mean logits too, which nothing here reads.
        add_fused_lm_head(self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        # They came with the rows.
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the method's loss over the pairs of a micro batch; rewards go to the log."""
        policy, reference = self._both(model, inputs)
        trained = torch.is_grad_enabled()
        loss_B = losses(self._method, policy, reference, self._method_config, trained=trained)
        with torch.no_grad():
            chosen_B, rejected_B = rewards(self._method, policy, reference, self._method_config)
            values = {
                "rewards/chosen": chosen_B,
                "rewards/rejected": rejected_B,
                "rewards/margins": chosen_B - rejected_B,
                "rewards/accuracies": chosen_B > rejected_B,
                "logps/chosen": policy.chosen,
                "logps/rejected": policy.rejected,
            }
            gathered_BV = self.accelerator.gather_for_metrics(torch.stack([v.float() for v in values.values()], dim=1))
            # Pair by pair, so that what is logged is a mean over pairs, whatever the batches.
            for name, per_pair in zip(values, gathered_BV.T.tolist(), strict=True) if trained else ():
                self._of_pairs[name].extend(per_pair)
        loss = loss_B.mean()
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What the trainer logs in training, with the means over all pairs since the last time."""
        if self.model.training:
            logs.update({name: sum(values) / len(values) for name, values in self._of_pairs.items()})
            self._of_pairs.clear()
        super().log(logs, start_time)

    def _both(self, model: Any, inputs: dict[str, Any]) -> tuple[PairLogps, PairLogps | None]:
        policy = shared_logps(model, inputs) if "segments" in inputs else pair_logps(model, inputs)
        if not self._method.needs_reference:
            return policy, None
        chosen_B, rejected_B = (inputs[f"ref_{which}_logps"].to(policy.chosen) for which in ("chosen", "rejected"))
        return policy, PairLogps(chosen_B, rejected_B, policy.chosen_tokens, policy.rejected_tokens)

    def row_values(self, model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Loss and rewards of each held-out pair, (B,)."""
        policy, reference = self._both(model, inputs)
        chosen_B, rejected_B = rewards(self._method, policy, reference, self._method_config)
        return {
            LOSS: losses(self._method, policy, reference, self._method_config, trained=False),
            ACCURACY: (chosen_B > rejected_B).float(),
            MARGIN: chosen_B - rejected_B,
            "rewards/chosen": chosen_B,
            "rewards/rejected": rejected_B,
        }


def pair_logps(model: Any, inputs: dict[str, Any]) -> PairLogps:
    """Summed log-probabilities of the answers.

    Args:
        model: with TRL's fused LM head, which projects only the positions that are scored.
        inputs: of TRL's preference collator: ``input_ids``, ``attention_mask``, ``completion_mask``, each (2B, T),
            chosen answers first.
    """
    mask_BT = inputs["completion_mask"]
    labels_BT = inputs["input_ids"].masked_fill(mask_BT == 0, -100)
    outputs = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=labels_BT,
        use_cache=False,
        fused_lm_head=True,
    )
    length = mask_BT.size(1) - 1
    logps_B = outputs.log_probs[:, -length:].float().sum(dim=1)
    tokens_B = mask_BT[:, 1:].sum(dim=1)
    chosen, rejected = logps_B.chunk(2)
    chosen_tokens, rejected_tokens = tokens_B.chunk(2)
    return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)


def losses(
    method: Method, policy: PairLogps, reference: PairLogps | None, config: Any, *, trained: bool
) -> torch.Tensor:
    """What `PairwiseLoss.loss` returns, held to its contract: anything else would be averaged in silence.

    Args:
        method: the aligner.
        policy: log-probabilities under the model in training.
        reference: as the method is given it.
        config: of the method.
        trained: whether the mean is to be minimised, so that it must depend on the policy.

    Returns:
        (B,) loss per pair.

    Raises:
        StepError: no tensor, another shape (with both), no gradient, or a use of the reference that is not there.
    """
    (loss_B,) = _asked(method, "loss", 1, (policy, reference, config))
    if trained and not loss_B.requires_grad:
        raise _fault(
            method, "`loss` returned a tensor without a gradient: it does not depend on the policy, or is detached"
        )
    return loss_B


def rewards(
    method: Method, policy: PairLogps, reference: PairLogps | None, config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `PairwiseLoss.rewards` returns, held to its contract as :func:`losses` is."""
    chosen_B, rejected_B = _asked(method, "rewards", 2, (policy, reference, config))
    return chosen_B, rejected_B


def _asked(
    method: Method, name: str, count: int, given: tuple[PairLogps, PairLogps | None, Any]
) -> tuple[torch.Tensor, ...]:
    """One of a method's two functions: ``count`` tensors, each with one number per pair."""
    policy, reference, config = given
    try:
        found = getattr(method, name)(*given)
    except (AttributeError, TypeError, AssertionError):
        if reference is None and _works(method, name, (policy, policy, config)):
            raise _fault(method, f"`{name}` uses the reference, and `needs_reference` is False") from None
        raise
    tensors = found if isinstance(found, tuple) else (found,)
    seen = [f"shape {list(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__ for t in tensors]
    wanted = [f"shape {list(policy.chosen.shape)}"] * count
    if seen != wanted:
        raise _fault(method, f"`{name}` returned {', '.join(seen)} for pairs of {', '.join(wanted)}")
    return tensors


def _works(method: Method, name: str, given: tuple[PairLogps, PairLogps, Any]) -> bool:
    """Whether a function that failed without a reference works with one."""
    try:
        getattr(method, name)(*given)
    except Exception:
        return False
    return True


def _fault(method: Method, what: str) -> StepError:
    return StepError(
        f"aligner {method.name}", what, "This is a fault of the method: `harness.testing.check_aligner` finds such."
    )


def trainer_call(method: Method, job: TrainingJob) -> TrainerCall:
    """The trainer of one stage, not yet built.

    Raises:
        UserError: prefix sharing that would not be exact.
    """
    arguments = job.arguments(
        DPOConfig,
        # The adapter's own dropout is part of the recipe; TRL's default would set it to 0.
        disable_dropout=False,
        # Without this TRL loads a second copy of a model that is trained whole.
        precompute_ref_log_probs=not hasattr(job.model, "peft_config"),
        max_length=None,
        remove_unused_columns=False,
        beta=getattr(job.config, "beta", 0.1),
    )
    collator = None
    if getattr(job.config, "prefix_sharing", False):
        refuse_unless_exact(job.model.config)
        pad = job.tokenizer.pad_token_id if job.tokenizer.pad_token_id is not None else job.tokenizer.eos_token_id
        collator = PrefixCollator(int(pad))
    return TrainerCall(
        PairwiseTrainer,
        {
            "method": method,
            "config": job.config,
            "model": job.model,
            "args": arguments,
            "train_dataset": job.rows,
            "eval_dataset": job.heldout,
            "processing_class": job.tokenizer,
            "data_collator": collator,
        },
    )
