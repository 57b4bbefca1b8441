"""Guessing several tokens ahead, and verifying the guesses without changing a single answer."""
