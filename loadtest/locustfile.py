"""Streaming chat under load: `pip install 'foregate[loadtest]'`, start a server, then

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 --users 8 --run-time 1m

Beside whole answers it reports, as entries of their own, the time to the first token and the gaps between tokens.
"""

from __future__ import annotations

import json
import random
import time

from locust import HttpUser, between, task

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "List three uses of a paper clip.",
    "How do I reverse a list in Python?",
)


class ChatUser(HttpUser):
    """Asks, reads the whole stream, thinks for a moment, asks again."""

    wait_time = between(0.1, 1.0)

    @task
    def chat(self) -> None:
        body = {
            "messages": [{"role": "user", "content": random.choice(PROMPTS)}],
            "max_tokens": 64,
            "stream": True,
        }
        started = last = time.perf_counter()
        num_tokens = 0
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, name="chat", catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            for line in answer.iter_lines():
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    answer.failure(event["error"]["message"])
                    return
                if not event["choices"] or not event["choices"][0]["delta"].get("content"):
                    continue
                now = time.perf_counter()
                num_tokens += 1
                self._report("time to first token" if num_tokens == 1 else "between tokens", now - last)
                last = now
            if num_tokens == 0:
                answer.failure("no tokens")
        self._report("whole answer", time.perf_counter() - started)

    def _report(self, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="stream",
            name=name,
            response_time=seconds * 1000,
            response_length=0,
            exception=None,
            context={},
        )
