import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from failing_server import SLOW_SECONDS, Failing, serving

from cliffscope.errors import DataError, MissingExtraError, ServerError, StoreError
from cliffscope.generation.endpoints import Endpoint, Replies, Request, ask_all
from cliffscope.store import RowLog
from cliffscope.transcripts.records import Message

pytest.importorskip("openai", reason="the extra serve is not installed")


CONCURRENCY = 2
"""Threads of the run that is killed."""


def ask(prompt: str, **changes: object) -> Request:
    return Request(messages=(Message(role="user", content=prompt),), max_tokens=16, **changes)


def requests(n: int) -> dict[str, Request]:
    return {f"id-{i}": ask(f"prompt {i}") for i in range(n)}


def texts(replies: Replies) -> dict[str, str]:
    return {key: reply.content for key, reply in replies.replies.items()}


def test_every_request_gets_its_own_reply_in_order() -> None:
    with serving(Failing()) as server:
        replies = ask_all(server.endpoint(), requests(20))
    assert texts(replies) == {f"id-{i}": f"reply to prompt {i}" for i in range(20)}
    assert list(replies.replies) == [f"id-{i}" for i in range(20)]
    assert (replies.failed, replies.resumed, replies.dropped) == ({}, 0, 0)
    assert set(server.answered.values()) == {1}


def test_no_more_requests_run_at_once_than_allowed() -> None:
    with serving(Failing(hold_seconds=0.1)) as server:
        ask_all(server.endpoint(concurrency=3), requests(12))
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    "failure", ["500", "502", "503", "429", "429 0.02", "408", "cut", "malformed", "no choices", "number", "html"]
)
def test_a_passing_failure_is_tried_again_and_nothing_is_counted_twice(failure: str) -> None:
    with serving(Failing(script={"prompt 1": [failure, failure]})) as server:
        replies = ask_all(server.endpoint(), requests(3))
    assert texts(replies) == {f"id-{i}": f"reply to prompt {i}" for i in range(3)}
    assert server.asked == {"prompt 0": 1, "prompt 1": 3, "prompt 2": 1}


def test_a_slow_reply_is_given_up_and_asked_for_again() -> None:
    with serving(Failing(script={"prompt 0": ["slow"]})) as server:
        replies = ask_all(server.endpoint(timeout_seconds=SLOW_SECONDS / 3), requests(1))
    assert texts(replies) == {"id-0": "reply to prompt 0"}
    assert server.asked["prompt 0"] == 2


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("500", "status 500"),
        ("429", "status 429"),
        ("cut", "RemoteProtocolError"),
        ("malformed", "malformed reply: JSONDecodeError"),
        ("no choices", "malformed reply: KeyError"),
        ("number", "malformed reply: int where text was expected"),
        ("html", "malformed reply"),
    ],
)
def test_a_lasting_failure_is_reported_for_its_request_alone(failure: str, reason: str) -> None:
    with serving(Failing(script={"prompt 1": [failure] * 9})) as server:
        replies = ask_all(server.endpoint(attempts=3), requests(3))
    assert set(replies.replies) == {"id-0", "id-2"}
    assert replies.failed["id-1"].startswith(f"no reply after 3 attempts: {reason}")
    assert server.asked["prompt 1"] == 3


def test_a_request_that_the_server_refuses_is_not_repeated() -> None:
    with serving(Failing(script={"prompt 0": ["400"] * 9})) as server:
        replies = ask_all(server.endpoint(), requests(2))
    assert replies.failed == {"id-0": "no reply after 1 attempt: status 400: as told"}
    assert server.asked["prompt 0"] == 1


def test_a_server_that_asks_for_an_hour_has_failed() -> None:
    with serving(Failing(script={"prompt 0": ["429 3600"]})) as server:
        replies = ask_all(server.endpoint(), requests(2))
    assert "status 429" in replies.failed["id-0"]


def test_a_server_that_is_not_there_is_a_server_error() -> None:
    with serving(Failing()) as server:
        endpoint = server.endpoint(attempts=2)
    with pytest.raises(ServerError, match=r"cannot be used after 2 attempts: ConnectError.*Check that the server runs"):
        ask_all(endpoint, requests(30))


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_refused_key_or_model_ends_the_run_at_once(status: str) -> None:
    with serving(Failing(script={"*": [status] * 99})) as server, pytest.raises(ServerError, match=f"status {status}"):
        ask_all(server.endpoint(concurrency=2), requests(50))
    assert sum(server.asked.values()) <= 4


def test_what_was_answered_before_the_server_went_is_returned() -> None:
    with serving(Failing(script={f"prompt {i}": ["404"] for i in range(5, 50)})) as server:
        replies = ask_all(server.endpoint(concurrency=1), requests(50))
    assert list(replies.replies) == [f"id-{i}" for i in range(5)]
    assert len(replies.failed) == 45
    assert "not sent" in replies.failed["id-49"]


def test_text_that_is_no_unicode_fails_alone() -> None:
    with serving(Failing()) as server:
        replies = ask_all(server.endpoint(), {"bad": ask("lone \ud800"), "good": ask("\x00\x07 control \u202e\r\n")})
    assert texts(replies) == {"good": "reply to \x00\x07 control \u202e\r\n"}
    assert replies.failed["bad"].startswith("no reply after 1 attempt: the request cannot be written as UTF-8")


def test_replies_that_are_in_the_file_are_not_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    with serving(Failing(script={"prompt 3": ["500"] * 2})) as server:
        first = ask_all(server.endpoint(attempts=2), requests(6), resume=file)
        second = ask_all(server.endpoint(), requests(8), resume=file)
    assert set(first.failed) == {"id-3"}
    assert (second.resumed, second.failed) == (5, {})
    assert texts(second) == {f"id-{i}": f"reply to prompt {i}" for i in range(8)}
    assert server.answered == {f"prompt {i}": 1 for i in range(8)}


def test_a_half_written_reply_is_dropped_counted_and_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    with serving(Failing()) as server:
        ask_all(server.endpoint(), requests(4), resume=file)
        file.write_bytes(file.read_bytes()[:-20])
        again = ask_all(server.endpoint(), requests(4), resume=file)
        third = ask_all(server.endpoint(), requests(4), resume=file)
    assert (again.resumed, again.dropped, len(again.replies)) == (3, 1, 4)
    assert (third.resumed, third.dropped) == (4, 0)
    assert sum(server.asked.values()) == 5


@pytest.mark.parametrize("change", [{"max_tokens": 17}, {"temperature": 0.5}, {"seed": 1}])
def test_a_file_of_other_options_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    file = tmp_path / "replies.jsonl"
    message = (Message(role="user", content="prompt 0"),)
    with serving(Failing()) as server:
        ask_all(server.endpoint(), requests(1), resume=file)
        with pytest.raises(StoreError, match="holds a reply for 'id-0' to a different request"):
            ask_all(
                server.endpoint(),
                {"id-0": Request(**{"messages": message, "max_tokens": 16, **change})},
                resume=file,
            )
        with pytest.raises(StoreError, match="not a log of this configuration"):
            ask_all(Endpoint(url=server.url, model="other"), requests(1), resume=file)


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    source = """
        import sys
        from cliffscope.generation.endpoints import Endpoint, Request, ask_all
        from cliffscope.transcripts.records import Message
        asked = {f"id-{i}": Request(messages=(Message(role="user", content=f"prompt {i}"),), max_tokens=16)
                 for i in range(400)}
        ask_all(Endpoint(url=sys.argv[1], model="toy", concurrency=int(sys.argv[3])), asked, resume=sys.argv[2])
    """
    with serving(Failing()) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source), server.url, str(file), str(CONCURRENCY)]
        )
        deadline = time.monotonic() + 120
        while sum(server.answered.values()) < 40 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        before = sum(server.asked.values())
        replies = ask_all(server.endpoint(concurrency=CONCURRENCY), requests(400), resume=file)
    assert texts(replies) == {f"id-{i}": f"reply to prompt {i}" for i in range(400)}
    assert before < 400
    # A thread logs its reply before it sends its next request. When the process dies, each of its threads therefore
    # holds at most one request that the server may have counted and that is not in the log: it is sent, being answered,
    # or answered and being written. Only these are asked for again.
    assert sum(server.asked.values()) <= 400 + CONCURRENCY
    assert replies.resumed >= before - CONCURRENCY


def test_a_slow_disk_leaves_no_more_replies_unlogged_than_there_are_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlogged: list[int] = []
    written = 0
    append = RowLog.append

    def slow_append(log: RowLog, key: str, row: Mapping[str, object]) -> None:
        nonlocal written
        time.sleep(0.03)
        unlogged.append(sum(server.asked.values()) - written)
        append(log, key, row)
        written += 1

    monkeypatch.setattr(RowLog, "append", slow_append)
    with serving(Failing()) as server:
        ask_all(server.endpoint(concurrency=3), requests(30), resume=tmp_path / "replies.jsonl")
    assert written == 30
    assert max(unlogged) <= 3


def test_progress_counts_what_is_done() -> None:
    seen: list[int] = []
    with serving(Failing(script={"prompt 1": ["400"]})) as server:
        ask_all(server.endpoint(), requests(5), progress=seen.append)
    assert seen == [1, 2, 3, 4, 5]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(DataError, match="expected an address such as"):
        Endpoint(url="127.0.0.1:8000", model="toy")
    for change in ({"concurrency": 0}, {"attempts": 0}, {"timeout_seconds": 0.0}, {"pause_seconds": -1.0}):
        with pytest.raises(DataError, match="expected at least 1"):
            Endpoint(url="http://127.0.0.1/v1", model="toy", **change)


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(Endpoint(url="http://127.0.0.1/v1", model="toy", api_key="secret"))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cliffscope\[serve\]'"):
        ask_all(Endpoint(url="http://127.0.0.1/v1", model="toy"), requests(1))
