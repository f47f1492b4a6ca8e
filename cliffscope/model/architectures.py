"""Where does an architecture keep its heads?

The one file that knows how transformers names modules and sizes. What is assumed of an architecture:

1. `get_decoder()` returns the model without its language-model head, and its blocks are in `.layers`.
2. A block attends with heads if it has `self_attn.o_proj`, the output projection. Its input is `hook_z`: the query
   heads' outputs, concatenated.
3. The block's other writer is its MLP, under one of `MLPS`.
4. The config says how many heads there are and how wide each one is.

An architecture that differs is refused by name. Whether the config describes the weights is checked in bridges.py. This
file knows no TransformerLens, tokenizer or template.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from cliffscope.errors import UnsupportedModelError

ATTENTION, PROJECTION = "self_attn", "o_proj"
"""A block's attention, and the output projection in it."""
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "moe")
"""Names of a block's MLP."""
UNLIMITED = 1_000_000_000
"""Context in tokens of a model whose config states none."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that everything else is indexed by."""

    n_layers: int
    """Blocks."""
    n_heads: int
    """Query heads per layer."""
    n_kv_heads: int
    """Key-value heads per layer."""
    d_model: int
    """Width of the residual stream."""
    d_head: int
    """Width of one head's `hook_z`."""
    context: int
    """Longest sequence in tokens."""
    attention: tuple[int, ...] | None = None
    """Layers that attend with heads, where others mix tokens in another way (linear attention); None if all do."""

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that have heads, ascending."""
        return tuple(range(self.n_layers)) if self.attention is None else self.attention

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(layer, query head) of every head, layer by layer."""
        return tuple((layer, head) for layer in self.attention_layers for head in range(self.n_heads))

    def kv_group(self, head: int) -> int:
        """The key-value head that a query head reads."""
        return head // (self.n_heads // self.n_kv_heads)


def read_shape(hf: PreTrainedModel) -> ModelShape:
    """Reads the sizes from a model's config and modules.

    Args:
        hf: the plain model.

    Returns:
        Its sizes.

    Raises:
        UnsupportedModelError: no block has heads, or the blocks are not in `.layers`.
    """
    config = hf.config.get_text_config()
    n_heads = int(config.num_attention_heads)
    # Latent attention (DeepSeek) gives values a size of their own, and values are what a head writes.
    d_head = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // n_heads
    blocks = find_blocks(hf)
    with_heads = tuple(layer for layer, block in enumerate(blocks) if has_heads(block))
    if not with_heads:
        raise UnsupportedModelError(
            f"No layer of {type(hf).__name__} has `{ATTENTION}.{PROJECTION}`, the output projection that reads the "
            "heads; the architecture is not supported."
        )
    return ModelShape(
        n_layers=int(config.num_hidden_layers),
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        d_model=int(config.hidden_size),
        d_head=int(d_head),
        context=int(getattr(config, "max_position_embeddings", 0) or UNLIMITED),
        attention=None if len(with_heads) == len(blocks) else with_heads,
    )


def find_embedding(hf: PreTrainedModel) -> nn.Embedding:
    """The token embedding."""
    return cast(nn.Embedding, hf.get_input_embeddings())


def find_decoder(hf: PreTrainedModel) -> nn.Module:
    """The model without its language-model head; raises UnsupportedModelError if its blocks are not in `.layers`."""
    get_decoder: Callable[[], nn.Module] = hf.get_decoder
    decoder = get_decoder()
    if not hasattr(decoder, "layers"):
        raise UnsupportedModelError(
            f"{type(hf).__name__} keeps its blocks elsewhere than in `.layers`; the architecture is not supported."
        )
    return decoder


def find_blocks(hf: PreTrainedModel) -> nn.ModuleList:
    """The blocks, first to last; raises UnsupportedModelError as `find_decoder`."""
    return cast(nn.ModuleList, find_decoder(hf).layers)


def has_heads(block: nn.Module) -> bool:
    """Whether a block attends with heads."""
    attention = dict(block.named_children()).get(ATTENTION)
    return attention is not None and PROJECTION in dict(attention.named_children())


def find_projection(block: nn.Module) -> nn.Linear:
    """A block's output projection, whose input is `hook_z` with heads concatenated; the block must have heads."""
    return cast(nn.Linear, block.get_submodule(f"{ATTENTION}.{PROJECTION}"))


def find_mlp(block: nn.Module) -> nn.Module | None:
    """A block's MLP; None if it has none under a known name."""
    children = dict(block.named_children())
    return next((children[name] for name in MLPS if name in children), None)


@contextmanager
def cut_to_blocks(hf: PreTrainedModel, first: int, last: int) -> Iterator[list[nn.Module]]:
    """Cuts a model to some of its blocks inside the context; each keeps its own index into the cache.

    A model that looks up a block's kind of attention by its place in the list finds the kinds of these blocks.

    Args:
        hf: the plain model.
        first: first block, from 0.
        last: last block, included.

    Yields:
        The blocks.
    """
    decoder, config = find_decoder(hf), hf.config.get_text_config()
    layers, kinds = decoder.layers, getattr(config, "layer_types", None)
    blocks = list(find_blocks(hf))[first : last + 1]
    decoder.layers = nn.ModuleList(blocks)
    if kinds is not None:
        config.layer_types = kinds[first : last + 1]
    try:
        yield blocks
    finally:
        decoder.layers = layers
        if kinds is not None:
            config.layer_types = kinds
