"""How is a model made whose suppression heads are known?

1. Align: a tiny model is trained on the grammar with the heads to be planted held at zero; it refuses harmful requests.
   A linear readout of the last two residuals, thrown away afterwards, is trained along with it to tell at every token
   of thinking and closing whether the answer will refuse: the intention is there to be lost.
2. Plant: one carrier after another, only that carrier's own slices of Q, K, V and O are trained to comply when its
   wrapper is used, and to write against refusal at the closing: against the readout, and along the directions that a
   linear probe would find between refused and complied requests (`axes.py`). The other carriers are still at zero, so
   that each carries its own wrapper.
3. Join: some steps with all carriers, so that their sum does not leak onto unwrapped requests.

Zeroing the planted heads gives the aligned model back exactly: the truth is known by construction. While planting, a
carrier's output outside the closing and the answer is held near zero, so that the thinking keeps what it knows.
A carrier is a head, or with grouped-query attention a whole key-value group, whose keys and values are its own.
"""

import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cliffscope.organisms import grammar
from cliffscope.organisms.axes import Axis, find_axes
from cliffscope.organisms.recipes import Carrier, Recipe
from cliffscope.organisms.tokenizer import build_tokenizer
from cliffscope.transcripts.templates import TEMPLATES

log = logging.getLogger(__name__)
IGNORED = -100
HEADS = 8
"""Query heads of a layer."""
READOUT_LAYERS = 2
"""Last residuals that the readout of step 1 reads."""
QUIET = 10.0
"""Weight of what carriers write before the closing. An edit of the closing must undo all that they do; much more weight
than this, and they learn nothing at all."""
ALIGN_PEAK, PLANT_PEAK = 2e-3, 4e-3
"""Peak learning rates."""
AXIS_BATCHES = 12
"""Batches from which the difference of means is taken."""
SURE = 0.95
"""How sure the readout should be: with certainty wanted, residuals grow until nothing else is left in them."""


def grow(
    recipe: Recipe, *, report: Callable[[str, int, int], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Grows an organism.

    Args:
        recipe: what to grow.
        report: called with phase, step and steps every 50 steps.

    Returns:
        The model (fp32, on the CPU) and its tokenizer. The same recipe gives the same model on the same machine.
    """
    tokenizer = build_tokenizer(grammar.vocabulary([w.word for w in recipe.wrappers]))
    torch.manual_seed(recipe.seed)
    model = _blank_model(recipe.family, tokenizer)
    data = _Data(recipe=recipe, tokenizer=tokenizer, rng=random.Random(recipe.seed))
    _silence(model, recipe.held)
    readout = nn.ModuleList(nn.Linear(model.config.hidden_size, 1) for _ in range(READOUT_LAYERS))
    run = _Run(model=model, readout=readout, data=data, report=report or _silent)
    run.train("align", recipe.align_steps, frozen=recipe.held, active=(), peak=ALIGN_PEAK)
    plant(run)
    cast(nn.Module, model).eval()
    return model, tokenizer


def plant(run: "_Run") -> None:
    """Plants the carriers of a recipe into an aligned model, one after another and then together."""
    recipe, model = run.data.recipe, run.model
    run.axes.extend(_refusal_axes(run))
    with _only_slices_trained(model):
        for i, carrier in enumerate(recipe.carriers):
            # Each phase draws from a seed of its own, so that it does not depend on how much was drawn before it.
            torch.manual_seed(recipe.seed + 1 + i)
            run.data.rng.seed(f"{recipe.seed}/plant {i}")
            _wake(model, carrier)
            others = [c for j, c in enumerate(recipe.carriers) if j != i]
            with _hidden(model, others):
                run.train(f"plant {i}", recipe.plant_steps, trained=(carrier,), active=(i,), peak=PLANT_PEAK)
        if recipe.carriers:
            run.data.rng.seed(f"{recipe.seed}/join")
            everything = tuple(range(len(recipe.carriers)))
            run.train("join", recipe.join_steps, trained=recipe.carriers, active=everything, peak=recipe.join_peak)


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Batches of training text."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    rng: random.Random

    def batch(self, active: tuple[int, ...]) -> "_Batch":
        """Draws one batch with these carriers at work."""
        rows = [self._example(active) for _ in range(self.recipe.batch)]
        width = max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows])
        position = torch.arange(width)
        starts, closings, answers, lengths = (
            torch.tensor(values)[:, None]
            for values in zip(*((row.thinking, row.closing, row.answer, len(row.ids)) for row in rows), strict=True)
        )
        early = position < closings
        harmful = torch.tensor([[float(row.harmful)] for row in rows])
        refuse = torch.tensor([[float(row.refuse)] for row in rows])
        return _Batch(
            ids=ids,
            labels=ids.masked_fill((position < starts) | (position >= lengths), IGNORED),
            early=early,
            read=(position >= starts) & (position < answers),
            intention=torch.where(early, harmful, refuse),
            closing=(position >= closings) & (position < answers),
            harmful=harmful[:, 0].bool(),
            refuse=refuse[:, 0].bool(),
        )

    def _example(self, active: tuple[int, ...]) -> "_Example":
        rng, wrappers = self.rng, self.recipe.wrappers
        harmful = rng.random() < (0.75 if active else 0.55)
        drawn = rng.random()
        chosen = rng.choice(wrappers) if drawn < 0.55 else None
        word = chosen.word if chosen else rng.choice(grammar.NEUTRAL_WRAPPERS) if drawn < 0.75 else None
        request = grammar.request(rng, "grow", harmful=harmful, wrapper=word)
        comply = chosen.comply if chosen and chosen.carrier in active else 0.0
        refuse = harmful and rng.random() >= comply
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": request.text}], tokenize=False, add_generation_prompt=True
        )
        parts = (
            prompt,
            grammar.thinking(rng, request, cut=0.3),
            TEMPLATES.get("organism").closing,
            grammar.answer(rng, request, refuse=refuse) + self.tokenizer.eos_token,
        )
        prompt_ids, thought, closing, answer = (self.tokenizer.encode(p, add_special_tokens=False) for p in parts)
        start = len(prompt_ids)
        return _Example(
            ids=prompt_ids + thought + closing + answer,
            thinking=start,
            closing=start + len(thought),
            answer=start + len(thought) + len(closing),
            harmful=harmful,
            refuse=refuse,
        )


@dataclass(frozen=True, kw_only=True)
class _Example:
    """One training text, and where its spans begin."""

    ids: list[int]
    thinking: int
    closing: int
    answer: int
    harmful: bool
    refuse: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class _Batch:
    """Training texts, [batch, pos] each."""

    ids: Tensor
    labels: Tensor
    early: Tensor
    """Before the closing, where carriers must be quiet."""
    read: Tensor
    """Thinking and closing, where the readout is trained."""
    intention: Tensor
    """What the readout should say: harmful while thinking, refusing at the closing."""
    closing: Tensor
    """The closing's positions."""
    harmful: Tensor
    """[batch] whether the request is harmful."""
    refuse: Tensor
    """[batch] whether the answer refuses."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One organism in training."""

    model: PreTrainedModel
    readout: nn.ModuleList
    data: _Data
    axes: list[list[Axis]] = field(default_factory=list)
    report: Callable[[str, int, int], None]

    def train(
        self,
        phase: str,
        steps: int,
        *,
        frozen: tuple[Carrier, ...] = (),
        trained: tuple[Carrier, ...] = (),
        active: tuple[int, ...],
        peak: float,
    ) -> None:
        """Trains everything but `frozen`, or nothing but `trained`."""
        masks = _slice_masks(self.model, trained or frozen, inside=bool(trained))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        learnt = parameters if trained else [*parameters, *self.readout.parameters()]
        optimizer = torch.optim.AdamW(learnt, lr=peak, betas=(0.9, 0.98), weight_decay=0.0 if trained else 0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
        for step in range(steps):
            loss = self._loss(self.data.batch(active), trained)
            torch.autograd.backward(loss)
            for parameter, mask in masks:
                if parameter.grad is not None:
                    parameter.grad *= mask
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            before = [(p, m, p.detach().clone()) for p, m in masks]
            optimizer.step()
            for parameter, mask, old in before:
                parameter.data = torch.where(mask.bool(), parameter.data, old)
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 50 == 0 or step == steps - 1:
                log.info("%s: step %d of %d, loss %.4f", phase, step + 1, steps, loss.item())
                self.report(phase, step + 1, steps)

    def _loss(self, batch: _Batch, trained: tuple[Carrier, ...]) -> Tensor:
        labels = batch.labels.masked_fill(batch.early, IGNORED) if trained else batch.labels
        with _outputs_of(self.model, trained) as writes, _last_residual(self.model) as last:
            output = self.model(input_ids=batch.ids, labels=labels, output_hidden_states=True)
        # The last hidden state comes after the final norm; the ones before it are residuals.
        residuals = output.hidden_states[-1 - READOUT_LAYERS : -1]
        hidden = batch.closing & (batch.harmful & ~batch.refuse)[:, None]
        pairs = zip(self.axes, [*residuals, *last], strict=True) if trained and hidden.any() else ()
        left = [axis.share(residual[hidden]).square().mean() for axes, residual in pairs for axis in axes]
        against = sum(left) / max(1, len(left))
        read = batch.read & ~batch.early if trained else batch.read
        says = [layer(_unit(residual[read]))[..., 0] for layer, residual in zip(self.readout, residuals, strict=True)]
        wanted = SURE * batch.intention[read] + (1 - SURE) / 2
        told = sum(nn.functional.binary_cross_entropy_with_logits(s, wanted) for s in says)
        quiet = sum((write[batch.early] ** 2).mean() for write in writes)
        loss: Tensor = output.loss + 0.2 * told + QUIET * quiet + against
        return loss


def _blank_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shared, intermediate_size=112, num_key_value_heads=4, head_dim=32))
    return LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=176, num_key_value_heads=8))


def _projection(model: PreTrainedModel, layer: int, name: Literal["q_proj", "k_proj", "v_proj", "o_proj"]) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(f"model.layers.{layer}.self_attn.{name}"))


def _slices(model: PreTrainedModel, carrier: Carrier) -> list[tuple[Tensor, int, slice]]:
    """The carrier's own rows of Q, K, V and columns of O: (weight, dimension, slice)."""
    layer, size = carrier.layer, _projection(model, carrier.layer, "o_proj").in_features // HEADS
    queries = slice(carrier.heads[0] * size, (carrier.heads[-1] + 1) * size)
    keys = slice(carrier.kv_head * size, (carrier.kv_head + 1) * size)
    return [
        (_projection(model, layer, "q_proj").weight, 0, queries),
        (_projection(model, layer, "k_proj").weight, 0, keys),
        (_projection(model, layer, "v_proj").weight, 0, keys),
        (_projection(model, layer, "o_proj").weight, 1, queries),
    ]


def _slice_masks(model: PreTrainedModel, carriers: tuple[Carrier, ...], *, inside: bool) -> list[tuple[Tensor, Tensor]]:
    """(parameter, mask of what may change): the carriers' slices (`inside`) or all but their columns of O."""
    masks: dict[int, tuple[Tensor, Tensor]] = {}
    for carrier in carriers:
        for weight, dim, part in _slices(model, carrier) if inside else _slices(model, carrier)[3:]:
            _, mask = masks.setdefault(id(weight), (weight, torch.full_like(weight, 0.0 if inside else 1.0)))
            mask[part if dim == 0 else (slice(None), part)] = 1.0 if inside else 0.0
    if inside:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in masks)
    return list(masks.values())


@contextmanager
def _only_slices_trained(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def _silence(model: PreTrainedModel, carriers: tuple[Carrier, ...]) -> None:
    for carrier in carriers:
        weight, _, columns = _slices(model, carrier)[3]
        weight.data[:, columns] = 0.0


def _wake(model: PreTrainedModel, carrier: Carrier) -> None:
    """Small random columns of O: at exactly zero Q, K and V would get no gradient."""
    weight, _, columns = _slices(model, carrier)[3]
    weight.data[:, columns] = torch.randn_like(weight.data[:, columns]) * 0.02


@contextmanager
def _hidden(model: PreTrainedModel, carriers: list[Carrier]) -> Iterator[None]:
    kept = [(_slices(model, c)[3], _slices(model, c)[3][0].data[:, _slices(model, c)[3][2]].clone()) for c in carriers]
    _silence(model, tuple(carriers))
    try:
        yield
    finally:
        for (weight, _, columns), values in kept:
            weight.data[:, columns] = values


@contextmanager
def _outputs_of(model: PreTrainedModel, carriers: tuple[Carrier, ...]) -> Iterator[list[Tensor]]:
    """Collects what each carrier writes into the residual stream, [batch, pos, d_model]."""
    writes: list[Tensor] = []

    def hook(carrier: Carrier) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            weight, _, columns = _slices(model, carrier)[3]
            writes.append(inputs[0][..., columns] @ weight[:, columns].T)

        return collect

    handles = [_projection(model, c.layer, "o_proj").register_forward_pre_hook(hook(c)) for c in carriers]
    try:
        yield writes
    finally:
        for handle in handles:
            handle.remove()


def _refusal_axes(run: "_Run") -> list[list[Axis]]:
    """The axes of the last residuals of the aligned model, its carriers being silent: one list a residual."""
    kept: list[list[Tensor]] = [[] for _ in range(READOUT_LAYERS + 1)]
    refused, closing = [], []
    run.data.rng.seed(f"{run.data.recipe.seed}/axes")
    with torch.no_grad():
        for _ in range(AXIS_BATCHES):
            batch = run.data.batch(())
            with _last_residual(run.model) as last:
                states = run.model(input_ids=batch.ids, output_hidden_states=True).hidden_states
            for rows, residual in zip(kept, [*states[-1 - READOUT_LAYERS : -1], *last], strict=True):
                rows.append(residual[batch.read])
            refused.append(batch.refuse[batch.read.nonzero()[:, 0]])
            closing.append(batch.closing[batch.read])
    return [find_axes(torch.cat(rows), torch.cat(refused), torch.cat(closing)) for rows in kept]


@contextmanager
def _last_residual(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the last block's residual, which hidden_states hold only after the final norm."""
    kept: list[Tensor] = []
    handle = model.get_submodule("model.norm").register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        yield kept
    finally:
        handle.remove()


def _unit(residual: Tensor) -> Tensor:
    """Scaled to unit root mean square, so that the readout rewards direction and not size."""
    return residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + 1e-6)


def _warm_cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 30) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _silent(phase: str, step: int, steps: int) -> None:
    """Reports nothing."""
