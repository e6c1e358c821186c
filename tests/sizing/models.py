"""Configs of well-known models, no more of each than says what their layers hold."""

import json
from pathlib import Path

CONFIGS = json.loads((Path(__file__).parent / "configs.json").read_text())


def written(folder, name, **changes):
    """Write the config of a model, with changes, to a file of that name."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(CONFIGS[name] | changes))
    return path
