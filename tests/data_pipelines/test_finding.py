"""What data references mean: files, lists and braces, URLs, directories in hub layout, and a hub that is ours."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.config import DataError, SourceConfig
from data_pipelines.finding import find

ROW = b'{"text": "x"}\n'


def write(root: Path, *names: str, content: bytes = ROW) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def shards(reference: object, **keys) -> list:
    return find(SourceConfig(reference=str(reference), **keys), patience=0).shards


def names(reference: object, **keys) -> list[str]:
    return [shard.name for shard in shards(reference, **keys)]


def error(reference: object, **keys) -> str:
    with pytest.raises(DataError) as caught:
        shards(reference, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Files and URLs


def test_order_and_names(tmp_path):
    files = ["a/x.txt", "a/y.jsonl.gz", "b/s-08.tar", "b/s-09.tar", "b/s-10.tar", "c.md.zst", "d.parquet"]
    write(tmp_path, *reversed(files), ".hidden/z.txt", "e.png", "f.parquet.gz")
    assert names(tmp_path) == files
    assert names(f"{tmp_path}/**/*") == files
    assert names(f"{tmp_path}/b/s-{{08..10}}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert names(f"{tmp_path}/{{b,a}}/*") == [*files[2:5], *files[:2]]
    assert names(f"{tmp_path}/d.parquet,{tmp_path}/a/{{y.jsonl.gz,{{x.txt,x.txt}}}}::{tmp_path}/c.md.zst") == [
        "d.parquet",
        "y.jsonl.gz",
        "x.txt",
        "x.txt",
        "c.md.zst",
    ]
    kinds = {shard.name: (shard.format, shard.compression) for shard in shards(tmp_path)}
    assert kinds == {
        "a/x.txt": ("text", ""),
        "a/y.jsonl.gz": ("jsonl", "gz"),
        "b/s-08.tar": ("tar", ""),
        "b/s-09.tar": ("tar", ""),
        "b/s-10.tar": ("tar", ""),
        "c.md.zst": ("text", "zst"),
        "d.parquet": ("parquet", ""),
    }


def test_names_do_not_depend_on_the_place(tmp_path):
    for folder in ("here", "else/where"):
        write(tmp_path / folder, "s-1.tar", "s-2.tar", "t/u.txt")
    assert names(tmp_path / "here") == names(tmp_path / "else" / "where")
    pattern = "s-{1..2}.tar"
    assert names(tmp_path / "here" / pattern) == names(f"https://host/deep/{pattern}?key=a.b") == ["s-1.tar", "s-2.tar"]


def test_what_exists_is_taken_literally(tmp_path):
    write(tmp_path, "a{1,2}.txt", "b,c.txt", "d[1].txt")
    for name in ("a{1,2}.txt", "b,c.txt", "d[1].txt"):
        assert names(tmp_path / name) == [name]


def test_urls_keep_their_query_strings():
    first, second = shards("https://host/{a,b}/x.jsonl.gz?token=t.tar")
    assert (first.place, first.name) == ("https://host/a/x.jsonl.gz?token=t.tar", "a/x.jsonl.gz")
    assert (second.format, second.compression, second.is_remote, second.on_hub) == ("jsonl", "gz", True, False)
    (on_hub,) = shards("https://huggingface.co/datasets/a/b/resolve/main/x.json.gz")
    assert (on_hub.format, on_hub.on_hub) == ("jsonl", True)


@pytest.mark.parametrize(
    ("reference", "keys", "part"),
    [
        ("fineweb", {}, "neither a known name nor an existing path; accepted: python-docs"),
        ("fineweb", {}, "a hub dataset, always as OWNER/NAME"),
        ("absent/x.txt", {}, "'absent/x.txt' is neither a known name nor an existing path"),
        ("x-{1..2.tar", {}, "has braces without a partner; close them"),
        ("x.txt,,y.txt", {}, "has an empty part"),
        ("https://host/x.csv", {}, "ends in no supported type; accepted"),
        ("hf://models/a/b", {}, "is no hf://datasets/OWNER/NAME[@REVISION]/GLOB"),
        ("a/b@x", {"revision": "y"}, "data.revision y differ; leave one out"),
        ("absent/x.txt", {"config": "y"}, "data.config is of hub datasets and 'absent/x.txt' is none"),
    ],
)
def test_bad_references(reference, keys, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in error(reference, **keys)


def test_each_file_of_a_brace_pattern_must_exist(tmp_path):
    write(tmp_path, "s-0.tar", "s-2.tar")
    assert f"'{tmp_path}/s-1.tar' is neither" in error(tmp_path / "s-{0..2}.tar")


# Directories in hub layout


@pytest.fixture
def two_configs(tmp_path) -> Path:
    readme = """---
configs:
- config_name: english
  data_files:
  - {split: train, path: en/train-*.jsonl}
  - {split: test, path: en/test.jsonl}
- config_name: german
  data_files: de/*.json.gz
---
# Two
"""
    root = write(tmp_path / "two", "en/train-1.jsonl", "en/train-0.jsonl", "en/test.jsonl", "fr/other.jsonl")
    write(root, "de/0.json.gz", content=gzip.compress(ROW))
    return write(root, "README.md", content=readme.encode())


def test_configurations_and_splits(two_configs):
    assert names(two_configs, config="english") == ["en/train-0.jsonl", "en/train-1.jsonl"]
    assert names(two_configs, config="english", split="test") == ["en/test.jsonl"]
    (german,) = shards(two_configs, config="german")
    assert (german.name, german.format, german.compression) == ("de/0.json.gz", "jsonl", "gz")
    assert Path(german.place) == two_configs / "de" / "0.json.gz"
    assert error(two_configs).endswith("has several configurations; set data.config to one of english, german")
    assert "no configuration 'x'; set data.config to one of english, german" in error(two_configs, config="x")
    assert "no split 'x'; set data.split to one of train, test" in error(two_configs, config="english", split="x")


def test_without_the_package_that_reads_layouts(two_configs, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets, which is not installed; pip install" in error(two_configs, config="english")
    assert names(two_configs / "en" / "*.jsonl") == ["test.jsonl", "train-0.jsonl", "train-1.jsonl"]


def test_a_pushed_directory(tmp_path, monkeypatch):
    pushed = [f"data/{split}-0000{n}-of-00002.parquet" for split in ("train", "test") for n in range(2)]
    for name in pushed:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / name)
    assert names(tmp_path) == pushed[:2]
    assert names(tmp_path, split="test") == pushed[2:]
    # A directory called like one of datasets' own formats.
    tmp_path.rename(tmp_path.with_name("parquet"))
    monkeypatch.chdir(tmp_path.parent)
    assert names("parquet") == pushed[:2]


def test_layouts_that_cannot_be_read(tmp_path):
    write(tmp_path / "c", "data/train-00000-of-00001.csv")
    assert "00001.csv is of no supported type; accepted: " in error(tmp_path / "c")
    write(tmp_path / "s", "s.py", "data/train-00000-of-00001.jsonl", content=b"raise SystemExit(9)\n")
    assert "is a script, which is never executed" in error(tmp_path / "s")
    write(tmp_path / "y", "README.md", content=b"---\nconfigs: [\n---\n")
    assert "README.md begins with broken YAML" in error(tmp_path / "y")
    write(tmp_path / "z", "data/train-00000-of-00001.jsonl.bz2")
    assert "jsonl.bz2 is of no supported type" in error(tmp_path / "z")


# A hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as finding files needs. repos: by id, of each commit the files; the newest is `main`."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, dict[str, bytes]]]
    gated: set[str]
    failing: dict[str, int]  # how often to answer 503 to paths that contain the key
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self, body: bool = True) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        for part, times in self.failing.items():
            if part in path and times > 0:
                self.failing[part] -= 1
                return self.answer(503)
        if path.startswith("/cdn/"):
            _, _, owner, name, commit, file = path.split("/", 5)
            return self.answer(200, self.repos[f"{owner}/{name}"][commit][file], body)
        _, *kind, owner, name, action, rest = f"{path.removeprefix('/api')}////".split("/", 5)
        repo = f"{owner}/{name}"
        if repo not in self.repos:
            return self.answer(404, error="RepoNotFound")
        if action in ("auth-check", "resolve") and repo in self.gated and not self.headers.get("Authorization"):
            return self.answer(401, error="GatedRepo")
        commits = self.repos[repo]
        revision, _, inside = rest.rstrip("/").partition("/")
        commit = list(commits)[-1] if revision in ("", "main") else revision
        if commit not in commits:
            return self.answer(404, error="RevisionNotFound")
        files = commits[commit]
        if action == "resolve":
            if inside not in files:
                return self.answer(404, error="EntryNotFound")
            digest = hashlib.sha256(files[inside]).hexdigest()
            location = {
                "Location": f"http://localhost:{self.server.server_port}/cdn/{repo}/{commit}/{inside}",
                "X-Linked-Size": str(len(files[inside])),
            }
            return self.answer(302, b"", body, **location, **{"X-Repo-Commit": commit, "X-Linked-ETag": f'"{digest}"'})
        if action in ("tree", "paths-info"):
            folders = {str(parent) for file in files for parent in Path(file).parents} - {"."}
            tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
            tree += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders]
            return self.json([entry for entry in tree if entry["path"].startswith(inside)])
        return self.json({"id": repo, "sha": commit, "siblings": [{"rfilename": file} for file in files]})

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode())

    def answer(self, code: int, content: bytes = b"", body: bool = True, error: str = "", **headers: str) -> None:
        self.send_response(code)
        headers |= {"X-Error-Code": error} if error else {}
        headers |= {"Content-Length": str(len(content)), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


OLD, NEW = "a" * 40, "b" * 40
README = b"""---
configs:
- {config_name: one, data_files: data/*.json.gz}
- {config_name: two, data_files: [{split: train, path: "t/*.tar"}]}
---
"""


@contextlib.contextmanager
def hub(**state):
    files = {"README.md": README, "data/0.json.gz": gzip.compress(ROW), "t/0.tar": b"", "t/1.tar": b"", "x/y.png": b""}
    newer = files | {"data/0.json.gz": gzip.compress(ROW * 2), "data/1.json.gz": gzip.compress(ROW)}
    repos = {name: {OLD: files, NEW: newer} for name in ("org/tiny", "org/gated")}
    fields = {"repos": repos, "gated": {"org/gated"}, "failing": {}, "asked": []} | state
    handler = type("ThisHub", (Hub,), fields)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


SCRIPT = """
import json, sys
from dataclasses import asdict
from data_pipelines.config import DataError, SourceConfig
from data_pipelines.finding import find
answers = []
for source, pinned, patience in json.loads(sys.argv[1]):
    try:
        found = find(SourceConfig(**source), pinned, patience)
        answers.append({"shards": [asdict(s) for s in found.shards], "revision": found.revision})
    except DataError as error:
        answers.append({"error": str(error), "type": type(error).__name__})
print(json.dumps(answers))
"""


def ask(url: str, tmp_path: Path, *questions: dict, **environment: str) -> tuple[list[dict], str]:
    """Answers to (keys of a source, and `pinned` and `patience`), and what was logged; the hub's client reads where the
    hub is when it is imported, so in a process of its own."""
    asked = [
        ({k: v for k, v in q.items() if k not in ("pinned", "patience")}, q.get("pinned"), q.get("patience", 0))
        for q in questions
    ]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked)],
        env=inherited | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf")} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert not any("\n" in answer.get("error", "") for answer in answers)
    return answers, run.stderr


def test_a_hub_dataset_at_its_pinned_commit(tmp_path):
    tiny = {"reference": "org/tiny", "config": "one"}
    with hub() as (url, state):
        (newest, old, pinned, pattern, tars), _ = ask(
            url,
            tmp_path,
            tiny,
            tiny | {"revision": OLD},
            tiny | {"revision": "main", "pinned": OLD},
            {"reference": f"hf://datasets/org/tiny@{OLD}/{{t,data}}/*"},
            {"reference": "hf://datasets/org/tiny", "config": "two"},
        )
        assert newest["revision"] == NEW
        assert [shard["name"] for shard in newest["shards"]] == ["data/0.json.gz", "data/1.json.gz"]
        assert old == pinned
        assert pinned["revision"] == OLD
        place = f"{url}/datasets/org/tiny/resolve/{OLD}/data/0.json.gz"
        shard = {"name": "data/0.json.gz", "place": place, "format": "jsonl", "compression": "gz", "on_hub": True}
        assert pinned["shards"] == [shard]
        fetched = {path.partition("/resolve/")[2][41:] for path in state.asked if "/resolve/" in path}
        assert fetched == {"README.md", ".huggingface.yaml", "dataset_infos.json", "tiny.py"}  # no data
        with urlopen(place) as file:
            assert gzip.decompress(file.read()) == ROW
        assert [shard["name"] for shard in pattern["shards"]] == ["t/0.tar", "t/1.tar", "data/0.json.gz"]
        assert pattern["shards"][2] == shard
        assert [(shard["name"], shard["format"]) for shard in tars["shards"]] == [
            ("t/0.tar", "tar"),
            ("t/1.tar", "tar"),
        ]


def test_what_the_hub_refuses(tmp_path):
    with hub() as (url, _):
        gated = {"reference": "org/gated", "config": "one"}
        questions = {
            "several configurations; set data.config to one of one, two": {"reference": "org/tiny"},
            "no split 'x'; set data.split to one of train": {"reference": "org/tiny", "config": "one", "split": "x"},
            "no revision 'gone'; set data.revision": {"reference": "org/tiny", "revision": "gone"},
            "no hub dataset 'org/absent' that you have access to; check the name, or log in": {
                "reference": "org/absent"
            },
            f"is gated; accept its terms at {url}/datasets/org/gated, and log in with `hf auth login`": gated,
            "hub dataset org/gated is gated": {"reference": "hf://datasets/org/gated/data/*"},
            "matches no file of a supported type": {"reference": "hf://datasets/org/tiny/*.png"},
        }
        answers, _ = ask(url, tmp_path, *questions.values())
        for part, answer in zip(questions, answers, strict=True):
            assert part in answer["error"]
            assert answer["type"] == "DataError"
        (found,), _ = ask(url, tmp_path, gated, HF_TOKEN="hf_mine")
        assert found["revision"] == NEW
        (offline,), _ = ask(url, tmp_path, gated, HF_HUB_OFFLINE="1")
        assert "while HF_HUB_OFFLINE is set; unset it" in offline["error"]
        assert offline["type"] == "DataUnreachable"


def test_a_hub_that_does_not_answer_is_waited_for(tmp_path):
    tiny = {"reference": "org/tiny", "config": "one", "revision": "main"}
    with hub(failing=dict.fromkeys(["/tiny/revision", "/README.md", "/tree/"], 1)) as (url, state):
        (found,), log = ask(url, tmp_path, tiny | {"patience": 30})
        assert len(found["shards"]) == 2
        assert set(state.failing.values()) == {0}
        assert re.search(rf"waiting for hub dataset org/tiny at {url} since \d\d:\d\d:\d\d \(.*503", log)
        state.failing["/api"] = 10**6
        (unreachable,), _ = ask(url, tmp_path, tiny | {"patience": 1})
    assert unreachable["type"] == "DataUnreachable"
    assert f"org/tiny cannot be reached at {url}" in unreachable["error"]
