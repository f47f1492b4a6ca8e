"""Which tokens are put after the final position, so that a readout can look further than one token?

Several short sequences of tokens that share their beginnings are a tree below the final position. Each token of the
tree sees the transcript and the tokens above it. A model can be given the tree in two ways:

1. as one sequence, whose attention mask lets a token see its ancestors alone (`ancestors`);
2. as ordinary rows, one for each path from the final position down to a leaf (`paths`); `places` says in which row, and
   how far behind the final position, each token of the tree is read.

Knows no model and no readout.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64

from cliffscope.errors import DataError
from cliffscope.transcripts.transcript import TokenizedTranscript

ROOT = -1
"""Parent of the tokens that come directly after the final position."""


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """A tree of tokens below the final position; empty where the final position alone is read."""

    tokens: tuple[int, ...] = ()
    """[node] token ids; a token stands behind its parent."""
    parents: tuple[int, ...] = ()
    """[node] index of the token before, `ROOT` for the final position."""

    def __post_init__(self) -> None:
        """Refuses a token that stands before its parent."""
        if len(self.tokens) != len(self.parents) or any(
            not ROOT <= parent < node for node, parent in enumerate(self.parents)
        ):
            raise DataError(
                f"parents={self.parents} of {len(self.tokens)} tokens: expected the index of an earlier token for "
                f"each, or {ROOT}."
            )

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> "Continuations":
        """The smallest tree that holds all sequences.

        Args:
            sequences: token ids; an empty one adds nothing.

        Example:
            >>> Continuations.of([(5, 7), (5, 8), (6,)])
            Continuations(tokens=(5, 7, 8, 6), parents=(-1, 0, 0, -1))
        """
        nodes: dict[tuple[int, ...], int] = {(): ROOT}
        parents: list[int] = []
        for sequence in sequences:
            for stop in range(1, len(sequence) + 1):
                prefix = tuple(sequence[:stop])
                if prefix not in nodes:
                    parents.append(nodes[prefix[:-1]])
                    nodes[prefix] = len(nodes) - 1
        return cls(tokens=tuple(prefix[-1] for prefix in nodes if prefix), parents=tuple(parents))

    def __len__(self) -> int:
        """Tokens of the tree."""
        return len(self.tokens)

    def node(self, sequence: Sequence[int]) -> int:
        """Index of the token at which a sequence ends, `ROOT` for the empty one; raises DataError if there is none."""
        node = ROOT
        for token in sequence:
            children = [i for i, parent in enumerate(self.parents) if parent == node and self.tokens[i] == token]
            if not children:
                raise DataError(f"The tree of continuations does not hold {tuple(sequence)}.")
            node = children[0]
        return node

    @cached_property
    def depths(self) -> Int64[np.ndarray, " node"]:
        """[node] how many tokens behind the final position."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return np.array(depths, dtype=np.int64)

    @cached_property
    def ancestors(self) -> Bool[np.ndarray, "node seen"]:
        """[node, node] whether a token sees another: itself and what stands above it."""
        sees = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                sees[node] |= sees[parent]
        return sees

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Token ids from the final position down to each leaf; one empty path where there is no token."""
        leaves = [node for node in range(len(self)) if node not in self.parents]
        return tuple(tuple(self.tokens[i] for i in np.flatnonzero(self.ancestors[leaf])) for leaf in leaves) or ((),)

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(path, tokens behind the final position) of the final position and of each token after it."""
        leaves = [node for node in range(len(self)) if node not in self.parents]
        owners = [next(i for i, leaf in enumerate(leaves) if self.ancestors[leaf, node]) for node in range(len(self))]
        return ((0, 0), *((owner, int(depth)) for owner, depth in zip(owners, self.depths, strict=True)))

    def rows(self, transcript: TokenizedTranscript) -> list[TokenizedTranscript]:
        """The transcript up to its final position, once for each path, with the path as its answer."""
        stop = transcript.final + 1
        bounds = (transcript.bounds[0], transcript.bounds[1], stop)
        return [
            TokenizedTranscript(
                id=transcript.id,
                token_ids=np.concatenate([transcript.token_ids[:stop], np.array(path, dtype=np.int64)]),
                bounds=(*bounds, stop + len(path)),
            )
            for path in self.paths
        ]


NOTHING = Continuations()
"""No continuation: the final position alone is read."""
