"""Operators: definitions in plain torch beside their fast versions."""
