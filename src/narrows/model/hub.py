from pathlib import Path


def resolve(name: str) -> Path:
    return Path(name)
