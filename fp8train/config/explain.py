"""``fp8train config``: every value of a run and where it came from, and the reference of all keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fp8train.config.dump import effective
from fp8train.config.keys import describe, key_table
from fp8train.config.ownership import look_at, why_hidden
from fp8train.config.resolve import ResolvedConfig
from fp8train.config.scalars import needs_quotes
from fp8train.config.schema import to_plain
from fp8train.config.threads import FROM_ENVIRONMENT, threads_from_environment


def explain(resolved: ResolvedConfig, environment: Mapping[str, str]) -> str:
    """A table of ``key  value  origin``, one line per value, grouped by section. Plain text, no colour.

    ``environment`` are the variables of a process; of threads it says what a run started with them takes.
    Settings without effect (how FP8 would be done, while it is off) are replaced by one line.
    """
    plain, origins = effective(resolved.config), dict(resolved.origins)
    if plain["run"]["threads"] is None and (threads := threads_from_environment(environment)):
        plain["run"]["threads"], origins["run.threads"] = threads, FROM_ENVIRONMENT
    rows = [
        (name, _show(value), str(origin))
        for name, origin in origins.items()
        if (value := _lookup(plain, name)) is not _HIDDEN
    ]
    widths = [min(max(len(row[column]) for row in rows), limit) for column, limit in ((0, 60), (1, 40))]
    lines = [f"# {' <- '.join(reversed(resolved.sources))}"]
    section = ""
    for name, value, origin in rows:
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            lines.append("")
        lines.append(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}")
    if resolved.taken_back:
        lines += ["", *(f"# {line}" for line in resolved.taken_back)]
    if len(rows) < len(resolved.origins):
        hidden = len(resolved.origins) - len(rows)
        settings, are = ("setting", "is") if hidden == 1 else ("settings", "are")
        look = look_at(to_plain(resolved.config))
        unmet = [why_hidden(tuple(name.split(".")), look) for name in resolved.origins]
        why = "; ".join(dict.fromkeys(one.reason for one in unmet if one is not None))
        lines += ["", f"# {hidden} {settings} without effect {are} not shown: {why}"]
    return "\n".join(lines) + "\n"


_HIDDEN = object()


def _lookup(plain: dict[str, Any], name: str) -> Any:
    value: Any = plain
    for step in name.split("."):
        if not isinstance(value, dict) or step not in value:
            return _HIDDEN
        value = value[step]
    return value


def _show(value: Any) -> str:
    if isinstance(value, str) and not needs_quotes(value) and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False)


_REFERENCE_HEAD = (
    "# Configuration reference",
    "",
    "Every key of a run's YAML file: what may be written, the default, what it means. Written by",
    "",
    "    fp8train config --reference > docs/reference.md",
    "    fp8train config --schema > docs/schema.json",
    "",
    "from the schema that checks the file (a test compares). The second file is the same for",
    "editors. With the YAML language server, write this on the first line of a run's file:",
    "",
    "    # yaml-language-server: $schema=PATH/docs/schema.json",
    "",
    "Keys are nested in the file (`train: {steps: 1000}`) and dotted on the command line",
    "(`train.steps=1000`). `key=null` takes back what a file sets. *By preset* means that",
    "`model.family`, `precision.level`, `.recipe`, `.profile` or `parametrization.kind` fill the key,",
    "or that another key does. `fp8train config FILE` shows with what, and who won. A key that was",
    "written and that the other settings leave without effect is refused.",
    "",
    "A setting that nothing will read is refused, such as `train.eval_batches` beside",
    "`train.eval_interval: 0`. But a later place may turn off what an earlier one describes. A file",
    "lies over its `base:`, and the command line over all files. So `train.eval_interval=0` on the",
    "command line also takes back the `eval_batches` of a file. `fp8train config` and the run say",
    "so.",
    "",
)


def reference() -> str:
    """All keys as a Markdown page: what may be written, the default, what it means."""
    table = key_table()
    sections = table.children(())
    lines = [*_REFERENCE_HEAD, "Sections:", ""]
    lines += [f"- [{section.name}](#{section.name})" for section in sections]
    for section in sections:
        lines += ["", f"## {section.name}", "", section.description, ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        for key in table.leaves():
            if key.path[0] == section.path[0]:
                value = describe(key.fragment, optional=key.optional)
                cells = (f"`{key.name}`", value, _default(key.required, key.fragment), key.description)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(required: bool, fragment: dict[str, Any]) -> str:
    if required:
        return "**required**"
    return f"`{json.dumps(fragment['default'])}`" if "default" in fragment else "by preset"
