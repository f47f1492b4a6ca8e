"""What do heads write elsewhere, to be put in the place of what they write here?

- `mean`: what each head writes on average over a reference set. At the closing one mean a position, counted from the
  end, since all transcripts share these tokens; elsewhere one mean of the span, every transcript counting alike.
- `resample`: what it writes in another transcript, drawn with a seed.
- `patch`: what it writes in a donor: a matched one for each transcript, or one drawn from a pool.

A donor must have as many positions in the scope as the transcript that it gives to; nothing is stretched or cut.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from cliffscope.errors import DataError, EditError
from cliffscope.heads.branches import Change
from cliffscope.heads.edits import EditKind, HeadEdit, HeadRef, Scope
from cliffscope.model.load import LensModel
from cliffscope.readouts.activations import length_batches
from cliffscope.readouts.trace import group_name
from cliffscope.transcripts.records import Transcript, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

Donors = Transcripts | Mapping[str, Transcript]
"""A pool, or for each transcript's id its own donor."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DonorTokens:
    """Donors as tokens."""

    pool: tuple[TokenizedTranscript, ...]
    """Every donor once."""
    matched: Mapping[str, TokenizedTranscript] | None
    """By the id of the transcript that it gives to, where they were matched."""
    name: str
    """What they are, such as "40 transcripts (harmful, refused 40)"."""

    @classmethod
    def read(cls, model: LensModel, donors: Donors) -> "DonorTokens":
        """Tokenizes donors; raises DataError where one cannot be used."""
        if isinstance(donors, Mapping):
            matched = {name: _tokens(model, Transcripts([donor]))[0] for name, donor in donors.items()}
            pool = {t.id: t for t in matched.values()}
            return cls(pool=tuple(pool.values()), matched=matched, name=f"matched: {_describe(donors.values())}")
        return cls(pool=tuple(_tokens(model, donors)), matched=None, name=_describe(donors))


def mean_change(
    model: LensModel, reference: Sequence[TokenizedTranscript], transcripts: Sequence[TokenizedTranscript], scope: Scope
) -> Change:
    """Every head set to its mean over a reference set.

    Args:
        model: the model.
        reference: tokens of the reference set.
        transcripts: those that will be edited.
        scope: where.

    Returns:
        The change, with one tensor a transcript.

    Raises:
        EditError: a closing is longer than any of the reference set.
    """
    means = mean_outputs(model, reference, scope)
    if scope is not Scope.CLOSING:
        return Change(kind=EditKind.MEAN, values=(means,))
    widths = [_width(t, scope) for t in transcripts]
    longest = max(range(len(transcripts)), key=lambda i: widths[i], default=None)
    if longest is not None and widths[longest] > means.shape[1]:
        raise EditError(
            f"The closing of {transcripts[longest].id!r} has {widths[longest]} tokens, the longest of the reference "
            f"set {means.shape[1]}. Give references with the same closing."
        )
    return Change(kind=EditKind.MEAN, values=tuple(means[:, means.shape[1] - width :] for width in widths))


def choose_donors(
    donors: DonorTokens, transcripts: Sequence[TokenizedTranscript], scope: Scope, *, seed: int = 0
) -> list[TokenizedTranscript]:
    """The donor of each transcript, matched or drawn with a seed.

    Args:
        donors: a pool, or one for each transcript.
        transcripts: those that will be given to.
        scope: where; donor and transcript have as many positions in it.
        seed: of the draw from a pool.

    Returns:
        One donor a transcript.

    Raises:
        EditError: a transcript has no donor with as many positions in the scope.
    """
    rng = np.random.default_rng(seed)
    return [_choose(donors, transcript, scope, rng) for transcript in transcripts]


def donor_change(model: LensModel, donors: Sequence[TokenizedTranscript], scope: Scope, kind: str) -> Change:
    """Every head set to what it writes in another transcript.

    Args:
        model: the model.
        donors: for each transcript of the sweep, in order, the one that gives to it.
        scope: where.
        kind: label of the change.

    Returns:
        The change, with one tensor a transcript.
    """
    unique = {t.id: t for t in donors}
    outputs = dict(zip(unique, gather_outputs(model, list(unique.values()), scope), strict=True))
    return Change(kind=kind, values=tuple(outputs[t.id] for t in donors))


def mean(
    model: LensModel, heads: Sequence[HeadRef], reference: Transcripts, *, scope: Scope | str = Scope.ALL
) -> HeadEdit:
    """Mean ablation of heads: each is set to what it writes on average over a reference set.

    Args:
        model: the model.
        heads: query heads.
        reference: transcripts, usually harmless ones.
        scope: where. With "all" there is one mean for all positions up to the final one, which weights can hold where
            the output projection has a bias; with "closing" one for each closing token.

    Returns:
        The edit.

    Raises:
        DataError: a reference cannot be used.
        EditError: the model lacks a head.
    """
    where = Scope.parse(scope)
    for ref in heads:
        ref.check(model)
    means = mean_outputs(model, _tokens(model, reference), where)
    return Change(kind=EditKind.MEAN, values=(means,)).edit(tuple(heads), where, 0)


def mean_outputs(
    model: LensModel, reference: Sequence[TokenizedTranscript], scope: Scope
) -> Float[Tensor, "layer position head d_head"]:
    """Mean `hook_z` over a reference set: at each closing token, counted from the end, or over the whole span."""
    shape = model.shape
    width = max(_width(t, scope) for t in reference) if scope is Scope.CLOSING else 1
    totals = torch.zeros(shape.n_layers, width, shape.n_heads, shape.d_head)
    counts = torch.zeros(width)

    def add(_index: int, layer: int, z: Float[Tensor, "pos head d_head"]) -> None:
        part = z if scope is Scope.CLOSING else reduce(z, "pos head d_head -> 1 head d_head", "mean")
        totals[layer, width - len(part) :] += part
        if layer == shape.attention_layers[0]:
            counts[width - len(part) :] += 1

    used = [t for t in reference if _width(t, scope)]
    if not used:
        raise EditError(f"No transcript of the reference set has a token in scope {str(scope)!r}. Give other ones.")
    _visit_outputs(model, used, scope, add)
    return totals / rearrange(counts, "pos -> pos 1 1")


def gather_outputs(
    model: LensModel, transcripts: Sequence[TokenizedTranscript], scope: Scope
) -> list[Float[Tensor, "layer position head d_head"]]:
    """`hook_z` of every layer and head over a scope, fp32 on the CPU, one tensor a transcript."""
    shape = model.shape
    outputs = [torch.zeros(shape.n_layers, _width(t, scope), shape.n_heads, shape.d_head) for t in transcripts]

    def keep(index: int, layer: int, z: Float[Tensor, "pos head d_head"]) -> None:
        outputs[index][layer] = z

    _visit_outputs(model, transcripts, scope, keep)
    return outputs


def _visit_outputs(
    model: LensModel,
    transcripts: Sequence[TokenizedTranscript],
    scope: Scope,
    visit: Callable[[int, int, Float[Tensor, "pos head d_head"]], None],
) -> None:
    """Calls `visit(index, layer, z)` with `hook_z` over the scope, in batches, layer by layer."""
    for rows in length_batches([t.final + 1 for t in transcripts]):

        def look(layer: int, z: Float[Tensor, "batch pos head d_head"], rows: list[int] = rows) -> None:
            for place, index in enumerate(rows):
                visit(index, layer, z[place, scope.positions(transcripts[index])].float().cpu())

        batch = model.to_batch([transcripts[i].token_ids[: transcripts[i].final + 1].tolist() for i in rows])
        with torch.inference_mode(), model.outputs_hook(look):
            model.decoder(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)


def _choose(
    donors: DonorTokens, transcript: TokenizedTranscript, scope: Scope, rng: np.random.Generator
) -> TokenizedTranscript:
    width = _width(transcript, scope)
    if donors.matched is not None:
        donor = donors.matched.get(transcript.id)
        if donor is None or _width(donor, scope) != width:
            what = "none" if donor is None else f"{donor.id!r} with {_width(donor, scope)} positions"
            raise EditError(
                f"{transcript.id!r} has {width} positions in scope {str(scope)!r}, its donor is {what}. Match each "
                "transcript with a donor of the same length, or use scope='closing'."
            )
        return donor
    fitting = [t for t in donors.pool if t.id != transcript.id and _width(t, scope) == width]
    if not fitting:
        widths = sorted({_width(t, scope) for t in donors.pool})[:6]
        raise EditError(
            f"No donor of {transcript.id!r} has {width} positions in scope {str(scope)!r}; there are donors with "
            f"{widths}. Give others, or use scope='closing' or method='mean'."
        )
    return fitting[int(rng.integers(len(fitting)))]


def _tokens(model: LensModel, transcripts: Transcripts) -> list[TokenizedTranscript]:
    tokens, omitted = model.tokenize_all(transcripts)
    if omitted or not tokens:
        why = omitted[0].reason if omitted else "none was given"
        raise DataError(f"{len(omitted)} of {len(transcripts)} donors cannot be used: {why}")
    return tokens


def _width(transcript: TokenizedTranscript, scope: Scope) -> int:
    where = scope.positions(transcript)
    return int(where.stop - where.start)


def _describe(transcripts: Iterable[Transcript]) -> str:
    counts = Counter(group_name(t) for t in transcripts)
    return f"{sum(counts.values())} transcripts ({', '.join(f'{name} {n}' for name, n in sorted(counts.items()))})"
