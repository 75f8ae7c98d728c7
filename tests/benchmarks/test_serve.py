"""The comparison of servers, with servers that answer at once and say how long they took."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from benchmarks import serve
from specauf.errors import UserError


class Server(BaseHTTPRequestHandler):
    """Repeats the prompt; its model is called as its port."""

    seen: ClassVar[list[tuple[int, dict]]] = []

    def reply(self, status: int, answer: dict) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": str(self.server.server_port)}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] != str(self.server.server_port):
            return self.reply(400, {"error": "no such model"})
        self.seen.append((self.server.server_port, asked))
        text = asked["messages"][-1]["content"]
        usage = {"completion_tokens": min(len(text), asked["max_tokens"])}
        return self.reply(200, {"choices": [{"message": {"content": text}}], "usage": usage})

    def log_message(self, *words: object) -> None:
        """Nothing."""


@pytest.fixture
def urls(monkeypatch):
    monkeypatch.setattr(Server, "seen", [])
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Server) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


def test_every_server_answers_every_prompt_in_turn(urls):
    found = serve.measure({"plain": urls[0], "drafted": urls[1]}, ["one", "three"], new=4)
    assert [row["answer"] for row in found["drafted"]] == ["one", "three"]
    assert [row["tokens"] for row in found["plain"]] == [3, 4]
    one, two = (int(url.rpartition(":")[2]) for url in urls)
    order = [port for port, _ in Server.seen]
    assert order == [one, two, one, two, two, one]  # warm, first prompt, second prompt
    assert {asked["temperature"] for _, asked in Server.seen} == {0}


def test_figures_by_hand():
    plain = [{"answer": "a", "tokens": 10, "seconds": 1.0}, {"answer": "b", "tokens": 30, "seconds": 3.0}]
    fast = [{"answer": "a", "tokens": 10, "seconds": 0.5}, {"answer": "c", "tokens": 20, "seconds": 1.0}]
    found = serve.figures({"plain": plain, "fast": fast})
    assert found["tokens"] == {"plain": 40, "fast": 30}
    assert found["tokens_per_second"] == {"plain": 10.0, "fast": 20.0}
    assert found["ratio_to_plain"] == {"fast": [2.0, 2.0, 2.0]}
    assert found["same_answers"] == {"plain": 2, "fast": 1}


def test_the_interval_is_over_prompts():
    random = np.random.default_rng(0)
    plain = [{"answer": "", "tokens": 10, "seconds": 1.0} for _ in range(40)]
    fast = [{"answer": "", "tokens": 10, "seconds": s} for s in random.uniform(0.3, 0.9, 40)]
    ratio, low, high = serve.figures({"plain": plain, "fast": fast})["ratio_to_plain"]["fast"]
    assert low < ratio < high
    assert 0.1 < high - low < 0.5


def test_a_server_that_is_not_there_or_refuses_is_one_line(urls):
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1/models: no answer \(.*\); start the server"):
        serve.measure({"plain": "http://127.0.0.1:9"}, ["x"], new=1)
    with pytest.raises(UserError, match=r"/v1/chat/completions: 400 answered \(.*no such model.*\); start the server"):
        serve.complete(urls[0], "another", "x", 1)
    with pytest.raises(UserError, match=r"http://a: no usage.completion_tokens in its answer; give servers"):
        serve.part("http://a", {"choices": []}, "usage", "completion_tokens")


@pytest.mark.parametrize("words", [["http://a"], ["a=b"], ["a=http://x", "a=http://y"]])
def test_servers_want_names_of_their_own(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve", *words])
    assert serve.main() == 2
    assert f"servers: {' '.join(words)} found, different NAME=http://... expected" in capsys.readouterr().err
