"""The Dockerfile, as far as it shows without building it: what it copies is there, versions are pinned, and
it does not run as root. tools/lint.sh has hadolint judge the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of every instruction, continued lines joined, without comments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def test_the_image_is_pinned_and_has_what_it_copies() -> None:
    given = dict(word.split("=", 1) for name, word in instructions() if name == "ARG")
    (base,) = (rest for name, rest in instructions() if name == "FROM")
    tag = base.replace("${BASE}", given["BASE"]).partition(":")[2]
    assert re.fullmatch(r"\d+\.\d+\.\d+-cuda\d+\.\d+-cudnn\d+-(runtime|devel)", tag), base
    copied = [path for name, rest in instructions() if name == "COPY" for path in rest.split()[:-1]]
    assert len(copied) >= 7
    assert [path for path in copied if not (ROOT / path).exists()] == []
    extras = re.search(
        r"optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert extras is not None
    assert set(given["EXTRAS"].split(",")) <= set(re.findall(r"^(\w+) = \[", extras[1], re.MULTILINE))


def test_the_image_runs_the_program_as_an_ordinary_user() -> None:
    names = [name for name, _ in instructions()]
    (user,) = (rest for name, rest in instructions() if name == "USER")
    assert user not in ("root", "0")
    assert names.index("USER") > max(number for number, name in enumerate(names) if name in ("RUN", "COPY"))
    (entry,) = (json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT")  # not a shell's
    assert entry[0] == "tini"
    assert entry[-1] == "fp8train"
