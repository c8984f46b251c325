"""Files and where they come from: safetensors checkpoints, GGUF files, the hub, and atomic output."""
