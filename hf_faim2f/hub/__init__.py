"""Model cards, evaluation results in their metadata, and publishing a model folder to the Hub."""
