"""Two processes that are measured in turns, each in an environment of its own: this project and another library.

A `Peer` is asked for one piece of work at a time, so that whatever else the machine does affects both alike, and
answers with its figures; while it waits it computes nothing. The process behind it runs a module of this project with
`--serve`, and whatever its library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]


class Peer:
    """A process that works in turns; `hello` is what it says of itself once it is ready."""

    def __init__(self, python: str, module: str, *arguments: str, threads: int):
        # The other environment has its own packages, and this project is found from its root alone.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [python, "-m", module, "--serve", *arguments]
        self._name = " ".join(command)
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        except OSError as error:
            raise SystemExit(
                f"{python} cannot be started ({error.strerror}); name the Python of an environment"
            ) from None
        self.hello = self._answer()

    def work(self, **request: Any) -> dict[str, Any]:
        """The figures of one turn."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended with code {self._process.wait()}; its last words are above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Turns:
    """The other end: requests as they come, until there are no more. Made before anything prints."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while line := sys.stdin.readline():
            yield json.loads(line)

    def answer(self, **figures: Any) -> None:
        print(json.dumps(figures), file=self._answers, flush=True)
