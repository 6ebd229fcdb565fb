"""The tokenizer of a model's folder: found and copied on import, copied and described on export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fp8train.config.errors import UserError
from fp8train.data.tokenizer import load_tokenizer
from fp8train.inference.load import TOKENIZER_FILES, TrainedRun

_ORDER = tuple(reversed(TOKENIZER_FILES))  # tokenizer.json decides more than the SentencePiece model beside it


def import_tokenizer(folder: Path, run_dir: Path, *, vocab_size: int) -> tuple[str | None, str]:
    """Copy a model's tokenizer into a run directory.

    Returns:
        The file's name, None without one; and what to tell about it.
    """
    found = [folder / name for name in _ORDER if (folder / name).is_file()]
    if not found:
        return None, (
            f"tokenizer: {folder} holds neither {' nor '.join(_ORDER)}; put one into {run_dir} to generate "
            "text (a vocab.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes "
            "tokenizer.json)"
        )
    source = found[0]
    shutil.copyfile(source, run_dir / source.name)
    try:
        tokenizer = load_tokenizer(source)
    except UserError as error:
        return source.name, f"tokenizer: {source.name} copied, but not usable here: {error}"
    if tokenizer.vocab_size > vocab_size:
        return source.name, (
            f"tokenizer: {source.name} copied, but it has {tokenizer.vocab_size} tokens and the model knows "
            f"{vocab_size}: it belongs to another model"
        )
    return source.name, (
        f"tokenizer: {source.name}, {tokenizer.vocab_size} tokens, documents end with {tokenizer.eod_id}"
    )


def export_tokenizer(run: TrainedRun, folder: Path) -> tuple[int | None, str]:
    """Copy a run's tokenizer into a model's folder, with what transformers needs to load it.

    Returns:
        The id that ends documents, None without a tokenizer; and what to tell about it.
    """
    source = run.tokenizer_file()
    if source is None:
        return None, "tokenizer: none was found with the run; none is exported"
    tokenizer = run.tokenizer()
    name = "tokenizer.json" if source.suffix == ".json" else "tokenizer.model"
    shutil.copyfile(source, folder / name)
    told = f"tokenizer: {name}, {tokenizer.vocab_size} tokens, end of document {tokenizer.eod_id}"
    if source.suffix != ".json":
        return tokenizer.eod_id, told + "; a SentencePiece model: read it with the sentencepiece library"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _token_text(json.loads(source.read_bytes()), tokenizer.eod_id),
        "model_max_length": run.config.model.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer.eod_id, told


def _token_text(content: dict[str, Any], number: int) -> str | None:
    """The text of a token in a tokenizer.json."""
    for token in content.get("added_tokens", []):
        if token["id"] == number:
            return str(token["content"])
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, dict):
        return next((text for text, found in vocabulary.items() if found == number), None)
    return str(vocabulary[number][0])
