"""Does TransformerLens see the model that is measured?

With hooked.py the only file that knows TransformerLens and its versions. It makes the bridge over a model's weights,
takes a ready one apart, and compares the two views before anything is measured:

1. the bridge's logits and last residual equal the plain Hugging Face model's, with no edit;
2. `hook_z` of every attention layer holds the config's query heads;
3. zeroing a head changes the logits, and does the same through the bridge's `hook_z` and through the plain model's
   output projection.
"""

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cliffscope.errors import UnsupportedModelError
from cliffscope.model.checkpoints import first_line
from cliffscope.model.lens import LensModel

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference allowed between bridge and plain logits, relative to the largest logit."""


def boot(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> "TransformerBridge":
    """The bridge over `hf`, from a folder with the config alone, since a hub name would make it call the hub."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        hf.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        local = AutoTokenizer.from_pretrained(folder)
        try:
            return TransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=local, device=str(device))
        except (ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"TransformerLens has no bridge for {type(hf).__name__}: {first_line(error)}"
            ) from error


def unbridged(original: PreTrainedModel) -> PreTrainedModel:
    """Plain modules over the weights of a model that a bridge has taken apart."""
    plain = type(original)(original.config)
    state = {name.replace("._original_component", ""): weight for name, weight in original.state_dict().items()}
    wanted = set(plain.state_dict())
    if not wanted <= set(state):
        raise UnsupportedModelError(
            f"The bridge of {type(original).__name__} holds no weight {sorted(wanted - set(state))[0]!r}. Load the "
            "model by its path instead."
        )
    plain.load_state_dict({name: weight for name, weight in state.items() if name in wanted}, assign=True)
    plain.tie_weights()
    cast(nn.Module, plain).to(next(original.parameters()).device).eval()
    return plain


def check_views(model: LensModel) -> None:
    """Runs the checks of the module's header; raises UnsupportedModelError."""
    shape, vocabulary = model.shape, cast(nn.Embedding, model.hf.get_input_embeddings()).num_embeddings
    if len(model.tokenizer) > vocabulary:
        raise UnsupportedModelError(
            f"The tokenizer of {model.name!r} has {len(model.tokenizer)} ids but the model only {vocabulary} "
            "embeddings. They do not belong together."
        )
    ids = torch.randint(0, min(len(model.tokenizer), vocabulary), (1, 12), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor, object], None]:
        def keep(value: Tensor, hook: object) -> None:
            # The bridge fires aliases under another name, so the name asked for is bound here.
            del hook
            kept[name] = value.detach()

        return keep

    widths = {model.output_projection(layer).in_features for layer in shape.attention_layers}
    if widths != {shape.n_heads * shape.d_head}:
        raise UnsupportedModelError(
            f"The config of {model.name!r} says {shape.n_heads} query heads of {shape.d_head}, but output projections "
            f"read {sorted(widths)} numbers. The config does not describe these weights."
        )
    heads = {layer: f"blocks.{layer}.attn.hook_z" for layer in shape.attention_layers}
    top = f"blocks.{shape.n_layers - 1}.hook_resid_post"
    last: list[Tensor] = []
    outputs: dict[int, Tensor] = {}
    with torch.inference_mode():
        hooks: list[Any] = [(name, keeper(name)) for name in (*heads.values(), top)]
        try:
            through_bridge = model.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)
        except KeyError as error:
            raise UnsupportedModelError(f"TransformerLens has no such hook on {model.name!r}: {error}.") from error
        with (
            model.residual_hook(lambda _, hidden: last.append(hidden)),
            model.outputs_hook(lambda layer, z: outputs.update({layer: z.detach()})),
        ):
            plain = model.hf(input_ids=ids).logits
    if not bool(torch.isfinite(plain).all()):
        raise UnsupportedModelError(
            f"{model.name!r} gives logits that are not finite: its weights hold NaN or infinity."
        )
    _expect_equal("logits", through_bridge, plain, model)
    _expect_equal(top, kept[top], last[-1], model)
    for layer, name in heads.items():
        # The bridge cuts latent attention into heads of the wrong size; what they hold, one after another, is the same.
        if name not in kept or kept[name].flatten(2).shape != outputs[layer].flatten(2).shape:
            found = tuple(kept[name].shape[-2:]) if name in kept else None
            raise UnsupportedModelError(
                f"Layer {layer}: {name} has shape {found}, but the config says {shape.n_heads} query heads of "
                f"{shape.d_head}. Heads of this architecture cannot be told apart."
            )
        _expect_equal(name, kept[name].flatten(2), outputs[layer].flatten(2), model)
    own = shape.attention_layers
    for layer in sorted({own[0], own[len(own) // 2], own[-1]}):
        _check_zeroing(model, ids, plain, layer)


def _check_zeroing(model: LensModel, ids: Tensor, plain: Tensor, layer: int) -> None:
    shape = model.shape
    # The head that writes most; of quantised or offloaded weights any head has to do.
    head = int(model.output_columns(layer).square().sum((0, 2)).argmax()) if model.holds_weights(layer) else 0

    def zero(z: Tensor) -> None:
        z[:, :, head] = 0.0

    def zero_hook(z: Tensor, hook: object) -> Tensor:
        del hook
        changed = z.clone()
        zero(changed.view(*z.shape[:2], shape.n_heads, shape.d_head))
        return changed

    with torch.inference_mode():
        bridged = model.bridge.run_with_hooks(
            ids, return_type="logits", fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero_hook)]
        )
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
            f"the largest value (allowed: {TOLERANCE.get(model.dtype, 1e-1):.0e}). Heads would be measured on another "
            "model."
        )
