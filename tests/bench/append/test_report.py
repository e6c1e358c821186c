"""What a report says about figures that are known, and that it survives a file."""

import builtins
import io
import json

import pytest

from kvcache.bench import AppendReport, Skipped, Timing

ALL = ["memmove", "raw", "slice_update", "KVCache.update", "RotatingKVCache.update"]


def made_of(costs, backend="numpy:cpu", capacities=(1024,)):
    timings = tuple(
        Timing(backend, "float32", capacity, name, 8, (us, us, us))
        for name, us in costs.items()
        for capacity in capacities
    )
    return AppendReport(1, 8, 128, 3, "a machine", {"numpy": "2.0"}, timings)


def verdict(report, rule):
    """Returns the measured figure of that rule and whether it holds."""
    (judged,) = (verdict for verdict in report.verdicts if verdict.rule == rule)
    return judged.measured, judged.passed


def test_the_median_counts():
    timing = Timing("numpy:cpu", "float32", 8, "raw", 4, (1.0, 900.0, 3.0, 2.0, 4.0))
    assert timing.us == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert Timing("numpy:cpu", "float32", 8, "raw", 4, (7.0,)).quartiles == (7.0, 7.0)


def test_ratios_are_to_the_contestant_beside():
    report = made_of({"raw": 2.0, "slice_update": 3.0})
    timing = report.find("numpy:cpu", "float32", 1024, "slice_update")
    assert timing is not None
    assert report.ratio(timing, "raw") == 1.5
    assert report.ratio(timing, "memmove") is None
    assert report.find("numpy:cpu", "float32", 8192, "raw") is None


@pytest.mark.parametrize(
    ("backend", "costs", "rule", "measured", "passed"),
    [
        ("numpy:cpu", {"raw": 10, "slice_update": 13}, "slice_update / raw", 1.3, True),
        ("numpy:cpu", {"raw": 10, "slice_update": 14}, "slice_update / raw", 1.4, False),
        ("jax:cpu:0", {"raw": 10, "KVCache.update": 15}, "KVCache.update - raw", 5, True),
        ("jax:cpu:0", {"raw": 10, "KVCache.update": 16}, "KVCache.update - raw", 6, False),
        (
            "torch:cpu",
            {"transformers StaticCache": 10, "KVCache.update": 13},
            "KVCache.update / transformers StaticCache",
            1.3,
            False,
        ),
        (
            "torch:cuda:0",
            {"transformers DynamicCache": 240, "KVCache.update": 10},
            "transformers DynamicCache / KVCache.update",
            24,
            False,
        ),
        (
            "torch:cpu",
            {"transformers DynamicCache": 250, "KVCache.update": 10},
            "transformers DynamicCache / KVCache.update",
            25,
            True,
        ),
        (
            "mlx:gpu",
            {"mlx-lm KVCache": 20, "KVCache.update": 21},
            "KVCache.update / mlx-lm KVCache",
            1.05,
            True,
        ),
        (
            "mlx:gpu",
            {"mlx-lm RotatingKVCache": 20, "RotatingKVCache.update": 23},
            "RotatingKVCache.update / mlx-lm RotatingKVCache",
            1.15,
            False,
        ),
    ],
)
def test_targets_are_judged_by_their_bound(backend, costs, rule, measured, passed):
    report = made_of(costs, backend, capacities=(8192,))
    assert verdict(report, rule) == (pytest.approx(measured), passed)


def test_the_concatenating_peer_is_judged_at_8k_only():
    costs = {"transformers DynamicCache": 10.0, "KVCache.update": 10.0}
    assert not made_of(costs, "torch:cpu", capacities=(1024,)).verdicts
    assert not made_of(costs, "numpy:cpu", capacities=(8192,)).verdicts


def test_the_worst_capacity_counts():
    timings = tuple(
        Timing("numpy:cpu", "float32", capacity, name, 8, (us,))
        for name, capacity, us in [
            ("raw", 1024, 10.0),
            ("raw", 8192, 10.0),
            ("slice_update", 1024, 15.0),
            ("slice_update", 8192, 12.0),
        ]
    )
    report = AppendReport(1, 8, 128, 1, "a machine", {}, timings)
    (judged,) = (verdict for verdict in report.verdicts if verdict.rule == "slice_update / raw")
    assert (judged.capacity, judged.measured, judged.passed) == (1024, 1.5, False)


@pytest.mark.parametrize(("large", "passed"), [(15.0, True), (16.0, False)])
def test_cost_must_not_rise_with_capacity(large, passed):
    timings = tuple(
        Timing("numpy:cpu", "float32", capacity, name, 8, (us,))
        for name, capacity, us in [
            ("KVCache.update", 1024, 10.0),
            ("KVCache.update", 32768, large),
            ("RotatingKVCache.update", 1024, 10.0),
            ("RotatingKVCache.update", 32768, 10.0),
        ]
    )
    report = AppendReport(1, 8, 128, 1, "a machine", {}, timings)
    assert verdict(report, "KVCache.update, 32,768 / 1,024") == (large / 10, passed)


def test_a_report_survives_its_file(report, tmp_path):
    report.to_json(tmp_path / "report.json")
    assert AppendReport.from_json(tmp_path / "report.json") == report


def test_the_file_holds_what_a_reader_would_compute(numpy_report, tmp_path):
    numpy_report.to_json(tmp_path / "report.json")
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    raw = [entry for entry in record["timings"] if entry["contestant"] == "raw"]
    assert [entry["ratio_to_raw"] for entry in raw] == [1.0] * len(raw)
    assert all(entry["ratio_to_memmove"] > 0 for entry in record["timings"])
    assert len(record["verdicts"]) == len(numpy_report.verdicts)
    assert record["versions"].keys() >= {"numpy"}


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "kvcache.bench.append/2"}', "no"])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "other.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"from_json reads|Expecting value"):
        AppendReport.from_json(tmp_path / "other.json")


def rendered(report):
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    console.print(report.to_table())
    text = str(console.file.getvalue())
    assert "…" not in text  # a column cut off
    return text


def test_the_table_shows_every_figure_in_80_columns():
    report = made_of(
        {
            "memmove": 0.5,
            "raw": 2.0,
            "slice_update": 2.5,
            "transformers StaticCache": 12.34,
            "transformers DynamicCache": 123456.0,
        },
        capacities=(1024, 8192, 32768),
    )
    lines = rendered(report).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert ["memmove", "0.50", "0.50", "0.50", "0.25"] in rows
    assert ["raw", "2.00", "2.00", "2.00", "4.00"] in rows
    assert ["slice_update", "2.50", "2.50", "2.50", "1.25", "5.00"] in rows
    assert ["transformers", "DynamicCache", "123k", "123k", "123k", "62k", "247k"] in rows
    assert ["slice_update", "/", "raw", "<=", "1.3x", "1.25", "1,024", "pass"] in rows
    assert ["slice_update,", "32,768", "/", "1,024", "<=", "1.5x", "1.00", "32,768", "pass"] in rows


def test_ratios_that_differ_are_shown_from_least_to_greatest():
    timings = tuple(
        Timing("numpy:cpu", "float32", capacity, name, 8, (us,))
        for name, capacity, us in [
            ("raw", 1024, 2.0),
            ("raw", 8192, 2.0),
            ("slice_update", 1024, 4.0),
            ("slice_update", 8192, 3.0),
        ]
    )
    text = rendered(AppendReport(1, 8, 128, 1, "a machine", {}, timings))
    assert "1.50 - 2.00" in text


@pytest.mark.installation
def test_the_table_says_who_is_missing_and_who_missed(report):
    text = " ".join(rendered(report).split())
    for skip in report.skipped:
        assert f"{skip.contestant or 'everyone'} on" in text
    for contestant in ALL:
        assert contestant in text
    missed = sum(not verdict.passed for verdict in report.verdicts)
    assert text.count("MISS") == missed
    assert text.count("pass") == len(report.verdicts) - missed


def test_a_report_of_nothing_still_prints():
    skipped = (Skipped("mlx:cpu", "float8_e5m2", "", "mlx has no float8_e5m2"),)
    report = AppendReport(1, 8, 128, 3, "a machine", {}, (), skipped)
    assert not report.verdicts
    assert "Not measured: everyone on mlx:cpu float8_e5m2" in rendered(report)


@pytest.mark.installation
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_written(report, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"report.{suffix}"
    report.plot(path)
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


def test_a_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="this report has none"):
        AppendReport(1, 8, 128, 3, "a machine", {}).plot(tmp_path / "report.png")


def test_without_matplotlib_a_plot_says_what_installs_it(numpy_report, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'kvcache\[bench\]'"):
        numpy_report.plot(tmp_path / "report.png")
