"""What does a head read, and which tokens does its write against refusal come from?

A head writes, at a position, the sum over source tokens of attention x value, through its columns of the output
projection. Its share of the refusal logit there is therefore an exact sum over source tokens:

    share[source] = attention[position, source] x (value[source] . columns^T . probe weight)

Pattern and values are TransformerLens' `hook_pattern` and `hook_v`; their sum is compared with `hook_z` before anything
is returned. An attention sink takes attention and writes nothing: the pattern then sums to less than one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from cliffscope.errors import SpanError, UnsupportedModelError
from cliffscope.heads.edits import HeadRef
from cliffscope.heads.shares import NOT_LINEAR, decompose_logit
from cliffscope.model.bridges import TOLERANCE
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.probe import linear_probe
from cliffscope.readouts.readout import Readout
from cliffscope.transcripts.records import Transcript
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from cliffscope.figures.circuits import CircuitsView


_HOOKS = ("hook_pattern", "hook_v", "hook_z")
VIEW_TOKENS = 512
"""Tokens of an attention pattern, whose HTML grows with their square."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadSources(Plotted):
    """What one head reads at the closing of one transcript."""

    head: HeadRef
    """The head."""
    kv_group: int
    """The key-value head that it reads."""
    tokens: TokenizedTranscript
    """The transcript."""
    texts: tuple[str, ...]
    """Text of each token up to the final one."""
    attention: Float32[np.ndarray, "closing source"]
    """[closing, source] attention of each closing token."""
    shares: Float32[np.ndarray, "closing source"]
    """[closing, source] part of the refusal logit that the head writes there and that comes from a source token."""

    @property
    def effect(self) -> float:
        """Minus the head's share of the logit at the final position: positive if it writes against refusal."""
        return -float(self.shares[-1].sum())

    def to_frame(self) -> pd.DataFrame:
        """One row a closing token and source: query, position, token, span, attention, share (logit)."""
        first = self.tokens.span(Span.CLOSING).start
        queries, sources = self.shares.shape
        labels = [str(span) for span in self.tokens.labels()[:sources]]
        return pd.DataFrame(
            {
                "query": np.repeat(np.arange(first, first + queries), sources),
                "position": np.tile(np.arange(sources), queries),
                "token": list(self.texts) * queries,
                "span": labels * queries,
                "attention": self.attention.ravel(),
                "share": self.shares.ravel(),
            }
        )

    def by_span(self) -> pd.DataFrame:
        """One row a span: attention and share of the final token's sources, summed."""
        last = self.to_frame()
        last = last[last["query"] == self.tokens.final]
        return last.groupby("span", sort=False)[["attention", "share"]].sum().reset_index()

    def small_table(self) -> pd.DataFrame:
        """Attention and share by span."""
        return self.by_span()

    def plot(self, *, most: int = 24) -> "Figure":
        """The sources with the largest shares at the final position.

        Args:
            most: sources shown; the others are summed up in one row.
        """
        from cliffscope.figures.sources import source_bars

        return source_bars(
            list(self.texts),
            [str(span) for span in self.tokens.labels()[: len(self.texts)]],
            self.attention[-1],
            -self.shares[-1],
            most=most,
            title=f"What {self.head} reads at the final position ({self.tokens.id})",
        )

    def attention_view(self) -> "CircuitsView":
        """CircuitsVis' attention pattern of at most the last 512 tokens; rows before the closing tokens are empty."""
        from cliffscope.figures.circuits import CircuitsView, harmless

        shown = slice(max(0, len(self.texts) - VIEW_TOKENS), None)
        square = np.zeros((len(self.texts[shown]),) * 2)
        square[len(square) - len(self.attention) :] = self.attention[:, shown]
        props = {"tokens": [harmless(text) for text in self.texts[shown]], "attention": square.round(4).tolist()}
        return CircuitsView(component="AttentionPattern", props=props)

    def token_view(self) -> "CircuitsView":
        """CircuitsVis' tokens coloured by what they make the head write against refusal at the final position."""
        from cliffscope.figures.circuits import CircuitsView, coloured_tokens

        props = coloured_tokens(self.texts, (-self.shares[-1]).tolist())
        return CircuitsView(component="ColoredTokens", props=props)

    def __repr__(self) -> str:
        """One line: head, effect, and the token that it comes from most."""
        most = int((-self.shares[-1]).argmax())
        return (
            f"HeadSources({self.head}: direct effect {self.effect:+.2f} logits, most from {self.texts[most]!r} at "
            f"{most}, n=1)"
        )


def trace_sources(model: LensModel, probe: Readout, transcript: Transcript, head: HeadRef) -> HeadSources:
    """What a head reads at the closing tokens, and what each source makes it write.

    Args:
        model: the model; its bridge computes the pattern.
        probe: a linear one, whose logit is split; the head's layer is at most the probe's.
        transcript: one.
        head: the head.

    Returns:
        Attention and shares.

    Raises:
        EditError: the model lacks the head.
        ProbeError: the probe does not fit the model, or the readout is no linear probe.
        SpanError: the probe does not see the head.
        UnsupportedModelError: attention x values is not what the head gives on this model, or what heads write is not
            added to the residual as it is.
    """
    return trace_all_sources(model, probe, transcript, [head])[0]


def trace_all_sources(
    model: LensModel, probe: Readout, transcript: Transcript, heads: Sequence[HeadRef]
) -> list[HeadSources]:
    """The same for several heads in one pass; arguments and errors as of `trace_sources`."""
    linear = linear_probe(probe, NOT_LINEAR)
    linear.check_model(model)
    for head in heads:
        head.check(model)
        if head.layer > probe.layer:
            raise SpanError(f"{head} writes above layer {probe.layer}, where the probe reads. Choose a head below.")
    tokens = model.tokenization.tokens(transcript)
    texts = tuple(str(model.tokenizer.decode([int(i)])) for i in tokens.token_ids[: tokens.final + 1])
    closing, weight = tokens.span(Span.CLOSING).start, torch.from_numpy(linear.weight)
    tolerance = TOLERANCE.get(model.dtype, 1e-1)
    # That the parts add up to the logit is checked there; a head's sources must add up to its own part.
    parts = decompose_logit(model, linear, [tokens])
    sources = []
    for head, (pattern, values, z) in zip(heads, _read(model, tokens, heads), strict=True):
        if not torch.allclose(pattern @ values, z, atol=tolerance * float(z.abs().max() + 1)):
            raise _inexact(model, head)
        written = model.output_columns(head.layer)[:, head.head].T.cpu() @ weight
        shares = (pattern[closing:] * (values @ written)[None]).numpy()
        scale = float(pattern[-1] @ (values.abs() @ written.abs())) + 1
        if abs(shares[-1].sum() - parts.heads[0, head.layer, head.head]) > tolerance * scale:
            raise _inexact(model, head)
        sources.append(
            HeadSources(
                head=head,
                kv_group=model.shape.kv_group(head.head),
                tokens=tokens,
                texts=texts,
                attention=pattern[closing:].numpy(),
                shares=shares,
            )
        )
    return sources


def _read(
    model: LensModel, tokens: TokenizedTranscript, heads: Sequence[HeadRef]
) -> list[tuple[Float[Tensor, "query source"], Float[Tensor, "source d_head"], Float[Tensor, "query d_head"]]]:
    """Pattern, values and output of each head."""
    read: dict[tuple[HeadRef, str], Float[Tensor, "pos _"]] = {}

    def reader(head: HeadRef, name: str, index: int) -> Callable[[Float[Tensor, "..."], object], None]:
        def keep(value: Float[Tensor, "..."], hook: object) -> None:
            # Values and output have heads behind positions, the pattern before them.
            del hook
            part = value[0, index] if name == "hook_pattern" else value[0, :, index]
            read[head, name] = part.detach().float().cpu()

        return keep

    hooks: list[tuple[str | Callable[..., object], Callable[..., object]]] = []
    for head in heads:
        places = (head.head, model.shape.kv_group(head.head), head.head)
        for name, index in zip(_HOOKS, places, strict=True):
            hooks.append((f"blocks.{head.layer}.attn.{name}", reader(head, name, index)))
    ids = torch.from_numpy(tokens.token_ids[: tokens.final + 1])[None].to(model.device)
    with torch.inference_mode():
        model.bridge.run_with_hooks(ids, return_type=None, fwd_hooks=hooks)
    parts = []
    for head in heads:
        seen = [read[head, name] for name in _HOOKS if (head, name) in read]
        if len(seen) < len(_HOOKS) or seen[1].shape != seen[2].shape:
            raise _inexact(model, head)
        parts.append((seen[0], seen[1], seen[2]))
    return parts


def _inexact(model: LensModel, head: HeadRef) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Layer {head.layer} of {model.name!r}: attention x values is not what {head} gives, so its sources cannot be "
        "told apart."
    )
