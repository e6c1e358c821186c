"""Parts of every benchmark: contestants, interleaved timing, reports, tables, figures."""
