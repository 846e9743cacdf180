"""Turns raw text into tokenised Arrow shards; imports neither torch nor the trainer."""
