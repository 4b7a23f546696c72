"""Runs a study, or goes on with it, and shows what it found where readers look:

    python -m benchmarks.publish studies/lab.yaml            # writes studies/results/lab/ and the table in README.md
    python -m benchmarks.publish studies/lab.yaml --check    # compares with what is there, and writes nothing there

Records of finished runs are kept in studies/results/lab/runs/ as they come: committed, they count as finished wherever
the command is repeated. Further arguments are those of `forethought study`, like --minutes 100. README's table stands
between <!-- lab --> and <!-- end of lab -->; a study without such a place has none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from pretrain import cli
from pretrain.study.results import arms, missing_runs

ROOT = Path(__file__).parents[1]


def around_table(readme: str, name: str) -> tuple[str, str] | None:
    """What stands before and after a study's table, markers included; None if it has no place. Raises ValueError if it
    has half of one."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, begins, rest = readme.partition(begin)
    _, ends, after = rest.partition(end)
    if begins and ends:
        return before + begin, end + after
    if begins or end in readme:
        raise ValueError(f"README.md: put {begin.strip()} and {end}, in this order, on lines of their own")
    return None


def with_table(readme: str, name: str, found: Mapping[str, Any]) -> str:
    """README with the table of a study in its place, if it has one. Raises ValueError if that has no end."""
    place = around_table(readme, name)
    if place is None:
        return readme
    before, after = place
    said = f"What it found ([with comparisons](studies/results/{name}/results.md)):"
    parts = [said, *missing_runs(found), arms(found, short=True).to_markdown()]
    return "\n".join([before, *(f"{part}\n" for part in parts)]) + after


def disagreements(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where an arm's intervals over seeds have nothing in common, of the arms and metrics that both results have, on
    the study's own documents and on those of its shifts."""
    found = _apart(old["arms"], new["arms"], "")
    shifts = [of.get("elsewhere", {}) for of in (old, new)]
    for name in sorted(shifts[0].keys() & shifts[1].keys()):
        found += _apart(shifts[0][name]["arms"], shifts[1][name]["arms"], f", on {name}")
    return found


def _apart(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> list[str]:
    found = []
    for arm in sorted(old.keys() & new.keys()):
        metrics = [name for name in old[arm] if all("low" in (of[arm].get(name) or {}) for of in (old, new))]
        for metric in metrics:
            a, b = old[arm][metric], new[arm][metric]
            # Of one seed there is no interval.
            if None not in (a["low"], b["low"]) and (a["high"] < b["low"] or b["high"] < a["low"]):
                shown = (f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in (a, b))
                found.append(f"{arm}{where}, {metric}: {', now '.join(shown)}")
    return found


def publish(study: str, run_dir: str, check: bool = False, options: Sequence[str] = (), root: Path = ROOT) -> int:
    """Runs a study and writes what it found below `root`, or compares it; returns the exit code. Raises ValueError for
    a study without anything to compare with, or whose place in README has no end.

    options: of `forethought study`.
    """
    name, readme = Path(study).stem, root / "README.md"
    kept = root / "studies" / "results" / name
    around_table(readme.read_text(encoding="utf-8"), name)  # ahead of what takes an hour
    if check and not (kept / "results.json").exists():
        raise ValueError(f"there is no {kept / 'results.json'} to compare with; leave --check out")
    if not check:
        options = [*options, "--keep", str(kept / "runs")]
    if code := cli.main(["study", study, "--run-dir", run_dir, *options]):
        return code
    found = json.loads((Path(run_dir) / "results.json").read_text(encoding="utf-8"))
    if check:
        different = disagreements(json.loads((kept / "results.json").read_text(encoding="utf-8")), found)
        print("\n".join(["differs from what is committed:", *different] if different else ["agrees with it"]))
        return int(bool(different))
    kept.mkdir(parents=True, exist_ok=True)
    with_environment = {"environment": environment(), **found}
    (kept / "results.json").write_text(json.dumps(with_environment, indent=1) + "\n", encoding="utf-8")
    (kept / "results.md").write_text((Path(run_dir) / "results.md").read_text(encoding="utf-8"), encoding="utf-8")
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), name, found), encoding="utf-8")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="YAML file")
    parser.add_argument("--run-dir", help="default: runs/<name of the study>")
    parser.add_argument("--check", action="store_true", help="compare with what was found before, and write nothing")
    given, options = parser.parse_known_args()
    try:
        sys.exit(publish(given.study, given.run_dir or f"runs/{Path(given.study).stem}", given.check, options))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
