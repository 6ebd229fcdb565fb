"""Models to and from Hugging Face's folders: ``config.json``, safetensors files and a tokenizer.

What is known of an architecture is data (:mod:`~fp8train.huggingface.llama` and its neighbours): how its
``config.json`` maps to our ``model`` section, and which of its tensors are which of ours, arranged how.
Reading, writing, FP8 formats and the parity report know no architecture.
"""
