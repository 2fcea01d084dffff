"""Traces: kept whole on disk, joined and sliced without inventing neighbours, refused in words."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlab.errors import TraceError
from ktlab.model.trace import Trace
from tests.routing.synthetic import draw, identity, trace_of

E, T = 6, 20


def a_trace(domain: str | None = "prose", *, k: int = 2, **changes: object) -> Trace:
    rng = np.random.default_rng(len(domain or ""))
    fields: dict = {
        "ids_T": rng.integers(0, 99, T),
        "arrays": {
            "layers.1.router.ids": draw(np.ones(E), T, k),
            "layers.1.router.weights": rng.random((T, k), np.float32),
            "layers.1.router.scores": rng.random((T, E), np.float32),
            "layers.10.router.ids": draw(np.ones(E), T, k, seed=1).astype(np.int16),
            "layers.2.router.ids": draw(np.ones(E), T, k, seed=2),
            "embedding": rng.random((T, 3), np.float32),
        },
        "model": identity(E, (1, 2, 10)),
        "stages": {"layers.1.router": 0.25, "output": 1.0},
        "domain_T": None if domain is None else np.full(T, domain),
        "settings": {"top_k": {3: 6}},
        "provenance": {"seed": 1},
    }
    return Trace(**(fields | changes))


def same(a: Trace, b: Trace) -> bool:
    arrays = all(
        np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a.names
    )
    labels = (a.domain_T is b.domain_T is None) or bool(np.all(a.domain_T == b.domain_T))
    rest = [(t.names, t.model, t.stages, t.settings, t.provenance) for t in (a, b)]
    texts = np.array_equal(a.ids_T, b.ids_T) and np.array_equal(a.segment_T, b.segment_T)
    return rest[0] == rest[1] and arrays and labels and texts


def test_reads_by_name_in_the_order_of_layers() -> None:
    trace = a_trace()
    assert len(trace) == T and trace.domains == ("prose",)
    assert trace["layers.10.router.ids"].shape == (T, 2)
    assert [n for n in trace.names if n.endswith("ids")] == [
        f"layers.{i}.router.ids" for i in (1, 2, 10)
    ]
    assert trace.routing is trace.routing and trace.routing.layers == (1, 2, 10)


@pytest.mark.parametrize("domain", [None, "проза"])
def test_survives_the_disk(tmp_path: Path, domain: str | None) -> None:
    trace = a_trace(domain)
    path = trace.save(tmp_path / "t.npz")
    assert same(Trace.load(path), trace)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]
    both = Trace.load(path).merge(trace)  # settings come back equal, integer keys or not
    assert len(both) == 2 * T
    with np.load(path, allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = a_trace().save(tmp_path / "t.npz")
    whole = path.read_bytes()
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("other", "pickled", "text", "empty", "cut"):
        with pytest.raises(TraceError, match=f"{name}.npz: expected a trace written by Trace.save"):
            Trace.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "absent.npz")
    with pytest.raises(TraceError, match="ends in .npz, found .parquet"):
        a_trace().save(tmp_path / "t.parquet")


@given(st.data())
@settings(max_examples=50)
def test_a_damaged_file_never_loads_as_something_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    trace = a_trace()
    raw = bytearray(trace.save(folder / "t.npz").read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "t.npz").write_bytes(raw)
    try:
        assert same(Trace.load(folder / "t.npz"), trace)  # a bit that nothing reads
    except TraceError as error:
        assert "t.npz" in str(error)


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    path = a_trace().save(tmp_path / "t.npz")
    other = identity(E, (1, 2, 10), name="big", fingerprint="big-7")
    assert Trace.load(path, model=identity(E, (1,))).model.name == "toy"
    with pytest.raises(
        TraceError, match=r"a trace of big \(big-7\), found one of toy .*model.trace"
    ):
        Trace.load(path, model=other)


def test_merge_keeps_texts_apart() -> None:
    a, b, c = a_trace("prose"), a_trace("c"), a_trace(None)
    merged = a.merge(b, c)
    assert merged.segment_T.tolist() == [0] * T + [1] * T + [2] * T
    assert merged.domains == ("", "c", "prose")
    assert merged.stages == {"layers.1.router": 0.75, "output": 3.0}
    np.testing.assert_array_equal(merged["embedding"][T : 2 * T], b["embedding"])
    again = merged.merge(merged)
    assert again.segment_T.max() == 5 and (np.diff(again.segment_T) >= 0).all()
    assert same(a.merge(), a)


def test_merge_fills_up_rules_of_different_width() -> None:
    merged = a_trace(k=2).merge(a_trace(k=3))
    assert merged["layers.1.router.ids"].shape == (2 * T, 3)
    assert (merged["layers.1.router.ids"][:T, 2] == -1).all()
    assert (merged["layers.1.router.weights"][:T, 2] == 0).all()
    assert merged.routing.histogram(1).counts_E.sum() == 5 * T


def test_merge_names_all_that_differs() -> None:
    other = a_trace(
        settings={"top_k": 3}, model=identity(E, (1, 2, 10), fingerprint="x", name="big")
    )
    del other.arrays["embedding"]  # type: ignore[attr-defined]
    with pytest.raises(TraceError) as error:
        a_trace().merge(a_trace(), other, "text")  # type: ignore[arg-type]
    for part in ("number 2 is of big", "number 2 has settings", "embedding", "number 3 is a str"):
        assert part in str(error.value)
    assert "number 1" not in str(error.value)


def test_where_takes_domains_and_texts() -> None:
    merged = a_trace("prose").merge(a_trace("c"), a_trace("prose"))
    prose = merged.where(domain="prose")
    assert len(prose) == 2 * T and prose.segment_T.tolist() == [0] * T + [1] * T
    assert prose.stages == {} and prose.domains == ("prose",)
    assert len(merged.where(domain=["prose", "c"])) == 3 * T
    assert len(merged.where(segment=1)) == T == len(merged.where(segment=[1], domain="c"))
    np.testing.assert_array_equal(
        merged.where(segment=1)["embedding"], merged["embedding"][T : 2 * T]
    )


def test_where_makes_no_neighbours() -> None:
    """One text whose labels alternate: nothing in a slice follows anything."""
    labels = np.array(["a", "a", "b"] * 4)
    trace = trace_of({1: np.arange(12)[:, None] % 4}, 4, domain_T=labels)
    assert trace.where(domain="a").segment_T.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(TraceError, match="two token|longest text"):
        trace.where(domain="b").routing.reuse(1)


def test_to_frame_has_a_row_for_each_selected_expert() -> None:
    ids_TK = np.array([[3, 1], [2, -1]])
    weights = np.array([[0.7, 0.3], [1.0, 0.0]])
    trace = Trace(
        ids_T=np.array([50, 51]), model=identity(4, (1,)), domain_T=np.array(["a", "b"]),
        arrays={"layers.1.router.ids": ids_TK, "layers.1.router.weights": weights},
    )  # fmt: skip
    frame = trace.to_frame()
    assert frame[["token", "id", "rank", "expert"]].to_numpy().tolist() == [
        [0, 50, 0, 3], [0, 50, 1, 1], [1, 51, 0, 2],
    ]  # fmt: skip
    assert frame["weight"].tolist() == [0.7, 0.3, 1.0] and frame["domain"].tolist() == list("aab")
    scored = a_trace()
    row = scored.to_frame().query("layer == 1").iloc[5]
    assert row["score"] == scored["layers.1.router.scores"][row["token"], row["expert"]]


def test_shows_itself_escaped() -> None:
    trace = a_trace("<i>")
    bundle = trace._repr_mimebundle_()
    assert "router.ids (layers 1-2, 10)" in bundle["text/plain"]
    assert "20 tokens, 1 text\n" in bundle["text/plain"]
    assert "<i>" not in bundle["text/html"] and "&lt;i&gt;" in bundle["text/html"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.1.router.id", 'did you mean "layers.1.router.ids"'),
        ("layers.2.router.scores", r'model.trace\(text, names=\["layers.2.router.scores"\]\)'),
        ("layers.0.router.ids", "layer 0 is dense and has no router"),
        ("layers.11.router.ids", "the last layer is 10"),
        ("nonsense", "it holds embedding, layers.1"),
    ],
)
def test_an_unknown_name_is_explained(name: str, expected: str) -> None:
    with pytest.raises(TraceError, match=expected):
        a_trace()[name]
    assert name not in a_trace()


def test_unknown_domain_and_text_are_explained() -> None:
    with pytest.raises(TraceError, match='unknown domain pros; did you mean "prose"'):
        a_trace().where(domain="pros")
    with pytest.raises(TraceError, match="carry no label"):
        a_trace(None).where(domain="prose")
    with pytest.raises(TraceError, match=r"unknown text \(segment\) 7.*has 0"):
        a_trace().where(segment=7)
    with pytest.raises(TraceError, match="no token is in all"):
        a_trace("prose").merge(a_trace("c")).where(domain="c", segment=0)


def test_an_impossible_trace_lists_all_that_is_wrong() -> None:
    with pytest.raises(TraceError, match="empty trace.*longer text"):
        trace_of({1: np.zeros((0, 2), int)}, 4)
    arrays = {
        "layers.1.router.ids": np.full((T, 2), E) - [[0, 1]],
        "layers.2.router.ids": np.ones((T, 2), int),
        "layers.3.router.ids": np.ones(T),
        "embedding": np.ones((3, 4)),
    }
    with pytest.raises(TraceError) as error:
        a_trace(arrays=arrays, segment_T=np.arange(T)[::-1])
    for part in (
        "embedding is for 3 tokens, expected 20", "layers.1.router.ids names experts 5..6",
        "layers.2.router.ids names an expert twice", "layers.3.router.ids is float64",
        "segment_T goes back",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(TraceError, match="domain_T is for 2"):
        replace(a_trace(), domain_T=np.array(["a", "b"]))
