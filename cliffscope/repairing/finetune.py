"""How is a model taught to act on the intention it has?

1. The chosen transcripts get a safe answer behind their own thinking; a share of harmless transcripts with the answers
   that the model gave them is mixed in, so that it does not learn to refuse everything.
2. TRL's trainer fine-tunes a copy of the model: a LoRA adapter, merged at the end, or all weights of a small model. The
   loss counts on the answer alone (on request, on the closing too).
3. The result is an ordinary checkpoint, written whole or not at all; a run that was stopped goes on from its last save.

Source: fine-tuning on selected examples, arXiv 2510.06036, section 5. Knows nothing of how examples were chosen.
"""

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from cliffscope.errors import DataError, MissingExtraError
from cliffscope.memory import few_threads
from cliffscope.model.export import check_place, write_checkpoint
from cliffscope.model.load import LensModel
from cliffscope.repairing.formats import SAFE_ANSWER, Answer, Example, LossOn, examples, with_safe_answer
from cliffscope.selection.choice import Selection
from cliffscope.transcripts.records import Outcome, Transcript, Transcripts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

RANK = 16
"""Rank of the LoRA adapter."""
SAVES, LOOKS = 5, 10
"""Saves of a training, and looks at what is held out."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Repaired:
    """A repaired model on disk."""

    path: Path
    """The checkpoint."""
    losses: pd.DataFrame
    """step, loss, held_out: of the training; held_out is NaN but where the examples held out were looked at."""
    n_harmful: int
    """Examples with a safe answer."""
    n_harmless: int
    """Harmless examples that were mixed in."""

    def __repr__(self) -> str:
        """One line: where, and on how many examples."""
        return f"Repaired({str(self.path)!r}, {self.n_harmful} harmful and {self.n_harmless} harmless examples)"


def repair(
    model: LensModel,
    selection: Transcripts | Selection,
    out: str | Path,
    *,
    harmless: Transcripts = Transcripts(),
    harmless_share: float = 0.5,
    answer: Answer = SAFE_ANSWER,
    loss_on: LossOn = "answer",
    lora_rank: int | None = None,
    steps: int | None = None,
    epochs: float = 3.0,
    batch_size: int = 8,
    learning_rate: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    work: str | Path | None = None,
) -> Repaired:
    """Fine-tunes a copy of the model on chosen transcripts.

    Args:
        model: the model; it is unchanged afterwards.
        selection: what was selected, or harmful transcripts with thinking.
        out: directory of the checkpoint to be made.
        harmless: transcripts with the answers that are to stay; those that were not complied with are not taken.
        harmless_share: share of the examples that are harmless, in [0, 1); as many as there are if there are fewer.
        answer: the safe answer, or a function of each transcript.
        loss_on: "answer", or "closing" to count the closing too.
        lora_rank: 0 trains all weights; None takes an adapter of rank 16 unless the model is small.
        steps: of the optimiser; None goes by `epochs`.
        epochs: passes over the examples.
        batch_size: examples a step.
        learning_rate: None takes 2e-4 for an adapter and 5e-5 for all weights, at which a small model of this kind
            changes within a few dozen steps.
        patience: stop once the loss on a tenth of the examples, held out, has not fallen in so many of ten looks at it,
            and keep the weights of the best look; None trains on all examples for all steps.
        seed: of order, adapter and what is held out.
        work: directory for saves, from which a stopped run goes on; None keeps none.

    Returns:
        Where it is, and the losses.

    Raises:
        DataError: there is no example, one is beyond the context, or a number is out of its range.
        MissingExtraError: the packages trl and peft are missing.
        StoreError: the directory exists or cannot be written.
    """
    taken = selection.selected if isinstance(selection, Selection) else selection
    _check(taken, share=harmless_share, epochs=epochs, batch_size=batch_size, steps=steps, patience=patience)
    check_place(Path(out).absolute(), model, overwrite=False)
    mixed = _mixed(harmless, len(taken), harmless_share, seed)
    data = examples(
        [*with_safe_answer(taken, answer), *mixed],
        model.tokenizer,
        model.template,
        loss_on=loss_on,
        max_length=model.shape.context - 1,
    )
    trained_on, held_out = (data, []) if patience is None else _hold_out(data, seed)
    network, losses = _train(
        model,
        trained_on,
        held_out,
        rank=_rank(model, lora_rank),
        steps=steps if steps is not None else math.ceil(epochs * len(trained_on) / batch_size),
        patience=patience,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        work=work,
    )
    card = _card(model, len(taken), len(mixed), loss_on, losses)
    path = write_checkpoint(network, model, out, card=card)
    return Repaired(path=path, losses=losses, n_harmful=len(taken), n_harmless=len(mixed))


def _check(
    selected: Transcripts, *, share: float, epochs: float, batch_size: int, steps: int | None, patience: int | None
) -> None:
    if not len(selected):
        raise DataError("No transcript was given to repair on. Choose some with select_by_cliff.")
    if (
        not 0 <= share < 1
        or not epochs > 0
        or batch_size < 1
        or any(n is not None and n < 1 for n in (steps, patience))
    ):
        raise DataError(
            f"harmless_share={share}, epochs={epochs}, batch_size={batch_size}, steps={steps}, patience={patience}: "
            "expected a share in [0, 1), and numbers above 0."
        )


def _hold_out(data: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Nine tenths of the examples to train on, and a tenth, at least one."""
    if len(data) < 2:
        raise DataError("One example cannot be trained on and held out at once. Give more, or patience=None.")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    away = set(order[: max(1, len(data) // 10)])
    return [e for i, e in enumerate(data) if i not in away], [e for i, e in enumerate(data) if i in away]


def _mixed(harmless: Transcripts, n: int, share: float, seed: int) -> Sequence[Transcript]:
    """As many harmless transcripts as make up the share, drawn with the seed."""
    usable = [t for t in harmless if t.answer and t.outcome in (Outcome.COMPLIED, Outcome.UNJUDGED)]
    count = min(len(usable), round(n * share / (1 - share)))
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed)).tolist()
    return [usable[i] for i in sorted(order[:count])]


def _rank(model: LensModel, rank: int | None) -> int:
    if rank is not None:
        return rank
    # An adapter saves nothing on a small model.
    return 0 if model.small else RANK


def _train(
    model: LensModel,
    data: Sequence[Example],
    held_out: Sequence[Example],
    *,
    rank: int,
    steps: int,
    patience: int | None,
    batch_size: int,
    learning_rate: float | None,
    seed: int,
    work: str | Path | None,
) -> "tuple[PreTrainedModel, pd.DataFrame]":
    try:
        from peft import LoraConfig
        from transformers import EarlyStoppingCallback, PrinterCallback
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer
    except ImportError as error:
        raise MissingExtraError("Repairing needs trl and peft: pip install 'cliffscope[repair]'.") from error
    adapter = (
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM") if rank else None
    )
    rate = learning_rate or (2e-4 if rank else 5e-5)
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory()) if work is None else str(work)
        options = _options(model, place, steps=steps, batch_size=batch_size, rate=rate, seed=seed)
        options |= _saving(steps, keep=work is not None, watch=patience is not None)
        stack.enter_context(warnings.catch_warnings())
        # What TRL and PEFT use of transformers under names that are about to change.
        warnings.simplefilter("ignore", FutureWarning)
        stack.enter_context(few_threads(small=model.small))
        trainer = SFTTrainer(
            model=model.copy_network(),
            args=SFTConfig(**options),
            train_dataset=_rows(data),
            eval_dataset=_rows(held_out) if held_out else None,
            processing_class=model.tokenizer,
            peft_config=adapter,
            callbacks=[] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)],
        )
        # The losses are in the result; nothing is printed besides.
        trainer.remove_callback(PrinterCallback)
        saved = any(Path(place).glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=True if saved else None)
    held: Any = trainer.model
    trained: PreTrainedModel = held.merge_and_unload() if rank else held
    trained.train(False)
    return trained, _losses(trainer.state.log_history)


def _rows(data: Sequence[Example]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in data])


def _options(model: LensModel, place: str, *, steps: int, batch_size: int, rate: float, seed: int) -> dict[str, Any]:
    return {
        "output_dir": place,
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "max_length": None,
        "packing": False,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": model.device.type == "cpu",
        "dataloader_pin_memory": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def _saving(steps: int, *, keep: bool, watch: bool) -> dict[str, Any]:
    """When the trainer saves, and whether it looks at what is held out and goes back to the best look."""
    every = max(1, steps // (LOOKS if watch else SAVES))
    options = {"save_strategy": "steps" if keep or watch else "no", "save_steps": every, "save_total_limit": 1}
    if not watch:
        return options
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return {**options, **best, "eval_strategy": "steps", "eval_steps": every}


def _losses(history: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """Loss a step, and the held-out loss at the steps where it was looked at."""
    looks = {int(row["step"]): row["eval_loss"] for row in history if "eval_loss" in row}
    logged = [(int(row["step"]), row["loss"]) for row in history if "loss" in row]
    rows = [(step, loss, looks.get(step, float("nan"))) for step, loss in logged]
    return pd.DataFrame(rows, columns=["step", "loss", "held_out"])


def _card(model: LensModel, n_harmful: int, n_harmless: int, loss_on: str, losses: pd.DataFrame) -> str:
    last = f"; the last loss was {losses['loss'].iloc[-1]:.4g}" if len(losses) else ""
    return (
        f"# {Path(model.name).name}, repaired\n\n"
        f"A research artefact: fine-tuned by CliffScope on {n_harmful} harmful transcripts with a safe answer behind "
        f"their own thinking, and {n_harmless} harmless ones with their own answers. Loss on the {loss_on}; "
        f"{len(losses)} steps{last}. Fingerprint of the model before: `{model.fingerprint}`.\n\n"
        "Measure attack success, over-refusal and ordinary ability before relying on it.\n"
    )
