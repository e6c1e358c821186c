"""The table of sizes in docs/stores.md is that which ``kvcache plan`` computes."""

from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from kvcache.cli.units import in_bytes
from kvcache.sizing import bytes_at, model_shape, read_config, sizes_of
from tests.sizing.models import CONFIGS, written

pytestmark = pytest.mark.docs
PAGE = Path(__file__).parents[2] / "docs" / "stores.md"
LENGTHS = (8192, 131072)
DTYPES = ("bfloat16", "float32")
HEAD = (
    "| model | a token | windows | a state | = tokens | 8,192 tokens | 131,072 tokens |\n"
    "|---|---|---|---|---|---|---|"
)


def row(name, config):
    shape = model_shape(read_config(config))
    sizes = sizes_of(shape, *DTYPES)
    cells = [
        name,
        in_bytes(sizes.per_token),
        in_bytes(sizes.full_windows) if sizes.full_windows else "",
        in_bytes(sizes.per_state) if sizes.per_state else "",
        f"{sizes.state_tokens:,.0f}" if sizes.state_tokens else "",
        *(in_bytes(bytes_at(shape, tokens, *DTYPES)) for tokens in LENGTHS),
    ]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def test_the_table_is_the_computed_one(tmp_path):
    table = "\n".join([HEAD, *(row(name, written(tmp_path, name)) for name in CONFIGS)])
    assert f"\n\n{table}\n\n" in PAGE.read_text(), table
