"""Does TransformerLens see the model that is measured?

Together with hooked.py the only file that knows TransformerLens and its versions. It builds the bridge over a model's
weights, rebuilds plain modules from a ready one, and compares the two views before anything is measured:

1. the output projections read as many numbers as the config's query heads have;
2. the bridge's logits and last residual equal those of the plain Hugging Face model, with no edit;
3. `hook_z` of every attention layer holds the config's query heads, and the same numbers in both views;
4. zeroing a head changes the logits, and equally so through the bridge's `hook_z` and through the plain model's output
   projection.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cliffscope.errors import UnsupportedModelError
from cliffscope.model.architectures import find_embedding
from cliffscope.model.checkpoints import first_line
from cliffscope.model.lens import LensModel

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference allowed between bridge and plain logits, relative to the largest logit."""
_SAMPLE_TOKENS = 12


def boot(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> "TransformerBridge":
    """The bridge over `hf`, from a folder with only the config, since a hub name would make it call the hub."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        hf.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # A class of the checkpoint's own code is only here if that code was trusted.
        trusted = type(tokenizer).__module__.startswith("transformers_modules")
        local = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        try:
            return TransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=local, device=str(device))
        except (ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"TransformerLens has no bridge for {type(hf).__name__}: {first_line(error)}"
            ) from error


def unbridged(original: PreTrainedModel) -> PreTrainedModel:
    """Plain modules over the weights of a model whose modules a bridge has wrapped."""
    plain = type(original)(original.config)
    state = {name.replace("._original_component", ""): weight for name, weight in original.state_dict().items()}
    names = set(plain.state_dict())
    if not names <= set(state):
        raise UnsupportedModelError(
            f"The bridge of {type(original).__name__} holds no weight {sorted(names - set(state))[0]!r}. Load the "
            "model by its path instead."
        )
    plain.load_state_dict({name: weight for name, weight in state.items() if name in names}, assign=True)
    plain.tie_weights()
    cast(nn.Module, plain).to(next(original.parameters()).device).eval()
    return plain


@dataclass(frozen=True, eq=False, kw_only=True)
class _Pass:
    """One forward pass, as a view shows it."""

    logits: Tensor
    """[batch, pos, vocabulary]."""
    residual: Tensor
    """[batch, pos, d_model] `hook_resid_post` of the last block."""
    heads: dict[int, Tensor]
    """[batch, pos, ...] `hook_z` by layer; the bridge may cut it into heads of another size."""


def check_views(model: LensModel) -> None:
    """Runs the checks of the module's header; raises UnsupportedModelError."""
    _check_sizes(model)
    ids = _sample_ids(model)
    with torch.inference_mode():
        bridge, plain = _bridge_pass(model, ids), _plain_pass(model, ids)
    if not bool(torch.isfinite(plain.logits).all()):
        raise UnsupportedModelError(
            f"{model.name!r} gives logits that are not finite: its weights hold NaN or infinity."
        )
    _expect_equal("logits", bridge.logits, plain.logits, model)
    _expect_equal(_residual_name(model.shape.n_layers - 1), bridge.residual, plain.residual, model)
    for layer in model.shape.attention_layers:
        _check_heads(model, layer, bridge.heads.get(layer), plain.heads[layer])
    layers = model.shape.attention_layers
    for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
        _check_zeroing(model, ids, plain.logits, layer)


def _heads_name(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def _residual_name(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def _check_sizes(model: LensModel) -> None:
    """The tokenizer fits the vocabulary, and the heads fit the output projections."""
    shape, vocabulary = model.shape, find_embedding(model.hf).num_embeddings
    if len(model.tokenizer) > vocabulary:
        raise UnsupportedModelError(
            f"The tokenizer of {model.name!r} has {len(model.tokenizer)} ids but the model only {vocabulary} "
            "embeddings. They do not belong together."
        )
    widths = {model.output_projection(layer).in_features for layer in shape.attention_layers}
    if widths != {shape.n_heads * shape.d_head}:
        raise UnsupportedModelError(
            f"The config of {model.name!r} says {shape.n_heads} query heads of {shape.d_head}, but output projections "
            f"read {sorted(widths)} numbers. The config does not describe these weights."
        )


def _sample_ids(model: LensModel) -> Tensor:
    vocabulary = min(len(model.tokenizer), find_embedding(model.hf).num_embeddings)
    ids = torch.randint(0, vocabulary, (1, _SAMPLE_TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def _bridge_pass(model: LensModel, ids: Tensor) -> _Pass:
    values: dict[str, Tensor] = {}

    def store_as(name: str) -> Callable[[Tensor, object], None]:
        def store(value: Tensor, hook: object) -> None:
            # The bridge fires aliases under another name, so the requested name is bound here.
            del hook
            values[name] = value.detach()

        return store

    names = {layer: _heads_name(layer) for layer in model.shape.attention_layers}
    residual = _residual_name(model.shape.n_layers - 1)
    hooks: list[Any] = [(name, store_as(name)) for name in (*names.values(), residual)]
    try:
        logits = model.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)
    except KeyError as error:
        raise UnsupportedModelError(f"TransformerLens has no such hook on {model.name!r}: {error}.") from error
    heads = {layer: values[name] for layer, name in names.items() if name in values}
    return _Pass(logits=logits, residual=values[residual], heads=heads)


def _plain_pass(model: LensModel, ids: Tensor) -> _Pass:
    residuals: list[Tensor] = []
    heads: dict[int, Tensor] = {}
    with (
        model.residual_hook(lambda _, hidden: residuals.append(hidden)),
        model.outputs_hook(lambda layer, z: heads.update({layer: z.detach()})),
    ):
        logits = model.hf(input_ids=ids).logits
    return _Pass(logits=logits, residual=residuals[-1], heads=heads)


def _check_heads(model: LensModel, layer: int, bridged: Tensor | None, plain: Tensor) -> None:
    # The bridge cuts latent attention into heads of the wrong size; their concatenation is the same.
    if bridged is None or bridged.flatten(2).shape != plain.flatten(2).shape:
        size = None if bridged is None else tuple(bridged.shape[-2:])
        raise UnsupportedModelError(
            f"Layer {layer}: {_heads_name(layer)} has shape {size}, but the config says {model.shape.n_heads} query "
            f"heads of {model.shape.d_head}. The heads of this architecture cannot be told apart."
        )
    _expect_equal(_heads_name(layer), bridged.flatten(2), plain.flatten(2), model)


def _check_zeroing(model: LensModel, ids: Tensor, plain: Tensor, layer: int) -> None:
    shape = model.shape
    # The head that writes most; with quantised or offloaded weights, which cannot be compared, the first.
    head = int(model.output_columns(layer).square().sum((0, 2)).argmax()) if model.holds_weights(layer) else 0

    def zero(z: Tensor) -> None:
        z[:, :, head] = 0.0

    def zero_hook(z: Tensor, hook: object) -> Tensor:
        del hook
        changed = z.clone()
        zero(changed.view(*z.shape[:2], shape.n_heads, shape.d_head))
        return changed

    with torch.inference_mode():
        bridged = model.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=[(_heads_name(layer), zero_hook)])
        with model.head_hook(layer, zero):
            edited = model.hf(input_ids=ids).logits
    if bool((edited == plain).all()):
        raise UnsupportedModelError(f"Layer {layer}: zeroing head {head} does not change the logits.")
    _expect_equal(f"the logits with L{layer}H{head} zeroed", bridged, edited, model)


def _expect_equal(what: str, bridged: Tensor, plain: Tensor, model: LensModel) -> None:
    scale = float(plain.float().abs().max()) or 1.0
    difference = float((bridged.float() - plain.float()).abs().max()) / scale
    if not difference <= TOLERANCE.get(model.dtype, 1e-1):
        raise UnsupportedModelError(
            f"{what} of {model.name!r} differ between TransformerLens and plain Hugging Face by {difference:.2g} of "
            f"the largest value (allowed: {TOLERANCE.get(model.dtype, 1e-1):.0e}). Heads would be measured on a "
            "different model. Try another version of TransformerLens, or dtype=torch.float32."
        )
