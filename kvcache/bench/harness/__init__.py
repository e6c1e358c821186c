"""The parts of every benchmark: contestants, interleaved timing, reports, tables, figures.

It knows no framework and no benchmark: those import the harness, never the other way round.
"""
