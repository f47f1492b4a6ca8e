"""Every architecture through the whole chain, against plain Hugging Face modules with hooks of this file's own.

For each: load, trace, answer readout, sweep of every head, weight edit, export, reload; equal to the oracle within 1e-5
of the largest value. The table of docs/models.md is what this run found (CLIFFSCOPE_WRITE_DOCS=1 writes it).
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    SEVERAL,
    SINGLE,
    answer_readout,
    check_documented,
    log_odds_of,
    random_probe,
    tokens_of,
    words_tokenizer,
    written,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import cliffscope as cs
from cliffscope.errors import DataError, EditError, UnsupportedModelError
from cliffscope.generation.answering import answer_arms
from cliffscope.generation.speaking import Budget
from cliffscope.heads.controls import random_set
from cliffscope.heads.editing import edited_weights
from cliffscope.heads.edits import HeadRef, Scope
from cliffscope.heads.shares import decompose_logit
from cliffscope.heads.sources import trace_sources
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.architectures import (
    cut_to_blocks,
    find_blocks,
    find_mlp,
    find_projection,
    has_heads,
    read_shape,
)
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts import activations
from cliffscope.readouts.activations import gather_residuals, project_layer, project_residuals
from cliffscope.readouts.readout import read_final
from cliffscope.transcripts.records import Outcome, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

TOLERANCE = 1e-5
OLD_LENS = version("transformer-lens").startswith("3.")
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An architecture: its class in transformers, what is set besides the common sizes, and models that have it."""

    name: str
    models: str
    settings: dict[str, object]
    norms_at_zero: bool = False


KINDS = {
    "qwen2": Kind(name="Qwen2", models="R1-Distill-Qwen, QwQ, Skywork-OR1, RealSafe-R1-7B, Qwen2.5", settings={}),
    "llama": Kind(name="Llama", models="R1-Distill-Llama, RealSafe-R1-8B, SmolLM2", settings={}),
    "llama, no groups": Kind(name="Llama", models="as many key-value heads", settings={"num_key_value_heads": 4}),
    "qwen3": Kind(name="Qwen3", models="Qwen3, Qwen3-4B-Thinking, Hermes-4-14B", settings={"head_dim": 12}),
    "qwen3-moe": Kind(
        name="Qwen3Moe", models="Qwen3-30B-A3B-Thinking", settings={"head_dim": 12, "num_experts": 4, **EXPERTS}
    ),
    "phi3": Kind(name="Phi3", models="Phi-4-mini-reasoning, Phi-4-reasoning", settings={}),
    "mistral": Kind(name="Mistral", models="Magistral, Ministral", settings={"sliding_window": 8}),
    "gpt-oss": Kind(
        name="GptOss", models="gpt-oss", settings={"head_dim": 12, "num_local_experts": 4, **EXPERTS, **SLIDING}
    ),
    "gemma3": Kind(name="Gemma3Text", models="Gemma 3", settings={"head_dim": 12, **SLIDING}, norms_at_zero=True),
    "olmo3": Kind(name="Olmo3", models="OLMo 3 Think", settings=SLIDING),
    "smollm3": Kind(name="SmolLM3", models="SmolLM3", settings={"no_rope_layers": [1, 1, 1, 0]}),
    "glm4": Kind(name="Glm4", models="GLM-4, GLM-Z1", settings={"head_dim": 12}),
    "nemotron": Kind(name="Nemotron", models="Nemotron 4, Minitron", settings={}, norms_at_zero=True),
    "deepseek-v3": Kind(
        name="DeepseekV3",
        models="DeepSeek-R1, DeepSeek-V3.1",
        settings={
            **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
            **{"qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
            **{"first_k_dense_replace": 1, **EXPERTS},
        },
    ),
    "qwen3-next": Kind(
        name="Qwen3Next",
        models="Qwen3-Next-Thinking",
        settings={
            **{"head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 24, **EXPERTS},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
        },
        norms_at_zero=True,
    ),
}


def build(name: str, settings: dict[str, object], vocabulary: int, *, norms_at_zero: bool = False) -> PreTrainedModel:
    """A random model, drawn so that every head and every expert matters."""
    sizes = {
        **{"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        **{"initializer_range": 0.2, "bos_token_id": 2, "eos_token_id": 6, "pad_token_id": 0},
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **settings})
    model_class = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network: PreTrainedModel = model_class(config).train(False)
        for label, weight in network.named_parameters():
            if weight.ndim == 1:
                # Some norms multiply by one plus their weight.
                weight.normal_(1.0 if "norm" in label and not norms_at_zero else 0.0, 0.2)
            elif not bool(torch.isfinite(weight).all()) or float(weight.abs().max()) < 1e-6:
                weight.normal_(0.0, 0.2)
    return network


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One architecture on disk and loaded, plain and ours."""

    kind: str
    model: LensModel
    plain: PreTrainedModel
    """Loaded by transformers on its own, with eager attention."""
    rows: list[TokenizedTranscript]

    def states(self, ids: list[int], edit: tuple[int, int, slice, float] | None = None) -> tuple[list[Tensor], Tensor]:
        """The oracle: residuals after every block, and logits, with one head multiplied over some positions."""
        blocks, kept = self.plain.get_decoder().layers, []
        handles = [b.register_forward_hook(lambda _m, _i, out: kept.append(_tensor(out)[0])) for b in blocks]
        if edit is not None:
            handles.append(self._scaling(*edit))
        try:
            with torch.no_grad():
                logits = self.plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return kept, logits

    def _scaling(self, layer: int, head: int, where: slice, factor: float) -> torch.utils.hooks.RemovableHandle:
        size = self.plain.get_decoder().layers[layer].self_attn.o_proj.in_features // 4

        def cut(_module: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = inputs[0].clone()
            z[:, where, head * size : (head + 1) * size] *= factor
            return (z, *inputs[1:])

        return self.plain.get_decoder().layers[layer].self_attn.o_proj.register_forward_pre_hook(cut)


def _tensor(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, folder, tokenizer = KINDS[request.param], tmp_path_factory.mktemp("arch"), words_tokenizer()
    build(kind.name, kind.settings, len(tokenizer) + 5, norms_at_zero=kind.norms_at_zero).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if request.param == "deepseek-v3" and OLD_LENS:
        with pytest.raises(UnsupportedModelError, match="differ between TransformerLens and plain Hugging Face"):
            load_model(folder, device="cpu")
        pytest.skip("the bridge of TransformerLens 3 computes another latent attention, and is refused")
    model = load_model(folder, device="cpu")
    texts = [t for w in (None, "story") for t in written(2, harmful=True, outcome=Outcome.COMPLIED, wrapper=w)]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return Case(kind=request.param, model=model, plain=plain.train(False), rows=tokens_of(model, Transcripts(texts)))


FOUND: dict[str, dict[str, str]] = {}


@contextmanager
def noted(case: Case, what: str) -> Iterator[Callable[[str], None]]:
    """Notes what is supported, or the error by which it is refused."""
    row = FOUND.setdefault(case.kind, {})
    row[what] = "FAILED"

    def say(text: str) -> None:
        row[what] = text

    say("exact")
    try:
        yield say
    except UnsupportedModelError:
        say("refused")
    except BaseException:
        row[what] = "FAILED"
        raise


def assert_close(actual: object, expected: object) -> None:
    actual, expected = (
        np.asarray(v.detach() if isinstance(v, Tensor) else v, dtype=np.float64) for v in (actual, expected)
    )
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=TOLERANCE)


def test_traces_are_the_plain_models_residuals(case: Case) -> None:
    with noted(case, "trace"):
        probe = random_probe(case.model, 3)
        found = project_residuals(case.model, case.rows, probe.layer_weights, probe.layer_biases)
        for row, logits in zip(case.rows, found, strict=True):
            states, _ = case.states(row.token_ids.tolist())
            expected = [s.numpy() @ probe.layer_weights[i] + probe.layer_biases[i] for i, s in enumerate(states)]
            assert_close(logits, np.stack(expected))


def test_a_long_transcript_in_chunks_is_the_one_pass(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with noted(case, "long"):
        model, probe = case.model, random_probe(case.model, 2)
        positions = [np.array([t.n_pos - 1, 0, 9, 3], dtype=np.int64) for t in case.rows]
        whole = project_residuals(model, case.rows, probe.layer_weights, probe.layer_biases)
        gathered = gather_residuals(model, case.rows, positions)
        monkeypatch.setattr(activations, "CHUNK", 7)
        monkeypatch.setattr(activations, "LONG", 7)
        monkeypatch.setattr(activations, "BATCH_TOKENS", 1)
        ran: list[int] = []
        with model.residual_hook(lambda layer, hidden: ran.append(hidden.shape[1])):
            chunked = project_residuals(model, case.rows, probe.layer_weights, probe.layer_biases)
        assert max(ran) == 7, "nothing was chunked"
        for ours, theirs in zip(chunked, whole, strict=True):
            assert_close(ours, theirs)
        for ours, theirs in zip(gather_residuals(model, case.rows, positions), gathered, strict=True):
            assert_close(ours, theirs)
        one_layer = dict(project_layer(model, case.rows, 2, probe.weight, probe.bias))
        for i, theirs in enumerate(whole):
            assert_close(one_layer[i], theirs[2])


@pytest.mark.parametrize("scope", [Scope.CLOSING, Scope.ALL], ids=str)
def test_every_heads_effect_is_that_of_a_plain_forward_pass(case: Case, scope: Scope) -> None:
    with noted(case, f"sweep, {scope}") as say:
        model, rows = case.model, case.rows[1:3]
        layer = model.shape.n_layers - 1
        probe = random_probe(model, layer)
        swept = sweep_branches(
            model, probe, rows, [(HeadRef(layer=a, head=b),) for a, b in model.shape.places], scope=scope
        )
        for i, row in enumerate(rows):
            ids = row.token_ids[: row.final + 1].tolist()
            where = row.span(Span.CLOSING) if scope is Scope.CLOSING else slice(0, row.final + 1)
            logits = [
                float(case.states(ids, (a, b, where, 0.0))[0][layer][row.final] @ torch.from_numpy(probe.weight))
                + probe.bias
                for a, b in model.shape.places
            ]
            assert np.ptp(logits) > 1e-3, "no head matters"
            assert_close(swept.edited[i], logits)
        say(swept.path.split(" ")[0])


@pytest.mark.parametrize("openings", [SINGLE, SEVERAL], ids=["one token", "several tokens"])
def test_the_answer_readout_is_the_plain_models_distribution(
    case: Case, openings: Mapping[str, Sequence[tuple[int, ...]]]
) -> None:
    with noted(case, "answer"):
        model, rows, readout = case.model, case.rows[1:3], answer_readout(case.model, openings)
        places = model.shape.places[:: max(1, len(model.shape.places) // 4)]
        swept = sweep_branches(model, readout, rows, [(HeadRef(layer=a, head=b),) for a, b in places])
        assert swept.path.split(" ")[0] == ("batched" if case.kind == "qwen3-next" else "packed")
        clean = read_final(model, readout, rows)
        for i, row in enumerate(rows):
            ids, closing = row.token_ids[: row.final + 1].tolist(), row.span(Span.CLOSING)
            assert_close(clean[i], log_odds_of(lambda ids: case.states(ids)[1], ids, openings))
            zeroed = [(layer, head, closing, 0.0) for layer, head in places]
            expected = [log_odds_of(lambda ids, z=z: case.states(ids, z)[1], ids, openings) for z in zeroed]
            assert_close(swept.edited[i], expected)
            assert np.ptp(expected) > 1e-3, "no head matters"


def test_an_edit_of_the_weights_and_its_export_are_that_edit(case: Case, tmp_path: Path) -> None:
    model, (layer, head) = case.model, case.model.shape.places[-2]
    ids = case.rows[0].token_ids.tolist()
    _, expected = case.states(ids, (layer, head, slice(0, len(ids)), 0.0))
    edit = cs.zero([HeadRef(layer=layer, head=head)])
    with noted(case, "weight edit"), edited_weights(model, edit), torch.no_grad():
        assert_close(model.hf(input_ids=torch.tensor([ids])).logits[0], expected)
    with noted(case, "export"), torch.no_grad():
        place = cs.export_edited(model, edit, tmp_path / "edited")
        again = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).train(False)
        assert_close(again(input_ids=torch.tensor([ids])).logits[0], expected)
        assert_close(load_model(place, device="cpu").hf(input_ids=torch.tensor([ids])).logits[0], expected)


def test_answers_of_several_arms_are_those_of_full_plain_passes(case: Case) -> None:
    """Rows of different length together, edited and not; the closing behind what was read once."""
    model, asked = (
        case.model,
        [t for w in (None, "story") for t in written(2, harmful=True, outcome=Outcome.COMPLIED, wrapper=w)],
    )
    layer, head = model.shape.places[-2]
    arms = {"unedited": None, "edited": cs.scale([HeadRef(layer=layer, head=head)], -8.0, scope="closing")}
    with noted(case, "answers"):
        made = answer_arms(model, Transcripts(asked), arms, Budget(max_answer=5))
        for name, edit in arms.items():
            for row, transcript in zip(case.rows, made[name], strict=True):
                ids, answer = row.token_ids.tolist(), list[int]()
                while len(answer) < 5 and 6 not in answer:
                    change = None if edit is None else (layer, head, row.span(Span.CLOSING), -8.0)
                    answer.append(int(case.states([*ids, *answer], change)[1][-1].argmax()))
                assert list(transcript.answer_ids) == [token for token in answer if token != 6]
        assert tuple(made["unedited"]) != tuple(made["edited"]), "the edit changes no answer"


@pytest.mark.parametrize("method", ["zero", "mean", "resample", "patch", "attribution", "greedy"])
def test_every_method_ranks_the_heads_that_there_are(case: Case, method: str) -> None:
    if case.kind not in ("qwen3-next", "deepseek-v3", "gpt-oss"):
        pytest.skip("the methods are tested on plain architectures elsewhere")
    model, probe = case.model, random_probe(case.model, 3)
    complied, others, refused = (
        written(4, harmful=harmful, outcome=outcome, seed=seed)
        for harmful, outcome, seed in (
            (True, Outcome.COMPLIED, 5),
            (False, Outcome.COMPLIED, 6),
            (True, Outcome.REFUSED, 7),
        )
    )
    ranking = cs.rank_heads(model, probe, complied, method=method, harmless=others, refused=refused, fraction=0.2)
    frame = ranking.to_frame()
    assert set(zip(frame["layer"], frame["head"], strict=True)) == set(model.shape.places)
    assert np.isfinite(frame["effect"]).all()
    assert ranking.plot().data
    if method == "attribution":
        # A gradient is what a small change does, for its size; but where it makes a token choose another expert.
        little = cs.rank_heads(model, probe, complied, method="scale", factor=0.99)
        scale = np.abs(ranking.effects).max()
        assert np.quantile(np.abs(little.effects / 0.01 - ranking.effects) / scale, 0.9) < 0.05
    heads = ranking.top(0.2)
    drawn = random_set(model.shape, heads, np.random.default_rng(0), same_layers=False)
    assert {ref.layer for ref in drawn} <= set(model.shape.attention_layers)


def test_shares_of_heads_add_up_or_are_refused(case: Case) -> None:
    with noted(case, "exact shares"):
        shares = decompose_logit(case.model, random_probe(case.model, 2), case.rows)
        expected = [
            float(
                case.states(r.token_ids.tolist())[0][2][r.final] @ torch.from_numpy(random_probe(case.model, 2).weight)
            )
            + random_probe(case.model, 2).bias
            for r in case.rows
        ]
        assert_close(shares.logits, expected)


def test_what_a_head_reads_adds_up_to_what_it_writes_or_is_refused(case: Case) -> None:
    layer = [i for i in case.model.shape.attention_layers if i <= 2][-1]
    probe, transcript = random_probe(case.model, 2), written(1, harmful=True, outcome=Outcome.COMPLIED)[0]
    (row,) = tokens_of(case.model, Transcripts([transcript]))
    with noted(case, "sources"):
        sources = trace_sources(case.model, probe, transcript, HeadRef(layer=layer, head=1))
        # The oracle: what plain transformers' residual after the block loses with the head's write taken out.
        size = case.plain.get_decoder().layers[layer].self_attn.o_proj.in_features // 4
        z: list[Tensor] = []
        projection = case.plain.get_decoder().layers[layer].self_attn.o_proj
        handle = projection.register_forward_pre_hook(lambda _m, inputs: z.append(inputs[0][0, row.final]))
        case.states(row.token_ids.tolist())
        handle.remove()
        columns = projection.weight.detach()[:, size : 2 * size]
        expected = float(z[0][size : 2 * size] @ columns.T.float() @ torch.from_numpy(probe.weight))
        assert_close(sources.effect, -expected)
        assert_close(sources.attention.sum(1).max() <= 1 + 1e-5, True)


def test_an_architecture_without_the_projection_of_its_heads_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = words_tokenizer()
    sizes = {"vocab_size": len(tokenizer) + 5, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, bos_token_id=2, eos_token_id=6)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel keeps its blocks elsewhere"):
        load_model(tmp_path, device="cpu")


def test_a_layer_without_heads_is_told_from_one_that_is_not_there(case: Case) -> None:
    shape = case.model.shape
    bare = sorted(set(range(shape.n_layers)) - set(shape.attention_layers))
    assert bare == ([0, 2] if case.kind == "qwen3-next" else [])
    for layer in bare:
        with pytest.raises(EditError, match=rf"Layer {layer} of .* has no heads.*Layers with heads: 1, 3"):
            HeadRef(layer=layer, head=0).check(case.model)


def test_a_config_that_lies_about_its_heads_is_refused(tmp_path: Path) -> None:
    tokenizer = words_tokenizer()
    network = build("Qwen3", {"head_dim": 12}, len(tokenizer) + 5)
    for attention in (block.self_attn for block in network.model.layers):
        attention.config.num_attention_heads = 4
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8, "num_key_value_heads": 4}))
    with pytest.raises((UnsupportedModelError, DataError), match=r"size|mismatch|heads"):
        load_model(tmp_path, device="cpu")


def test_one_file_knows_where_heads_are() -> None:
    """Apart from grow.py, which builds the organisms' own architectures and no others."""
    package = Path(cs.__file__).parent
    spelling = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in ("self_attn", "o_proj"))
    }
    assert spelling == {"model/architectures.py", "organisms/grow.py"}


def test_the_parts_of_a_block_are_those_that_transformers_names(case: Case) -> None:
    blocks = find_blocks(case.plain)
    assert blocks is case.plain.get_decoder().layers
    assert read_shape(case.plain) == case.model.shape
    for layer, block in enumerate(blocks):
        assert has_heads(block) == (layer in case.model.shape.attention_layers)
        if has_heads(block):
            assert find_projection(block) is block.self_attn.o_proj
        assert find_mlp(block) is block.mlp


def test_a_block_without_known_names_has_no_heads_and_no_mlp(case: Case) -> None:
    bare = nn.ModuleDict({"attention": nn.Linear(2, 2)})
    assert not has_heads(bare)
    assert not has_heads(nn.ModuleDict({"self_attn": nn.ModuleDict({"dense": nn.Linear(2, 2)})}))
    assert find_mlp(bare) is None
    broken = copy.copy(case.model)
    object.__setattr__(broken, "hf", copy.deepcopy(case.plain))
    broken.decoder.layers[1] = bare
    with pytest.raises(UnsupportedModelError, match=r"Layer 1 of .* no MLP under a known name, only \['attention'\]"):
        broken.mlp(1)


def test_a_cut_model_is_whole_again_after_an_error(case: Case) -> None:
    decoder, config = case.plain.get_decoder(), case.plain.config.get_text_config()
    layers, kinds = decoder.layers, getattr(config, "layer_types", None)

    def use() -> None:
        with cut_to_blocks(case.plain, 1, 2) as blocks:
            assert list(decoder.layers) == blocks == list(layers)[1:3]
            assert kinds is None or config.layer_types == kinds[1:3]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert decoder.layers is layers
    assert getattr(config, "layer_types", None) == kinds


def table() -> str:
    """What this run found, as Markdown."""
    columns = (
        *("trace", "long", "answer", "sweep, closing", "sweep, all"),
        *("weight edit", "export", "exact shares", "sources"),
    )
    lines = [f"| architecture | models | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, kind in KINDS.items():
        cells = [FOUND.get(name, {}).get(column, "not run") for column in columns]
        lines.append(f"| {name} | {kind.models} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_documented_table_is_what_was_found() -> None:
    if len(FOUND) < len(KINDS):
        pytest.skip("only some architectures were run")
    check_documented("architectures", table())
