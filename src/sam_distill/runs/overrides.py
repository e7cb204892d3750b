"""Options as Hydra reads them from a command line."""


def quoted_override(key: str, value: str) -> str:
    """KEY="VALUE", whatever characters the value has."""
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'
