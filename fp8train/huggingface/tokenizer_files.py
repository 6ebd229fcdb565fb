"""The tokenizer of a model's folder: found and copied on import, copied and described on export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fp8train.config.errors import UserError
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.tokenizer import Tokenizer
from fp8train.inference.load import TOKENIZER_FILES, TrainedRun

_ORDER = TOKENIZER_FILES[::-1]  # tokenizer.json decides more than the SentencePiece model beside it


def import_tokenizer(folder: Path, run_dir: Path, *, vocab_size: int, final: Path) -> tuple[str | None, str]:
    """Copy a model's tokenizer into a run directory, which will be at ``final``.

    Returns:
        The file's name, None without one; and what to tell about it.
    """
    found = [folder / name for name in _ORDER if (folder / name).is_file()]
    if not found:
        return None, (
            f"tokenizer: {folder} holds neither {' nor '.join(_ORDER)}; put one into {final} to generate "
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
    data = source.read_bytes()
    config: dict[str, Any]
    if source.suffix == ".json":
        from tokenizers import Tokenizer as Theirs  # it has read the file just now

        eod = Theirs.from_str(data.decode()).id_to_token(tokenizer.eod_id)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eod}
    elif _is_plain_bpe(tokenizer, data):
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_prefix_space": False,
            **{f"add_{name}_token": False for name in ("bos", "eos")},
            **_special_pieces(data, tokenizer.eod_id),
        }
    else:
        return tokenizer.eod_id, told + "; transformers has no class for it: read it with sentencepiece"
    config |= {"model_max_length": run.config.model.max_seq_len, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer.eod_id, told


def _is_plain_bpe(tokenizer: Tokenizer, data: bytes) -> bool:
    """Whether transformers' LlamaTokenizer encodes as this SentencePiece model does: it makes BPE of every
    model, and takes no normalisation from it."""
    from sentencepiece import sentencepiece_model_pb2

    kind = sentencepiece_model_pb2.ModelProto.FromString(data).trainer_spec.model_type
    return tokenizer.token_bytes is not None and kind == sentencepiece_model_pb2.TrainerSpec.BPE


def _special_pieces(data: bytes, eod_id: int) -> dict[str, str | None]:
    """Tokens of a SentencePiece model that transformers wants named; others would be added to it."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    pieces = proto.ModelProto.FromString(data).pieces
    unknown = [piece.piece for piece in pieces if piece.type == proto.ModelProto.SentencePiece.UNKNOWN]
    return {"bos_token": None, "eos_token": pieces[eod_id].piece, "unk_token": unknown[0]}
