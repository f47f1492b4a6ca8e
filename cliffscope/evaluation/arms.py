"""Which conditions does a comparison have?

The unedited model, the edited one, and the same edit of as many random heads in the same layers and scope: an edit of
any heads changes something, and only what random heads do not do is due to the heads that were chosen.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cliffscope.errors import EditError
from cliffscope.heads.controls import count_sets, random_sets
from cliffscope.heads.edits import EditPlan, HeadEdit, HeadRef, Scope
from cliffscope.model.load import LensModel, ModelShape

log = logging.getLogger(__name__)
UNEDITED, TOP = "unedited", "top heads"
MakeEdit: TypeAlias = Callable[[Sequence[HeadRef]], HeadEdit | EditPlan]
"""Makes an edit of given heads."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One condition of the comparison."""

    name: str
    """Such as "random 3"."""
    kind: str
    """`unedited`, `top` or `random`."""
    edit: HeadEdit | EditPlan | None
    """What is done to the model."""


def scope_of(edit: HeadEdit | EditPlan | None) -> str:
    """Where an edit acts: a scope, several of them in words, or "" for no edit."""
    return ", ".join(sorted({str(part.scope) for part in edit.edits})) if edit is not None else ""


def keeps_thinking(edit: HeadEdit | EditPlan | None) -> bool:
    """Whether an edit is evaluated on thinking that is there already.

    Args:
        edit: of one scope, or a plan.

    Returns:
        True where no part acts at all positions: what is edited is then some span of a text that stays as it is.

    Raises:
        EditError: some parts act at all positions, others do not, so that the thinking would be both.
    """
    everywhere = {part.scope == Scope.ALL for part in edit.edits} if edit is not None else {True}
    if len(everywhere) > 1:
        raise EditError(
            f"The plan has parts of scopes {scope_of(edit)}. With scope 'all' the thinking is generated under the "
            "edit, with any other it is kept: evaluate them apart."
        )
    return everywhere == {False}


def arm_names(controls: int) -> list[str]:
    """Names of the arms of a comparison with so many random sets, or more than it turns out to have."""
    return [UNEDITED, TOP, *(f"random {i + 1}" for i in range(controls))]


def plan_arms(
    model: LensModel,
    edit: HeadEdit | EditPlan | None,
    *,
    controls: int = 20,
    control_edit: MakeEdit | None = None,
    seed: int = 0,
) -> tuple[Arm, ...]:
    """The arms of a comparison: unedited, edited, and random sets of as many heads in the same layers.

    Args:
        model: the model.
        edit: the edit to be tested; None for the unedited arm alone.
        controls: random sets, all different; fewer where the layers do not have as many.
        control_edit: makes the same edit of other heads, such as `lambda heads: cs.mean(model, heads, transcripts)`;
            None takes `edit.on`, which kinds without values have.
        seed: of the draws.

    Returns:
        Arms, unedited first.

    Raises:
        EditError: the model lacks a head, a random set's edit has another scope, or no random set differs from the
            edit's.
    """
    arms = [Arm(name=UNEDITED, kind="unedited", edit=None)]
    if edit is None:
        return tuple(arms)
    edit.check(model)
    arms.append(Arm(name=TOP, kind="top", edit=edit))
    make = control_edit or _other_heads(edit)
    for i, heads in enumerate(_random_sets(model.shape, edit.heads, controls, seed)):
        arms.append(Arm(name=f"random {i + 1}", kind="random", edit=make(heads)))
    others = {scope_of(arm.edit) for arm in arms[2:]} - {scope_of(edit)}
    if others:
        raise EditError(
            f"The edit has scope {scope_of(edit)}, those of the random sets {', '.join(sorted(others))}. Let "
            "control_edit make edits of the same scope: they are to differ in their heads alone."
        )
    return tuple(arms)


def _other_heads(edit: HeadEdit | EditPlan) -> MakeEdit:
    if isinstance(edit, HeadEdit) and edit.values is None:
        return edit.on

    def refuse(_heads: Sequence[HeadRef]) -> HeadEdit:
        raise EditError(
            f"{edit!r} cannot be made of other heads by itself, as the random sets need. Give control_edit, such as "
            "lambda heads: cs.mean(model, heads, transcripts), or controls=0."
        )

    return refuse


def _random_sets(shape: ModelShape, heads: Sequence[HeadRef], controls: int, seed: int) -> list[tuple[HeadRef, ...]]:
    possible = count_sets(shape, heads, same_layers=True)
    if controls and not possible:
        raise EditError(
            f"No random set differs from the edit's {len(heads)} heads, which are all of their layers. Edit fewer "
            "heads, or ask for controls=0."
        )
    if controls > possible:
        log.warning("%d random sets were asked for; the layers of the edit have %d.", controls, possible)
    return random_sets(shape, heads, controls, np.random.default_rng(seed), same_layers=True)
