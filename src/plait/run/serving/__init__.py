"""What servers read: llama.cpp's GGUF, vLLM's resolver, merging into a quantised base."""
