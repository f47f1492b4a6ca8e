"""What would a readout say, had these heads been edited?

One call for every scope and every kind of edit, which takes the fastest path that is exact on this model:

1. `packed`: edits at the closing, all branches of a transcript as a few long sequences;
2. `batched`: edits that start earlier, or models that cannot be packed; branches are rows that enter late;
3. `plain`: one hooked forward pass a branch.

Before the first sweep of its kind on a model, the first and the last edited branch, and the one with most heads, must
equal the plain path on a short piece of a transcript: whether an edit is applied rightly depends on the model alone.
During every sweep, every pack and every chunk carries unedited branches that must have the clean logit: masks, caches
and late entries depend on the transcript. Where they do not, the sweep starts again on the next path, and the result
says which one it took and why.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float32

from cliffscope.errors import EditError
from cliffscope.heads.batched import CHUNK_TOKENS, batched_logits, chunks
from cliffscope.heads.branches import Branch, Change, Job, plain_logit
from cliffscope.heads.edits import Scope
from cliffscope.heads.packed import Disagreement, PackSize, packed_logits
from cliffscope.model.load import LensModel
from cliffscope.readouts.readout import Readout
from cliffscope.transcripts.transcript import TokenizedTranscript

log = logging.getLogger(__name__)
CHECK_PREFIX = 8
"""Tokens before the closing on which a path is compared with the plain one; what depends on length, the unedited
branches show on the transcripts themselves."""

Kind = tuple[str, str, str, bool, bool, bool]
"""Path, kind of change, scope, and whether the change has values, preserves norms, and the readout continuations."""
_PROVEN: "WeakKeyDictionary[LensModel, set[Kind]]" = WeakKeyDictionary()
"""What was compared with the plain path on a model that is still loaded."""

Logits = tuple[float, Float32[np.ndarray, " branch"]]
"""Clean and edited logits of one transcript."""
Report = Callable[[int, Logits], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sweep:
    """A readout's logits at the final position under every branch."""

    clean: Float32[np.ndarray, " transcript"]
    """[transcript] unedited."""
    edited: Float32[np.ndarray, "transcript branch"]
    """[transcript, branch] edited."""
    path: str
    """`packed`, `batched` or `plain`, with the reason where a faster one was not taken."""

    @property
    def effects(self) -> Float32[np.ndarray, "transcript branch"]:
        """[transcript, branch] edited minus unedited."""
        return np.asarray(self.edited - self.clean[:, None])

    def __repr__(self) -> str:
        """One line: branches, n and path."""
        return f"Sweep({self.edited.shape[1]} branches, n={len(self.clean)}, {self.path})"


def sweep_branches(
    model: LensModel,
    readout: Readout,
    transcripts: Sequence[TokenizedTranscript],
    branches: Sequence[Branch],
    *,
    change: Change | None = None,
    scope: Scope = Scope.CLOSING,
    progress: Callable[[int], None] | None = None,
) -> Sweep:
    """The readout's logit at the final position of every transcript under every branch.

    Args:
        model: the model.
        readout: whose logit is read.
        transcripts: tokens; answers are ignored.
        branches: sets of heads; each is edited on its own. Heads above the readout's layer leave the logit as it is.
        change: what is done to the heads of a branch; None is zero ablation.
        scope: where; `all` includes the readout's continuations.
        progress: called with the number of transcripts done; starts again if the path has to be changed.

    Returns:
        Clean and edited logits, fp32.

    Raises:
        EditError: a head that the model lacks, or values that do not fit the transcripts.
        ProbeError: the readout does not fit the model.
        ResourceError: memory runs out even with one branch at a time.
    """
    readout.check_model(model)
    for branch in branches:
        for ref in branch:
            ref.check(model)
    job = Job(model=model, readout=readout, branches=tuple(branches), change=change or Change(), scope=scope)
    _check_values(job, transcripts)
    reasons: list[str] = []
    for run in (_Packed(), _Batched(), _Plain()) if scope is Scope.CLOSING else (_Batched(), _Plain()):
        results = _Results.empty(len(transcripts), len(branches), progress)
        try:
            if not isinstance(run, _Plain):
                _compare(run, job, transcripts)
            run.sweep(job, list(enumerate(transcripts)), results.add)
        except (Disagreement, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            if isinstance(run, _Plain):
                raise
            log.warning("the %s sweep does not hold on %s: %s", run.name, model.name, error)
            why = str(error) if isinstance(error, Disagreement) else f"fails ({type(error).__name__})"
            reasons.append(f"{run.name}: {why}")
            continue
        return Sweep(clean=results.clean, edited=results.edited, path=_describe(run, reasons))
    raise AssertionError("the plain path returns or raises")


@dataclass(eq=False, kw_only=True)
class _Results:
    """Logits as they come in."""

    clean: Float32[np.ndarray, " transcript"]
    edited: Float32[np.ndarray, "transcript branch"]
    progress: Callable[[int], None] | None
    done: int = 0

    @classmethod
    def empty(cls, n: int, branches: int, progress: Callable[[int], None] | None) -> "_Results":
        return cls(clean=np.zeros(n, np.float32), edited=np.zeros((n, branches), np.float32), progress=progress)

    def add(self, index: int, logits: Logits) -> None:
        self.clean[index], self.edited[index] = logits
        self.done += 1
        if self.progress is not None:
            self.progress(self.done)


@dataclass(eq=False, kw_only=True)
class _Packed:
    name = "packed"
    size: PackSize = field(default_factory=PackSize)

    def sweep(self, job: Job, rows: Sequence[tuple[int, TokenizedTranscript]], report: Report) -> None:
        for index, transcript in rows:
            report(index, packed_logits(job, transcript, index, self.size))


@dataclass(eq=False, kw_only=True)
class _Batched:
    name = "batched"
    size: PackSize = field(default_factory=lambda: PackSize(tokens=CHUNK_TOKENS))

    def sweep(self, job: Job, rows: Sequence[tuple[int, TokenizedTranscript]], report: Report) -> None:
        for places in chunks(job, [t for _, t in rows]):
            chunk = [rows[place] for place in places]
            clean, edited = batched_logits(job, chunk, self.size)
            for (index, _), *logits in zip(chunk, clean, edited, strict=True):
                report(index, (float(logits[0]), logits[1]))


@dataclass(eq=False, kw_only=True)
class _Plain:
    name = "plain"
    size: PackSize = field(default_factory=PackSize)

    def sweep(self, job: Job, rows: Sequence[tuple[int, TokenizedTranscript]], report: Report) -> None:
        for index, transcript in rows:
            edited = [plain_logit(job, transcript, index, branch) for branch in job.branches]
            report(index, (plain_logit(job, transcript, index), np.array(edited, dtype=np.float32)))


def _describe(run: "_Packed | _Batched | _Plain", reasons: list[str]) -> str:
    notes = [*reasons, f"halved {run.size.halvings} times, out of memory"] if run.size.halvings else reasons
    return f"{run.name} ({'; '.join(notes)})" if notes else run.name


def _compare(run: "_Packed | _Batched", job: Job, transcripts: Sequence[TokenizedTranscript]) -> None:
    """Raises Disagreement unless a few branches equal the plain path on a short piece of the shortest transcript."""
    values, tree = bool(job.change.values), job.readout.continuations
    kind = (run.name, str(job.change.kind), str(job.scope), values, job.change.preserve_norm, bool(len(tree)))
    seen = job.seen()
    if not seen or not transcripts or kind in _PROVEN.get(job.model, ()):
        return
    index = min(range(len(transcripts)), key=lambda i: (transcripts[i].final, i))
    piece = _cut(transcripts[index]) if job.scope is Scope.CLOSING else transcripts[index]
    tried = {
        min(seen, key=job.first_layer),
        max(seen, key=job.first_layer),
        max(seen, key=lambda i: len(job.branches[i])),
    }
    few = Job(
        model=job.model,
        readout=job.readout,
        branches=tuple(job.branches[i] for i in sorted(tried)),
        change=job.change,
        scope=job.scope,
    )
    swept: list[Float32[np.ndarray, " branch"]] = []
    run.sweep(few, [(index, piece)], lambda _, logits: swept.append(logits[1]))
    for branch, logit in zip(few.branches, swept[0], strict=True):
        expected = plain_logit(few, piece, index, branch)
        if not job.agrees(float(logit), expected):
            raise Disagreement(f"differs from the plain path by {abs(float(logit) - expected):.1e}")
    _PROVEN.setdefault(job.model, set()).add(kind)


def _cut(transcript: TokenizedTranscript) -> TokenizedTranscript:
    """The closing with a few tokens before it."""
    stop, closing = transcript.final + 1, transcript.bounds[1]
    start = max(0, closing - CHECK_PREFIX)
    bounds = [max(0, bound - start) for bound in transcript.bounds[:3]]
    return TokenizedTranscript(
        id=transcript.id,
        token_ids=transcript.token_ids[start:stop],
        bounds=(bounds[0], bounds[1], bounds[2], bounds[2]),
    )


def _check_values(job: Job, transcripts: Sequence[TokenizedTranscript]) -> None:
    """Raises EditError where the values of a change do not fit the transcripts' positions."""
    n = len(job.change.values)
    if n > 1 and n != len(transcripts):
        raise EditError(f"Values for {n} transcripts were given for {len(transcripts)}. Give one for each.")
    shape, tree = job.model.shape, job.readout.continuations
    for index, transcript in enumerate(transcripts):
        values = job.change.of(index)
        where = job.scope.positions(tree.rows(transcript)[0])
        each = (shape.n_layers, where.stop - where.start, shape.n_heads, shape.d_head)
        one = (each[0], 1, *each[2:])
        # What a donor writes at an opening is not known, nor which opening a position would belong to.
        fitting = (one,) if len(tree) and job.scope is Scope.ALL else (each, one)
        if values is not None and tuple(values.shape) not in fitting:
            raise EditError(
                f"Values of {transcript.id!r} have shape {tuple(values.shape)}; its scope {str(job.scope)!r} needs "
                f"{' or '.join(map(str, fitting))} (layer, position, head, d_head). Take a donor of the same length, "
                "the mean, or scope='closing'."
            )
