"""Texts, language models and their fine-tuning: Hugging Face in, Hugging Face out."""
