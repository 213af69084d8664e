"""Which caches get which formats: what is asked, or what they need under a limit."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcompile import caches
from mxcompile.cache_choice import AUTO_DIVERGENCE, CacheChoice, choose_caches, damage
from mxcompile.errors import BudgetError, PlanError, UsageError
from mxcompile.formats import CACHE_FORMATS
from mxcompile.statistics import Statistics

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[b,s,64] x, float[b,1,p,64] pk, float[b,1,p,64] pv, float[b,2,p,DIM] qk,
   float[b,2,p,DIM] qv)
    => (float[b,s,64] z) {
    y, yk, yv = Attention<q_num_heads = 1, kv_num_heads = 1>(x, x, x, , pk, pv)
    z, zk, zv = Attention<q_num_heads = 2, kv_num_heads = 2>(y, y, y, , qk, qv)
}"""


def model(dim: int = 32) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(MODEL.replace("DIM", str(dim))))


HARM = {
    "pk": {"int4": 0.4, "int8": 1e-3, "fp16": 1e-7, "fp32": 0.0},
    "pv": {"int4": 2e-4, "int8": 1e-6, "fp16": 1e-10, "fp32": 0.0},
    "qk": {"int4": 3e-2, "int8": 1e-4, "fp16": 1e-8, "fp32": 0.0},
    "qv": {"int4": 1e-3, "int8": 4e-6, "fp16": 1e-9, "fp32": 0.0},
}


def chosen(text: str, harm: dict[str, dict[str, float]] = HARM, dim: int = 32) -> str:
    found = choose_caches(model(dim), Statistics(1, {}, {}, {}, harm), CacheChoice.parse(text))
    assert list(found) == ["pk", "pv", "qk", "qv"]
    return " ".join(fmt.name for fmt in found.values())


def test_formats_are_for_keys_and_values() -> None:
    assert chosen("int8") == "int8 int8 int8 int8"
    assert chosen("int8,int4") == "int8 int4 int8 int4"
    assert chosen("fp32", {}) == "fp32 fp32 fp32 fp32"


def test_a_divergence_is_kept_with_few_bytes() -> None:
    assert chosen("kld<=1") == "int4 int4 int4 int4"
    assert chosen("kld<=0.1") == "int8 int4 int4 int4"
    # All in 8 bits are 1.105e-3; the first key alone is most of that.
    assert chosen("kld<=0.0011") == "fp16 int4 int8 int8"
    assert CacheChoice.parse("auto").limit == CacheChoice.parse(f"kld<={AUTO_DIVERGENCE}").limit


def test_a_size_is_spent_where_it_saves_most() -> None:
    assert chosen("4.5bit") == "int4 int4 int4 int4"
    assert chosen("6bit") == "int8 int4 int4 int4"
    assert chosen("6.5bit") == "int8 int4 int8 int4"
    assert chosen("32bit") == "fp32 fp32 fp32 fp32"
    with pytest.raises(BudgetError, match=r"caches of 4bit a number: the smallest take 4\.500bit"):
        chosen("4bit")


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=4, max_size=4),
    st.floats(1e-9, 2),
)
def test_no_cache_can_be_narrowed(harms: list[list[float]], limit: float) -> None:
    """The limit holds, and the last widening was necessary."""
    names = ["int4", "int8", "fp16"]
    harm = {
        cache: {**dict(zip(names, sorted(h, reverse=True), strict=True)), "fp32": 0.0}
        for cache, h in zip(HARM, harms, strict=True)
    }
    statistics = Statistics(1, {}, {}, {}, harm)
    found = choose_caches(model(), statistics, CacheChoice.parse(f"kld<={limit}"))
    assert damage(found, statistics) <= limit * (1 + 1e-9) + 1e-12
    sizes = {c.name: c for c in caches.find(model())}
    least = dict.fromkeys(found, CACHE_FORMATS["int4"])
    if damage(least, statistics) <= limit:
        assert found == least
    assert all(sizes[n].bytes(f) >= sizes[n].bytes(least[n]) for n, f in found.items())


def test_other_heads_are_refused_or_stay_float() -> None:
    with pytest.raises(PlanError, match="qk has heads of 40 columns: int8 takes multiples of 32"):
        chosen("int8", dim=40)
    assert chosen("kld<=1", dim=40) == "int4 int4 fp16 fp16"


def test_limits_take_gradients() -> None:
    with pytest.raises(UsageError, match="no gradients say what pk needs: name its format"):
        chosen("auto", {})


@pytest.mark.parametrize(
    "text", ["", "int3", "int8,int8,int8", "int8,", "20tok/s", "5MB", "auto,int8"]
)
def test_what_is_no_choice_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no choice of caches: int4, int8, fp16, fp32, two"):
        CacheChoice.parse(text)


@pytest.mark.parametrize("text", ["int8", "int8,int4", "kld<=0.002", "6.5bit"])
def test_choices_survive_their_text_form(text: str) -> None:
    assert str(CacheChoice.parse(text)) == text


def test_rows_of_caches() -> None:
    x = np.zeros((1, 64), np.float32)
    for fmt in CACHE_FORMATS.values():
        assert sum(part.nbytes for part in caches.encode(x, fmt)) == fmt.row_bytes(64)
