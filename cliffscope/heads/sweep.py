"""What would the refusal logit be, had these heads been edited?

The packed counterfactual sweep: every branch (a set of heads to edit) shares the transcript up to the closing.

1. One forward pass of the transcript keeps the prefix's cache, and the closing tokens' residual entering each layer.
2. Branches are sorted by their first edited layer and packed: the closing tokens are repeated once a branch, with their
   own positions and a mask in which a branch sees the prefix and itself.
3. A pack enters the model at its first edited layer, with the clean residual, and leaves it at the probe's layer; a
   hook on `hook_z` edits in each branch its own heads.
4. On the longest transcript the branch with the earliest edit must equal a plain hooked forward pass; otherwise the
   whole sweep takes the plain path, and the result says so.

Exact: an edit at the closing changes nothing before it. Memory is the prefix's cache and one pack.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers import DynamicCache

from cliffscope.heads.edits import HeadEdit, HeadRef, Scope, edited_hooks
from cliffscope.models import LensModel
from cliffscope.probing.probe import RefusalProbe
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

log = logging.getLogger(__name__)
PACK_TOKENS = 320
"""Branches x window tokens in a pack: larger packs lose more to the mask, which grows as the square, than they gain."""
PACK_LAYERS = 6
"""First edited layers that one pack may span: each branch runs from the pack's first layer, clean until its own."""
AGREEMENT = 1e-4
"""Largest difference from the plain path, relative to the larger of 1 and the clean logit; beyond it that is taken."""

Branch = tuple[HeadRef, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sweep:
    """Refusal logits at the final position under every branch."""

    clean: Float32[np.ndarray, " transcript"]
    """[transcript] unedited."""
    edited: Float32[np.ndarray, "transcript branch"]
    """[transcript, branch] edited."""
    path: str
    """`packed`, or `plain` with the reason."""

    def __repr__(self) -> str:
        """One line: branches, n and path."""
        return f"Sweep({self.edited.shape[1]} branches, n={len(self.clean)}, {self.path})"


def sweep_branches(
    model: LensModel,
    probe: RefusalProbe,
    transcripts: Sequence[TokenizedTranscript],
    branches: Sequence[Branch],
    *,
    factor: float = 0.0,
    scope: Scope = Scope.CLOSING,
    progress: Callable[[int], None] | None = None,
) -> Sweep:
    """The refusal logit at the final position of every transcript under every branch.

    Args:
        model: the model.
        probe: whose logit is read.
        transcripts: tokens; answers are ignored.
        branches: sets of heads; each is edited on its own. Heads above the probe's layer leave the logit as it is.
        factor: what `hook_z` is multiplied by; 0 is zero ablation.
        scope: `closing` is packed, other scopes take the plain path.
        progress: called with the number of transcripts done.

    Returns:
        Clean and edited logits, fp32.

    Raises:
        EditError: a head that the model lacks.
        ProbeError: the probe does not fit the model.
    """
    probe.check_model(model)
    for branch in branches:
        HeadEdit(heads=branch, factor=factor, scope=scope).check(model)
    path = "packed" if scope is Scope.CLOSING else f"plain: scope {scope}"
    clean, edited = np.zeros(len(transcripts), np.float32), np.zeros((len(transcripts), len(branches)), np.float32)
    job = _Job(model=model, probe=probe, branches=list(branches), factor=factor, scope=scope)
    done: dict[int, tuple[float, np.ndarray]] = {}
    if path == "packed" and transcripts and branches:
        # The longest is tried first, since a window of attention that is too narrow shows there.
        longest = max(range(len(transcripts)), key=lambda i: transcripts[i].final)
        path, tried = _choose_path(job, transcripts[longest])
        if tried is not None:
            done[longest] = tried
    run = _packed if path == "packed" else _plain
    for i, transcript in enumerate(transcripts):
        clean[i], edited[i] = done[i] if i in done else run(job, transcript, range(len(branches)))
        if progress is not None:
            progress(i + 1)
    return Sweep(clean=clean, edited=edited, path=path)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Job:
    """What stays the same over transcripts."""

    model: LensModel
    probe: RefusalProbe
    branches: list[Branch]
    factor: float
    scope: Scope

    def logit(self, residual: Float[Tensor, "... d_model"]) -> np.ndarray:
        """The probe's logits of residuals."""
        weight = torch.from_numpy(self.probe.weight).to(residual.device)
        return (residual.float() @ weight + self.probe.bias).cpu().numpy()

    def first_layer(self, branch: int) -> int:
        """Where a branch begins to differ; above every layer if it edits nothing."""
        return min((ref.layer for ref in self.branches[branch]), default=self.model.shape.n_layers)


def _choose_path(job: _Job, transcript: TokenizedTranscript) -> tuple[str, tuple[float, np.ndarray] | None]:
    """`packed` with its result if it equals the plain path on this transcript, else why not.

    One branch is compared, the one with the earliest edit: all other branches run through fewer of the same layers.
    """
    everything = range(len(job.branches))
    try:
        clean, packed = _packed(job, transcript, everything)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        log.warning("the packed sweep does not run on %s: %s", job.model.name, error)
        return f"plain: packing failed ({type(error).__name__})", None
    earliest = min(everything, key=job.first_layer)
    difference = abs(float(packed[earliest]) - _edited_logit(job, transcript, earliest))
    if not difference <= _tolerance(job.model) * max(1.0, abs(clean)):
        return f"plain: packing differs by {difference:.1e}", None
    return "packed", (clean, packed)


def _tolerance(model: LensModel) -> float:
    return AGREEMENT if model.dtype == torch.float32 else 0.1


def _plain(job: _Job, transcript: TokenizedTranscript, which: Sequence[int]) -> tuple[float, np.ndarray]:
    """One hooked forward pass a branch."""
    clean = _final_logit(job, transcript.token_ids[: transcript.final + 1].tolist())
    return clean, np.array([_edited_logit(job, transcript, branch) for branch in which], dtype=np.float32)


def _edited_logit(job: _Job, transcript: TokenizedTranscript, branch: int) -> float:
    edit = HeadEdit(heads=job.branches[branch], factor=job.factor, scope=job.scope)
    with edited_hooks(job.model, edit, [job.scope.positions(transcript)]):
        return _final_logit(job, transcript.token_ids[: transcript.final + 1].tolist())


def _final_logit(job: _Job, ids: list[int]) -> float:
    kept: list[Tensor] = []

    def visit(layer: int, hidden: Tensor) -> None:
        if layer == job.probe.layer:
            kept.append(hidden[:, -1])

    batch = job.model.to_batch([ids])
    with torch.inference_mode(), job.model.residual_hook(visit):
        job.model.decoder(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
    return float(job.logit(kept[0])[0])


def _packed(job: _Job, transcript: TokenizedTranscript, which: Sequence[int]) -> tuple[float, np.ndarray]:
    """All branches through the model as a few long sequences."""
    start, stop = transcript.span(Span.CLOSING).start, transcript.final + 1
    found = np.empty(len(which), dtype=np.float32)
    with torch.inference_mode():
        cache, entering, clean = _clean_pass(job, transcript.token_ids[:stop].tolist(), start)
        # A head above the probe's layer cannot change what the probe reads.
        seen = [i for i, branch in enumerate(which) if job.first_layer(branch) <= job.probe.layer]
        found[:] = clean
        for pack in _packs([(i, which[i]) for i in seen], job, stop - start):
            window = _Window(prefix=start, width=stop - start, entering=entering, cache=cache)
            found[[i for i, _ in pack]] = _run_pack(job, window, [branch for _, branch in pack])
    return clean, found


def _clean_pass(job: _Job, ids: list[int], start: int) -> tuple[DynamicCache, list[Tensor], float]:
    """The prefix's cache, the closing's residual entering each layer, and the clean logit."""
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    model = job.model
    # Without a config every layer keeps all its keys; which of them are seen is the mask's business.
    cache = DynamicCache()

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entering.append(inputs[0][:, start:].clone())

    def visit(layer: int, hidden: Tensor) -> None:
        if layer == job.probe.layer:
            leaving.append(hidden[:, -1])

    batch = model.to_batch([ids])
    blocks = list(model.blocks)[: job.probe.layer + 1]
    with ExitStack() as stack:
        stack.enter_context(_only_blocks(model, blocks))
        stack.enter_context(model.residual_hook(visit))
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(keep).remove)
        model.decoder(input_ids=batch.ids, position_ids=batch.positions, past_key_values=cache, use_cache=True)
    cache.crop(start - len(ids))
    return cache, entering, float(job.logit(leaving[0])[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class _Window:
    """The closing of one transcript, ready to be branched."""

    prefix: int
    """Tokens before it."""
    width: int
    """Tokens of it."""
    entering: list[Tensor]
    """[1, width, d_model] a layer."""
    cache: DynamicCache
    """Of the prefix."""


def _packs(branches: list[tuple[int, int]], job: _Job, width: int) -> Iterator[list[tuple[int, int]]]:
    """Groups branches by first edited layer into packs of bounded size."""
    pack: list[tuple[int, int]] = []
    first = 0
    for item in sorted(branches, key=lambda pair: (job.first_layer(pair[1]), pair[1])):
        layer = job.first_layer(item[1])
        if pack and ((len(pack) + 1) * width > PACK_TOKENS or layer - first >= PACK_LAYERS):
            yield pack
            pack = []
        if not pack:
            first = layer
        pack.append(item)
    if pack:
        yield pack


def _run_pack(job: _Job, window: _Window, branches: list[int]) -> np.ndarray:
    model, width, n = job.model, window.width, len(branches)
    first = job.first_layer(branches[0])
    residual = window.entering[first].repeat(1, n, 1)
    positions = torch.arange(window.prefix, window.prefix + width, device=model.device).repeat(n)[None]
    mask = _branch_mask(window.prefix, width, n, residual)
    blocks = list(model.blocks)[first : job.probe.layer + 1]
    finals: list[Tensor] = []

    def visit(layer: int, hidden: Tensor) -> None:
        if layer == len(blocks) - 1:
            finals.append(hidden[0, width - 1 :: width])

    with ExitStack() as stack:
        for layer, rows, heads in _edits_by_layer(job, branches):
            stack.enter_context(model.head_hook(layer, _branch_edit(rows, heads, width, job.factor)))
        stack.enter_context(_only_blocks(model, blocks))
        stack.enter_context(model.residual_hook(visit))
        model.decoder(
            inputs_embeds=residual,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=window.cache,
            use_cache=True,
        )
    window.cache.crop(-n * width)
    return job.logit(finals[0])


def _edits_by_layer(job: _Job, branches: list[int]) -> Iterator[tuple[int, list[int], list[int]]]:
    """For each edited layer: which branch edits which head, as two lists of equal length."""
    found: dict[int, list[tuple[int, int]]] = {}
    for row, branch in enumerate(branches):
        for ref in job.branches[branch]:
            if ref.layer <= job.probe.layer:
                found.setdefault(ref.layer, []).append((row, ref.head))
    for layer, pairs in found.items():
        yield layer, [row for row, _ in pairs], [head for _, head in pairs]


def _branch_edit(rows: list[int], heads: list[int], width: int, factor: float) -> Callable[[Tensor], None]:
    def change(z: Tensor) -> None:
        branched = z.view(-1, width, *z.shape[2:])
        branched[rows, :, heads] *= factor

    return change


def _branch_mask(prefix: int, width: int, n: int, like: Tensor) -> Tensor:
    """Additive [1, 1, n x width, prefix + n x width]: a branch sees the prefix and, causally, itself."""
    token = torch.arange(n * width)
    own = (token[:, None] // width == token // width) & (token[:, None] >= token)
    allowed = torch.cat([torch.ones(n * width, prefix, dtype=torch.bool), own], 1)
    mask = torch.zeros(allowed.shape, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)
    return mask[None, None].to(like.device)


@contextmanager
def _only_blocks(model: LensModel, blocks: list[nn.Module]) -> Iterator[None]:
    """Cuts the model's list of blocks; each keeps its own index into the cache."""
    decoder = model.decoder
    whole = decoder.layers
    decoder.layers = nn.ModuleList(blocks)
    try:
        yield
    finally:
        decoder.layers = whole
