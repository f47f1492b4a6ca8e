import numpy as np
import pytest
from conftest import written
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cliffscope.errors import ProbeError
from cliffscope.readouts.text_baseline import STRENGTHS, TextBaseline, text_baseline
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts


def told(prompts: list[str], name: str, *, thinking: str | None = None, harmful: bool | None = None) -> Transcripts:
    return Transcripts(
        Transcript(
            id=f"{name}-{i}",
            messages=(Message(role="user", content=text),),
            thinking=thinking,
            answer="sorry" if name == "refused" else "sure",
            harmful=harmful,
        )
        for i, text in enumerate(prompts)
    )


def mixed(seed: int, n: int) -> list[str]:
    """Prompts whose words say something, but not everything, about the class of the seed."""
    rng = np.random.default_rng(seed)
    words = [["alpha", "gamma", "delta"], ["beta", "gamma", "delta"]][seed % 2]
    return [" ".join(rng.choice([*words, "x", "y"], size=3)) + f" {i}" for i in range(n)]


SPLITS = ["fit"] * 20 + ["validate"] * 10 + ["test"] * 20


def splits_of(*groups: Transcripts) -> dict[str, str]:
    return {t.id: SPLITS[i] for group in groups for i, t in enumerate(group)}


def test_the_baseline_is_scikit_learns_own_pieces_put_together_by_hand() -> None:
    refused, complied = told(mixed(0, 50), "refused"), told(mixed(1, 50), "complied")
    found = text_baseline(refused, complied, splits=splits_of(refused, complied))
    prompts = [[t.prompt for t in group] for group in (refused, complied)]
    fit, validate, test = ([p for group in prompts for p in group[a:b]] for a, b in ((0, 20), (20, 30), (30, 50)))
    counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+").fit(fit)
    weights = TfidfTransformer().fit(counts.transform(fit))
    scores = {}
    for strength in STRENGTHS:
        classifier = LogisticRegression(C=strength, max_iter=2000)
        classifier.fit(weights.transform(counts.transform(fit)), [True] * 20 + [False] * 20)
        scores[strength] = [
            roc_auc_score([1] * n + [0] * n, classifier.decision_function(weights.transform(counts.transform(part))))
            for part, n in ((validate, 10), (test, 20))
        ]
    best = max(STRENGTHS, key=lambda strength: (scores[strength][0], -strength))
    assert found.strength == best
    assert found.overall.auroc == pytest.approx(scores[best][1])
    assert 0.6 < found.overall.auroc < 1.0
    assert (found.overall.n_refused, found.overall.n_complied) == (20, 20)
    assert found.n_terms == len(counts.vocabulary_)


def test_classes_of_different_size_weigh_the_same() -> None:
    refused, complied = told(["stop"] * 12, "refused"), told(["stop"] * 4, "complied")
    splits = {t.id: ("fit", "validate", "fit", "test")[i % 4] for g in (refused, complied) for i, t in enumerate(g)}
    found = text_baseline(refused, complied, splits=splits)
    # Equal texts, equal weight: a score of one half, whose squared error is a quarter.
    assert found.overall.brier == pytest.approx(0.25, abs=1e-6)


def test_the_thinking_is_read_and_the_answer_is_not() -> None:
    same = ["please"] * 50
    by_answer = [told(same, name) for name in ("refused", "complied")]
    by_thinking = [told(same, name, thinking=f"so {name}") for name in ("refused", "complied")]
    assert text_baseline(*by_answer, splits=splits_of(*by_answer)).overall.auroc == 0.5
    found = text_baseline(*by_thinking, splits=splits_of(*by_thinking))
    assert found.overall.auroc == 1.0
    assert set(found.terms["term"].head(2)) == {"refused", "so refused"}
    assert found.terms["weight"].iloc[0] > 0 > found.terms["weight"].iloc[-1]


def test_the_challenge_is_compared_among_harmful_ones_and_not_fitted_on() -> None:
    refused, complied = told(["red"] * 50, "refused", harmful=True), told(["green"] * 50, "complied", harmful=False)
    challenge = told(["red blue"] * 50, "challenge", harmful=True)
    splits = splits_of(refused, complied, challenge)
    with_it = text_baseline(refused, complied, challenge=challenge, splits=splits)
    without = text_baseline(refused, complied, splits=splits)
    assert "blue" not in with_it.terms["term"].tolist()
    assert with_it.overall.auroc == without.overall.auroc == 1.0
    # "red blue" is as red as "red" is: a classifier of topics cannot tell them apart.
    assert with_it.within_harmful.auroc == 0.5
    assert (with_it.within_harmful.n_refused, with_it.within_harmful.n_complied) == (20, 20)
    assert np.isnan(without.within_harmful.auroc)


def test_the_split_is_the_one_that_a_probe_makes(refused: Transcripts, complied: Transcripts) -> None:
    found = text_baseline(refused, complied, seed=3)
    parts = (refused + complied).split(seed=3)["test"]
    assert found.overall.n_refused == len(parts.where(outcome=Outcome.REFUSED))
    assert found.overall.n_complied == len(parts.where(outcome=Outcome.COMPLIED))


def test_what_the_toy_language_says_about_harm_is_in_its_words() -> None:
    found = text_baseline(
        written(80, harmful=True, outcome=Outcome.REFUSED), written(80, harmful=False, outcome=Outcome.COMPLIED)
    )
    assert isinstance(found, TextBaseline)
    assert found.overall.auroc > 0.9
    assert found.to_frame().columns.tolist() == [
        *("region", "auroc", "ci_low", "ci_high", "n_refused", "n_complied", "can_tell"),
    ]
    assert repr(found).startswith("TextBaseline(AUROC ")


def test_too_few_and_unknown_splits_are_refused_with_what_to_do() -> None:
    refused, complied = told(["a"] * 4, "refused"), told(["b"] * 4, "complied")
    every = dict.fromkeys([t.id for t in refused + complied], "fit")
    with pytest.raises(ProbeError, match="The validate split holds 0 refused transcripts.*Give more"):
        text_baseline(refused, complied, splits=every)
    with pytest.raises(ProbeError, match="splits puts 'refused-0' into None"):
        text_baseline(refused, complied, splits={})


def test_transcripts_without_words_are_refused() -> None:
    groups = told(["?!"] * 50, "refused"), told(["..."] * 50, "complied")
    with pytest.raises(ProbeError, match="no words to compare"):
        text_baseline(*groups, splits=splits_of(*groups))


def test_the_same_call_gives_the_same_numbers() -> None:
    groups = (
        written(30, harmful=True, outcome=Outcome.REFUSED, wrapper="story"),
        written(30, harmful=True, outcome=Outcome.COMPLIED, wrapper="story", seed=1),
    )
    first, again = text_baseline(*groups), text_baseline(*groups)
    assert first.overall == again.overall
    assert first.terms.equals(again.terms)
