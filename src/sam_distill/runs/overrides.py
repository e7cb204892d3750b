"""Overrides for Hydra's command line."""


def quoted_override(key: str, value: str) -> str:
    """Return the override KEY="VALUE", escaped for whatever characters the value has."""
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'
