"""Scores of a model: losses, generated answers, answers chosen by likelihood, summaries over clients."""
