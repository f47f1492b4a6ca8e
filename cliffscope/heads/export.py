"""How does an edit become a checkpoint that loads without CliffScope?

1. The edit is checked: it fits the model, acts at all positions, and needs no weight that the architecture lacks.
2. Under the edit, the model is written as a checkpoint (`model/export.py`).
3. A model card (README.md) and the edit as JSON are written beside it.

An edit of scope `all` is an edit of the output projection, so the exported model computes what the edited one does.
Knows nothing of how an edit was chosen: measurements are passed as tables and copied into the card.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch

from cliffscope import __version__
from cliffscope.errors import EditError
from cliffscope.heads.editing import check_constant, edited_weights
from cliffscope.heads.edits import EditPlan, HeadEdit, Scope
from cliffscope.model.export import (
    CARD,
    SHARD_BYTES,
    cast_weights,
    check_place,
    config_kept,
    note_dtype,
    stored_dtype,
    write_folder,
)
from cliffscope.model.load import LensModel

EDIT = "cliffscope_edit.json"
_SAFETY_COLUMNS = ("arm", "group", "n", "complied", "refused", "unfinished", "rate", "ci_low", "ci_high", "scope")
_EFFECT_COLUMNS = ("arm", "measure", "n", "value", "ci_low", "ci_high", "unit")
_RANDOM = "random"


def export_edited(
    model: LensModel,
    edit: HeadEdit | EditPlan,
    out: str | Path,
    *,
    why: str = "",
    safety: pd.DataFrame | None = None,
    side_effects: pd.DataFrame | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes an edited model as a Hugging Face checkpoint that plain `transformers` loads.

    Args:
        model: the model; it is unchanged afterwards.
        edit: one or several, with scope `all`, of a kind that the architecture can hold in its weights.
        out: directory to be made; its parents are made too.
        why: for the model card: how the edit was chosen.
        safety: what `SafetyReport.to_frame` gave, for the model card.
        side_effects: what `SideEffects.to_frame` gave, for the model card.
        dtype: of the written weights; None keeps the source checkpoint's own where it can be read (on a CPU a model is
            computed in fp32 whatever it was stored in), else that of the loaded weights, as for a dequantised GGUF.
        overwrite: replace a checkpoint that is there. Off by default: an export takes nothing away.
        shard_bytes: size of one safetensors file at most.

    Returns:
        The directory.

    Raises:
        EditError: the edit is for another model, has another scope than `all`, or cannot be held in weights.
        UnsupportedModelError: the weights are a HookedTransformer's, folded or arranged as another architecture's.
        StoreError: the directory exists, or cannot be written, such as on a full disk; nothing is left behind.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.organisms.load("planted-llama")
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> edit = cs.zero(cs.organisms.read_truth("planted-llama").planted)
        >>> sorted(p.name for p in cs.export_edited(model, edit, f"{folder}/edited").iterdir())[:3]
        ['README.md', 'chat_template.jinja', 'cliffscope_edit.json']
    """
    _check_scope(model, edit)
    place = Path(out).absolute()
    check_place(place, model, overwrite=overwrite)
    stored = dtype or stored_dtype(model)
    card = _model_card(model, edit, why=why, dtype=stored, safety=safety, side_effects=side_effects)

    def write(folder: Path) -> None:
        _write_model(model, edit, folder, stored, shard_bytes)
        (folder / EDIT).write_text(json.dumps(edit.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")

    write_folder(place, write, overwrite=overwrite)
    return Path(out)


def _check_scope(model: LensModel, edit: HeadEdit | EditPlan) -> None:
    edit.check(model)
    check_constant(edit)
    if not edit.heads:
        raise EditError("The edit names no head, so there is nothing to export. Give one with heads.")
    if edit.scope is not Scope.ALL:
        raise EditError(
            f"The edit has scope {str(edit.scope)!r}; weights act at all positions and can hold scope 'all' alone. "
            "Make it with scope='all', and measure that with evaluate_safety before exporting."
        )


def _write_model(
    model: LensModel, edit: HeadEdit | EditPlan, folder: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    names = set(model.hf.state_dict())
    with edited_weights(model, edit), config_kept(model):
        state = model.hf.state_dict()
        _refuse_new_weights(sorted(set(state) - names), model, edit)
        model.hf.save_pretrained(
            folder, state_dict=cast_weights(state, dtype), max_shard_size=shard_bytes, is_main_process=True
        )
    note_dtype(folder / "config.json", dtype)
    model.tokenizer.save_pretrained(folder)


def _refuse_new_weights(new: list[str], model: LensModel, edit: HeadEdit | EditPlan) -> None:
    if new:
        raise EditError(
            f"{edit!r} needs the weight {new[0]!r}, which {type(model.hf).__name__} does not have: its output "
            "projection has no bias, and whoever loads the checkpoint would leave it out. Export a zero or scale edit "
            "(cs.zero, cs.scale), which need none, or use this edit with edited_weights."
        )


def _model_card(
    model: LensModel,
    edit: HeadEdit | EditPlan,
    *,
    why: str,
    dtype: torch.dtype,
    safety: pd.DataFrame | None,
    side_effects: pd.DataFrame | None,
) -> str:
    name = _inline(Path(model.name).name)
    stored = str(dtype).removeprefix("torch.")
    parts = [
        "---\nlibrary_name: transformers\ntags:\n- cliffscope\n- attention-head-edit\n---",
        f"# {name}, edited",
        "A research artefact: the model below with some attention heads edited in its weights, written by CliffScope "
        f"{__version__}. It loads with plain `transformers`. Nothing was trained.",
        "## What was edited",
        f"`{edit!r}` of `{name}` ({type(model.hf).__name__}, fingerprint before the edit `{model.fingerprint}`), in "
        f"the output projections. Heads: {', '.join(str(head) for head in edit.heads)}. The edit as data: `{EDIT}`. "
        f"Weights are stored as {stored}; the model was loaded as {str(model.dtype).removeprefix('torch.')}.",
        "## Why",
        why.strip() or "No reason was given.",
        "## Measured",
        *_measured(safety, _SAFETY_COLUMNS, "Outcomes (`rate`: ASR on harmful prompts, over-refusal on harmless ones)"),
        *_scope_note(safety, side_effects),
        *_measured(side_effects, _EFFECT_COLUMNS, "Side effects, edited against unedited"),
    ]
    if safety is None and side_effects is None:
        parts.append("Nothing that was measured was given to this export. Measure before relying on the edit.")
    return "\n\n".join(parts) + "\n"


def _scope_note(*tables: pd.DataFrame | None) -> list[str]:
    """That what was measured is not what the checkpoint does, where the edit was measured over another scope."""
    scopes = {str(scope) for table in tables if table is not None and "scope" in table for scope in table["scope"]}
    others = sorted(scopes - {"", "all"})
    if not others:
        return []
    return [
        f"These were measured with the edit on the {', '.join(others)} alone. In this checkpoint it acts at all "
        "positions, the thinking included: measure that before relying on it (`cs.zero(heads, scope='all')`)."
    ]


def _measured(frame: pd.DataFrame | None, columns: Iterable[str], title: str) -> list[str]:
    """A table in Markdown; of the random arms the mean alone."""
    if frame is None or frame.empty:
        return []
    shown = [name for name in columns if name in frame]
    kinds = frame["kind"] if "kind" in frame else pd.Series("", index=frame.index)
    rows = [[_shown(value) for value in row] for row in frame.loc[kinds != _RANDOM, shown].itertuples(index=False)]
    random = frame[kinds == _RANDOM]
    by = [name for name in ("group", "measure") if name in frame]
    value = "rate" if "rate" in frame else "value"
    for names, part in random.groupby(by, sort=False, dropna=False) if by else ():
        cells = {**dict(zip(by, names, strict=True)), "arm": f"random, mean of {len(part)}", value: part[value].mean()}
        rows.append([_shown(cells.get(name, "")) for name in shown])
    lines = [shown, ["---"] * len(shown), *rows]
    return [f"{title}:", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _inline(str(value))


def _inline(text: str) -> str:
    """Text that can neither leave its line nor its code span or cell."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/")
