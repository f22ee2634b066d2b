"""What a model is: the five families, their configurations, checkpoints and tokenizers. Knows nothing of how models are run."""
