from popo_lite.seeding import stream_seed


def test_streams_are_fixed_for_ever():
    """Resumed runs, other machines and published figures rely on these numbers."""
    assert stream_seed("rollout", 0, 0) == 2520658069207184988
    assert 0 <= stream_seed() < 2**63


def test_keys_do_not_run_into_one_another():
    keys = [("a", 1), ("a", "1"), ("a1",), ("a", 1, ""), (1, "a"), ("a", 11), ("a", 1, 1), ("", "a", 1)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
