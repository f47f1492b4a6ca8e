"""From which save does a stopped training go on, and what was a repaired model trained on?

1. A directory of saves belongs to one training: the same model, examples and settings, by content. The number of steps
   is not among them, since it only says when to end.
2. A save counts once the trainer has written all of it, which a mark in its folder says. A save without the mark, or
   beyond the last step, is removed.
3. A repaired checkpoint holds keys of the prompts that it was trained on, so that nobody measures it on them.

Knows the trainer's folders, no training.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cliffscope.errors import DataError
from cliffscope.model.load import LensModel
from cliffscope.repairing.formats import Example
from cliffscope.selection.criteria import prompt_key
from cliffscope.store import open_run
from cliffscope.transcripts.records import Transcript, Transcripts
from cliffscope.writing import flush_directory, flush_file, remove

RECORD = "cliffscope_repair.json"
"""In a repaired checkpoint: the model before, and the prompts that it was trained on."""
MARK = "complete"
"""In a folder of the trainer: all of it was written."""


def training_config(
    model: LensModel, data: Sequence[Example], held_out: Sequence[Example], settings: Mapping[str, object]
) -> dict[str, object]:
    """What a training's saves depend on, JSON-ready.

    Args:
        model: that is trained.
        data: examples to train on.
        held_out: examples to look at.
        settings: everything else but the number of steps.
    """
    return {
        "command": "repair",
        "model": model.fingerprint,
        "template": model.template.name,
        "examples": _digest(data),
        "held_out": _digest(held_out),
        **settings,
    }


@contextmanager
def open_saves(folder: str | Path, config: Mapping[str, object]) -> Iterator[Path]:
    """Opens a directory of saves; StoreError where it belongs to another training or is in use."""
    with open_run(folder, config) as store:
        # Without a finished stage, a run directory accepts another configuration.
        if not store.finished("opened"):
            store.finish("opened", 0.0)
        yield store.path


def last_save(folder: Path, steps: int) -> Path | None:
    """The last whole save up to a step; None if there is none. All others are removed."""
    saves = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    whole = {step: path for step, path in saves.items() if step <= steps and (path / MARK).is_file()}
    last = max(whole, default=None)
    for step, path in saves.items():
        if step != last:
            remove(path)
    return None if last is None else whole[last]


class MarkSaves(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Marks each save once all of it is on the disk."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_options: object
    ) -> None:
        """Flushes the trainer's last folder, then marks it."""
        del control
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for path in folder.iterdir():
            flush_file(path)
        (folder / MARK).touch()
        flush_directory(folder)


def training_record(model: LensModel, trained_on: Iterable[Transcript]) -> str:
    """What a repaired checkpoint says of its training, as JSON."""
    record = {"fingerprint": model.fingerprint, "trained_on": sorted({prompt_key(t.prompt) for t in trained_on})}
    return json.dumps(record, indent=1) + "\n"


def check_not_trained_on(model: LensModel, prompts: Transcripts) -> None:
    """Raises DataError where a repaired model was trained on one of the prompts, as its checkpoint records."""
    path = Path(model.name) / RECORD
    if not path.is_file():
        return
    try:
        keys = set(json.loads(path.read_text(encoding="utf-8"))["trained_on"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Repair the model again.") from error
    seen = [t.id for t in prompts if prompt_key(t.prompt) in keys]
    if seen:
        raise DataError(
            f"{model.name!r} was trained on {len(seen)} of these {len(prompts)} prompts, such as that of {seen[0]!r}. "
            "What is measured on them says nothing about others. Give prompts that it was not trained on."
        )


def _digest(examples: Sequence[Example]) -> str:
    text = json.dumps([[list(e.input_ids), list(e.labels)] for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
