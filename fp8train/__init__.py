"""fp8train: Megatron-style pretraining for GPT and Llama on PyTorch, FP8 end to end."""

__version__ = "0.1.0"
