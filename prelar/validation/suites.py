"""Great Expectations over a store and its index, with results in words.

A `Suite` is a table with checks on it; each `Check` is one expectation and the sentence it stands for.
`validate` runs suites, writes a page that loads nothing from elsewhere and a summary for the report, and
raises `UserError` with the failed sentences. Stores of other sources add suites of their own.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.compute as pc
import zarr

from prelar.store.store import Store
from prelar.utils import files
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME
from prelar.utils.tables import evenly_spaced_indices

REPORTS = Path("reports/validation")
LONG = 25
SAMPLED = 256
BLACK = 2.0
CONSTANT = 1.0
DULL = 0.05
LOOKED_AT, STIR, REPEATED = 64, 0.25, 0.3
"""Frames of a clip that are looked at for repeated pictures; from which mean change on (grey levels) and
below which share of it they count as such: of AV1 that does it 0 to 0.21 was seen, of others 0.43 or more."""


@dataclasses.dataclass(frozen=True)
class Check:
    """An expectation, the class `kind` of Great Expectations with `arguments`, and what it `says`."""

    says: str
    kind: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Suite:
    """Checks on the rows of one table."""

    name: str
    about: str
    table: pd.DataFrame
    checks: tuple[Check, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one check; `detail` tells what was found where it failed."""

    says: str
    success: bool
    detail: str


# --- Checks in short ----------------------------------------------------------------------------------------


def each_between(says: str, column: str, low: float | None = None, high: float | None = None) -> Check:
    """Every value of a column lies in [low, high]."""
    return Check(
        says, "ExpectColumnValuesToBeBetween", {"column": column, "min_value": low, "max_value": high}
    )


def mostly_between(says: str, column: str, low: float, share: float) -> Check:
    """At least `share` of a column's values are `low` or more."""
    return Check(says, "ExpectColumnValuesToBeBetween", {"column": column, "min_value": low, "mostly": share})


def each_in(says: str, column: str, values: Collection[Any], share: float = 1.0) -> Check:
    """At least `share` of a column's values, missing ones left out, are among `values`."""
    return Check(
        says, "ExpectColumnValuesToBeInSet", {"column": column, "value_set": list(values), "mostly": share}
    )


def each_given(says: str, column: str) -> Check:
    """No value of a column is missing."""
    return Check(says, "ExpectColumnValuesToNotBeNull", {"column": column})


def each_unique(says: str, column: str) -> Check:
    """No value of a column comes twice."""
    return Check(says, "ExpectColumnValuesToBeUnique", {"column": column})


# --- Suites for every store ---------------------------------------------------------------------------------


def store_suites(
    store: Store, *, min_frames: int, max_bad: float | None, width: int | None = None
) -> list[Suite]:
    """The suites that any store must pass; `width` is that of its actions, if it has any.

    `max_bad` is the share of bad clips that it may have; None where that was seen to before.
    """
    return [
        _index_suite(store, max_bad),
        _clips_suite(store, min_frames),
        _facts_suite(store, width),
        _frames_suite(store),
    ]


def _index_suite(store: Store, max_bad: float | None) -> Suite:
    table = store.index.select(["id", "status", "reason"]).to_pandas()
    bounded = []
    if max_bad is not None:
        says = f"at most {max_bad:.2%} of the clips are bad"
        bounded.append(each_in(says, "status", ("ok",), 1 - max_bad))
    return Suite(
        "index",
        "Every clip that the source or its labels name",
        table,
        (
            each_given("every clip has an id", "id"),
            each_unique("no id comes twice", "id"),
            each_in("every clip is ok or bad", "status", ("ok", "bad")),
            *bounded,
        ),
    )


def _clips_suite(store: Store, min_frames: int) -> Suite:
    columns = ["id", "split", "frames", "start", "width", "height", "fps", "sha256"]
    table = store.clip_index.select(columns).to_pandas()
    table["start_difference"] = table["start"].to_numpy() - store.clip_start
    table["frames_difference"] = table["frames"].to_numpy() - store.clip_length
    return Suite(
        "clips",
        "The clips in the store",
        table,
        (
            each_in(
                "every clip's split is train, validation or test", "split", ("train", "validation", "test")
            ),
            each_given("every clip has a split", "split"),
            each_between(f"every clip has at least {min_frames} frames", "frames", min_frames),
            each_between("index and store agree where clips start", "start_difference", 0, 0),
            each_between("index and store agree how long clips are", "frames_difference", 0, 0),
        ),
    )


def _facts_suite(store: Store, width: int | None) -> Suite:
    """One row of facts about the arrays."""
    shapes = store.shapes()
    lengths = store.clip_length
    pairs = store.pairs
    expected = {
        "frames": ("uint8", (int(lengths.sum()), *FRAME)),
        "clip_start": ("int64", (len(lengths),)),
        "clip_length": ("int64", (len(lengths),)),
        "pairs": ("int64", (int((lengths - 1).sum()),)),
    }
    if width is not None:
        expected["actions"] = ("float32", (int(lengths.sum()), width))
    facts: dict[str, Any] = {"clips": len(lengths)}
    checks = [each_between("there is at least one clip", "clips", 1)]
    for name, wanted in expected.items():
        facts[name] = str(shapes.get(name))
        checks.append(each_in(f"{name} is {wanted[0]} {list(wanted[1])}", name, (str(wanted),)))
    starts = np.cumsum(lengths) - lengths
    facts["misplaced_clips"] = int((starts != store.clip_start).sum())
    facts["stray_pairs"] = stray_pairs(pairs, store.clip_start, lengths)
    facts["repeated_pairs"] = int((np.diff(pairs) <= 0).sum())
    checks += [
        each_between("clips lie one after the other without gaps", "misplaced_clips", 0, 0),
        each_between("no pair crosses the border of a clip", "stray_pairs", 0, 0),
        each_between("no pair comes twice", "repeated_pairs", 0, 0),
    ]
    return Suite("store", "Shapes, types and pairs of the arrays", pd.DataFrame([facts]), tuple(checks))


def stray_pairs(
    pairs: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    block: int = 1 << 20,
) -> int:
    """How many of the pairs (t, t+1) do not lie within one clip."""
    if not len(starts):
        return len(pairs)
    stray = 0
    for begin in range(0, len(pairs), block):
        some = pairs[begin : begin + block]
        clip = np.searchsorted(starts, some, side="right") - 1
        stray += int(((clip < 0) | (some + 1 >= starts[clip] + lengths[clip])).sum())
    return stray


def _frames_suite(store: Store) -> Suite:
    """Brightness and contrast of frames spread evenly over the store, read by us and by zarr-python."""
    numbers = evenly_spaced_indices(store.num_frames, SAMPLED)
    pixels = [store.read(int(number), 1)[0] for number in numbers]
    others = _by_zarr(store)
    table = pd.DataFrame(
        {
            "frame": numbers,
            "brightness": np.array([frame.mean() for frame in pixels]),
            "contrast": np.array([frame.std() for frame in pixels]),
            "differing": [
                int((frame != others(int(number))).sum())
                for number, frame in zip(numbers, pixels, strict=True)
            ],
        }
    )
    share = 1 - DULL
    return Suite(
        "frames",
        f"{len(numbers)} frames spread over the store",
        table,
        (
            mostly_between(f"at least {share:.0%} of the frames are not black", "brightness", BLACK, share),
            mostly_between(
                f"at least {share:.0%} of the frames are not constant", "contrast", CONSTANT, share
            ),
            each_between("zarr-python reads the same frames", "differing", 0, 0),
        ),
    )


def _by_zarr(store: Store) -> Callable[[int], Any]:
    """What reads a frame by its number with zarr-python; of a joined store it reads that of a member."""
    if not store.members:
        frames: Any = zarr.open_group(store.path, mode="r")["frames"]
        return lambda number: frames[number]
    readers = [_by_zarr(member.store) for member in store.members]
    ends = list(itertools.accumulate(member.store.num_frames for member in store.members))
    begins = [0, *ends]

    def read(number: int) -> Any:
        part = bisect.bisect_right(ends, number)
        return readers[part](number - begins[part])

    return read


def members_suite(store: Store) -> Suite:
    """The stores that a joined store reads as one: of a union each was made in the same way."""
    rows = []
    for member in store.members:
        own = ("index_sha256", "source", "members", "share")
        made = {key: value for key, value in member.store.attrs.items() if key not in own}
        name = member.store.attrs.get("source", {}).get("name")
        made["source"] = name
        rows.append({"member": member.name, "clips": member.store.num_clips, "made": json.dumps(made)})
    table = pd.DataFrame(rows)
    checks = [each_between("each of the stores has a clip", "clips", 1)]
    if store.members[0].weight is None:
        same = "the stores were made alike: their attributes, source and index apart, are the same"
        checks.append(each_in(same, "made", (rows[0]["made"],)))
    return Suite("members", "The stores that are read as one", table, tuple(checks))


def labels_suite(store: Store, splits: dict[str, str], names: dict[str, int]) -> Suite:
    """The index against labels files: `splits` maps id to split, `names` label to label id."""
    index = store.index.select(["id", "split", "label", "label_id", "status"]).to_pandas()
    held = dict(zip(index["id"], index["split"], strict=True))
    facts: dict[str, Any] = {}
    checks = []
    for split in ("train", "validation", "test"):
        wanted = [identity for identity, named in splits.items() if named == split]
        facts[f"missing_{split}"] = sum(held.get(identity) != split for identity in wanted)
        says = f"all {len(wanted)} clips of {split} are in the index"
        checks.append(each_between(says, f"missing_{split}", 0, 0))
    good = index[index["status"] == "ok"]
    named = good["label"].map(names)
    facts["unnamed"] = int((~good["id"].isin(list(splits))).sum())
    facts["unlabelled"] = int((good["label"].isna() & (good["split"] != "test")).sum())
    facts["wrong_label"] = int((good["label"].notna() & (named != good["label_id"])).sum())
    checks += [
        each_between("every clip is named by the labels files", "unnamed", 0, 0),
        each_between("every clip of train and validation has a label", "unlabelled", 0, 0),
        each_between(
            f"every label is one of the {len(names)} of labels.json, with its id", "wrong_label", 0, 0
        ),
    ]
    return Suite("labels", "Splits and labels against the labels files", pd.DataFrame([facts]), tuple(checks))


def facts(store: Store) -> dict[str, Any]:
    """Counts for the report: clips by status and reason, frames, pairs, clips of `LONG` frames or more."""
    reasons = Counter(store.index.filter(pc.equal(store.index["status"], "bad"))["reason"].to_pylist())
    long = int((store.clip_length >= LONG).sum())
    return {
        "clips": store.num_clips,
        "bad": store.index.num_rows - store.num_clips,
        "frames": store.num_frames,
        "pairs": len(store.pairs),
        f"clips_of_{LONG}": long,
        f"share_of_{LONG}": round(long / store.num_clips, 4) if store.num_clips else 0.0,
        "splits": dict(sorted(Counter(store.clip_index["split"].to_pylist()).items())),
        "reasons": dict(reasons.most_common(10)),
        **({"repeats": repeats} if (repeats := repeated_pictures(store)) else {}),
    }


def repeated_pictures(store: Store) -> str | None:
    """In how many clips every second picture repeats the one before, and what avoids it; None: in none."""
    clips = evenly_spaced_indices(store.num_clips, SAMPLED)
    ends = store.clip_start[clips] + store.clip_length[clips]
    clips = clips[(store.clip_start[clips] >= 0) & (ends <= store.num_frames)]
    spans = [(int(store.clip_start[n]), int(min(store.clip_length[n], LOOKED_AT))) for n in clips]
    found = np.array([repeats(store.read(start, length)) for start, length in spans], dtype=bool)
    if not found.any():
        return None
    rates = [rate for rate in store.clip_index["fps"].take(clips[found]).to_pylist() if rate]
    gap = f"of {2 / min(rates):.3g} or more" if rates else "of two frames (set their rate)"
    return (
        f"every second picture repeats the one before in {int(found.sum())} of {len(clips)} clips looked at, "
        f"as in lerobot's AV1, so that half the pairs show no motion; a frame_gap {gap} avoids it"
    )


def repeats(frames: npt.NDArray[np.uint8]) -> bool:
    """Whether every second of the pictures (T, H, W, 3) is nearly the one before, while the others are not.

    Codecs that spoil the picture after a key frame, with a key frame every second picture, do that.
    """
    changes = np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in itertools.pairwise(frames)])
    if len(changes) < 6:
        return False
    quiet, loud = sorted((changes[0::2].mean(), changes[1::2].mean()))
    return bool(loud > STIR and quiet < REPEATED * loud)


# --- Running ------------------------------------------------------------------------------------------------


def validate(
    name: str, suites: Sequence[Suite], counted: dict[str, Any], folder: Path = REPORTS
) -> dict[str, Any]:
    """Run the suites, write `<folder>/<name>/index.html` and `summary.json`, and return the summary.

    `counted` are facts to show beside the outcomes. Raises `UserError` with the reasons where a check fails.
    """
    outcomes = {suite.name: _run(suite) for suite in suites}
    failed = [
        (suite, outcome) for suite, found in outcomes.items() for outcome in found if not outcome.success
    ]
    summary = {
        "name": name,
        "success": not failed,
        "facts": counted,
        "suites": [
            {
                "name": suite.name,
                "about": suite.about,
                "rows": len(suite.table),
                "checks": [dataclasses.asdict(outcome) for outcome in outcomes[suite.name]],
            }
            for suite in suites
        ],
    }
    target = folder / name
    files.write_text(target / "summary.json", json.dumps(summary, indent=2))
    files.write_text(target / "index.html", _page(summary))
    if failed:
        reasons = "; ".join(f"{outcome.says} - {outcome.detail}" for _, outcome in failed)
        if counted.get("bad") and counted.get("reasons"):
            listed = ", ".join(
                f"{count} × {reason}" for reason, count in list(counted["reasons"].items())[:3]
            )
            reasons += f" (bad clips: {listed})"
        raise UserError(f"{name}: not valid: {reasons}; see {target / 'index.html'}")
    return summary


def as_markdown(summary: dict[str, Any]) -> str:
    """A summary as `validate` returns it, as a page of Markdown tables: the facts, and every check."""
    verdict = "passed" if summary["success"] else "failed"
    lines = [f"# {summary['name']}: validation {verdict}", "", "| fact | value |", "|---|---|"]
    for key, value in summary["facts"].items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"| {key.replace('_', ' ')} | {_cell(shown)} |")
    for suite in summary["suites"]:
        about = f"{suite['about']}; rows: {suite['rows']}"
        lines += ["", f"## {suite['name']}", "", about, "", "| result | check | found |", "|---|---|---|"]
        for check in suite["checks"]:
            result = "passed" if check["success"] else "**failed**"
            lines.append(f"| {result} | {_cell(check['says'])} | {_cell(check['detail'])} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _run(suite: Suite) -> list[Outcome]:
    """Great Expectations' verdict on each check of a suite, in the order of the checks."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("tables").add_dataframe_asset(suite.name)
    definition = gx.ValidationDefinition(
        name=suite.name,
        data=asset.add_batch_definition_whole_dataframe("whole"),
        suite=context.suites.add(
            gx.ExpectationSuite(
                name=suite.name,
                expectations=[
                    getattr(gx.expectations, check.kind)(**check.arguments, meta={"number": number})
                    for number, check in enumerate(suite.checks)
                ],
            )
        ),
    )
    answer = context.validation_definitions.add(definition).run(batch_parameters={"dataframe": suite.table})
    by_number = {
        result.expectation_config.meta["number"]: result
        for result in answer.results
        if result.expectation_config is not None
    }
    return [
        Outcome(check.says, bool(by_number[number].success), _detail(by_number[number]))
        for number, check in enumerate(suite.checks)
    ]


def _detail(result: Any) -> str:
    """What was found where a check failed, in words."""
    if result.success:
        return ""
    raised = result.exception_info.get("exception_message") if result.exception_info else None
    if raised:
        return f"could not be checked: {raised}"
    found = result.result
    examples = list(dict.fromkeys(str(value) for value in found.get("partial_unexpected_list", [])))[:3]
    count, rows = found.get("unexpected_count"), found.get("element_count")
    if rows == 1 and examples:
        return f"found {examples[0]}"
    return f"{count} of {rows} rows are not so" + (f", such as {', '.join(examples)}" if examples else "")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Validation of {{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 2rem }
td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
.ok { color: #17692b } .no { color: #a61b1b; font-weight: 600 }
</style></head><body><main>
<h1>Validation of {{ name }}: <span class="{{ 'ok' if success else 'no' }}">
{{- 'passed' if success else 'failed' }}</span></h1>
<table>{% for key, value in facts.items() %}<tr><th>{{ key | replace('_', ' ') }}</th><td>
{%- if value is mapping %}{% for k, v in value.items() %}{{ k }}: {{ v }}<br>{% else %}none{% endfor %}
{%- else %}{{ value }}{% endif %}</td></tr>{% endfor %}</table>
{% for suite in suites %}<h2>{{ suite.name }}</h2><p>{{ suite.about }}; {{ suite.rows }} row
{{- '' if suite.rows == 1 else 's' }}.</p>
<table>{% for check in suite.checks %}<tr><td class="{{ 'ok' if check.success else 'no' }}">
{{- 'passed' if check.success else 'failed' }}</td><td>{{ check.says }}</td><td>{{ check.detail }}</td></tr>
{% endfor %}</table>{% endfor %}
<p>Checked with Great Expectations.</p></main></body></html>
"""


def _page(summary: dict[str, Any]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(summary)
