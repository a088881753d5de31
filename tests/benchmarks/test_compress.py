from benchmarks import compress, frame
from benchmarks._harness import Options, run


def test_rows_tables_and_figure(monkeypatch, printed, tmp_path):
    monkeypatch.setattr(compress, "PROBLEMS", 2)
    monkeypatch.setattr(compress, "SIZES", (16, 32, 64))
    only = "^(compress (SVD|SVD-LLM|magnitude) kept 0.5|CompressedMLP 2:4)"
    args = frame.parse(compress.BENCHMARK, ["--full", "--only", only])
    rows = run(args.cases, Options(warmup=1, iterations=1))
    assert [row["reason"] for row in rows] == [None] * 4
    plain, aware, sparse = (row["lost"] for row in rows[:3])
    assert 0 < aware < plain < 1 and 0 < sparse < 1
    text = printed(compress.BENCHMARK, rows, tmp_path / "figure.png")
    assert f"{aware:.3f}" in text and "median ms" in text


def test_the_ranks_have_the_share_of_the_parameters():
    for share, sparse in ((0.25, False), (0.25, True), (0.75, False)):
        rank = compress.rank_of(share, 96, 256, sparse)
        parameters = rank * (96 + 256) / (1 + sparse)
        assert share * 96 * 256 - 4 * (96 + 256) < parameters <= share * 96 * 256
