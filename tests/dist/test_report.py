"""The report of a real run that was started three times: each figure is traced to the records, and a real browser shows
it.
"""

import gzip
import json
import math
import re
from collections import Counter, defaultdict
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher.report.figures import read_figures
from launcher.report.page import run_page
from launcher.report.report import write_report
from tests.browser import chromium, look_at
from tests.dist import runs
from tests.dist.launch import launch, running
from tests.material import Workshop, make_data
from trainer.config import dump_config
from trainer.run import layout
from trainer.store.store import Store

pytestmark = pytest.mark.long

NOW = 1_900_000_000.0
HOSTILE = '<script>alert("&")</script><img src=http://192.0.2.1/x>'


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Store:
    """Ten steps of a mixture: a loss that is no number ends the first start, SIGKILL the second, the third one
    finishes.
    """
    mixture = Workshop(workshop.folder / "mixture", "mixtral")
    held_out = make_data(mixture.folder / "held_out.jsonl", documents=8, seed=9)
    settings = (
        f"data.eval=[{{path: '{held_out}'}}]",
        "eval.every=5",
        "track.price_per_gpu_hour=2.5",
        "train.profile=[3,3]",
    )
    config = mixture.config("story", *settings)
    folder, datasets = mixture.store.sub("story"), mixture.prepare(config)
    arguments = dump_config(config), datasets.train
    assert launch(1, runs.run, *arguments, "poison", datasets.eval)[0]["outcome"] == "NonFiniteLoss"
    with running(1, runs.run, *arguments, "hold", datasets.eval) as ranks:
        ranks.wait_until(lambda: any(record["kind"] == "start" for record in lines(folder, layout.metrics(2))))
        ranks.kill()
    assert launch(1, runs.run, *arguments, "start", datasets.eval)[0]["outcome"] == "finished"
    folder.put(layout.CONFIG, dump_config(config).encode())
    both = {"base": {"loss": 5.5, "perplexity": math.exp(5.5)}, "adapter": {"loss": 5.25, "perplexity": math.exp(5.25)}}
    results = {
        "sets": {HOSTILE: {"tokens": 1234, **both, "difference": -0.25, "interval": [-0.31, -0.19]}},
        "tasks": {"local_task": {"acc,none": {"base": 0.25, "adapter": 0.5, "base_stderr": 0.0625, "stderr": 0.125}}},
        "bias": {"words": {"pairs": 8, "base": {"mean": 0.5, "std": 0.75}, "adapter": {"mean": -0.5, "std": 0.625}}},
    }
    folder.put(layout.evaluation(10), json.dumps({"step": 10, "made": NOW, **results}).encode())
    samples = [{"prompt": HOSTILE, "base": "one", "adapter": HOSTILE}, {"prompt": "two", "adapter": "three"}]
    folder.put(layout.samples(10), "\n".join(map(json.dumps, samples)).encode())
    return folder


def lines(folder: Store, key: str) -> list[dict[str, Any]]:
    """The records of a stream that is one object."""
    return [json.loads(line) for line in folder.get(key).splitlines()] if folder.exists(key) else []


class MarkedFigures(HTMLParser):
    """The `figures` of a page by the path that they are marked with, as (value, shown), and the `words` beside them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, tuple[str, str]] = {}
        self.words = ""
        self.tags: list[str] = []
        self.titles: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "img", "wbr"):
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if tags and tags[-1] == "data":
            attributes = self._open[-1][1]
            self.figures[str(attributes["data-of"])] = str(attributes["value"]), data
        elif tags and tags[-1] == "title" and "circle" in tags:
            self.titles.append(data)
        elif not {"svg", "style", "head"} & set(tags):
            self.words += data


def expected(folder: Store) -> dict[str, float]:
    """Each figure of the page, worked out from the objects in the folder, without any code that made the page."""
    streams = [lines(folder, layout.metrics(number)) for number in (1, 2, 3)]
    steps = {record["step"]: record for records in streams for record in records if record["kind"] == "step"}
    taken = [record for records in streams for record in records if record["kind"] == "step"]
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in (record for records in streams for record in records):
        kinds[record["kind"]].append(record)
    manifest = json.loads(folder.get(layout.manifest(10)))["body"]
    seconds = sum(record["seconds"] for record in steps.values())
    again = sum(record["seconds"] for record in taken) - seconds
    lasted = [
        max(record["clock"] for record in records if "clock" in record) - (start["clock"] - start["start_seconds"])
        for records, start in zip(streams, kinds["start"], strict=True)
    ]
    evals = sorted(kinds["eval"], key=lambda record: record["step"])
    tokens = sum(record["tokens"] for record in steps.values())
    plan = kinds["plan"][-1]
    found: dict[str, float] = {
        "made": NOW,
        "trained/trainable": sum(math.prod(shape) for shape in manifest["shapes"].values()),
        "trained/total": plan["parameters"]["total"],
        "trained/global_batch": 4,
        "trained/sequence_length": 64,
        "progress/step": 10,
        "progress/total_steps": 10,
        "progress/loss_first": steps[1]["loss"],
        "progress/loss_last": steps[10]["loss"],
        "progress/tokens": tokens,
        "progress/tokens_per_second": tokens / seconds,
        "held_out/loss//0/1": evals[0]["loss"],
        f"held_out/loss//{len(evals) - 1}/1": evals[-1]["loss"],
        "cost/hours": sum(lasted) / 3600,
        "cost/lost_hours": again / 3600,
        "skipped_steps/0": 6,
    }
    for at, (records, start, took) in enumerate(zip(streams, kinds["start"], lasted, strict=True)):
        mine = [record["step"] for record in records if record["kind"] == "step"]
        found |= {f"starts/{at}/number": at + 1, f"starts/{at}/began": start["time"] - start["start_seconds"]}
        found |= {f"starts/{at}/step": start["step"], f"starts/{at}/world_size": 1, f"starts/{at}/lasted": took}
        found |= {f"starts/{at}/lost_steps": len([step for step in mine if at == 0 and step > 5])}
        if mine:
            found[f"starts/{at}/last_step"] = max(mine)
    phases = [f"{phase}_seconds" for phase in ("forward", "backward", "reduce", "optimizer", "data", "exchange")]
    within = [sum(record[phase] for record in steps.values()) for phase in phases]
    parts = [
        sum(start[f"{part}_seconds"] for start in kinds["start"]) for part in ("launch", "meet", "load", "restore")
    ]
    parts += [seconds - sum(within), *within, again, sum(record["stall_seconds"] for record in kinds["commit"])]
    parts.append(sum(record.get("evaluate_seconds", 0) for record in steps.values()))
    parts.append(sum(lasted) - sum(parts))
    for at, part in enumerate(part for part in parts if part > 0):
        found |= {f"time/{at}/seconds": part, f"time/{at}/share": part / sum(lasted)}
    for at, name in enumerate(("memory_per_gpu", "memory_per_host")):
        found[f"memory/{at}/planned"] = plan[name]["total"]
        sizes = {part: size for part, size in plan[name].items() if part != "total" and size}
        found |= {f"memory/{at}/planned_parts/{part}": size for part, size in sizes.items()}
    found["memory/2/measured"] = max(record["host_peak_bytes"] for record in steps.values())
    by_training = [record for record in kinds["experts"] if record["of"] == "train"]
    for at, shares in enumerate(by_training[-1]["shares"].values()):
        mean = sum(shares) / len(shares)
        found |= {f"experts/{at}/experts": len(shares), f"experts/{at}/unused": shares.count(0)}
        found |= {f"experts/{at}/busiest": max(shares) / mean, f"experts/{at}/least": min(shares) / mean}
    for at, step in enumerate((10, 6, 5)):  # the newest that are kept
        body = json.loads(folder.get(layout.manifest(step)))["body"]
        found |= {f"checkpoints/{at}/{name}": body[name] for name in ("step", "world_size", "generation")}
        found |= {f"checkpoints/{at}/bytes": sum(shard["size"] for shard in body["shards"])}
        found |= {f"checkpoints/{at}/shards": len(body["shards"])}
        if body["eval_loss"] is not None:
            found[f"checkpoints/{at}/eval_loss"] = body["eval_loss"]
    store = Path(folder.uri.removeprefix("file://")).parent
    for at, fingerprint in enumerate(kinds["start"][-1]["data"].values()):
        compiled = json.loads((store / "data" / fingerprint / "manifest.json").read_text())
        counts = ("documents", "tokens", "targets")
        found |= {f"data/{at}/sources/0/{name}": compiled["sources"][0][name] for name in counts}
        names = {"rows read": "rows", "bad rows, left out": "bad_rows", "too long or too short, left out": "dropped"}
        names |= {"too long, cut": "truncated", "too long, split": "split", "nothing to train on": "without_targets"}
        found |= {f"data/{at}/counts/{shown}": compiled["counters"][name] for shown, name in names.items()}
    return found | expected_results(json.loads(folder.get(layout.evaluation(10))))


def expected_results(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation by their paths in it, as the page marks them; and the step of the samples."""
    found: dict[str, float] = {"samples/0/step": 10}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, int | float):
            found[path] = value
        elif isinstance(value, dict | list):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{path}/{name}", inner)

    walk("evaluations/0", {name: value for name, value in results.items() if name != "made"})
    return found


UNITS = {"": 1.0, "%": 0.01, "k": 1e3, "M": 1e6, "G": 1e9, "s": 1, "min": 60, "h": 3600, "d": 86400, "bytes": 1}
UNITS |= {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def shown_number(text: str) -> float:
    """The number that a reader takes from the page."""
    if re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", text):
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    numbers = re.findall(r"([-+]?[\d,]+(?:\.\d+)?(?:e[-+]\d+)?) ?([%A-Za-z]*)", text)
    assert "".join(f"{number}{unit}" for number, unit in numbers) == text.replace(" ", ""), text
    return sum(float(number.replace(",", "")) * UNITS[unit] for number, unit in numbers)


def test_every_figure_on_the_page_is_that_of_the_records(run: Store) -> None:
    page = MarkedFigures(run_page(read_figures(run, lambda: NOW)))
    wanted = expected(run)
    assert page.figures.keys() == wanted.keys()
    assert {of: float(value) for of, (value, _) in page.figures.items()} == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    for of, (value, text) in page.figures.items():
        rounding = (
            60 if of.endswith(("made", "began")) else 6e-4 if "share" in of else 5.1e-3 if "second" in of else 6e-5
        )
        assert shown_number(text) == pytest.approx(float(value), rel=0.06, abs=rounding), of
    # Numbers that are no figure are the words of names, settings, versions and reasons, which the folder has as they
    # are.
    words = page.words
    for text in sorted(_texts_of(run), key=len, reverse=True):
        words = words.replace(text, " ")
    words = re.sub(r"rank 0|4-bit|16 bits|fp32|SHA-256", " ", words)  # names of things, in sentences of the page itself
    assert re.findall(r".{0,30}\d.{0,30}", words) == []


def _texts_of(folder: Store) -> set[str]:
    """The texts in the folder's objects that the page repeats word for word."""
    manifest = json.loads(folder.get(layout.manifest(10)))["body"]
    streams = [lines(folder, layout.metrics(number)) for number in (1, 2, 3)]
    begun = next(record for record in streams[2] if record["kind"] == "start")
    texts = {
        str(value)
        for values in (manifest["adapter"], manifest["versions"], manifest["base"])
        for value in values.values()
    }
    texts |= {record["reason"] for records in streams for record in records if record["kind"] == "end"} - {""}
    for step in (10, 6, 5):
        texts.add(json.loads(folder.get(layout.manifest(step)))["body"]["shards"][0]["sha256"][:16])
    texts |= {layer for record in streams[2] if record["kind"] == "experts" for layer in record["shares"]}
    texts |= {
        *begun["data"].values(),
        folder.uri,
        HOSTILE,
        read_figures(folder).repeat["config"],  # pyright: ignore[reportOptionalSubscript]
    }
    return texts | {str(path) for path in Path(folder.uri.removeprefix("file://")).parents[1].glob("*.jsonl")}


def test_the_phases_of_steps_add_up_to_the_time_that_passes(run: Store) -> None:
    """Within 3 %, of a start's steps but the first; without one of the two passes they would not."""
    steps = [record for record in lines(run, layout.metrics(1)) if record["kind"] == "step"]
    passed = steps[-1]["time"] - steps[0]["time"]
    names = {name for record in steps for name in record if name.endswith("_seconds")}
    assert names >= {"data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "exchange_seconds"}
    assert names >= {"save_seconds", "evaluate_seconds"}
    sums = {name: sum(record.get(name, 0) for record in steps[1:]) for name in names}
    assert sum(sums.values()) == pytest.approx(passed, rel=0.03)
    for name in ("forward_seconds", "backward_seconds"):
        assert sum(sums.values()) - sums[name] != pytest.approx(passed, rel=0.03), name


def test_a_profile_has_what_was_computed_in_its_steps(run: Store) -> None:
    assert [entry.key for entry in run.list(layout.PROFILES)] == [layout.profile(3)]
    events = json.loads(gzip.decompress(run.get(layout.profile(3))))["traceEvents"]
    computed = Counter(event["name"] for event in events)
    assert computed["aten::mm"] > 0
    # One step of four rows, each with a forward and a backward pass.
    assert computed["_FrozenCrossEntropy"] == 4
    assert computed["_FrozenCrossEntropyBackward"] == 4


def test_the_dots_of_the_loss_are_the_steps_that_count(run: Store) -> None:
    text = run_page(read_figures(run))
    streams = [lines(run, layout.metrics(number)) for number in (1, 2, 3)]
    losses = {record["step"]: record["loss"] for records in streams for record in records if record["kind"] == "step"}
    (svg, _) = re.findall(r'<svg[^>]*aria-label="Loss".*?</svg>', text, re.DOTALL)
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>training: (\S+) at (\d+)</title>', svg)
    assert {int(step): float(loss) for _, _, loss, step in dots} == pytest.approx(losses, rel=1e-5)
    # A pixel is a tenth, and both axes are straight lines through the first and the last dot's values.
    for places, values in (
        ([float(dot[0]) for dot in dots], list(losses)),
        ([float(dot[1]) for dot in dots], list(losses.values())),
    ):
        low, high = values.index(min(values)), values.index(max(values))
        slope = (places[high] - places[low]) / (values[high] - values[low])
        for place, value in zip(places, values, strict=True):
            assert place == pytest.approx(places[low] + slope * (value - values[low]), abs=0.2)
    assert re.findall(r"<text[^>]*>(start [\d, ]+)</text>", svg) == ["start 2, 3"]
    assert sorted(map(int, re.findall(r"<title>commit of step (\d+)</title>", svg))) == [1, 5, 6, 10]


def test_a_figure_that_is_not_the_records_would_be_seen(run: Store, workshop: Workshop) -> None:
    """The control of the tests above: another loss, step or time in the records gives another figure."""
    copy = workshop.store.sub("control")
    for entry in run.list():
        copy.put(entry.key, run.get(entry.key))
    key = layout.metrics(3)
    records = lines(copy, key)
    last = next(record for record in reversed(records) if record["kind"] == "step")
    last |= {"loss": last["loss"] + 0.01, "seconds": last["seconds"] + 1}
    copy.put(key, "".join(json.dumps(record) + "\n" for record in records).encode())
    page = MarkedFigures(run_page(read_figures(copy, lambda: NOW)))
    wanted = expected(run)
    differ = {
        of
        for of, (value, _) in page.figures.items()
        if float(value) != pytest.approx(wanted.get(of, math.inf), rel=1e-9, abs=1e-9)
    }
    assert {"progress/loss_last", "progress/tokens_per_second"} <= differ
    assert [of for of in differ if re.fullmatch(r"time/\d+/seconds", of)], "parts that took no time have no number"


def test_hostile_texts_stay_texts(run: Store) -> None:
    page = MarkedFigures(run_page(read_figures(run)))
    assert HOSTILE in page.words
    assert {"script", "img", "iframe", "object"} & set(page.tags) == set()


def test_a_browser_shows_it_at_any_width_in_both_schemes_and_on_paper(run: Store, tmp_path: Path) -> None:
    page = tmp_path / "one.html"
    write_report([run], page)
    broken = tmp_path / "broken.html"
    plot = (
        '<figure><svg class="chart" aria-label="A" style="position:absolute" width="300" height="200"></svg></figure>'
    )
    broken.write_text(
        f'<p style="color:#ccc">pale</p>{plot}{plot.replace("A", "B")}<div style="width:3000px">wide</div>'
        '<img src="http://127.0.0.1:9/x"><script>console.error("no"); throw new Error("broken");</script>'
    )
    with chromium() as browser:
        for width, scheme, media in (
            (1400, "light", "screen"),
            (400, "dark", "screen"),
            (400, "light", "screen"),
            (794, "dark", "print"),
        ):
            look = look_at(browser, page, width=width, scheme=scheme, media=media)
            assert look.wrong == [], (width, scheme, media)
            assert look.plots == [
                "Loss",
                "Learning rate",
                "Gradient norm",
                "Throughput",
                "Operations",
                "Host memory of rank 0",
                "Routers: busiest expert",
                "Waits of a step",
            ]
        said = " ".join(look_at(browser, broken, width=400).wrong)
        for fault in (
            "console says: no",
            "script failed",
            "asks for http://127.0.0.1:9/x",
            "3",
            "A is empty",
            "A and B overlap",
            "contrast",
        ):
            assert fault in said, said
