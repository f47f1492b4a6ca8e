"""A server on loopback that does to a client what it should not: redirects, echoes, drips and floods."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from failing_server import completion

MEBIBYTE = 1 << 20


class Handler(BaseHTTPRequestHandler):
    """One request; what a misdeed sends is in the functions below."""

    hostile: "Hostile"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompt = str(body["messages"][-1]["content"])
        self.hostile.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.hostile.prompts.append(self.prompt)
        with suppress(OSError):  # the client gives up in the middle
            self.hostile.misdeeds.get(self.prompt, answer)(self)
        self.close_connection = True

    do_GET = do_POST

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.head(status, **{"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


Misdeed = Callable[[Handler], None]


def answer(handler: Handler) -> None:
    handler.send(200, completion({"content": f"reply to {handler.prompt}"}))


def redirect_to(address: str, status: int = 307) -> Misdeed:
    return lambda handler: handler.send(status, b"", Location=f"{address}/chat/completions")


def echo_headers(handler: Handler) -> None:
    handler.send(200, completion({"content": json.dumps(dict(handler.headers.items()))}))


def echo_key(handler: Handler) -> None:
    """The key alone, in the thinking."""
    key = handler.headers["Authorization"].partition(" ")[2]
    handler.send(200, completion({"content": "fine", "reasoning_content": f"I was given {key}."}))


def echo_in_error(handler: Handler) -> None:
    """The key where the message is cut."""
    text = "x" * 290 + handler.headers["Authorization"]
    handler.send(400, json.dumps({"error": {"message": text}}).encode())


def echo_in_malformed(handler: Handler) -> None:
    handler.send(200, f'{{"authorization": "{handler.headers["Authorization"]}"}}'.encode())


def nest(handler: Handler) -> None:
    handler.send(200, b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")


def nest_inside(handler: Handler) -> None:
    """A completion whose text is nested JSON, for a judge to parse."""
    handler.send(200, completion({"content": "[" * 200_000 + "]" * 200_000}))


def flood(handler: Handler) -> None:
    handler.head(200)
    with suppress(OSError):
        for _ in range(150):
            handler.wfile.write(b" " * MEBIBYTE)
            handler.hostile.megabytes += 1


def flood_with_an_error(handler: Handler) -> None:
    handler.head(500)
    with suppress(OSError):
        for _ in range(150):
            handler.wfile.write(b"x" * MEBIBYTE)
            handler.hostile.megabytes += 1


def drip(handler: Handler) -> None:
    handler.head(200)
    drip_bytes(handler)


def drip_head(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    drip_bytes(handler)


def drip_bytes(handler: Handler) -> None:
    while not handler.hostile.over.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def lone_surrogate(handler: Handler) -> None:
    handler.send(200, completion({"content": "half \ud800"}))


def lone_surrogate_in_error(handler: Handler) -> None:
    handler.send(400, b'{"error": {"message": "half \\ud800, \\u001b[31mred"}}')


def control_characters(handler: Handler) -> None:
    handler.send(200, completion({"content": "NUL \x00, ESC \x1b[31m, C1 \x9b"}))


def ask_for_a_pause_that_is_none(handler: Handler) -> None:
    handler.send(429, b"{}", Retry_After="nan")


@dataclass(kw_only=True)
class Hostile:
    """What the server does with each prompt, and what it saw."""

    misdeeds: dict[str, Misdeed] = field(default_factory=dict)
    """By prompt; others are answered."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of each request."""
    prompts: list[str] = field(default_factory=list)
    megabytes: int = 0
    """How many were written before the client went away."""
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(hostile: Hostile) -> Iterator[Hostile]:
    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hostile": hostile}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hostile.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield hostile
    finally:
        hostile.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def seconds_of(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started
