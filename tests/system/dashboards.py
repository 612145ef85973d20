"""A web server that answers as the dashboard of a Ray cluster would."""

from __future__ import annotations

import http.server
import json
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

Rule = Callable[[str, str | None], tuple[int, Any]]
"""(path, authorization) → status, body as JSON."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, body = self.server.rule(self.path, self.headers.get("Authorization"))
        data = json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/login")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Says nothing."""


@contextmanager
def serving(rule: Rule) -> Iterator[str]:
    """The address of a server on the loopback interface, for as long as the block."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.rule = rule
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def cluster_of(
    cpus=4.0, gpus=0.0, token="ours", ray=None, python=None, autoscales=False, **changed
) -> Rule:
    """A cluster of one node; `changed` replaces answers, by the path's last word."""
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    node = {"node_id": "abc", "state": "ALIVE", "resources_total": resources}
    dead = {"node_id": "old", "state": "DEAD", "resources_total": {"CPU": 64.0}}
    types = {"abc": "ray.head.default" if autoscales else "node_abc"}
    answers = {
        "version": {"ray_version": ray or metadata.version("ray")},
        "jobs": [],
        "cluster_metadata": {"data": {"pythonVersion": python or platform.python_version()}},
        "nodes": {"data": {"result": {"result": [node, dead]}}},
        "cluster_status": {
            "data": {"clusterStatus": {"autoscalerReport": {"nodeTypeMapping": types}}}
        },
    } | changed

    def rule(path, shown):
        if token is not None and shown != f"Bearer {token}":
            return (401 if shown is None else 403), None
        name = path.partition("?")[0].strip("/").split("/")[-1]
        return (200, answers[name]) if name in answers else (404, None)

    return rule
