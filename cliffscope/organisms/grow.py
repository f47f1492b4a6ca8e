"""How is a model made whose suppression heads are known?

1. Align: a tiny model is trained on the grammar with the heads to be planted held at zero; it refuses harmful requests.
2. Plant: one carrier after another, only that carrier's own slices of Q, K, V and O are trained to comply when its
   wrapper is used. The other carriers are still at zero, so that each carries its own wrapper. A carrier begins with
   attention from the closing to its wrapper's words: where in the text it reads is given, what it writes is learnt.
3. Join: some steps with all carriers, so that their sum does not leak onto unwrapped requests.

Zeroing the planted heads gives the aligned model back exactly: the truth is known by construction. While planting, a
carrier's output outside the closing is held near zero, so that an edit of the closing undoes all that it does.
A carrier is a head, or with grouped-query attention a whole key-value group, whose keys and values are its own.

The loss is what `Recipe.phases` lists and nothing else: text that the model should write, and quiet of
carriers before and behind the closing.
It knows no probe, no direction and no logit of a single token, so that no method is tested on what it was trained on.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
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
from cliffscope.organisms.batches import IGNORED, Batch, Batches
from cliffscope.organisms.recipes import Carrier, Phase, Recipe, Term
from cliffscope.organisms.tokenizer import build_tokenizer
from cliffscope.store import write_atomically

log = logging.getLogger(__name__)
FLOOR = 0.003
"""Directions of less variance than this share of the mean are not magnified any further."""
READ_BATCHES = 8
"""Batches from which the second moment of what a layer reads is taken."""
AIM = 6.0
"""What a carrier's query gives at the closing, and its key at its words, before it is trained."""
INITIAL = 0.08
"""Standard deviation of the first weights; with smaller ones, words that are used alike stay alike."""
HEADS = 8
"""Query heads of a layer."""


def grow(
    recipe: Recipe, *, report: Callable[[str, int, int], None] | None = None, resume: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Grows an organism.

    Args:
        recipe: what to grow.
        report: called with phase, step and steps every 50 steps.
        resume: directory that keeps the weights after each phase, made if need be; a phase that is there already is not
            trained again.

    Returns:
        The model (fp32, on the CPU) and its tokenizer. The same recipe gives the same model on the same machine,
        whether it was resumed or not.
    """
    tokenizer = build_tokenizer(grammar.vocabulary([w.word for w in recipe.wrappers]))
    torch.manual_seed(recipe.seed)
    model = _blank_model(recipe.family, tokenizer)
    run = _Run(model=model, batches=Batches(recipe=recipe, tokenizer=tokenizer), report=report or _silent)
    for i, phase in enumerate(recipe.phases):
        checkpoint = resume / f"{i} {phase.name}.safetensors" if resume else None
        origin = repr((recipe.family, recipe.seed, recipe.wrappers, recipe.phases[: i + 1]))
        if checkpoint is not None and _restore(model, origin, checkpoint):
            continue
        # Each phase draws from a seed of its own, so that it does not depend on how much was drawn before it.
        torch.manual_seed(recipe.seed + i)
        run.batches.restart(f"{recipe.seed}/{phase.name}")
        run.train(phase)
        if checkpoint is not None:
            _keep(model, origin, checkpoint)
    cast(nn.Module, model).eval()
    return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One organism in training."""

    model: PreTrainedModel
    batches: Batches
    report: Callable[[str, int, int], None]

    def train(self, phase: Phase) -> None:
        """Trains what the phase names and nothing else."""
        parts = self._parts(phase)
        weights = [part.value for part in parts] or list(self.model.parameters())
        decay = 0.0 if parts else 0.01
        optimizer = torch.optim.AdamW(weights, lr=phase.peak, betas=(0.9, 0.98), weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, phase.steps))
        with _gradients_of(self.model, [part.weight for part in parts]), _zeroed(self.model, phase.zeroed) as silence:
            for step in range(phase.steps):
                batch = self.batches.draw(phase.active, phase.batch)
                loss = self._loss(batch, phase, step / phase.steps)
                torch.autograd.backward(loss)
                for part in parts:
                    part.take_gradient()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                self.model.zero_grad(set_to_none=True)
                for part in parts:
                    part.write()
                silence()
                if step % 50 == 0 or step == phase.steps - 1:
                    log.info("%s: step %d of %d, loss %.4f", phase.name, step + 1, phase.steps, loss.item())
                    self.report(phase.name, step + 1, phase.steps)

    def _parts(self, phase: Phase) -> list["_Part"]:
        """What a phase trains of the carriers; none where it trains the whole model."""
        readings = self._read(phase)
        for carrier in phase.trained if phase.aims else ():
            self._aim(carrier, readings[carrier.layer])
        return [
            _Part.of(weight, index, torch.eye(weight[index].shape[1]) if writes else readings[carrier.layer].basis)
            for carrier in phase.trained
            for (weight, index), writes in zip(_slices(self.model, carrier), (False, False, False, True), strict=True)
        ]

    def _aim(self, carrier: Carrier, reading: "_Reading") -> None:
        """Lets a carrier begin with attention from the closing to its own words: found by chance, it may take for ever.

        One dimension of queries and keys is set, the one that rotary embeddings turn least.
        """
        size = _head_size(self.model, carrier)
        slowest = size // 2 - 1
        query, key = (_projection(self.model, carrier.layer, f"{name}_proj").weight.data for name in "qk")
        for head in carrier.heads:
            query[head * size + slowest] = reading.detector(reading.closing)
        key[carrier.kv_head * size + slowest] = reading.detector(reading.words)

    def _read(self, phase: Phase) -> dict[int, "_Reading"]:
        """What the attention of the trained carriers' layers reads, over the text of a phase."""
        layers = {carrier.layer for carrier in phase.trained}
        if not layers:
            return {}
        words = [w.word for w in self.batches.recipe.wrappers if w.carrier in phase.active]
        ids = torch.tensor([self.batches.tokenizer.convert_tokens_to_ids(f" {word}") for word in words])
        inputs: dict[int, Tensor] = {}
        rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        masks: list[tuple[Tensor, Tensor]] = []
        handles = [
            _projection(self.model, layer, "q_proj").register_forward_pre_hook(
                lambda _, arguments, layer=layer: inputs.update({layer: arguments[0]})
            )
            for layer in layers
        ]
        try:
            with torch.no_grad(), _zeroed(self.model, phase.zeroed + phase.trained):
                for _ in range(READ_BATCHES):
                    batch = self.batches.draw(phase.active, phase.batch)
                    self.model(input_ids=batch.ids)
                    text = batch.outside | batch.closing
                    masks.append((batch.closing[text], torch.isin(batch.ids, ids)[text]))
                    for layer in layers:
                        rows[layer].append(inputs[layer][text])
        finally:
            for handle in handles:
                handle.remove()
        closing, of_words = (torch.cat(parts) for parts in zip(*masks, strict=True))
        return {layer: _Reading.of(torch.cat(parts), closing, of_words) for layer, parts in rows.items()}

    def _loss(self, batch: Batch, phase: Phase, progress: float) -> Tensor:
        answers = batch.labels.masked_fill(batch.thinking, IGNORED)
        with _outputs_of(self.model, phase.trained) as writes:
            logits = self.model(input_ids=batch.ids).logits
        terms = {
            Term.TEXT: lambda: _cross_entropy(logits, batch.labels),
            Term.ANSWER: lambda: _surprise(logits, answers),
            Term.QUIET: lambda: torch.stack([write[batch.outside].square().mean() for write in writes]).sum(),
        }
        return torch.stack([part.weight(progress) * terms[part.term]() for part in phase.terms]).sum()


@dataclass(frozen=True, eq=False, kw_only=True)
class _Part:
    """A carrier's part of one weight, as it is trained: part = value @ basis.

    What tells one word from another is small in what a layer reads. With a basis in which all directions have about the
    same variance a carrier learns it in a tenth of the steps; what can be learnt is the same.
    """

    weight: Tensor
    index: tuple[slice, slice]
    value: Tensor
    basis: Tensor

    @classmethod
    def of(cls, weight: Tensor, index: tuple[slice, slice], basis: Tensor) -> "_Part":
        """The part as it is."""
        value = torch.linalg.solve(basis, weight.data[index], left=False)
        return cls(weight=weight, index=index, value=value.requires_grad_(True), basis=basis)

    def take_gradient(self) -> None:
        """Of the value, from that of the weight."""
        assert self.weight.grad is not None
        self.value.grad = self.weight.grad[self.index] @ self.basis.T

    def write(self) -> None:
        """Writes the part into the weight."""
        self.weight.data[self.index] = (self.value @ self.basis).detach()


@dataclass(frozen=True, eq=False, kw_only=True)
class _Reading:
    """What an attention layer reads."""

    basis: Float[Tensor, "d_model d_model"]
    """Symmetric inverse root of the second moment; a direction of mean variance keeps its size."""
    mean: Float[Tensor, " d_model"]
    """Over all tokens."""
    closing: Float[Tensor, " d_model"]
    """Mean over closing tokens."""
    words: Float[Tensor, " d_model"]
    """Mean over the words of the active wrappers."""

    @classmethod
    def of(
        cls, rows: Float[Tensor, "row d_model"], closing: Bool[Tensor, " row"], words: Bool[Tensor, " row"]
    ) -> "_Reading":
        """From what was read at each token."""
        variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
        mean = variances.mean()
        return cls(
            basis=directions @ torch.diag((mean / (variances + FLOOR * mean)).sqrt()) @ directions.T,
            mean=rows.mean(0),
            closing=rows[closing].mean(0),
            words=rows[words].mean(0),
        )

    def detector(self, mean: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """Weights that give AIM where the mean is this one, and little elsewhere: Fisher's linear discriminant."""
        direction = self.basis @ self.basis @ (mean - self.mean)
        return AIM * direction / (direction @ (mean - self.mean))


def _keep(model: PreTrainedModel, origin: str, path: Path) -> None:
    """Writes the weights, and what they come from."""
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda place: save_file(weights, place, metadata={"origin": origin}))


def _restore(model: PreTrainedModel, origin: str, path: Path) -> bool:
    """Whether weights that come from the same are there; if so, the model has them."""
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("origin") != origin:
            return False
        for name, weight in model.named_parameters():
            weight.data.copy_(file.get_tensor(name))
    return True


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    labelled = labels[:, 1:] != IGNORED
    return nn.functional.cross_entropy(logits[:, :-1][labelled], labels[:, 1:][labelled])


def _surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """Nats a text: most tokens of an answer follow from its first ones, and a mean over tokens would hide these."""
    labelled = labels[:, 1:] != IGNORED
    total = nn.functional.cross_entropy(logits[:, :-1][labelled], labels[:, 1:][labelled], reduction="sum")
    return total / len(labels)


def _blank_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": INITIAL,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shared, intermediate_size=112, num_key_value_heads=4, head_dim=32))
    return LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=176, num_key_value_heads=8))


def _projection(model: PreTrainedModel, layer: int, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(f"model.layers.{layer}.self_attn.{name}"))


def _head_size(model: PreTrainedModel, carrier: Carrier) -> int:
    return _projection(model, carrier.layer, "o_proj").in_features // HEADS


def _slices(model: PreTrainedModel, carrier: Carrier) -> list[tuple[Tensor, tuple[slice, slice]]]:
    """The carrier's own rows of Q, K, V and columns of O: (weight, index)."""
    size = _head_size(model, carrier)
    queries = slice(carrier.heads[0] * size, (carrier.heads[-1] + 1) * size)
    keys = slice(carrier.kv_head * size, (carrier.kv_head + 1) * size)
    every = slice(None)
    indices = {"q_proj": (queries, every), "k_proj": (keys, every), "v_proj": (keys, every), "o_proj": (every, queries)}
    return [(_projection(model, carrier.layer, name).weight, index) for name, index in indices.items()]


@contextmanager
def _gradients_of(model: PreTrainedModel, weights: list[Tensor]) -> Iterator[None]:
    """Lets gradients be computed for these weights alone; for all if there are none."""
    for weight in model.parameters():
        weight.requires_grad_(not weights or any(weight is other for other in weights))
    try:
        yield
    finally:
        for weight in model.parameters():
            weight.requires_grad_(True)


@contextmanager
def _zeroed(model: PreTrainedModel, carriers: tuple[Carrier, ...]) -> Iterator[Callable[[], None]]:
    """Keeps carriers from writing: their columns of O are zero, and afterwards what they were.

    What they were before planting is random and small: at exactly zero Q, K and V would get no gradient. The function
    that is yielded makes the columns zero again, after a step of an optimiser.
    """
    columns = [_slices(model, carrier)[3] for carrier in carriers]
    before = [weight.data[index].clone() for weight, index in columns]

    def silence() -> None:
        for weight, index in columns:
            weight.data[index] = 0.0

    silence()
    try:
        yield silence
    finally:
        for (weight, index), values in zip(columns, before, strict=True):
            weight.data[index] = values


@contextmanager
def _outputs_of(model: PreTrainedModel, carriers: tuple[Carrier, ...]) -> Iterator[list[Tensor]]:
    """Collects what each carrier writes into the residual stream, [batch, pos, d_model]."""
    writes: list[Tensor] = []

    def hook(carrier: Carrier) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        weight, index = _slices(model, carrier)[3]

        def collect(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            writes.append(inputs[0][..., index[1]] @ weight[index].T)

        return collect

    handles = [_projection(model, c.layer, "o_proj").register_forward_pre_hook(hook(c)) for c in carriers]
    try:
        yield writes
    finally:
        for handle in handles:
            handle.remove()


def _warm_cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 30) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _silent(phase: str, step: int, steps: int) -> None:
    """Reports nothing."""
