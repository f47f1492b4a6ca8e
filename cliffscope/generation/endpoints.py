"""How is an OpenAI-compatible server asked many things without losing or repeating an answer?

1. A bounded number of threads send requests, each with a timeout.
2. What may pass (no connection, a cut or malformed reply, a timeout, status 408, 409, 429 or 5xx) is tried again after
   a pause that doubles, or after the pause that the server asks for.
3. A request that still fails is reported with its reason, and the others go on. A server that is not there, or that
   refuses the key or the model, ends the run.
4. A reply counts once it is in the log; a run started again with the same log asks only what has no reply yet.

Knows chat completions and nothing of what is asked. Replies are read strictly: what is not a reply is an error.
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

from cliffscope.errors import DataError, MissingExtraError, ReplyError, ServerError, StoreError
from cliffscope.store import RowLog, open_log
from cliffscope.transcripts.records import JsonValue, Message

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam

logger = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 60.0
"""A pause between two attempts never grows beyond this, and a server that asks for a longer one has failed."""

_PASSING = frozenset({408, 409, 425, 429})
_USELESS = frozenset({401, 403, 404})  # no other request can fare better with this key, model or address

_NOT_THERE = frozenset({"ConnectError", "ConnectTimeout"})  # by name: the client's HTTP package differs by version


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible server, and how patiently it is asked.

    Raises:
        DataError: A number is out of its range, or the address is not http.

    Example:
        >>> Endpoint(url="http://127.0.0.1:8000/v1", model="my-model").concurrency
        8
    """

    url: str
    """Base address, with the version: `http://127.0.0.1:8000/v1`."""
    model: str
    """Name by which the server knows the model."""
    api_key: str = field(default="none", repr=False)
    """Key, where the server wants one. It is never taken from the environment, since it would go to any address."""
    concurrency: int = 8
    """Requests at once, at most."""
    timeout_seconds: float = 300.0
    """Longest wait for one reply; a long transcript takes minutes."""
    attempts: int = 5
    """Times that a request is sent before it counts as failed."""
    pause_seconds: float = 0.5
    """Pause before the second attempt; it doubles with each further one."""
    extra_body: Mapping[str, JsonValue] = field(default_factory=dict, hash=False)
    """Further fields of each request, such as vLLM's `chat_template_kwargs`."""

    def __post_init__(self) -> None:
        """Refuses settings under which nothing can be asked."""
        if not self.url.startswith(("http://", "https://")) or not self.model:
            raise DataError(
                f"url={self.url!r}, model={self.model!r}: expected an address such as http://127.0.0.1:8000/v1 and the "
                "name of a model."
            )
        if self.concurrency < 1 or self.attempts < 1 or not self.timeout_seconds > 0 or not self.pause_seconds >= 0:
            raise DataError(
                f"concurrency={self.concurrency}, attempts={self.attempts}, timeout_seconds={self.timeout_seconds}, "
                f"pause_seconds={self.pause_seconds}: expected at least 1, at least 1, more than 0, and 0 or more."
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to ask."""

    messages: tuple[Message, ...]
    """The conversation."""
    max_tokens: int
    """Tokens of the reply at most, thinking included."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Of the sampling, where the server heeds it."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back."""

    content: str
    """The text; empty where the server sent none."""
    reasoning: str | None
    """Thinking, where the server separates it."""
    finish: str
    """Why it ended, such as `stop` or `length`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Replies:
    """What became of many requests; each key is in one of the two mappings."""

    found: Mapping[str, Reply]
    """Replies by key, in the order of the requests."""
    failed: Mapping[str, str]
    """Why there is no reply, by key."""
    resumed: int
    """Replies that were in the log already."""
    dropped: int
    """Half-written replies that were cut off the log and asked for again."""


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
        requests: what to ask, by key.
        resume: file in which each reply is kept; one file for one model. Replies that are in it are not asked for
            again, so a killed run goes on where it stopped. None keeps nothing.
        progress: called with the number of requests that are done, from one thread.

    Returns:
        A reply or a reason for every key.

    Raises:
        MissingExtraError: the package openai is missing.
        ServerError: the server is not there or refuses the key or the model, and there is no reply to show for it.
        StoreError: the file belongs to another model or to other requests, or cannot be written.
    """
    log: AbstractContextManager[RowLog | None] = nullcontext(None)
    if resume is not None:
        log = open_log(os.fspath(resume), {"model": endpoint.model})
    with log as kept:
        found = _resume(requests, kept, endpoint)
        resumed, stop = len(found), threading.Event()
        failed: dict[str, str] = {}
        waiting = {key: request for key, request in requests.items() if key not in found}
        if not waiting:
            return _collect(requests, found, failed, kept, resumed)
        problem: ServerError | None = None
        with _connect(endpoint) as client, _pool(endpoint, stop) as pool:
            futures = {pool.submit(_ask, client, endpoint, waiting[key], key, stop): key for key in waiting}
            for future in as_completed(futures):
                key, answer = futures[future], future.result()
                if isinstance(answer, Reply):
                    if kept is not None:
                        kept.append(key, {"request": _fingerprint(endpoint, waiting[key]), "reply": asdict(answer)})
                    found[key] = answer
                else:
                    failed[key] = str(answer)
                if isinstance(answer, ServerError) and problem is None:
                    problem = answer
                    stop.set()
                if progress is not None:
                    progress(len(found) + len(failed))
    if problem is not None and len(found) == resumed:
        raise problem
    if failed:
        logger.warning("%s: %d of %d requests have no reply.", endpoint.url, len(failed), len(requests))
    return _collect(requests, found, failed, kept, resumed)


def _collect(
    requests: Mapping[str, Request],
    found: Mapping[str, Reply],
    failed: Mapping[str, str],
    kept: RowLog | None,
    resumed: int,
) -> Replies:
    return Replies(
        found={key: found[key] for key in requests if key in found},
        failed={key: failed[key] for key in requests if key in failed},
        resumed=resumed,
        dropped=kept.dropped if kept is not None else 0,
    )


def _resume(requests: Mapping[str, Request], kept: RowLog | None, endpoint: Endpoint) -> dict[str, Reply]:
    """Replies of the log that answer these very requests."""
    found: dict[str, Reply] = {}
    for key, row in (kept.rows if kept is not None else {}).items():
        if key not in requests:
            continue
        if row.get("request") != _fingerprint(endpoint, requests[key]):
            raise StoreError(
                f"{kept.path if kept else ''} holds a reply for {key!r} to another request: its prompt, budget, "
                "sampling or extra_body was different. Give another file, or the same options."
            )
        try:
            found[key] = Reply(**cast(dict[str, str], row["reply"]))
        except (KeyError, TypeError) as error:
            raise StoreError(f"{kept.path if kept else ''} holds no reply for {key!r}. Give another file.") from error
    return found


def _fingerprint(endpoint: Endpoint, request: Request) -> str:
    text = json.dumps([asdict(request), dict(endpoint.extra_body)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _connect(endpoint: Endpoint) -> Iterator["OpenAI"]:
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError(
            "A server is asked through the package openai: pip install 'cliffscope[serve]'."
        ) from error
    # Attempts are counted here, since the client does not try a malformed reply again.
    client = openai.OpenAI(
        base_url=endpoint.url, api_key=endpoint.api_key, timeout=endpoint.timeout_seconds, max_retries=0
    )
    with client:
        yield client


@contextmanager
def _pool(endpoint: Endpoint, stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Threads that leave what has not begun as soon as the block is left by an exception."""
    pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="cliffscope-endpoint")
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """One attempt that gave no reply."""

    reason: str
    passing: bool
    useless: bool = False
    """Whether no other request can succeed either."""
    pause_seconds: float | None = None


def _ask(
    client: "OpenAI", endpoint: Endpoint, request: Request, key: str, stop: threading.Event
) -> Reply | ReplyError | ServerError:
    """The reply after as many attempts as it takes, or why there is none."""
    # Pauses of many threads must not fall together, and yet be the same in every run.
    jitter = random.Random(key)
    for attempt in range(1, endpoint.attempts + 1):
        if stop.is_set():
            return ReplyError(f"not asked: {endpoint.url} failed for good; run it again")
        answer = _attempt(client, endpoint, request)
        if isinstance(answer, Reply):
            return answer
        pause = answer.pause_seconds or min(endpoint.pause_seconds * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
        if not answer.passing or attempt == endpoint.attempts or pause > LONGEST_PAUSE_SECONDS:
            tried = f"after {attempt} attempt{'s' if attempt > 1 else ''}"
            if answer.useless:
                return ServerError(
                    f"{endpoint.url} cannot be used {tried}: {answer.reason}. Check that the server runs, its address, "
                    f"the key and the model name {endpoint.model!r}, then run the same again."
                )
            return ReplyError(f"no reply {tried}: {answer.reason}")
        stop.wait(pause * (0.75 + 0.5 * jitter.random()))
    raise AssertionError("the last attempt returns")


def _attempt(client: "OpenAI", endpoint: Endpoint, request: Request) -> Reply | _Failure:
    import openai

    messages = [{"role": m.role, "content": m.content} for m in request.messages]
    try:
        raw = client.chat.completions.with_raw_response.create(
            model=endpoint.model,
            messages=cast("list[ChatCompletionMessageParam]", messages),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            extra_body=dict(endpoint.extra_body),
        )
        return _read(raw.text)
    except openai.APIConnectionError as error:
        cause = type(error.__cause__).__name__
        late = isinstance(error, openai.APITimeoutError)
        reason = f"nothing came within {endpoint.timeout_seconds:g} seconds" if late else f"{cause}: {error.__cause__}"
        return _Failure(reason=reason, passing=True, useless=cause in _NOT_THERE)
    except openai.APIStatusError as error:
        return _refused(error.status_code, str(error), error.response.headers.get("retry-after"))
    except (openai.OpenAIError, _Malformed) as error:
        return _Failure(reason=f"malformed reply: {error}", passing=True)
    except UnicodeError as error:
        return _Failure(reason=f"the request cannot be written as UTF-8: {error}", passing=False)


def _refused(status: int, text: str, retry_after: str | None) -> _Failure:
    try:
        pause = float(retry_after) if retry_after else None
    except ValueError:
        pause = None  # an HTTP date, whose clock may differ from ours: our own pause is as good
    return _Failure(
        reason=f"status {status}: {' '.join(text.removeprefix(f'Error code: {status} - ').split())[:300]}",
        passing=status >= 500 or status in _PASSING,
        useless=status in _USELESS,
        pause_seconds=pause,
    )


class _Malformed(ValueError):
    """A body that is no chat completion."""


def _read(text: str) -> Reply:
    """The first choice of a chat completion, each field checked."""
    try:
        choice = json.loads(text)["choices"][0]
        message = choice["message"]
        content, finish = message.get("content"), choice.get("finish_reason")
        # Servers call separated thinking by either name.
        reasoning = message.get("reasoning_content") or message.get("reasoning")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Malformed(f"{type(error).__name__} in {text[:120]!r}") from error
    for value in (content, reasoning, finish):
        if value is not None and not isinstance(value, str):
            raise _Malformed(f"{type(value).__name__} where text was expected, in {text[:120]!r}")
    return Reply(content=content or "", reasoning=reasoning, finish=finish or "")
