"""Finds the Hugging Face architecture of a config.json, and the one that computes what a run of ours does."""

from __future__ import annotations

from fp8train.config.model_schema import ModelConfig
from fp8train.huggingface.architecture import Architecture
from fp8train.huggingface.config_json import ConfigJson
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.huggingface.gpt2 import GPT2
from fp8train.huggingface.gpt_neox import GPT_NEOX
from fp8train.huggingface.llama import LLAMA

ARCHITECTURES = (LLAMA, GPT2, GPT_NEOX)
_ALSO = {"mistral": "MistralForCausalLM"}
"""Names of classes, by model_type, that are read as another architecture."""


def architecture_of_config(config: ConfigJson) -> Architecture:
    """Find the architecture that a config.json describes.

    Raises:
        HuggingFaceError: it is not one of ours, or has another head than that of a language model.
    """
    model_type = config.values.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            break
    else:
        known = ", ".join(name for one in ARCHITECTURES for name in one.model_types)
        config.refuse("model_type", model_type, f"known: {known}")
    named = config.values.get("architectures") or [architecture.name]
    wanted = _ALSO.get(str(model_type), architecture.name)
    bare = wanted.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")
    if named not in ([architecture.name], [wanted], [bare]):
        config.refuse("architectures", named, f"only {wanted} is a language model of this type")
    return architecture


def architecture_of_model(model: ModelConfig, where: str) -> Architecture:
    """The architecture that computes what a decoder with these settings does; ``where`` names it in messages.

    Raises:
        HuggingFaceError: none does.
    """

    def refuse(key: str, why: str) -> None:
        value = getattr(model, key)
        shown = str(value).lower() if isinstance(value, bool) else value
        raise HuggingFaceError(f"{where}: `{key}`: {shown} cannot be exported: {why}")

    if model.norm_placement != "pre":
        refuse("norm_placement", "the architectures written here normalise what enters a branch")
    if model.qk_norm != "none":
        refuse("qk_norm", "the architectures written here do not normalise queries and keys")
    if model.norm == "rmsnorm":
        if model.activation != "swiglu":
            refuse("activation", "with RMSNorm there is only Llama, which has swiglu")
        if model.positions != "rope":
            refuse("positions", "with RMSNorm there is only Llama, which has rope")
        return LLAMA
    if model.activation == "swiglu":
        refuse("activation", "with LayerNorm there are GPT-2 and GPT-NeoX, which have gelu or gelu_tanh")
    if model.num_kv_heads != model.num_heads:
        refuse("num_kv_heads", f"GPT-2 and GPT-NeoX have as many as heads, here {model.num_heads}")
    if model.head_dim * model.num_heads != model.hidden_size:
        refuse("head_dim", "GPT-2 and GPT-NeoX have hidden_size / num_heads")
    return GPT2 if model.positions == "learned" else GPT_NEOX
