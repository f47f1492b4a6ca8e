"""A chat-completions server on loopback that fails as it is told, and counts."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cliffscope.generation.endpoints import Endpoint

Say = Callable[[str], Mapping[str, object]]
SLOW_SECONDS = 3.0


def echo(prompt: str) -> Mapping[str, object]:
    return {"content": f"reply to {prompt}"}


@dataclass(kw_only=True)
class Failing:
    """What the server is to do with each prompt, and what it has done."""

    script: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Failures by prompt, one for each of its first requests; "*" holds for prompts without their own."""
    say: Say = echo
    """The message that a prompt is answered with."""
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by prompt."""
    answered: Counter[str] = field(default_factory=Counter)
    """Good replies by prompt."""
    bodies: list[dict[str, object]] = field(default_factory=list)
    url: str = ""
    hold_seconds: float = 0.0
    """How long a request counts at least."""
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def endpoint(self, **changes: object) -> Endpoint:
        quick = {"pause_seconds": 0.01, "timeout_seconds": 5.0, "concurrency": 4}
        return Endpoint(url=self.url, model="toy", **{**quick, **changes})

    def step(self, body: dict[str, object]) -> tuple[str, str]:
        """The prompt of a request and what to do with it."""
        prompt = str(body["messages"][-1]["content"])
        with self.lock:
            steps = self.script.get(prompt, self.script.get("*", ()))
            step = steps[self.asked[prompt]] if self.asked[prompt] < len(steps) else "ok"
            self.asked[prompt] += 1
            self.answered[prompt] += step == "ok"
            self.bodies.append(body)
        return prompt, step


def completion(message: Mapping[str, object], finish: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 1, "model": "toy", "choices": [choice]}
    ).encode()


@contextmanager
def serving(failing: Failing) -> Iterator[Failing]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with failing.lock:
                failing.at_once += 1
                failing.most_at_once = max(failing.most_at_once, failing.at_once)
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(failing.hold_seconds)
            finally:
                # Before the reply: whoever has it may ask again before this thread is back.
                with failing.lock:
                    failing.at_once -= 1
            self.act(*failing.step(body))

        def act(self, prompt: str, step: str) -> None:
            message = dict(failing.say(prompt))
            good = completion(message, str(message.pop("finish", "stop")))
            if step == "cut":
                self.send(200, good, cut=len(good) // 2)
            elif step == "malformed":
                self.send(200, b'{"choices": [{"message"')
            elif step == "no choices":
                self.send(200, b'{"object": "error", "message": "no"}')
            elif step == "number":
                self.send(200, completion({"content": 7}))
            elif step == "html":
                self.send(200, b"<html>gateway</html>", kind="text/html")
            elif step == "slow":
                time.sleep(SLOW_SECONDS)
                self.send(200, good)
            elif step == "ok":
                time.sleep(0.01)
                self.send(200, good)
            else:
                status, _, wait = step.partition(" ")
                self.send(int(status), b'{"error": {"message": "as told"}}', wait=wait)

        def send(
            self, status: int, body: bytes, *, cut: int = 0, kind: str = "application/json", wait: str = ""
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if wait:
                self.send_header("Retry-After", wait)
            with suppress(OSError):  # the client may have given up
                self.end_headers()
                self.wfile.write(body[: cut or len(body)])
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False

        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    failing.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield failing
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
