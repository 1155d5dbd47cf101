"""Scores of a personal model: answers by generation, answers by likelihood, summaries over clients."""
