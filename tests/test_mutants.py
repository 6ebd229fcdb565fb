"""``tools/mutants.py`` puts faults back by replacing text: the text must still be there, once."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


def test_the_text_of_every_mutant_occurs_once() -> None:
    mutants = tool().MUTANTS
    assert len(mutants) >= 20
    found = {mutant.name: (ROOT / mutant.file).read_text().count(mutant.old) for mutant in mutants}
    assert set(found.values()) == {1}, {name: count for name, count in found.items() if count != 1}
