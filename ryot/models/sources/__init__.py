"""Where models come from and go to: Hugging Face folders, the hub, GGUF files."""
