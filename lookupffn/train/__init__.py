"""Pretraining and fine-tuning on text, for Hugging Face models whose feed-forward layers may be lookups."""
