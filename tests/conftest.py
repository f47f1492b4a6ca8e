"""Tiny random models, transcripts of the toy language, and the plain slow oracles that tests compare with.

Weights are drawn much larger than for training, so that logits vary from token to token and every head matters.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from slow_generation import BLANK, CLOSE, END, NEWLINE
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cliffscope.model.checkpoints import CACHE
from cliffscope.model.load import LensModel, load_model
from cliffscope.organisms import grammar
from cliffscope.organisms.tokenizer import build_tokenizer
from cliffscope.readouts.answer import AnswerReadout
from cliffscope.readouts.openings import describe
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.regions import FINAL, LATE_THINKING
from cliffscope.readouts.reports import AnswerReport, Calibration, ProbeReport, RegionReport
from cliffscope.stats import Interval
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts
from cliffscope.transcripts.templates import TEMPLATES
from cliffscope.transcripts.transcript import TokenizedTranscript, tokenize

ARCHITECTURES = ("llama", "qwen2", "qwen3")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
_KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_hidden_layers": 8, "num_attention_heads": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 12}),
    "mistral": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": 12}),
}

MakeCheckpoint = Callable[..., Path]


def tiny_network(kind: str, vocabulary: int, **changes: object) -> PreTrainedModel:
    """A random model of an architecture, biases and norms random too."""
    config_class, model_class, own = _KINDS[kind]
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **{"bos_token_id": 2, "eos_token_id": 6, "pad_token_id": 0},
    }
    settings = {**sizes, **own, **changes}
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = model_class(config_class(**settings)).eval()
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if weight.ndim == 1:
                    weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return network


def words_tokenizer(*, chatml: bool = False) -> PreTrainedTokenizerFast:
    """The organism's tokenizer; with chatml, one whose chat template does not think."""
    tokenizer = build_tokenizer(grammar.vocabulary(["story"]))
    if chatml:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    return tokenizer


LONGEST = (
    "test_visible",
    "test_organisms",
    "test_docs",
    "test_study",
    "test_distributed",
    "test_examples",
    "test_cli",
    "test_load",
)
"""Files that take the longest: they begin first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take the longest first."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted GGUF files of this run alone."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop(CACHE) if before is None else os.environ.update({CACHE: before})


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return words_tokenizer()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Saves a random model with its tokenizer; `change` may edit the weights first."""

    def make(
        kind: str, *, change: Callable[[PreTrainedModel], None] | None = None, chatml: bool = False, **changes: object
    ) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        own = words_tokenizer(chatml=chatml)
        network = tiny_network(kind, len(own) + 5, **{"eos_token_id": own.eos_token_id, **changes})
        if change is not None:
            with torch.no_grad():
                change(network)
        network.save_pretrained(folder)
        own.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoints(make_checkpoint: MakeCheckpoint) -> dict[str, Path]:
    return {kind: make_checkpoint(kind) for kind in ARCHITECTURES}


@pytest.fixture(scope="session")
def models(checkpoints: dict[str, Path]) -> dict[str, LensModel]:
    return {kind: load_model(folder, device="cpu") for kind, folder in checkpoints.items()}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, models: dict[str, LensModel]) -> LensModel:
    """Each architecture in turn: Llama, Qwen2 with grouped heads and biases, Qwen3 with a head size of its own."""
    return models[request.param]


@pytest.fixture(scope="session")
def llama(models: dict[str, LensModel]) -> LensModel:
    """8 layers of 8 heads."""
    return models["llama"]


@pytest.fixture(scope="session")
def chatml_model(make_checkpoint: MakeCheckpoint) -> LensModel:
    """A model whose template does not think."""
    return load_model(make_checkpoint("llama", chatml=True), template="chatml", device="cpu")


@pytest.fixture(scope="session", params=["llama", "qwen3", "mistral"])
def talker(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> LensModel:
    """A random model that now and then ends its thinking or its turn; Mistral's sees only the last 12 tokens."""

    def talk(network: PreTrainedModel) -> None:
        head = network.get_output_embeddings().weight
        head[CLOSE] *= 2.5
        head[END] *= 3.0
        head[NEWLINE] *= 2.0

    model = load_model(make_checkpoint(request.param, change=talk, tie_word_embeddings=False), device="cpu")
    marks = ["<|end|>", "</think>", "\n", "\n\n"]
    assert model.tokenizer.convert_tokens_to_ids(marks) == [END, CLOSE, NEWLINE, BLANK]
    return model


@pytest.fixture(scope="session")
def refused() -> Transcripts:
    return written(24, harmful=True, outcome=Outcome.REFUSED)


@pytest.fixture(scope="session")
def complied() -> Transcripts:
    return written(24, harmful=False, outcome=Outcome.COMPLIED)


@pytest.fixture
def unchanged() -> Callable[[LensModel], Callable[[], None]]:
    """Takes a copy of a model's weights, hooks and blocks; the function it returns asserts that they are the same."""

    def take(model: LensModel) -> Callable[[], None]:
        before = {name: weight.detach().clone() for name, weight in model.hf.named_parameters()}
        hooks, blocks = count_hooks(model.hf), list(model.blocks)

        def check() -> None:
            assert all(torch.equal(weight, before[name]) for name, weight in model.hf.named_parameters())
            assert count_hooks(model.hf) == hooks
            assert all(a is b for a, b in zip(model.blocks, blocks, strict=True))

        return check

    return take


def written(n: int, *, harmful: bool, outcome: Outcome, wrapper: str | None = None, seed: int = 0) -> Transcripts:
    """Transcripts of the toy language with different prompts; those about harm say so in their thinking."""
    rng = random.Random(f"{seed}/{harmful}/{wrapper}")
    found: dict[str, Transcript] = {}
    while len(found) < n:
        asked = grammar.request(rng, "fit", harmful=harmful, wrapper=wrapper)
        transcript = Transcript(
            id=f"{outcome}-{'harmful' if harmful else 'harmless'}-{wrapper}-{seed}-{len(found)}",
            messages=(Message(role="user", content=asked.text),),
            thinking=grammar.thinking(rng, asked, cut=0.3),
            answer=grammar.answer(rng, asked, refuse=outcome is Outcome.REFUSED),
            harmful=harmful,
            outcome=outcome,
        )
        found.setdefault(asked.text, transcript)
    return Transcripts(found.values())


def tokens_of(model: LensModel, transcripts: Sequence[Transcript]) -> list[TokenizedTranscript]:
    return [tokenize(t, model.tokenizer, model.template) for t in transcripts]


def plain_residuals(model: LensModel, ids: Sequence[int]) -> np.ndarray:
    """[layer, pos, d_model] of one sequence by transformers' own `output_hidden_states`.

    The last of these comes after the final norm, so the last layer's is taken from what enters that norm.
    """
    seen: list[Tensor] = []
    norm = model.hf.get_decoder().norm
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            states = model.hf(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    return torch.stack([*states[1:-1], seen[-1]])[:, 0].numpy()


def plain_logits(model: LensModel, ids: Sequence[int]) -> Tensor:
    """[pos, vocabulary] of one sequence by the plain model."""
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([list(ids)])).logits[0]


def count_hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def fixed_report(region: str, *, low: float = 0.9) -> RegionReport:
    """A report whose AUROC has the lower bound given."""
    return RegionReport(
        region=region,
        auroc=0.95,
        interval=Interval(low=low, high=1.0),
        tpr_at_1_fpr=0.5,
        brier=0.1,
        calibration_error=0.1,
        n_refused=20,
        n_complied=20,
    )


def fixed_calibration(*, complied: float = 0.2) -> Calibration:
    """A calibration in which refused harmful transcripts score 0.9, complied ones what is given."""
    return Calibration(
        brier=0.1,
        calibration_error=0.1,
        refused=0.9,
        refused_interval=Interval(low=0.85, high=0.95),
        complied=complied,
        complied_interval=Interval(low=complied - 0.1, high=complied + 0.1),
        n_refused=20,
        n_complied=20,
    )


def random_probe(
    model: LensModel, layer: int, *, seed: int = 0, late_low: float = 0.9, final_low: float = 0.9
) -> RefusalProbe:
    """A probe with random directions and a report that says how well it can tell."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(model.shape.n_layers, model.shape.d_model)).astype(np.float32)
    biases = rng.normal(size=model.shape.n_layers).astype(np.float32)
    report = ProbeReport(
        final=fixed_report(FINAL, low=final_low),
        late_thinking=fixed_report(LATE_THINKING, low=late_low),
        within_harmful=fixed_report("final, harmful only"),
        calibration=fixed_calibration(),
        shuffled=(0.5,),
        by_region=pd.DataFrame([{"layer": layer, **fixed_report(FINAL).to_row()}]),
        cells={},
        warnings=(),
    )
    return RefusalProbe(
        layer=layer,
        weight=weights[layer],
        bias=float(biases[layer]),
        layer_weights=weights,
        layer_biases=biases,
        positions="balanced",
        strength=1.0,
        refused_logit=3.0,
        fingerprint=model.fingerprint,
        report=report,
    )


SINGLE = {"refused": [(193,), (101,)], "complied": [(205,), (17,)]}
"""Openings of one token: "sorry", "i" against "sure", "a"."""
SEVERAL = {"refused": [(193, 12), (101, 46, 148)], "complied": [(205,), (101, 46, 94), (101, 256)]}
""""sorry ,", "i can not" against "sure", "i can help", "i will": behind the final position, three tokens are read."""


def answer_readout(
    model: LensModel, openings: Mapping[str, Sequence[tuple[int, ...]]] = SINGLE, *, low: float = 0.9
) -> AnswerReadout:
    """An answer readout of these openings, with a report that says how well it can tell."""
    report = AnswerReport(
        final=fixed_report(FINAL, low=low),
        within_harmful=fixed_report("final, harmful only"),
        openings=pd.DataFrame(),
        separation=1.0,
        covered=1.0,
        mass=0.9,
        warnings=(),
    )
    return AnswerReadout(
        openings=describe(openings, model.tokenizer),
        layer=model.shape.n_layers - 1,
        vocabulary=model.hf.lm_head.out_features,
        refused_logit=3.0,
        fingerprint=model.fingerprint,
        template=model.template.name,
        report=report,
    )


def log_odds_of(logits_of: Callable[[list[int]], Tensor], ids: Sequence[int], openings: Mapping[str, object]) -> float:
    """The oracle of an answer readout: teacher forcing of every opening through whole forward passes.

    Args:
        logits_of: [pos, vocabulary] of a sequence by a plain model.
        ids: a transcript up to its final position.
        openings: by class.
    """

    def log_probability(opening: tuple[int, ...]) -> Tensor:
        logs = torch.log_softmax(logits_of([*ids, *opening[:-1]]).double(), -1)
        return sum((logs[len(ids) - 1 + step, token] for step, token in enumerate(opening)), torch.zeros(()))

    sides = [torch.stack([log_probability(o) for o in openings[kind]]).logsumexp(0) for kind in ("refused", "complied")]
    return float(sides[0] - sides[1])


def check_documented(name: str, table: str, *, page_name: str = "models.md") -> None:
    """Asserts that a table of a page of docs/ is the one given, or writes it where CLIFFSCOPE_WRITE_DOCS is set."""
    page = Path(__file__).parents[1] / "docs" / page_name
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- table: {name}, made by", "<!-- end of table -->"
    before, rest = text.split(begin)
    line, rest = rest.split("\n", 1)
    documented, after = rest.split(end, 1)
    if os.environ.get("CLIFFSCOPE_WRITE_DOCS"):
        page.write_text(f"{before}{begin}{line}\n{table}{end}{after}", encoding="utf-8")
    else:
        assert documented == table


def closing_text() -> str:
    return TEMPLATES.get("organism").closing
