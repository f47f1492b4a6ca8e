"""What is sent to a server, what is accepted from it, and what never leaves the client?

1. A request carries the headers of `_HEADERS` and no others: no organisation or project of the environment, no cookies.
2. No redirect is followed, since it would send prompts and key to an address that nobody named.
3. A reply ends at `LARGEST_REPLY_BYTES` or at the timeout, whatever the server goes on sending.
4. A reply that repeats a key or password is discarded, and reasons for failures are searched for them before they are
   cut and shown.

Replies are parsed strictly. This file knows chat completions and nothing of retries.
"""

import base64
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn, cast

from cliffscope.errors import DataError, MissingExtraError
from cliffscope.text import is_unicode, visible

if TYPE_CHECKING:
    from openai import OpenAI

LARGEST_REPLY_BYTES = 16 << 20
"""Longest reply that is read, about 4 million tokens of text; a longer one is discarded."""
LARGEST_ERROR_BYTES = 1 << 16
"""Most that is read of a reply that reports an error."""
SHORTEST_SECRET = 8
"""Shortest key or password, in characters, that is searched for by itself, since placeholders such as `EMPTY` occur in
answers. Shorter ones are searched for as they are sent."""
UNREACHABLE = frozenset({"ConnectError", "ConnectTimeout"})
"""Errors of connecting, by name, since the client's HTTP package depends on its version."""

_RAW = "x-stainless-raw-response"  # by which the client remembers that it is not to parse the reply
_HEADERS = frozenset(
    {"accept", "authorization", "connection", "content-length", "content-type", "host", "user-agent", _RAW}
)
_TRANSIENT = frozenset({408, 409, 425, 429})
_FATAL = frozenset({401, 403, 404})  # every other request fails as well with this key, model or address
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GRACE_SECONDS = 1.0  # so that the HTTP package's own timeouts, which say more, come first
_SHOWN = 300


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply of the server."""

    content: str
    """The text; empty if the server sent none."""
    reasoning: str | None
    """The thinking, if the server separates it."""
    finish: str
    """Finish reason, such as `stop` or `length`."""
    refusal: str = ""
    """The refusal, if the server gives it in a field of its own."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An attempt without a reply."""

    reason: str
    """Why, on one line and without secrets."""
    transient: bool
    """Whether a further attempt may succeed."""
    fatal: bool = False
    """Whether every other request fails as well."""
    pause_seconds: float | None = None
    """Pause that the server asks for."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Credentials:
    """What a server is shown, and nobody else.

    Raises:
        DataError: a key or password cannot be sent in a header. The message does not repeat it.
    """

    key: str
    """Key, as a bearer token."""
    login: tuple[str, str] | None
    """User name and password; they replace the key."""

    def __post_init__(self) -> None:
        """Rejects what no header may hold."""
        for name, value in (("api_key", self.key), *(("login", part) for part in self.login or ())):
            if not value or not value.isascii() or not value.isprintable() or (name == "api_key" and " " in value):
                raise DataError(
                    f"{name} is blank or holds characters that no header may. Expected printable ASCII"
                    f"{' without spaces or line breaks' if name == 'api_key' else ''}; check for a stray newline."
                )

    @property
    def header(self) -> str:
        """Value of the header `Authorization`."""
        return f"Bearer {self.key}" if self.login is None else f"Basic {self._basic}"

    @property
    def _basic(self) -> str:
        return base64.b64encode(":".join(self.login or ()).encode()).decode()

    def occur_in(self, text: str) -> bool:
        """Whether a text holds any of them."""
        return any(secret in text for secret in self._secrets())

    def removed_from(self, text: str) -> str:
        """The text with each of them replaced by `[secret]`."""
        for secret in self._secrets():
            text = text.replace(secret, "[secret]")
        return text

    def _secrets(self) -> list[str]:
        """Every form in which they may come back, longest first, since one may be part of another."""
        parts = [self.key] if self.login is None else [self.login[1], ":".join(self.login), self._basic]
        forms = {self.header, *(part for part in parts if len(part) >= SHORTEST_SECRET)}
        return sorted(forms, key=len, reverse=True)


@contextmanager
def connect(url: str, credentials: Credentials, timeout_seconds: float) -> Iterator["OpenAI"]:
    """Opens a client of one server.

    Args:
        url: base address with the version.
        credentials: sent to this address alone.
        timeout_seconds: longest wait for the connection, and for each part of a reply.

    Yields:
        The client, which neither retries nor follows redirects.

    Raises:
        MissingExtraError: the package openai is missing.
    """
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError(
            "Requests to a server need the package openai. Install it with pip install 'cliffscope[serve]'."
        ) from error

    def keep_headers(request: Any) -> None:
        for name in [name for name in request.headers if name.lower() not in _HEADERS]:
            del request.headers[name]
        request.headers["authorization"] = credentials.header
        # A few compressed bytes can hold gigabytes.
        request.headers["accept-encoding"] = "identity"

    http = openai.DefaultHttpxClient(
        base_url=url,
        timeout=timeout_seconds,
        follow_redirects=False,
        event_hooks={"request": [keep_headers], "response": [_check_head]},
    )
    # Attempts are counted by the caller, since the client does not retry malformed replies.
    with openai.OpenAI(
        base_url=url,
        api_key=credentials.key,
        timeout=timeout_seconds,
        max_retries=0,
        http_client=http,
    ) as client:
        yield client


def exchange(
    client: "OpenAI", body: Mapping[str, object], credentials: Credentials, timeout_seconds: float
) -> Reply | Failure:
    """Sends one request, and gives up at the timeout whatever the server does.

    Args:
        client: from `connect`.
        body: arguments of `chat.completions.create`.
        credentials: searched for in the reply.
        timeout_seconds: longest wait for the whole reply.

    Returns:
        The reply, or why there is none.
    """
    outcome: Future[Reply | Failure] = Future()

    def work() -> None:
        try:
            outcome.set_result(_exchange(client, body, timeout_seconds))
        except BaseException as error:
            outcome.set_exception(error)

    # A server that drips its headers keeps the HTTP package waiting for good, so the wait is ended from outside.
    Thread(target=work, daemon=True, name="cliffscope-exchange").start()
    try:
        answer = outcome.result(timeout_seconds + _GRACE_SECONDS)
    except TimeoutError:
        answer = Failure(reason=f"no reply within {timeout_seconds:g} seconds", transient=True)
    if isinstance(answer, Failure):
        reason = visible(credentials.removed_from(answer.reason), one_line=True)
        shown = reason if len(reason) <= _SHOWN else f"{reason[:_SHOWN]}…"
        return Failure(reason=shown, transient=answer.transient, fatal=answer.fatal, pause_seconds=answer.pause_seconds)
    if any(credentials.occur_in(text) for text in _texts(answer)):
        return Failure(reason="the reply repeats the key or password, so it was discarded", transient=False)
    return answer


def _texts(reply: Reply) -> tuple[str, ...]:
    return reply.content, reply.reasoning or "", reply.finish, reply.refusal


def _exchange(client: "OpenAI", body: Mapping[str, object], timeout_seconds: float) -> Reply | Failure:
    import openai

    deadline = time.monotonic() + timeout_seconds
    try:
        with cast(Any, client.chat.completions.with_streaming_response).create(**body) as response:
            data = _limited(response.iter_bytes(), LARGEST_REPLY_BYTES, deadline)
        return read_reply(data)
    except openai.APIConnectionError as error:
        cause = error.__cause__
        if isinstance(cause, _Ended):
            return cause.failure
        if isinstance(error, openai.APITimeoutError):
            return Failure(reason=f"no reply within {timeout_seconds:g} seconds", transient=True)
        return _unconnected(cause)
    except _Ended as error:
        return error.failure
    except UnicodeEncodeError as error:
        return Failure(reason=f"the request cannot be written as UTF-8: {error}", transient=False)
    except openai.OpenAIError as error:
        return Failure(reason=f"malformed reply: {error}", transient=True)
    except Exception as error:
        # Errors while a body is read have the types of the HTTP package, whose name depends on the client's version.
        if not type(error).__module__.startswith(("httpx", "httpcore", "h11")):
            raise
        if "Timeout" in type(error).__name__:
            return Failure(reason=f"no reply within {timeout_seconds:g} seconds", transient=True)
        return _unconnected(error)


def _unconnected(cause: BaseException | None) -> Failure:
    name = type(cause).__name__
    return Failure(reason=f"{name}: {cause}", transient=True, fatal=name in UNREACHABLE)


class _Ended(Exception):
    """A reply that is not read to its end."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def _check_head(response: Any) -> None:
    """Ends a reply whose head says that it is no completion. Raises _Ended, which the client passes on."""
    status = int(response.status_code)
    if status in _REDIRECTS:
        reason = (
            f"status {status}: the server redirects to {response.headers.get('location', 'nowhere')}, which is not "
            "followed. Use the final address"
        )
        raise _Ended(Failure(reason=reason, transient=False, fatal=True))
    if not 200 <= status < 300:
        text = _limited(response.iter_raw(), LARGEST_ERROR_BYTES, None).decode("utf-8", "replace")
        raise _Ended(_refused(status, text, response.headers.get("retry-after")))
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        _malformed("compressed, although the request forbids it")


def _limited(chunks: Iterable[bytes], most: int, deadline: float | None) -> bytes:
    """The bytes of a body. Without a deadline, what is over the limit is left out; with one, both are errors."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > most:
            if deadline is None:
                return bytes(data[:most])
            raise _Ended(Failure(reason=f"the reply has more than {most} bytes", transient=False))
        if deadline is not None and time.monotonic() > deadline:
            raise _Ended(Failure(reason="the reply was not complete within the timeout", transient=True))
    return bytes(data)


def _refused(status: int, text: str, retry_after: str | None) -> Failure:
    try:
        pause = float(retry_after) if retry_after else None
    except ValueError:
        pause = None  # an HTTP date, by a clock that may differ from ours
    return Failure(
        reason=f"status {status}: {' '.join(_message(text).split())}",
        transient=status >= 500 or status in _TRANSIENT,
        fatal=status in _FATAL,
        pause_seconds=pause if pause is not None and pause >= 0 else None,
    )


def _message(text: str) -> str:
    """The message of an error's JSON; the text itself if there is none."""
    try:
        value = json.loads(text)
        error = value.get("error", value)
        message = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        return text
    return message if isinstance(message, str) and message else text


def read_reply(data: bytes) -> Reply:
    """The first choice of a chat completion, with each field checked. Raises _Ended if there is none."""
    text = data.decode("utf-8", "replace")
    try:
        choice = json.loads(data)["choices"][0]
        message = choice["message"]
        content, finish = message.get("content"), choice.get("finish_reason")
        # Servers use either name for separated thinking.
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        refusal = message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        _malformed(f"{type(error).__name__} in {text}")
    for value in (content, reasoning, finish, refusal):
        if value is not None and not isinstance(value, str):
            _malformed(f"{type(value).__name__} where text was expected, in {text}")
        if value is not None and not is_unicode(value):
            _malformed(f"half of a surrogate pair, which no file accepts, in {text}")
    return Reply(content=content or "", reasoning=reasoning, finish=finish or "", refusal=refusal or "")


def _malformed(what: str) -> NoReturn:
    raise _Ended(Failure(reason=f"malformed reply: {what}", transient=True))
