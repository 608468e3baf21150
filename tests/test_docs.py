# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/ name what is there: files, functions, keys, commands, metrics, messages."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from comet_ds import __main__ as command_line
from comet_ds.config import CometConfig
from comet_ds.observe.metrics import LAYER_METRICS, RUN_METRICS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Messages of torch and of DeepSpeed.
FOREIGN_MESSAGES = {"CheckpointError", "... is not a model state checkpoint"}
# Values in a message, and places where one message is put into another.
VALUES = (
    r"[RSNM]|32|cpu|fused|pipelined|process|comet_ds_moe|torch 2\.11|rows of its"
    r"|DistributedDataParallel"
)
VALUE_OR_JOINT = rf'\.\.\.|\b(?:{VALUES})\b|"(?:fused|comet_ds|tokens)"|: |[()\[\]]'


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def code_blocks(page: Path) -> Iterator[str]:
    yield from re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of every row of every table."""
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def chart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("chart")


def headings(page: Path) -> set[str]:
    """Return the anchors GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_are_there(page: Path) -> None:
    pattern = r"`((?:comet_ds|csrc|op_builder|tests|examples|docs)/[\w./]+)`"
    for name in re.findall(pattern, page.read_text()):
        assert (ROOT / name).exists(), name


def test_design_names_functions_of_the_files() -> None:
    """A name in backticks behind a file, in the last cell of a row, is in that file."""
    num_names = 0
    for *_, where in rows(read("design.md")):
        path = None
        for name in re.findall(r"`([^`]+)`", where):
            if "/" in name:
                path = ROOT / name
            elif path is not None and path.is_file():
                assert f"{name}(" in path.read_text(), (name, path)
                num_names += 1
    assert num_names > 10


def test_configuration_has_every_key_and_its_default() -> None:
    fields = CometConfig.model_fields
    found = {
        cells[0].strip("`"): json.loads(cells[1].strip("`"))
        for cells in rows(read("configuration.md"))
        if cells[0].strip("`") in fields and len(cells) == 3
    }
    assert found == {name: field.default for name, field in fields.items()}


def test_configuration_has_every_command() -> None:
    commands = {cells[0].strip("`").split()[0] for cells in rows(read("configuration.md"))}
    assert set(command_line.COMMANDS) <= commands


def test_monitoring_has_every_metric() -> None:
    cells = "".join(row[0] for row in rows(read("monitoring.md")))
    assert sorted(re.findall(r"`(\w+)`", cells)) == sorted([*RUN_METRICS, *LAYER_METRICS])


def help_of(arguments: list[str]) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        command_line.main([*arguments, "--help"])
    return text.getvalue()


def test_commands_have_the_options() -> None:
    helps: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for line in "\n".join(code_blocks(page)).replace("\\\n", " ").splitlines():
            _, is_ours, rest = line.partition("python -m comet_ds ")
            if not is_ours:
                continue
            words = shlex.split(rest, comments=True)
            has_verb = words[0] == "checkpoint" or words[:2] == ["bench", "train"]
            command = tuple(words[: 1 + has_verb])
            if command not in helps:
                helps[command] = help_of(list(command))
            for option in (word for word in words if word.startswith("--")):
                assert re.search(rf"{option}\b", helps[command]), (line, option)
    assert len(helps) >= 8


def strings_in_sources() -> str:
    """Return all literal text of the package, a line each; {} stands for values."""
    found = []
    for path in [*(ROOT / "comet_ds").rglob("*.py"), *(ROOT / "op_builder").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text().replace('\\"', "'")
        for literals in re.findall(r'(?:"[^"\n]*"\s*)+', text):
            found.append("".join(re.findall(r'"([^"]*)"', literals)).replace("'", '"'))
    return "\n".join(found)


def test_messages_are_those_of_the_sources() -> None:
    """The fixed words of every message in the first cell of a row are in the sources."""
    sources, num_messages = strings_in_sources(), 0
    for cells in rows(read("troubleshooting.md")):
        for message in re.findall(r"`([^`]+)`", cells[0]):
            if message in FOREIGN_MESSAGES or message.startswith("python "):
                continue
            for words in re.split(VALUE_OR_JOINT, message):
                words = words.strip(' ,"')
                assert words in sources, (message, words)
            num_messages += 1
    assert num_messages > 50


def test_chart_is_of_the_data(chart: ModuleType) -> None:
    """The command in benchmarks.md draws the chart that is there."""
    text = "\n".join(code_blocks(ROOT / "docs/benchmarks.md")).replace("\\\n", " ")
    (command,) = (line for line in text.splitlines() if "docs/chart.py" in line)
    words = shlex.split(command)
    files = [word for word in words if word.endswith(".json")]
    results = [json.loads((ROOT / name).read_text()) for name in files]
    groups = [group for result in results for group in chart.read_groups(result)]
    title = f"Training, tokens per second of {chart.machine(results)}"
    assert (ROOT / words[-1]).read_text() == chart.draw(groups, title)


def test_chart_refuses_unequal_machines(chart: ModuleType) -> None:
    with pytest.raises(ValueError, match="1 x A, 2 x A"):
        chart.machine([{"num_ranks": 2, "device": "A"}, {"num_ranks": 1, "device": "A"}])
