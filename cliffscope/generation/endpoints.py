"""How are many requests sent to an OpenAI-compatible server without losing or repeating a reply?

1. A bounded number of threads send requests, each with a timeout.
2. Transient failures (no connection, a truncated or malformed reply, a timeout, status 408, 409, 425, 429 or 5xx) are
   retried after a pause that doubles, or after the pause that the server asks for.
3. A request that still fails is reported with the reason, and the others continue. A server that cannot be reached, or
   that rejects the key or the model, ends the run.
4. A reply counts once it is in the log. Each thread logs its reply before it sends the next request, so that a kill
   loses at most as many replies as there are threads. A resumed run sends only requests without a reply in the log.

This file knows chat completions and nothing of their content. Replies are parsed strictly.
"""

import hashlib
import json
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from cliffscope.errors import DataError, ReplyError, ServerError, StoreError
from cliffscope.generation.exchange import Credentials, Failure, Reply, connect, exchange
from cliffscope.store import RowLog, open_log
from cliffscope.text import is_unicode
from cliffscope.transcripts.records import JsonValue, Message

if TYPE_CHECKING:
    from openai import OpenAI

__all__ = ["Endpoint", "Replies", "Reply", "Request", "ask_all"]

logger = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 60.0
"""Longest pause between two attempts; a server that asks for a longer one counts as failed."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible server, with limits on requests and retries.

    Key and password are sent to this address alone, and appear in no representation, file or error.

    Raises:
        DataError: a number is out of range, or the address is not http, or holds a user, a query or a fragment.

    Example:
        >>> Endpoint(url="http://127.0.0.1:8000/v1", model="my-model").concurrency
        8
    """

    url: str
    """Base address with the version, such as `http://127.0.0.1:8000/v1`."""
    model: str
    """Name of the model at the server."""
    api_key: str = field(default="none", repr=False)
    """Key, if the server needs one. It is never read from the environment, since it would be sent to any address."""
    login: tuple[str, str] | None = field(default=None, repr=False)
    """User name and password, for a server behind basic authentication; they are sent instead of the key."""
    concurrency: int = 8
    """Maximum number of parallel requests."""
    timeout_seconds: float = 300.0
    """Longest wait for a whole reply; a long transcript takes minutes."""
    attempts: int = 5
    """Number of times that a request is sent before it counts as failed."""
    pause_seconds: float = 0.5
    """Pause before the second attempt; it doubles with every further attempt."""
    extra_body: Mapping[str, JsonValue] = field(default_factory=dict, hash=False)
    """Additional fields of each request, such as vLLM's `chat_template_kwargs`."""

    def __post_init__(self) -> None:
        """Rejects settings under which no request can succeed."""
        _check_url(self.url)
        if not self.model or not is_unicode(self.model):
            raise DataError(f"model={self.model!r}: expected the name of a model at {self.url}.")
        _ = self.credentials
        if self.concurrency < 1 or self.attempts < 1 or not self.timeout_seconds > 0 or not self.pause_seconds >= 0:
            raise DataError(
                f"concurrency={self.concurrency}, attempts={self.attempts}, timeout_seconds={self.timeout_seconds}, "
                f"pause_seconds={self.pause_seconds}: expected at least 1, at least 1, more than 0, and 0 or more."
            )

    @property
    def credentials(self) -> Credentials:
        """What the server is shown of who asks."""
        return Credentials(key=self.api_key, login=self.login)


def _check_url(url: str) -> None:
    """Raises DataError unless the address can be recorded: runs keep it, so it may hold no secret."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        parts, usable = None, False
    if parts is not None and ("@" in parts.netloc or parts.query or parts.fragment):
        # The address itself is left out of the message, since it may hold a password.
        raise DataError(
            "The address of the server holds a user, a password, a query or a fragment, which would be recorded with "
            "the run. Expected an address such as http://127.0.0.1:8000/v1. Pass Endpoint(api_key=...) or "
            "Endpoint(login=(user, password)) instead."
        )
    if not usable or not url.isprintable() or not url.isascii() or " " in url:
        raise DataError(f"url={url!r}: expected an address such as http://127.0.0.1:8000/v1.")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request for a chat completion."""

    messages: tuple[Message, ...]
    """The conversation."""
    max_tokens: int
    """Maximum tokens of the reply, including thinking."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Seed of the sampling, if the server supports it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Replies:
    """Results of many requests; each key is in exactly one of the two mappings."""

    replies: Mapping[str, Reply]
    """Replies by key, in the order of the requests."""
    failed: Mapping[str, str]
    """Reasons for missing replies, by key."""
    resumed: int
    """Number of replies that were already in the log."""
    dropped: int
    """Number of half-written replies that were removed from the log and requested again."""


def ask_all(
    endpoint: Endpoint,
    requests: Mapping[str, Request],
    *,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Replies:
    """Sends many requests to one server.

    Args:
        endpoint: the server.
        requests: requests by key.
        resume: file in which every reply is stored, one file a model. Replies in the file are not requested again, so
            that an interrupted run can resume. None stores nothing.
        progress: called with the number of finished requests, from one thread.

    Returns:
        A reply or a reason for every key.

    Raises:
        MissingExtraError: the package openai is missing.
        ServerError: the server cannot be reached, or rejects the key or the model, and there is no new reply.
        StoreError: the file belongs to a different model or to different requests, or cannot be written.
    """
    log: AbstractContextManager[RowLog | None] = nullcontext(None)
    if resume is not None:
        log = open_log(os.fspath(resume), {"model": endpoint.model})
    with log as rows:
        replies = _resume(requests, rows, endpoint)
        resumed, stop = len(replies), threading.Event()
        failed: dict[str, str] = {}
        waiting = {key: request for key, request in requests.items() if key not in replies}
        if not waiting:
            return _collect(requests, replies, failed, rows, resumed)
        problem: ServerError | None = None
        writing = threading.Lock()

        def ask_and_log(client: "OpenAI", key: str) -> Reply | ReplyError | ServerError:
            answer = _ask(client, endpoint, waiting[key], key, stop)
            if rows is not None and isinstance(answer, Reply):
                with writing:
                    rows.append(key, {"request": _fingerprint(endpoint, waiting[key]), "reply": asdict(answer)})
            return answer

        with (
            connect(endpoint.url, endpoint.credentials, endpoint.timeout_seconds) as client,
            _pool(endpoint, stop) as pool,
        ):
            futures = {pool.submit(ask_and_log, client, key): key for key in waiting}
            for future in as_completed(futures):
                key, answer = futures[future], future.result()
                if isinstance(answer, Reply):
                    replies[key] = answer
                else:
                    failed[key] = str(answer)
                if isinstance(answer, ServerError) and problem is None:
                    problem = answer
                    stop.set()
                if progress is not None:
                    progress(len(replies) + len(failed))
    if problem is not None and len(replies) == resumed:
        raise problem
    if failed:
        logger.warning("%s did not answer %d of %d requests.", endpoint.url, len(failed), len(requests))
    return _collect(requests, replies, failed, rows, resumed)


def _collect(
    requests: Mapping[str, Request],
    replies: Mapping[str, Reply],
    failed: Mapping[str, str],
    rows: RowLog | None,
    resumed: int,
) -> Replies:
    return Replies(
        replies={key: replies[key] for key in requests if key in replies},
        failed={key: failed[key] for key in requests if key in failed},
        resumed=resumed,
        dropped=rows.dropped if rows is not None else 0,
    )


def _resume(requests: Mapping[str, Request], log: RowLog | None, endpoint: Endpoint) -> dict[str, Reply]:
    """The replies of the log that answer exactly these requests."""
    replies: dict[str, Reply] = {}
    for key, row in (log.rows if log is not None else {}).items():
        if key not in requests:
            continue
        if row.get("request") != _fingerprint(endpoint, requests[key]):
            raise StoreError(
                f"{log.path if log else ''} holds a reply for {key!r} to a different request: its prompt, budget, "
                "sampling or extra_body differs. Choose a different file, or use the same options."
            )
        try:
            replies[key] = Reply(**cast(dict[str, str], row["reply"]))
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"{log.path if log else ''} holds no valid reply for {key!r}. Choose a different file."
            ) from error
    return replies


def _fingerprint(endpoint: Endpoint, request: Request) -> str:
    text = json.dumps([asdict(request), dict(endpoint.extra_body)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _pool(endpoint: Endpoint, stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Threads that drop requests that have not started when an exception leaves the block."""
    pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="cliffscope-endpoint")
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _ask(
    client: "OpenAI", endpoint: Endpoint, request: Request, key: str, stop: threading.Event
) -> Reply | ReplyError | ServerError:
    """The reply after as many attempts as allowed, or the error."""
    # Pauses of different threads must not coincide, but must be the same in every run.
    jitter = random.Random(key)
    for attempt in range(1, endpoint.attempts + 1):
        if stop.is_set():
            return ReplyError(f"not sent, since {endpoint.url} failed; rerun the command")
        answer = _attempt(client, endpoint, request)
        if isinstance(answer, Reply):
            return answer
        pause = answer.pause_seconds or min(endpoint.pause_seconds * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
        if not answer.transient or attempt == endpoint.attempts or pause > LONGEST_PAUSE_SECONDS:
            attempts = f"after {attempt} attempt{'s' if attempt > 1 else ''}"
            if answer.fatal:
                return ServerError(
                    f"{endpoint.url} cannot be used {attempts}: {answer.reason}. Check that the server runs, its "
                    f"address, the key and the model name {endpoint.model!r}, then rerun the command."
                )
            return ReplyError(f"no reply {attempts}: {answer.reason}")
        stop.wait(pause * (0.75 + 0.5 * jitter.random()))
    raise AssertionError("the last attempt returns")


def _attempt(client: "OpenAI", endpoint: Endpoint, request: Request) -> Reply | Failure:
    body = {
        "model": endpoint.model,
        "messages": [{"role": m.role, "content": m.content} for m in request.messages],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "extra_body": dict(endpoint.extra_body),
    }
    return exchange(client, body, endpoint.credentials, endpoint.timeout_seconds)
