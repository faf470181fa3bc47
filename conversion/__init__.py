"""From other libraries' checkpoints to folders that work anywhere in the Hugging Face ecosystem."""
