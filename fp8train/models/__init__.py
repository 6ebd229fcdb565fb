"""One decoder. GPT and Llama are settings of it."""
