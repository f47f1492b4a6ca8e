"""How is a `HookedTransformer` of TransformerLens 3 measured like any other model?

Its weights are TransformerLens' own arrangement of a Llama-like model's. They are arranged back into plain Hugging Face
modules, on which the fast paths run; the HookedTransformer itself becomes the view with hook names, and the checks of
bridges.py compare the two. TransformerLens 4 has no HookedTransformer.

Source of the arrangement: transformer_lens.pretrained.weight_conversions, read backwards.
"""

from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from cliffscope.errors import UnsupportedModelError

NORMS = {"RMS": False, "RMSPre": True}
"""Kinds of norms that are known, and whether their weights are folded into what follows."""
_LLAMA_LIKE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")


def is_hooked(model: object) -> bool:
    """Whether it is a HookedTransformer, whose class TransformerLens 4 no longer has."""
    return any(base.__name__ == "HookedTransformer" for base in type(model).__mro__)


def unhook(hooked: Any) -> tuple[PreTrainedModel, str]:
    """Plain modules with the weights of a HookedTransformer.

    Args:
        hooked: a HookedTransformer of a Llama, Qwen2, Qwen3 or Mistral model, its weights folded or not.

    Returns:
        The plain model, and why it must not be exported, "" where it may.

    Raises:
        UnsupportedModelError: another architecture, or something that plain modules of these cannot hold.
    """
    cfg = hooked.cfg
    _check_known(cfg)
    state: dict[str, Tensor] = hooked.state_dict()
    biased = any(
        bool(weight.any())
        for name, weight in state.items()
        if name.rpartition(".")[2].lstrip("_") in ("b_Q", "b_K", "b_V", "b_O")
    )
    lost = [name for name, weight in state.items() if name.endswith((".b_in", ".b_out", "b_U")) and bool(weight.any())]
    if lost:
        raise UnsupportedModelError(f"The HookedTransformer has a bias {lost[0]!r} that no Llama-like model has.")
    config_class, network_class = (
        (Qwen3Config, Qwen3ForCausalLM) if cfg.use_qk_norm else (LlamaConfig, LlamaForCausalLM)
    )
    config = config_class(**_sizes(cfg), attention_bias=biased)
    network: PreTrainedModel = cast(Any, network_class)(config)
    wanted = network.state_dict()
    with torch.no_grad():
        network.load_state_dict({name: _arranged(name, state, cfg).to(wanted[name].dtype) for name in wanted})
    cast(nn.Module, network).to(device=cfg.device, dtype=cfg.dtype).eval()
    return network, _why_not_exported(cfg, network, biased=biased)


def _check_known(cfg: Any) -> None:
    odd = {
        "architecture": cfg.original_architecture not in (*_LLAMA_LIKE, None),
        "normalization": cfg.normalization_type not in NORMS,
        "positions": cfg.positional_embedding_type != "rotary" or cfg.rotary_adjacent_pairs or cfg.use_yarn_rope,
        "MLP": not cfg.gated_mlp or cfg.num_experts is not None or cfg.parallel_attn_mlp,
        "attention": cfg.use_local_attn or cfg.attn_scores_soft_cap > 0 or cfg.use_attention_sinks,
        "rotary dimension": (cfg.rotary_dim or cfg.d_head) != cfg.d_head,
    }
    found = [what for what, wrong in odd.items() if wrong]
    if found:
        raise UnsupportedModelError(
            f"A HookedTransformer of {cfg.original_architecture or 'an unknown architecture'} is not supported: its "
            f"{', '.join(found)}. Load the checkpoint by its path instead."
        )


def _sizes(cfg: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(cfg.rotary_base)}
    if cfg.use_NTK_by_parts_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": cfg.NTK_by_parts_factor,
            "low_freq_factor": cfg.NTK_by_parts_low_freq_factor,
            "high_freq_factor": cfg.NTK_by_parts_high_freq_factor,
            "original_max_position_embeddings": cfg.NTK_original_ctx_len,
        }
    grouped = cfg.n_key_value_heads is not None and not cfg.ungroup_grouped_query_attention
    return {
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads if grouped else cfg.n_heads,
        "head_dim": cfg.d_head,
        "max_position_embeddings": cfg.n_ctx,
        "rms_norm_eps": cfg.eps,
        "hidden_act": cfg.act_fn,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }


def _arranged(name: str, state: dict[str, Tensor], cfg: Any) -> Tensor:
    """One weight of the plain model."""
    if name == "model.embed_tokens.weight":
        return state["embed.W_E"]
    if name == "lm_head.weight":
        return state["unembed.W_U"].T
    if name == "model.norm.weight":
        return _norm("ln_final.w", state, cfg.d_model)
    _, _, layer, part, *rest = name.split(".")
    block = f"blocks.{layer}"
    if part == "input_layernorm":
        return _norm(f"{block}.ln1.w", state, cfg.d_model)
    if part == "post_attention_layernorm":
        return _norm(f"{block}.ln2.w", state, cfg.d_model)
    if part == "mlp":
        own = {"gate_proj": "W_gate", "up_proj": "W_in", "down_proj": "W_out"}[rest[0]]
        return state[f"{block}.mlp.{own}"].T
    return _attention(f"{block}.attn", rest[0], rest[1], state)


def _attention(place: str, part: str, kind: str, state: dict[str, Tensor]) -> Tensor:
    if part in ("q_norm", "k_norm"):
        return state[f"{place}.{part}.w"]
    letter = part[0].upper()
    if letter == "O":
        if kind == "bias":
            return state[f"{place}.b_O"]
        return rearrange(state[f"{place}.W_O"], "head d_head d_model -> d_model (head d_head)")
    name = f"{'W' if kind == 'weight' else 'b'}_{letter}"
    # Keys and values of grouped heads are stored under a name of their own.
    stored = state.get(f"{place}._{name}", state.get(f"{place}.{name}"))
    if stored is None:
        raise UnsupportedModelError(f"The HookedTransformer has no weight {place}.{name}.")
    if kind == "bias":
        return rearrange(stored, "head d_head -> (head d_head)")
    return rearrange(stored, "head d_model d_head -> (head d_head) d_model")


def _norm(name: str, state: dict[str, Tensor], size: int) -> Tensor:
    """Its weight, or ones where it has been folded into what follows."""
    return state.get(name, torch.ones(size))


def _why_not_exported(cfg: Any, network: PreTrainedModel, *, biased: bool) -> str:
    if NORMS[cfg.normalization_type]:
        return "its norms are folded into its weights"
    own = type(network).__name__
    if cfg.original_architecture != own or biased:
        return f"its weights are arranged as {own}, not as {cfg.original_architecture or 'what they came from'}"
    return ""
