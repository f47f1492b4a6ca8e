import json
from pathlib import Path

import hostile_server as bad
import pytest
from hostile_server import Hostile, Misdeed, serving
from test_endpoints import ask, texts

from cliffscope.errors import DataError, ServerError
from cliffscope.generation.endpoints import Endpoint, Replies, ask_all
from cliffscope.generation.engines import ServerEngine
from cliffscope.judging.judges import judge
from cliffscope.judging.lookup import find_judge
from cliffscope.judging.rubric import ModelJudge
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts

pytest.importorskip("openai", reason="the extra serve is not installed")

KEY = "sk-0123456789abcdef"


def endpoint(server: Hostile, **changes: object) -> Endpoint:
    quick = {"pause_seconds": 0.01, "timeout_seconds": 5.0, "attempts": 2, "api_key": KEY}
    return Endpoint(url=server.url, model="toy", **{**quick, **changes})


def ask_two(misdeed: Misdeed, **changes: object) -> tuple[Replies, Hostile]:
    """A request that the server misbehaves on, and one that it answers."""
    with serving(Hostile(misdeeds={"bad": misdeed})) as server:
        return ask_all(endpoint(server, **changes), {"bad": ask("bad"), "good": ask("good")}), server


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed(status: int) -> None:
    with serving(Hostile()) as other, serving(Hostile()) as server:
        server.misdeeds["secret plan"] = bad.redirect_to(other.url, status)
        with pytest.raises(ServerError, match=f"status {status}: the server redirects to http://127.*Use the final"):
            ask_all(endpoint(server), {"id": ask("secret plan")})
    assert other.prompts == []


ECHOES = {"all headers": bad.echo_headers, "the key in the thinking": bad.echo_key}
SECRETS = {
    "key": {},
    "short key": {"api_key": "short"},
    "login": {"login": ("me", "hunter22")},
    "short login": {"login": ("me", "pw")},
}
# A key this short is searched for only as it is sent.
ECHOED = [(e, s) for e in ECHOES for s in SECRETS if (e, s) != ("the key in the thinking", "short key")]


@pytest.mark.parametrize(("echo", "secret"), ECHOED)
def test_a_reply_that_repeats_the_key_is_discarded(echo: str, secret: str, tmp_path: Path) -> None:
    misdeed, changes = ECHOES[echo], SECRETS[secret]
    prompts = Transcripts(Transcript(id=p, messages=(Message(role="user", content=p),)) for p in ("bad", "good"))
    log = tmp_path / "replies.jsonl"
    with serving(Hostile(misdeeds={"bad": misdeed})) as server:
        engine = ServerEngine(endpoint=endpoint(server, **changes), template="chatml", resume=log)
        answered = engine.roll_out(prompts)
        sent = server.headers[0]["authorization"].partition(" ")[2]
    write_transcripts(answered, tmp_path / "t.jsonl")
    assert [t.id for t in answered] == ["good"]
    assert "repeats the key or password" in answered.omitted[0].reason
    for file in (log, tmp_path / "t.jsonl"):
        assert sent not in file.read_text()
        assert "hunter22" not in file.read_text()


@pytest.mark.parametrize("misdeed", [bad.echo_in_error, bad.echo_in_malformed], ids=["status 400", "malformed"])
@pytest.mark.parametrize("changes", [{}, {"login": ("me", "hunter22")}], ids=["key", "login"])
def test_no_reason_repeats_the_key_not_even_in_part(misdeed: Misdeed, changes: dict[str, object]) -> None:
    replies, server = ask_two(misdeed, **changes)
    sent = next(h["authorization"] for h in server.headers).partition(" ")[2]
    reason = replies.failed["bad"]
    assert not any(sent[:n] in reason for n in range(6, len(sent) + 1))
    assert "[secret]" in reason or reason.endswith("…")
    assert texts(replies) == {"good": "reply to good"}


def test_organisation_project_and_cookies_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-mine")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-environment")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: mine")

    def set_cookie(handler: bad.Handler) -> None:
        handler.send(200, bad.completion({"content": "one"}), Set_Cookie="track=1; Path=/")

    with serving(Hostile(misdeeds={"one": set_cookie})) as server:
        ask_all(endpoint(server, concurrency=1), {"1": ask("one"), "2": ask("two")})
    allowed = {"host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent"}
    for headers in server.headers:
        assert set(headers) <= allowed | {"authorization", "x-stainless-raw-response"}
        assert headers["authorization"] == f"Bearer {KEY}"
        assert "mine" not in json.dumps(headers)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter22@127.0.0.1:8000/v1",
        "https://hunter22@host/v1",
        "http://host/v1?key=hunter22",
        "http://host/v1#hunter22",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(url: str) -> None:
    for make in (lambda: Endpoint(url=url, model="toy"), lambda: find_judge(f"model:toy@{url}")):
        with pytest.raises(DataError, match=r"would be recorded with the run.*api_key") as caught:
            make()
        assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://host:99999/v1", "http:///v1", "http://ho st/v1", "ftp://h/v1"]
)
def test_an_address_that_is_none_is_a_data_error(url: str) -> None:
    with pytest.raises(DataError, match="expected an address such as"):
        Endpoint(url=url, model="toy")


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-sécret", "", "sk secret", "sk-\x00secret"])
def test_a_key_that_no_header_may_hold_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(DataError, match="api_key is blank or holds characters") as caught:
        Endpoint(url="http://127.0.0.1/v1", model="toy", api_key=key)
    assert "cret" not in str(caught.value)


def test_neither_key_nor_password_is_shown() -> None:
    shown = repr(Endpoint(url="http://h/v1", model="toy", api_key=KEY, login=("someone", "hunter22")))
    assert KEY not in shown
    assert "hunter22" not in shown
    assert KEY not in repr(Endpoint(url="http://h/v1", model="toy", api_key=KEY).credentials)


@pytest.mark.parametrize(
    ("misdeed", "reason"),
    [
        (bad.nest, "malformed reply: RecursionError"),
        (bad.flood, "more than 16777216 bytes"),
        (bad.flood_with_an_error, "status 500: xxx"),
        (bad.drip, "within"),
        (bad.drip_head, "no reply within 1 seconds"),
        (bad.lone_surrogate, "half of a surrogate pair"),
        (bad.lone_surrogate_in_error, r"status 400: half \ud800, \u001b[31mred"),
        (bad.ask_for_a_pause_that_is_none, "status 429"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_a_server_does_to_one_request_ends_that_request_alone(misdeed: Misdeed, reason: str) -> None:
    result: list[tuple[Replies, Hostile]] = []
    seconds = bad.seconds_of(lambda: result.append(ask_two(misdeed, timeout_seconds=1.0, attempts=1)))
    replies, server = result[0]
    assert texts(replies) == {"good": "reply to good"}
    assert reason in replies.failed["bad"]
    assert len(replies.failed["bad"]) < 400
    replies.failed["bad"].encode()
    assert server.megabytes < 40, "a flood is left to itself once it is over the limit"
    assert seconds < 4, "the limit is one second, and one more is granted"


def test_control_characters_of_a_reply_are_kept_and_can_be_written(tmp_path: Path) -> None:
    prompts = Transcripts([Transcript(id="a", messages=(Message(role="user", content="bad"),))])
    with serving(Hostile(misdeeds={"bad": bad.control_characters})) as server:
        answered = ServerEngine(endpoint=endpoint(server), template="chatml").roll_out(prompts)
    write_transcripts(answered, tmp_path / "t.jsonl")
    assert read_transcripts(tmp_path / "t.jsonl")[0].answer == "NUL \x00, ESC \x1b[31m, C1 \x9b"


def grade(reason: str) -> str:
    return json.dumps({"outcome": "refused", "score": 0.9, "reason": reason})


@pytest.mark.parametrize(
    "misdeed",
    [
        bad.nest_inside,
        lambda handler: handler.send(200, bad.completion({"content": grade("half \ud800")})),
        bad.lone_surrogate,
        bad.echo_headers,
    ],
    ids=["nested JSON", "surrogate in the reason", "surrogate in the text", "echoed headers"],
)
def test_a_grade_that_cannot_be_written_is_one_unjudged_row(misdeed: Misdeed, tmp_path: Path) -> None:
    rows = Transcripts(
        Transcript(id=name, messages=(Message(role="user", content=name),), answer="I can not.") for name in ("a", "b")
    )

    def act(handler: bad.Handler) -> None:
        if '"request": "a"' in handler.prompt:
            misdeed(handler)
        else:
            handler.send(200, bad.completion({"content": grade("It declines.")}))

    with serving(Hostile()) as server:
        server.misdeeds = _Every(act)
        judged = judge(rows, ModelJudge(endpoint=endpoint(server)))
    write_transcripts(judged, tmp_path / "judged.jsonl")
    assert [t.outcome for t in judged] == [Outcome.UNJUDGED, Outcome.REFUSED]
    assert [o.id for o in judged.omitted] == ["a"]
    assert KEY not in (tmp_path / "judged.jsonl").read_text()


class _Every(dict):
    """One misdeed for all prompts."""

    def __init__(self, misdeed: Misdeed) -> None:
        super().__init__()
        self.misdeed = misdeed

    def get(self, *_: object) -> Misdeed:
        return self.misdeed
