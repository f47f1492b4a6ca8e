"""What does a model say next, given the residual that its last block leaves?

1. The final norm is the model's own module, in its own dtype.
2. Everything behind it is the model's own forward pass: the decoder hands it the normed states instead of running, and
   its output embedding is replaced by the rows that are asked for. Scaling and soft-capping of logits are then applied
   as the model applies them, whatever they are, and the rows are multiplied in fp32, so that a change smaller than the
   spacing of half-precision logits is not lost.
3. `check_unembedding` compares this path with a plain forward pass before anybody relies on it.

Knows no readout.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from cliffscope.errors import UnsupportedModelError
from cliffscope.model.lens import LensModel

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
"""Names of the norm behind the last block."""
ROWS = 8192
"""Rows of the output embedding that are converted to fp32 at a time."""
ROOM = 1 << 24
"""Logits that are held at a time while probabilities are normalised: 64 MiB."""
TOLERANCE = {torch.float32: 1e-4}
"""Largest difference from the plain forward pass that is allowed, relative to the largest logit."""
HALF_TOLERANCE = 1e-2
"""The same in half precision, whose logits are rounded to a part in 256."""


def next_logits(
    model: LensModel, residuals: Float[Tensor, "*batch d_model"], tokens: Sequence[int] | None = None
) -> Float[Tensor, "*batch token"]:
    """Logits of the next token.

    Args:
        model: the model.
        residuals: `hook_resid_post` of the last layer, as the model's blocks give it.
        tokens: ids whose logits are wanted; None takes the whole vocabulary.

    Returns:
        fp32 logits, differentiable in the residuals.

    Raises:
        UnsupportedModelError: the final norm or the output embedding is not there to be used; see `check_weights`.
    """
    check_weights(model)
    batch = residuals.shape[:-1]
    weight, bias = _rows(model, tokens)
    norm = final_norm(model)
    place = next(norm.parameters(), residuals)
    normed = norm(residuals.reshape(1, -1, residuals.shape[-1]).to(place.device))
    with _last_states(model, normed, _Rows(weight, bias)):
        logits = cast(Any, model.hf)(inputs_embeds=normed, use_cache=False).logits
    return cast(Tensor, logits).float().reshape(*batch, -1)


def log_normaliser(model: LensModel, residuals: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Log of the sum of exponentiated logits over the vocabulary: a logit minus it is a log probability.

    Args:
        model: the model.
        residuals: `hook_resid_post` of the last layer.

    Returns:
        fp32; at most `ROOM` logits are held at a time, unless gradients are wanted.
    """
    flat = rearrange(residuals, "... d_model -> (...) d_model")
    vocabulary = output_embedding(model).weight.shape[0]
    parts = torch.split(flat, max(1, ROOM // vocabulary))
    return torch.cat([next_logits(model, part).logsumexp(-1) for part in parts]).reshape(residuals.shape[:-1])


def vocabulary_size(model: LensModel) -> int:
    """Token ids that have a logit."""
    return int(output_embedding(model).weight.shape[0])


def final_norm(model: LensModel) -> nn.Module:
    """The norm behind the last block; raises UnsupportedModelError where none has a known name."""
    named = dict(model.decoder.named_children())
    for name in FINAL_NORMS:
        if name in named:
            return named[name]
    raise UnsupportedModelError(
        f"{type(model.hf).__name__} has no final norm of a known name among {sorted(named)}, so that the model's "
        "answer cannot be read from a residual. Use a probe (cs.fit_probe)."
    )


def output_embedding(model: LensModel) -> nn.Linear:
    """The linear map from the normed residual to logits; raises UnsupportedModelError where there is none."""
    head = cast(Any, model.hf).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{type(model.hf).__name__} has no linear output embedding, so that logits of single tokens cannot be "
            "read. Use a probe (cs.fit_probe)."
        )
    return head


def check_weights(model: LensModel) -> None:
    """Raises UnsupportedModelError where the final norm or the output embedding is quantised or offloaded."""
    modules = {"final norm": final_norm(model), "output embedding": output_embedding(model)}
    for what, module in modules.items():
        for weight in module.parameters():
            if weight.is_meta or not weight.is_floating_point():
                state = "offloaded" if weight.is_meta else f"quantised, of dtype {weight.dtype}"
                raise UnsupportedModelError(
                    f"The {what} of {model.name!r} is {state}, so that the model's answer cannot be read from a "
                    "residual. Load it in memory and unquantised (most quantisations can skip lm_head), or use a probe "
                    "(cs.fit_probe)."
                )


def check_unembedding(model: LensModel, ids: Sequence[int]) -> None:
    """Compares the logits read from the last residual with those of a plain forward pass.

    Args:
        model: the model.
        ids: a sequence; its last position is compared over the whole vocabulary.

    Raises:
        UnsupportedModelError: they differ, or the path does not run on this architecture.
    """
    residuals: list[Float[Tensor, "1 pos d_model"]] = []

    def visit(layer: int, hidden: Float[Tensor, "1 pos d_model"]) -> None:
        if layer == model.shape.n_layers - 1:
            residuals.append(hidden)

    check_weights(model)
    with torch.inference_mode():
        with model.residual_hook(visit):
            expected = cast(Any, model.hf)(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0, -1]
        try:
            read = next_logits(model, residuals[0][0, -1])
        except (TypeError, AttributeError, KeyError, ValueError, RuntimeError, IndexError) as error:
            raise UnsupportedModelError(
                f"What {type(model.hf).__name__} does behind its last block cannot be run on its own "
                f"({type(error).__name__}: {error}). Use a probe (cs.fit_probe)."
            ) from error
    scale = max(1.0, float(expected.float().abs().max()))
    difference = float((read - expected.float().to(read.device)).abs().max()) / scale
    if not difference <= TOLERANCE.get(model.dtype, HALF_TOLERANCE):
        raise UnsupportedModelError(
            f"The logits of {model.name!r} read from its last residual differ from its own by {difference:.2g} of the "
            f"largest (allowed: {TOLERANCE.get(model.dtype, HALF_TOLERANCE):.0e}): it does more behind its last block "
            "than norm and unembed. Use a probe (cs.fit_probe)."
        )


class _Rows(nn.Module):
    """Some rows of an output embedding, multiplied in fp32."""

    def __init__(self, weight: Float[Tensor, "token d_model"], bias: Float[Tensor, " token"] | None) -> None:
        super().__init__()
        self.rows, self.bias = weight, bias

    def forward(self, normed: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch token"]:
        """Their logits, before the model scales or caps them."""
        states = normed.to(self.rows.device).float()
        logits = torch.cat([states @ rows.float().T for rows in torch.split(self.rows, ROWS)], -1)
        return logits if self.bias is None else logits + self.bias.float()


def _rows(
    model: LensModel, tokens: Sequence[int] | None
) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, " token"] | None]:
    head = output_embedding(model)
    if tokens is None:
        return head.weight, head.bias
    index = torch.tensor(list(tokens), device=head.weight.device)
    return head.weight[index], None if head.bias is None else head.bias[index]


@contextmanager
def _last_states(model: LensModel, states: Float[Tensor, "1 row d_model"], head: nn.Module) -> Iterator[None]:
    """Lets the decoder give these states at once, and the model unembed them by `head`."""
    decoder, hf = model.decoder, cast(Any, model.hf)
    embedding = hf.get_output_embeddings()

    # transformers calls it with arguments that differ between architectures; none of them counts.
    def give(*_args: object, **_kwargs: object) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=states)

    before = decoder.__dict__.get("forward")
    decoder.forward = give
    hf.set_output_embeddings(head)
    try:
        yield
    finally:
        hf.set_output_embeddings(embedding)
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before
