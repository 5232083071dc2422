"""Several fomoe-serve behind one address, with Ray Serve: each replica owns a drive and its cards.

    pip install 'fomoe_io[serve,ray]'
    python deploy/ray_serve.py replicas.json --port 8080

`replicas.json` says what each is, and what Ray reserves for it:

    {"replicas": [
      {"store": "/nvme0/model", "options": ["--ram", "24G", "--device", "cuda:0"], "cpus": 8, "gpus": 1},
      {"store": "/nvme1/model", "options": ["--ram", "24G", "--device", "cuda:0"], "cpus": 8, "gpus": 1}]}

Ray shows a replica only the cards that it has reserved (CUDA_VISIBLE_DEVICES), so that each counts its own from 0.  Ray
restarts a replica whose /health fails; the router (deploy/router.py) sends a conversation where it has been read.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

sys.path.insert(0, str(Path(__file__).resolve().parent))
from router import Gateway

LOAD_SECONDS = 1800
"""A large model is read from its drive before the first answer."""


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, health_check_period_s=5, graceful_shutdown_timeout_s=60)
class Replica:
    """One fomoe-serve, a process of its own: Ray starts it, looks after it and ends it in order."""

    def __init__(self, store: str, options: list[str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        command = [sys.executable, "-m", "fomoe_io", "serve", store, "--host", "127.0.0.1", "--port", "0", *options]
        self._process = subprocess.Popen(command, stderr=self._said, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        self._url = self._wait()

    def _wait(self) -> str:
        """The address, once the model is loaded."""
        for _ in range(10 * LOAD_SECONDS):
            self._said.seek(0)
            said = self._said.read().decode("utf-8", "replace")
            ready = [line for line in said.splitlines() if line.startswith("ready: ")]
            if ready:
                return ready[0].removeprefix("ready: ")
            if self._process.poll() is not None:
                raise RuntimeError(f"fomoe-serve ended: {said[-2000:]}")
            time.sleep(0.1)
        raise RuntimeError("fomoe-serve did not become ready")

    def url(self) -> str:
        """Where it listens."""
        return self._url

    def check_health(self) -> None:
        """Of Ray: an exception, and it is started again."""
        if self._process.poll() is not None:
            raise RuntimeError(f"fomoe-serve ended with {self._process.returncode}")
        with urllib.request.urlopen(f"{self._url}/health", timeout=10) as answer:
            answer.read()

    def __del__(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
class Router:
    """The one address.

    Parameters
    ----------
    replicas : dict of str to handle
    """

    def __init__(self, replicas: dict[str, Any]) -> None:
        self._replicas = replicas
        self._gateway = Gateway(self._addresses)

    async def _addresses(self) -> dict[str, str]:
        """Of all replicas that are up."""
        found = {}
        for name, handle in self._replicas.items():
            try:
                found[name] = await handle.url.remote()
            except Exception as error:  # it is being started again: Ray's own, of many kinds
                print(f"{name}: {error}", file=sys.stderr)
        return found

    async def __call__(self, request: Request) -> Response:
        """Pass it on."""
        return await self._gateway(request)


def built(config: dict[str, Any]) -> serve.Application:
    """What Ray runs."""
    replicas = {}
    for number, entry in enumerate(config["replicas"]):
        name = f"replica-{number}"
        actor = {"num_cpus": entry.get("cpus", 1), "num_gpus": entry.get("gpus", 0)}
        bound = Replica.options(name=name, ray_actor_options=actor)  # type: ignore[attr-defined]
        replicas[name] = bound.bind(entry["store"], list(entry.get("options", [])))
    return Router.bind(replicas)  # type: ignore[attr-defined]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="replicas.json")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(built(json.loads(options.config.read_text())), name="fomoe", route_prefix="/")
    print(f"ready: http://{options.host}:{options.port}", file=sys.stderr, flush=True)
    try:
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
