import pandas as pd
import pytest

from cliffscope.errors import DataError
from cliffscope.study import preflight
from cliffscope.study.config import StudyConfig
from cliffscope.study.preflight import estimate_study


def config(**changes: object) -> StudyConfig:
    return StudyConfig(**{"model": "planted-llama", "out": "unused", "limit": 40, "max_thinking": 32, **changes})


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that passes 1,000 tokens a second and writes 10."""
    monkeypatch.setattr(preflight, "_forward_speed", lambda model: 1000.0)
    monkeypatch.setattr(preflight, "_generation_speed", lambda model, prompts, rows, config: 10.0)


@pytest.mark.usefixtures("speeds")
def test_stages_are_counted_in_tokens_and_divided_by_the_speeds() -> None:
    found = estimate_study(config(max_answer=16, controls=8))
    stages = found.stages.set_index("stage")
    n = stages.loc["transcripts", "tokens"] / 48
    assert n == int(n) > 0
    assert stages.loc["transcripts", "seconds"] == pytest.approx(n * 48 / 10)
    read, answered = 0.3 * stages.loc["traces", "tokens"], 0.3 * n * 10 * 16
    assert stages.loc["safety", "tokens"] == pytest.approx(read + answered, abs=1)
    assert stages.loc["safety", "seconds"] == pytest.approx(read / 1000 + answered / 10, rel=1e-3)
    assert found.seconds == pytest.approx(stages["seconds"].sum())
    assert isinstance(found.stages, pd.DataFrame)
    twice = estimate_study(config(max_answer=16, controls=18)).stages.set_index("stage")
    assert twice.loc["safety", "seconds"] == pytest.approx(read / 1000 + 2 * answered / 10, rel=1e-3)


@pytest.mark.usefixtures("speeds")
def test_advice_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimate_study(config(max_answer=4, controls=1, limit=8)).advice == ()
    long = estimate_study(config(max_thinking=900, limit=400)).advice
    assert "limit=" in long[0]
    assert "CPU" in long[1]
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000)
    assert "smaller batch_size" in estimate_study(config()).advice[0]


def test_a_contradictory_configuration_is_refused_first() -> None:
    with pytest.raises(DataError, match="limit=0"):
        estimate_study(config(limit=0))
    with pytest.raises(DataError, match="which a study does not measure"):
        estimate_study(config(criterion="suppression"))
