"""A run on tars behind a server that misbehaves all the time ends as the one that reads them from this machine:

    python -m tests.pretrain.bad_network [--steps 300]

The server answers 429, 500 and 503, drops connections within a shard, stalls for less and for more than a client sits
out, and redirects some shards. Losses, final weights and lanes are the same to the bit, so nothing was lost or
repeated, and the log names what was waited for.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.data_pipelines.servers import Server, serving
from tests.data_pipelines.streams import documents, write
from tests.pretrain.chaos import final, finish, start, write_model, write_recipe

SHARDS = 40
REDIRECTED = 5  # every so many shards


def faults(rng: random.Random, stall: float) -> list:
    """What requests get, in their order: half of them are answered well. stall: seconds that a client sits out."""
    found: list = []
    for _ in range(200):
        # Each long stall is within what any request waits for, so that a few of them are sure to be sat out.
        bad = [("drop", 20_000), ("drop", 20_000), ("stall", 20_000, stall * 0.2), ("stall", 2_000, stall * 2)]
        cut = [(kind, rng.randrange(1, most), *seconds) for kind, most, *seconds in bad]
        found += rng.sample(deck := [429, 500, 503, *cut, *[None] * 7], len(deck))
    return found


def records(run: Path) -> list[dict]:
    """Of metrics.jsonl and evaluations.jsonl, without what depends on the clock."""
    clock = {"seconds", "tokens_per_second"}
    lines = [line for name in ("metrics", "evaluations") for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def check(directory: Path, steps: int, rng: random.Random, patience: float, shards: int = SHARDS) -> str:
    """patience: of the run, a fourth of which a client sits out."""
    model = write_model(directory)
    tars = Path(write("tar", directory / "tars", documents(25 * shards), shards))
    files = {path.name: path.read_bytes() for path in sorted(tars.iterdir())}
    runs: dict = {"local": {"reference": str(tars), "length": 120}, "remote": {"patience": patience, "length": 120}}
    with serving(files) as server:
        for name in list(files)[::REDIRECTED]:
            server.redirects[name] = server.url(f"moved/{name}")
            server.files[f"moved/{name}"] = files[name]
        runs["remote"]["reference"] = server.url(f"{{000..{shards - 1:03d}}}.tar")
        server.faults.extend(faults(rng, patience / 4))
        said = {}
        for name, data in runs.items():
            began = time.monotonic()
            path = write_recipe(directory / f"{name}.yaml", model, {"name": "next_token"}, steps, data)
            said[name] = finish(start(path, directory / name, workers=2))
            took = time.monotonic() - began
        happened = noticed(server, said["remote"])
    local, remote = (records(directory / name) for name in runs)
    assert local == remote
    assert [record["step"] for record in remote[:steps]] == list(range(1, steps + 1))
    (tensors, lanes), (same, same_lanes) = (final(directory / name, steps) for name in runs)
    assert lanes == same_lanes
    assert tensors.keys() == same.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, same[name])] == []
    assert "waiting for" not in said["local"]
    training = said["remote"].partition("held-out at step 0")[2].count("waiting for")
    assert training > 0
    return (
        f"{steps} steps in {took:.0f} s over {len(server.asked)} requests, the same to the bit; it waited "
        f"{said['remote'].count('waiting for')} times, {training} of them while training: "
        + ", ".join(f"{count} × {kind}" for kind, count in sorted(happened.items()))
    )


def noticed(server: Server, said: str) -> Counter[str]:
    """How often what was waited for, by its reason; checked against what the server did."""
    waits = re.findall(r"waiting for (\S+) at (\S+) since \d\d:\d\d:\d\d \((.*)\); asking again in", said)
    assert all(url == server.url(name) for name, url, _ in waits)
    statuses = Counter((path.removeprefix("moved/"), kind) for path, kind in server.happened if kind.isdecimal())
    assert Counter((name, why[:3]) for name, _, why in waits if why[:3].isdecimal()) == statuses
    kinds = Counter(why if why[:3].isdecimal() or why == "timed out" else "connection lost" for _, _, why in waits)
    assert {kind[:3] for kind in kinds} == {"429", "500", "503", "tim", "con"}, kinds
    happened = Counter(kind for _, kind in server.happened)
    # What comes behind the last document of a shard, nobody waits for.
    assert kinds["connection lost"] <= happened["drop"]
    assert kinds["timed out"] < happened["stall"]
    assert len(re.findall(r" goes on after \d+\.\d s", said)) > 0
    kinds["stall sat out"] = happened["stall"] - kinds["timed out"]
    kinds["redirect"] = sum(path in server.redirects for path, _, _ in server.asked)
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--patience", type=float, default=40.0, help="of the run, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(check(Path(folder), arguments.steps, random.Random(arguments.seed), arguments.patience), flush=True)


if __name__ == "__main__":
    main()
