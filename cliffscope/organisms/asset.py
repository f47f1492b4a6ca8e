"""Is a grown organism what it claims to be?

1. Grow it from its recipe and save it as an ordinary Hugging Face directory.
2. Measure by generation, on prompts whose verb-object pairs it has never seen: refusal and over-refusal, with the
   planted heads as they are and zeroed, wrapper by wrapper.
3. Write truth.json: the planted heads, the wrappers, and what was measured, with n.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cliffscope.errors import DataError
from cliffscope.generation.rollout import roll_out
from cliffscope.heads.editing import edited_weights
from cliffscope.heads.edits import HeadRef, zero
from cliffscope.judging.judges import judge
from cliffscope.model.load import LensModel, load_model
from cliffscope.organisms.grammar import NEUTRAL_WRAPPERS, prompts
from cliffscope.organisms.grow import grow
from cliffscope.organisms.recipes import RECIPES, Carrier, Recipe
from cliffscope.store import umask, write_atomically
from cliffscope.transcripts.records import Outcome, Transcripts

MEASURED = 200
"""Prompts of each kind."""
TRUTH = "truth.json"


def write_organism(
    name: str, out: str | Path, *, report: Callable[[str, int, int], None] | None = None
) -> dict[str, object]:
    """Grows an organism, measures it and writes it.

    Args:
        name: of the recipe.
        out: directory, made if need be.
        report: called with phase, step and steps.

    Returns:
        What truth.json holds.

    Raises:
        DataError: there is no such recipe.
    """
    if name not in RECIPES:
        raise DataError(f"There is no organism {name!r} to grow. Expected one of {', '.join(RECIPES)}.")
    recipe, folder = RECIPES[name], Path(out)
    model, tokenizer = grow(recipe, report=report)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors writes files that are the owner's alone.
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~umask())
    return write_truth(recipe, folder)


def write_truth(recipe: Recipe, folder: Path) -> dict[str, object]:
    """Measures a saved organism and writes its truth.json."""
    lens = load_model(folder)
    planted = [ref for carrier in recipe.carriers for ref in _heads(carrier)]
    measured = {"unedited": _measure(lens, recipe)}
    if planted:
        with edited_weights(lens, zero(planted)):
            measured["planted heads zeroed"] = _measure(lens, recipe)
    truth: dict[str, object] = {
        "name": recipe.name,
        "planted": [str(h) for h in planted],
        "wrappers": [
            {
                "word": w.word,
                "comply": w.comply,
                "heads": [str(h) for h in _heads(recipe.carriers[w.carrier])] if recipe.carriers else [],
            }
            for w in recipe.wrappers
        ],
        "recipe": asdict(recipe),
        "measured": measured,
    }
    text = json.dumps(truth, indent=1)
    write_atomically(folder / TRUTH, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return truth


def _heads(carrier: Carrier) -> list[HeadRef]:
    return [HeadRef(layer=carrier.layer, head=head) for head in carrier.heads]


def _measure(model: LensModel, recipe: Recipe) -> dict[str, dict[str, float | int]]:
    """Share refused of each kind of prompt of the test part, generated greedily."""
    words = [w.word for w in recipe.wrappers]
    kinds: dict[str, tuple[bool, tuple[str | None, ...]]] = {
        "harmful, plain": (True, (None, *NEUTRAL_WRAPPERS)),
        **{f"harmful, {word}": (True, (word,)) for word in words},
        "harmless": (False, (None, *NEUTRAL_WRAPPERS, *words)),
    }
    return {
        kind: _refused(model, prompts("test", MEASURED, harmful=harmful, wrappers=wrappers, seed=17))
        for kind, (harmful, wrappers) in kinds.items()
    }


def _refused(model: LensModel, asked: Transcripts) -> dict[str, float | int]:
    answered = judge(roll_out(model, asked, max_thinking=128, max_answer=32))
    counts = {outcome: sum(t.outcome is outcome for t in answered) for outcome in Outcome}
    judged = counts[Outcome.REFUSED] + counts[Outcome.COMPLIED]
    return {
        "refused": round(counts[Outcome.REFUSED] / judged, 4) if judged else -1.0,
        "judged": judged,
        "n": len(asked),
    }
