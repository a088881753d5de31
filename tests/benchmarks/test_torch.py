from benchmarks import _torch


def test_a_peer_finds_its_neighbours_by_the_name_that_is_given(tmp_path):
    (tmp_path / "beside_mine.py").write_text("ANSWER = 42")
    path = tmp_path / "mine.py"
    path.write_text("from beside_mine import ANSWER\ndef mlp(): return ANSWER")
    assert _torch.load(_torch.peer("flash_mlp")(f"{path}:mlp"))() == 42


class FakeCUDA:
    """An allocator; the first call also takes a workspace that stays."""

    def __init__(self):
        self.now, self.peak, self.calls = 100, 0, 0

    def call(self):
        self.now += 1000 if not self.calls else 0
        self.calls += 1
        self.peak = max(self.peak, self.now + 70)

    def synchronize(self):
        pass

    def memory_allocated(self):
        return self.now

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.now


def test_what_a_call_allocates_on_cuda():
    cuda = FakeCUDA()
    assert _torch.peak_over_baseline(cuda, cuda.call) == 70
