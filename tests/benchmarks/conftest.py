import pytest

from benchmarks import _figures
from benchmarks._report import Table, make_console, print_table

META = {"platform": "gpu", "device": "H200", "dtype": "bfloat16", "revision": "a"}


@pytest.fixture
def printed(capsys):
    """Prints the tables of rows, none wider than 80 columns, and draws their figure."""

    def show(benchmark, rows, picture=None):
        console = make_console()
        capsys.readouterr()
        for part in benchmark.tables(rows, META):
            if isinstance(part, Table):
                print_table(console, part)
            else:
                print(part)
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        if picture:
            figure = benchmark.figure(rows, META)
            assert figure
            _figures.draw(figure, picture, META)
            assert picture.read_bytes().startswith(b"\x89PNG")
        return text

    return show
